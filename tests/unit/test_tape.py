"""A tape gives back what was recorded, loses nothing to a kill or to parallel writers, and says what it lacks."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from research_rl.config import Config
from research_rl.episode.agent import SearchFailure
from research_rl.episode.trajectory import Passage, SearchFault
from research_rl.errors import DataError, ManifestError
from research_rl.paths import CHECKOUT
from research_rl.pipeline import manifest, taped
from research_rl.pipeline.manifest import Manifest
from research_rl.pipeline.run import _parent
from research_rl.pipeline.stages import Workspace
from research_rl.process.services import Endpoint
from research_rl.retriever.replies import Passages
from research_rl.retriever.source import RetrieverSource, SearchClient, Taping, lacking, searching
from research_rl.retriever.tape import FILE, Reply, Shelf, Tape, TapePart
from tests.searching import served

ODD = [Passage("p1", '"Title"\nIt is \ud83d here.', 0.1 + 0.2), Passage("", "", -0.0), Passage("ü", "x" * 5000, 1e-310)]
REFUSED = SearchFailure("retriever answered 422: no", SearchFault.REFUSED)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    made = Workspace(tmp_path)
    for name in ("corpus", "embed", "index"):
        with manifest.publish(made.folder(name), name, "x", {}) as staging:
            (staging.path / "bytes").write_text(name)
    return made


def index(workspace: Workspace) -> Manifest:
    return manifest.load(workspace.folder("index"))


def record(shelf: Shelf, **replies: Reply) -> None:
    part = TapePart(shelf.parts)
    for query, reply in replies.items():
        part.add(query, 5, reply)
    part.close()


def test_replies_come_back_bit_by_bit(workspace: Workspace) -> None:
    shelf = Shelf(workspace, index(workspace))
    record(shelf, odd=ODD, nothing=[], refused=REFUSED)
    part = TapePart(shelf.parts)
    part.add("half a pair \udc80", 3, ODD[:1])
    part.close()
    found = shelf.gather()
    assert found and found.counts == {"replies": 4, "passages": 3, "differing": 0}
    tape = Tape.open(shelf.folder / FILE)
    again = tape.find("odd", 5)
    assert again == ODD and isinstance(again, list) and math.copysign(1, again[1].score) == -1
    assert (tape.find("nothing", 5), tape.find("refused", 5)) == ([], REFUSED)
    assert tape.find("half a pair \udc80", 3) == ODD[:1]
    assert (tape.find("odd", 4), tape.find("Odd", 5)) == (None, None), "another number of passages is another search"
    tape.close()


def test_the_first_reply_is_kept_and_differing_ones_are_counted(workspace: Workspace) -> None:
    shelf = Shelf(workspace, index(workspace))
    record(shelf, q=ODD)
    shelf.gather()
    record(shelf, q=ODD[:1], other=ODD)
    found = shelf.gather()
    assert found and found.counts == {"replies": 2, "passages": 3, "differing": 1}
    assert Tape.open(shelf.folder / FILE).find("q", 5) == ODD
    assert found.parents == {"index": index(workspace).hash}


_WRITER = """
import sys
from pathlib import Path
from research_rl.episode.trajectory import Passage
from research_rl.retriever.tape import TapePart
part = TapePart(Path(sys.argv[1]))
for number in range(int(sys.argv[2])):
    part.add(f"q{number}", 5, [Passage(f"p{number}", f"text {number}", number / 3)])
print("recorded", flush=True)
sys.stdin.read()
part.close()
"""


def writer(folder: Path, count: int) -> subprocess.Popen[str]:
    """Start a process that records `count` searches and keeps its part open until its standard input ends."""
    command = [sys.executable, "-c", _WRITER, str(folder), str(count)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT)


def test_several_processes_record_at_once_and_a_killed_one_loses_nothing(workspace: Workspace) -> None:
    shelf = Shelf(workspace, index(workspace))
    writers = [writer(shelf.parts, count) for count in (30, 40, 50)]
    for each in writers:
        assert each.stdout and each.stdout.readline() == "recorded\n"
    assert shelf.gather() is None and len(list(shelf.parts.glob("*.part"))) == 3, "what is still written is left alone"
    os.kill(writers[2].pid, signal.SIGKILL)
    for each in writers:
        each.communicate()
    found = shelf.gather()
    assert found and found.counts == {"replies": 50, "passages": 50, "differing": 0}
    tape = Tape.open(shelf.folder / FILE)
    assert [tape.find(f"q{n}", 5) for n in range(50)] == [[Passage(f"p{n}", f"text {n}", n / 3)] for n in range(50)]
    assert list(shelf.parts.iterdir()) == []


def test_a_torn_part_costs_itself_alone(workspace: Workspace) -> None:
    shelf = Shelf(workspace, index(workspace))
    record(shelf, torn=ODD)
    (torn,) = shelf.parts.glob("*.part")
    torn.write_bytes(b"no database" * 1000)
    record(shelf, whole=ODD)
    found = shelf.gather()
    assert found and found.counts["replies"] == 1
    assert Tape.open(shelf.folder / FILE).find("whole", 5) == ODD


class Index:
    """Finds one passage a query, counts what it is asked, and gives another score each time, as no real index does."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, queries: Sequence[str], top_k: int) -> list[list[Passage]]:
        self.asked += queries
        return [[Passage(query, f"about {query}", float(len(self.asked)))] * min(top_k, 2) for query in queries]


