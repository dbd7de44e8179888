"""Run the retriever: as a process of its own (`python -m research_rl.retriever.command`), or guarded for a block.

Importing this module is cheap: faiss, FastAPI and the encoder load when a service starts.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import socket
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from research_rl.config import Config, RetrieverConfig, load
from research_rl.episode.agent import SearchFailure
from research_rl.episode.trajectory import Passage, SearchFault
from research_rl.errors import ConfigError, ResearchError, ServiceError
from research_rl.paths import python_path
from research_rl.pipeline import manifest
from research_rl.pipeline.extras import missing_extras
from research_rl.pipeline.stages import Workspace
from research_rl.process import services
from research_rl.process.services import Endpoint
from research_rl.process.tokens import checked_token, token_from
from research_rl.retriever import LOOPBACK, TOKEN, fleet
from research_rl.retriever.client import RetrieverClient

__all__ = ["TOKEN", "launch", "main", "require_same_index", "running", "serve"]

_ANSWER_S = 10.0
_CLOSE_S = 5.0
"""What a retriever needs after `retriever.drain_s` to close its index and end."""
_LOG = logging.getLogger("research_rl.retriever")


@contextmanager
def running(config: Config, workspace: Workspace) -> Generator[Endpoint]:
    """Yield a retriever for the workspace's index: the one of `retriever.url`, else one started for this block.

    Raises ServiceError when the given one does not answer a search or serves another index than the workspace's, or when the
    started one does not answer within `retriever.start_deadline_s`.
    """
    retriever, token = config.retriever, token_from(TOKEN)
    if given := retriever.url or fleet.address(retriever.urls):
        # Each part by itself, so that the message can name the one that is silent.
        for part in fleet.parts(given):
            _require_answer(",".join(part), token)
        endpoint = Endpoint(given, token)
        require_same_index(endpoint, workspace)
        yield endpoint
        return
    port = services.require_free(retriever.host, retriever.port, "retriever.port")
    process = launch(config, workspace, port, folder=workspace.services)
    try:
        url = services.base_url(retriever.host, port)
        services.wait_healthy(process, f"{url}/readyz", retriever.start_deadline_s)
        yield Endpoint(url, token)
    finally:
        process.stop()


def launch(config: Config, workspace: Workspace, port: int, *, folder: Path, part: str = "1/1") -> services.Process:
    """Start the retriever of a workspace on `port` as a guarded process; `folder` gets its pid file and log. Raises ServiceError."""
    command = [sys.executable, "-m", "research_rl.retriever.command", "--workspace", str(workspace.root), "--port", str(port)]
    command += ["--part", part, "--config", config.retriever.model_dump_json()]
    env = python_path(os.environ.get("PYTHONPATH"))
    return services.spawn("retriever", command, folder=folder, env=env, grace_s=config.retriever.drain_s + _CLOSE_S)


def require_same_index(endpoint: Endpoint, workspace: Workspace) -> None:
    """Return when every replica that answers serves the index and the corpus of this workspace.

    One that does not say what it serves (Search-R1's) is only warned of. Raises ServiceError with both hashes.
    """
    expected = {name: hash for name in ("index", "corpus") if (hash := _hash(workspace.folder(name)))}
    if not expected:
        return
    for url, info in asyncio.run(_info(endpoint)).items():
        if isinstance(info, SearchFailure):
            # A replica that is down is the client's business, which asks the others.
            if info.fault is not SearchFault.UNREACHABLE:
                _LOG.warning("%s does not say which index it serves (%s); it is not compared with %s", url, info.reason, workspace.root)
            continue
        served: dict[str, str] = info.get("manifests", {})
        for name, hash in expected.items():
            if (other := served.get(name, "unknown")) != hash:
                raise ServiceError(
                    f"the retriever at {url} serves {name} {other[:12]}, but {workspace.folder(name)} is {hash[:12]}; "
                    "restart it on this workspace, or clear retriever.url to have one started"
                )


def _hash(folder: Path) -> str | None:
    return manifest.load(folder, verify=False).hash if (folder / manifest.MANIFEST).is_file() else None


async def _info(endpoint: Endpoint) -> dict[str, dict[str, Any] | SearchFailure]:
    async with RetrieverClient(endpoint.url, endpoint.token, _ANSWER_S, connections=1) as client:
        return await client.info()


def _require_answer(url: str, token: str | None) -> None:
    """Return when one of some replicas answers a search. Raises ServiceError."""

    async def asked() -> list[list[Passage]] | SearchFailure:
        async with RetrieverClient(url, token, _ANSWER_S, connections=1) as client:
            return await client.search(["is the retriever there"], 1)

    if isinstance(answer := asyncio.run(asked()), SearchFailure):
        raise ServiceError(
            f"retriever.url={url} does not answer a search ({answer.reason}); "
            "start that retriever or set its token, or clear retriever.url to have one started"
        )


def serve(config: Config, workspace: Workspace, part: str = "1/1") -> None:
    """Serve the workspace's index, or the i-th of n parts of it, until SIGTERM or SIGINT.

    Raises ServiceError, ManifestError or ConfigError.
    """
    _serve(config.retriever, workspace, token_from(TOKEN), _part(part))


def _part(text: str) -> tuple[int, int]:
    """Read `2/4` as the second of four parts, counted from 0."""
    number, _, count = text.partition("/")
    if not (number.isascii() and number.isdigit() and count.isascii() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise ConfigError(f"--part={text} is not of the form i/n with 1 <= i <= n; an example: 2/4")
    return int(number) - 1, int(count)


def _serve(config: RetrieverConfig, workspace: Workspace, token: str | None, part: tuple[int, int]) -> None:
    _require_access(config, token)
    # Before faiss and torch are imported: OpenMP reads its variables when it is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait for work must not spin on a shared machine
    with _bound(config) as listener:
        from research_rl.retriever.server import run

        host, port = listener.getsockname()[:2]
        run(listener, f"http://{f'[{host}]' if ':' in host else host}:{port}", config, workspace, token, part)


def _require_access(config: RetrieverConfig, token: str | None) -> None:
    if config.host in LOOPBACK or (config.auth == "token" and token):
        return
    if config.auth == "token":
        raise ConfigError(
            f"retriever.host={config.host} is reachable from outside but no token is set; set {TOKEN}, or bind 127.0.0.1, "
            "or let in who cannot send a token by retriever.auth=none and retriever.allow"
        )
    who = f"the networks {', '.join(config.allow)}" if config.allow else "whoever reaches it; limit that by retriever.allow"
    print(f"retriever: warning: retriever.auth=none: {config.host} answers {who}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the service from the command line; return the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        config = _config(arguments)
        path = arguments.token_file
        token = checked_token(path.read_text(errors="replace"), str(path)) if path else token_from(TOKEN)
        with missing_extras():
            _serve(config, Workspace(arguments.workspace.resolve()), token, _part(arguments.part))
    except ResearchError as error:
        print(f"retriever: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"retriever: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m research_rl.retriever.command", description="Serve a workspace's index over HTTP.")
    parser.add_argument("--workspace", type=Path, default=Path(), help="folder with artifacts/ (default: here)")
    parser.add_argument("--host", help="address to bind (default: retriever.host)")
    parser.add_argument("--port", type=int, help="port; 0 takes a free one (default: retriever.port)")
    parser.add_argument("--token-file", type=Path, help=f"file with the bearer token (default: ${TOKEN})")
    parser.add_argument("--part", default="1/1", help="serve the i-th of n parts of the index, as i/n (default: all of it)")
    parser.add_argument("--config", help="the section retriever as JSON (default: params.yaml of the workspace, if any)")
    return parser


def _config(arguments: argparse.Namespace) -> RetrieverConfig:
    params = arguments.workspace / "params.yaml"
    if arguments.config:
        config = RetrieverConfig.model_validate_json(arguments.config)
    else:
        config = load(params).retriever if params.is_file() else RetrieverConfig()
    given = {name: getattr(arguments, name) for name in ("host", "port") if getattr(arguments, name) is not None}
    # Validated anew: `model_copy` would take any value.
    return RetrieverConfig.model_validate({**config.model_dump(), **given})


@contextmanager
def _bound(config: RetrieverConfig) -> Generator[socket.socket]:
    """Take the port before the long start, so that a port in use is told at once."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # asyncio switches off Nagle's delay (40 ms a reply) only where the protocol is named.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((config.host, config.port))
        except OSError as error:
            raise ServiceError(
                f"retriever.port={config.port} on {config.host} cannot be bound ({error.strerror}); "
                "set retriever.port to a free port or to 0, or stop what listens there"
            ) from None
        yield listener


if __name__ == "__main__":
    raise SystemExit(main())
