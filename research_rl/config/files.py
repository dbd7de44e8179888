"""The configuration on disk and on the command line: profiles, params.yaml, overrides, hashes and errors.

`params.yaml` is the resolved truth of a workspace; `configs/<profile>.yaml` are overlays on the defaults of `sections`.
Precedence: defaults < profile < params.yaml < overrides on the command line (`train.steps=40`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast, get_args

import yaml
from pydantic import BaseModel, ValidationError

from research_rl.config import commented, template_text
from research_rl.config.plain_yaml import MOST_BYTES, read_yaml
from research_rl.config.redact import redact
from research_rl.config.sections import Config, leaves
from research_rl.errors import ConfigError
from research_rl.paths import PROFILES

__all__ = [
    "Written",
    "apply_overrides",
    "assignment",
    "changes",
    "config_hash",
    "dump",
    "load",
    "load_profile",
    "located",
    "parameters",
    "profiles",
    "rendered",
    "save",
    "update",
    "written",
]

Overrides = Iterable[str] | Mapping[str, Any]
"""`section.key=value` texts, whose values are read as YAML, or values by dotted name."""
_TO_TRAINER = (
    *("nodes", "gpus_per_node", "tensor_parallel", "gpu_memory_utilization", "gradient_checkpointing", "offload", "micro_batch"),
    *("max_tokens_per_gpu", "episodes_in_flight", "validate_every", "save_every", "keep_checkpoints", "upload", "upload_wait_s"),
    *("step_deadline_s", "start_deadline_s", "max_attempts"),
)
_DEEPEST = 20
"""Most parts of a parameter's name; one below train.extra has some of its own."""
_SHOWN = 200
"""Characters of a value that a message shows."""
# A params.yaml of an earlier version is refused with the new name: a value that was ignored in silence would decide nothing.
FORMER_NAMES: dict[str, str | None] = {
    "train.prompts": "train.prompts_per_step",
    "train.group": "train.rollouts_per_prompt",
    "reward.strict.on": "reward.strict.enabled",
    "index.metric": None,
    "data.hub_endpoint": "transfer.hub_endpoint",
    **{f"train.{name}": f"trainer.{name}" for name in _TO_TRAINER},
}
"""Parameters of earlier versions: what each is called now; None for one that is gone."""


def profiles() -> list[str]:
    """Return the names of the shipped profiles."""
    return sorted(path.stem for path in PROFILES.glob("*.yaml"))


def load(path: Path, overrides: Overrides = ()) -> Config:
    """Read a resolved params.yaml and apply dotted overrides. Raises ConfigError."""
    return _build(_read(path), overrides, str(path))


def load_profile(name: str, overrides: Overrides = ()) -> Config:
    """Read `configs/<name>.yaml` over the defaults and apply dotted overrides. Raises ConfigError.

    A profile may name another as `extends`; its own values then replace that one's.
    """
    return _build({**_profile(name), "profile": name}, overrides, str(PROFILES / f"{name}.yaml"))


def _profile(name: str, above: tuple[str, ...] = ()) -> dict[str, Any]:
    if name not in profiles():
        raise ConfigError(f"profile={_brief(name)} is not one of {profiles()}; choose one of them or add {PROFILES}/<name>.yaml")
    if name in above:
        raise ConfigError(f"profile={name!r} extends itself by way of {' and '.join(above)}; remove one `extends`")
    tree = _read(PROFILES / f"{name}.yaml")
    base = tree.pop("extends", None)
    return _overlay(_profile(base, (*above, name)), tree) if base else tree


