"""The retriever fails in every way it can while verl really trains: no group is lost, time is bounded, the numbers match.

The policy is a model that always searches twice, for words drawn at random, then answers, so that no search is answered by the cache.
"""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from research_rl.config import CHECKOUT, Config
from research_rl.data.flashrag import Question
from research_rl.data.prepare import _write, to_row
from research_rl.training.overrides import Paths
from research_rl.training.supervise import Run, TrainHooks, ray_folder, supervise
from tests import knowledge
from tests.contract import chain_model
from tests.faulty import GARBAGE, Proxy, Retriever

PROMPTS, GROUP, STEPS = 8, 4, 9
OUTAGE_S, FREEZE_S, TIMEOUT_S = 12.0, 12.0, 3.0
FAULTS = [
    [*["garbage", "truncated", "schema", "empty_list"] * 2],
    ["busy"] * 6,
    ["server_error"] * 5,
    ["nothing"] * 4,
    ["slow"] * 20,
]

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not (CHECKOUT / ".venv-policy").is_dir(), reason="needs the policy environment; run `make setup`"),
]


def build_policy(folder: Path) -> Path:
    """Return a model that writes: think, search two drawn words, search two more, answer."""
    words = tuple(f"w{number}" for number in range(150))
    chain: dict[str, str | tuple[str, ...]] = {"ask": "<think>", "<think>": "hm", "hm": "</think>", "</think>": "<search>"}
    chain |= {"<search>": words, **dict.fromkeys(words, "</search>")}
    chain |= {"</result>": ("<search>", "<search>", "<answer>"), "<answer>": "\\boxed{", "\\boxed{": ("yes", "no"), "yes": "}", "no": "}"}
    chain |= {"}": "</answer>", "</answer>": chain_model.EOS}
    return chain_model.build(folder, chain, ("found", "search", "failed:"))


class Saboteur(TrainHooks):
    """Injects the next fault when a step is told, which is when the next one begins."""

    def __init__(self, proxy: Proxy, retriever: Retriever) -> None:
        self.proxy, self.told = proxy, time.monotonic()
        self.rows: dict[int, dict[str, float]] = {}
        self.seconds: dict[int, float] = {}
        outages = (lambda: retriever.outage(OUTAGE_S), lambda: retriever.freeze(FREEZE_S))
        self.acts: list[Callable[[], Any]] = [*(self.plan(faults) for faults in FAULTS), *outages]
        self.threads: list[threading.Thread] = []

    def plan(self, faults: list[str]) -> Callable[[], None]:
        return lambda: self.proxy.plan.extend(faults)

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        now = time.monotonic()
        self.rows[step], self.seconds[step], self.told = metrics, now - self.told, now
        if step <= len(self.acts):
            self.threads.append(threading.Thread(target=self.acts[step - 1]))
            self.threads[-1].start()


def make_run(root: Path, url: str) -> Run:
    config = Config.model_validate(
        {
            "prompt": {"template": "file", "path": str(root / "template.txt")},
            "episode": {
                "max_response_tokens": 200,
                "max_result_tokens": 16,
                "search_timeout_s": TIMEOUT_S,
                "wall_s": 60.0,
                "max_searches": 8,
            },
            "train": {"steps": STEPS, "prompts": PROMPTS, "group": GROUP, "lr": 1e-7, "kl_coef": 0, "save_every": 4, "micro_batch": 8},
            "retriever": {"url": url, "pause_max_s": 120.0, "pause_least": 6, "pause_share": 0.5, "pause_window_s": 10.0},
        }
    )
    (root / "template.txt").write_text("{question}\nask")
    for split, rows in (("train", 32), ("dev", 4)):
        questions = [Question(f"q{n}", "ask", ("yes",), {}) for n in range(rows)]
        _write([to_row(question, split, index) for index, question in enumerate(questions)], root / f"{split}.parquet")
    paths = Paths(build_policy(root / "model"), root / "train.parquet", root / "dev.parquet", root / "work", ray_folder(root / "work"))
    return Run(config, paths, root / "services", url)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Saboteur, Proxy, list[str], int]:
    root = tmp_path_factory.mktemp("faults")
    retriever = Retriever(knowledge.built(root / "knowledge").root)
    proxy, said = Proxy(retriever.port), list[str]()
    try:
        run, saboteur = make_run(root, proxy.url), Saboteur(proxy, retriever)
        outcome = supervise(run, saboteur, lambda text, share: said.append(text))
        for thread in saboteur.threads:
            thread.join()
    finally:
        retriever.process.kill()
        proxy.shutdown()
    for step, row in saboteur.rows.items():
        kept = {name: value for name, value in row.items() if name.startswith(("search/", "episode/search_failed", "episode/lost"))}
        print(f"step {step}: {saboteur.seconds[step]:.1f} s {json.dumps({name: value for name, value in kept.items() if value})}")
    print(f"injected {dict(proxy.injected)}, requests {proxy.received}\n" + "\n".join(said))
    return run, saboteur, proxy, said, outcome.attempts


def total(saboteur: Saboteur, name: str) -> float:
    return sum(row.get(name, 0.0) for row in saboteur.rows.values())


def test_no_group_and_no_trajectory_is_lost(trained: tuple[Run, Saboteur, Proxy, list[str], int]) -> None:
    run, saboteur, _, _, attempts = trained
    assert attempts == 1 and sorted(saboteur.rows) == list(range(1, STEPS + 1))
    assert total(saboteur, "episode/lost") == total(saboteur, "episode/lost_groups") == 0
    for step in saboteur.rows:
        rows = [json.loads(line) for line in gzip.decompress((run.rollouts / f"{step:06d}.jsonl.gz").read_bytes()).splitlines()]
        assert len(rows) == PROMPTS * GROUP and {row["stop"] for row in rows} <= {"answered", "search_limit", "token_limit"}


def test_what_was_injected_was_counted(trained: tuple[Run, Saboteur, Proxy, list[str], int]) -> None:
    _, saboteur, proxy, _, _ = trained
    assert not proxy.plan
    assert total(saboteur, "search/failed_tries/garbage") == sum(proxy.injected[name] for name in GARBAGE) == 8
    assert total(saboteur, "search/failed_tries/busy") == proxy.injected["busy"] == 6
    assert total(saboteur, "search/failed_tries/server_error") == proxy.injected["server_error"] == 5
    # Garbage and nothing are final answers: whoever asked for the same words at the same time shares them.
    assert total(saboteur, "episode/search_failed/garbage") >= 8 and total(saboteur, "episode/search_failed/nothing") >= 4
    # A 503 or 500 is tried again within the search's time, so that no model hears of it.
    assert total(saboteur, "episode/search_failed/busy") == total(saboteur, "episode/search_failed/server_error") == 0


def test_an_outage_pauses_the_run_and_costs_a_bounded_time(trained: tuple[Run, Saboteur, Proxy, list[str], int]) -> None:
    _, saboteur, _, said, _ = trained
    paused = [step for step, row in saboteur.rows.items() if row["search/paused_s"] > 1]
    assert paused and set(paused) <= {6, 7, 8, 9}, said
    assert sum(row["search/paused_s"] for row in saboteur.rows.values()) < 2 * (OUTAGE_S + FREEZE_S) + 60
    assert any(text.startswith("paused: ") for text in said) and any(text.endswith("training goes on") for text in said)
    assert max(seconds for step, seconds in saboteur.seconds.items() if step > 1) < 180
