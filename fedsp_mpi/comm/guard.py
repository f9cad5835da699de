"""One failure, one report, and the whole job ends within seconds.

MPI does not end a job because one of its processes raised: the others wait for it for ever. The
guard surrounds everything that the main thread does, from before the imports that can fail. This
module (and ownership.py) therefore needs only the standard library, and uses MPI only once another
module has imported it.
"""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NoReturn

from fedsp_mpi.files import ownership

from .topology import launcher_rank, launcher_size
from .watch import Watch

REPORT = "failure.txt"
# Seconds:
_WAIT_FOR_ABORT = 5.0  # that a rank with a later report waits for the abort of the reporting one
_WAIT_FOR_STACKS = 0.5  # for the stacks of other ranks to reach the launcher
_WAIT_FOR_REPORT = 0.15  # for a report to reach the launcher
_LAST_RESORT = 10.0  # for a process that is to end, after which it does in any case
_TURN = 0.5  # between two ranks' turns to report
_MAX_TURN = 2.0
_PHASE_ATTRIBUTE = "_fedsp_phase"  # of an exception: where it was raised
_NOTHING_BEGUN = "nothing was lost: the same command begins, or goes on with what it found\n"
_STOP_SIGNAL = signal.SIGUSR1
_STACKS_SIGNAL = signal.SIGUSR2
_END_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
INTERRUPTED = 130  # exit status after Ctrl-C


class Refused(Exception):
    """The run does not begin, or does not go on, though nothing is broken.

    Every rank raises it; the user sees one line, not a crash.

    Attributes:
        exit_status: 2 if the user asked for something that cannot be run; 75 (try again) if the run
            was requested to stop; 0 if there is nothing to do.
    """

    def __init__(self, text: str, exit_status: int = 2) -> None:
        super().__init__(text)
        self.exit_status = exit_status


@dataclass(frozen=True)
class PhaseInfo:
    """The innermost phase, with the round and client of the nearest phase that has them.

    Attributes:
        phase: its name.
        round: number of the round.
        client: what messages call the client.
    """

    phase: str = "start-up"
    round: int | None = None
    client: str | None = None

    def __str__(self) -> str:
        parts = []
        if self.round is not None:
            parts.append(f"round {self.round}")
        if self.client is not None:
            parts.append(self.client)
        parts.append(f"phase {self.phase!r}")
        return ", ".join(parts)


