"""Lines of text and progress for the user. The caller decides where they go, and whether progress
is a bar at the bottom of a terminal or a line now and then.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NoReturn, TextIO

from fedsp_mpi.config.parsing import error_line

if TYPE_CHECKING:
    from tqdm import tqdm


_NUM_ROWS = 2  # a bar needs one below another; some terminals say that they have none
_COUNTS = "{n_fmt} of {total_fmt}"
_TIMES = "[{elapsed}, {remaining} left]"


class Bar:
    """One progress bar at the bottom of a terminal, for one task after the other.

    Args:
        stream: a terminal; nothing else may write to it while a task lasts, but through `above`.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bar: tqdm[NoReturn] | None = None

    def begin(self, label: str, total: int, unit: str = "step") -> None:
        """Begin a task, unless it has no steps; the one before ends.

        Args:
            label: what stands before the bar.
            total: number of steps.
            unit: what a step is.
        """
        from tqdm import tqdm

        self.end()
        if total == 0:
            return
        self._bar = tqdm(
            total=total,
            desc=label,
            bar_format=f"{{desc}}: {{percentage:3.0f}}%|{{bar}}| {_COUNTS} {unit}s {_TIMES}",
            file=self._stream,
            leave=False,
            ncols=self._num_columns(),
            nrows=_NUM_ROWS,
            mininterval=0.2,
        )

    def _num_columns(self) -> int:
        """Return the width of the terminal; of one that does not know it, 80."""
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or 80
        except OSError:
            return 80

    def step(self, count: int = 1) -> None:
        """Count steps of the task."""
        if self._bar is None:
            return
        self._bar.update(count)
        if self._bar.total is not None and self._bar.n >= self._bar.total:
            self.end()

    def end(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def above(self, write: Callable[[], None]) -> None:
        """Write lines above the bar."""
        if self._bar is None:
            write()
            return
        self._bar.clear()
        write()
        self._bar.refresh()


class Log:
    """Sends lines to `sink`; a silent log has none.

    Args:
        sink: takes one line of text, without its line end; None on ranks that print nothing.
        every: least seconds between two progress lines.
        bar: shows progress in the place of such lines.

    Attributes:
        bar: as above.
    """

    def __init__(
        self,
        sink: Callable[[str], None] | None = None,
        every: float = 5.0,
        bar: Bar | None = None,
    ) -> None:
        self._sink = sink
        self._every = every
        self.bar = bar

    def say(self, text: str) -> None:
        """Send one line."""
        if self._sink is None:
            return
        if self.bar is None:
            self._sink(text)
        else:
            self.bar.above(partial(self._sink, text))

    def progress(self, label: str, total: int) -> Progress:
        """Return a counter up to `total` that now and then logs progress and the time left."""
        if self.bar is not None:
            return BarProgress(self.bar, label, total)
        return Progress(self.say, label, total, every=self._every)

    def round_progress(
        self, every: float | None, client_name: Callable[[int], str]
    ) -> RoundProgress:
        """Return what shows how far this process is within a round.

        Args:
            every: least seconds between two lines; None: no lines.
            client_name: returns what a client of an id is called.
        """
        if self.bar is not None:
            return RoundBar(self.bar, client_name, self.say)
        return RoundProgress(self.say, every, client_name)


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


class BarProgress(Progress):
    """The same as a bar."""

    def __init__(self, bar: Bar, label: str, total: int) -> None:
        self._bar = bar
        bar.begin(label, total)

    def step(self, count: int = 1, note: Callable[[], str] | None = None) -> None:
        """Count `count` steps; there is no room for a note."""
        self._bar.step(count)


class RoundProgress:
    """Logs now and then how far one rank's clients are within a round; short rounds stay silent.

    Args:
        say: takes one line.
        every: least seconds between two lines, and from the start of a round to its first; None:
            never a line.
        client_name: returns what a line calls a client of an id.
    """

    _where = " on this rank"

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

    def say(self, text: str) -> None:
        """Show one line, whatever the time."""
        self._say(text)

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
        of_rank = f" ({place} of {num_clients}{self._where})" if num_clients > 1 else ""
        self._client = f"round {self._round}: {self._client_name(client)}{of_rank}"

    def server(self, round: int) -> None:
        """Begin the server's part of a round."""
        self._client = f"round {round}: server"

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


class RoundBar(RoundProgress):
    """The same as a bar for each stage of each client.

    Args:
        bar: of the terminal.
        client_name: returns what a client of an id is called.
        say: takes one line.
    """

    _where = ""  # a bar needs the room

    def __init__(
        self, bar: Bar, client_name: Callable[[int], str], say: Callable[[str], None]
    ) -> None:
        super().__init__(say, client_name=client_name)
        self._bar = bar

    def stage(self, unit: str, total: int) -> None:
        """Begin `total` steps of one kind, which `unit` names."""
        self._bar.begin(self._client, total, unit)

    def step(self, *_: object) -> None:
        """Count one step."""
        self._bar.step()


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
    if isinstance(error, PermissionError) and error.filename is not None:
        text = (
            f"{error.filename}: found no permission to use it, expected this user's; change its "
            "mode or its owner"
        )
    if first_line:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        is_heading = bool(lines) and lines[0].endswith(":")
        text = " ".join(lines[: 2 if is_heading else 1])
    return error_line(text) or type(error).__name__
