"""An index of two tiers as a stage, in parts and behind the service, and what `index.factory=auto` chooses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from research_rl import config as configuration
from research_rl.config import Config, EncoderConfig, IndexConfig, RetrieverConfig, config_hash
from research_rl.embedding import build as embed
from research_rl.errors import ConfigError, ManifestError
from research_rl.index import auto, budget, build
from research_rl.pipeline import manifest
from research_rl.pipeline.stages import STAGES, measured
from research_rl.retriever.client import merged
from research_rl.retriever.retriever import Retriever
from tests import knowledge

ONE_BIT = {"factory": "RR64,RaBitQfs", "refine": True}
QUERIES = [f"Person{n} Surname{n}" for n in range(0, 250, 7)]


def test_the_stage_builds_two_tiers_and_says_how_good_and_how_sure_they_are(tmp_path: Path) -> None:
    workspace = knowledge.built(tmp_path, encoder={"dim": 64, "shard_rows": 100}, index={**ONE_BIT, "candidates": 50, "shard_rows": 100})
    found = manifest.load(workspace.folder("index"))
    assert found.facts["candidates"] == 50 and len(found.facts["bounds"]) == found.counts["shards"] == 3
    assert found.facts["recall"]["5"] > 0.9
    assert set(found.facts["certified"]) == {"proven", "probable"}
    for shares in found.facts["certified"].values():
        assert list(shares.values()) == sorted(shares.values()) and shares["250"] == 1.0, "all rows compared"
    assert measured(workspace, found)["latency"]["1"]["p50_ms"] > 0
    size = sum(path.stat().st_size for path in workspace.folder("index").glob("*.faiss"))
    assert size < 250 * 64 * 4, "no copy of the vectors"


def test_cut_into_parts_it_answers_like_the_exact_index(tmp_path: Path) -> None:
    """As replicas of the parts of an index do, each with its own files of codes and the vectors of its rows."""
    tree = {"encoder": {"dim": 64, "shard_rows": 130}}
    truth = Retriever.open(knowledge.built(tmp_path / "flat", **tree, index={"factory": "Exact"}), RetrieverConfig()).search(QUERIES, 7)
    workspace = knowledge.built(tmp_path / "tiers", **tree, index={**ONE_BIT, "candidates": 250, "shard_rows": 100})
    assert Retriever.open(workspace, RetrieverConfig()).search(QUERIES, 7) == truth
    parts = [Retriever.open(workspace, RetrieverConfig(), part=(number, 3)).search(QUERIES, 7) for number in range(3)]
    assert [[p.score for p in row] for row in merged(parts, 7)] == [[p.score for p in row] for row in truth]
    assert merged(parts, 7) == truth


def test_a_killed_build_repeats_at_most_one_file(tmp_path: Path) -> None:
    tree = {"encoder": {"dim": 64}, "index": {**ONE_BIT, "shard_rows": 100}}
    knowledge.store(tmp_path)
    embed.run(knowledge.context("embed", tmp_path, **tree))

    def killed(text: str, share: float) -> None:
        if text.startswith("200 of"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build.run(knowledge.context("index", tmp_path, killed, **tree))
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("artifacts/.work/index-*/dense-*.json")}
    assert len(finished) == 2 and not (tmp_path / "artifacts/index").exists()

    def look(text: str, share: float) -> None:
        assert all(path.stat().st_mtime_ns == when for path, when in finished.items())

    build.run(knowledge.context("index", tmp_path, look, **tree))
    whole = knowledge.built(tmp_path / "whole", **tree)
    for path in whole.folder("index").glob("*.faiss"):
        assert path.read_bytes() == (tmp_path / "artifacts/index" / path.name).read_bytes()


def test_an_altered_vector_is_found_before_the_service_opens(tmp_path: Path) -> None:
    workspace = knowledge.built(tmp_path, encoder={"dim": 64}, index=ONE_BIT)
    path = next(workspace.folder("embed").glob("vectors-*"))
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ManifestError, match=r"vectors-.* was altered"):
        Retriever.open(workspace, RetrieverConfig())


@pytest.mark.parametrize(
    ("memory_gib", "factory", "refine"), [(40, "Exact", False), (3, "RR768,RaBitQfs", True), (1, "RR768,IVF2048,RaBitQ", True)]
)
def test_auto_takes_the_most_exact_index_that_fits_the_service(memory_gib: float, factory: str, refine: bool) -> None:
    encoder, index = EncoderConfig(kind="sentence", model="intfloat/e5-base-v2"), IndexConfig(factory="auto")
    chosen = auto.settled(index, encoder, memory_gib, 768, 21_015_324)
    assert (chosen.factory, chosen.refine) == (factory, refine)
    if factory != "RR768,IVF2048,RaBitQ":
        assert budget.served(chosen, encoder, 768, 21_015_324) <= memory_gib * 1024**3
    else:
        assert chosen.search == "nprobe=256"
    assert auto.settled(IndexConfig(factory="SQ8"), encoder, memory_gib, 768, 21_015_324).factory == "SQ8"
    assert auto.settled(IndexConfig(factory="auto"), encoder, memory_gib, 768, 250).factory == "Exact"


@pytest.mark.parametrize("memory_gib", [8.0, 0.01])
def test_auto_is_built_as_what_it_stands_for(tmp_path: Path, memory_gib: float) -> None:
    tree = {"encoder": {"dim": 64}, "index": {"factory": "auto"}, "retriever": {"memory_gib": memory_gib}}
    workspace = knowledge.built(tmp_path, **tree)
    found = manifest.load(workspace.folder("index"))
    assert found.facts["factory"] == ("Exact" if memory_gib == 8.0 else "RR64,IVF4,RaBitQ")
    assert Retriever.open(workspace, RetrieverConfig()).search(["Person7 Surname7"], 3)[0][0].id == "p7"


def test_what_decides_the_replies_is_in_the_hash_and_the_services_memory_only_where_it_does() -> None:
    def hashed(**tree: Any) -> str:
        return config_hash(Config.model_validate(tree), STAGES["index"].sections)

    assert hashed(index={"candidates": 10}) != hashed(index={"candidates": 20})
    assert hashed(index={"factory": "auto"}, retriever={"memory_gib": 1}) != hashed(index={"factory": "auto"}, retriever={"memory_gib": 2})
    assert hashed(retriever={"memory_gib": 1}) == hashed(retriever={"memory_gib": 2})


@pytest.mark.parametrize(
    ("index", "says"),
    [
        (["index.refine=true"], "refine=true has nothing to do: factory=Flat is exact"),
        (["index.refine=true", "index.factory=SQ8", "index.prebuilt=x.faiss"], "prebuilt=x.faiss is used as it is; remove one of them"),
        (["index.refine=false", "index.factory=auto"], "refine=false contradicts factory=auto"),
        (["index.candidates=0"], "greater than or equal to 1"),
    ],
)
def test_parameters_that_contradict_each_other_are_refused(index: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        configuration.load_profile("laptop", index)