def _overlay(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return `below` with the values of `above` put in, section by section."""
    merged = dict(below)
    for name, value in above.items():
        base = merged.get(name)
        merged[name] = _overlay(base, value) if isinstance(base, dict) and isinstance(value, dict) else value
    return merged


def save(config: Config, path: Path) -> bool:
    """Write the resolved tree to `path`, see `rendered`; return False when the file already says the same."""
    text = rendered(config, path)
    # An unchanged file keeps its time stamp, so that neither DVC nor an editor sees a change.
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return False
    _replace(path, text.encode())
    return True


def rendered(config: Config, path: Path) -> str:
    """Return what `save` writes to `path`: the whole tree, and where the file has comments the file with only its values changed."""
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, UnicodeDecodeError):
        return dump(config)
    # Without a comment there is nothing to save, and a plain dump puts every parameter in its usual place.
    changed = commented.merged(text, config.model_dump(mode="json")) if "#" in text else None
    return dump(config) if changed is None else changed


def update(config: Config, path: Path) -> list[str]:
    """Write the resolved tree to `path`; return one line a parameter whose value there changed, or that the file is new."""
    # Read before it is replaced.
    before = _former(path)
    if not save(config, path):
        return []
    if before is None:
        return [f"{path.name} written (profile {config.profile})"]
    return [f"{line}, written to {path.name}" for line in changes(before, config.model_dump(mode="json"))]


class Written:
    """A params.yaml that says what runs; `keep` it as soon as something is built from it."""

    def __init__(self) -> None:
        self.stays = False

    def keep(self) -> None:
        """Leave the file as it is, whatever happens later: what was built, or begun, belongs to it."""
        self.stays = True


@contextmanager
def written(config: Config, path: Path, say: Callable[[str], None]) -> Generator[Written]:
    """Write the resolved tree to `path` for a block of work, and put the file back when the block fails before anything was built.

    `say` is given one line for every parameter that changed. An edit that was saved in the meantime wins.
    """
    before = path.read_bytes() if path.is_file() else None
    lines, state = update(config, path), Written()
    for line in lines:
        say(line)
    ours = path.read_bytes()
    try:
        yield state
    except BaseException:
        if lines and not state.stays and path.is_file() and path.read_bytes() == ours:
            _put_back(path, before)
            say(f"{path.name} put back as it was: nothing was built")
        raise


def _put_back(path: Path, content: bytes | None) -> None:
    if content is None:
        path.unlink()
    else:
        _replace(path, content)


def _replace(path: Path, content: bytes) -> None:
    # By renaming, so that whoever reads meanwhile gets the old file or the new one, and never a part.
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def _former(path: Path) -> dict[str, Any] | None:
    """Return what a file says now; None when it is missing or was written for another version of this tree."""
    try:
        return load(path).model_dump(mode="json")
    except ConfigError:
        return None


def changes(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return `name before -> after` for every parameter in which two resolved trees differ."""
    lines: list[str] = []
    for name in dict.fromkeys([*before, *after]):
        old, new = before.get(name), after.get(name)
        if old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += changes(cast(Mapping[str, Any], old), cast(Mapping[str, Any], new), f"{prefix}{name}.")
        else:
            lines.append(f"{prefix}{name} {_shown(old)} -> {_shown(new)}")
    return lines


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, Mapping | list | bool | None) else str(value)


