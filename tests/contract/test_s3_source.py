"""Source s3 against a real S3 server, directly and behind a wire that is cut at random bytes."""

from __future__ import annotations

import contextlib
import gzip
import json
import random
import socket
from collections.abc import Generator, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import boto3
import pytest

from research_rl.config import Config
from research_rl.data import download, flashrag
from research_rl.errors import DataError
from research_rl.pipeline import manifest
from research_rl.pipeline.stages import STAGES, Context, Workspace, silent
from tasks.local.deploy import BUCKET
from tasks.local.stack import Stack

ROWS = 12_000
CORPUS = b"".join(json.dumps({"id": str(n), "contents": f"passage {n} " + "x" * (n % 597)}).encode() + b"\n" for n in range(ROWS))
QUESTION = b'{"id": "dev_0", "question": "Who?", "golden_answers": ["Ada"], "metadata": {}}\n'


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    """An S3 server that holds two files below flashrag/; its credentials are in the environment."""
    stack = Stack(tmp_path_factory.mktemp("s3"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESEARCH_S3_PORT", "0")
        try:
            known = stack.s3()
            for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
                patch.setenv(name, known[name])
            client = boto3.client("s3", endpoint_url=known["AWS_ENDPOINT_URL"])
            client.put_object(Bucket=BUCKET, Key="flashrag/corpus.jsonl", Body=CORPUS)
            client.put_object(Bucket=BUCKET, Key="flashrag/musique/dev.jsonl", Body=QUESTION)
            yield known["AWS_ENDPOINT_URL"]
        finally:
            stack.down()


class Wire:
    """A TCP relay that cuts the next connections after a given number of bytes from the server."""

    def __init__(self, endpoint: str, cuts: list[int]) -> None:
        host, _, port = endpoint.removeprefix("http://").partition(":")
        self._server, self.cuts, self.relayed = (host, int(port)), cuts, 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._server)
            cut = self.cuts.pop() if self.cuts else None
            Thread(target=self._relay, args=(client, server, None), daemon=True).start()
            Thread(target=self._relay, args=(server, client, cut), daemon=True).start()

    def _relay(self, source: socket.socket, sink: socket.socket, cut: int | None) -> None:
        try:
            while (cut is None or cut > 0) and (block := source.recv(65_536 if cut is None else min(cut, 65_536))):
                sink.sendall(block)
                self.relayed += len(block)
                cut = None if cut is None else cut - len(block)
        except OSError:
            pass
        for side in (source, sink):
            with contextlib.suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def wire(endpoint: str) -> Iterator[Wire]:
    draw = random.Random(3)
    made = Wire(endpoint, [draw.randrange(1_000, 900_000) for _ in range(8)])
    yield made
    made.close()


def context(root: Path, endpoint: str, transfer: dict[str, Any] | None = None, **data: Any) -> Context:
    named = {"train": ["musique/dev.jsonl"], "dev": ["musique/dev.jsonl"], "test": ["musique/dev.jsonl"]}
    tree = {"source": "s3", "url": f"s3://{BUCKET}/flashrag", "s3_endpoint": endpoint, **named, **data}
    config = Config.model_validate({"data": tree, "transfer": {"piece_mb": 1, "attempts": 9, **(transfer or {})}})
    return Context(STAGES["download"], config, Workspace(root), {}, silent)


def ids(root: Path) -> list[str]:
    return [passage.id for passage in flashrag.read_passages(root / "data/corpus.jsonl")]


def test_objects_come_in_ranges_and_are_recorded(endpoint: str, tmp_path: Path) -> None:
    download.run(context(tmp_path, endpoint))
    assert ids(tmp_path) == [str(n) for n in range(ROWS)]
    facts = manifest.load(tmp_path / "data").facts["source"]
    assert (facts["kind"], facts["url"]) == ("s3", f"s3://{BUCKET}/flashrag")
    assert set(facts["files"]["corpus.jsonl"]) == {"sha256", "version"}


def test_a_wire_cut_at_random_bytes_costs_only_what_was_in_flight(wire: Wire, endpoint: str, tmp_path: Path) -> None:
    download.run(context(tmp_path / "cut", wire.url))
    assert wire.cuts == [], "every cut was made"
    assert wire.relayed < len(CORPUS) + 8 * 300_000
    download.run(context(tmp_path / "whole", endpoint))
    cut, whole = (manifest.load(tmp_path / name / "data") for name in ("cut", "whole"))
    assert (cut.files, cut.facts) == (whole.files, whole.facts)


def test_a_whole_address_needs_no_default_source(endpoint: str, tmp_path: Path) -> None:
    (tmp_path / "local").mkdir()
    (tmp_path / "local/dev.jsonl").write_bytes(QUESTION)
    named = {split: ["dev.jsonl"] for split in ("train", "dev", "test")}
    bucket = f"s3://{BUCKET}/flashrag/corpus.jsonl"
    download.run(context(tmp_path, endpoint, source="folder", folder="local", corpus=bucket, **named))
    assert len(ids(tmp_path)) == ROWS


def test_an_object_stored_compressed_is_read(endpoint: str, tmp_path: Path) -> None:
    client = boto3.client("s3", endpoint_url=endpoint)
    client.put_object(Bucket=BUCKET, Key="flashrag/packed.jsonl", Body=gzip.compress(CORPUS), ContentEncoding="gzip")
    download.run(context(tmp_path, endpoint, corpus="packed.jsonl"))
    assert len(ids(tmp_path)) == ROWS


def test_a_service_that_is_down_for_a_while_is_tried_again(endpoint: str, tmp_path: Path) -> None:
    reserved = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{reserved.getsockname()[1]}"
    reserved.close()
    with pytest.raises(DataError, match=r"gave up after 2 tries; check the address"):
        download.run(context(tmp_path, url, transfer={"attempts": 2}))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"corpus": "corpus.json"}, r"s3://.*corpus\.json .*; did you mean corpus\.jsonl"),
        ({"url": "s3://no-such-bucket/x"}, "no-such-bucket"),
        ({"s3_endpoint": "http://127.0.0.1:9"}, r"127\.0\.0\.1:9"),
        ({"s3_endpoint": "nonsense"}, "data.s3_endpoint='nonsense' is no address"),
    ],
)
def test_what_the_bucket_lacks_is_named(endpoint: str, tmp_path: Path, change: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        download.run(context(tmp_path, endpoint, transfer={"attempts": 2}, **change))
    assert not (tmp_path / "data").exists()


def test_wrong_credentials_are_named(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(DataError, match=r"403 .*AWS_ variables"):
        download.run(context(tmp_path, endpoint))
