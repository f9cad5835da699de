"""The command line: the only place that parses arguments or prints."""

from __future__ import annotations

import argparse
import io
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from fedsp_mpi import __version__, config
from fedsp_mpi.comm import Refused, guard, launcher_rank, launcher_size
from fedsp_mpi.commands.usage import explained, number
from fedsp_mpi.config.parsing import error_line
from fedsp_mpi.files.untrusted import printable
from fedsp_mpi.log import Log

USAGE_ERROR = 2
SECONDS, TFLOPS = number(float, 0, 1e9), number(float, 0, 1e9, above=True)
COUNT, TOKENS = number(int, 1, 1e7), number(int, 2, 1e7)
_KEPT = "\n\t"  # control characters that are shown as they are


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit status: 0, 2 for a mistake of the user, or 75 for a run that was
    told to stop.
    """
    _print_anything()
    options = argparse.Namespace()
    try:
        options = _parser().parse_args(
            _with_verb(sys.argv[1:] if arguments is None else list(arguments))
        )
        with guard(options.verb):
            return options.run(options)
    except Refused as error:
        if _speaks():
            text = printable(_named(error_line(str(error)), options), keep=_KEPT)
            print(f"fedsp_mpi: {text}", file=sys.stderr, flush=True)
        return error.exit_status


def run(options: argparse.Namespace) -> int:
    """`run`: one experiment, from its start to its table."""
    chosen = {"run.name": options.name, "run.resume": options.resume}
    chosen["run.if_exists"] = "replace" if options.replace else None
    settings, error = _settings_or_mistake(
        options, {key: text for key, text in chosen.items() if text is not None}
    )
    from fedsp_mpi.run.execute import execute

    log = _log(options)
    name = Path(options.config).stem if options.config else "embedded"
    folder = execute(settings, name, log, client_log=Log(_show), error=error)
    if folder is not None:
        from fedsp_mpi.record import read
        from fedsp_mpi.report import summarize

        _show("\n" + summarize(read(folder)))
    return 0


def check(options: argparse.Namespace) -> int:
    """`check`: what would stop a run or slow it down, found by all ranks before it begins."""
    from fedsp_mpi.commands import check as room

    settings, error = _settings_or_mistake(options)
    room.check(settings, _log(options), error=error)
    return 0


def fetch(options: argparse.Namespace) -> int:
    """`fetch`: models and data of configurations into the local cache, for runs on nodes without a
    network.
    """
    if (launcher_size() or 1) > 1:
        raise Refused(
            f"fetch: found {launcher_size()} processes, expected one; start it without mpirun"
        )
    log = _log(options)
    paths = options.configs or ([None] if options.set else [])
    if not paths:
        log.say(
            "nothing to fetch: no configuration was named, and the embedded default has "
            "all it needs"
        )
        return 0
    every = [_settings(path, options.set) for path in paths]
    from fedsp_mpi.commands import fetch as room

    for settings in every:
        _user(room.fetch, settings, log)
    log.say(
        "on nodes without a network, export HF_HUB_OFFLINE=1: the libraries would try "
        "to reach the hub for a while"
    )
    return 0


def plan(options: argparse.Namespace) -> int:
    """`plan`: what configurations cost, from their sizes alone."""
    every = [
        (path or "embedded", _settings(path, options.set)) for path in options.configs or [None]
    ]
    from fedsp_mpi.estimate import cost as room
    from fedsp_mpi.estimate import text as plan_text

    plans = [_user(room.plan, settings, label, options.tokens) for label, settings in every]
    table = plan_text.markdown(plans, options.tflops) if options.markdown else None
    _show(table or "\n\n".join(plan_text.text(each, options.tflops) for each in plans))
    return 0


def report(options: argparse.Namespace) -> int:
    """`report`: tables and pictures of runs that are there."""
    from fedsp_mpi import report

    if options.picture and not options.table:
        raise Refused("--picture: found without --table comparison, expected both")
    runs = _user(report.read_all, options.runs)
    if options.plot:
        _user(report.draw_curves, runs, options.plot)
    if options.table:
        found = _user(report.compare, runs)
        if options.picture:
            _user(report.draw_bars, found, options.picture)
        _show("\n\n".join(filter(None, (report.comparison_table(found), report.gain_table(found)))))
    elif options.markdown or not options.plot:
        _show(
            report.markdown(runs)
            if options.markdown
            else "\n\n".join(report.summarize(each) for each in runs)
        )
    return 0


def sweep(options: argparse.Namespace) -> int:
    """`sweep`: every task with every method and seed of each file, a run each; status 1 if one of
    them failed.
    """
    if (launcher_size() or 1) > 1:
        raise Refused(
            f"sweep: found {launcher_size()} processes, expected one; give mpirun to --launch"
        )
    from fedsp_mpi.commands import sweep as room

    return _user(
        room.sweep,
        [Path(file) for file in options.files],
        options.set,
        options.launch,
        options.dry_run,
        _log(options),
        options.only,
        options.jobs,
    )


def evaluate(options: argparse.Namespace) -> int:
    """`evaluate`: the final test of a run, driven by lm-eval."""
    if (launcher_size() or 1) > 1:
        raise Refused(
            f"evaluate: found {launcher_size()} processes, expected one; start it without mpirun"
        )
    from fedsp_mpi.commands import evaluate as room

    asked = room.Options(
        tuple(name.strip() for name in options.tasks.split(","))
        if options.tasks is not None
        else None,
        options.limit,
        options.batch_tokens,
        options.without_prompt,
        options.device,
        Path(options.include) if options.include else None,
    )
    folder = Path(options.folder)
    options.config = str(
        (folder if folder.is_dir() else folder.parent) / "config.yaml"
    )  # what `fetch` would need
    log = _log(options)
    found = _user(room.evaluate, folder, asked, log)
    _show("\n" + room.text(found))
    log.say(f"written to {_user(room.write, found)}")
    return 0


def diff(options: argparse.Namespace) -> int:
    """`diff`: bit by bit; status 1 if anything differs."""
    from fedsp_mpi.record import read
    from fedsp_mpi.report import difference

    one, other = (_user(read, path) for path in (options.one, options.other))
    lines = _user(difference, one, other)
    _show("\n".join(lines) if lines else f"equal bits in {one.committed_rounds} rounds")
    return 1 if lines else 0


def bench(options: argparse.Namespace) -> int:
    """`bench`: ratios against the bare libraries, in one run; and what prompts of the auxiliary
    model are worth.
    """
    log = _log(options)
    if options.what == "wire":
        _bench_wire(log, options.repeats)
        return 0
    if options.what == "transfer":
        from fedsp_mpi.commands import bench_transfer

        _show(
            bench_transfer.table(
                _user(
                    bench_transfer.transfer,
                    _settings(options.config, options.set),
                    options.steps,
                    log,
                )
            )
        )
        return 0
    from fedsp_mpi.commands import bench_local as room

    found = _user(room.local, _settings(options.config, options.set), options.repeats, log)
    log.say(
        "a client's local round {package:.4f} s, bare loop {bare:.4f} s: ratio {ratio:.3f}".format(
            **found
        )
    )
    return 0


def _bench_wire(log: Log, repeats: int) -> None:
    from fedsp_mpi.comm import benchmark as room

    if (launcher_size() or 1) < 2:
        raise Refused(
            "bench wire: found one process, expected at least two; start it with mpirun -n 4"
        )
    if found := room.measure(repeats=repeats):
        log.say(
            "broadcast + gather of {num_values:,} values among {ranks} ranks: {wire_seconds:.4f} s, bare mpi4py "
            "{bare_seconds:.4f} s: ratio {ratio:.3f}".format(**found)
        )
    if found := room.measure_waiting(repeats=min(repeats, 5)):
        log.say(
            "server's work while {ranks} - 1 ranks wait: x {broadcast_slowdown:.3f} in the broadcast, "
            "x {gather_slowdown:.3f} in the gather; a waiting rank uses {waiting_cores:.4f} cores".format(
                **found
            )
        )


def _settings(path: str | None, overrides: list[str]) -> config.Config:
    return _user(config.load, path, overrides)


def _settings_or_mistake(
    options: argparse.Namespace, values: dict[str, str] | None = None
) -> tuple[config.Config, ValueError | None]:
    """Load the configuration; return a mistake in it beside the default: all ranks must hear it."""
    try:
        return config.load(options.config, options.set, values), None
    except ValueError as error:
        return config.Config(), error


def _user(function, *arguments):
    """Call something whose ValueError is the user's mistake."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise Refused(str(error)) from None


