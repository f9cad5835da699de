"""What differs between two runs that should be equal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fedsp_mpi.files.untrusted import printable
from fedsp_mpi.record.hdf5 import Run

_OF_THE_MACHINE = (
    "seconds",
    "bytes",
    "rank",
    "reason",
)  # columns that may differ between equal runs


def difference(run_a: Run, run_b: Run) -> list[str]:
    """What differs between two runs that should be equal, bit by bit; an empty list if nothing
    does.

    Compares every round's prompts, the losses of rounds and clients, and the results. Seconds,
    bytes and ranks may differ. Raises ValueError if prompts cannot be read.
    """
    lines = []
    if run_a.committed_rounds != run_b.committed_rounds:
        lines.append(
            f"rounds: {run_a.committed_rounds} in the first run, {run_b.committed_rounds} "
            "in the second"
        )
    lines += _prompt_differences(run_a, run_b)
    last = min(run_a.committed_rounds, run_b.committed_rounds)
    for name, keys in {
        "rounds": ("round",),
        "clients": ("round", "client"),
        "results": ("method", "split"),
    }.items():
        a, b = getattr(run_a, name), getattr(run_b, name)
        if name != "results":
            a, b = a[a["round"] <= last], b[b["round"] <= last]
        lines += _table_differences(name, keys, a, b)
    return [printable(line) for line in lines]


def _prompt_differences(run_a: Run, run_b: Run) -> list[str]:
    lines = []
    only = set(run_a.prompt_rounds) ^ set(run_b.prompt_rounds)
    last = min(run_a.committed_rounds, run_b.committed_rounds)
    missing = sorted(round for round in only if round <= last)
    if missing:
        rounds = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        lines.append(f"prompts of round {rounds} were kept by one run only")
    common = sorted(set(run_a.prompt_rounds) & set(run_b.prompt_rounds))
    differing: list[int] = []
    for round in common:
        found = list(_tensor_differences(run_a.prompts(round), run_b.prompts(round)))
        if found and not differing:
            lines += [f"round {round}, the first whose prompts differ: {line}" for line in found]
        differing += [round] if found else []
    if len(differing) > 1:
        lines.append(f"prompts differ in {len(differing)} of {len(common)} rounds")
    return lines


def _tensor_differences(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> Iterator[str]:
    for name in dict.fromkeys([*a, *b]):
        if name not in a or name not in b:
            yield f"tensor {name!r} is only in the {'first' if name in a else 'second'} run"
        elif (a[name].shape, a[name].dtype) != (b[name].shape, b[name].dtype):
            kinds = [f"{x[name].dtype} {list(x[name].shape)}" for x in (a, b)]
            yield f"tensor {name!r} is {kinds[0]} in the first run, {kinds[1]} in the second"
        elif a[name].tobytes() != b[name].tobytes():
            yield f"tensor {name!r}: {_how_far(a[name], b[name])}"


def _how_far(a: np.ndarray, b: np.ndarray) -> str:
    """In how many values two arrays of one type and shape differ bit by bit, and how far."""
    bits = f"V{a.dtype.itemsize}"
    num = int((np.atleast_1d(a).view(bits) != np.atleast_1d(b).view(bits)).sum())
    with np.errstate(invalid="ignore"):
        gaps = np.abs(a.astype(np.float64) - b.astype(np.float64))
    largest = float(np.nanmax(gaps)) if not np.isnan(gaps).all() else math.nan
    return f"{num} of {a.size} values, largest difference {largest:.3g}"


def _table_differences(name: str, keys: Sequence[str], a: np.ndarray, b: np.ndarray) -> list[str]:
    """The first differing row of each column, over the rows that both tables have."""
    columns = [c for c in a.dtype.names or () if not c.startswith(_OF_THE_MACHINE)]
    rows_a, rows_b = ({tuple(row[k] for k in keys): row for row in table} for table in (a, b))
    lines = [
        f"{name}: {_key(keys, key)} is only in the {'first' if key in rows_a else 'second'} run"
        for key in [*rows_a, *rows_b]
        if key not in rows_a or key not in rows_b
    ]
    for column in columns:
        for key in (key for key in rows_a if key in rows_b):
            x, y = rows_a[key][column], rows_b[key][column]
            if x != y and not (x != x and y != y):
                lines.append(
                    f"{name}: {column} differs first at {_key(keys, key)}: {x!s} and {y!s}"
                )
                break
    return lines


def _key(keys: Sequence[str], values: Sequence[Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in zip(keys, values))
