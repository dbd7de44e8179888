"""The tiny policy's tokenizer and model, and the traces it is warmed up on."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from research_rl.config import EncyclopediaConfig, PolicyConfig, PromptConfig
from research_rl.data import encyclopedia
from research_rl.episode import protocol
from research_rl.episode.agent import Completion, Limits, run_episode
from research_rl.episode.prompts import FolderTokenizer, render
from research_rl.episode.trajectory import Passage, StopReason
from research_rl.reward import rules
from research_rl.serving.model import inspect
from research_rl.training.policy_env import tiny, traces
from research_rl.training.policy_env.traces import Trace

POLICY = PolicyConfig(warmup_drills=1, warmup_steps=4, warmup_batch=16, warmup_world=EncyclopediaConfig(entities=80, max_hops=2))
PROMPT = PromptConfig(template="file", path="configs/prompts/laptop.txt")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.build_tokenizer(traces.lexicon(POLICY, PROMPT))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    tiny.build_model(tokenizer, 32, 1, seed=0).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def lesson() -> list[Trace]:
    return list(traces.lesson(POLICY, PROMPT, seed=3))


def test_model_has_one_row_a_token_and_weights_fixed_by_the_seed(tokenizer: Any) -> None:
    import torch

    first, second, other = (tiny.build_model(tokenizer, 32, 1, seed) for seed in (1, 1, 2))
    assert first.get_input_embeddings().weight.shape[0] == len(tokenizer)
    assert torch.equal(first.get_input_embeddings().weight, second.get_input_embeddings().weight)
    assert not torch.equal(first.get_input_embeddings().weight, other.get_input_embeddings().weight)


def test_tags_survive_decoding_without_special_tokens(tokenizer: Any) -> None:
    text = " ".join(protocol.TAGS)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(protocol.TAGS)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_turns_decode_to_the_strings_the_protocol_reads(tokenizer: Any) -> None:
    name = encyclopedia.lexicon(8)[-1]
    turn = f"<think> I need the author of {name}. </think> <search> {name} author written </search>"
    decoded = tokenizer.decode(tokenizer.encode(turn))
    assert decoded == turn
    assert decoded.endswith(protocol.SEARCH_CLOSE)
    assert protocol.last_query(decoded) == f"{name} author written"
    answer = tokenizer.decode(tokenizer.encode(f"<answer> \\boxed{{ {name} }} </answer>"))
    assert (rules.boxed(answer) or "").strip() == name


def test_text_outside_the_vocabulary_becomes_unknown_and_never_fails(tokenizer: Any) -> None:
    ids = tokenizer.encode("zebra 漢字 \x00 \u2028 <b> {x}\n\n\n\n'", add_special_tokens=False)
    assert tokenizer.unk_token_id in ids
    assert isinstance(tokenizer.decode(ids), str)
    assert tokenizer.encode("", add_special_tokens=False) == []


def test_saved_tokenizer_reads_the_same_in_every_reader(tokenizer: Any, folder: Path, lesson: list[Trace]) -> None:
    from transformers import AutoTokenizer

    text = "".join(piece for piece, _ in lesson[-1].pieces)
    ids = tokenizer.encode(text, add_special_tokens=False)
    ours, theirs = FolderTokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False) == ids
    assert len(ours) == len(theirs) == len(tokenizer)
    assert ours.eos_id == theirs.eos_token_id == tokenizer.eos_token_id


def test_chat_template_only_joins_contents(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "Name "}, {"role": "user", "content": "the author"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == "Name the author"


def test_lexicon_leaves_no_word_of_a_trace_unknown(tokenizer: Any, lesson: list[Trace]) -> None:
    for trace in lesson:
        for text, _ in trace.pieces:
            assert tokenizer.unk_token_id not in tokenizer.encode(text, add_special_tokens=False)


class Replay:
    """An engine that writes the policy's pieces of a trace and a searcher that returns its results."""

    def __init__(self, trace: Trace, tokenizer: FolderTokenizer) -> None:
        own = [text for text, mine in trace.pieces if mine]
        found = [
            text for text, mine in trace.pieces[1:] if not mine and protocol.RESULT_OPEN not in text and protocol.RESULT_CLOSE not in text
        ]
        self._turns, self._results, self._tokenizer = iter(own), iter(found), tokenizer

    async def generate(self, prompt_ids: Sequence[int], stop: Sequence[str], max_tokens: int) -> Completion:
        ids = tuple(self._tokenizer.encode(next(self._turns)))
        return Completion(ids, (0.0,) * len(ids), "eos" if ids[-1] == self._tokenizer.eos_id else "stop")

    async def search(self, queries: Sequence[str], top_k: int) -> list[list[Passage]]:
        return [[Passage("0", next(self._results))]]


def test_a_trace_is_laid_out_as_an_episode(folder: Path, lesson: list[Trace]) -> None:
    tokenizer = FolderTokenizer(folder)
    limits = Limits(top_k=3, max_searches=4, max_result_tokens=256, max_response_tokens=512, wall_s=60, search_timeout_s=10)
    for trace in lesson[POLICY.warmup_batch :]:
        replay = Replay(trace, tokenizer)
        prompt = tokenizer.encode(trace.pieces[0][0])
        trajectory = asyncio.run(run_episode(prompt, replay, replay, tokenizer, limits))
        pieces = [(tokenizer.encode(text), mine) for text, mine in trace.pieces]
        assert [*prompt, *trajectory.response_ids] == list(itertools.chain.from_iterable(ids for ids, _ in pieces))
        assert trajectory.response_mask == [int(mine) for ids, mine in pieces[1:] for _ in ids]
        assert trajectory.stop is StopReason.ANSWERED
        assert rules.grade(trajectory, ["x"], "repository", tiny.EOS).format_ok


def test_the_prompt_of_a_trace_is_the_rendered_question(lesson: list[Trace]) -> None:
    frame = render("|", PROMPT).split("|")
    assert all(trace.pieces[0][0].startswith(frame[0]) and trace.pieces[0][0].endswith(frame[1]) for trace in lesson[POLICY.warmup_batch :])


def test_only_the_last_share_of_the_lesson_stops_early() -> None:
    world = POLICY.warmup_world.model_copy(update={"single_hop": 0.0, "attribute": 0.0, "comparison": 0.0})
    config = POLICY.model_copy(update={"warmup_world": world, "warmup_drills": 0, "warmup_early_share": 0.5, "warmup_early_stop": 1.0})
    searches = [sum(protocol.SEARCH_CLOSE in text for text, _ in trace.pieces) for trace in traces.lesson(config, PROMPT, 0)]
    assert searches == [2] * 32 + [1] * 32


def test_lessons_are_fixed_by_the_seed(lesson: list[Trace]) -> None:
    assert list(traces.lesson(POLICY, PROMPT, 3)) == lesson
    assert list(traces.lesson(POLICY, PROMPT, 4)) != lesson


def test_a_tiny_policy_is_a_whole_model_folder(folder: Path, tokenizer: Any) -> None:
    model = inspect(folder)
    assert (model.architecture, model.vocabulary, model.pad_token) == ("LlamaForCausalLM", len(tokenizer), tiny.PAD)
