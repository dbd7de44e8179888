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

from research_rl.config import Config
from research_rl.data import download, flashrag
from research_rl.errors import DataError
from research_rl.pipeline import manifest
from research_rl.pipeline.stages import STAGES, Context, Workspace, silent

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "owner/questions"


def lines(*rows: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


QUESTIONS = lines({"id": "dev_0", "question": "Who?", "golden_answers": ["Ada"], "metadata": {}})
FILES = {"wiki/corpus.jsonl": lines({"id": "0", "contents": "x"}), "musique/train.jsonl": QUESTIONS, "musique/dev.jsonl": QUESTIONS}
FILES |= {"bamboogle/test.jsonl": QUESTIONS, "index/part_aa": b"first,", "index/part_ab": b"second"}


class Hub(BaseHTTPRequestHandler):
    """The two addresses of a hub that a download needs: what a revision is, and a file at a commit."""

    falsified = 0

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0]
        revision, resolve = f"/api/datasets/{REPOSITORY}/revision/main", f"/datasets/{REPOSITORY}/resolve/{COMMIT}/"
        if path == revision:
            self._send(
                200, json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": [{"rfilename": name} for name in FILES]}).encode(), body
            )
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
        if body and Hub.falsified and b"contents" in content:
            Hub.falsified -= 1
            content = b"?" * len(content)
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


def context(root: Path, hub: str, transfer: dict[str, Any] | None = None, **data: Any) -> Context:
    named = {"corpus": "wiki/corpus.jsonl", "train": ["musique/train.jsonl"], "dev": ["musique/dev.jsonl"], "test": ["musique/dev.jsonl"]}
    tree = {"source": "hub", "hub_repo": REPOSITORY, **named, **data}
    config = Config.model_validate({"data": tree, "transfer": {"hub_endpoint": hub, **(transfer or {})}})
    return Context(STAGES["download"], config, Workspace(root), {}, silent)


def test_the_hubs_checksum_is_enforced(hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's ETag is the sha256 a hub gives for large files: other content under it is refused."""
    monkeypatch.setattr(Hub, "falsified", 2)
    download.run(context(tmp_path, hub))
    assert Hub.falsified == 0
    assert next(flashrag.read_passages(tmp_path / "data/corpus.jsonl")).id == "0"
    monkeypatch.setattr(Hub, "falsified", 99)
    with pytest.raises(DataError, match=r"wiki/corpus.jsonl has sha256 .*, its source says .*; refused after 2 fetches"):
        download.run(context(tmp_path / "again", hub, transfer={"attempts": 2}))


def test_sets_are_known_by_name(hub: str, tmp_path: Path) -> None:
    download.run(context(tmp_path, hub, train=["musique"], dev=["musique"], test=["musique", "bamboogle"]))
    questions = list(flashrag.read_questions(tmp_path / "data/test.jsonl"))
    assert [question.id for question in questions] == ["musique/dev_0", "bamboogle/dev_0"]


def test_a_prebuilt_index_of_another_repository_comes_along(hub: str, tmp_path: Path) -> None:
    parts = [f"hub://{REPOSITORY}@main/index/part_{end}" for end in ("aa", "ab")]
    download.run(context(tmp_path, hub, files={"e5_Flat.index": parts}))
    assert (tmp_path / "data/files/e5_Flat.index").read_bytes() == b"first,second"


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
        ({"train": ["musique/trian.jsonl"]}, "did you mean musique/train.jsonl"),
        ({"dev": ["triviaqa"], "test": ["popqa"]}, "file triviaqa/dev.jsonl"),
        ({"hub_revision": "v9"}, "at v9"),
    ],
)
def test_what_the_hub_lacks_is_named_and_leaves_nothing(hub: str, tmp_path: Path, change: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match="cannot fetch") as caught:
        download.run(context(tmp_path, hub, **change))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "data").exists()
