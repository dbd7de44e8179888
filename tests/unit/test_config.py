"""The configuration tree refuses what it does not know and every shipped file parses."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from research_rl import config
from research_rl.config import Config, Section
from research_rl.errors import ConfigError
from research_rl.paths import CHECKOUT


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
