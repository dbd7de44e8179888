"""A retriever that fails in every way during real training: no group lost, no wait unbounded, and the counts are the injected ones."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable, Generator

import pytest

from research_rl import config
from research_rl.pipeline.stages import Workspace
from research_rl.training.run.run import interpreter
from tests.faulty import FAULTS, GARBAGE, Proxy, Retriever
from tests.training import Training, workspace
from tests.waiting import until

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]
STEPS, PROMPTS, GROUP = 45, 8, 4
BURST, BURSTS, OUTAGES, AWAY_S = 5, 2, 3, 8
SEARCH_S, STEP_S = 4, 60
SIZE = (
    *(f"policy.{item}" for item in ("warmup_drills=40", "warmup_steps=200")),
    *(f"train.{item}" for item in (f"steps={STEPS}", f"prompts_per_step={PROMPTS}", f"rollouts_per_prompt={GROUP}")),
    f"trainer.save_every={STEPS}",
    "trainer.episodes_in_flight=8",
    f"episode.search_timeout_s={SEARCH_S}",
)
COUNTED = {**dict.fromkeys(GARBAGE, "garbage"), "busy": "busy", "server_error": "server_error"}
"""How the client calls what was injected."""


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    assert interpreter(config.load_profile("laptop")).is_file()
    return workspace(tmp_path_factory.mktemp("faults") / "training", *SIZE)


@pytest.fixture
def retriever(space: Workspace) -> Generator[Retriever]:
    found = Retriever(space.root)
    yield found
    found.process.kill()


def until_training(training: Training, true: Callable[[], bool]) -> None:
    """Wait for something that training does."""
    assert until(true, over=lambda: training.process.poll() is not None), training.said()


def inject(training: Training, retriever: Retriever, proxy: Proxy) -> None:
    """Spoil replies kind by kind, a burst a step, then kill and freeze the retriever, each while training searches."""
    for fault in FAULTS * BURSTS:
        before = training.logged()
        proxy.plan.extend([fault] * BURST)
        until_training(training, lambda: not proxy.plan and training.logged() > before)  # noqa: B023
        print(f"{fault}: {proxy.injected[fault]} injected, step {training.logged()}", flush=True)
    for act in (retriever.outage, retriever.freeze):
        for number in range(OUTAGES):
            before = training.logged()
            act(AWAY_S)
            until_training(training, lambda: training.logged() > before)  # noqa: B023
            print(f"{act.__name__} {number + 1} of {AWAY_S} s after step {before}", flush=True)


def test_a_failing_retriever_costs_no_group_and_every_failure_is_counted(space: Workspace, retriever: Retriever) -> None:
    proxy = Proxy(retriever.port, slow_s=1.0)
    training = Training(space, f"retriever.url={proxy.url}")
    until_training(training, lambda: training.logged() >= 1)
    inject(training, retriever, proxy)
    assert training.logged() < STEPS - 1, "the faults must fall into the training"
    assert training.process.wait(1800) == 0, training.said()

    done = space.folder("train")
    steps = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    numbers = [row["metrics"] for row in steps]
    assert all(row["episode/lost"] == 0 and row["episode/lost_groups"] == 0 and row["episode/count"] == PROMPTS * GROUP for row in numbers)
    counts = json.loads((done / "manifest.json").read_text())["counts"]
    assert counts["lost_trajectories"] == 0 and counts["attempts"] == 1

    failed = {
        kind: int(sum(row.get(f"search/failed_tries/{kind}", 0) for row in numbers))
        for kind in (*COUNTED.values(), "unreachable", "timeout")
    }
    injected = Counter[str]()
    for fault, number in proxy.injected.items():
        injected[COUNTED.get(fault, fault)] += number
    paused = sum(row["search/paused_s"] for row in numbers)
    longest = max(row["timing_s/step"] - row["search/paused_s"] for row in numbers)
    nothing = sum(row["episode/search_failed/nothing"] for row in numbers)
    told = sum(
        row["episode/search_failed/" + kind] for row in numbers for kind in ("timeout", "unreachable", "garbage", "busy", "server_error")
    )
    print(
        f"injected {dict(proxy.injected)}, {OUTAGES} kills and {OUTAGES} stops of {AWAY_S} s; counted {failed}; told to the model {told:g}"
    )
    print(f"paused {paused:.1f} s in all; longest step {longest:.1f} s without pauses; searches {proxy.received}", flush=True)
    late = {kind: injected[kind] - failed[kind] for kind in set(COUNTED.values())}  # a spoiled reply after the deadline is a timeout
    assert min(late.values()) >= 0 and sum(late.values()) <= failed["timeout"], late
    assert nothing >= injected["nothing"]  # a group's trajectories share an answer
    assert failed["unreachable"] > 0 and failed["timeout"] > 0
    assert longest < STEP_S
    rows = [json.loads(line) for path in (done / "rollouts").glob("*.gz") for line in gzip.decompress(path.read_bytes()).splitlines()]
    assert len(rows) == STEPS * PROMPTS * GROUP
    slowest = max(search["seconds"] for row in rows for search in row["searches"])
    assert slowest < SEARCH_S + 2, f"a search took {slowest} s"
