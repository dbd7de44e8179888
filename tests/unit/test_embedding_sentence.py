"""The sentence encoder on a real, tiny transformer: batches, padding and prefixes change nothing they should not."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from research_rl.config import Config, EncoderConfig, TransferConfig
from research_rl.embedding import build as embed
from research_rl.embedding import usual
from research_rl.embedding.models import copy_model, resolve, tree_sha256
from research_rl.embedding.sentence import SentenceEncoder, batches, own_batches
from research_rl.errors import ModelError
from research_rl.pipeline.run import current, run_stage
from tests.encoder_model import FACTS, texts, write_model
from tests.knowledge import context, store


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "whole")


def test_sorted_batches_give_what_single_texts_give(folder: Path) -> None:
    encoder = SentenceEncoder.load(folder, FACTS)
    given = texts(60)
    together = encoder.encode_passages(given)
    single = np.concatenate([encoder.encode_queries([text]) for text in given])
    np.testing.assert_allclose(together, single, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    assert (encoder.dim, encoder.facts["pooling"]) == (32, "mean")


def test_vectors_are_those_of_sentence_transformers(folder: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    model.max_seq_length = 48
    given = texts(20)
    expected = model.encode(given, normalize_embeddings=True)
    np.testing.assert_allclose(SentenceEncoder.load(folder, FACTS).encode_passages(given), expected, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("described", [True, False])
def test_the_usual_folder_is_opened_without_sentence_transformers_to_the_same_vectors(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pooling: str, dtype: str, described: bool
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    # As models of some years ago have it.
    (copy / "1_Pooling" / "config.json").write_text(
        json.dumps(
            {"word_embedding_dimension": 32, "pooling_mode_cls_token": pooling == "cls", "pooling_mode_mean_tokens": pooling == "mean"}
        )
    )
    if not described:
        (copy / "modules.json").unlink()
    facts, given = {**FACTS, "dtype": dtype, "pooling": pooling}, texts(80)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "sentence_transformers", None)
        alone = SentenceEncoder.load(copy, facts)
    monkeypatch.setattr(usual, "open_usual", lambda *_: None)
    library = SentenceEncoder.load(copy, facts)
    assert alone.facts == library.facts
    np.testing.assert_array_equal(alone.encode_passages(given), library.encode_passages(given))


@pytest.mark.parametrize(
    ("file", "value"),
    [
        ("modules.json", [{"type": "sentence_transformers.models.Transformer", "path": ""}]),
        ("modules.json", {"type": "no list"}),
        ("sentence_bert_config.json", {"do_lower_case": True}),
        ("sentence_bert_config.json", {"max_seq_length": "many"}),
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}),
        ("config.json", {"model_type": "t5"}),
    ],
)
def test_a_folder_of_another_kind_is_left_to_the_library(folder: Path, tmp_path: Path, file: str, value: object) -> None:
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / file).write_text(json.dumps(value))
    assert usual.open_usual(tmp_path / "model", "mean", "cpu") is None


def test_prefixes_and_bfloat16_follow_the_facts(folder: Path) -> None:
    plain = SentenceEncoder.load(folder, FACTS)
    prefixed = SentenceEncoder.load(folder, {**FACTS, "query_prefix": "query: ", "passage_prefix": "passage: "})
    np.testing.assert_allclose(prefixed.encode_queries(["river"]), plain.encode_queries(["query: river"]), atol=1e-6)
    np.testing.assert_allclose(prefixed.encode_passages(["river"]), plain.encode_queries(["passage: river"]), atol=1e-6)
    half = SentenceEncoder.load(folder, {**FACTS, "dtype": "bfloat16"})
    given = texts(20)
    assert (half.encode_passages(given) * plain.encode_passages(given)).sum(1).min() > 0.999


def test_batches_cover_every_text_once_within_the_budget() -> None:
    lengths = np.array([1, 16, 17, 31, 32, 33, 200, 5, 5, 5])
    found = list(batches(lengths, 64))
    assert sorted(row for rows, _ in found for row in rows) == list(range(10))
    for rows, length in found:
        assert lengths[rows].max() <= length
        assert len(rows) == 1 or len(rows) * length <= 64


def test_many_texts_need_next_to_no_padding_and_few_go_together() -> None:
    draw = np.random.default_rng(0)
    many, few = draw.integers(30, 140, 8192), draw.integers(8, 24, 8)
    padded = sum(len(rows) * length for rows, length in batches(many, 4096))
    assert padded / many.sum() < 1.01
    assert [(len(rows), length) for rows, length in batches(few, 4096)] == [(8, few.max())]


def test_a_passage_is_padded_as_its_own_length_says() -> None:
    lengths = np.random.default_rng(0).integers(1, 65, 300)
    alone = {int(row): next(own_batches(lengths[[row]], 256, limit=64))[1] for row in range(300)}
    seen: list[int] = []
    for rows, length in own_batches(lengths, 256, limit=64):
        assert {alone[int(row)] for row in rows} == {length} and length <= 64
        # Padding for all, or for none: attention has two ways.
        assert len({bool(lengths[row] == length) for row in rows}) == 1
        assert len(rows) * length <= 256
        seen += rows.tolist()
    assert sorted(seen) == list(range(300))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_vector_is_the_same_bit_for_bit_whatever_is_encoded_with_it(folder: Path, dtype: str) -> None:
    encoder = SentenceEncoder.load(folder, {**FACTS, "dtype": dtype})
    given, draw = texts(300), np.random.default_rng(1)
    whole = encoder.encode_passages(given)
    for size in (1, 2, 7, 40, 150):
        some = draw.choice(300, size, replace=False)
        np.testing.assert_array_equal(encoder.encode_passages([given[row] for row in some]), whole[some])


def test_vectors_do_not_depend_on_threads(folder: Path) -> None:
    given = texts(60)
    one, three = (SentenceEncoder.load(folder, FACTS, threads=threads).encode_passages(given) for threads in (1, 3))
    np.testing.assert_array_equal(one, three)


def test_a_plain_folder_pools_as_told_and_a_served_model_that_pools_otherwise_is_refused(folder: Path, tmp_path: Path) -> None:
    """The same weights without modules.json, as e5 is often kept, give the same vectors once pooling is named."""
    copy_model(folder, tmp_path / "plain")
    (tmp_path / "plain" / "modules.json").unlink()
    given = texts(10)
    mean = SentenceEncoder.load(tmp_path / "plain", {**FACTS, "pooling": "mean"})
    np.testing.assert_allclose(mean.encode_passages(given), SentenceEncoder.load(folder, FACTS).encode_passages(given), atol=1e-6)
    cls = SentenceEncoder.load(tmp_path / "plain", {**FACTS, "pooling": "cls"})
    assert np.abs(cls.encode_passages(given) - mean.encode_passages(given)).max() > 0.01
    with pytest.raises(ModelError, match="has pooling 'mean', but 'cls' is configured or was recorded"):
        SentenceEncoder.load(folder, {**FACTS, "pooling": "cls"})
    with pytest.raises(ModelError, match="has dim 32, but 48"):
        SentenceEncoder.load(folder, {**FACTS, "dim": 48})


def test_a_damaged_model_does_not_answer(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy_model(folder, tmp_path / "damaged")
    weights = load_file(tmp_path / "damaged" / "model.safetensors")
    weights["embeddings.LayerNorm.weight"][0] = float("nan")
    save_file(weights, tmp_path / "damaged" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="text 0 of 2 has a vector of length nan"):
        SentenceEncoder.load(tmp_path / "damaged", FACTS).encode_queries(["river", "city"])


def test_unnormalised_vectors_keep_their_length(folder: Path) -> None:
    raw = SentenceEncoder.load(folder, {**FACTS, "normalised": False}).encode_passages(texts(10))
    lengths = np.linalg.norm(raw, axis=1, keepdims=True)
    assert np.ptp(lengths) > 0.01
    np.testing.assert_allclose(raw / lengths, SentenceEncoder.load(folder, FACTS).encode_passages(texts(10)), atol=1e-6)


def test_a_copied_model_leaves_other_formats_behind_and_a_broken_one_is_named(folder: Path, tmp_path: Path) -> None:
    copy_model(resolve(EncoderConfig(kind="sentence", model=str(folder)), TransferConfig(), tmp_path, tmp_path), tmp_path / "copy")
    assert not (tmp_path / "copy" / "onnx").exists()
    assert tree_sha256(tmp_path / "copy") == tree_sha256(tmp_path / "copy")
    assert SentenceEncoder.load(tmp_path / "copy", FACTS).dim == 32
    (tmp_path / "copy" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="no usable sentence-transformers model"):
        SentenceEncoder.load(tmp_path / "copy", FACTS)


def test_embeddings_are_stale_when_the_model_folder_they_were_made_with_changed(folder: Path, tmp_path: Path) -> None:
    """Another model under the same path left the vectors of the former one current."""
    from safetensors.torch import load_file, save_file

    tree = {"encoder": {"kind": "sentence", "model": "model", "normalise": True}, "corpus": {"shard_rows": 100}}
    copy_model(folder, tmp_path / "model")  # relative to the workspace
    resolved, space = Config.model_validate(tree), store(tmp_path, 20)
    embed.run(context("embed", tmp_path, **tree))
    (tmp_path / "model" / "README.md").write_text("no part of the encoder")
    assert current("embed", resolved, space)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in weights.items()}, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    assert current("embed", resolved, space) is None
    _, was_built = run_stage("embed", resolved, space)
    assert was_built and current("embed", resolved, space)