def _named(text: str, options: argparse.Namespace) -> str:
    """A message that advises `fetch CONFIG`, with what this command was given in place of CONFIG."""
    if "fetch CONFIG" not in text:
        return text
    words = getattr(options, "configs", None) or [getattr(options, "config", None) or ""]
    words += [
        f"--set {shlex.quote(setting)}"
        for setting in getattr(options, "set", [])
        if setting.startswith(("model.", "data."))
    ]
    return text.replace("fetch CONFIG", "fetch " + " ".join(word for word in words if word))


def _print_anything() -> None:
    """Escape what the locale cannot write, such as a path that is not UTF-8, where printing would
    fail.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _show(text: str) -> None:
    """Print; whoever reads may stop before the end (`| head`), which is no reason for a run to
    stop.
    """
    try:
        print(printable(text, keep=_KEPT), flush=True)
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # or the interpreter's end would say so again


def _log(options: argparse.Namespace) -> Log:
    return Log(_show if _speaks() else None, every=options.every)


def _speaks() -> bool:
    return launcher_rank() in (None, 0)


def _with_verb(arguments: list[str]) -> list[str]:
    """`run` is the verb where none is given."""
    if not arguments or (
        arguments[0].startswith("-") and arguments[0] not in ("-h", "--help", "--version")
    ):
        return ["run", *arguments]
    return arguments


class _Parser(argparse.ArgumentParser):
    """Says what is wrong once, whatever the number of ranks."""

    def error(self, message: str):
        raise Refused(explained(message, self.prog), USAGE_ERROR)

    def _print_message(self, message, file=None):
        if _speaks():
            super()._print_message(message, file)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fedsp_mpi", description="Federated tuning of soft prompts (FedSP) on MPI."
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    verb = verbs.add_parser("run", help="run an experiment (the default: the embedded one)")
    _add_configuration(verb)
    verb.add_argument("--name", help="name of the run's folder below run.folder")
    verb.add_argument(
        "--replace", action="store_true", help="overwrite an existing run of that name"
    )
    verb.add_argument(
        "--resume",
        nargs="?",
        const="must",
        choices=("must", "auto"),
        help="go on from the last checkpoint of a run, on any number of ranks; auto: or "
        "begin it if there is none",
    )
    verb.set_defaults(run=run)

    verb = verbs.add_parser(
        "check", help="look for what would stop a run or slow it down (a minute before it)"
    )
    _add_configuration(verb)
    verb.set_defaults(run=check)

    verb = verbs.add_parser(
        "fetch", help="put models and data into the local cache, on a node with a network"
    )
    verb.add_argument("configs", nargs="*", metavar="CONFIG", help="YAML files")
    _add_settings(verb)
    verb.set_defaults(run=fetch)

    verb = verbs.add_parser(
        "plan", help="what experiments cost: parameters, bytes, memory, FLOPs and hours"
    )
    verb.add_argument(
        "configs", nargs="*", metavar="CONFIG", help="YAML files; none is the embedded default"
    )
    _add_settings(verb)
    verb.add_argument(
        "--tokens", type=TOKENS, metavar="N", help="tokens of a text (typical of the task)"
    )
    verb.add_argument(
        "--tflops",
        type=TFLOPS,
        default=40.0,
        metavar="X",
        help="10^12 FLOPs a second of a GPU (40)",
    )
    verb.add_argument("--markdown", action="store_true", help="two tables for all configurations")
    verb.set_defaults(run=plan)

    _add_report(verbs)
    _add_sweep(verbs)
    _add_evaluate(verbs)

    verb = verbs.add_parser("diff", help="compare the prompts of two runs, bit by bit")
    verb.add_argument("one", metavar="RUN")
    verb.add_argument("other", metavar="RUN")
    verb.set_defaults(run=diff)

    verb = verbs.add_parser("bench", help="measure the overhead against bare torch and bare mpi4py")
    verb.add_argument(
        "what",
        choices=("local", "wire", "transfer"),
        help="wire: under mpirun; the others: one process",
    )
    _add_configuration(verb)
    verb.add_argument(
        "--repeats", type=COUNT, default=15, metavar="N", help="counted repetitions (15)"
    )
    verb.add_argument(
        "--steps", type=COUNT, default=20, metavar="N", help="of prompt tuning, for transfer (20)"
    )
    verb.set_defaults(run=bench)
    return parser


def _add_report(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("report", help="tables and pictures from the records of runs")
    verb.add_argument(
        "runs", nargs="+", metavar="RUN", help="folder of a run, its run.h5, or a folder of runs"
    )
    kind = verb.add_mutually_exclusive_group()
    kind.add_argument(
        "--markdown", action="store_true", help="one table for all, mean and deviation over seeds"
    )
    kind.add_argument(
        "--table",
        choices=("comparison",),
        help="comparison: a row for each method, a column for each task",
    )
    verb.add_argument("--picture", metavar="FILE", help="the comparison as bars (.png or .svg)")
    verb.add_argument(
        "--plot", metavar="FILE", help="losses against rounds, bytes and seconds (.png or .svg)"
    )
    verb.set_defaults(run=report)


def _add_sweep(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser(
        "sweep", help="every task with every method and seed of each file, a run each"
    )
    verb.add_argument(
        "files", nargs="+", metavar="FILE", help="YAML file: folder, base, seeds, tasks, methods"
    )
    verb.add_argument(
        "--launch",
        default="",
        metavar="COMMAND",
        help="starts a run's processes, e.g. 'mpirun -n 4'",
    )
    verb.add_argument(
        "--only",
        default="*",
        metavar="PATTERN",
        help="runs of these names, e.g. 'sst2-*-1'; default: all",
    )
    verb.add_argument(
        "--jobs",
        type=number(int, -1e7, 1e7),
        default=1,
        metavar="N",
        help="runs at a time, with a share each of cores and GPUs; default: 1",
    )
    verb.add_argument(
        "--dry-run", action="store_true", help="say what would be run, and check all of it"
    )
    _add_settings(verb)
    verb.set_defaults(run=sweep)


def _add_evaluate(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser(
        "evaluate", help="let lm-eval test what a run has tuned (pip install 'fedsp_mpi[evaluate]')"
    )
    verb.add_argument("folder", metavar="RUN", help="folder of a complete run, or its run.h5")
    verb.add_argument(
        "--tasks", metavar="A,B,C", help="lm-eval's names; without them the run's own task"
    )
    verb.add_argument("--limit", type=COUNT, metavar="N", help="the first N questions of each task")
    verb.add_argument(
        "--batch-tokens",
        type=COUNT,
        metavar="N",
        help="positions a forward pass (the run's own number)",
    )
    verb.add_argument(
        "--without-prompt", action="store_true", help="only the model as it was before the run"
    )
    verb.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    verb.add_argument("--include", metavar="FOLDER", help="task files of your own, for lm-eval")
    verb.add_argument(
        "--every", type=SECONDS, default=5.0, metavar="S", help="seconds between progress lines (5)"
    )
    verb.set_defaults(run=evaluate)


def _add_configuration(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "config", nargs="?", metavar="CONFIG", help="YAML file; none is the embedded default"
    )
    _add_settings(verb)


def _add_settings(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. federation.rounds=10"
    )
    verb.add_argument(
        "--every", type=SECONDS, default=5.0, metavar="S", help="seconds between progress lines (5)"
    )
