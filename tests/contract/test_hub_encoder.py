"""An encoder from a hub-like server: one snapshot, without other formats of the weights, resolved again without the server."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest

from research_rl.config import TransferConfig
from research_rl.embedding.sentence import SentenceEncoder
from research_rl.errors import DataError
from research_rl.process import hub
from tests.encoder_model import FACTS, texts, write_model
from tests.json_server import served
from tests.web import localhost_is_public

COMMIT, TAG, REPOSITORY = "0123456789abcdef0123456789abcdef01234567", "v2", "owner/encoder"
RESOLVE = """
import sys
from pathlib import Path
from research_rl.config import EncoderConfig, TransferConfig
from research_rl.embedding.models import resolve

config = EncoderConfig(kind="sentence", model=sys.argv[1], revision=sys.argv[3])
print(resolve(config, TransferConfig(), Path(sys.argv[2]), Path()))
"""


class Hub(BaseHTTPRequestHandler):
    """What a revision of a model is, and a file at a commit; `folder` holds the files, `asked` the names of those sent."""

    def __init__(self, folder: Path, asked: list[str], *arguments: object) -> None:
        self._folder, self._asked = folder, asked
        super().__init__(*arguments)  # pyright: ignore[reportArgumentType]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0]
        names = [file.relative_to(self._folder).as_posix() for file in self._folder.rglob("*") if file.is_file()]
        name = path.removeprefix(f"/{REPOSITORY}/resolve/{COMMIT}/")
        if path in (f"/api/models/{REPOSITORY}/revision/{name}" for name in ("main", TAG)):
            self._asked.append(path)
            self._send(200, json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": []}).encode(), body)
        elif path == f"/api/models/{REPOSITORY}/tree/{COMMIT}":
            files = [{"type": "file", "path": name, "size": (self._folder / name).stat().st_size, "oid": name} for name in names]
            self._send(200, json.dumps(files).encode(), body)
        elif name in names:
            self._asked.append(name)
            self._send(200, (self._folder / name).read_bytes(), body)
        else:
            self._send(404, b"", body)

    def _send(self, status: int, content: bytes, body: bool) -> None:
        self.send_response(status)
        digest = hashlib.sha256(content).hexdigest()
        headers = {"Content-Length": str(len(content)), "ETag": f'"{digest}"', "X-Repo-Commit": COMMIT}
        # Offered for every file, as by the hub: hf-xet would take it, through whatever proxy the environment names.
        headers |= {"X-Xet-Hash": digest, "X-Xet-Refresh-Route": f"{self.path}/xet-read-token"}
        for name, value in (headers if status == 200 else {"Content-Length": "0", "X-Error-Code": "RepoNotFound"}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None: ...


class Moved(Hub):
    """Answers for every file that it lies below `elsewhere`."""

    elsewhere = ""

    def _answer(self, *, body: bool) -> None:
        if f"/resolve/{COMMIT}/" not in self.path:
            super()._answer(body=body)
            return
        self.send_response(302)
        content = (self._folder / self.path.partition(f"/{COMMIT}/")[2]).read_bytes()
        linked = {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"'}
        for name, value in {"Location": self.elsewhere + self.path, "Content-Length": "0", "X-Repo-Commit": COMMIT, **linked}.items():
            self.send_header(name, value)
        self.end_headers()


@pytest.fixture
def asked() -> list[str]:
    return []


@pytest.fixture
def server(tmp_path: Path, asked: list[str]) -> Iterator[str]:
    write_model(tmp_path / "whole")
    with served(partial(Hub, tmp_path / "whole", asked)) as url:
        yield url


def _resolve(server: str, model: str, cache: Path, revision: str = "main") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_ENDPOINT": server, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return subprocess.run([sys.executable, "-c", RESOLVE, model, str(cache), revision], env=environment, capture_output=True, text=True)


def test_a_model_of_the_hub_encodes_like_its_folder(server: str, asked: list[str], tmp_path: Path) -> None:
    found = _resolve(server, REPOSITORY, tmp_path / "cache")
    assert found.returncode == 0, found.stderr
    folder = Path(found.stdout.strip())
    assert COMMIT in folder.parts
    assert "model.safetensors" in asked and not any(name.endswith(".onnx") for name in asked)
    hubs, own = (SentenceEncoder.load(path, FACTS).encode_passages(texts(5)) for path in (folder, tmp_path / "whole"))
    np.testing.assert_array_equal(hubs, own)


def test_an_unknown_model_is_named(server: str, tmp_path: Path) -> None:
    found = _resolve(server, "owner/nothing", tmp_path / "cache")
    assert "does not give owner/nothing at main" in found.stderr


def test_the_revision_that_is_named_is_fetched(server: str, asked: list[str], tmp_path: Path) -> None:
    found = _resolve(server, REPOSITORY, tmp_path / "cache", TAG)
    assert COMMIT in Path(found.stdout.strip()).parts, found.stderr
    assert f"/api/models/{REPOSITORY}/revision/{TAG}" in asked


def test_a_hub_that_redirects_to_an_internal_address_is_refused(
    server: str, asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library goes to the address itself, with what of this machine's network answers there; that a mirror inside redirects is fine."""
    monkeypatch.setattr(Moved, "elsewhere", server)
    with served(partial(Moved, tmp_path / "whole", [])) as inside:
        found = hub.snapshot(REPOSITORY, "main", TransferConfig(hub_endpoint=inside), tmp_path / "mirror")
        assert (found / "config.json").read_bytes() == (tmp_path / "whole/config.json").read_bytes()
        asked.clear()
        localhost_is_public(monkeypatch)
        outside = TransferConfig(hub_endpoint=inside.replace("127.0.0.1", "localhost"))
        with pytest.raises(DataError, match=r"redirects to the internal address 127\.0\.0\.1"):
            hub.snapshot(REPOSITORY, "main", outside, tmp_path / "cache")
    assert asked == []
