"""What a run tells its user while it goes on: lines, and how far it is. Where they go is the
caller's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from fedsp_mpi.config.parsing import error_line


class Log:
    """Sends lines to `sink`; a silent log has no sink.

    Args:
        sink: takes one line of text, without its line end; None for ranks that do not speak.
        every: least seconds between two progress lines.
    """

    def __init__(self, sink: Callable[[str], None] | None = None, every: float = 5.0) -> None:
        self._sink, self._every = sink, every

    def say(self, text: str) -> None:
        """Send one line."""
        if self._sink is not None:
            self._sink(text)

    def progress(self, label: str, total: int) -> Progress:
        """A counter to `total` whose `step` says now and then how far it is and how long it will
        take.
        """
        return Progress(self.say, label, total, self._every)


class Progress:
    """Counts steps and says, at most every few seconds, how many are done and how much time is
    left.
    """

    def __init__(self, say: Callable[[str], None], label: str, total: int, every: float) -> None:
        self._say, self._label, self._total, self._every = say, label, total, every
        self._done, self._start = 0, time.monotonic()
        self._last = self._start

    def step(self, count: int = 1, note: Callable[[], str] | None = None) -> None:
        """Count `count` steps; `note` is asked for a few words only when a line is due."""
        self._done += count
        now = time.monotonic()
        if now - self._last < self._every or self._done >= self._total:
            return
        self._last = now
        left = (now - self._start) / self._done * (self._total - self._done)
        words = f"  {note()}" if note else ""
        self._say(f"{self._label} {self._done}/{self._total}{words}  {duration(left)} left")


class RoundProgress:
    """Says, now and then, how far the clients of one rank are within a round: short rounds pass
    without a word.

    Args:
        say: takes one line.
        every: least seconds between two lines, and from the start of a round to its first; None:
            never a line.
    """

    def __init__(
        self, say: Callable[[str], None] = lambda line: None, every: float | None = None
    ) -> None:
        self._say, self._every = say, math.inf if every is None else every
        self._where, self._unit, self._total, self._done = "", "step", 0, 0
        self._last = time.monotonic()

    def begin(self, round: int) -> None:
        """Take note that a round begins."""
        self._round, self._last = round, time.monotonic()

    def client(self, client: int, place: int, num_clients: int) -> None:
        """Take note that a client begins, the `place`-th of `num_clients` on this rank, counted
        from 1.
        """
        others = f" ({place} of {num_clients} on this rank)" if num_clients > 1 else ""
        self._where = f"round {self._round}: client {client}{others}"

    def stage(self, unit: str, total: int) -> None:
        """Take note that a client begins `total` steps of one kind, which `unit` names."""
        self._unit, self._total, self._done = unit, total, 0

    def step(self, *_: object) -> None:
        """Count one step.

        It may cost next to nothing: it stands in the innermost loop of the training.
        """
        self._done += 1
        if (now := time.monotonic()) - self._last >= self._every:
            self._last = now
            self._say(f"{self._where} at {self._unit} {self._done} of {self._total}")


def duration(seconds: float) -> str:
    """Seconds as people say them: 0.4 s, 12 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def one_line(error: BaseException, *, first_line: bool = False) -> str:
    """Return an error's message in one printable line, with long words and long messages shortened.

    Args:
        error: is named by its class if it has no message.
        first_line: keep only the first line of the message, and the second if the first is a
            heading. What other libraries add below is mostly a stack trace.
    """
    text = str(error)
    if first_line:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        is_heading = bool(lines) and lines[0].endswith(":")
        text = " ".join(lines[: 2 if is_heading else 1])
    return error_line(text) or type(error).__name__
