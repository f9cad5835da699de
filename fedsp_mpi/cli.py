"""The command line: the only place that parses arguments or prints."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from fedsp_mpi import __version__, config
from fedsp_mpi.comm import Refused, finalize, guard, launcher_rank, launcher_size
from fedsp_mpi.commands.usage import explained, number
from fedsp_mpi.config.parsing import error_line
from fedsp_mpi.files.untrusted import printable
from fedsp_mpi.log import Bar, Log, one_line

if TYPE_CHECKING:
    from fedsp_mpi.record import Run
    from fedsp_mpi.run.request import Request

USAGE_ERROR = 2  # exit status
_PROGRESS_SECONDS = 5.0  # between two lines
SECONDS = number(float, 0, 1e9)
TFLOPS = number(float, 0, 1e9, above=True)
FRACTION = number(float, 0, 1)
COUNT = number(int, 1, 1e7)
RECORD_ROUNDS = number(int, 10, 1e5)
TOKENS = number(int, 2, 1e7)
JOBS = number(int, -1e7, 1e7)  # the sweep itself compares it with the number of cores
RESUME_WORDS = ("must", "auto")  # of --resume; any other word is a folder
_BAR = Bar(sys.stderr)  # of the terminal
_PRINTED_CONTROLS = "\n\t"  # control characters that are printed as they are


def main(arguments: Sequence[str] | None = None, *, ends_process: bool = False) -> int:
    """Run a verb.

    Args:
        arguments: the command line without the program's name; default: that of this process.
        ends_process: nothing follows, so that ranks with nothing left to say need not wait for
            those that have.

    Returns:
        The exit status: 0, 1 where the verb found a difference or a failed run, 2 for a mistake of
        the user, or 75 for a run that was told to stop.
    """
    _escape_unprintable()
    if arguments is None:
        arguments = sys.argv[1:]
    options = argparse.Namespace()
    try:
        options = _parser().parse_args(_with_verb(list(arguments)))
        options.ends_process = ends_process
        with guard(options.verb):
            try:
                return options.run(options)
            finally:
                _end_bar()
    except Refused as error:
        if _is_rank_zero():
            print(f"fedsp_mpi: {_refusal_line(error, options)}", file=sys.stderr, flush=True)
        return error.exit_status


def run_in_program(request: Request) -> Run | None:
    """Run an experiment in a program that lives on, and turn refusals into public exceptions.

    It leaves the program as it was: its threads, its random numbers, its working directory.

    Args:
        request: of the program; see `fedsp_mpi.run`, which also says what this returns and raises.
    """
    from fedsp_mpi.record import read
    from fedsp_mpi.run.execute import execute

    options = argparse.Namespace(
        config=request.path, set=request.overrides, every=_PROGRESS_SECONDS, progress="auto"
    )
    directory = contextlib.chdir(request.directory) if request.directory else nullcontext()
    with directory:
        try:
            with guard.within_program("run"), _torch_kept():
                log, client_log = _logs(options)
                folder = execute(
                    request.config, request.label, log, client_log=client_log, error=request.error
                )
                _show_summary(folder)
        except KeyboardInterrupt:
            _say("interrupted; fedsp_mpi.run(resume=FOLDER) goes on from the last checkpoint")
            raise
        except Refused as refusal:
            line = _refusal_line(refusal, options)
            if refusal.exit_status == USAGE_ERROR:
                raise config.ConfigError(line) from None
            if refusal.exit_status:
                raise Refused(line, refusal.exit_status) from None
            _say(line)  # the run is complete: there is nothing to go on with
            folder = Path(request.config.run.folder).expanduser() / request.config.run.name
        finally:
            _end_bar()
            from fedsp_mpi.tensors import seal

            seal.clear()  # the next run has a global model of its own
        return None if folder is None else read(folder)


@contextmanager
def _torch_kept() -> Iterator[None]:
    """Give the caller back its threads and its random numbers, where it has loaded torch before."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    num_threads = torch.get_num_threads()
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
        torch.set_rng_state(state)


