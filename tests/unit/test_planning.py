"""The plan of the knowledge side: sizes, rates measured here, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from research_rl import config
from research_rl.errors import ConfigError
from research_rl.index import budget
from research_rl.pipeline.stages import Workspace
from research_rl.planning import calibrate, knowledge, plan
from tests.knowledge import built

WIKI = 21_015_324


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESEARCH_CACHE", str(tmp_path / "cache"))


def test_wiki18_is_planned_without_any_data(tmp_path: Path) -> None:
    chosen = config.load_profile("paper-7b")
    workspace = Workspace(tmp_path)
    assert knowledge.passages(chosen, workspace) == WIKI
    corpus, embed, index = knowledge.estimates(chosen, workspace, WIKI)
    assert embed.disk == WIKI * (768 * 4 + 24), "vectors in float32, and the key of each row"
    assert index.disk == pytest.approx(WIKI * (768 / 8 + 8)), "one-bit codes; the vectors stay where they are"
    assert 10e9 < corpus.disk < 20e9
    assert index.memory < chosen.index.memory_gib * 1024**3
    assert all(item.seconds > 0 for item in (corpus, embed, index))
    assert "reckoned" in embed.rate and "measured here" in index.rate
    assert "21,015,324 passages" in plan.describe(chosen, workspace)


def test_workers_share_one_index_in_the_plan() -> None:
    one, four = (config.load_profile("wiki-laptop", [f"retriever.workers={workers}"]) for workers in (1, 4))
    needs = [float(knowledge.service(chosen, WIKI).split()[1]) for chosen in (one, four)]
    codes = WIKI * (768 / 8 + 8) / 1024**3
    assert 0 < needs[1] - needs[0] < codes / 2
    assert "4 workers that share one index" in knowledge.service(four, WIKI)
    assert "workers" not in knowledge.service(one, WIKI)


def test_a_rate_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, workspace = config.load_profile("laptop", ["data.corpus=wiki18_100w.jsonl"]), Workspace(tmp_path)
    first = [item.rate for item in knowledge.estimates(chosen, workspace, 1000)]
    monkeypatch.setattr("research_rl.planning.calibrate.measure", lambda *_: pytest.fail("measured again"))
    assert [item.rate for item in knowledge.estimates(chosen, workspace, 1000)] == first


def test_a_model_of_the_hub_that_was_fetched_is_measured_and_not_reckoned(tmp_path: Path) -> None:
    encoder = config.load_profile("laptop", ["encoder.kind=sentence", "encoder.model=intfloat/e5-base-v2"]).encoder
    assert calibrate.shaped(encoder, "embed")
    repository, commit = tmp_path / "cache" / "hub" / "models--intfloat--e5-base-v2", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "config.json").touch()
    assert calibrate.shaped(encoder, "embed")
    (repository / "snapshots" / commit / "model.safetensors").touch()
    assert not calibrate.shaped(encoder, "embed")


def test_what_cannot_fit_is_refused_with_value_limit_and_remedy(tmp_path: Path) -> None:
    chosen, workspace = config.load_profile("paper-7b"), Workspace(tmp_path)
    huge = [knowledge.ResourceEstimate("embed", 1e18, 1e6, 1, "")]
    with pytest.raises(ConfigError, match=r"embed need 1000000000.0 GB on disk, .* GB are free at .*; free some room"):
        knowledge.refuse(huge, chosen, workspace)
    with pytest.raises(ConfigError, match=r"stage index needs 931322574.6 GiB of memory, this machine has .*; lower index.memory_gib"):
        knowledge.refuse([knowledge.ResourceEstimate("index", 1e6, 1e18, 1, "")], chosen, workspace)


def test_wikipedia_on_a_laptop_is_planned_within_its_memory(tmp_path: Path) -> None:
    chosen = config.load_profile("wiki-laptop")
    line = knowledge.service(chosen, WIKI)
    assert "2.8" in line and "GiB of retriever.memory_gib=3, index.factory=RR768,RaBitQfs" in line
    assert "64.6 GB of vectors on disk for 400 candidates a query" in line
    assert knowledge.passages(chosen, Workspace(tmp_path)) == WIKI
    lists = knowledge.service(config.load_profile("wiki-laptop", ["retriever.memory_gib=1"]), WIKI)
    assert "index.factory=RR768,IVF2048,RaBitQ" in lists
    assert "mapped into memory" in knowledge.service(config.load_profile("laptop", ["index.kind=bm25"]), WIKI)


@pytest.mark.parametrize("factory", ["Flat", "SQ8", "SQfp16", "HNSW16", "IVF8,Flat", "IVF8,PQ8", "Exact", "RR64,RaBitQfs"])
def test_bytes_on_disk_are_those_of_the_built_index(tmp_path: Path, factory: str) -> None:
    tree = {"encoder": {"dim": 64}, "index": {"factory": factory}}
    workspace = built(tmp_path, 3000, **tree)
    size = sum(path.stat().st_size for path in workspace.folder("index").iterdir() if path.suffix in (".faiss", ".bf16"))
    fixed = 80_000  # headers, centroids, codebooks
    assert size - fixed < budget.disk(config.Config.model_validate(tree).index, 64, 3000) < size * 1.15
