"""Cost of the record: seconds of a commit as the record grows, and bytes on disk."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from fedsp_mpi.record.tables import ClientRow, RoundRow
from fedsp_mpi.record.writer import RunRecord

_NUM_TIMED = 5  # commits at each end, of which the median counts
_SECONDS_BETWEEN_LOOKS = 0.002  # at the folder's size


@dataclass(frozen=True)
class RecordCost:
    """What a record of many rounds costs.

    Attributes:
        first_seconds: median time of the commits of rounds 2 to 6.
        last_seconds: of the last five rounds.
        written_bytes: that the process has handed to the system while it wrote the record.
        final_bytes: of the finished record.
        peak_bytes: largest size of the folder while it was finished.
    """

    first_seconds: float
    last_seconds: float
    written_bytes: int
    final_bytes: int
    peak_bytes: int


def measure(
    folder: Path, num_rounds: int, num_clients: int, *, num_values: int = 12_288
) -> RecordCost:
    """Write a record as a run does, with made-up losses and prompts.

    Args:
        folder: for the record; must not exist.
        num_rounds: to commit, at least 10.
        num_clients: of each round.
        num_values: fp32 values of each round's prompt; 0 keeps no prompts.
    """
    random = np.random.default_rng(0)
    seconds = []
    written_before = _written_bytes()
    record = RunRecord.create(
        folder, config={"run": {"seed": 1}}, config_text="run: {seed: 1}\n", environment={}
    )
    for number in range(1, num_rounds + 1):
        row, clients = _rows(number, random.random(num_clients + 1).tolist())
        prompt = {"prompt": random.standard_normal(num_values, dtype=np.float32)}
        start = time.perf_counter()
        record.commit_round(row, clients, prompt if num_values else None)
        seconds.append(time.perf_counter() - start)
    with _peak_size(folder) as sizes:
        record.finish()
    return RecordCost(
        first_seconds=median(seconds[1 : 1 + _NUM_TIMED]),
        last_seconds=median(seconds[-_NUM_TIMED:]),
        written_bytes=_written_bytes() - written_before,
        final_bytes=_size(folder),
        peak_bytes=max(sizes),
    )


def _rows(number: int, losses: list[float]) -> tuple[RoundRow, list[ClientRow]]:
    """Make the rows of a round: the last loss is the server's, the others are the clients'."""
    *of_clients, of_server = losses
    clients = [
        ClientRow(
            round=number,
            client=client,
            rank=1,
            samples=100,
            loss_prompt_last=loss,
            seconds_prompt=loss,
            bytes_down=49_152,
            bytes_up=49_152,
        )
        for client, loss in enumerate(of_clients)
    ]
    row = RoundRow(
        round=number,
        num_clients=len(clients),
        seconds_total=of_server,
        validation_loss=of_server,
        is_best=number == 1,
    )
    return row, clients


def _written_bytes() -> int:
    """Return the bytes that this process has written so far, to files and elsewhere (Linux)."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["wchar"])


def _size(folder: Path) -> int:
    """Return the bytes of a folder's files, of those that are still there."""
    size = 0
    for path in folder.rglob("*"):
        try:
            size += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # renamed or removed meanwhile
            continue
    return size


@contextmanager
def _peak_size(folder: Path) -> Iterator[list[int]]:
    """Watch the size of a folder in a thread, inside the `with`."""
    sizes = [_size(folder)]
    is_over = threading.Event()

    def look() -> None:
        while not is_over.wait(_SECONDS_BETWEEN_LOOKS):
            sizes.append(_size(folder))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield sizes
    finally:
        is_over.set()
        thread.join()
