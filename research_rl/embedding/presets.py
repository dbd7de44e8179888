"""What known model families want: prefixes, pooling, longest text. Knows names; a parameter that is set wins over it.

Sources: the models' cards. The prompts that a sentence-transformers folder records come before these.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research_rl.config import EncoderConfig
from research_rl.embedding.models import MODULES
from research_rl.errors import ConfigError, ModelError
from research_rl.pipeline.json_files import read_object

__all__ = ["settle"]

_MAX_TOKENS = 256
_RETRIEVE = "Represent this sentence for searching relevant passages: "
_RETRIEVE_ZH = "为这个句子生成表示以用于检索相关文章:".replace(":", "\N{FULLWIDTH COLON}")


@dataclass(frozen=True)
class _Preset:
    """Names that match `pattern` in full, without owner and in lower case."""

    pattern: str
    pooling: str
    max_tokens: int
    query: str = ""
    passage: str = ""


_PRESETS = (
    _Preset(r"(multilingual-)?e5-(small|base|large)(-v2|-unsupervised)?", "mean", 512, "query: ", "passage: "),
    _Preset(r"bge-(small|base|large)-en(-v1\.5)?", "cls", 512, _RETRIEVE),
    _Preset(r"bge-(small|base|large)-zh(-v1\.5)?", "cls", 512, _RETRIEVE_ZH),
    _Preset(r"snowflake-arctic-embed-(xs|s|m|l)(-v1\.5)?", "cls", 512, _RETRIEVE),
    _Preset(r"gte-(small|base|large)", "mean", 512),
    _Preset(r"(gt-)?(all|paraphrase)-minilm-.*", "mean", 256),
    _Preset(r"all-mpnet-base-v[12]", "mean", 384),
)


def settle(config: EncoderConfig, folder: Path) -> dict[str, Any]:
    """Return prefixes, pooling, max_tokens, normalised and batch_tokens for the model in `folder`.

    Without `encoder.pooling`, pooling is left out where the folder itself says it. Raises ConfigError for an e5 model
    with an empty prefix, and ModelError when nothing says how to pool.
    """
    preset = _preset(config.model or "")
    prompts = _prompts(folder)
    facts: dict[str, Any] = {
        "query_prefix": _first(config.query_prefix, prompts.get("query"), preset and preset.query, ""),
        "passage_prefix": _first(config.passage_prefix, prompts.get("passage", prompts.get("document")), preset and preset.passage, ""),
        "max_tokens": _first(config.max_tokens, preset and preset.max_tokens, _MAX_TOKENS),
        "normalised": config.normalise,
        "batch_tokens": config.batch_tokens,
    }
    # After the folder's own prompts: they may supply what the parameters leave empty.
    _refuse_bare_e5(config, preset, facts)
    pooling = None if config.pooling == "auto" else config.pooling
    # With modules.json the folder says it and sentence-transformers reads it.
    if pooling is None and not (folder / MODULES).is_file():
        pooling = preset.pooling if preset else None
        if pooling is None:
            raise ModelError(f"encoder.model={config.model} has no {MODULES} and no known name; set encoder.pooling to mean or cls")
    return facts if pooling is None else {**facts, "pooling": pooling}


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def _preset(model: str) -> _Preset | None:
    # Also of pypi:<package>==<version>/<folder>, and whoever the owner of a copy is.
    name = re.split(r"[/:]", model.rstrip("/"))[-1].partition("==")[0].lower()
    return next((preset for preset in _PRESETS if re.fullmatch(preset.pattern, name)), None)


def _prompts(folder: Path) -> dict[str, str]:
    path = folder / "config_sentence_transformers.json"
    prompts = read_object(path, ModelError, "download the model again").get("prompts") if path.is_file() else None
    return {str(name): text for name, text in prompts.items() if isinstance(text, str)} if isinstance(prompts, dict) else {}


def _refuse_bare_e5(config: EncoderConfig, preset: _Preset | None, facts: dict[str, Any]) -> None:
    for name in ("query_prefix", "passage_prefix") if preset and preset.passage else ():
        if not facts[name]:
            raise ConfigError(
                f"encoder.{name} is empty, but {config.model} was trained with a prefix before every text and ranks badly without; "
                f"set encoder.{name}=null for the model's own"
            )