def drive(source: RetrieverSource, work: Callable[[SearchClient], Awaitable[Any]], timeout_s: float = 300.0) -> Any:
    async def run() -> Any:
        async with source.client(timeout_s, 4) as client:
            return await work(client)

    try:
        return asyncio.run(run())
    finally:
        source.close()


def taping(shelf: Shelf, *, replay: bool = False) -> Taping:
    return Taping(shelf.folder / FILE if shelf.standing() else None, None if replay else shelf.parts, shelf.missing)


def test_what_is_shown_while_recording_is_what_a_replay_shows(workspace: Workspace) -> None:
    shelf, found = Shelf(workspace, index(workspace)), Index()

    async def several(client: SearchClient) -> list[Passages | SearchFailure]:
        both = await asyncio.gather(client.search(["a"], 2), client.search(["b", "a"], 2))
        return [*both, await client.search(["a"], 2), await client.search(["a"], 1), await client.search([], 2)]

    with served(found, warm=False, cache_entries=0) as url:
        live = drive(RetrieverSource(Endpoint(url), taping(shelf)), several)
        shelf.gather()
        asked = len(found.asked)
        assert drive(RetrieverSource(Endpoint(url), taping(shelf)), several) == live and len(found.asked) == asked, "nothing is asked twice"
    assert live[0][0] == live[1][1] == live[2][0]
    assert drive(RetrieverSource(Endpoint("tape:"), taping(shelf, replay=True)), several) == live


def test_refusals_are_recorded_and_outages_are_not(workspace: Workspace) -> None:
    shelf = Shelf(workspace, index(workspace))

    async def ask(client: SearchClient) -> Any:
        return [await client.search([query], 3) for query in ("\ud800", "fine")]

    with served(Index(), warm=False) as url:
        refused, fine = drive(RetrieverSource(Endpoint(url), taping(shelf)), ask)
    down = drive(RetrieverSource(Endpoint("http://127.0.0.1:9"), taping(shelf)), lambda client: client.search(["new"], 3), 0.3)
    assert down.fault is SearchFault.UNREACHABLE
    found = shelf.gather()
    assert found and found.counts["replies"] == 2
    replaying = RetrieverSource(Endpoint("tape:"), taping(shelf, replay=True))
    assert refused.fault is SearchFault.REFUSED and drive(replaying, ask) == [refused, fine]


def test_a_replay_names_what_is_missing(workspace: Workspace) -> None:
    shelf = Shelf(workspace, index(workspace))
    record(shelf, known=ODD)
    shelf.gather()
    source = RetrieverSource(Endpoint("tape:"), taping(shelf, replay=True))
    source.require_complete()

    async def ask(client: SearchClient) -> Any:
        assert await client.works() and await client.search(["known"], 5) == [ODD]
        assert client.take_counts() == {"from_tape": 1}
        return [await client.search([f"new {n}"], 5) for n in (0, 1, 2, 3, 1)]

    assert {failure.fault for failure in drive(source, ask)} == {SearchFault.NOT_ON_TAPE}
    with pytest.raises(DataError, match=r"4 searches are not on the tape .*, the first: 'new 0' \(5 passages\), 'new 1' .*tape=record"):
        source.require_complete()
    assert lacking(Taping.from_json(taping(shelf, replay=True).to_json())), "a worker of a training is told by text"


def replaying(workspace: Workspace) -> RetrieverSource:
    config = Config.model_validate({"retriever": {"tape": "replay"}})
    with searching(config, workspace) as source:
        return source


def test_a_replay_needs_a_whole_tape_of_the_index_and_no_index(workspace: Workspace) -> None:
    with pytest.raises(ManifestError, match="no whole tape of the workspace's index"):
        replaying(workspace)
    shelf = Shelf(workspace, index(workspace))
    record(shelf, known=ODD)
    shelf.gather()
    expected = {name: manifest.load(workspace.folder(name)).hash for name in taped.PARENTS}
    for name in taped.PARENTS:
        workspace.folder(name).rename(workspace.root / name)
    assert replaying(workspace).endpoint.url == f"tape:{shelf.folder}"
    replay = Config.model_validate({"retriever": {"tape": "replay"}})
    assert {name: taped.loaded(name, replay, workspace).hash for name in taped.PARENTS} == expected
    assert {name: _parent("train", name, replay, workspace).hash for name in taped.PARENTS} == expected, "stages take them, too"
    with pytest.raises(ManifestError, match="has no manifest"):
        taped.loaded("index", Config(), workspace)
    with (shelf.folder / FILE).open("ab") as stream:
        stream.write(b"torn")
    with pytest.raises(ManifestError):
        replaying(workspace)


def test_which_of_several_tapes_is_asked_for(workspace: Workspace) -> None:
    for content in ("one", "two"):
        with manifest.publish(workspace.folder("index"), "index", content, {}) as staging:
            (staging.path / "bytes").write_text(content)
        shelf = Shelf(workspace, index(workspace))
        record(shelf, known=ODD)
        shelf.gather()
    assert replaying(workspace).endpoint.url == f"tape:{shelf.folder}", "the index that is there says which"
    workspace.folder("index").rename(workspace.root / "gone")
    with pytest.raises(ManifestError, match=r"holds 2 tapes \(.*, .*\); leave the one"):
        replaying(workspace)
