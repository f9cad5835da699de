"""The command line: the only place that parses arguments or prints."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fedsp_mpi import __version__, config
from fedsp_mpi.comm import Refused, guard, launcher_rank, launcher_size
from fedsp_mpi.log import Log

USAGE_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit status: 0, or 2 for a mistake of the user, said in one line by one rank."""
    options = _parser().parse_args(_with_verb(sys.argv[1:] if arguments is None else list(arguments)))
    try:
        with guard(options.verb):
            return options.run(options)
    except Refused as error:
        if _speaks():
            print(f"fedsp_mpi: {error}", file=sys.stderr, flush=True)
        return USAGE_ERROR


def run(options: argparse.Namespace) -> int:
    """`run`: one experiment, from its start to its table."""
    overrides = list(options.set)
    overrides += [f"run.name={options.name}"] if options.name else []
    overrides += ["run.if_exists=replace"] if options.replace else []
    settings = _settings(options.config, overrides)
    from fedsp_mpi.run import execute

    log = _log(options)
    folder = execute(settings, Path(options.config).stem if options.config else "embedded", log)
    if folder is not None:
        from fedsp_mpi.record import read, summary

        print("\n" + summary(read(folder)), flush=True)
    return 0


def report(options: argparse.Namespace) -> int:
    """`report`: tables of runs that are there."""
    from fedsp_mpi.record import markdown, read, summary

    runs = [_user(read, path) for path in options.runs]
    print(markdown(runs) if options.markdown else "\n\n".join(summary(each) for each in runs))
    return 0


def diff(options: argparse.Namespace) -> int:
    """`diff`: bit by bit; status 1 if anything differs."""
    from fedsp_mpi.record import difference, read

    one, other = (_user(read, path) for path in (options.one, options.other))
    lines = _user(difference, one, other)
    print("\n".join(lines) if lines else f"equal bits in {one.committed_rounds} rounds")
    return 1 if lines else 0


def bench(options: argparse.Namespace) -> int:
    """`bench`: ratios against the bare libraries, in one run."""
    log = _log(options)
    if options.what == "wire":
        _bench_wire(log, options.repeats)
        return 0
    from fedsp_mpi import bench as room

    found = room.local(_settings(options.config, options.set), options.repeats, log)
    log.say("a client's local round {package:.4f} s, bare loop {bare:.4f} s: ratio {ratio:.3f}".format(**found))
    return 0


def _bench_wire(log: Log, repeats: int) -> None:
    from fedsp_mpi.comm import bench as room

    if (launcher_size() or 1) < 2:
        raise Refused("bench wire: found one process, expected at least two; start it with mpirun -n 4")
    if found := room.measure(repeats=repeats):
        log.say(
            "broadcast + gather of {num_values:,} values among {ranks} ranks: {wire_seconds:.4f} s, bare mpi4py "
            "{bare_seconds:.4f} s: ratio {ratio:.3f}".format(**found)
        )
    if found := room.measure_waiting(repeats=min(repeats, 5)):
        log.say(
            "server's work while {ranks} - 1 ranks wait: x {broadcast_slowdown:.3f} in the broadcast, "
            "x {gather_slowdown:.3f} in the gather; a waiting rank uses {waiting_cores:.4f} cores".format(**found)
        )


def _settings(path: str | None, overrides: list[str]) -> config.Config:
    return _user(config.load, path, overrides)


def _user(function, *arguments):
    """Call something whose ValueError is the user's mistake."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise Refused(str(error)) from None


def _log(options: argparse.Namespace) -> Log:
    return Log((lambda line: print(line, flush=True)) if _speaks() else None, every=options.every)


def _speaks() -> bool:
    return launcher_rank() in (None, 0)


def _with_verb(arguments: list[str]) -> list[str]:
    """`run` is the verb where none is given."""
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help", "--version")):
        return ["run", *arguments]
    return arguments


class _Parser(argparse.ArgumentParser):
    """Says what is wrong once, whatever the number of ranks."""

    def error(self, message: str):
        if _speaks():
            self.print_usage(sys.stderr)
            print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(USAGE_ERROR)

    def _print_message(self, message, file=None):
        if _speaks():
            super()._print_message(message, file)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fedsp_mpi", description="Federated tuning of soft prompts (FedSP) on MPI.")
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    verb = verbs.add_parser("run", help="run an experiment (the default: the embedded one)")
    _add_configuration(verb)
    verb.add_argument("--name", help="name of the run's folder below run.folder")
    verb.add_argument("--replace", action="store_true", help="overwrite an existing run of that name")
    verb.set_defaults(run=run)

    verb = verbs.add_parser("report", help="tables from the records of runs")
    verb.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or its run.h5")
    verb.add_argument("--markdown", action="store_true", help="one table for all, mean and deviation over seeds")
    verb.set_defaults(run=report)

    verb = verbs.add_parser("diff", help="compare the prompts of two runs, bit by bit")
    verb.add_argument("one", metavar="RUN")
    verb.add_argument("other", metavar="RUN")
    verb.set_defaults(run=diff)

    verb = verbs.add_parser("bench", help="measure the overhead against bare torch and bare mpi4py")
    verb.add_argument("what", choices=("local", "wire"), help="local: one process; wire: under mpirun")
    _add_configuration(verb)
    verb.add_argument("--repeats", type=int, default=15, metavar="N", help="counted repetitions (15)")
    verb.set_defaults(run=bench)
    return parser


def _add_configuration(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("config", nargs="?", metavar="CONFIG", help="YAML file; none is the embedded default")
    verb.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. federation.rounds=10")
    verb.add_argument("--every", type=float, default=5.0, metavar="S", help="seconds between progress lines (5)")
