"""Lines of text and progress messages for the user. The caller decides where they go."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from fedsp_mpi.config.parsing import error_line


class Log:
    """Sends lines to `sink`; a silent log has none.

    Args:
        sink: takes one line of text, without its line end; None on ranks that print nothing.
        every: least seconds between two progress lines.
    """

    def __init__(self, sink: Callable[[str], None] | None = None, every: float = 5.0) -> None:
        self._sink = sink
        self._every = every

    def say(self, text: str) -> None:
        """Send one line."""
        if self._sink is not None:
            self._sink(text)

    def progress(self, label: str, total: int) -> Progress:
        """Return a counter up to `total` that now and then logs progress and the time left."""
        return Progress(self.say, label, total, every=self._every)


class Progress:
    """Counts steps; logs at most every few seconds how many are done and how much time is left.

    Args:
        say: takes one line.
        label: begins each line.
        total: number of steps.
        every: least seconds between two lines.
    """

    def __init__(self, say: Callable[[str], None], label: str, total: int, *, every: float) -> None:
        self._say = say
        self._label = label
        self._total = total
        self._every = every
        self._done = 0
        self._start = time.monotonic()
        self._last_line = self._start

    def step(self, count: int = 1, note: Callable[[], str] | None = None) -> None:
        """Count `count` steps; `note` is called for a few words only when a line is due."""
        self._done += count
        now = time.monotonic()
        if now - self._last_line < self._every or self._done >= self._total:
            return
        self._last_line = now
        seconds_left = (now - self._start) / self._done * (self._total - self._done)
        words = f"  {note()}" if note else ""
        self._say(f"{self._label} {self._done}/{self._total}{words}  {duration(seconds_left)} left")


class RoundProgress:
    """Logs now and then how far one rank's clients are within a round; short rounds stay silent.

    Args:
        say: takes one line.
        every: least seconds between two lines, and from the start of a round to its first; None:
            never a line.
        client_name: returns what a line calls a client of an id.
    """

    def __init__(
        self,
        say: Callable[[str], None] = lambda line: None,
        every: float | None = None,
        client_name: Callable[[int], str] = "client {}".format,
    ) -> None:
        self._say = say
        self._client_name = client_name
        self._every = math.inf if every is None else every
        self._round = 0
        self._client = ""
        self._unit = "step"
        self._total = 0
        self._done = 0
        self._last_line = time.monotonic()

    def begin(self, round: int) -> None:
        """Start the clock of a round."""
        self._round = round
        self._last_line = time.monotonic()

    def client(self, client: int, place: int, num_clients: int) -> None:
        """Begin a client of the round.

        Args:
            client: client id.
            place: which of this rank's clients it is, counted from 1.
            num_clients: number of clients on this rank in this round.
        """
        of_rank = f" ({place} of {num_clients} on this rank)" if num_clients > 1 else ""
        self._client = f"round {self._round}: {self._client_name(client)}{of_rank}"

    def stage(self, unit: str, total: int) -> None:
        """Begin `total` steps of one kind, which `unit` names."""
        self._unit = unit
        self._total = total
        self._done = 0

    def step(self, *_: object) -> None:
        """Count one step.

        Must be cheap: it is called in the innermost loop of training.
        """
        self._done += 1
        now = time.monotonic()
        if now - self._last_line >= self._every:
            self._last_line = now
            self._say(f"{self._client} at {self._unit} {self._done} of {self._total}")


def duration(seconds: float) -> str:
    """Format seconds for people: "0.4 s", "12 s", "3 min 20 s", "2 h 5 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60} s"
    return f"{total // 3600} h {total % 3600 // 60} min"


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
