"""Whatever stops a run says what it was and how to go on; the folder alone is enough for that."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

import pytest

from fedsp_mpi.record import RunRecord, read
from fedsp_mpi.report import difference, summarize
from helpers.mpi import kill_tree, mpirun, run_mpi
from helpers.paths import PROGRAMS, ROOT, TESTS
from helpers.runs import FAULTY, FEDBPT, SHORT, here

ROUNDS = "federation.rounds"
# Without any schedule over all rounds.
UNSCHEDULED = (
    *SHORT,
    "server.tuning.optimizer.schedule=constant",
    "client.alignment.optimizer.schedule=constant",
    "client.tuning.optimizer.schedule=constant",
    "checkpoint.keep_client_states=true",
)


def arguments(folder: Path, name: str, *settings: str) -> list[str]:
    words = ["run", "--name", name]
    for setting in (f"run.folder={folder}", *settings):
        words += ["--set", setting]
    return words


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Make a folder with an undisturbed run of 3 rounds, `whole`, and a complete one of 2."""
    folder = tmp_path_factory.mktemp("runs")
    here(arguments(folder, "whole", *UNSCHEDULED, "federation.rounds=3"))
    here(arguments(folder, "two", *UNSCHEDULED))
    return folder


def require_equal(folder: Path, name: str) -> None:
    """Require that a run has the bits and the scores of the undisturbed one."""
    undisturbed, run = read(folder / "whole"), read(folder / name)
    assert run.status == "complete" and difference(undisturbed, run) == []
    assert run.results["method"].tolist() == undisturbed.results["method"].tolist()
    for column in ("acc", "loss", "round"):
        assert run.results[column].tobytes() == undisturbed.results[column].tobytes()


# --- from the folder alone ---


def test_more_rounds_have_the_bits_of_a_run_that_had_them_from_its_start(folder):
    complete = here(["run", "--resume", folder / "two"])
    advice = f"for more rounds: run --resume {folder / 'two'} --set federation.rounds=N"
    assert "this run is complete" in complete.stderr and advice in complete.stderr
    back = here(["run", "--resume", folder / "two", "--set", "federation.rounds=1"], 2)
    assert "found 2 rounds done, expected federation.rounds=1" in back.stderr
    here(["run", "--resume", folder / "two", "--set", "federation.rounds=3"])
    require_equal(folder, "two")
    assert read(folder / "two").config["federation"]["rounds"] == 3
    assert "is complete" in here(["run", "--resume", folder / "two"]).stderr  # of 3 rounds now


def test_a_complete_run_without_a_checkpoint_gets_no_more_rounds(folder, tmp_path):
    shutil.copytree(folder / "whole", tmp_path / "a")
    shutil.rmtree(tmp_path / "a" / "checkpoints")
    refused = here(["run", "--resume", tmp_path / "a", "--set", "federation.rounds=4"], 2)
    assert "a complete run of 3 rounds and no checkpoint to go on from" in refused.stderr
    assert read(tmp_path / "a").status == "complete"


def test_clients_that_kept_something_must_have_it_still(tmp_path):
    here(arguments(tmp_path, "a", *UNSCHEDULED, "checkpoint.keep_client_states=false"))
    refused = here(["run", "--resume", tmp_path / "a", "--set", "federation.rounds=3"], 2)
    assert "whose clients' states are gone" in refused.stderr
    complete = here(["run", "--resume", tmp_path / "a"])
    assert "cannot get more rounds, since its clients' states are gone" in complete.stderr


@pytest.mark.slow
def test_a_stopped_run_and_a_search_get_more_rounds(folder, tmp_path):
    settings = (*UNSCHEDULED, "federation.rounds=2")
    words = arguments(folder, "one", *settings)
    stopped = run_mpi(2, [FAULTY, "signal:merge:0:1", *words], status=75)
    command = f"mpirun -n 2 python -m fedsp_mpi run --resume {folder / 'one'}"
    assert f"told to stop after round 1; go on with {command}\n" in stopped.stderr
    run_mpi(3, ["-m", "fedsp_mpi", "run", "--resume", folder / "one", "--set", f"{ROUNDS}=3"])
    require_equal(folder, "one")
    for name, rounds in (("more", 1), ("all", 3)):
        here(arguments(tmp_path, name, *SHORT, *FEDBPT, f"{ROUNDS}={rounds}"))
    here(["run", "--resume", tmp_path / "more", "--set", f"{ROUNDS}=3"])
    more, undisturbed = read(tmp_path / "more"), read(tmp_path / "all")
    assert difference(undisturbed, more) == []
    assert more.results["acc"].tobytes() == undisturbed.results["acc"].tobytes()


