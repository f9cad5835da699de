"""The Python interface: the command line's results and words, in a process that lives on."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

import fedsp_mpi
from fedsp_mpi import report
from fedsp_mpi.config.parsing import put
from fedsp_mpi.config.yaml_reader import key_value
from fedsp_mpi.record import Run
from helpers import runs
from helpers.mpi import run_mpi
from helpers.paths import PROGRAMS

SETTINGS = dict(key_value(item) for item in (*runs.SHORT, "distillation.engine=torch"))


def run(*arguments: Any, **options: Any) -> tuple[Run | None, str]:
    """Call the interface; return the record and what was printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        record = fedsp_mpi.run(*arguments, **options)
    return record, out.getvalue()


def values(folder: Path, **more: object) -> dict[str, object]:
    return {**SETTINGS, "run.folder": folder, **more}


def require_same(one: Run, other: Run) -> None:
    """Compare prompts bit by bit, and scores and losses to the last digit."""
    assert report.difference(one, other) == []
    for table in ("results", "rounds"):
        rows, other_rows = getattr(one, table), getattr(other, table)
        names = [name for name in rows.dtype.names if not name.startswith("seconds")]
        assert len(rows) and all(
            np.array_equal(rows[name], other_rows[name], equal_nan=rows[name].dtype.kind == "f")
            for name in names
        )


class Tripwire(io.StringIO):
    """Text that is printed, which calls `pull` once, when a word comes by."""

    def __init__(self, word: str, pull: Callable[[], object]) -> None:
        super().__init__()
        self._word = word
        self._pull: Callable[[], object] | None = pull

    def write(self, text: str) -> int:
        if self._pull and self._word in text:
            pull, self._pull = self._pull, None
            pull()
        return super().write(text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def first(folder: Path) -> tuple[Run, str]:
    """A short run of the embedded default."""
    record, printed = run(set=values(folder), name="first")
    assert record is not None
    return record, printed


def test_it_is_the_command_line_bit_by_bit(first, folder):
    """The run of the interface was the first in its process, that of the command line is not."""
    done = runs.short_run(0, folder, "line", "distillation.engine=torch")
    require_same(first[0], fedsp_mpi.read(folder / "line"))
    assert report.summarize(first[0]) in first[1] and "round 2/2" in first[1]
    assert done.stdout.split("\n")[:3] == first[1].split("\n")[:3]


def test_a_file_and_its_content_give_the_same(first, folder):
    """Nested mappings in the place of a file; the second run in one process, with other threads."""
    content: dict[str, Any] = yaml.safe_load(Path(fedsp_mpi.config.EMBEDDED).read_text())
    for key, value in SETTINGS.items():
        put(content, key, value, whose=key)
    given = json.dumps(content)
    torch.set_num_threads(2)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    record, _ = run(content, set={"run.folder": folder}, name="content")
    assert torch.get_num_threads() == 2 and torch.equal(state, torch.get_rng_state())
    torch.set_num_threads(1)
    assert record is not None and json.dumps(content) == given
    require_same(first[0], record)


def test_a_record_is_plain_data(first):
    record = first[0]
    results = pd.DataFrame(record.results)
    assert list(results["method"]) == ["chance", "zero-shot", "server-only", "fedsp"]
    assert results["acc"].dtype == float and pd.DataFrame(record.rounds)["round"].tolist() == [1, 2]
    assert record.prompt == record.folder / "prompt" and record.model is None
    assert repr(record) == f"<Run first: complete, 2 rounds, {record.folder}>"


@pytest.mark.parametrize(
    "key, value",
    [("federation.round", 3), ("federation.rounds", "many"), ("model.name", "no/such model")],
)
def test_a_mistake_is_the_line_of_the_command_line(tmp_path, key, value):
    with pytest.raises(fedsp_mpi.ConfigError) as caught:
        run(set=values(tmp_path, **{key: value}), name="x")
    done = runs.short_run(0, tmp_path, "x", f"{key}={value}", status=2)
    assert done.stderr == f"fedsp_mpi: {caught.value}\n"
    assert isinstance(caught.value, ValueError) and not any(tmp_path.iterdir())


def test_a_run_that_is_there_is_refused_replaced_or_returned(first, folder):
    with pytest.raises(fedsp_mpi.ConfigError, match="found a run"):
        run(set=values(folder), name="first")
    record, printed = run(resume=first[0].folder)
    assert record is not None and record.status == "complete" and "nothing to go on" in printed
    require_same(first[0], record)


HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


@pytest.mark.parametrize(
    "number, raised",
    [
        (signal.SIGINT, KeyboardInterrupt),
        pytest.param(signal.SIGUSR1, fedsp_mpi.Refused, marks=pytest.mark.slow),
    ],
)
def test_what_is_interrupted_goes_on_in_the_same_process(first, folder, number, raised):
    """No handler is left behind, nothing is locked, and the bits are those of one stretch."""
    if number == signal.SIGINT:  # a shell starts what is in its background without it
        signal.signal(number, signal.default_int_handler)
    before = [signal.getsignal(handled) for handled in HANDLED]
    hook = threading.excepthook
    name = f"interrupted-{number.name}"
    out = Tripwire("round 1/2", lambda: signal.raise_signal(number))
    with pytest.raises(raised) as caught, contextlib.redirect_stdout(out):
        fedsp_mpi.run(set=values(folder), name=name)
    assert [signal.getsignal(handled) for handled in HANDLED] == before
    assert threading.excepthook is hook
    stopped = fedsp_mpi.read(folder / name)
    assert (stopped.status, stopped.committed_rounds) == ("stopped", 1), stopped.reason
    if raised is fedsp_mpi.Refused:
        assert caught.value.exit_status == 75 and "go on" in str(caught.value)
    else:
        assert "resume=" in out.getvalue()
    record, _ = run(resume=str(folder / name))
    assert record is not None
    require_same(first[0], record)


@pytest.mark.slow
def test_it_works_in_a_thread(first, folder):
    results: list[Run | None] = []

    def work() -> None:
        results.append(fedsp_mpi.run(set=values(folder), name="thread"))

    thread = threading.Thread(target=work)
    with contextlib.redirect_stdout(io.StringIO()):
        thread.start()
        thread.join(60)
    assert results and results[0] is not None
    require_same(first[0], results[0])


@pytest.mark.slow
def test_it_works_under_mpirun(first, folder, tmp_path):
    script = [PROGRAMS / "notebook.py", tmp_path, json.dumps(SETTINGS)]
    done = run_mpi(2, script, timeout=120)
    # counts, not lines: unbuffered, print writes a line in pieces, and two ranks' pieces may mix
    for words, times in (("heard:", 4), ("did you mean 'rounds'", 2), ("found a run", 2)):
        assert done.stdout.count(words) == times, done.stdout
    assert "returned: True True" in done.stdout and "returned: False False" in done.stdout
    for name in ("first", "second"):
        require_same(first[0], fedsp_mpi.read(tmp_path / name))


@pytest.mark.slow
def test_it_is_the_command_line_in_a_process_of_its_own(first, folder):
    runs.fedsp(1, runs.command(folder, "own", "distillation.engine=torch"))
    require_same(first[0], fedsp_mpi.read(folder / "own"))