# -- verbs -----------------------------------------------------------------------------------------
# Each imports what it needs itself: `--help` and mistakes in the arguments must not wait for torch.


def run(options: argparse.Namespace) -> int:
    """`run`: run one experiment, from its start to its table."""
    directory = Path.cwd()
    name = Path(options.config).stem if options.config else "embedded"
    if options.resume in (None, *RESUME_WORDS):
        values = {}
        if options.name is not None:
            values["run.name"] = options.name
        if options.resume is not None:
            values["run.resume"] = options.resume
        if options.replace:
            values["run.if_exists"] = "replace"
        settings, error = _load_or_error(options, values)
    else:
        name = Path(options.resume).name
        settings, error, directory = _resumption_or_error(options)
    from fedsp_mpi.run.execute import execute

    with contextlib.chdir(directory):
        log, client_log = _logs(options)
        folder = execute(settings, name, log, client_log=client_log, error=error)
        if options.ends_process:
            finalize()  # the other ranks end while this one writes
        _show_summary(folder)
    return 0


def _logs(options: argparse.Namespace) -> tuple[Log, Log]:
    """Return the log of rank 0, and that of the clients of every rank."""
    log = _log(options)
    _note_toy_settings(options, log)
    return log, Log(_show, bar=log.bar)


def _end_bar() -> None:
    """Take a progress bar away that an error has left."""
    _BAR.end()


def _show_summary(folder: Path | None) -> None:
    """Print the summary of a run that has ended; nothing on ranks that have no folder."""
    if folder is None:
        return
    from fedsp_mpi.record import read
    from fedsp_mpi.report import summarize

    _show("\n" + summarize(read(folder)))


def check(options: argparse.Namespace) -> int:
    """`check`: check cluster, configuration, model and data before a run."""
    from fedsp_mpi.commands import check

    settings, error = _load_or_error(options)
    name = Path(options.config).stem if options.config else "embedded"
    log = _log(options)
    _note_toy_settings(options, log)
    check.check(settings, log, name=name, error=error)
    return 0


def fetch(options: argparse.Namespace) -> int:
    """`fetch`: download models and data of configurations into the local cache."""
    _require_one_process("fetch", "start it without mpirun")
    log = _log(options)
    paths = options.configs or ([None] if options.set else [])
    if not paths:
        log.say(
            "nothing to fetch: no configuration was named, and the embedded default has "
            "all it needs"
        )
        return 0
    configs = [_load(path, options.set) for path in paths]
    from fedsp_mpi.commands import fetch

    for settings in configs:
        with _user_errors():
            fetch.fetch(settings, log)
    log.say(
        "on nodes without a network, export HF_HUB_OFFLINE=1, or the libraries try to reach the "
        "hub for a while"
    )
    return 0


def show_config(options: argparse.Namespace) -> int:
    """`config`: print a configuration as it is resolved, the schema, or the reference of keys."""
    _require_one_process("config", "start it without mpirun")
    if (options.reference or options.schema) and (options.config or options.set):
        raise Refused(
            "config: found a configuration with --schema or --reference, which are the same for "
            "all, expected one of them",
            USAGE_ERROR,
        )
    if options.reference:
        from fedsp_mpi.config.reference import reference

        _show(reference().removesuffix("\n"))
    elif options.schema == "sweep":
        from fedsp_mpi.commands.sweep_schema import sweep_schema

        _show(json.dumps(sweep_schema(), indent=2))
    elif options.schema:
        from fedsp_mpi.config.schema import schema

        _show(json.dumps(schema(), indent=2))
    else:
        _show(config.to_yaml(_load(options.config, options.set)).removesuffix("\n"))
    return 0


def split(options: argparse.Namespace) -> int:
    """`split`: write what the simulation deals out as one folder per silo."""
    _require_one_process("split", "start it without mpirun")
    from fedsp_mpi.commands import split

    with _user_errors():
        split.split(
            options.config,
            options.set,
            Path(options.to),
            log=_log(options),
            replace=options.replace,
        )
    return 0


