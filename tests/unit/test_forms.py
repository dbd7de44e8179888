"""The fields `steps` and `seed` of a flow's form are overrides like any other: written to params.yaml, and named once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from research_rl import config
from research_rl.errors import ConfigError
from tasks import job
from tasks.forms import merged
from tasks.job import flow_run_name, resolve


@pytest.mark.parametrize(
    ("flow", "parameters", "overrides"),
    [
        ("research-train", {"steps": 40, "seed": 7, "overrides": {"train.lr": 0.5}}, {"train.lr": 0.5, "train.steps": 40, "seed": 7}),
        ("research-train", {"steps": None, "seed": 0, "overrides": {}}, {"seed": 0}),
        (
            "research-train",
            {"steps": 4, "overrides": {"train": {"lr": 0.5}, "train.seed": 3}},
            {"train": {"lr": 0.5}, "train.seed": 3, "train.steps": 4},
        ),
        ("research-eval", {"seed": 7, "overrides": {"seed": 1}}, {"seed": 1, "evaluation.seed": 7}),
        ("research-bench", {"seed": 7}, {"evaluation.seed": 7}),
        ("research-data", {"seed": 7, "overrides": None}, {}),
    ],
)
def test_a_field_is_the_override_that_it_stands_for(flow: str, parameters: dict[str, Any], overrides: dict[str, Any]) -> None:
    given = dict(parameters.get("overrides") or {})
    assert merged(flow, parameters) == overrides
    assert given == (parameters.get("overrides") or {}), "the run's own parameters stay as they are"


@pytest.mark.parametrize("overrides", [{"train.steps": 24}, {"train": {"steps": 24}}, {"train.steps": 40}])
def test_a_field_that_overrides_set_too_is_refused(overrides: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^steps=40 and overrides both set train\.steps; leave one of the two out$"):
        merged("research-train", {"steps": 40, "overrides": overrides})


def test_both_of_a_mapping_and_a_field_take_effect(tmp_path: Path) -> None:
    found = resolve(tmp_path, "laptop", merged("research-train", {"steps": 40, "seed": 7, "overrides": {"train": {"lr": 0.5}}}))
    assert (found.train.steps, found.train.lr, found.seed) == (40, 0.5, 7)


def test_a_value_that_no_run_can_have_is_refused_as_an_override_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.steps=0: Input should be greater than or equal to 1"):
        resolve(tmp_path, "laptop", merged("research-train", {"steps": 0}))


def test_a_run_is_called_by_the_seed_of_its_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.save(config.load_profile("laptop"), tmp_path / "params.yaml")
    parameters = {"workspace": str(tmp_path), "steps": 40, "seed": 7}
    monkeypatch.setattr(job, "flow_run", SimpleNamespace(parameters=parameters, flow_name="research-train"))
    assert flow_run_name() == "research-train laptop seed 7"
    parameters["overrides"] = {"seed": 7}
    assert flow_run_name() == "research-train", "the run itself says what is wrong with its parameters"
