"""A tiny policy made on the spot: a word-level tokenizer and a small Llama transformer. Knows no traces, no trainer.

Invariants: (1) the tokenizer has exactly as many tokens as the model has embedding rows; (2) protocol tags are plain
added tokens, so no decoder hides them; (3) text outside the vocabulary becomes `<unk>` and never fails. Double quotes,
which only frame the titles of passages, are dropped.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from research_rl.episode import protocol

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["EOS", "PAD", "UNKNOWN", "build_model", "build_tokenizer", "token_id"]

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
_MARKS = (".", ",", "?", "!", ":", ";", "(", ")", "[", "]", "{", "}", "/", "-", "'", "\n", "\n\n")
_CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
_HEAD_SIZE = 32
_POSITIONS = 4096


def build_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are `words`, punctuation, line breaks and the protocol's tags."""

    from transformers import AddedToken, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_word_level(words),
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_max_length=_POSITIONS,
    )
    # Added tokens are split off before the rule for punctuation sees their brackets.
    for tag in (*protocol.TAGS, protocol.BOXED_OPEN):
        tokenizer.add_tokens(AddedToken(tag, normalized=False, special=False))
    tokenizer.chat_template = _CHAT
    return tokenizer


def build_model(tokenizer: PreTrainedTokenizerFast, hidden: int, layers: int, seed: int) -> LlamaForCausalLM:
    """Return a float32 Llama model with random weights fixed by `seed`; `hidden` is a multiple of 32.

    Not Qwen2: for that type transformers' AutoTokenizer puts Qwen's own text splitting in the place of a folder's.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    heads = hidden // _HEAD_SIZE
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=token_id(tokenizer, EOS),
        pad_token_id=token_id(tokenizer, PAD),
    )
    return LlamaForCausalLM(config)


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """Return the id of one token."""
    identifier = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(identifier, int)
    return identifier


def _word_level(words: Iterable[str]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocabulary = dict.fromkeys([PAD, EOS, UNKNOWN, *_MARKS, *words])
    tokenizer = Tokenizer(models.WordLevel({word: row for row, word in enumerate(vocabulary)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace('"', ""),
            normalizers.Replace(Regex(r"[^\S\n]*\n[^\S\n]*"), "\n"),
            normalizers.Replace(Regex(r"\n{2,}"), "\n\n"),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n+"), "isolated"),
            pre_tokenizers.Split(Regex(r"[^\S\n]+"), "removed"),
            pre_tokenizers.Punctuation("isolated"),
        ]
    )
    # For its clean-up, which takes away the space before a punctuation mark; no token begins with the prefix.
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return tokenizer