def plan(options: argparse.Namespace) -> int:
    """`plan`: estimate what configurations cost, from their sizes alone."""
    configs = [(path or "embedded", _load(path, options.set)) for path in options.configs or [None]]
    from fedsp_mpi.estimate import cost, text

    with _user_errors():
        estimates = [cost.plan(settings, label, options.tokens) for label, settings in configs]
    if options.markdown:
        _show(text.markdown(estimates, options.tflops))
    else:
        _show("\n\n".join(text.text(estimate, options.tflops) for estimate in estimates))
    return 0


def report(options: argparse.Namespace) -> int:
    """`report`: show tables and pictures of finished runs."""
    from fedsp_mpi import report

    if options.picture and options.table not in ("comparison", "phases"):
        raise Refused("--picture: found without --table comparison or phases, expected both")
    with _user_errors():
        runs = report.read_all(options.runs)
        _write_reports(runs, options)
        if options.plot:
            report.draw_curves(runs, options.plot)
        if options.silos:
            report.draw_silos(runs, options.silos)
        if options.labels:
            report.draw_labels(runs, options.labels)
    if options.table == "tiers":
        with _user_errors():
            _show(report.tiers_table(runs))
    elif options.table:
        has_phases = options.table == "phases"
        with _user_errors():
            comparison = report.compare(runs)
            if options.picture:
                draw = report.draw_phases if has_phases else report.draw_bars
                draw(comparison, options.picture)
        if has_phases:
            _show(report.phases_table(comparison))
            return 0
        tables = (report.comparison_table(comparison), report.gain_table(comparison))
        _show("\n\n".join(table for table in tables if table))
    elif options.markdown:
        _show(report.markdown(runs))
    elif options.json == "-":
        _show(report.as_json(runs))
    elif not any(
        (
            options.plot,
            options.silos,
            options.labels,
            options.html,
            options.csv,
            options.json,
        )
    ):
        _show("\n\n".join(report.summarize(run) for run in runs))
    return 0


def _write_reports(runs: Sequence[Run], options: argparse.Namespace) -> None:
    """Write the files of `report` that hold data or a page of one run.

    Raises ValueError if a file cannot be written, or is not ours.
    """
    from fedsp_mpi import report

    for option in ("html", "csv"):
        if getattr(options, option) and len(runs) != 1:
            raise ValueError(f"--{option}: found {len(runs)} runs, expected one; name one run")
    if options.html:
        report.write_page(runs[0], options.html)
    if options.csv:
        report.write_csv(runs[0], options.csv)
    if options.json not in (None, "-"):
        report.write_json(runs, options.json)


def sweep(options: argparse.Namespace) -> int:
    """`sweep`: run every task with every method and seed of each file; status 1 if a run failed."""
    _require_one_process("sweep", "give mpirun to --launch")
    from fedsp_mpi.commands import sweep

    with _user_errors():
        return sweep.sweep(
            [Path(file) for file in options.files],
            options.set,
            _log(options),
            launch=options.launch,
            dry_run=options.dry_run,
            only=options.only,
            num_parallel=options.jobs,
        )


def evaluate(options: argparse.Namespace) -> int:
    """`evaluate`: repeat the final test of a run with lm-eval."""
    _require_one_process("evaluate", "start it without mpirun")
    from fedsp_mpi.commands import evaluate, evaluation_results

    tasks = None
    if options.tasks is not None:
        tasks = tuple(name.strip() for name in options.tasks.split(","))
    evaluation_options = evaluate.Options(
        tasks=tasks,
        limit=options.limit,
        batch_tokens=options.batch_tokens,
        without_prompt=options.without_prompt,
        device=options.device,
        include=Path(options.include) if options.include else None,
    )
    folder = Path(options.folder)
    # The configuration that an advice to `fetch` names.
    options.config = str((folder if folder.is_dir() else folder.parent) / "config.yaml")
    log = _log(options)
    with _user_errors():
        evaluation = evaluate.evaluate(folder, evaluation_options, log)
    _show("\n" + evaluation_results.table(evaluation))
    with _user_errors():
        path = evaluation_results.write(evaluation)
    log.say(f"written to {path}")
    return 0


