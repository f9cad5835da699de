"""A thread that sees what the main thread may be too busy to see: signals, and other ranks' deaths.

Python runs a signal's handler only between two steps of the main thread, which may be minutes apart
in a long computation. The kernel's part of the handler, however, writes the signal's number into a
socket at once, and this thread reads it there. It holds a file descriptor of every process that it
watches, which becomes readable when that process ends.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress

_WAKE_UP = b"\0"  # no signal has this number


class Watch:
    """Watches from `start` to `stop`; both are called on the main thread.

    Args:
        signals: whose default action, to end the process, `on_signal` takes over; those that are
            ignored (nohup) stay so.
        on_signal: is called with the signal's number.
        on_death: is called with the rank of a process that ended.
    """

    def __init__(
        self,
        signals: Iterable[signal.Signals],
        on_signal: Callable[[int], None],
        on_death: Callable[[int], None],
    ) -> None:
        self._signals = tuple(signals)
        self._on_signal = on_signal
        self._on_death = on_death
        self._taken: list[signal.Signals] = []  # over from their default action
        self._old_socket = -1
        self._ends: tuple[socket.socket, socket.socket] | None = None
        self._ranks: dict[int, int] = {}  # by the file descriptor of the process
        self._lock = threading.Lock()
        self._pid = 0  # of the process that has called `start`

    def start(self) -> None:
        """Begin to watch; raise ValueError on another thread than the main one."""
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        try:
            self._old_socket = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        except ValueError:
            reader.close()
            writer.close()
            raise
        self._ends = (reader, writer)
        self._pid = os.getpid()
        for number in self._signals:
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, _noted)
                self._taken.append(number)
        os.register_at_fork(after_in_child=self._leave_to_parent)
        threading.Thread(target=self._loop, args=(reader,), name="watch", daemon=True).start()

    def follow(self, processes: Mapping[int, int]) -> None:
        """Watch other processes of this host, in the place of those watched before.

        Args:
            processes: process ids by rank.
        """
        followed = {}
        for rank, pid in processes.items():
            with suppress(OSError):  # it is gone already, or the kernel has no such call
                followed[os.pidfd_open(pid)] = rank
        with self._lock:
            for handle in self._ranks:
                os.close(handle)
            self._ranks = followed
        self._wake_up()

    def stop(self) -> None:
        """Watch nothing any more."""
        self.follow({})
        self._restore()
        if self._ends is not None:
            signal.set_wakeup_fd(self._old_socket)
            self._ends[1].close()  # the thread reads an end, and closes the other end
            self._ends = None

    def _wake_up(self) -> None:
        if self._ends is not None:
            with suppress(OSError):  # a full socket wakes the thread too
                self._ends[1].send(_WAKE_UP)

    def _loop(self, reader: socket.socket) -> None:
        with reader:
            while True:
                with selectors.DefaultSelector() as selector:
                    selector.register(reader, selectors.EVENT_READ)
                    with self._lock:
                        for handle in self._ranks:
                            selector.register(handle, selectors.EVENT_READ)
                    # Handles may be closed meanwhile; a wake-up comes with that.
                    ready = {key.fd for key, _ in selector.select()}
                self._tell_of_deaths(ready)
                if reader.fileno() in ready:
                    numbers = reader.recv(4096)
                    if not numbers:
                        return
                    for number in numbers:
                        # A verb may have set a handler of its own since, as `sweep` does.
                        if number in self._signals and signal.getsignal(number) is _noted:
                            self._on_signal(number)

    def _tell_of_deaths(self, ready: set[int]) -> None:
        with self._lock:
            dead = {handle: self._ranks.pop(handle) for handle in ready & self._ranks.keys()}
            for handle in dead:
                os.close(handle)
        for rank in dead.values():
            self._on_death(rank)

    def _leave_to_parent(self) -> None:
        """Give a forked process the default actions back: signals to it are not for its parent."""
        if self._ends is None or os.getpid() == self._pid:
            return
        with suppress(ValueError):
            signal.set_wakeup_fd(-1)
            self._restore()

    def _restore(self) -> None:
        """Give the signals their default actions back."""
        for number in self._taken:
            if signal.getsignal(number) is _noted:
                signal.signal(number, signal.SIG_DFL)
        self._taken = []


def _noted(*_: object) -> None:
    """Do nothing: the number of the signal is in the socket."""
