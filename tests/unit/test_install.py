"""Set-up takes pip's settings along to uv, and says at once what the machine lacks."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from research_rl.paths import CHECKOUT

LISTED = """
:env:.cert='/of/the/variable.pem'
global.cert='/of/the/file.pem'
global.extra-index-url='\\nhttps://one.example/simple\\nhttps://two.example/simple'
global.index-url='https://mirror.example/simple'
global.timeout='60'
install.index-url='https://install.example/simple'
install.trusted-host='mirror.example'
"""


@pytest.fixture(name="install")
def _install() -> dict[str, Any]:
    return runpy.run_path(str(CHECKOUT / "requirements/install.py"))


def environment(install: dict[str, Any], monkeypatch: pytest.MonkeyPatch, listed: str, *, certificates: bool = True) -> dict[str, str]:
    for name in ("SSL_CERT_FILE", "UV_SYSTEM_CERTS", "UV_INDEX", "UV_INSECURE_HOST", "UV_INDEX_STRATEGY"):
        monkeypatch.delenv(name, raising=False)
    function: Callable[[Path], dict[str, str]] = install["uv_environment"]
    monkeypatch.setitem(function.__globals__, "system_certificates", lambda: certificates)
    monkeypatch.setattr("subprocess.run", lambda *_, **__: CompletedProcess([], 0, stdout=listed))
    return {name: value for name, value in function(Path("python")).items() if name.startswith(("UV_", "SSL_CERT_FILE"))}


def test_uv_is_told_of_pips_indexes_and_certificates(install: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_DEFAULT_INDEX", "https://chosen.example/simple")
    told = environment(install, monkeypatch, LISTED)
    assert told == {
        "UV_DEFAULT_INDEX": "https://chosen.example/simple",
        "UV_INDEX": "https://one.example/simple https://two.example/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_INSECURE_HOST": "mirror.example",
        "UV_SYSTEM_CERTS": "true",
        "SSL_CERT_FILE": "/of/the/variable.pem",
    }
    monkeypatch.delenv("UV_DEFAULT_INDEX")
    assert environment(install, monkeypatch, LISTED)["UV_DEFAULT_INDEX"] == "https://install.example/simple"


def test_without_settings_and_certificates_uv_has_its_own(install: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UV_DEFAULT_INDEX", raising=False)
    assert environment(install, monkeypatch, "", certificates=False) == {}


def test_a_missing_library_of_vllm_is_one_line_with_the_remedy(install: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(install["require_numa"].__globals__, "NUMA", "libnuma.so.99")
    with pytest.raises(SystemExit, match=r"libnuma\.so\.99 is missing, which vLLM loads; install it .*libnuma1"):
        install["main"](["policy"])