def ask(options: argparse.Namespace) -> int:
    """`ask`: answer a user of a run with tiers, or measure how well users are answered.

    Of two processes the second one is the user's, and shows the answer.
    """
    if options.text is not None and options.evaluate:
        raise Refused("ask: found a text and --evaluate, expected one of them", USAGE_ERROR)
    from fedsp_mpi.commands import ask

    with _user_errors():
        if options.evaluate:
            lines = ask.evaluate(
                options.folder, options.user, threshold=options.threshold, log=_log(options)
            )
        else:
            lines = ask.ask(
                options.folder,
                options.user,
                options.text,
                expert=options.expert,
                threshold=options.threshold,
            )
    if lines:
        _show(("\n\n" if options.evaluate else "\n").join(lines))
    return 0


def diff(options: argparse.Namespace) -> int:
    """`diff`: compare the prompts of two runs bit by bit; status 1 if any differ."""
    from fedsp_mpi.record import read
    from fedsp_mpi.report import difference

    with _user_errors():
        first = read(options.first)
        second = read(options.second)
        lines = difference(first, second)
    if not lines:
        _show(f"equal bits in {first.committed_rounds} rounds")
        return 0
    _show("\n".join(lines))
    return 1


def bench(options: argparse.Namespace) -> int:
    """`bench`: measure the overhead against the bare libraries, or the auxiliary model's worth."""
    log = _log(options)
    if options.what == "local":
        _bench_local(options, log)
    elif options.what == "wire":
        _bench_wire(options.repeats, log)
    elif options.what == "record":
        _bench_record(options, log)
    else:
        _bench_transfer(options, log)
    return 0


def completion(options: argparse.Namespace) -> int:
    """`completion`: print the script by which a shell completes the words of `fedsp-mpi`."""
    _require_one_process("completion", "start it without mpirun")
    from fedsp_mpi.commands import completion

    _show(completion.script(_parser(), options.shell))
    return 0


def _bench_local(options: argparse.Namespace, log: Log) -> None:
    from fedsp_mpi.commands import bench_local

    settings = _load(options.config, options.set)
    with _user_errors():
        timing = bench_local.local(settings, options.repeats, log)
    log.say(
        f"a client's local round {timing.package_seconds:.4f} s, bare loop "
        f"{timing.bare_seconds:.4f} s: ratio {timing.ratio:.3f}"
    )
    step = bench_local.step(settings, options.repeats)
    if step is not None:
        log.say(
            f"passes of a tuning step {step.package_seconds:.4f} s, by hand "
            f"{step.by_hand_seconds:.4f} s, stock peft {step.peft_seconds:.4f} s: ratios "
            f"{step.package_seconds / step.by_hand_seconds:.3f} and "
            f"{step.package_seconds / step.peft_seconds:.3f}"
        )


def _bench_wire(repeats: int, log: Log) -> None:
    from fedsp_mpi.comm import benchmark

    if (launcher_size() or 1) < 2:
        raise Refused(
            "bench wire: found one process, expected at least two; start it with mpirun -n 4"
        )
    times = benchmark.measure(repeats=repeats)
    if times:  # on the server only
        log.say(
            "broadcast + gather of {num_values:,} values among {ranks} ranks: {wire_seconds:.4f} "
            "s, sealed {sealed_seconds:.4f} s, bare mpi4py {bare_seconds:.4f} s: ratio "
            "{ratio:.3f}".format(**times)
        )
    waiting = benchmark.measure_waiting(repeats=min(repeats, 5))
    if waiting:
        log.say(
            "server's work while {ranks} - 1 ranks wait: x {broadcast_slowdown:.3f} in the "
            "broadcast, x {gather_slowdown:.3f} in the gather; a waiting rank uses "
            "{waiting_cores:.4f} cores".format(**waiting)
        )


