"""Small records for the tests of the record room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fedsp_mpi.record import ClientRow, ResultRow, RoundRow, RunRecord


def make(
    folder: Path,
    rounds: int = 3,
    keep: bool = True,
    seed: int = 1,
    offset: float = 0.0,
    **config: Any,
) -> RunRecord:
    """Make a record with some rounds of two clients and an 8x4 prompt."""
    record = RunRecord.create(
        folder,
        config={"run": {"seed": seed}, "model": {"name": "tiny"}, **config},
        config_text=f"run: {{seed: {seed}}}\n",
        environment={"host": "node01", "num_ranks": 3},
    )
    for number in range(1, rounds + 1):
        row = RoundRow(
            round=number,
            bytes_down=1000,
            bytes_up=2000,
            num_clients=2,
            seconds_total=1.5,
            validation_loss=2.0 / number,
            is_best=True,
        )
        clients = [
            ClientRow(round=number, client=c, rank=1 + c, loss_prompt_last=2.5) for c in range(2)
        ]
        record.commit_round(row, clients, tensors(number, offset) if keep else None)
    return record


def tensors(round: int, offset: float = 0.0) -> dict[str, np.ndarray]:
    """Make prompts of several shapes, with values that only bits can tell apart."""
    prefix = np.random.default_rng(round).standard_normal((8, 4)).astype(np.float32) + np.float32(
        offset
    )
    prefix[0, :3] = np.float32(-0.0), np.float32(np.nan), np.float32(1e-42)
    return {
        "z.prefix": prefix,
        "a/scale": np.float32(0.1) * np.ones((), np.float32),
        "none": np.zeros((0, 4), np.float32),
    }


def assert_same_bits(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()


def results(fedsp: float, loss: float = 2.0) -> list[ResultRow]:
    """Make results: zero-shot 0.5, server-only 0.6, fedsp as given."""
    scores = {"zero-shot": 0.5, "server-only": 0.6, "fedsp": fedsp}
    return [
        ResultRow(
            method=m,
            split="test",
            n=400,
            acc=a,
            acc_norm=a - 0.1,
            stderr=0.01,
            loss=loss,
            round=2 * (m == "fedsp"),
        )
        for m, a in scores.items()
    ]
