"""One failure, one report, and the whole job ends within seconds.

MPI does not end a job because one of its processes raised: the others wait for it for ever. The
guard stands around everything the main thread does, from before the imports that can fail. This
module therefore needs only the standard library (ownership.py too), and takes MPI from those who
imported it before.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from fedsp_mpi.files import ownership

from .topology import launcher_rank, launcher_size

REPORT = "failure.txt"
_PATIENCE = 5.0  # seconds that a rank whose report came too late waits for the other's abort
_STACKS = 0.5  # seconds for the stacks of other ranks to leave
_CARRY = 0.15  # seconds for a report to leave through the launcher
_SCENE = "_fedsp_scene"
_STOP, _SHOW = signal.SIGUSR1, signal.SIGUSR2


class Refused(Exception):
    """The run does not begin, or does not go on, and nothing is broken. Every rank raises it: one
    line, no crash.

    Attributes:
        exit_status: 2, if the user asked for something that cannot be run; 75 (try again), if the
            run was told to stop; 0, if there is nothing to do.
    """

    def __init__(self, text: str, exit_status: int = 2) -> None:
        super().__init__(text)
        self.exit_status = exit_status


@dataclass(frozen=True)
class PhaseInfo:
    """What was going on: the innermost phase, with the round and the client of the nearest phase
    that knows them.
    """

    phase: str = "start-up"
    round: int | None = None
    client: int | None = None

    def __str__(self) -> str:
        parts = [f"round {self.round}"] if self.round is not None else []
        parts += [f"client {self.client}"] if self.client is not None else []
        return ", ".join([*parts, f"phase {self.phase!r}"])


class Guard:
    """Ends the whole MPI job, with one readable report, when an error gets past everybody else.

    There is one in a process, `guard`, because a process has one main thread and one job to end:

        with guard("run"):                          # before any import that can fail
            guard.report_into(folder)               # as soon as there is a run folder; on rank 0
            first with guard.phase("merge", round=3):     # phases nest
                ...

    What happens to an exception that leaves the `with`, on the main thread or on another one:
        Exception: report on stderr (and in `failure.txt`), MPI abort with status 1. No other rank
        needs to do anything.
        Refused: passes through; every rank has it and the caller prints one line.
        SystemExit: passes through where it harms nobody: one process, status 0 between phases, or
            after a Refused. Elsewhere the other ranks would wait for this one, so it is reported
            like any other error.
        KeyboardInterrupt: the job ends without a report.
    A DeadlineError ends the job with its own status, after the ranks of this host that did not
    report have been asked for their stacks (SIGUSR2), which they write to stderr even from inside a
    blocking call. SIGUSR1 sets `told_to_stop`; what becomes of that is the main thread's business.
    After the `with` it is ignored: a process that is about to end must not be killed by a request
    to stop. SIGTERM keeps its default action, which ends a process at once even in the middle of a
    long computation; the launcher ends the others.
    """

    def __init__(self) -> None:
        self._where = "start-up"
        self._folder: Path | None = None
        self._scenes = [PhaseInfo()]
        self._speaking = threading.Lock()
        self._old_hook = threading.excepthook
        self._peers: list[tuple[str, int]] = []
        self.told_to_stop = False

    def __call__(self, where: str) -> Guard:
        """Name what is guarded (the verb of the command line); the report repeats it."""
        self._where = where
        return self

    def __enter__(self) -> Guard:
        self._old_hook = threading.excepthook
        threading.excepthook = self._thread_failed
        with suppress(ValueError):  # not on the main thread: then others see to signals
            signal.signal(_STOP, self._note_stop)
        with suppress(ValueError, OSError, AttributeError):  # stderr may be no file
            faulthandler.register(_SHOW, all_threads=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> Literal[False]:
        threading.excepthook = self._old_hook
        with suppress(ValueError):
            signal.signal(_STOP, signal.SIG_IGN)
        if isinstance(error, KeyboardInterrupt):
            self._end(130)
        elif isinstance(error, SystemExit):
            if self._leaves_others_waiting(error):
                self._fail(
                    error, "", error.code if isinstance(error.code, int) and error.code else 1
                )
        elif error is not None and not isinstance(error, Refused):
            self._fail(error, "", getattr(error, "exit_status", 1))
        self._folder = None
        return False

    @contextmanager
    def phase(
        self, name: str, *, round: int | None = None, client: int | None = None
    ) -> Iterator[None]:
        """Say what happens inside the `with`.

        Round and client are inherited from the phase around it.
        """
        depth, outer = len(self._scenes), self._scenes[-1]
        scene = PhaseInfo(
            name,
            outer.round if round is None else round,
            outer.client if client is None else client,
        )
        self._scenes.append(scene)
        try:
            yield
        except BaseException as error:
            if not hasattr(error, _SCENE):
                setattr(error, _SCENE, scene)
            raise
        finally:
            del self._scenes[depth:]

    def scene(self, error: BaseException | None = None) -> PhaseInfo:
        """What is going on now, or what was going on when `error` was raised."""
        return getattr(error, _SCENE, self._scenes[-1])

    def report_into(self, folder: str | os.PathLike[str]) -> None:
        """From now on a report also goes to `failure.txt` in `folder`, and of several failing ranks
        one reports.

        Rank 0 moves the report of an earlier run out of the way; the others call this after it did.
        """
        self._folder = Path(folder)
        old = self._folder / REPORT
        if _rank() == 0 and old.exists():
            ownership.set_aside(old, f"failure-{int(old.stat().st_mtime)}.txt")

    def know_peers(self, peers: Iterable[tuple[str, int]]) -> None:
        """Where every rank lives: (host, process id), by rank."""
        self._peers = [(host, pid) for host, pid in peers]

    def _note_stop(self, *_: object) -> None:
        self.told_to_stop = True

    def _leaves_others_waiting(self, error: SystemExit) -> bool:
        if not _others_started() or isinstance(error.__context__, Refused):
            return False
        return bool(error.code) or self.scene(error) != PhaseInfo()

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        if failure.exc_value is not None and not isinstance(failure.exc_value, SystemExit):
            name = failure.thread.name if failure.thread else "unknown"
            self._fail(failure.exc_value, f", thread {name!r}", 1, hard=True)

    def _fail(self, error: BaseException, thread: str, status: int, hard: bool = False) -> None:
        if not self._speaking.acquire(blocking=False):
            time.sleep(2 * _PATIENCE)  # another thread of this process is reporting and will end us
        where = f"rank {_rank()} of {_size()} on host {socket.gethostname()}"
        title = f"{self._where} failed: {where}, {self.scene(error)}{thread}\n"
        text = title + "".join(traceback.format_exception(error))
        if _size() == 1 or self._may_speak(text):
            sys.stderr.write(text)
            sys.stderr.flush()
            self._ask_for_stacks(getattr(error, "missing", ()))
            # The text goes through the launcher, which throws away what it has not read when it
            # hears of the abort.
            time.sleep(_CARRY if _size() > 1 else 0)
        self._end(status, hard)

    def _ask_for_stacks(self, ranks: Iterable[int]) -> None:
        """Have the ranks of this host that are waited for write their stacks to stderr."""
        here = socket.gethostname()
        asked = [
            pid
            for rank, (host, pid) in enumerate(self._peers)
            if rank in tuple(ranks) and host == here
        ]
        for pid in asked:
            with suppress(OSError):
                os.kill(pid, _SHOW)
        time.sleep(_STACKS if asked else 0)

    def _may_speak(self, text: str) -> bool:
        """Whether this rank's report is the one; if not, the rank that has it is ending the job
        meanwhile.
        """
        if self._folder is not None:
            try:
                ownership.write_new(self._folder / REPORT, text)
                return True
            except FileExistsError:
                time.sleep(_PATIENCE)
                return False
            except OSError:
                pass  # a full or lost disk must not hide the error: go on as without a folder
        # The lowest failing rank speaks, and ends the others before their turn: launchers need up
        # to 0.3 s for that.
        time.sleep(min(0.5 * _rank(), 2.0))
        return True

    def _end(self, status: int, hard: bool = False) -> None:
        """End the job with `status`; a process that is alone leaves by SystemExit, or hard from
        another thread.
        """
        sys.stdout.flush()
        mpi = _running_mpi()
        if mpi is not None and mpi.COMM_WORLD.size > 1:
            mpi.COMM_WORLD.Abort(status)
            os._exit(status)
        if _size() > 1 and not _mpi_is_over():
            # The others wait for us in MPI's start. Launchers end a job for a signal, not all of
            # them for a status.
            os.kill(os.getpid(), signal.SIGKILL)
        if hard:
            os._exit(status)
        self._folder = None
        self._speaking = threading.Lock()
        raise SystemExit(status) from None


def _mpi() -> Any:
    return sys.modules.get("mpi4py.MPI")


def _mpi_is_over() -> bool:
    return _mpi() is not None and _mpi().Is_finalized()


def _running_mpi() -> Any:
    mpi = _mpi()
    return mpi if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized() else None


def _others_started() -> bool:
    mpi = _running_mpi()
    return mpi is not None and mpi.COMM_WORLD.size > 1


def _rank() -> int:
    return _running_mpi().COMM_WORLD.rank if _others_started() else launcher_rank() or 0


def _size() -> int:
    return _running_mpi().COMM_WORLD.size if _others_started() else launcher_size() or 1


guard = Guard()
