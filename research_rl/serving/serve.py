"""Run a model server for the length of a block, or until stopped. Knows the workspace; leaves flags to `launch`.

Invariants: (1) a model folder is checked before anything starts; (2) a server that was not started here is used only
when it serves this very model, which its served name proves; (3) an endpoint knows how many tokens its model reads wherever that can be
seen from here, and the log says where it cannot.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from research_rl.config import Config
from research_rl.episode.prompts import load_tokenizer
from research_rl.errors import ModelError, ServiceError
from research_rl.paths import CHECKOUT, interpreter_path
from research_rl.pipeline.stages import Workspace
from research_rl.process.private import write_private
from research_rl.process.services import Endpoint, base_url, guarded, require_free
from research_rl.process.tokens import token_from
from research_rl.serving import launch
from research_rl.serving.model import ModelFolder, check, served_name, stated_rows
from research_rl.serving.offer import TOKEN_VARIABLE, Offer, base, offers, weights_path
from research_rl.terminal import say

__all__ = ["context_tokens", "running", "serve"]

_SGLANG = CHECKOUT / ".venv-serve/bin/python"
"""What `make setup-serve` makes."""
_LOG = logging.getLogger(__name__)


@contextmanager
def running(
    config: Config, workspace: Workspace, folder: Path, *, name: str = "model", context: int | None = None, offer: Offer | None = None
) -> Generator[Endpoint]:
    """Serve `folder` while the block runs, or use the server at `serving.url` or that of `offer`. Raises ModelError and ServiceError.

    `context` is the longest sequence in tokens, that of an episode when left out. Of an offered model `folder` is the tokenizer's alone.
    The token is RESEARCH_SERVING_TOKEN where it is set, else (for a server started here) a fresh one.
    """
    tokens = context or context_tokens(config)
    if offer:
        yield _offered(offer, folder.resolve(), tokens)
        return
    model = check(folder.resolve(), tokens, launch.RESERVED[config.serving.engine])
    if config.serving.url:
        yield _existing(config.serving.url, model)
        return
    with _started(config, workspace, model, name, tokens) as endpoint:
        yield endpoint


def context_tokens(config: Config) -> int:
    """Return the longest sequence an episode can reach, in tokens."""
    return config.prompt.max_tokens + config.episode.max_response_tokens


def serve(config: Config, workspace: Workspace, folder: Path | None = None) -> None:
    """Serve a model (the trained policy when `folder` is None) until interrupted; print where and as what."""
    with running(config, workspace, folder or workspace.folder("export"), name="serve-model") as endpoint:
        # In a file for its owner alone and not printed: what is printed ends up in logs.
        token = workspace.services / "serve-model.token"
        with _files({token: endpoint.token or ""}):
            say(f"{endpoint.model} at {endpoint.url}/v1; the bearer token is in {token}; stop with Ctrl-C")
            threading.Event().wait()


@contextmanager
def _started(config: Config, workspace: Workspace, model: ModelFolder, name: str, context: int) -> Generator[Endpoint]:
    serving = config.serving
    # Also on loopback: other users of the machine reach it, too.
    token = token_from(TOKEN_VARIABLE) or secrets.token_urlsafe(24)
    port = require_free(serving.host, serving.port, "serving.port")
    endpoint = Endpoint(base_url(serving.host, port), token, served_name(model.path), model.rows)
    plan = launch.render(
        serving,
        model,
        served_name=endpoint.model or "",
        interpreter=_interpreter(config),
        port=port,
        token=token,
        context=context,
        # An evaluation that draws its tokens repeats only where the server follows the seeds that it is sent.
        seeded=config.evaluation.temperature > 0,
        secrets=workspace.services,
    )
    service = guarded(
        name,
        plan.command,
        folder=workspace.services,
        health_url=endpoint.url + launch.HEALTH_PATH,
        deadline_s=serving.start_deadline_s,
        env=plan.env,
    )
    # The files first: the server reads its key from them when it starts.
    with _files(plan.files), service as process:
        # A health check asks for no token: another server that took the port in between would pass it.
        if endpoint.model not in (names := _names(endpoint.url, token)):
            raise ServiceError(
                f"{endpoint.url} serves {names}, not {endpoint.model!r}; another server took serving.port={port}, name another"
            )
        yield replace(endpoint, process=process)


def _offered(offer: Offer, tokenizer: Path, tokens: int) -> Endpoint:
    """Return the endpoint of an offered model that still stands. Raises ServiceError and ModelError."""
    if offer not in offers(offer.url):
        raise ServiceError(f"{offer.url} no longer serves {offer.model} from {offer.root}; start it again, or evaluate what it serves now")
    if offer.context is not None and offer.context < tokens:
        raise ModelError(
            f"{offer.model} at {offer.url} reads {offer.context} tokens, an episode may have {tokens}; "
            "lower prompt.max_tokens or episode.max_response_tokens, or start the server with a longer context"
        )
    return Endpoint(offer.url, token_from(TOKEN_VARIABLE), offer.model, _rows(offer, tokenizer))


def _rows(offer: Offer, tokenizer: Path) -> int | None:
    """Return how many tokens an offered model reads, None where that cannot be seen. Raises ModelError where its tokenizer has more."""
    # No server says it. The folder of its weights may lie on another machine, and that of a tokenizer should have the model's config.json.
    folders = {Path(weights_path(offer)), tokenizer}
    stated = {rows: folder for folder in folders if (rows := stated_rows(folder)) is not None}
    has = len(load_tokenizer(tokenizer))
    if not stated:
        _LOG.warning(
            "%s does not say how many tokens %s reads, and %s has no config.json with a vocab_size: the ids of its %s tokens are sent "
            "unchecked, and one that the model does not have ends a server of SGLang; copy the model's config.json into that folder",
            *(offer.url, offer.model, tokenizer, f"{has:,}"),
        )
        return None
    if has > (rows := min(stated)):
        raise ModelError(
            f"the tokenizer in {tokenizer} has {has:,} tokens, {offer.model} at {offer.url} reads {rows:,} by the model in {stated[rows]}; "
            "name the folder of the model's own tokenizer"
        )
    return rows


def _existing(url: str, folder: ModelFolder) -> Endpoint:
    """Return the endpoint of a server started by others, after asking what it serves. Raises ServiceError."""
    model = served_name(folder.path)
    try:
        names = _names(url)
    except ServiceError as error:
        raise ServiceError(f"serving.url={url!r}: {error}; clear serving.url to have one started") from None
    if model not in names:
        raise ServiceError(
            f"serving.url={url!r} serves {names}, this stage needs {model!r}; start it with `research serve-model --model FOLDER`"
        )
    return Endpoint(base(url), token_from(TOKEN_VARIABLE), model, folder.rows)


def _names(url: str, token: str | None = None) -> list[str]:
    return [offer.model for offer in offers(url, token)]


def _interpreter(config: Config) -> str:
    """Return the interpreter that the engine is installed in. Raises ServiceError when it is not there, ConfigError when it cannot be."""
    environments, chosen = config.environments, config.environments.serve
    # Where the trainer's rollouts are by SGLang it is in the trainer's environment; on a CPU it has one of its own.
    if chosen is None and config.serving.engine == "sglang" and _SGLANG.is_file():
        chosen = str(_SGLANG)
    path = interpreter_path(chosen or environments.policy, f"environments.{'serve' if chosen else 'policy'}")
    if not path.is_file():
        target = "setup-serve" if config.serving.engine == "sglang" else "setup"
        raise ServiceError(f"interpreter {path} does not exist; run `make {target}`, or set environments.serve or environments.policy")
    return str(path)


@contextmanager
def _files(files: dict[Path, str]) -> Generator[None]:
    try:
        for path, text in files.items():
            write_private(path, text)
        yield
    finally:
        for path in files:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
