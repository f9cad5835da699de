"""Processes beside each other, each with its share of cores and GPUs; a signal to this process goes
to all of them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import RLock
from types import FrameType
from typing import Any

from fedsp_mpi.config.parsing import ConfigError

_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class ResourceSlice:
    """What one of the processes may use: cores, and the value of CUDA_VISIBLE_DEVICES; None leaves
    that as it is.
    """

    cores: frozenset[int]
    devices: str | None = None


def places(number: int) -> list[ResourceSlice]:
    """Equal shares of the cores that this process may use, and of its GPUs; places share GPUs if
    there are too few.

    Raises:
        ConfigError: there are fewer cores than places.
    """
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= number <= len(cores):
        raise ConfigError(
            f"--jobs: found {number}, expected 1 to {len(cores)}, the cores that this "
            "process may use"
        )
    if number == 1:
        return [ResourceSlice(frozenset(cores))]
    share, devices = len(cores) // number, _devices()
    each = max(1, len(devices) // number)
    starts = [place * each % len(devices) for place in range(number)] if devices else [0] * number
    return [
        ResourceSlice(
            frozenset(cores[place * share : (place + 1) * share]),
            ",".join(devices[start : start + each]) if devices else None,
        )
        for place, start in enumerate(starts)
    ]


def _devices() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if (given := os.environ.get(_VISIBLE)) is not None:
        return [name.strip() for name in given.split(",") if name.strip()]
    return [str(number) for number in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]


class Jobs:
    """Runs commands, each at a place that is free, and passes signals on to them; `told` is the
    last that came.

    Once a signal came, nothing is started any more. `run` may be called by as many threads as there
    are places.

    Args:
        at: the places, all of them free.
    """

    def __init__(self, at: Sequence[ResourceSlice]) -> None:
        self.told: int | None = None
        self._free: SimpleQueue[ResourceSlice] = SimpleQueue()
        for place in at:
            self._free.put(place)
        self._children: list[subprocess.Popen[bytes]] = []
        self._lock = (
            RLock()
        )  # the main thread takes it in `_pass_on` alone, which another signal may interrupt
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Jobs:
        for number in _PASSED_ON:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                self._before[number] = signal.signal(number, self._pass_on)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        with self._lock:
            self.told = number
            for child in self._children:
                child.send_signal(number)

    def run(self, command: Sequence[str], log: Path) -> tuple[int | None, float]:
        """The exit status of a command, None if it was not started, and its seconds. Not for the
        main thread.

        Its output is added to `log`. The command has a process group of its own: Ctrl-C would reach
        it twice.
        """
        place, begun = self._free.get(), time.monotonic()
        try:
            with self._lock:
                if self.told is not None:
                    return None, 0.0
                child = self._start(command, log, place)
                self._children.append(child)
            try:
                return child.wait(), time.monotonic() - begun
            finally:
                with self._lock:
                    self._children.remove(child)
        finally:
            self._free.put(place)

    def _start(
        self, command: Sequence[str], log: Path, place: ResourceSlice
    ) -> subprocess.Popen[bytes]:
        named = {} if place.devices is None else {_VISIBLE: place.devices}
        os.sched_setaffinity(0, place.cores)  # of this thread, which the process inherits
        with log.open("ab") as out:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                process_group=0,
                env={**os.environ, **named},
            )


def last_words(text: str) -> str:
    """The line of a failed run's output that says why: of its traceback, of the package, or just
    the last one.

    What launchers say of a failing rank comes after it.
    """
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    traces = [at for at, line in enumerate(lines) if line.startswith("Traceback (")]
    if traces:
        return next((line for line in lines[traces[-1] + 1 :] if not line[0].isspace()), lines[-1])
    own = [line for line in lines if line.startswith("fedsp_mpi: ")]
    return (own or lines or ["it said nothing"])[-1]
