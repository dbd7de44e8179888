"""The `research` command. Knows arguments and printing; every verb's work lives elsewhere and is imported when called.

Exit codes: 0 done, 1 a deliberate error (one message, no traceback), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from research_rl import __version__
from research_rl.terminal import guard_logs, say, take_any_text

if TYPE_CHECKING:
    from research_rl.config import BenchConfig, Config
    from research_rl.evaluation.evidence import Evidence
    from research_rl.pipeline.manifest import Manifest
    from research_rl.pipeline.stages import Workspace
    from research_rl.process.registry import Registry

__all__ = ["main"]

_EPILOG = (
    "Parameters are set as section.key=value at the end, for example: research run train train.steps=40. "
    "`run` and `init` write them to params.yaml first and print each changed value; all other verbs leave params.yaml as it is. "
    "`research config describe` lists every parameter."
)
_EVALUATIONS = (
    "its folder, the label or first digits of a cell, @current or @previous, mlflow:RUN, registry:NAME/VERSION or registry:NAME@ALIAS"
)
_QUIET_S = 10.0
_Verb = Callable[[argparse.Namespace], None]
_Add = Callable[[str, _Verb, str], argparse.ArgumentParser]
_SERVABLE = "before, after, hub:NAME, registry:NAME@ALIAS, registry:NAME/VERSION"
_MODELS = f"{_SERVABLE}, http://SERVER[#TOKENIZER_FOLDER] or a folder"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code."""
    take_any_text()
    guard_logs()
    arguments = _parse(argv)
    from research_rl.errors import ResearchError
    from research_rl.pipeline.extras import missing_extras

    # SIGTERM becomes a KeyboardInterrupt, so that services and jobs on a cluster are ended by the blocks that started them.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with missing_extras():
            arguments.verb(arguments)
    except ResearchError as error:
        say(f"research: {error}", sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader (head, less) has seen enough
        # Python flushes standard output once more at exit, and would complain on the closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.filename is None:
            raise
        say(f"research: {error.filename!s:.300}: {error.strerror}; use a workspace in which this user may write", sys.stderr)
        return 1
    return 0


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

    def add(name: str, function: _Verb, summary: str) -> argparse.ArgumentParser:
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
    model = add("serve-model", _serve_model, "serve a model over HTTP until stopped")
    model.add_argument("--model", type=Path, help="model folder; the trained policy when left out")
    ask = add("ask", _ask, "ask the trained policy and show how it searches, as it does")
    ask.add_argument("question", nargs="?", help="in quotes; left out: asked for, or one a line from a pipe, answered as JSON lines")
    ask.add_argument("--model", type=Path, help="model folder; the trained policy when left out")
    ask.add_argument("--json", action="store_true", help="print one JSON object a question, when its answer is whole")
    agent = add("serve-agent", _serve_agent, "serve the trained policy with search over HTTP, with a page, until stopped")
    agent.add_argument("--model", metavar="M", help=f"{_SERVABLE} or a folder; an alias is followed as it moves (default: agent.model)")
    agent.add_argument("--shadow", metavar="VERSION", help="a challenger that plays some of the questions unseen: a version's number, or M")
    retriever = add("serve-retriever", _serve_retriever, "serve the workspace's index over HTTP until stopped")
    retriever.add_argument("--part", default="1/1", metavar="I/N", help="serve only the i-th of n parts of the index")
    others = (
        add("init", _init, "write params.yaml of a workspace from a profile"),
        add("plan", _plan, "show what a run would build, and whether it fits on the disk; `plan retriever`: what fleet a corpus needs"),
        status := add("status", _status, "show every stage: current, stale, missing or torn"),
    )
    status.add_argument("--verify", action="store_true", help="read the bytes of all files, also of those that did not change")
    _keeping_verbs(add)
    for verb in (run, config, *_evaluation_verbs(add), model, ask, agent, retriever, *others):
        verb.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="parameters for this call")
    return parser


