"""One engine, one copy of the checkout with planted secrets and one set of package settings for all tests of this tier.

INFRA_FOLDER keeps what was fetched and built for the next run; without it a temporary folder goes at the end.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.infra import images
from tests.infra.composed import SERVERS, Client, Composed
from tests.infra.engine import Engine
from tests.infra.images import ALERTMANAGER, PIPELINE, POSTGRES, PROMETHEUS, RETRIEVER, S3, WORKER, Image
from tests.infra.mirror import Mirror, mirror


@dataclass(frozen=True)
class Bench:
    """What the tests build and run with; `secret` stands in files of `checkout` that no image may hold."""

    engine: Engine
    mirror: Mirror
    checkout: Path
    secret: str

    def build(self, *wanted: Image) -> None:
        """Build images; the engine must not run."""
        with self.engine.running(building=True):
            for image in wanted:
                images.build(self.engine, self.mirror, image, self.checkout)


@pytest.fixture(scope="session", name="bench")
def _bench() -> Generator[Bench]:
    assert os.geteuid() == 0, "a Docker engine needs root; run this tier as root"
    kept = os.environ.get("INFRA_FOLDER")
    folder = Path(kept or tempfile.mkdtemp(prefix="research-infra-"))
    session = Path(tempfile.mkdtemp(prefix="research-infra-session-"))
    engine, secret = Engine(folder), secrets.token_hex(16)
    try:
        engine.unpack()
        if kept:
            with engine.running(building=True):
                engine.clear()
        with mirror(session) as settings:
            yield Bench(engine, settings, images.plant(session / "checkout", secret), secret)
    finally:
        for path in (session, *([] if kept else [folder])):
            shutil.rmtree(path)


@contextmanager
def brought_up(bench: Bench, workspace: Path, *more: Path) -> Generator[Composed]:
    """Build the images, start the servers over an empty workspace, and take all of it away again."""
    subprocess.run(["chown", "10001:10001", str(workspace)], check=True)
    bench.build(POSTGRES, S3, PIPELINE, WORKER, RETRIEVER, PROMETHEUS, ALERTMANAGER)
    with bench.engine.running(building=False):
        composed = Composed(bench.engine, bench.checkout, workspace, *more)
        try:
            composed.up(*SERVERS)
            yield composed
        finally:
            composed.remove()


@pytest.fixture(scope="module", name="composed")
def _composed(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Generator[Composed]:
    with brought_up(bench, tmp_path_factory.mktemp("workspace")) as composed:
        yield composed


@pytest.fixture(scope="module", name="client")
def _client(composed: Composed) -> Client:
    return Client(composed)
