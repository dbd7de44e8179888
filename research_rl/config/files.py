"""The configuration on disk and on the command line: profiles, params.yaml, overrides, hashes and errors.

`params.yaml` is the resolved truth of a workspace; `configs/<profile>.yaml` are overlays on the defaults of `sections`.
Precedence: defaults < profile < params.yaml < overrides on the command line (`train.steps=40`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from research_rl.config.sections import Config
from research_rl.episode import template_text
from research_rl.errors import ConfigError
from research_rl.paths import PROFILES

__all__ = ["apply_overrides", "config_hash", "content_tree", "describe", "dump", "load", "load_profile", "profiles", "save"]


def profiles() -> list[str]:
    """Return the names of the shipped profiles."""
    return sorted(path.stem for path in PROFILES.glob("*.yaml"))


def load(path: Path, overrides: Iterable[str] = ()) -> Config:
    """Read a resolved params.yaml and apply dotted overrides. Raises ConfigError."""
    return _build(_read(path), overrides, str(path))


def load_profile(name: str, overrides: Iterable[str] = ()) -> Config:
    """Read `configs/<name>.yaml` over the defaults and apply dotted overrides. Raises ConfigError.

    A profile may name another as `extends`; its own values then replace that one's.
    """
    path = PROFILES / f"{name}.yaml"
    return _build({**_profile(name), "profile": name}, overrides, str(path))


def _profile(name: str) -> dict[str, Any]:
    path = PROFILES / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(f"profile={name!r} is not one of {profiles()}; choose one of them or add {path}")
    tree = _read(path)
    base = tree.pop("extends", None)
    return _overlay(_profile(base), tree) if base else tree


def _overlay(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return `below` with the values of `above` put in, section by section."""
    merged = dict(below)
    for name, value in above.items():
        found = merged.get(name)
        merged[name] = _overlay(found, value) if isinstance(found, dict) and isinstance(value, dict) else value
    return merged


def save(config: Config, path: Path) -> bool:
    """Write the resolved tree to `path`; return False when the file already says the same."""
    text = dump(config)
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return False
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    return True


def dump(config: Config) -> str:
    """Return the resolved tree as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def describe() -> list[str]:
    """Return one line a parameter: dotted name, type, default, meaning."""
    return _describe(Config, "")


def _describe(model: type[BaseModel], prefix: str) -> list[str]:
    lines: list[str] = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            lines += ["", f"{prefix}{name}: {field.description}", *_describe(field.annotation, f"{prefix}{name}.")]
        else:
            default = field.get_default(call_default_factory=True)
            lines.append(f"  {prefix}{name} = {json.dumps(default, default=str)}: {field.description}")
    return lines


def content_tree(config: Config) -> dict[str, Any]:
    """Return the resolved tree with the content's sha256 in the place of each file that shapes results."""
    tree = config.model_dump(mode="json")
    return {**tree, "prompt": template_text.by_content(tree["prompt"])}


def config_hash(config: Config, sections: Iterable[str]) -> str:
    """Return the sha256 of the named top-level sections in canonical JSON; a file counts by its content."""
    tree = content_tree(config)
    part = {name: tree[name] for name in sorted(sections)}
    return hashlib.sha256(json.dumps(part, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def apply_overrides(tree: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return `tree` with `a.b=value` assignments applied; values are read as YAML. Raises ConfigError."""
    for item in overrides:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise ConfigError(f"override {item!r} is not of the form section.key=value")
        _assign(tree, name.split("."), yaml.safe_load(value))
    return tree


def _assign(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        child = tree.setdefault(key, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {'.'.join(keys)}: {key} is a value, not a section")
        tree = child
    tree[keys[-1]] = value


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; write it with `research init` or run inside a workspace") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds a {type(tree).__name__}; a mapping of sections is needed")
    return tree


def _build(tree: Mapping[str, Any], overrides: Iterable[str], origin: str) -> Config:
    try:
        return Config.model_validate(apply_overrides(dict(tree), overrides))
    except ValidationError as error:
        raise ConfigError(f"{origin}: " + "; ".join(_explain(item) for item in error.errors())) from None


def _explain(item: Mapping[str, Any]) -> str:
    """Turn one pydantic error into `name=value: reason`, with the nearest known name for an unknown one."""
    name = ".".join(str(part) for part in item["loc"])
    if item["type"] == "value_error":
        return ": ".join(part for part in (name, str(item["ctx"]["error"])) if part)
    if item["type"] != "extra_forbidden":
        return f"{name}={item['input']!r}: {item['msg']}"
    return f"{name} is unknown{_nearest(item['loc'])}"


def _nearest(location: tuple[Any, ...]) -> str:
    import difflib

    model: Any = Config
    for part in location[:-1]:
        if isinstance(part, int):
            model = get_args(model)[0]  # a list's place: its items are of one model
        else:
            model = model.model_fields[part].annotation if part in getattr(model, "model_fields", {}) else None
    known = list(getattr(model, "model_fields", {}))
    close = difflib.get_close_matches(str(location[-1]), known, 1, 0.4)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