def _keeping_verbs(add: _Add) -> None:
    """Add the verbs that copy a workspace away and back; they take no parameters."""
    backup = add("backup", _backup, "copy databases, parameters and artifacts of a workspace into one folder, also while a run goes on")
    backup.add_argument("folder", type=Path, help="where to; it must not exist")
    restore = add("restore", _restore, "bring a backup into a workspace")
    restore.add_argument("folder", type=Path, help="what `research backup` wrote")
    restore.add_argument("--replace", action="store_true", help="also in a workspace that has files: those of the backup take their place")


def _evaluation_verbs(add: _Add) -> list[argparse.ArgumentParser]:
    """Add the verbs that play questions, or read what was played; return those that take parameters."""
    compare = add("compare", _compare, "compare two evaluations question by question")
    compare.add_argument("a", help=f"an evaluation: {_EVALUATIONS}")
    compare.add_argument("b", help="another, which counts as the later one")
    compare.add_argument("--html", type=Path, help="also write the comparison as a page")
    return [*_playing_verbs(add), *_deciding_verbs(add)]


def _playing_verbs(add: _Add) -> list[argparse.ArgumentParser]:
    evaluate = add("evaluate", _evaluate, "play models by methods on question sets, and keep each combination as a cell of its own")
    evaluate.add_argument("--model", action="append", metavar="M", help=f"{_MODELS}; may be repeated (default: after)")
    evaluate.add_argument("--method", metavar="M,M", help="methods, comma-separated; `--method help` lists them (default: research)")
    evaluate.add_argument("--set", metavar="S,S", help="question sets by name, comma-separated (default: all in test)")
    evaluate.add_argument("--samples", type=int, metavar="K", help="repetitions, for evaluation.temperature above 0")
    evaluate.add_argument(
        "--without", choices=["supporting"], help="also with the passages that answer a question taken out of every reply"
    )
    evaluate.add_argument("--swap", choices=["bm25"], help="also with the replies of another kind of index, which is built when needed")
    evaluate.add_argument("--noise", metavar="S,S", help="also with a share of the passages (0 to 1) replaced by those of other questions")
    bench = add("bench", _bench, "evaluate what section bench names: models before and after, our protocol and its controls")
    bench.add_argument("--model", action="append", metavar="M", help="as for evaluate (default: bench.models)")
    bench.add_argument("--method", metavar="M,M", help="as for evaluate (default: bench.methods)")
    bench.add_argument("--set", metavar="S,S", help="as for evaluate (default: bench.sets)")
    bench.add_argument("--samples", type=int, metavar="K", help="as for evaluate (default: bench.samples)")
    bench.add_argument("--against", metavar="PAPER", help="also place the results in the bands of published ones: paper (ReSearch)")
    blame = add("blame", _blame, "say which component made two evaluations differ, by evaluations that stand between them")
    blame.add_argument("a", help=f"an evaluation: {_EVALUATIONS}")
    blame.add_argument("b", help="another, which counts as the later one")
    blame.add_argument("--order", default="", metavar="C,C", help="exchange the components one after the other in this order")
    blame.add_argument("--together", action="append", default=[], metavar="C,C", help="exchange these components at once; may be repeated")
    blame.add_argument(
        "--model", action="append", default=[], metavar="M", help="where a model of A or B may be found: a folder or hub:NAME"
    )
    blame.add_argument("--plan", action="store_true", help="only show what would be played")
    blame.add_argument("--html", type=Path, default=Path("blame.html"), help="where the page is written (default: blame.html)")
    return [evaluate, bench, blame]