def _bench_record(options: argparse.Namespace, log: Log) -> None:
    _require_one_process("bench record", "start it without mpirun")
    from tempfile import TemporaryDirectory

    from fedsp_mpi.record import RecordError, benchmark

    settings = _load(options.config, options.set)
    folder = Path(settings.run.folder).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix="bench-record-", dir=folder) as place:
            cost = benchmark.measure(Path(place) / "run", options.rounds, options.clients)
    except (OSError, RecordError) as error:
        raise Refused(
            f"run.folder: found {folder}, where nothing can be written: {error}"
        ) from None
    log.say(
        f"record of {options.rounds:,} rounds of {options.clients:,} clients: commit "
        f"{1000 * cost.first_seconds:.1f} ms at first, {1000 * cost.last_seconds:.1f} ms at last: "
        f"ratio {cost.last_seconds / cost.first_seconds:.2f}; {cost.final_bytes / 1e6:.1f} MB, "
        f"written {cost.written_bytes / cost.final_bytes:.3f} times, "
        f"{cost.peak_bytes / cost.final_bytes:.3f} times as much on disk at most in the end"
    )


def _bench_transfer(options: argparse.Namespace, log: Log) -> None:
    from fedsp_mpi.commands import bench_transfer

    settings = _load(options.config, options.set)
    with _user_errors():
        measurements = bench_transfer.transfer(settings, options.steps, log)
    _show(bench_transfer.table(measurements))


# -- helpers ---------------------------------------------------------------------------------------


def _load(path: str | None, overrides: list[str]) -> config.Config:
    """Load a configuration; a mistake in it is the user's."""
    with _user_errors():
        return config.load(path, overrides)


def _load_or_error(
    options: argparse.Namespace, values: dict[str, str] | None = None
) -> tuple[config.Config, ValueError | None]:
    """Load a configuration, or the default and what is wrong with it: all ranks must hear that."""
    try:
        return config.load(options.config, options.set, values), None
    except ValueError as error:
        return config.Config(), error


def _resumption_or_error(
    options: argparse.Namespace,
) -> tuple[config.Config, ValueError | None, Path]:
    """Load what `--resume FOLDER` needs, with the directory that its paths are relative to."""
    from fedsp_mpi.run.resuming import read_resumption

    working = Path.cwd()
    beside = {
        "a configuration": options.config,
        "--name": options.name,
        "--replace": options.replace,
    }
    try:
        for what, is_given in beside.items():
            if is_given:
                raise ValueError(
                    f"--resume {options.resume}: found {what} beside it, expected none: the "
                    "folder has its own; leave it out, or write --name NAME --resume"
                )
        resumption = read_resumption(Path(options.resume), options.set)
    except ValueError as error:
        return config.Config(), error, working
    except PermissionError as error:
        return config.Config(), ValueError(one_line(error)), working
    return resumption.config, None, resumption.directory


def _note_toy_settings(options: argparse.Namespace, log: Log) -> None:
    """Say whose settings a model has that is named without a configuration."""
    keys = {item.partition("=")[0].strip() for item in options.set}
    if options.config is None and "model.name" in keys:
        log.say(
            "note: model.name without a configuration: all other settings are the embedded toy's, "
            "recipe paper and learning rates of 0.1 included; begin from "
            "configs/own_text/start.yaml"
        )


@contextmanager
def _user_errors() -> Iterator[None]:
    """Turn a ValueError into Refused: the user's mistake, reported in one line.

    A rank that breaks the protocol is none: the guard ends the job, and no rank waits for ever.
    """
    try:
        yield
    except ValueError as error:
        from fedsp_mpi.comm import ProtocolError

        if isinstance(error, ProtocolError):
            raise
        raise Refused(str(error)) from None
    except PermissionError as error:
        raise Refused(one_line(error)) from None


def _require_one_process(verb: str, advice: str) -> None:
    num_processes = launcher_size() or 1
    if num_processes > 1:
        raise Refused(f"{verb}: found {num_processes} processes, expected one; {advice}")