def dump(config: Config) -> str:
    """Return the resolved tree as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def parameters(config: Config, sections: Iterable[str]) -> dict[str, Any]:
    """Return the values of the named sections or single parameters (`serving.dtype`) as they take effect.

    No seed is empty, a prompt file stands there by its content, and the service's memory only where the index is chosen by it.
    """
    tree = config.model_dump(mode="json")
    # An empty seed stands for the top-level one; hashed as empty, a change of that one would make nothing stale.
    tree["data"]["seed"], tree["train"]["seed"] = config.data_seed, config.train_seed
    # Hashed in any case, it would make an index stale that it does not decide.
    tree["retriever"]["memory_gib"] = config.retriever.memory_gib if config.index.factory == "auto" else None
    tree["prompt"] = template_text.by_content(tree["prompt"])
    return {name: _at(tree, name) for name in sorted(sections)}


def _at(tree: Any, name: str) -> Any:
    for part in name.split("."):
        tree = tree[part]
    return tree


def located(config: Config, workspace: Path) -> Config:
    """Return `config` with `prompt.path` made absolute where the workspace has that file, so that any process can read it.

    A path that the workspace does not have stays as it is: it names a file of the project, which every machine has in its own folder.
    """
    path = config.prompt.path
    if path is None or not (workspace / path).is_file():
        return config
    return config.model_copy(update={"prompt": config.prompt.model_copy(update={"path": str(workspace / path)})})


def config_hash(config: Config, sections: Iterable[str]) -> str:
    """Return the sha256 of the named sections or parameters in canonical JSON."""
    # Sorted and without spaces: the order of a file's lines and its layout must make nothing stale.
    text = json.dumps(parameters(config, sections), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def apply_overrides(tree: dict[str, Any], overrides: Overrides) -> dict[str, Any]:
    """Return `tree` with overrides applied. Raises ConfigError.

    A mapping given to a section changes the parameters it names and leaves the others as they are.
    """
    for name, value in overrides.items() if isinstance(overrides, Mapping) else map(assignment, overrides):
        keys = name.split(".")
        if not all(keys) or len(keys) > _DEEPEST:
            raise ConfigError(f"override {_brief(name)}: a name is section.key, such as train.steps; `research config describe` lists all")
        _assign(tree, keys, value, Config)
    return tree


def assignment(item: str) -> tuple[str, Any]:
    """Split `section.key=value`; the value is read as YAML. Raises ConfigError."""
    name, equals, text = item.partition("=")
    if not equals or not name:
        raise ConfigError(f"override {_brief(item)} is not of the form section.key=value; an example: train.steps=40")
    try:
        return name, read_yaml(text)
    except ConfigError as error:
        shown = f"override {_brief(name, bare=True)}={_brief(text, bare=True)}: the value {error}"
        quoted = "'" + text.replace("'", "''") + "'"
        raise ConfigError(shown if len(text) > _SHOWN else f"{shown}; for this text itself write {name}={quoted!r}") from None


def _assign(tree: dict[str, Any], keys: list[str], value: Any, model: Any) -> None:
    """Put a value at a dotted place of a raw tree; `model` is the section class that `tree` belongs to, None below a free mapping."""
    key, *inner_keys = keys
    inner = _section(model, key)
    # A free mapping such as train.extra has no parameters of ours and is replaced as a whole.
    if not inner_keys and not (inner and isinstance(value, Mapping)):
        tree[key] = value
        return
    child = tree.setdefault(key, {})
    if not isinstance(child, dict):
        raise ConfigError(f"override {'.'.join(keys)}: {key} is a value, not a section")
    below = {".".join(inner_keys): value} if inner_keys else cast(Mapping[str, Any], value)
    for name, item in below.items():
        # A key of the mapping itself is one name: verl's options in train.extra hold dots.
        _assign(cast(dict[str, Any], child), str(name).split(".") if inner_keys else [str(name)], item, inner)


def _section(model: Any, key: str) -> Any:
    field = getattr(model, "model_fields", {}).get(key)
    return field.annotation if field and isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel) else None


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as stream:
            content = stream.read(MOST_BYTES + 1)
        tree = read_yaml(content.decode("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; write it with `research init` or run inside a workspace") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); it must be a file that this user may read") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8; save it as UTF-8") from None
    except ConfigError as error:
        raise ConfigError(f"{path} {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds a {type(tree).__name__}; a mapping of sections is needed")
    return cast(dict[str, Any], tree)


def _build(tree: Mapping[str, Any], overrides: Overrides, origin: str) -> Config:
    try:
        return Config.model_validate(_text_keys(apply_overrides(dict(tree), overrides)))
    except ValidationError as error:
        raise ConfigError(f"{origin}: " + "; ".join(_explain(item) for item in error.errors())) from None


def _text_keys(tree: dict[Any, Any]) -> dict[str, Any]:
    """Return the tree with every key as text: YAML reads a bare `on`, `yes` or `1` as another type."""
    return {_key(name): _text_keys(value) if isinstance(value, dict) else value for name, value in tree.items()}


def _key(name: Any) -> str:
    return {True: "on", False: "off", None: "null"}.get(name, str(name)) if isinstance(name, bool | None) else str(name)


def _explain(problem: Mapping[str, Any]) -> str:
    """Turn one pydantic error into `name=value: reason`, with the new or the nearest known name for an unknown one."""
    name = _brief(".".join(str(part) for part in problem["loc"]), bare=True)
    # Raised by our own validators, whose messages already hold value and remedy.
    if problem["type"] == "value_error":
        return ": ".join(part for part in (name, _cut(str(problem["ctx"]["error"]), problem["input"])) if part)
    # Written as train=x.jsonl, the commonest slip for a list of one.
    if problem["type"] == "tuple_type":
        return f"{name}={_brief(problem['input'])}: Input should be a list; write {name}=[{_brief(problem['input'], bare=True)}]"
    if problem["type"] != "extra_forbidden":
        quotes = f"; to give it as text, quote it: {name}='\"...\"'" if problem["type"] == "string_type" else ""
        return f"{name}={_brief(problem['input'])}: {problem['msg']}{quotes}"
    if name in FORMER_NAMES:
        return f"{name} is now {FORMER_NAMES[name]}" if FORMER_NAMES[name] else f"{name} is no longer a parameter; remove it"
    return f"{name} is unknown{_nearest(problem['loc'])}"


def _brief(value: Any, *, bare: bool = False) -> str:
    """Return a value as a message shows it: in one line, cut, and without credentials; `bare`: a text without quotes."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than 4,300 digits
        return f"a number of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__} with such a number"
    text = redact(text[1:-1] if bare and isinstance(value, str) else text)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text):,} characters)"


def _cut(message: str, value: Any) -> str:
    """Return a message with the texts of the value that it complains of as `_brief` shows them."""
    long = {leaf for leaf in leaves(value) if isinstance(leaf, str) and len(leaf) > _SHOWN}
    # The longest first: a shorter text may be a part of it.
    for text in sorted(long, key=len, reverse=True):
        brief = _brief(text, bare=True)
        message = message.replace(repr(text)[1:-1], brief).replace(text, brief)
    return message


def _nearest(location: tuple[Any, ...]) -> str:
    import difflib

    model: Any = Config
    for part in location[:-1]:
        if isinstance(part, int):
            model = get_args(model)[0]  # a list's place: its items are of one model
        else:
            model = model.model_fields[part].annotation if part in getattr(model, "model_fields", {}) else None
    siblings = list(getattr(model, "model_fields", {}))
    # Below difflib's usual 0.6: parameters have short names, and the message is an error in any case.
    close = difflib.get_close_matches(str(location[-1]), siblings, 1, 0.4)
    elsewhere = [f"{name}.{location[-1]}" for name in Config.model_fields if _has(name, location[-1])]
    # A right name in the wrong section is likelier than a misspelt one.
    if elsewhere and not (close and close[0] == str(location[-1])):
        return f"; did you mean {elsewhere[0]!r}?"
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(siblings)}"


def _has(section: str, key: Any) -> bool:
    return str(key) in getattr(_section(Config, section), "model_fields", {})
