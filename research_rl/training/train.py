"""The stage `train`: GRPO by stock verl against a running retriever. Joins configuration, data, supervision and publication.

The work lies in a folder named after everything that shapes the run but not its length, so that raising `train.steps` or
restarting after a crash continues it, and lowering it publishes the checkpoint of that step. Invariant: nothing trained is removed
without being told; a forced run moves the earlier one aside.
"""

from __future__ import annotations

import hashlib
import json
from itertools import count
from pathlib import Path
from typing import Any

from research_rl.config import Config, config_hash, located
from research_rl.config.template_text import template_text
from research_rl.episode.prompts import load_tokenizer, prompt_text
from research_rl.errors import ConfigError, ServiceError
from research_rl.pipeline.manifest import Manifest
from research_rl.pipeline.stages import STAGES, Context, Progress
from research_rl.process.services import Endpoint
from research_rl.retriever.command import require_same_index
from research_rl.retriever.source import searching
from research_rl.training.run import overrides
from research_rl.training.run.checkpoints import link
from research_rl.training.run.metrics_log import MetricsLog
from research_rl.training.run.remote import Store
from research_rl.training.run.run import AttemptOutcome, Run, TrainHooks, ray_folder
from research_rl.training.run.supervise import supervise

__all__ = ["TrainHooks", "publish", "run", "run_with", "start_anew", "work_key"]

_FORCED = "forced"
"""Marks the work folder of a forced run until it is published."""


def run(context: Context) -> None:
    """Train the policy and publish its last checkpoint, metrics and rollouts. Raises TrainingError."""
    run_with(context, TrainHooks())


def run_with(context: Context, hooks: TrainHooks) -> None:
    """Do what `run` does and tell `hooks` of every step, its rollouts and every checkpoint as they happen."""
    config = located(context.config, context.workspace.root)
    model, prepared = context.parent("policy"), context.parent("prepare")
    work = context.workspace.work(f"train-{work_key(config, context.parents)}")
    store = Store.parse(config.trainer.upload, work.name, config.transfer.proxy) if config.trainer.upload else None
    if context.force:
        start_anew(work, store, context.progress)
    work.mkdir(parents=True, exist_ok=True)
    train, dropped = _fitting(config, model, prepared / "train.parquet", work / "train.parquet")
    dev, _ = _fitting(config, model, prepared / "dev.parquet", work / "dev.parquet")
    _require_rows(config, train)
    paths = overrides.Paths(model, train, dev, work, ray_folder(work))
    with searching(config, context.workspace) as source:
        endpoint, services = source.endpoint, context.workspace.services / "train"
        training = Run(_with_own_prompt(config, work), paths, services, endpoint.url, endpoint.token, store, source.taping)
        outcome = supervise(training, hooks, context.progress)
        _require_same_index(context, endpoint, work)
    publish(context, training, outcome, dropped)
    # Only when it is published: until then a rerun with force goes on with this run instead of beginning another.
    (work / _FORCED).unlink(missing_ok=True)


def _require_same_index(context: Context, retriever: Endpoint, work: Path) -> None:
    """Set the run aside when a retriever came to another index meanwhile. Raises ServiceError."""
    began = {name: parent.hash for name, parent in context.parents.items() if name in ("index", "corpus")}
    try:
        require_same_index(retriever, context.workspace, began)
    except ServiceError as error:
        upload = f" once the checkpoints of {work.name} are gone from trainer.upload" if context.config.trainer.upload else ""
        raise ServiceError(
            f"{error}; the policy may have searched both, so it is not published and the run is kept in {_set_aside(work)}; "
            f"the next run trains from step 0{upload}"
        ) from error


def start_anew(work: Path, store: Store | None, progress: Progress) -> None:
    """Move the run in `work` aside, so that a forced run begins at step 0; a forced run that did not end goes on.

    Raises ConfigError when S3 holds checkpoints of that run, which the new one would go on from, ServiceError when S3 fails.
    """
    if (work / _FORCED).is_file():
        return
    if store and (steps := store.holds()):
        raise ConfigError(
            f"trainer.upload holds checkpoints of steps {', '.join(map(str, steps))} of the run to be done anew "
            f"(s3://{store.bucket}/{store.prefix}), from which the new one would go on; name another place, or remove them"
        )
    if work.is_dir():
        progress(f"the earlier run is kept in {_set_aside(work)}; remove that folder when it is not needed", 0.0)
    work.mkdir(parents=True)
    (work / _FORCED).touch()


