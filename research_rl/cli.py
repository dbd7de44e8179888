"""The `research` command. Knows arguments and printing; every verb's work lives elsewhere and is imported when called.

Exit codes: 0 done, 1 a deliberate error (one message, no traceback), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from research_rl import __version__

if TYPE_CHECKING:
    from research_rl.config import Config
    from research_rl.pipeline.stages import Workspace

__all__ = ["main"]

_EPILOG = (
    "Parameters are set as section.key=value at the end, for example: research run train train.steps=40. "
    "`research config describe` lists them."
)
_QUIET_S = 10.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code."""
    arguments = _parse(argv)
    from research_rl.errors import ResearchError

    # Told to end, a verb first ends what it started elsewhere.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        arguments.verb(arguments)
    except ResearchError as error:
        print(f"research: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse; parameters may stand anywhere after the verb, which argparse alone does not allow behind options."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    strange = [item for item in rest if item.startswith("-") or "=" not in item]
    if strange or (rest and "overrides" not in arguments):
        parser.error(f"unrecognized arguments: {' '.join(strange or rest)}")
    if "overrides" in arguments:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("research", description="Train a language model to reason with search.", epilog=_EPILOG)
    parser.add_argument("--version", action="version", version=f"research-rl {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def add(name: str, function: Callable[[argparse.Namespace], None], summary: str) -> argparse.ArgumentParser:
        verb = verbs.add_parser(name, help=summary, description=summary.capitalize() + ".", epilog=_EPILOG)
        verb.set_defaults(verb=function)
        verb.add_argument("-w", "--workspace", type=Path, default=Path(), help="folder with params.yaml (default: here)")
        verb.add_argument("-p", "--profile", help="start from this profile instead of the workspace's params.yaml")
        return verb

    run = add("run", _run, "build one stage, or all of them in order")
    run.add_argument("stage", help="a stage as `research status` names it, or all")
    run.add_argument("--force", action="store_true", help="build even when nothing changed")
    config = add("config", _config, "show or describe the parameters")
    config.add_argument("action", choices=["show", "describe"], help="show: resolved values; describe: type and meaning of each")
    compare = add("compare", _compare, "compare two evaluations question by question")
    compare.add_argument("a", type=Path, help="folder of an evaluation, for example artifacts/baseline")
    compare.add_argument("b", type=Path, help="folder of another, for example artifacts/evaluation")
    compare.add_argument("--html", type=Path, help="also write the comparison as a page")
    model = add("serve-model", _serve_model, "serve a model over HTTP until stopped")
    model.add_argument("--model", type=Path, help="model folder; the trained policy when left out")
    retriever = add("serve-retriever", _serve_retriever, "serve the workspace's index over HTTP until stopped")
    retriever.add_argument("--part", default="1/1", metavar="I/N", help="serve only the i-th of n parts of the index")
    others = (
        add("init", _init, "write params.yaml of a workspace from a profile"),
        add("plan", _plan, "show what a run would build, and whether it fits on the disk"),
        add("status", _status, "show every stage: current, stale, missing or torn"),
    )
    for verb in (run, config, model, retriever, *others):
        verb.add_argument("overrides", nargs="*", metavar="section.key=value", help="parameters for this call")
    return parser


def _workspace(arguments: argparse.Namespace) -> Workspace:
    from research_rl.pipeline.stages import Workspace

    return Workspace(arguments.workspace.resolve())


def _resolve(arguments: argparse.Namespace) -> Config:
    from research_rl import config

    if arguments.profile:
        return config.load_profile(arguments.profile, arguments.overrides)
    return config.load(arguments.workspace / "params.yaml", arguments.overrides)


def _init(arguments: argparse.Namespace) -> None:
    from research_rl import config

    resolved = config.load_profile(arguments.profile or "laptop", arguments.overrides)
    arguments.workspace.mkdir(parents=True, exist_ok=True)
    path = arguments.workspace / "params.yaml"
    print(f"{path}: {'written' if config.save(resolved, path) else 'unchanged'} (profile {resolved.profile})")


def _run(arguments: argparse.Namespace) -> None:
    import math

    from research_rl.pipeline.lock import locked

    _resolve(arguments)  # wrong parameters are refused before anything is waited for
    workspace = _workspace(arguments)
    with locked(workspace, math.inf, f"research run {arguments.stage}", _waiting):
        _build(arguments, _resolve(arguments), workspace)  # the run that was waited for may have written params.yaml


def _waiting(owner: str) -> None:
    print(f"waiting for {owner}, which uses this workspace", file=sys.stderr, flush=True)


def _build(arguments: argparse.Namespace, config: Config, workspace: Workspace) -> None:
    from research_rl.pipeline.run import run_stage
    from research_rl.pipeline.stages import STAGES

    for name in STAGES if arguments.stage == "all" else (arguments.stage,):
        started = time.perf_counter()
        artifact, built = run_stage(name, config, workspace, force=arguments.force, progress=_Printer(name))
        what = f"built in {time.perf_counter() - started:.1f} s" if built else "current, skipped"
        counts = ", ".join(f"{key} {value:,}" for key, value in artifact.counts.items())
        print(f"{name}: {what}; {counts or 'no counts'}; {artifact.hash[:12]}", flush=True)


class _Printer:
    """Progress for people: one rewritten line on a terminal, else a line every ten seconds."""

    def __init__(self, stage: str) -> None:
        self.stage, self.last = stage, 0.0
        self.terminal = sys.stderr.isatty()

    def __call__(self, text: str, share: float) -> None:
        now = time.monotonic()
        if now - self.last < (0.1 if self.terminal else _QUIET_S) and share < 1:
            return
        self.last = now
        line = f"{self.stage} {share:4.0%} {text}"
        print(f"\r\x1b[2K{line}" if self.terminal else line, end="" if self.terminal and share < 1 else "\n", file=sys.stderr, flush=True)


def _status(arguments: argparse.Namespace) -> None:
    from research_rl.planning.plan import state

    config, workspace = _resolve(arguments), _workspace(arguments)
    for row in state(config, workspace):
        print(f"{row.stage:<10} {row.state:<8} {row.hash or '-':<14} {row.detail}")


def _plan(arguments: argparse.Namespace) -> None:
    from research_rl.planning.plan import check, describe

    config, workspace = _resolve(arguments), _workspace(arguments)
    print(describe(config, workspace), flush=True)
    check(config, workspace)


def _compare(arguments: argparse.Namespace) -> None:
    from research_rl.report.compare import compare

    print(compare(arguments.a, arguments.b, arguments.html))


def _config(arguments: argparse.Namespace) -> None:
    from research_rl import config

    if arguments.action == "describe":
        print("\n".join(config.describe()))
    else:
        print(config.dump(_resolve(arguments)), end="")


def _serve_retriever(arguments: argparse.Namespace) -> None:
    from research_rl.retriever.serve import serve

    serve(_resolve(arguments), _workspace(arguments), arguments.part)


def _serve_model(arguments: argparse.Namespace) -> None:
    from research_rl.serving.serve import serve

    serve(_resolve(arguments), _workspace(arguments), arguments.model)
