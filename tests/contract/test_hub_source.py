"""Source hub against a hub-like server: one commit for all files, and one clear message when something is missing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from research_rl import manifest
from research_rl.config import Config
from research_rl.data import download, flashrag
from research_rl.errors import DataError
from research_rl.stages import STAGES, Context, Workspace, silent

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "owner/questions"


def lines(*rows: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


QUESTIONS = lines({"id": "dev_0", "question": "Who?", "golden_answers": ["Ada"], "metadata": {}})
FILES = {"wiki/corpus.jsonl": lines({"id": "0", "contents": "x"}), "musique/train.jsonl": QUESTIONS, "musique/dev.jsonl": QUESTIONS}


class Hub(BaseHTTPRequestHandler):
    """The two addresses of a hub that a download needs: what a revision is, and a file at a commit."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0]
        revision, resolve = f"/api/datasets/{REPOSITORY}/revision/main", f"/datasets/{REPOSITORY}/resolve/{COMMIT}/"
        if path == revision:
            self._send(200, json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": []}).encode(), body)
        elif path.startswith(resolve) and path.removeprefix(resolve) in FILES:
            self._send(200, FILES[path.removeprefix(resolve)], body)
        else:
            self._send(404, b"", body, **{"X-Error-Code": "EntryNotFound" if path.startswith(resolve) else "RepoNotFound"})

    def _send(self, status: int, content: bytes, body: bool, **headers: str) -> None:
        self.send_response(status)
        etag = hashlib.sha256(content).hexdigest()
        for name, value in {"Content-Length": str(len(content)), "ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def context(root: Path, hub: str, **data: Any) -> Context:
    named = {"corpus": "wiki/corpus.jsonl", "train": ["musique/train.jsonl"], "dev": ["musique/dev.jsonl"], "test": ["musique/dev.jsonl"]}
    tree = {"source": "hub", "hub_endpoint": hub, "hub_repo": REPOSITORY, **named, **data}
    return Context(STAGES["download"], Config.model_validate({"data": tree}), Workspace(root), {}, silent)


def test_files_come_from_the_commit_the_revision_stands_for(hub: str, tmp_path: Path) -> None:
    download.run(context(tmp_path, hub))
    found = manifest.load(tmp_path / "data")
    assert found.facts["source"]["commit"] == COMMIT
    assert found.counts == {"corpus": 1, "train": 1, "dev": 1, "test": 1}
    assert next(flashrag.read_questions(tmp_path / "data/train.jsonl")).id == "musique/dev_0"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hub_repo": "owner/nothing"}, "owner/nothing at main"),
        ({"train": ["musique/no.jsonl"]}, "file musique/no.jsonl"),
        ({"hub_revision": "v9"}, "at v9"),
    ],
)
def test_what_the_hub_lacks_is_named_and_leaves_nothing(hub: str, tmp_path: Path, change: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match="cannot fetch") as caught:
        download.run(context(tmp_path, hub, **change))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "data").exists()
