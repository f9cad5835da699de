"""Run processes beside each other, each with its share of cores and GPUs, and forward signals."""

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
from fedsp_mpi.record import atomic

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class ResourceSlice:
    """The cores and GPUs of one process.

    Attributes:
        cores: numbers of the cores that it may use.
        devices: its value of CUDA_VISIBLE_DEVICES; None leaves that variable as it is.
    """

    cores: frozenset[int]
    devices: str | None = None


def split_resources(num_slices: int) -> list[ResourceSlice]:
    """Split the cores and GPUs of this process into equal shares.

    Equal, because bits of a result depend on the number of threads. Slices share GPUs if there are
    fewer GPUs than slices.

    Raises:
        ConfigError: there are fewer cores than slices.
    """
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= num_slices <= len(cores):
        raise ConfigError(
            f"--jobs: found {num_slices}, expected 1 to {len(cores)}, the cores that this "
            "process may use"
        )
    if num_slices == 1:
        return [ResourceSlice(frozenset(cores))]
    devices = _visible_devices()
    num_cores = len(cores) // num_slices
    num_devices = max(1, len(devices) // num_slices)
    slices = []
    for index in range(num_slices):
        first_core = index * num_cores
        slice_cores = frozenset(cores[first_core : first_core + num_cores])
        slice_devices = None
        if devices:
            first_device = index * num_devices % len(devices)
            slice_devices = ",".join(devices[first_device : first_device + num_devices])
        slices.append(ResourceSlice(slice_cores, slice_devices))
    return slices


def _visible_devices() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get(_VISIBLE_DEVICES)
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    return [str(index) for index in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]


class Jobs:
    """Runs commands, each on a free slice of the resources, and forwards signals to them.

    Once a signal came, nothing more is started. `run` may be called by as many threads as there
    are slices, but not by the main thread, which handles the signals.

    Attributes:
        signal_received: the last signal, None if none came.

    Args:
        slices: cores and GPUs of the commands that run at a time.
    """

    def __init__(self, slices: Sequence[ResourceSlice]) -> None:
        self.signal_received: int | None = None
        self._free: SimpleQueue[ResourceSlice] = SimpleQueue()
        for resources in slices:
            self._free.put(resources)
        self._children: list[subprocess.Popen[bytes]] = []
        # Reentrant: the main thread takes it in `_forward` alone, which another signal may
        # interrupt.
        self._lock = RLock()
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> Jobs:
        for number in _FORWARDED:
            if signal.getsignal(number) is not signal.SIG_IGN:  # ignored under nohup
                self._previous_handlers[number] = signal.signal(number, self._forward)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _forward(self, number: int, _: FrameType | None) -> None:
        with self._lock:
            self.signal_received = number
            for child in self._children:
                child.send_signal(number)

    def run(self, command: Sequence[str], log_file: Path) -> tuple[int | None, float]:
        """Run a command to its end, and append its output to `log_file`.

        The command has a process group of its own, or Ctrl-C would reach it twice.

        Returns:
            Its exit status, None if it was not started because a signal had come; and its seconds.

        Raises:
            OSError: the log file cannot be opened, or the command cannot be started.
        """
        resources = self._free.get()
        start = time.monotonic()
        try:
            with self._lock:
                if self.signal_received is not None:
                    return None, 0.0
                child = self._start(command, log_file, resources)
                self._children.append(child)
            try:
                return child.wait(), time.monotonic() - start
            finally:
                with self._lock:
                    self._children.remove(child)
        finally:
            self._free.put(resources)

    def _start(
        self, command: Sequence[str], log_file: Path, resources: ResourceSlice
    ) -> subprocess.Popen[bytes]:
        environment = dict(os.environ)
        if resources.devices is not None:
            environment[_VISIBLE_DEVICES] = resources.devices
        atomic.require_regular(log_file)
        os.sched_setaffinity(0, resources.cores)  # of this thread, which the process inherits
        with log_file.open("ab") as output:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,
                env=environment,
            )


def error_summary(output: str) -> str:
    """Return the line of a failed run's output that says why it failed.

    That is the exception of its last traceback, else the package's last message, else the last
    line: what launchers say of a failing rank comes after the reason.
    """
    lines = [line.rstrip() for line in output.splitlines() if line.strip()]
    tracebacks = [index for index, line in enumerate(lines) if line.startswith("Traceback (")]
    if tracebacks:
        # The frames are indented; the exception is the first line that is not.
        for line in lines[tracebacks[-1] + 1 :]:
            if not line[0].isspace():
                return line
        return lines[-1]
    messages = [line for line in lines if line.startswith("fedsp_mpi: ")]
    if messages:
        return messages[-1]
    return lines[-1] if lines else "it wrote nothing"
