"""Each rule of the collapse watch fires on a series built to trigger it and is silent on recorded healthy runs.

`data/healthy_*.json` are the step metrics of real runs of the laptop profile that learned.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from research_rl import config
from research_rl.config import WatchConfig
from research_rl.errors import ConfigError
from research_rl.training.run import watch
from research_rl.training.run.checkpoints import Checkpoint
from research_rl.training.run.watch_rules import RULES

Metrics = dict[str, float]
History = dict[int, Metrics]
HEALTHY = sorted((Path(__file__).parent / "data").glob("healthy_*.json"))
LENGTHS = {"healthy_laptop_run": 24, "healthy_laptop_with_reference": 14}
ONSET = 13

TRIGGERS: dict[str, Callable[[Metrics, int], Metrics]] = {
    "nan": lambda m, n: {"not_finite/actor/grad_norm": 1.0},
    "reward_drop": lambda m, n: {"episode/reward": 0.01},
    "reward_spread": lambda m, n: {"episode/reward_std": 0.0, "episode/f1": 0.0},
    "no_signal": lambda m, n: {"episode/flat_groups": 1.0},
    "entropy_low": lambda m, n: {"actor/entropy_loss": 1e-4},
    "entropy_high": lambda m, n: {"actor/entropy_loss": 4.0},
    "kl_reference": lambda m, n: {"actor/kl_loss": 8.0},
    "kl_step": lambda m, n: {"actor/ppo_kl": -0.7},
    "grad_norm": lambda m, n: {"actor/grad_norm": 1000.0 * 10 ** (n - ONSET)},
    "response_short": lambda m, n: {"episode/model_tokens": 2.0},
    "response_long": lambda m, n: {"episode/model_tokens": 400.0},
    "searches": lambda m, n: {"episode/searches": 0.0},
    "answered": lambda m, n: {"episode/stop/answered": 0.0},
    "cut_off": lambda m, n: {"episode/stop/token_limit": 0.6, "episode/stop/search_limit": 0.4},
    "throughput": lambda m, n: {"perf/throughput": 3.0},
    "probability_gap": lambda m, n: {"training/rollout_probs_diff_mean": 0.3},
    "empty_searches": lambda m, n: {"episode/empty_searches": 0.2},
    "suspect": lambda m, n: {"episode/suspect": 0.9},
}


def history(path: Path) -> History:
    return {row["step"]: row["metrics"] for row in json.loads(path.read_text())}


def test_every_rule_has_a_parameter_and_a_series_that_triggers_it() -> None:
    assert set(RULES) == set(WatchConfig.model_fields) == set(TRIGGERS)


def test_no_rule_is_silent_on_healthy_runs_for_want_of_its_metric() -> None:
    series = [list(history(path).values()) for path in HEALTHY]
    assert [name for name, rule in RULES.items() if all(rule.measure(rows, 3) is None for rows in series)] == []


@pytest.mark.parametrize("path", HEALTHY, ids=lambda path: path.stem)
def test_healthy_runs_are_left_alone(path: Path) -> None:
    rows = history(path)
    assert len(rows) == LENGTHS[path.stem]
    for step in rows:
        assert watch.verdicts(WatchConfig(), rows, step) == []
    assert set(watch.levels(WatchConfig(), []).values()) == {0.0}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_warns_then_stops_and_names_what_it_saw(name: str) -> None:
    rows = history(HEALTHY[0])
    rows |= {step: {**rows[(step - 1) % 24 + 1], **TRIGGERS[name]({}, step)} for step in range(ONSET, 60)}
    rule = getattr(WatchConfig(), name)
    found = {step: [f for f in watch.verdicts(WatchConfig(), rows, step) if f.rule == name] for step in rows}
    warned = min(step for step in rows if found[step])
    assert ONSET <= warned < ONSET + rule.window, "the window holds back one bad step, but not longer than itself"
    assert warned == found[warned][0].since and not found[warned][0].stops
    assert f"{name}: " in found[warned][0].text and f"the limit {rule.limit:g}" in found[warned][0].text
    stopped = [step for step in rows if any(finding.stops for finding in found[step])]
    assert stopped[:1] == ([warned + rule.patience] if rule.action == "stop" else [])
    levels = watch.levels(WatchConfig(), found[warned])
    assert levels[f"watch/{name}"] == 1.0 and sum(levels.values()) == 1.0


@pytest.mark.parametrize("name", RULES)
def test_a_rule_can_be_ignored_or_warn_only(name: str) -> None:
    rows = {step: TRIGGERS[name](metrics, step) | {"episode/f1": 0.1} for step, metrics in history(HEALTHY[0]).items()}
    rule = getattr(WatchConfig(), name)
    for action in ("ignore", "warn"):
        wanted = WatchConfig().model_copy(update={name: rule.model_copy(update={"action": action})})
        findings = [f for step in rows for f in watch.verdicts(wanted, rows, step) if f.rule == name]
        assert not any(finding.stops for finding in findings)
        assert action == "warn" or not findings
        assert (f"watch/{name}" in watch.levels(wanted, [])) == (action == "warn")


def test_one_value_of_a_rule_is_set_alone() -> None:
    rule = config.load_profile("laptop", ["watch.nan.action=ignore"]).watch.nan
    assert (rule.action, rule.window, rule.patience) == ("ignore", 1, 2)
    with pytest.raises(ConfigError, match=r"watch\.nan\.windw is unknown; did you mean .window."):
        config.load_profile("laptop", ["watch.nan.windw=2"])


def test_equal_rewards_for_right_answers_are_no_collapse() -> None:
    solved = {"episode/reward_std": 0.0, "episode/f1": 1.0, "episode/flat_groups": 0.0}
    assert watch.verdicts(WatchConfig(), dict.fromkeys(range(1, 60), solved), 59) == []


def test_one_bad_step_warns_but_never_stops() -> None:
    rows = history(HEALTHY[0])
    rows[ONSET] = {**rows[ONSET], **{key: value for trigger in TRIGGERS.values() for key, value in trigger({}, ONSET).items()}}
    assert not [finding for step in rows for finding in watch.verdicts(WatchConfig(), rows, step) if finding.stops]


def test_a_rule_without_its_metric_is_silent() -> None:
    assert watch.verdicts(WatchConfig(), {step: {} for step in range(1, 40)}, 39) == []


def test_nulls_of_the_update_are_numbers_that_were_not_finite() -> None:
    found = watch.not_finite({"actor/loss": None, "actor/lr": 0.1, "training/rollout_probs_diff_max": None, "note": None})
    assert found == {"not_finite/actor/loss": 1.0}


def save(folder: Path, step: int) -> None:
    path = folder / f"global_step_{step}"
    (path / "actor/huggingface").mkdir(parents=True)
    (path / "actor/fsdp_config.json").write_text('{"world_size": 1}')
    for name in (
        "actor/model_world_size_1_rank_0.pt",
        "actor/optim_world_size_1_rank_0.pt",
        "actor/extra_state_world_size_1_rank_0.pt",
        "data.pt",
    ):
        with zipfile.ZipFile(path / name, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(f"step {step}"))
    (path / "actor/huggingface/config.json").write_text("{}")
    (path / "actor/huggingface/model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")


def breach(step: int, since: int, action: str = "stop", window: int = 3) -> watch.Finding:
    return watch.Finding("kl_step", step, since, window, 0.7, 0.2, "kl_step: too much", "lower train.lr", action, step > since)  # type: ignore[arg-type]


def test_the_last_checkpoint_before_the_window_outlives_retention(tmp_path: Path) -> None:
    folder, work = tmp_path / "checkpoints", tmp_path
    for step in (2, 4, 6, 8):
        save(folder, step)
    kept = watch.keep_good(folder, work, [breach(8, 8)], {})
    assert kept == Checkpoint(4, work / "good/global_step_4")
    for step in (2, 4, 6):
        watch.checkpoints.shutil.rmtree(folder / f"global_step_{step}")
    assert watch.keep_good(folder, work, [breach(9, 8)], {}) == kept
    pointer = json.loads((work / "good/good.json").read_text())
    assert pointer["step"] == 4 and pointer["reason"] == "kl_step: too much"
    watch.restore(folder, work)
    assert watch.checkpoints.latest(folder, 5) == Checkpoint(4, folder / "global_step_4")


def test_a_checkpoint_whose_episodes_earned_little_is_not_good(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path / "checkpoints", step)
    earned = {1: 0.1, 2: 0.8, 3: 0.7, 4: 0.0, 5: 0.0, 6: 0.0}
    history = {step: {"episode/reward": reward} for step, reward in earned.items()}
    kept = watch.keep_good(tmp_path / "checkpoints", tmp_path, [breach(6, 6)], history)
    assert kept and kept.step == 2, "the checkpoint of step 3 played the episodes of step 4"


def test_no_breach_and_mere_warnings_keep_nothing(tmp_path: Path) -> None:
    save(tmp_path / "checkpoints", 1)
    assert watch.keep_good(tmp_path / "checkpoints", tmp_path, [breach(9, 9)], {})
    assert watch.keep_good(tmp_path / "checkpoints", tmp_path, [breach(10, 9, "warn")], {}) is None
    assert watch.good(tmp_path) is None
    watch.restore(tmp_path / "checkpoints", tmp_path)


def test_retention_shorter_than_the_window_leaves_the_oldest_before_the_breach(tmp_path: Path) -> None:
    for step in (7, 8):
        save(tmp_path / "checkpoints", step)
    kept = watch.keep_good(tmp_path / "checkpoints", tmp_path, [breach(8, 8)], {})
    assert kept and kept.step == 7
    text = str(watch.collapse(breach(11, 8), kept))
    assert "step 11" in text and "since step 8" in text and "train.steps=7 publishes it" in text and "watch.kl_step.action=warn" in text
    assert "no checkpoint from before stands" in str(watch.collapse(breach(2, 1), None))