def _deciding_verbs(add: _Add) -> list[argparse.ArgumentParser]:
    judge = add("judge", _judge, "ask a language model whether the saved predictions of evaluations are right")
    judge.add_argument("folders", nargs="+", metavar="FOLDER", help="evaluations, for example artifacts/evaluation")
    judge.add_argument("--preset", default="research", help="how it is asked: research (published), strict (ours) or browsecomp")
    judge.add_argument("--url", help="OpenAI-compatible address up to the version (default: judge.url)")
    judge.add_argument("--model", help="name of the judge's model (default: reward.judge.model)")
    judge.add_argument("--swap", action="store_true", help="ask once more with answers and prediction in another order")
    judge.add_argument("--again", action="store_true", help="ask once more about questions on which the judge failed")
    gate = add("gate", _gate, "let a challenger meet the champion on the same questions until one rule is decided")
    gate.add_argument("--challenger", default="after", metavar="M", help=f"{_MODELS} (default: after)")
    gate.add_argument("--champion", metavar="M", help="as --challenger (default: the registry's champion, else before)")
    gate.add_argument("--set", default="", metavar="S,S", help="question sets by name, comma-separated (default: all in test)")
    promote = add("promote", _promote, "make a registered version the champion by hand")
    promote.add_argument("--to", required=True, metavar="VERSION", help="number of the version in the registry")
    promote.add_argument("--why", required=True, metavar="TEXT", help="the reason, which is recorded")
    rollback = add("rollback", _rollback, "make the version champion that was it before")
    rollback.add_argument("--why", default="", metavar="TEXT", help="the reason, which is recorded")
    return [judge, gate, promote, rollback]


def _workspace(arguments: argparse.Namespace) -> Workspace:
    from research_rl.pipeline.stages import Workspace

    return Workspace(arguments.workspace.resolve())


def _resolve(arguments: argparse.Namespace, *, bare: bool = False) -> Config:
    """Return the configuration of a call, with `bare` without the parameters that were given to it."""
    from research_rl import config

    overrides = () if bare else arguments.overrides
    if arguments.profile:
        return config.load_profile(arguments.profile, overrides)
    return config.load(arguments.workspace / "params.yaml", overrides)


def _init(arguments: argparse.Namespace) -> None:
    from research_rl import config

    resolved = config.load_profile(arguments.profile or "laptop", arguments.overrides)
    arguments.workspace.mkdir(parents=True, exist_ok=True)
    lines = config.update(resolved, arguments.workspace / "params.yaml")
    say("\n".join(lines) or f"params.yaml unchanged (profile {resolved.profile})")
    for line in resolved.needs:
        say(line)


def _run(arguments: argparse.Namespace) -> None:
    from research_rl.config import written
    from research_rl.errors import ConfigError
    from research_rl.pipeline.lock import locked
    from research_rl.pipeline.overrides import refuse_strangers
    from research_rl.pipeline.stages import STAGES

    if arguments.stage not in (*STAGES, "all"):
        raise ConfigError(f"stage={arguments.stage!r:.80} is not one of {[*STAGES, 'all']}")
    _resolve(arguments)  # wrong parameters are refused before anything is waited for
    workspace = _workspace(arguments)
    with locked(workspace, math.inf, f"research run {arguments.stage}", _waiting):
        config = _resolve(arguments)  # the run that was waited for may have written params.yaml
        if arguments.overrides and arguments.stage != "all":
            refuse_strangers(arguments.stage, _resolve(arguments, bare=True), config, workspace)
        workspace.root.mkdir(parents=True, exist_ok=True)
        with written(config, workspace.root / "params.yaml", say) as parameters:
            _build(arguments, config, workspace, parameters.keep)


def _waiting(owner: str) -> None:
    say(f"waiting for {owner}, which uses this workspace", sys.stderr)


def _build(arguments: argparse.Namespace, config: Config, workspace: Workspace, on_build: Callable[[], None]) -> None:
    from research_rl.pipeline.run import run_stage
    from research_rl.pipeline.stages import STAGES

    # The table lists parents before children.
    for name in STAGES if arguments.stage == "all" else (arguments.stage,):
        started = time.perf_counter()
        with _Printer(name) as progress:
            artifact, built = run_stage(
                name, config, workspace, force=arguments.force, refresh=arguments.refresh, progress=progress, on_build=on_build
            )
        what = f"built in {time.perf_counter() - started:.1f} s" if built else "current, skipped"
        counts = ", ".join(f"{key} {value:,}" for key, value in artifact.counts.items())
        say(f"{name}: {what}; {counts or 'no counts'}; {artifact.hash[:12]}")


