"""Question sets by name. Knows which file of `RUC-NLPIR/FlashRAG_datasets` holds which split; knows no source."""

from __future__ import annotations

from research_rl.errors import ConfigError

__all__ = ["SETS", "expand"]

SETS: dict[str, tuple[str, ...]] = {
    "musique": ("train", "dev"),
    "hotpotqa": ("train", "dev"),
    "2wikimultihopqa": ("train", "dev"),
    "bamboogle": ("test",),
    "nq": ("train", "dev", "test"),
    "triviaqa": ("train", "dev", "test"),
    "popqa": ("test",),
}
"""The published splits of each set, the one to evaluate on last."""


def expand(name: str, split: str) -> str:
    """Return the file a bare set name stands for in `split`, any other name as it is.

    In test it is the set's last split, since some have no public test answers. Raises ConfigError for a split the set lacks.
    """
    if name not in SETS:
        return name
    splits = SETS[name]
    if split == "test":
        return f"{name}/{splits[-1]}.jsonl"
    if split not in splits:
        raise ConfigError(f"data.{split}={name} has no split {split}, only {', '.join(splits)}; leave it out or name a file of it")
    return f"{name}/{split}.jsonl"
