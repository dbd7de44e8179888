"""The retriever's image: built as a user builds it, small, without secrets, and a container of it answers a question."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Generator

import pytest

from tests.infra import images
from tests.infra.composed import Composed
from tests.infra.conftest import Bench
from tests.infra.images import RETRIEVER
from tests.knowledge import built, passages

pytestmark = pytest.mark.infra
ROWS = 200
LIMIT_BYTES = 700_000_000
ASK = """
import json, sys, urllib.error, urllib.request
headers = {"Content-Type": "application/json", **({"Authorization": "Bearer " + sys.argv[2]} if sys.argv[2:] else {})}
request = urllib.request.Request("http://127.0.0.1:8080/search", sys.argv[1].encode(), headers)
try:
    print(urllib.request.urlopen(request, timeout=60).read().decode())
except urllib.error.HTTPError as error:
    print(error.code)
"""


@pytest.fixture(scope="module", name="composed")
def _composed(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Generator[Composed]:
    workspace = tmp_path_factory.mktemp("workspace")
    built(workspace, ROWS, encoder={"dim": 128})
    subprocess.run(["chown", "-R", "10001:10001", str(workspace)], check=True)
    bench.build(RETRIEVER)
    with bench.engine.running(building=False):
        composed = Composed(bench.engine, bench.checkout, workspace)
        try:
            yield composed
        finally:
            composed.remove()


def test_it_is_small_and_without_torch(composed: Composed) -> None:
    assert images.size(composed.engine, RETRIEVER) < LIMIT_BYTES
    script = "import importlib.util as util; print([name for name in ('torch', 'prefect', 'faiss', 'bm25s') if util.find_spec(name)])"
    run = ("run", "--rm", "--network", "none", "--entrypoint", "python", RETRIEVER.tag, "-c", script)
    assert composed.engine.docker(*run).strip() == "['faiss', 'bm25s']"


def test_no_layer_has_a_secret_of_the_checkout_or_the_address_of_a_package_index(composed: Composed, bench: Bench) -> None:
    assert images.leaks(bench.engine, RETRIEVER, [bench.secret, *bench.mirror.private]) == []


def test_a_container_without_rights_answers_who_has_the_token(composed: Composed) -> None:
    composed.up("retriever")
    question = json.dumps({"query": "where does Person17 Surname17 live?", "top_n": 3})
    answer = composed.engine.inside(sys.executable, "-c", ASK, question, composed.secrets["RESEARCH_RETRIEVER_TOKEN"])
    assert json.loads(answer)[0] == passages(ROWS)[17]
    assert composed.engine.inside(sys.executable, "-c", ASK, question).strip() == "401"


def test_it_ends_without_force_when_it_is_told_to(composed: Composed) -> None:
    composed.compose("stop", "retriever")
    (container,) = composed.compose("ps", "--all", "--quiet", "retriever").split()
    assert composed.engine.docker("inspect", "--format", "{{.State.ExitCode}}", container).strip() in ("0", "143")
