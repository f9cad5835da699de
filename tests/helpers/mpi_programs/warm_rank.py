"""Stands for a rank that `warm_server.py` forks: python -I -S warm_rank.py SOCKET ARGUMENTS...

Gives it the arguments, the environment, the folder and the open files (the launcher's among them)
of this process, passes signals on, and ends as it ends.
"""

import json
import os
import signal
import socket
import sys

if "OMPI_COMM_WORLD_RANK" in os.environ:  # Open MPI knows its ranks by their process ids
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
server = socket.socket(socket.AF_UNIX)
server.connect(sys.argv[1])
files = [0, 1, 2]
if "PMI_FD" in os.environ:  # where MPICH's launcher listens
    files.append(int(os.environ["PMI_FD"]))
request = json.dumps(
    {
        "arguments": sys.argv[2:],
        "environment": dict(os.environ),
        "folder": os.getcwd(),  # noqa: PTH109
        "files": files,
    }
).encode()
socket.send_fds(server, [len(request).to_bytes(4, "big")], files)
server.sendall(request)
rank = int.from_bytes(server.recv(4), "big")
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda number, _: os.kill(rank, number))
status = int.from_bytes(server.recv(4), "big")
if os.WIFSIGNALED(status):
    if os.WTERMSIG(status) != signal.SIGKILL:
        signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
    os.kill(os.getpid(), os.WTERMSIG(status))
os._exit(os.waitstatus_to_exitcode(status))
