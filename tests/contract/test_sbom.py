"""Each lock's list of parts names what the lock pins, in CycloneDX's own schema, and is written whole or not at all."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from research_rl.errors import ConfigError
from research_rl.paths import CHECKOUT
from tasks.local import sbom


def named(path: Path) -> dict[str, str]:
    """Return the version of each part."""
    tree = json.loads(path.read_text())
    assert (tree["bomFormat"], tree["specVersion"], tree["metadata"]["component"]["name"]) == ("CycloneDX", "1.6", "research-rl")
    return {part["name"]: part["version"] for part in tree["components"]}


def test_it_has_every_pin_of_the_lock_and_torch_where_set_up_adds_it(tmp_path: Path) -> None:
    lines = (CHECKOUT / "requirements/retriever.txt").read_text().splitlines()
    wanted = dict(line.split("==") for line in lines)
    assert named(sbom.write(CHECKOUT / "requirements/retriever.txt", tmp_path)) == wanted
    with_torch = named(sbom.write(CHECKOUT / "requirements/retriever-torch.txt", tmp_path))
    assert with_torch["torch"] == "2.13.0+cpu" and wanted.keys() <= with_torch.keys()


def test_the_same_lock_gives_the_same_bytes(tmp_path: Path) -> None:
    first, again = (sbom.write(CHECKOUT / "requirements/retriever.txt", tmp_path / name).read_bytes() for name in "ab")
    assert first == again


def test_a_line_that_is_no_requirement_leaves_the_earlier_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = tmp_path / "retriever.txt"
    lock.write_text("numpy==2.3.5\n")
    before = sbom.write(lock, tmp_path / "out").read_bytes()
    lock.write_text("numpy==2.3.5\n!!\n")
    with pytest.raises(ConfigError, match=re.escape("retriever.txt has no list of parts: its line '!!' is no NAME==VERSION")):
        sbom.write(lock, tmp_path / "out")
    assert (tmp_path / "out/retriever.cdx.json").read_bytes() == before
    assert sbom.main(["absent"]) == 1
    assert capsys.readouterr().err.startswith("sbom: lock 'absent' is not one of gpu-host, ")