def _fill_fetch_advice(text: str, options: argparse.Namespace) -> str:
    """Replace CONFIG in an advice to `fetch CONFIG` by what this command was given."""
    if "fetch CONFIG" not in text:
        return text
    words = list(getattr(options, "configs", None) or [getattr(options, "config", None) or ""])
    for setting in getattr(options, "set", []):
        if setting.startswith(("model.", "data.")):
            words.append(f"--set {shlex.quote(setting)}")
    return text.replace("fetch CONFIG", "fetch " + " ".join(word for word in words if word))


def _refusal_line(error: Refused, options: argparse.Namespace) -> str:
    """Return the one line that the user sees of a refusal."""
    line = _fill_fetch_advice(error_line(str(error)), options)
    return printable(line, keep=_PRINTED_CONTROLS)


def _escape_unprintable() -> None:
    """Escape what the locale cannot encode, such as a path that is not UTF-8; printing it would
    raise.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _show(text: str) -> None:
    """Print; a reader that stops before the end (`| head`) does not stop a run."""
    try:
        print(printable(text, keep=_PRINTED_CONTROLS), flush=True)
    except BrokenPipeError:
        # Otherwise the interpreter would complain again when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(line: str) -> None:
    """Print a line on rank 0."""
    if _is_rank_zero():
        _show(line)


def _log(options: argparse.Namespace) -> Log:
    """Return a log that speaks on rank 0 only, with bars where its user can see them."""
    is_heard = _is_rank_zero()
    bar = _BAR if is_heard and _shows_bars(options.progress) else None
    return Log(_show if is_heard else None, every=options.every, bar=bar)


def _shows_bars(choice: str) -> bool:
    """Return whether progress is shown by bars: if told to, or by itself on a terminal.

    Under mpirun the launcher stands between a rank and the terminal, so bars must be asked for.
    """
    if choice != "auto":
        return choice == "bars"
    is_terminal = sys.stdout.isatty() and sys.stderr.isatty()
    return is_terminal and os.environ.get("TERM", "dumb") != "dumb"


def _is_rank_zero() -> bool:
    return launcher_rank() in (None, 0)


def _with_verb(arguments: list[str]) -> list[str]:
    """Put `run` in front of arguments without a verb."""
    if not arguments:
        return ["run"]
    first = arguments[0]
    if first.startswith("-") and first not in ("-h", "--help", "--version"):
        return ["run", *arguments]
    return arguments


# -- arguments -------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """A parser that reports a mistake once, whatever the number of ranks."""

    def error(self, message: str):
        raise Refused(explained(message, self.prog), USAGE_ERROR)

    def _print_message(self, message, file=None):
        if _is_rank_zero():
            super()._print_message(message, file)


class _InPlaceOf(argparse.Action):
    """A switch with which another argument may be left out."""

    def __init__(self, option_strings, dest, *, other: argparse.Action, **settings):
        super().__init__(option_strings, dest, nargs=0, default=False, **settings)
        self._other = other

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, True)
        self._other.required = False


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fedsp_mpi", description="Federated tuning of soft prompts (FedSP) on MPI."
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_run(verbs)
    _add_check(verbs)
    _add_config(verbs)
    _add_fetch(verbs)
    _add_split(verbs)
    _add_plan(verbs)
    _add_report(verbs)
    _add_sweep(verbs)
    _add_evaluate(verbs)
    _add_ask(verbs)
    _add_diff(verbs)
    _add_bench(verbs)
    _add_completion(verbs)
    return parser


def _add_run(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("run", help="run an experiment (default verb)")
    _add_configuration(verb)
    verb.add_argument("--name", help="name of the run's folder below run.folder")
    verb.add_argument(
        "--replace", action="store_true", help="overwrite an existing run of that name"
    )
    verb.add_argument(
        "--resume",
        nargs="?",
        const="must",
        metavar="RUN",
        help="continue the run in a folder such as runs/NAME from its last checkpoint, on any "
        "number of ranks; with CONFIG and --name in its place: that run; "
        "auto: start it if there is none",
    )
    verb.set_defaults(run=run)


def _add_check(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser(
        "check", help="check cluster, configuration, model and data before a run"
    )
    _add_configuration(verb)
    verb.set_defaults(run=check)


def _add_config(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser(
        "config", help="print a configuration with all its defaults, or what each key means"
    )
    _add_configuration(verb)
    instead = verb.add_mutually_exclusive_group()
    instead.add_argument(
        "--schema",
        nargs="?",
        const="file",
        choices=("file", "sweep"),
        help="print the JSON schema of configuration files, or of sweep files, for editors",
    )
    instead.add_argument(
        "--reference", action="store_true", help="print every key with default, unit and meaning"
    )
    verb.set_defaults(run=show_config)


def _add_fetch(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser(
        "fetch", help="download models and data into the local cache, on a node with a network"
    )
    verb.add_argument("configs", nargs="*", metavar="CONFIG", help="YAML files")
    _add_settings(verb)
    verb.set_defaults(run=fetch)


def _add_split(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser(
        "split", help="write what the simulation deals out as one folder per silo"
    )
    _add_configuration(verb)
    verb.add_argument(
        "--to", required=True, metavar="FOLDER", help="a new folder, or that of a killed split"
    )
    verb.add_argument(
        "--replace", action="store_true", help="write a complete split in that folder anew"
    )
    verb.set_defaults(run=split)


def _add_plan(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser(
        "plan", help="estimate parameters, bytes, memory, FLOPs and hours of experiments"
    )
    verb.add_argument(
        "configs", nargs="*", metavar="CONFIG", help="YAML files; default: the embedded experiment"
    )
    _add_settings(verb)
    verb.add_argument(
        "--tokens", type=TOKENS, metavar="N", help="tokens per text; default: typical of the task"
    )
    verb.add_argument(
        "--tflops",
        type=TFLOPS,
        default=40.0,
        metavar="X",
        help="sustained speed of a GPU, in 10^12 FLOPs per second; default: 40",
    )
    verb.add_argument(
        "--markdown", action="store_true", help="two Markdown tables of all configurations"
    )
    verb.set_defaults(run=plan)


def _add_report(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("report", help="show tables and pictures of finished runs")
    verb.add_argument(
        "runs", nargs="+", metavar="RUN", help="a run's folder, its run.h5, or a folder of runs"
    )
    kind = verb.add_mutually_exclusive_group()
    kind.add_argument(
        "--markdown",
        action="store_true",
        help="one Markdown table of all runs, with mean and deviation over seeds",
    )
    kind.add_argument(
        "--table",
        choices=("comparison", "phases", "tiers"),
        help="comparison: a row for each method, a column for each task; phases: a row for each "
        "phase and method, of runs that start from one another's results (`after`); tiers: "
        "personal, expert and general models on own, domain's and other text",
    )
    kind.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="everything that the records say as one JSON document; without FILE, on the terminal",
    )
    verb.add_argument(
        "--html", metavar="FILE", help="one run as a page that needs nothing else (.html)"
    )
    verb.add_argument(
        "--csv", metavar="FOLDER", help="the tables of one run, a CSV file each (rounds.csv, ...)"
    )
    verb.add_argument("--picture", metavar="FILE", help="of --table: bars or phases (.png or .svg)")
    verb.add_argument(
        "--plot", metavar="FILE", help="losses over rounds, bytes and seconds (.png or .svg)"
    )
    verb.add_argument("--silos", metavar="FILE", help="losses of each silo by round (.png or .svg)")
    verb.add_argument(
        "--labels",
        metavar="FILE",
        help="scores by the number of labels, and how many pseudo-labels are right (.png or .svg)",
    )
    verb.set_defaults(run=report)


def _add_sweep(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser(
        "sweep", help="run every task with every method and seed of a sweep file"
    )
    verb.add_argument(
        "files", nargs="+", metavar="FILE", help="YAML file: folder, base, seeds, tasks, methods"
    )
    verb.add_argument(
        "--launch",
        default="",
        metavar="COMMAND",
        help="command that starts a run's processes, e.g. 'mpirun -n 4'",
    )
    verb.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="run only this trial, e.g. sst2-fedsp-1 or 'sst2-*-1'; may be repeated",
    )
    verb.add_argument(
        "--jobs",
        type=JOBS,
        default=1,
        metavar="N",
        help="runs at a time, each with its share of cores and GPUs; default: 1",
    )
    verb.add_argument(
        "--dry-run", action="store_true", help="check all trials and list them, but run none"
    )
    _add_settings(verb)
    verb.set_defaults(run=sweep)


def _add_evaluate(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser(
        "evaluate", help="test a finished run with lm-eval (pip install 'fedsp_mpi[evaluate]')"
    )
    verb.add_argument("folder", metavar="RUN", help="folder of a complete run, or its run.h5")
    verb.add_argument(
        "--tasks", metavar="A,B,C", help="lm-eval's task names; default: the run's own task"
    )
    verb.add_argument("--limit", type=COUNT, metavar="N", help="first N questions of each task")
    verb.add_argument(
        "--batch-tokens",
        type=COUNT,
        metavar="N",
        help="positions per forward pass; default: the run's own number",
    )
    verb.add_argument(
        "--without-prompt", action="store_true", help="test only the model as it was before the run"
    )
    verb.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    verb.add_argument("--include", metavar="FOLDER", help="your own task files for lm-eval")
    _add_every(verb)
    verb.set_defaults(run=evaluate)


def _add_ask(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser(
        "ask", help="answer a user of a run with tiers, by its own model or by an expert"
    )
    verb.add_argument("folder", metavar="RUN", help="folder of a complete run with method=plmm")
    text = verb.add_argument("text", metavar="TEXT", help="the question")
    verb.add_argument("--user", metavar="NAME", help="whose personal prompt answers")
    verb.add_argument("--expert", metavar="NAME", help="of the user's; default: its first one")
    verb.add_argument(
        "--threshold",
        type=FRACTION,
        default=0.6,
        metavar="P",
        help="of confidence, below which the expert is asked; default: 0.6",
    )
    verb.add_argument(
        "--evaluate",
        action=_InPlaceOf,
        other=text,
        help="measure routing on held-out text of the user, without --user of all users, and what "
        "the personal model costs",
    )
    _add_every(verb)
    verb.set_defaults(run=ask)


def _add_diff(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("diff", help="compare the prompts of two runs, bit by bit")
    verb.add_argument("first", metavar="RUN")
    verb.add_argument("second", metavar="RUN")
    verb.set_defaults(run=diff)


def _add_bench(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("bench", help="measure the overhead over bare torch and bare mpi4py")
    verb.add_argument(
        "what",
        choices=("local", "wire", "record", "transfer"),
        help="wire: start it under mpirun; the others run in one process",
    )
    _add_configuration(verb)
    verb.add_argument(
        "--repeats", type=COUNT, default=15, metavar="N", help="counted repetitions; default: 15"
    )
    verb.add_argument(
        "--steps",
        type=COUNT,
        default=20,
        metavar="N",
        help="steps of prompt tuning, for transfer; default: 20",
    )
    verb.add_argument(
        "--rounds", type=RECORD_ROUNDS, default=200, metavar="N", help="for record; default: 200"
    )
    verb.add_argument(
        "--clients",
        type=COUNT,
        default=100,
        metavar="N",
        help="of each round, for record; default: 100",
    )
    verb.set_defaults(run=bench)


def _add_completion(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser(
        "completion", help="print a script by which a shell completes the words of fedsp-mpi"
    )
    verb.add_argument("shell", choices=("bash", "zsh", "fish"))
    verb.set_defaults(run=completion)


def _add_configuration(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "config",
        nargs="?",
        metavar="CONFIG",
        help="YAML file; default: the embedded experiment",
    )
    _add_settings(verb)


def _add_settings(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key, e.g. federation.rounds=10; may be repeated",
    )
    _add_every(verb)


def _add_every(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--every",
        type=SECONDS,
        default=_PROGRESS_SECONDS,
        metavar="S",
        help="seconds between progress lines; default: 5",
    )
    verb.add_argument(
        "--progress",
        choices=("auto", "bars", "lines"),
        default="auto",
        help="show progress by bars or by lines; default: bars on a terminal, without mpirun",
    )
