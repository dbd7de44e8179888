"""Run the retriever: as a process of its own (`python -m research_rl.retriever.command`), or guarded for a block.

Importing this module is cheap: faiss, FastAPI and the encoder load when a service starts.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from research_rl.config import Config, RetrieverConfig, load
from research_rl.episode.agent import SearchFailure
from research_rl.episode.trajectory import Passage, SearchFault
from research_rl.errors import ConfigError, ResearchError, ServiceError
from research_rl.paths import PYTHON, python_path
from research_rl.pipeline import manifest
from research_rl.pipeline.extras import missing_extras
from research_rl.pipeline.stages import Workspace
from research_rl.process import services
from research_rl.process.forks import require_forks
from research_rl.process.services import Endpoint
from research_rl.process.tokens import checked_token, require_token_outside, token_from
from research_rl.retriever import TOKEN, fleet
from research_rl.retriever.client import RetrieverClient
from research_rl.terminal import guard_logs, say

__all__ = ["TAPE", "TOKEN", "launch", "main", "require_same_index", "running", "serve", "standing_index"]

TAPE = "tape:"
"""How the address of a tape that is replayed begins."""
_ANSWER_S = 30.0
_CLOSE_S = 5.0
"""What a retriever needs after `retriever.drain_s` to close its index and end."""
_LOG = logging.getLogger("research_rl.retriever")


@contextmanager
def running(config: Config, workspace: Workspace, *, folder: Path | None = None) -> Generator[Endpoint]:
    """Yield a retriever for the workspace's index: the one of `retriever.url`, else one started for this block.

    `folder` gets its pid file and log; the one of the workspace's services when left out.

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
    # It serves what this block began with: whoever is in it would else be answered by two indexes.
    fixed = config.model_copy(update={"retriever": retriever.model_copy(update={"follow_s": 0.0})})
    process = launch(fixed, workspace, port, folder=folder or workspace.services)
    try:
        url = services.base_url(retriever.host, port)
        services.wait_healthy(process, f"{url}/readyz", retriever.start_deadline_s)
        yield Endpoint(url, token, process=process)
    finally:
        process.stop()


def launch(config: Config, workspace: Workspace, port: int, *, folder: Path, part: str = "1/1") -> services.Process:
    """Start the retriever of a workspace on `port` as a guarded process; `folder` gets its pid file and log. Raises ServiceError."""
    command = [PYTHON, "-m", "research_rl.retriever.command", "--workspace", str(workspace.root), "--port", str(port)]
    command += ["--part", part, "--config", config.retriever.model_dump_json()]
    env = python_path(os.environ.get("PYTHONPATH"))
    return services.spawn("retriever", command, folder=folder, env=env, grace_s=config.retriever.drain_s + _CLOSE_S)


def standing_index(workspace: Workspace) -> dict[str, str]:
    """Return the hashes of the index and the corpus that stand in a workspace, as far as they do."""
    return {name: hash for name in ("index", "corpus") if (hash := _hash(workspace.folder(name)))}


def require_same_index(endpoint: Endpoint, workspace: Workspace, expected: Mapping[str, str] | None = None) -> None:
    """Return when every replica that answers serves the index and the corpus of this workspace, or those that are `expected`.

    One that does not say what it serves (Search-R1's) is only warned of, and a tape was compared when it was opened. Raises ServiceError
    with both hashes.
    """
    if endpoint.url.startswith(TAPE):
        return
    expected = standing_index(workspace) if expected is None else expected
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
                    f"the retriever at {url} serves {name} {other[:12]}, but {workspace.folder(name)} of this run is {hash[:12]}; "
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
    # Python reads no number of thousands of digits.
    whole = len(text) < 40 and text.isascii() and number.isdigit() and count.isdigit()
    if not (whole and 1 <= int(number) <= int(count)):
        raise ConfigError(f"--part={text:.80} is not of the form i/n with 1 <= i <= n; an example: 2/4")
    return int(number) - 1, int(count)


def _serve(config: RetrieverConfig, workspace: Workspace, token: str | None, part: tuple[int, int]) -> None:
    require_token_outside("retriever", config, token, TOKEN)
    # Before faiss and torch are imported: OpenMP reads its variables when it is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait for work must not spin on a shared machine
    with services.listening(config.host, config.port, "retriever.port") as listener:
        run = _runner(config)
        host, port = listener.getsockname()[:2]
        run(listener, f"http://{f'[{host}]' if ':' in host else host}:{port}", config, workspace, token, part)


def _runner(config: RetrieverConfig) -> Callable[..., None]:
    """Return what serves: in this process, or in several forks of one. Raises ConfigError where there are no forks."""
    if config.workers == 1:
        from research_rl.retriever.server import run

        return run
    require_forks(f"retriever.workers={config.workers}")
    # Before NumPy, Arrow and prometheus_client are imported, which read them then: threads of their own would stand in the way of forks,
    # and counts in files are those of all workers.
    os.environ |= {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
    # In memory where there is such a place: a count in a file of a disk would wait now and then for that file to be written.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp(prefix="retriever-", dir=memory)
    from research_rl.retriever import workers

    return workers.run


def main(argv: Sequence[str] | None = None) -> int:
    """Run the service from the command line; return the exit code."""
    guard_logs()
    arguments = _parser().parse_args(argv)
    try:
        config = _config(arguments)
        path = arguments.token_file
        token = checked_token(path.read_text(errors="replace"), str(path)) if path else token_from(TOKEN)
        with missing_extras():
            _serve(config, Workspace(arguments.workspace.resolve()), token, _part(arguments.part))
    except ResearchError as error:
        say(f"retriever: {error}", sys.stderr)
        return 1
    except OSError as error:
        say(f"retriever: {error.filename}: {error.strerror}", sys.stderr)
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


if __name__ == "__main__":
    raise SystemExit(main())