def test_relative_paths_are_those_of_the_start(tmp_path):
    start, other = tmp_path / "start", tmp_path / "other"
    for path in (start, other):
        path.mkdir()
    (start / "text").symlink_to(ROOT / "fedsp_mpi" / "resources" / "data")
    with chdir(start):
        here(arguments(Path("runs"), "a", *UNSCHEDULED, "data.source=text", "federation.rounds=1"))
    with chdir(other):
        here(["run", "--resume", "../start/runs/a", "--set", "federation.rounds=2"])
        assert list(other.iterdir()) == [] and Path.cwd() == other
        assert read("../start/runs/a").committed_rounds == 2
        start.rename(tmp_path / "moved")
        moved = here(["run", "--resume", "../moved/runs/a", "--set", "federation.rounds=3"], 2)
    for path in (start, other):
        assert str(path) in moved.stderr
    assert moved.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "found nothing at nowhere, expected the folder of a run"),
        (["{empty}"], "run.h5: found no such file, expected the record of a run"),
        (["{damaged}"], "the file is truncated, is not HDF5"),
        (["{headless}"], "config.yaml: found no readable file"),
        (["{whole}", "some.yaml"], "found a configuration beside it, expected none"),
        (["{whole}", "--name", "b"], "found --name beside it, expected none"),
        (["{whole}", "--set", "run.seed=2", "--set", "federation.rounds=9"], "run.seed: was 1, is"),
        (["{whole}", "--set", "model.nam=2"], "model.nam: found an unknown key"),
    ],
)
def test_what_cannot_go_on_is_one_line(folder, tmp_path, words, message):
    for name in ("empty", "damaged", "headless"):
        (tmp_path / name).mkdir()
    (tmp_path / "damaged" / "run.h5").write_bytes((folder / "whole" / "run.h5").read_bytes()[:999])
    (tmp_path / "headless" / "run.h5").write_bytes((folder / "whole" / "run.h5").read_bytes())
    places = {path.name: path for path in (*tmp_path.iterdir(), folder / "whole")}
    refused = here(["run", "--resume", *(word.format(**places) for word in words)], 2)
    assert message in refused.stderr and refused.stderr.count("\n") == 1, refused.stderr


# --- whatever stops a run ---


def started(folder: Path, name: str, num_ranks: int, stderr: object) -> subprocess.Popen[bytes]:
    """Start a run whose first client is slow, and wait for the end of its first round."""
    launcher = [mpirun(), "-n", str(num_ranks)] if num_ranks else []
    command = [*launcher, sys.executable, str(FAULTY), "slow:0:0.4"]
    command += arguments(folder, name, *UNSCHEDULED, "federation.rounds=3")
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{TESTS}"},
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        # A shell starts background processes so that they ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    end = time.monotonic() + 90
    while not (folder / name / "checkpoints" / "0001.json").exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    time.sleep(0.3)
    return process


def to_launcher(process: subprocess.Popen[bytes], folder: Path, number: int) -> None:
    process.send_signal(number)