class _Printer:
    """Progress for people, with the time that is left: one rewritten line on a terminal, else a line every ten seconds."""

    def __init__(self, stage: str) -> None:
        from research_rl.pipeline.remaining import Remaining

        self.stage, self.last = stage, 0.0
        self.terminal, self.open = sys.stderr.isatty(), False
        self.remaining = Remaining()

    def __enter__(self) -> _Printer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End what was shown at 100 %, or, where the work failed, with the line as it stands."""
        if self.open and kind is None:
            self._show("done", 1.0)
        elif self.open and self.terminal:
            say("", sys.stderr)

    def __call__(self, text: str, share: float) -> None:
        # Asked for every report: it learns the rate from those that are not shown, too.
        left, now = self.remaining(share), time.monotonic()
        if now - self.last < (0.1 if self.terminal else _QUIET_S) and share < 1:
            return
        self.last = now
        self._show(f"{text}{left}", share)

    def _show(self, text: str, share: float) -> None:
        self.open = share < 1
        if self.terminal:
            print("\r\x1b[2K", end="", file=sys.stderr)
        say(f"{self.stage} {share:4.0%} {text}", sys.stderr, end="" if self.terminal and self.open else "\n")


def _status(arguments: argparse.Namespace) -> None:
    from research_rl.planning.plan import state

    config, workspace = _resolve(arguments), _workspace(arguments)
    for row in state(config, workspace, reread=arguments.verify):
        say(f"{row.stage:<10} {row.state:<8} {row.hash or '-':<14} {row.detail}")


def _plan(arguments: argparse.Namespace) -> None:
    if arguments.overrides[:1] == ["retriever"]:
        _plan_retriever(arguments)
        return
    from research_rl.planning.plan import check, describe

    config, workspace = _resolve(arguments), _workspace(arguments)
    say(describe(config, workspace))
    check(config, workspace)


def _plan_retriever(arguments: argparse.Namespace) -> None:
    from research_rl.planning import fleet

    demand, arguments.overrides = fleet.asked(arguments.overrides[1:])
    say(fleet.describe(_resolve(arguments), _workspace(arguments), demand))


def _backup(arguments: argparse.Namespace) -> None:
    from research_rl.pipeline.backup import backup

    say(_carried(backup(_workspace(arguments), arguments.folder, _note)) + f" in {arguments.folder}")


def _restore(arguments: argparse.Namespace) -> None:
    from research_rl.pipeline.backup import restore
    from research_rl.pipeline.lock import locked

    workspace = _workspace(arguments)
    # A backup is read while runs go on; a restore waits for none and is refused while one goes on.
    with locked(workspace, 0.0, "research restore", _waiting):
        say(_carried(restore(workspace, arguments.folder, _note, replace=arguments.replace)) + f" in {workspace.root}")


def _carried(artifact: Manifest) -> str:
    size, databases = sum(entry.size for entry in artifact.files), artifact.counts.get("databases", 0)
    return f"{len(artifact.files):,} files, {size / 1e6:,.1f} MB, {databases} databases, {artifact.counts['artifacts']} artifacts"


def _compare(arguments: argparse.Namespace) -> None:
    from research_rl.report.compare import compare

    say(compare(_evaluation(arguments, arguments.a), _evaluation(arguments, arguments.b), arguments.html))


def _evaluation(arguments: argparse.Namespace, name: str) -> Path:
    """Return the folder of an evaluation that a command names."""
    from functools import partial

    from research_rl.evaluation.named import folder
    from research_rl.process.tracked import hashes

    workspace = _workspace(arguments)
    return folder(name, workspace, partial(hashes, workspace.root))


def _evaluate(arguments: argparse.Namespace) -> None:
    from research_rl.config import BenchConfig, BenchModel
    from research_rl.evaluation.evidence import chosen

    changes = chosen(arguments.without, arguments.swap, arguments.noise)
    _play_cells(arguments, "evaluate", lambda config: BenchConfig(models=(BenchModel(model="after"),), methods=("research",)), changes)


def _bench(arguments: argparse.Namespace) -> None:
    _play_cells(arguments, "bench", lambda config: config.bench, paper=arguments.against)


def _play_cells(
    arguments: argparse.Namespace,
    verb: str,
    default: Callable[[Config], BenchConfig],
    evidence: Sequence[Evidence] = (),
    paper: str | None = None,
) -> None:
    from dataclasses import replace

    from research_rl.evaluation import bench
    from research_rl.evaluation.matrix import play
    from research_rl.evaluation.methods import METHODS
    from research_rl.evaluation.published import publication
    from research_rl.pipeline.lock import locked
    from research_rl.report.matrix import describe, describe_against

    if arguments.method == "help":
        say("\n".join(f"{name:<14} {method.summary}" for name, method in METHODS.items()))
        return
    config, workspace = _resolve(arguments), _workspace(arguments)
    chosen = bench.chosen(default(config), arguments.model, arguments.method, arguments.set, arguments.samples)
    matrix = replace(bench.matrix(chosen, config, workspace, _registry(arguments).folder), evidence=evidence)
    if paper:
        publication(paper)  # an unknown one is refused before anything is played
    # Runs of the workspace's stages change what cells are played with.
    with locked(workspace, math.inf, f"research {verb}", _waiting), _Printer(verb) as progress:
        outcomes = play(config, workspace, matrix, progress)
    say(describe(outcomes))
    if paper:
        say("\n" + describe_against(outcomes, paper, config))


def _blame(arguments: argparse.Namespace) -> None:
    from research_rl.evaluation import blame, cells, crossings
    from research_rl.pipeline.lock import locked
    from research_rl.report import blame as report

    config, workspace = _resolve(arguments), _workspace(arguments)
    a, b = (crossings.evaluated(_evaluation(arguments, name)) for name in (arguments.a, arguments.b))
    models = [cells.model(choice, config, workspace, _registry(arguments).folder) for choice in arguments.model]
    where = crossings.places(workspace, a, b, models)
    gone = crossings.gone(a, where), crossings.gone(b, where)
    order, together = _names(arguments.order), [_names(group) for group in arguments.together]
    plan = blame.steps(blame.differing(a, b), (gone[0].keys(), gone[1].keys()), order, together)
    if arguments.plan:
        say(report.plan_text(plan, gone, crossings.planned(plan, a, b, where, config)))
        return
    with locked(workspace, math.inf, "research blame", _waiting), _Printer("blame") as progress:
        points = crossings.play(plan, a, b, where, config, progress)
    weighed = report.weigh(a, b, plan, gone, points)
    arguments.html.write_text(report.page(weighed), encoding="utf-8")
    say(f"{report.describe(weighed)}\n\nAs a page: {arguments.html}")


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _judge(arguments: argparse.Namespace) -> None:
    from research_rl.errors import ConfigError
    from research_rl.evaluation.judge_presets import find
    from research_rl.evaluation.judging import Protocol, judge_all
    from research_rl.report.judging import describe

    # Of two lists of arguments argparse gives everything to the first.
    folders = [Path(item) for item in arguments.folders if "=" not in item or Path(item).is_dir()]
    arguments.overrides += [item for item in arguments.folders if Path(item) not in folders]
    arguments.overrides += [f"judge.url={arguments.url}"] if arguments.url else []
    config, preset = _resolve(arguments), find(arguments.preset)
    model = arguments.model or config.reward.judge.model
    if not folders or not model:
        raise ConfigError("name at least one folder of an evaluation" if model else "no judge's model: name it with --model")
    protocols = [Protocol(preset, model, swapped) for swapped in ([False, True] if arguments.swap else [False])]
    asked = [(folder, protocol) for folder in dict.fromkeys(folders) for protocol in protocols]
    with _Printer("judge") as progress:
        judged = judge_all(config, _workspace(arguments), asked, progress, again=arguments.again, on_wait=_waiting)
    say(describe(judged))
    _pass_on(_workspace(arguments).root)


def _pass_on(workspace: Path) -> None:
    """Tell MLflow of judgements; one that does not take them now is told by a later run."""
    from research_rl.errors import ResearchError
    from research_rl.paths import IN_CHECKOUT
    from research_rl.process.tracked import judged

    if not IN_CHECKOUT:
        return
    try:
        judged(workspace)
    except ResearchError as error:
        say(f"the verdicts stand; MLflow gets them later: {error}", sys.stderr)


def _registry(arguments: argparse.Namespace) -> Registry:
    from research_rl.process.registry import Registry

    return Registry(_workspace(arguments).root, arguments.profile, arguments.overrides)


def _gate(arguments: argparse.Namespace) -> None:
    from research_rl.evaluation import cells, gate_run
    from research_rl.pipeline.lock import locked
    from research_rl.report.gate import describe

    config, workspace, registry = _resolve(arguments), _workspace(arguments), _registry(arguments)
    with locked(workspace, math.inf, "research gate", _waiting):
        challenger = cells.model(arguments.challenger, config, workspace, registry.folder, "--challenger")
        choice = arguments.champion or registry.champion(config.tracking.registered_model)
        champion = cells.model(choice or "before", config, workspace, registry.folder, "--champion")
        gate = gate_run.prepare(config, workspace, challenger, champion, [name for name in arguments.set.split(",") if name])
        with _Printer("gate") as progress:
            decision = gate_run.meet(gate, progress)
        say(describe(gate, decision))


def _promote(arguments: argparse.Namespace) -> None:
    _resolve(arguments)
    say(_registry(arguments).call("promote", to=arguments.to, why=arguments.why)["said"])


def _rollback(arguments: argparse.Namespace) -> None:
    _resolve(arguments)
    say(_registry(arguments).call("rollback", why=arguments.why)["said"])


def _config(arguments: argparse.Namespace) -> None:
    if arguments.action == "describe":
        from research_rl.config.document import describe

        say("\n".join(describe()))
        return
    from research_rl.config import dump

    say(dump(_resolve(arguments)).removesuffix("\n"))


def _ask(arguments: argparse.Namespace) -> None:
    from research_rl.agent import ask, piped
    from research_rl.errors import ConfigError

    _shift_question(arguments)
    config, workspace = _resolve(arguments), _workspace(arguments)
    if arguments.question is not None:
        ask.ask(config, workspace, arguments.question, arguments.model, _note, as_json=arguments.json)
    # None where the caller closed it, as `<&-` does; a service without a terminal starts programs so.
    elif sys.__stdin__ is None:
        raise ConfigError("no question and no standard input; give the question as an argument, or questions by a pipe")
    elif sys.stdin.isatty() and not arguments.json:
        ask.converse(config, workspace, arguments.model, _note)
    else:
        ask.ask_lines(config, workspace, piped.lines(sys.stdin.fileno()), arguments.model, _note)


def _shift_question(arguments: argparse.Namespace) -> None:
    """Take a parameter back that argparse read as the question, which may be left out or stand behind parameters."""
    if not _is_parameter(arguments.question or ""):
        return
    given = [arguments.question, *arguments.overrides]
    arguments.question = next((item for item in given if not _is_parameter(item)), None)
    arguments.overrides = [item for item in given if item is not arguments.question]


def _is_parameter(text: str) -> bool:
    """Whether a text begins as section.key=; no question has such a name before its first `=`."""
    name, equals, _ = text.partition("=")
    return bool(equals) and "." in name and all(part.isidentifier() for part in name.split("."))


def _note(text: str) -> None:
    say(text, sys.stderr)


def _serve_agent(arguments: argparse.Namespace) -> None:
    import json

    from research_rl.agent.command import serve

    chosen = {"agent.model": arguments.model, "agent.shadow": arguments.shadow}
    arguments.overrides += [f"{name}={json.dumps(value)}" for name, value in chosen.items() if value is not None]
    serve(_resolve(arguments), _workspace(arguments), _registry(arguments).fetch)


def _serve_retriever(arguments: argparse.Namespace) -> None:
    from research_rl.retriever.command import serve

    serve(_resolve(arguments), _workspace(arguments), arguments.part)


def _serve_model(arguments: argparse.Namespace) -> None:
    from research_rl.serving.serve import serve

    serve(_resolve(arguments), _workspace(arguments), arguments.model)
