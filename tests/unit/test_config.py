"""The configuration tree refuses what it does not know and every shipped file parses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from research_rl import config
from research_rl.config import Config, Section, document
from research_rl.errors import ConfigError
from research_rl.paths import CHECKOUT
from research_rl.pipeline.stages import STAGES


@pytest.mark.parametrize("name", config.profiles())
def test_every_shipped_profile_parses(name: str) -> None:
    assert config.load_profile(name).profile == name


def test_shipped_params_are_the_resolved_laptop_profile() -> None:
    assert (CHECKOUT / "params.yaml").read_text() == config.dump(config.load_profile("laptop"))


def test_every_field_is_described() -> None:
    def fields(model: type[Section], prefix: str = "") -> list[tuple[str, str | None]]:
        found: list[tuple[str, str | None]] = []
        for name, field in model.model_fields.items():
            found.append((prefix + name, field.description))
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                found += fields(field.annotation, f"{prefix}{name}.")
        return found

    assert [name for name, description in fields(Config) if not description] == []


def test_saved_tree_reads_back_equal_and_second_save_changes_nothing(tmp_path: Path) -> None:
    tree = config.load_profile("laptop", ["train.steps=7"])
    assert config.save(tree, tmp_path / "params.yaml")
    assert not config.save(tree, tmp_path / "params.yaml")
    assert config.load(tmp_path / "params.yaml") == tree


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=3", r"train\.stepz is unknown; did you mean 'steps'\?"),
        ("trian.steps=3", r"trian is unknown; did you mean 'train'\?"),
        ("train.steps=0", r"train\.steps=0: Input should be greater than or equal to 1"),
        ("train.steps=many", r"train\.steps='many'"),
        ("train.steps", r"not of the form section\.key=value"),
        ("seed.x=1", r"seed=\{'x': 1\}: Input should be a valid integer"),
        ("prompt.template.x=1", "template is a value, not a section"),
        ("steps=26", "steps is unknown; did you mean"),
        ("tracking.mlflow_uri=http://ada:secret@host", "the address at host carries a user or password; parameters are recorded"),
        ("judge.url=http://ada:secret@host/v1", "the address at host carries a user or password; parameters are recorded"),
    ],
)
def test_a_bad_override_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.load_profile("laptop", [override])


def test_an_unknown_profile_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'huge' is not one of \[.*'laptop'"):
        config.load_profile("huge")


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "- x"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"params\.yaml"):
        config.load(path)


def test_missing_params_name_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="research init"):
        config.load(tmp_path / "params.yaml")


def test_hash_follows_its_sections_alone() -> None:
    one, other = config.load_profile("laptop"), config.load_profile("laptop", ["train.lr=0.5"])
    assert config.config_hash(one, ["data", "seed"]) == config.config_hash(other, ["seed", "data"])
    assert config.config_hash(one, ["train"]) != config.config_hash(other, ["train"])


def test_dump_is_plain_yaml_of_the_whole_tree() -> None:
    tree = config.load_profile("laptop")
    assert Config.model_validate(yaml.safe_load(config.dump(tree))) == tree


def test_a_warm_up_needs_a_prompt_it_can_write() -> None:
    with pytest.raises(ConfigError, match=r"policy\.warm_up=true .* set prompt\.template to base or file"):
        config.load_profile("laptop", ["policy.warm_up=true", "prompt.template=instruct"])
    assert config.load_profile("smollm-world").policy.warm_up


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.prompts_per_step=8", "train.mini_batch=3"], r"mini_batch=3 does not divide prompts_per_step=8; .* one of \[1, 2, 4, 8\]"),
        (["train.prompts_per_step=4", "train.mini_batch=8"], r"mini_batch=8 does not divide prompts_per_step=4; .* one of \[1, 2, 4\]"),
        (
            ["train.prompts_per_step=4", "train.rollouts_per_prompt=3", "trainer.gpus_per_node=8"],
            r"train\.prompts_per_step=4 times train\.rollouts_per_prompt=3 .*=8 processes; make train\.prompts_per_step a multiple of 8",
        ),
        (
            ["train.mini_batch=2", "train.rollouts_per_prompt=6", "trainer.nodes=2", "trainer.gpus_per_node=4"],
            r"train\.mini_batch=2 times train\.rollouts_per_prompt=6 .* make train\.mini_batch a multiple of 4",
        ),
    ],
)
def test_a_step_that_verl_would_pad_is_refused_with_what_fits(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.load_profile("laptop", overrides)


def test_a_step_that_divides_is_taken() -> None:
    fits = ["train.prompts_per_step=8", "train.mini_batch=4", "train.rollouts_per_prompt=6", "trainer.gpus_per_node=8"]
    assert config.load_profile("laptop", fits).train.mini_batch == 4


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("algorithm.filter_groups.enable: true", r"algorithm\.filter_groups\.enable, .*; set train\.filter_groups"),
        ("+algorithm: {filter_groups: {enable: true}}", r"algorithm\.filter_groups\.enable, .*; set train\.filter_groups"),
        ("algorithm.rollout_correction.rollout_is: token", r"rollout_is, .*; set train\.rollout_correction"),
        ("algorithm.rollout_correction.rollout_is_threshold: 3", r"rollout_is_threshold, .*; set train\.rollout_correction"),
        ("trainer.v1.sampler.sync_refill_failed_groups: true", r"sync_refill_failed_groups, which would change nothing here"),
        ("reward.custom_reward_function.path: a.py", r"set the section reward"),
    ],
)
def test_an_option_of_verl_that_would_do_nothing_is_refused_with_what_does(extra: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.load_profile("laptop", [f"train.extra={{{extra}}}"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.rollout_correction.upper=3"], r"has values but no method"),
        (["train.rollout_correction.method=tis", "train.rollout_correction.lower=0.5"], r"lower=0\.5 is a bound of icepop"),
        (["train.rollout_correction.method=tis", "train.extra={algorithm.rollout_correction.bypass_mode: true}"], r"remove one of the two"),
        (["train.loss=sapo", "train.clip_ratio_high=0.3"], r"loss=sapo clips nothing"),
        (["train.loss=geo_mean", "train.loss_mean=token-sum"], r"loss=geo_mean has a mean of its own"),
    ],
)
def test_a_value_that_the_chosen_method_does_not_read_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.load_profile("laptop", overrides)


def test_the_page_of_all_parameters_is_current() -> None:
    """Written by `python -m research_rl.config.document > docs/configuration.md`."""
    assert (CHECKOUT / "docs/configuration.md").read_text(encoding="utf-8") == document.page()


def test_every_parameter_is_read_somewhere() -> None:
    """A parameter that no code reads promises what nothing keeps."""
    code = "\n".join(
        path.read_text(encoding="utf-8") for name in ("research_rl", "tasks") for path in sorted((CHECKOUT / name).rglob("*.py"))
    )
    code = code.replace((CHECKOUT / "research_rl/config/sections.py").read_text(encoding="utf-8"), "")
    # Read by names that are put together or chosen, so that no attribute has them in the code.
    drift = {f"validation.drift.{measure}_{level}" for measure in ("rows", "shape", "vocabulary") for level in ("warn", "critical")}
    names = [item.name for item in document.parameters() if item.type]
    attributes = set(re.findall(r"\.(\w+)\b", code))
    assert {name for name in names if name.rpartition(".")[2] not in attributes} == drift | {"trainer.step_deadline_s"}


def test_a_mapping_given_to_a_section_leaves_its_other_parameters_alone() -> None:
    tree = config.load_profile("laptop", ["train={steps: 2}", "reward.strict={enabled: true}"])
    assert (tree.train.steps, tree.train.lr, tree.reward.strict.enabled, tree.reward.strict.max_answer_words) == (2, 1e-4, True, 32)


def test_a_file_that_dvc_wrote_and_a_command_line_are_read_as_yaml_1_2(tmp_path: Path) -> None:
    """`dvc exp run -S` writes the texts off and 1:30 without quotes, which YAML 1.1 takes for false and 90."""
    path = tmp_path / "params.yaml"
    path.write_text("retriever: {tape: off}\npolicy: {source: hub, path: 1:30}\n")
    tree = config.load(path, ["retriever.tape=off", "tracking.dvc=false"])
    assert (tree.retriever.tape, tree.policy.path, tree.tracking.dvc) == ("off", "1:30", False)
    assert config.load_profile("laptop", ["retriever.tape=off"]).retriever.tape == "off"
    assert config.load_profile("laptop", ["tracking.dvc=off", "episode.top_k=1_0", "train.lr=1.0e-3"]).tracking.dvc is False


def test_a_free_mapping_is_replaced_as_a_whole() -> None:
    tree = config.load_profile("laptop", ["train.extra={a.b: 1}", "train.extra={c.d: 2}"])
    assert tree.train.extra == {"c.d": 2}


def test_old_names_are_refused_with_the_new_ones(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("train: {prompts: 4, group: 2, nodes: 2}\nreward: {strict: {on: true}}\nindex: {metric: ip}\n")
    with pytest.raises(ConfigError) as refusal:
        config.load(path)
    for line in (
        "train.prompts is now train.prompts_per_step",
        "train.group is now train.rollouts_per_prompt",
        "train.nodes is now trainer.nodes",
        "reward.strict.on is now reward.strict.enabled",
        "index.metric is no longer a parameter",
    ):
        assert line in str(refusal.value)


def test_a_changed_deadline_or_machine_makes_nothing_stale() -> None:
    one, other = config.load_profile("laptop"), config.load_profile("laptop", ["trainer.step_deadline_s=9", "trainer.nodes=2"])
    for stage in STAGES.values():
        assert config.config_hash(one, stage.sections) == config.config_hash(other, stage.sections)


def test_every_parameter_of_an_evaluation_decides_it_but_those_about_its_course() -> None:
    one, other = config.load_profile("laptop"), config.load_profile("laptop", ["evaluation.concurrency=2", "evaluation.max_failures=0.5"])
    for stage in STAGES.values():
        assert config.config_hash(one, stage.sections) == config.config_hash(other, stage.sections), stage.name
    course = {"evaluation.concurrency", "evaluation.max_failures"}
    every = {f"evaluation.{name}" for name in type(one.evaluation).model_fields}
    for name in ("baseline", "evaluate"):
        assert {key for key in STAGES[name].sections if key.startswith("evaluation")} == every - course


@pytest.mark.parametrize(
    ("override", "changed"), [("serving.dtype=bfloat16", True), ("serving.engine=sglang", True), ("serving.port=1", False)]
)
def test_what_of_the_server_changes_greedy_text_belongs_to_evaluations(override: str, changed: bool) -> None:
    one, other = config.load_profile("laptop"), config.load_profile("laptop", [override])
    differ = {
        name for name, stage in STAGES.items() if config.config_hash(one, stage.sections) != config.config_hash(other, stage.sections)
    }
    assert differ == ({"baseline", "evaluate"} if changed else set())


def test_a_seed_of_its_own_moves_training_alone_and_an_empty_one_follows_the_top_level_seed() -> None:
    one = config.load_profile("laptop")

    def differing(*overrides: str) -> set[str]:
        other = config.load_profile("laptop", list(overrides))
        return {
            name for name, stage in STAGES.items() if config.config_hash(one, stage.sections) != config.config_hash(other, stage.sections)
        }

    assert differing("train.seed=7") == {"train"}
    assert differing("data.seed=7") == {"download", "prepare"}
    assert differing("seed=7") == {"download", "prepare", "policy", "train"}
    assert differing("seed=7", "data.seed=42", "train.seed=42") == {"policy"}


@pytest.mark.parametrize("value", ["[a,b", "@x", "%x", "&a *a", "2026-13-45", "{a: b", "\x00"])
def test_a_value_that_is_no_yaml_is_one_message_with_the_remedy(value: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.folder=.*is not YAML.*; for this text itself write data\.folder="):
        config.load_profile("laptop", [f"data.folder={value}"])


def test_a_text_where_a_list_is_needed_is_told_how_the_list_is_written() -> None:
    """Pydantic says "valid tuple", which nobody can type into a YAML file or on a command line."""
    with pytest.raises(ConfigError, match=r"data\.train='a\.jsonl': Input should be a list; write data\.train=\[a\.jsonl\]"):
        config.load_profile("laptop", ["data.train=a.jsonl"])
    assert config.load_profile("laptop", ["data.train=[a.jsonl]"]).data.train == ("a.jsonl",)