def to_last_rank(process: subprocess.Popen[bytes], folder: Path, number: int) -> None:
    os.kill(read(folder).environment["hosts"][-1]["pid"], number)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_ranks", "send", "number", "status", "reason"),
    [
        (0, to_launcher, signal.SIGINT, 130, "interrupted (Ctrl-C)"),
        (0, to_launcher, signal.SIGTERM, 143, "SIGTERM, a request to end"),
        (0, to_launcher, signal.SIGKILL, -9, "it was killed"),
        (3, to_launcher, signal.SIGINT, 130, "interrupted (Ctrl-C)"),
        (3, to_launcher, signal.SIGTERM, None, "SIGTERM, a request to end"),
        (3, to_last_rank, signal.SIGKILL, None, "killed"),
    ],
)
def test_a_signal_in_a_round(
    folder,
    num_ranks: int,
    send: Callable[[subprocess.Popen[bytes], Path, int], None],
    number: int,
    status: int | None,
    reason: str,
):
    name = f"{signal.Signals(number).name}-{num_ranks}-{send.__name__}"
    command = f"python -m fedsp_mpi run --resume {folder / name}"
    if num_ranks:
        command = f"mpirun -n {num_ranks} {command}"
    with tempfile.TemporaryFile("w+") as stderr:
        process = started(folder, name, num_ranks, stderr)
        try:
            send(process, folder / name, number)
            process.wait(15)
        finally:
            kill_tree(process)
        stderr.seek(0)
        text = stderr.read()
    assert process.returncode != 0 and status in (None, process.returncode), text
    assert "Traceback" not in text and "Exception ignored" not in text
    if number != signal.SIGKILL:
        lines = [line for line in text.splitlines() if not line.startswith("Abort(")]
        assert len(lines) == 2 and reason in lines[0], text
        assert lines[1] == f"go on with {command}"
    run = read(folder / name)
    assert run.status == "stopped" and reason in run.reason
    assert summarize(run).splitlines()[-1] == f"go on     {command}"
    here(["run", "--resume", folder / name])
    require_equal(folder, name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "status", "reason"),
    [
        ("raise:local training:1:3", 1, "rank 1 of 2"),
        ("hang:local training:1:3", 124, "found nothing from rank 1"),
        ("full:0002.json:1", 1, "No space left on device"),
    ],
)
def test_an_error_in_a_round(folder, fault, status, reason):
    name = fault.replace(":", "-").replace(" ", "-")
    settings = (*UNSCHEDULED, "federation.rounds=3", "deadlines.gather=4")
    stopped = run_mpi(
        2, [FAULTY, fault, *arguments(folder, name, *settings)], timeout=90, status=status
    )
    command = f"mpirun -n 2 python -m fedsp_mpi run --resume {folder / name}"
    spoken = [line for line in stopped.stderr.splitlines() if "go on with" in line]
    assert len(spoken) == 1 and spoken[0].endswith(f"go on with {command}"), stopped.stderr
    run = read(folder / name)
    assert run.status == "failed" and reason in run.reason
    assert summarize(run).splitlines()[-1] == f"go on     {command}"
    here(["run", "--resume", folder / name])
    require_equal(folder, name)


def test_a_rank_that_sees_another_one_die_says_which(tmp_path):
    """Where the launcher leaves it the time: srun does, MPICH's mpirun does not."""
    other = subprocess.Popen(["sleep", "60"])
    code = (PROGRAMS / "watch.py", tmp_path, socket.gethostname(), str(other.pid))
    with tempfile.TemporaryFile("w+") as stderr:
        watching = subprocess.Popen(
            [sys.executable, *code],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=stderr,
            stdout=subprocess.PIPE,
        )
        assert watching.stdout is not None
        assert watching.stdout.readline() == b"watching\n"
        other.kill()
        other.wait()
        assert watching.wait(10) == 0
        stderr.seek(0)
        text = stderr.read()
    assert text.startswith(f"run stopped: rank 1 of 1 (process {other.pid} on host ")
    assert text.endswith("go on with that\n")
    assert (tmp_path / "failure.txt").read_text() == text


# --- more rounds, where something depends on their number ---


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (("server.tuning.steps=1",), "server.tuning, whose learning rate"),
        (("federation.client_state=kept",), "client.tuning, whose learning rate"),
        (("server.tuning.steps=1", "server.tuning.optimizer.schedule=constant"), None),
        (("client.privacy.clip=1", "client.privacy.noise_scale=1"), "client.privacy, whose budget"),
        (FEDBPT, None),
    ],
)
def test_what_depends_on_the_number_of_rounds(settings, reason):
    from fedsp_mpi import config
    from fedsp_mpi.run.resuming import rounds_obstacle

    nothing_kept = (*SHORT, "server.tuning.steps=0", "federation.client_state=restarted")
    obstacle = rounds_obstacle(config.load(None, [*nothing_kept, *settings]))
    assert (obstacle is None) == (reason is None)
    assert reason is None or obstacle.startswith(reason)


def test_a_kill_between_the_two_places_of_the_number_of_rounds_is_repeated(folder, tmp_path):
    """config.yaml has it first, so that the next start sees a difference."""
    here(arguments(tmp_path, "a", *UNSCHEDULED, "federation.rounds=1"))
    file = tmp_path / "a" / "config.yaml"
    file.write_text(file.read_text().replace("rounds: 1\n", "rounds: 3\n"))
    RunRecord.open(tmp_path / "a")
    here(["run", "--resume", tmp_path / "a"])
    assert difference(read(folder / "whole"), read(tmp_path / "a")) == []
