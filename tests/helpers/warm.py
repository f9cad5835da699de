"""Ranks that need not load torch and transformers, which takes each of them seconds of a core.

The first of them in a test process starts a server that has loaded the libraries, and forks all
that follow (`mpi_programs/warm_server.py`). They are processes of their own, which the real mpirun
has started.
"""

from __future__ import annotations

import atexit
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from helpers.paths import PROGRAMS

# What loads the libraries. Several command lines in one start have ranks of their own, with a seed
# each for Python's hashes, which forked ranks share: bits may not depend on it.
_LOAD_ALL = ("-m", "capture.py", "faulty.py", "tamper.py", "team.py")
_OWN = ("FEDSP_", "PYTEST_")  # variables that no library reads when it is loaded
_server: subprocess.Popen[bytes] | None = None
_socket = ""


def python(
    first: str, environment: Mapping[str, str], server_environment: Mapping[str, str]
) -> list[str]:
    """Return the command that is `python` in a rank.

    It is Python itself where a rank is quicker without the server, because it does not load what
    the server has loaded, and where libraries might read another environment than the server's.

    Args:
        first: the program, or `-m` or `-c` before it.
        environment: of the rank.
        server_environment: that the libraries were loaded in.
    """
    is_same = _of_libraries(environment) == _of_libraries(server_environment)
    if Path(first).name not in _LOAD_ALL or not is_same:
        return [sys.executable]
    if _server is None:
        _start(server_environment)
    return [sys.executable, "-I", "-S", str(PROGRAMS / "warm_rank.py"), _socket]


def wait_for_none() -> None:
    """Wait until all ranks have ended: those of an mpirun that was killed do so right after it."""
    if _server is None:
        return
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(_socket)
        request = b'{"arguments": [], "environment": {}, "folder": "", "files": []}'
        connection.sendall(len(request).to_bytes(4, "big") + request)
        connection.recv(1)


def _of_libraries(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if not name.startswith(_OWN)}


def _start(environment: Mapping[str, str]) -> None:
    global _server, _socket
    folder = tempfile.mkdtemp(prefix="fedsp-warm-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    _socket = str(Path(folder) / "server")
    _server = subprocess.Popen(
        [sys.executable, str(PROGRAMS / "warm_server.py"), _socket],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=dict(environment),
        start_new_session=True,
    )
    assert _server.stdout is not None
    assert _server.stdout.readline(), "warm_server.py has ended"
