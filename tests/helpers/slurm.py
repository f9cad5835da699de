"""A real Slurm, started as root: two nodes that are both this machine, and all its files in a
folder of its own. A node may have disks that the other does not see.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from helpers.mpi import kill_tree
from helpers.paths import ROOT

PROGRAMS = (
    "munged",
    "slurmctld",
    "slurmd",
    "sbatch",
    "srun",
    "scontrol",
    "scancel",
    "squeue",
    "sinfo",
)
NODES = ("n1", "n2")
# Mounts pairs of a folder and the place where it is seen, then becomes a daemon.
MOUNT = """\
while [ "$1" != -- ]; do mount --bind "$1" "$2" || exit; shift 2; done
shift
exec "$@"
"""
FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE"}

# cred_expire is also how long a requeued job waits, and 5 is the least. OverTimeLimit: time limits
# are minutes, looked at every 30 seconds, so without it a signal for the last second might come
# together with the end.
CONF = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=1,bf_hetjob_immediate
OverTimeLimit=1
KillWait=5
MailProg=/bin/true
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=32
PartitionName=main Nodes=n[1-2] Default=YES OverSubscribe=FORCE:8
"""


class Slurm:
    """A cluster for the time of a `with`.

    Skips the test where Slurm is not installed or the user is not root, or cannot mount.

    Args:
        disks: of a node, the folders that it sees at another place, by that place; nobody else
            sees them there.
    """

    def __init__(self, disks: Mapping[str, Mapping[Path, Path]] | None = None) -> None:
        self._disks = {} if disks is None else disks
        missing = [name for name in PROGRAMS if not shutil.which(name)]
        if missing:
            pytest.skip(f"there is no {', '.join(missing)}: apt-get install slurm-wlm munge")
        if os.geteuid() != 0:
            pytest.skip("only root can start a Slurm")
        if self._disks and subprocess.run(["unshare", "--mount", "true"], check=False).returncode:
            pytest.skip("this machine lets nobody mount")

    def __enter__(self) -> Slurm:
        with ExitStack() as stack:
            self.folder = Path(
                tempfile.mkdtemp(prefix="slurm-", dir="/tmp")
            )  # a socket's path has to be short
            stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            (self.folder / "state").mkdir()
            conf = self.folder / "slurm.conf"
            host = socket.gethostname().split(".")[0]
            conf.write_text(CONF.format(host=host, folder=self.folder, ports=_free_ports(3)))
            self._environment = {**_clean_environment(), "SLURM_CONF": str(conf)}
            self._start_munge(stack)
            self._start(stack, ["slurmctld", "-D"])
            for node in NODES:
                self._start(stack, ["slurmd", "-D", "-N", node], self._disks.get(node, {}))
            stack.callback(self._end_jobs)
            until(
                lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2",
                60,
                self._logs,
            )
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, *command: str | os.PathLike[str]) -> str:
        """Run one of Slurm's commands in the repository's root and give its output; the test fails
        if it fails.
        """
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if done.returncode:
            pytest.fail(
                f"{' '.join(map(str, command))}: {done.stderr}\n{self._logs()}", pytrace=False
            )
        return done.stdout

    def submit(self, options: Sequence[str], script: str, *arguments: str, **variables: str) -> Job:
        """`sbatch OPTIONS slurm/SCRIPT ARGUMENTS`, with environment variables on top of the test's
        own.
        """
        given = [f"{name}={value}" for name, value in variables.items()]
        out = self.folder / "%x-%A_%a.txt"
        done = self.run(
            "env",
            *given,
            "sbatch",
            "--parsable",
            f"-o{out}",
            *options,
            f"slurm/{script}",
            *arguments,
        )
        return Job(self, done.split(";")[0].strip())

    def _start(
        self, stack: ExitStack, command: Sequence[str], disks: Mapping[Path, Path] | None = None
    ) -> None:
        """Start a daemon, with disks in a mount namespace of its own if it has some."""
        log = stack.enter_context((self.folder / f"{command[0]}-{command[-1]}.out").open("w"))
        pairs = [str(path) for place, disk in (disks or {}).items() for path in (disk, place)]
        namespace = ["unshare", "--mount", "sh", "-c", MOUNT, "sh", *pairs, "--"] if pairs else []
        daemon = subprocess.Popen(
            [*namespace, *command],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        stack.callback(kill_tree, daemon)

    def _start_munge(self, stack: ExitStack) -> None:
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        files = {
            "key-file": key,
            "socket": self.folder / "munge.socket",
            "pid-file": self.folder / "munge.pid",
        }
        files |= {"log-file": self.folder / "munge.log", "seed-file": self.folder / "munge.seed"}
        options = [f"--{name}={path}" for name, path in files.items()]
        self._start(stack, ["munged", *options, "--force", "--foreground"])
        until((self.folder / "munge.socket").exists, 20, self._logs)

    def _end_jobs(self) -> None:
        """Steps are no children of the daemons: have Slurm itself end them."""
        self.run("scancel", "--state=PENDING")
        self.run("scancel", "--state=RUNNING")
        until(lambda: not self.run("squeue", "-h"), 60, self._logs)

    def _logs(self) -> str:
        texts = {
            path.name: path.read_text(errors="replace")
            for path in sorted(self.folder.glob("*.[lo][ou][gt]"))
        }
        return "\n".join(f"--- {name} ---\n{text[-1500:]}" for name, text in texts.items() if text)


class Job:
    """A job that was submitted, or one task of an array."""

    def __init__(self, slurm: Slurm, id: str) -> None:
        self._slurm, self.id = slurm, id

    def fields(self) -> dict[str, str]:
        """What `scontrol show job` says: JobState, ExitCode, Restarts, StdOut, and so on."""
        shown = self._slurm.run("scontrol", "-o", "show", "job", self.id).splitlines()[0]
        return dict(re.findall(r"(\S+?)=(\S+)", shown))

    def text(self) -> str:
        """What the job has written so far."""
        log = Path(self.fields()["StdOut"])
        return log.read_text(errors="replace") if log.exists() else ""

    def wait(self, state: str, timeout: float = 150) -> dict[str, str]:
        """Wait until the job is over, requeues and all; its state has to be this one."""
        until(lambda: self.fields()["JobState"] in FINAL, timeout, self.text)
        assert self.fields()["JobState"] == state, self.text()
        return self.fields()

    def wait_for(self, words: str, timeout: float = 90) -> None:
        """Wait until the job has written something; it must not be over before."""
        until(
            lambda: words in self.text() or self.fields()["JobState"] in FINAL, timeout, self.text
        )
        assert words in self.text(), self.text()

    def tell_to_stop(self) -> None:
        """What Slurm does before the time limit: SIGUSR1 to the shell of the batch script, and to
        it alone.
        """
        self._slurm.run("scancel", "--batch", "--signal=USR1", self.id)

    def cancel(self) -> None:
        """`scancel`."""
        self._slurm.run("scancel", self.id)


def until(condition: Callable[[], bool], seconds: float, shown: Callable[[], str]) -> None:
    """Wait for a condition; the test fails after so many seconds, and shows something."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"not within {seconds} s\n{shown()}")
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    """The first of neighbouring ports that are free: Slurm takes those of its nodes as a range."""
    for first in range(20000 + os.getpid() % 10000, 60000, count):
        ports = list(range(first, first + count))
        with ExitStack() as stack:
            try:
                for port in ports:
                    stack.enter_context(socket.socket()).bind(("", port))
            except OSError:
                continue
            return ports
    raise AssertionError("no free ports")


def _clean_environment() -> dict[str, str]:
    """The test's environment with its Python first, and nothing of a job that the test itself may
    run in.
    """
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("SLURM", "SBATCH", "FEDSP_"))
    }
    return {**kept, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
