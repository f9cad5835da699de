"""Forks ranks that have loaded the libraries already: python warm_server.py SOCKET

mpirun starts `warm_rank.py`, which sends its arguments, environment, folder and open files here,
and waits. The process that is forked takes them over, and is the rank: it has a process id, an MPI
and an end of its own. Nothing of `fedsp_mpi` and no MPI is loaded before.

The server ends when its standard input is closed, and its ranks with it.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

LIBRARIES = (
    "accelerate",
    "cryptography.hazmat.primitives.ciphers.aead",
    "datasets",
    "h5py",
    "numpy",
    "pandas",
    "peft",
    "safetensors.torch",
    "tokenizers",
    "torch",
    "torch._dynamo",
    "transformers",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "yaml",
)
_HIGH = 200  # above all numbers of files that a rank is started with
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


class Request(NamedTuple):
    """What a rank is started with."""

    arguments: Sequence[str]
    environment: Mapping[str, str]
    folder: str
    files: Mapping[int, int]  # by their number in the rank: the number here


class Rank(NamedTuple):
    """A process that was forked."""

    pidfd: int
    connection: socket.socket  # to warm_rank.py, which waits for its end


class Server:
    """Forks a rank for each request. A request without arguments waits until there is none."""

    def __init__(self, path: str) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen(64)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(sys.stdin, selectors.EVENT_READ, lambda: os._exit(0))
        self._ranks: dict[int, Rank] = {}  # by process id
        self._waiting: list[socket.socket] = []

    def serve(self) -> Request:
        """Return in a rank that was forked; the server itself stays here."""
        while True:
            for key, _ in self._selector.select():
                request = key.data()
                if request is not None:
                    return request
            if not self._ranks:
                for connection in self._waiting:
                    connection.close()
                self._waiting.clear()

    def _accept(self) -> Request | None:
        connection, _ = self._listener.accept()
        request = receive(connection)
        if not request.arguments:
            self._waiting.append(connection)
            return None
        pid = os.fork()
        if not pid:
            self._selector.close()
            self._listener.close()
            for rank in self._ranks.values():
                os.close(rank.pidfd)
                rank.connection.close()
            return request
        for fd in request.files.values():
            os.close(fd)
        rank = Rank(os.pidfd_open(pid), connection)
        self._ranks[pid] = rank
        self._selector.register(rank.pidfd, selectors.EVENT_READ, partial(self._ended, pid))
        self._selector.register(connection, selectors.EVENT_READ, partial(self._left, pid))
        connection.sendall(pid.to_bytes(4, "big"))
        return None

    def _left(self, pid: int) -> None:
        """Kill a rank whose warm_rank.py was killed."""
        if pid in self._ranks:
            os.kill(pid, signal.SIGKILL)
            self._selector.unregister(self._ranks[pid].connection)

    def _ended(self, pid: int) -> None:
        rank = self._ranks.pop(pid)
        self._selector.unregister(rank.pidfd)
        os.close(rank.pidfd)
        _, status = os.waitpid(pid, 0)
        if rank.connection in self._selector.get_map():
            self._selector.unregister(rank.connection)
        with suppress(BrokenPipeError, ConnectionResetError):
            rank.connection.sendall(status.to_bytes(4, "big"))
        rank.connection.close()


def receive(connection: socket.socket) -> Request:
    """Read a request, and put its open files at high numbers."""
    length, received, _, _ = socket.recv_fds(connection, 4, 16)
    text = b""
    while len(text) < int.from_bytes(length, "big"):
        text += connection.recv(1 << 16)
    sent = json.loads(text)
    files = {}
    for number, fd in zip(sent["files"], received, strict=True):
        files[number] = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _HIGH)
        os.close(fd)
    return Request(sent["arguments"], sent["environment"], sent["folder"], files)


def run(request: Request) -> None:
    """Be what `python ARGUMENTS` would be."""
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    os.setsid()
    for number, fd in request.files.items():
        os.dup2(fd, number)
        os.close(fd)
    # Streams as Python makes them: those of the server know another kind of file.
    sys.stdin = sys.__stdin__ = os.fdopen(0, closefd=False)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(request.environment)
    if request.arguments[0] == "-m":
        sys.argv = list(request.arguments[1:])
        sys.path[0] = request.folder
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(request.arguments)
        sys.path[0] = str(Path(sys.argv[0]).parent)
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.freeze()
    server = Server(sys.argv[1])
    print("ready", flush=True)
    run(server.serve())