def _set_aside(work: Path) -> Path:
    aside = next(path for number in count(1) if not (path := work.with_name(f"earlier-{work.name}-{number}")).exists())
    return work.rename(aside)


def _with_own_prompt(config: Config, work: Path) -> Config:
    """Return `config` with a copy of the prompt template in `work`: workers read it anew at every start, and the file may be edited."""
    if config.prompt.template != "file":
        return config
    copy = work / "prompt.txt"
    copy.write_bytes(template_text("file", config.prompt.path).encode())
    return config.model_copy(update={"prompt": config.prompt.model_copy(update={"path": str(copy)})})


def work_key(config: Config, parents: dict[str, Manifest]) -> str:
    """Return the name of a run: a hash of all that shapes it but its length, so that a longer run continues a shorter one."""
    # Zero stands for any number of steps.
    unlimited = config.model_copy(update={"train": config.train.model_copy(update={"steps": 0})})
    shape = {"config": config_hash(unlimited, STAGES["train"].sections), "parents": {name: parents[name].hash for name in sorted(parents)}}
    return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:12]


def _fitting(config: Config, model: Path, source: Path, target: Path) -> tuple[Path, int]:
    """Return a parquet file whose prompts all fit `prompt.max_tokens`, and how many rows of `source` do not.

    It is `source` itself when all fit; else the rest is written to `target`. The tokenizer decides, so this is done here.
    """
    import pyarrow as pa
    import pyarrow.parquet as parquet

    table, tokenizer = parquet.read_table(source), load_tokenizer(model)
    prompts = (prompt_text(tokenizer, question, config.prompt) for question in table["question"].to_pylist())
    fits = [len(tokenizer.encode(prompt)) <= config.prompt.max_tokens for prompt in prompts]
    if not any(fits):
        raise ConfigError(f"no prompt of {source} fits prompt.max_tokens={config.prompt.max_tokens}; raise it or shorten the template")
    if all(fits):
        return source, 0
    parquet.write_table(table.filter(pa.array(fits)), target)
    return target, fits.count(False)


def _require_rows(config: Config, path: Path) -> None:
    import pyarrow.parquet as parquet

    rows = parquet.read_metadata(path).num_rows
    if rows < config.train.prompts_per_step:
        asked = f"train.prompts_per_step={config.train.prompts_per_step}"
        raise ConfigError(f"{asked} exceeds the {rows} questions of {path}; lower it or prepare more rows")


def publish(context: Context, training: Run, outcome: AttemptOutcome, dropped: int) -> None:
    """Publish a run up to its outcome's checkpoint; `dropped` prompts were too long for it."""
    log, last = MetricsLog(training.metrics), outcome.checkpoint.step
    with context.publish() as staging:
        link(outcome.checkpoint.path, staging.path / "checkpoint")
        # A longer run, of which this is a part, has the episodes of later steps as well.
        link(training.rollouts, staging.path / "rollouts", lambda path: int(path.name.partition(".")[0]) <= last)
        (staging.path / "metrics.jsonl").write_text(log.until(last), encoding="utf-8")
        (staging.path / "overrides.json").write_text(json.dumps(_portable_overrides(context.config), indent=1) + "\n")
        staging.counts.update(steps=last, attempts=outcome.attempts, lost_trajectories=outcome.lost, prompts_too_long=dropped)
        staging.facts.update(first=log.rows.get(1, {}), last=log.rows.get(last, {}))


def _portable_overrides(config: Config) -> dict[str, Any]:
    """Return verl's overrides with names in the place of this machine's folders."""
    names = (Path(f"<{name}>") for name in ("policy", "prepare/train.parquet", "prepare/dev.parquet", "work", "ray"))
    return overrides.resolved(config, overrides.Paths(*names))
