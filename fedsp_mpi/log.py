"""What a run tells its user while it goes on: lines, and progress with the time left. Where they go is the caller's."""

from __future__ import annotations

import time
from collections.abc import Callable


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
        """A counter to `total` whose `step` says now and then how far it is and how long it will take."""
        return Progress(self.say, label, total, self._every)


class Progress:
    """Counts steps and says, at most every few seconds, how many are done and how much time is left."""

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