class Guard:
    """Ends the whole MPI job, with one readable report, when nothing else catches an error.

    There is one guard in a process, because a process has one main thread and one job to end:

        with guard("run"):                       # before any import that can fail
            guard.report_into(folder)            # once there is a run folder; on rank 0 first
            with guard.phase("merge", round=3):  # phases nest
                ...

    What happens to an exception that leaves the `with`, on the main thread or on another one:
        Exception: report on stderr (and in `failure.txt`), MPI abort with status 1. The other ranks
            need not do anything. An error with a true `explains_itself` is reported without the
            stack, which would tell a user nothing.
        Refused: passes through; every rank raises it and the caller prints one line.
        SystemExit: passes through where no rank would wait for this one: in a single process, with
            status 0 between phases, or after a Refused. Elsewhere it is reported like any error.
        KeyboardInterrupt: one line says so, and the job ends with status 130.

    A DeadlineError ends the job with its own status. Before that, the missing ranks on this host
    are sent SIGUSR2, upon which they write their stacks to stderr, even from a blocking call.

    SIGUSR1 sets `stop_requested`, which the main thread polls. After the `with` the signal is
    ignored: a process that is about to end must not be killed by a request to stop. SIGTERM and
    SIGHUP end a process at once, even in a long computation, after one line that says so; the
    launcher then ends the others. The same line is left by a rank that sees another one of its host
    die, while the launcher has not ended it yet: the lowest rank of a host watches the others, and
    they watch it.

    Attributes:
        stop_requested: the run was requested to stop after the current round.
    """

    def __init__(self) -> None:
        self._verb = "start-up"
        self._folder: Path | None = None
        self._advice = ""  # what the user should do after the end of the job
        self._phases = [PhaseInfo()]  # outermost first
        self._reporting = threading.Lock()
        self._thread_hook = threading.excepthook
        self._peers: list[tuple[str, int]] = []  # (host, process id) by rank
        self._client_name: Callable[[int], str] = "client {}".format
        self._watch = Watch(_END_SIGNALS, self._signalled, self._rank_died)
        self.stop_requested = False

    def __call__(self, verb: str) -> Guard:
        """Name what is guarded (the verb of the command line), for the report."""
        self._verb = verb
        return self

    def __enter__(self) -> Guard:
        self._thread_hook = threading.excepthook
        threading.excepthook = self._thread_failed
        with suppress(ValueError):  # only the main thread may set signal handlers
            signal.signal(_STOP_SIGNAL, self._request_stop)
            self._watch.start()
        with suppress(ValueError, OSError, AttributeError):  # stderr may not be a file
            faulthandler.register(_STACKS_SIGNAL, all_threads=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> Literal[False]:
        threading.excepthook = self._thread_hook
        with suppress(ValueError):
            signal.signal(_STOP_SIGNAL, signal.SIG_IGN)
            self._watch.stop()
        if isinstance(error, KeyboardInterrupt):
            with suppress(ValueError):
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asks twice hears it once
            self._say_stopped("interrupted (Ctrl-C)", self.phase_info(error))
            self._end(INTERRUPTED)
        elif isinstance(error, SystemExit):
            if self._leaves_others_waiting(error):
                code = error.code
                self._fail(error, code if isinstance(code, int) and code != 0 else 1)
        elif error is not None and not isinstance(error, Refused):
            self._fail(error, getattr(error, "exit_status", 1))
        self._folder = None
        self._advice = ""
        return False

    @contextmanager
    def within_program(self, verb: str) -> Iterator[None]:
        """Guard a part of a program of the user's, such as a notebook, and leave nothing behind.

        In a single process every error passes through, and no thread is watched. Among several
        ranks it is as in `with guard(verb)`. Afterwards signals are handled as before.
        """
        is_main_thread = threading.current_thread() is threading.main_thread()
        previous = signal.getsignal(_STOP_SIGNAL) or signal.SIG_DFL
        self.stop_requested = False
        try:
            if _size() > 1:
                with self(verb):
                    yield
            else:
                if is_main_thread:
                    signal.signal(_STOP_SIGNAL, self._request_stop)
                yield
        finally:
            if is_main_thread:
                signal.signal(_STOP_SIGNAL, previous)
            with suppress(ValueError, OSError, AttributeError):
                faulthandler.unregister(_STACKS_SIGNAL)
            self._folder = None
            self._advice = ""
            self.stop_requested = False

    @contextmanager
    def phase(
        self, name: str, *, round: int | None = None, client: int | None = None
    ) -> Iterator[None]:
        """Name what happens inside the `with`.

        Args:
            name: for the report.
            round: number of the round; None: that of the enclosing phase.
            client: client id; None: that of the enclosing phase.
        """
        depth = len(self._phases)
        outer = self._phases[-1]
        info = PhaseInfo(
            name,
            outer.round if round is None else round,
            outer.client if client is None else self._client_name(client),
        )
        self._phases.append(info)
        try:
            yield
        except BaseException as error:
            # The innermost phase that the error leaves is the one to report.
            if not hasattr(error, _PHASE_ATTRIBUTE):
                setattr(error, _PHASE_ATTRIBUTE, info)
            raise
        finally:
            del self._phases[depth:]

    def phase_info(self, error: BaseException | None = None) -> PhaseInfo:
        """Return the current phase, or the phase in which `error` was raised."""
        return getattr(error, _PHASE_ATTRIBUTE, self._phases[-1])

    def report_into(self, folder: str | os.PathLike[str], advice: str = "") -> None:
        """Write reports also to `failure.txt` in `folder`; of several failing ranks one reports.

        Rank 0 moves the report of an earlier run out of the way; the others call this afterwards.

        Args:
            folder: of the run.
            advice: last line of every report: how to go on.
        """
        self._folder = Path(folder)
        self._advice = advice
        earlier = self._folder / REPORT
        if _rank() == 0 and os.path.lexists(earlier):
            ownership.set_aside(earlier, f"failure-{int(earlier.lstat().st_mtime)}.txt")

    def set_peers(self, peers: Iterable[tuple[str, int]]) -> None:
        """Set (host, process id) of every rank, by rank, and watch those of this host."""
        self._peers = list(peers)
        host = socket.gethostname()
        local_pids = {
            rank: pid for rank, (peer_host, pid) in enumerate(self._peers) if peer_host == host
        }
        rank = _rank()
        lowest = min(local_pids, default=rank)
        self._watch.follow(
            {
                peer: pid
                for peer, pid in local_pids.items()
                if peer != rank and lowest in (peer, rank)
            }
        )

    def expect_ends(self) -> None:
        """Watch the other ranks no more: they are about to end."""
        self._watch.follow({})

    def name_clients(self, client_name: Callable[[int], str]) -> None:
        """Set what messages call a client of an id."""
        self._client_name = client_name

    def _request_stop(self, *_: object) -> None:
        self.stop_requested = True

    def _leaves_others_waiting(self, error: SystemExit) -> bool:
        if not _has_other_ranks() or isinstance(error.__context__, Refused):
            return False
        return bool(error.code) or self.phase_info(error) != PhaseInfo()

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        error = failure.exc_value
        if error is not None and not isinstance(error, SystemExit):
            name = failure.thread.name if failure.thread else "unknown"
            self._fail(error, 1, thread=name)

    def _fail(self, error: BaseException, status: int, *, thread: str | None = None) -> None:
        """Report an error of the main thread, or of another `thread`, and end the job."""
        if not self._reporting.acquire(blocking=False):
            # Another thread of this process is reporting, and will end the process meanwhile.
            time.sleep(2 * _WAIT_FOR_ABORT)
        title = (
            f"{self._verb} failed: rank {_rank()} of {_size()} on host {socket.gethostname()}, "
            f"{self.phase_info(error)}"
        )
        if thread is not None:
            title += f", thread {thread!r}"
        if getattr(error, "explains_itself", False):
            text = f"{title}\nfedsp_mpi: {error}\n"
        else:
            text = title + "\n" + "".join(traceback.format_exception(error))
        if _size() == 1 or self._is_reporter(text + self._last_line()):
            _write(text)
            self._request_stacks(getattr(error, "missing", ()))
            _write(self._last_line())
            # The text passes through the launcher, which drops what it has not read when it hears
            # of the abort.
            time.sleep(_WAIT_FOR_REPORT if _size() > 1 else 0)
        self._end(status, on_main_thread=thread is None)

    def _signalled(self, number: int) -> None:
        """End the job on a signal; called by the thread that watches."""
        if not self._reporting.acquire(blocking=False):
            return  # an error is being reported, and ends the job
        _end_in_any_case()
        reason = f"{signal.Signals(number).name}, a request to end"
        self._say_stopped(reason, self._phases[-1])
        self._end(128 + number, on_main_thread=False)

    def _rank_died(self, rank: int) -> None:
        """Say that another rank has died; called by the thread that watches.

        The launcher ends the job. A rank that could still speak has written its own report.
        """
        if self._folder is None or self._reporting.locked():
            return
        host, pid = self._peers[rank]
        text = (
            f"{self._verb} stopped: rank {rank} of {_size()} (process {pid} on host {host}) died, "
            f"while rank {_rank()} was in {self._phases[-1]}: killed (kill -9, or no memory was "
            f"left), or crashed in a library\n{self._last_line()}"
        )
        with suppress(OSError):
            ownership.write_new(self._folder / REPORT, text)
            _write(text)

    def _say_stopped(self, reason: str, where: PhaseInfo) -> None:
        """Say in one line, on one rank, what ended a run, and how to go on."""
        if self._folder is None and self._verb != "run":
            return
        text = (
            f"{self._verb} stopped: rank {_rank()} of {_size()} on host {socket.gethostname()}, "
            f"{where}: {reason}\n"
        )
        text += self._last_line() or _NOTHING_BEGUN
        if _size() == 1 or self._is_reporter(text):
            if self._folder is not None and _size() == 1:
                with suppress(OSError):
                    ownership.write_new(self._folder / REPORT, text)
            _write(text)
            time.sleep(_WAIT_FOR_REPORT if _size() > 1 else 0)

    def _last_line(self) -> str:
        return f"{self._advice}\n" if self._advice else ""

    def _request_stacks(self, ranks: Iterable[int]) -> None:
        """Make those of `ranks` that run on this host write their stacks to stderr."""
        missing = set(ranks)
        host = socket.gethostname()
        pids = [
            pid
            for rank, (peer_host, pid) in enumerate(self._peers)
            if rank in missing and peer_host == host
        ]
        for pid in pids:
            with suppress(OSError):
                os.kill(pid, _STACKS_SIGNAL)
        if pids:
            time.sleep(_WAIT_FOR_STACKS)

    def _is_reporter(self, text: str) -> bool:
        """Return True if this rank's report is the one that is shown.

        If not, the rank whose report it is ends the job meanwhile.
        """
        if self._folder is not None:
            try:
                ownership.write_new(self._folder / REPORT, text)
                return True
            except FileExistsError:
                time.sleep(_WAIT_FOR_ABORT)
                return False
            except OSError:
                pass  # a full or lost disk must not hide the error: go on as without a folder
        # The lowest failing rank reports, and ends the others before their turn: launchers need up
        # to 0.3 s for that.
        time.sleep(min(_TURN * _rank(), _MAX_TURN))
        return True

    def _end(self, status: int, *, on_main_thread: bool = True) -> None:
        """End the job with `status`.

        A single process ends by SystemExit, which only the main thread can raise; from another
        thread it exits at once.
        """
        sys.stdout.flush()
        mpi = _running_mpi()
        if mpi is not None and mpi.COMM_WORLD.size > 1:
            _end_in_any_case()
            mpi.COMM_WORLD.Abort(status)
            os._exit(status)
        if _size() > 1 and not _mpi_is_over():
            # The other ranks wait in MPI_Init. All launchers end a job when a process dies of a
            # signal, but not all of them when it ends with a status.
            os.kill(os.getpid(), signal.SIGKILL)
        if not on_main_thread:
            os._exit(status)
        self._folder = None
        self._reporting = threading.Lock()
        raise SystemExit(status) from None


def _end_in_any_case() -> None:
    """Have this process ended after a while, whatever keeps it: MPI's abort may wait for a lock.

    The clock is a thread of C, which needs no turn of the interpreter.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    faulthandler.dump_traceback_later(_LAST_RESORT, exit=True, file=nowhere)


def _write(text: str) -> None:
    """Write to stderr, whose reader may be gone: that must not hide how the job ended."""
    with suppress(OSError, ValueError):
        sys.stderr.write(text)
        sys.stderr.flush()


def finalize() -> None:
    """Finalise MPI, if it runs: collective, and the last thing that ranks do together."""
    mpi = _running_mpi()
    if mpi is not None:
        mpi.Finalize()


def leave(status: int) -> NoReturn:
    """End this process with all output written and MPI finalised; take down no Python object.

    The interpreter would take down torch and transformers object by object, for a second of time
    on each rank, and a thread of gloo that wants its lock meanwhile would abort the process. Under
    a launcher C's `exit` ends the process: it runs the handlers by which MPICH tells its launcher
    that this rank is done. Of ranks that end by `_exit`, even behind MPI_Finalize, mpirun reports
    9 or 0 every few jobs, whatever their status.

    Args:
        status: exit status.
    """
    has_mpi = _mpi() is not None
    finalize()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    if launcher_rank() is not None or has_mpi:
        # Called with the interpreter's lock: no other thread of Python runs meanwhile.
        ctypes.PyDLL(None).exit(status)
    os._exit(status)


def _mpi() -> Any:
    """Return the module mpi4py.MPI if another module has imported it; None otherwise."""
    return sys.modules.get("mpi4py.MPI")


def _mpi_is_over() -> bool:
    mpi = _mpi()
    return mpi is not None and mpi.Is_finalized()


def _running_mpi() -> Any:
    """Return the module mpi4py.MPI between MPI_Init and MPI_Finalize; None otherwise."""
    mpi = _mpi()
    return mpi if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized() else None


def _has_other_ranks() -> bool:
    mpi = _running_mpi()
    return mpi is not None and mpi.COMM_WORLD.size > 1


def _rank() -> int:
    return _running_mpi().COMM_WORLD.rank if _has_other_ranks() else launcher_rank() or 0


def _size() -> int:
    return _running_mpi().COMM_WORLD.size if _has_other_ranks() else launcher_size() or 1


guard = Guard()
