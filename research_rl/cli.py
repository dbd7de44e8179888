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
from typing import TYPE_CHECKING, TextIO

from research_rl import __version__
from research_rl.terminal import printable, take_any_text

if TYPE_CHECKING:
    from research_rl.config import Config
    from research_rl.pipeline.stages import Workspace

__all__ = ["main"]

_EPILOG = (
    "Parameters are set as section.key=value at the end, for example: research run train train.steps=40. "
    "`run` and `init` write them to params.yaml first and print each changed value; all other verbs write nothing. "
    "`research config describe` lists every parameter."
)
_QUIET_S = 10.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code."""
    take_any_text()
    arguments = _parse(argv)
    from research_rl.errors import ResearchError
    from research_rl.pipeline.extras import missing_extras

    # SIGTERM becomes a KeyboardInterrupt, so that services and jobs on a cluster are ended by the blocks that started them.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with missing_extras():
            arguments.verb(arguments)
    except ResearchError as error:
        _print(f"research: {error}", sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader (head, less) has seen enough
        # Python flushes standard output once more at exit, and would complain on the closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.filename is None:
            raise
        _print(f"research: {error.filename!s:.300}: {error.strerror}; use a workspace in which this user may write", sys.stderr)
        return 1
    return 0


def _print(text: str, stream: TextIO | None = None) -> None:
    """Print a line of which a part may come from data or from a path."""
    print(printable(text), file=stream or sys.stdout, flush=True)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse; parameters may stand anywhere after the verb, which argparse alone does not allow behind options."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser(_stages(argv))
    if not argv:
        parser.print_help(sys.stderr)
        parser.exit(2)
    arguments, unparsed = parser.parse_known_args(argv)
    strange = [item for item in unparsed if item.startswith("-") or "=" not in item]
    if strange or (unparsed and "overrides" not in arguments):
        parser.error(f"unrecognized arguments: {' '.join(strange or unparsed)}")
    if "overrides" in arguments:
        arguments.overrides = [*arguments.overrides, *unparsed]
    return arguments


def _stages(argv: Sequence[str]) -> str:
    """Return the names of all stages for the help of `run`; other verbs are spared the import that this takes."""
    if "run" not in argv:
        return "STAGE"
    from research_rl.pipeline.stages import STAGES

    return f"{{{','.join((*STAGES, 'all'))}}}"


def _parser(stages: str) -> argparse.ArgumentParser:
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
    run.add_argument("stage", metavar=stages, help="the stage to build, or all")
    run.add_argument("--force", action="store_true", help="build even when nothing changed")
    run.add_argument("--refresh", action="store_true", help="ask the sources of the data, and download again what changed there")
    config = add("config", _config, "show or describe the parameters")
    config.add_argument("action", choices=["show", "describe"], help="show: resolved values; describe: type and meaning of each")
    compare = add("compare", _compare, "compare two evaluations question by question")
    compare.add_argument("a", type=Path, help="folder of an evaluation, for example artifacts/baseline")
    compare.add_argument("b", type=Path, help="folder of another, for example artifacts/evaluation")
    compare.add_argument("--html", type=Path, help="also write the comparison as a page")
    model = add("serve-model", _serve_model, "serve a model over HTTP until stopped")
    model.add_argument("--model", type=Path, help="model folder; the trained policy when left out")
    ask = add("ask", _ask, "ask the trained policy one question and show how it searched")
    ask.add_argument("question", help="the question, in quotes")
    ask.add_argument("--model", type=Path, help="model folder; the trained policy when left out")
    retriever = add("serve-retriever", _serve_retriever, "serve the workspace's index over HTTP until stopped")
    retriever.add_argument("--part", default="1/1", metavar="I/N", help="serve only the i-th of n parts of the index")
    others = (
        add("init", _init, "write params.yaml of a workspace from a profile"),
        add("plan", _plan, "show what a run would build, and whether it fits on the disk"),
        status := add("status", _status, "show every stage: current, stale, missing or torn"),
    )
    status.add_argument("--verify", action="store_true", help="read the bytes of all files, also of those that did not change")
    for verb in (run, config, model, ask, retriever, *others):
        verb.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="parameters for this call")
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
    lines = config.update(resolved, arguments.workspace / "params.yaml")
    _print("\n".join(lines) or f"params.yaml unchanged (profile {resolved.profile})")
    for line in resolved.needs:
        _print(line)


def _run(arguments: argparse.Namespace) -> None:
    import math

    from research_rl.config import written
    from research_rl.errors import ConfigError
    from research_rl.pipeline.lock import locked
    from research_rl.pipeline.stages import STAGES

    if arguments.stage not in (*STAGES, "all"):
        raise ConfigError(f"stage={arguments.stage!r} is not one of {[*STAGES, 'all']}")
    _resolve(arguments)  # wrong parameters are refused before anything is waited for
    workspace = _workspace(arguments)
    with locked(workspace, math.inf, f"research run {arguments.stage}", _waiting):
        config = _resolve(arguments)  # the run that was waited for may have written params.yaml
        workspace.root.mkdir(parents=True, exist_ok=True)
        with written(config, workspace.root / "params.yaml", _tell) as parameters:
            _build(arguments, config, workspace, parameters.keep)


def _waiting(owner: str) -> None:
    _print(f"waiting for {owner}, which uses this workspace", sys.stderr)


def _build(arguments: argparse.Namespace, config: Config, workspace: Workspace, on_build: Callable[[], None]) -> None:
    from research_rl.pipeline.run import run_stage
    from research_rl.pipeline.stages import STAGES

    # The table lists parents before children.
    for name in STAGES if arguments.stage == "all" else (arguments.stage,):
        started = time.perf_counter()
        artifact, built = run_stage(
            name, config, workspace, force=arguments.force, refresh=arguments.refresh, progress=_Printer(name), on_build=on_build
        )
        what = f"built in {time.perf_counter() - started:.1f} s" if built else "current, skipped"
        counts = ", ".join(f"{key} {value:,}" for key, value in artifact.counts.items())
        _print(f"{name}: {what}; {counts or 'no counts'}; {artifact.hash[:12]}")


def _tell(line: str) -> None:
    """Print a line at once: a run may take hours."""
    print(printable(line), flush=True)


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
        line = printable(f"{self.stage} {share:4.0%} {text}")
        print(f"\r\x1b[2K{line}" if self.terminal else line, end="" if self.terminal and share < 1 else "\n", file=sys.stderr, flush=True)


def _status(arguments: argparse.Namespace) -> None:
    from research_rl.planning.plan import state

    config, workspace = _resolve(arguments), _workspace(arguments)
    for row in state(config, workspace, reread=arguments.verify):
        _print(f"{row.stage:<10} {row.state:<8} {row.hash or '-':<14} {row.detail}")


def _plan(arguments: argparse.Namespace) -> None:
    from research_rl.planning.plan import check, describe

    config, workspace = _resolve(arguments), _workspace(arguments)
    _print(describe(config, workspace))
    check(config, workspace)


def _compare(arguments: argparse.Namespace) -> None:
    from research_rl.report.compare import compare

    _print(compare(arguments.a, arguments.b, arguments.html))


def _config(arguments: argparse.Namespace) -> None:
    if arguments.action == "describe":
        from research_rl.config.document import describe

        _print("\n".join(describe()))
        return
    from research_rl.config import dump

    _print(dump(_resolve(arguments)).removesuffix("\n"))


def _ask(arguments: argparse.Namespace) -> None:
    from research_rl.agent.ask import ask, transcript

    trajectory = ask(
        _resolve(arguments), _workspace(arguments), arguments.question, arguments.model, lambda text: print(text, file=sys.stderr)
    )
    _print(transcript(trajectory))


def _serve_retriever(arguments: argparse.Namespace) -> None:
    from research_rl.retriever.command import serve

    serve(_resolve(arguments), _workspace(arguments), arguments.part)


def _serve_model(arguments: argparse.Namespace) -> None:
    from research_rl.serving.serve import serve

    serve(_resolve(arguments), _workspace(arguments), arguments.model)
