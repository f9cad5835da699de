"""Finds what differs between two runs that should be equal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from fedsp_mpi.files.untrusted import printable
from fedsp_mpi.record.hdf5 import Run

# Columns that begin so depend on the machine: they may differ between equal runs.
_MACHINE_COLUMNS = ("seconds", "bytes", "rank", "reason")
# The columns that identify a row of each table.
_KEYS = {
    "rounds": ("round",),
    "clients": ("round", "client"),
    "tiers": ("round", "name", "model", "text", "at"),
    "results": ("method", "split"),
}
_MAX_ROUNDS_NAMED = 8


def difference(run_a: Run, run_b: Run) -> list[str]:
    """Return what differs between two runs that should be equal bit by bit, in a line each.

    Compares every round's prompts, the losses of rounds and clients, and the results. Seconds,
    bytes and ranks may differ.

    Raises:
        ValueError: prompts cannot be read.
    """
    lines = []
    if run_a.committed_rounds != run_b.committed_rounds:
        lines.append(
            f"rounds: {run_a.committed_rounds} in the first run, {run_b.committed_rounds} "
            "in the second"
        )
    lines += _prompt_differences(run_a, run_b)
    last = min(run_a.committed_rounds, run_b.committed_rounds)
    for name in _KEYS:
        table_a = getattr(run_a, name)
        table_b = getattr(run_b, name)
        if name != "results":
            table_a = table_a[table_a["round"] <= last]
            table_b = table_b[table_b["round"] <= last]
        lines += _table_differences(name, table_a, table_b)
    if lines:
        lines += _thread_differences(run_a, run_b)
    return [printable(line) for line in lines]


def _thread_differences(run_a: Run, run_b: Run) -> list[str]:
    """Name the roles that computed with other numbers of threads, in one line if there are any."""
    threads_a = _threads(run_a)
    threads_b = _threads(run_b)
    by_role = [
        f"{role} {threads_a[role]} and {threads_b[role]}"
        for role in threads_a
        if role in threads_b and threads_a[role] != threads_b[role]
    ]
    if not by_role:
        return []
    return [
        f"threads: {', '.join(by_role)}; bits are equal for equal numbers of threads only: set "
        "server.compute.threads and client.compute.threads"
    ]


def _threads(run: Run) -> dict[str, str]:
    """Return the numbers of threads that each role had at the start, "1" or "1 or 2"."""
    counts: dict[str, set[int]] = {}
    for host in run.environment.get("hosts", []):
        for role, device in host.get("devices", {}).items():
            counts.setdefault(role, set()).add(device["threads"])
    return {role: " or ".join(map(str, sorted(numbers))) for role, numbers in counts.items()}


def _prompt_differences(run_a: Run, run_b: Run) -> list[str]:
    lines = []
    last = min(run_a.committed_rounds, run_b.committed_rounds)
    in_one = set(run_a.prompt_rounds) ^ set(run_b.prompt_rounds)
    missing = sorted(round for round in in_one if round <= last)
    if missing:
        rounds = ", ".join(map(str, missing[:_MAX_ROUNDS_NAMED]))
        if len(missing) > _MAX_ROUNDS_NAMED:
            rounds += ", ..."
        lines.append(f"prompts of round {rounds} were kept by one run only")
    in_both = sorted(set(run_a.prompt_rounds) & set(run_b.prompt_rounds))
    num_differing = 0
    for round in in_both:
        tensor_lines = list(_tensor_differences(run_a.prompts(round), run_b.prompts(round)))
        if not tensor_lines:
            continue
        if num_differing == 0:
            lines += [f"round {round}, the first whose prompts differ: {t}" for t in tensor_lines]
        num_differing += 1
    if num_differing > 1:
        lines.append(f"prompts differ in {num_differing} of {len(in_both)} rounds")
    return lines


def _tensor_differences(
    prompts_a: Mapping[str, np.ndarray], prompts_b: Mapping[str, np.ndarray]
) -> Iterator[str]:
    for name in dict.fromkeys([*prompts_a, *prompts_b]):
        if name not in prompts_a or name not in prompts_b:
            yield f"tensor {name!r} is only in the {'first' if name in prompts_a else 'second'} run"
            continue
        a = prompts_a[name]
        b = prompts_b[name]
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            yield (
                f"tensor {name!r} is {a.dtype} {list(a.shape)} in the first run, "
                f"{b.dtype} {list(b.shape)} in the second"
            )
        elif a.tobytes() != b.tobytes():
            yield f"tensor {name!r}: {_distance(a, b)}"


def _distance(a: np.ndarray, b: np.ndarray) -> str:
    """Say in how many values two arrays of the same shape and dtype differ, and by how much."""
    bits = f"V{a.dtype.itemsize}"
    num_differing = int((np.atleast_1d(a).view(bits) != np.atleast_1d(b).view(bits)).sum())
    with np.errstate(invalid="ignore"):
        gaps = np.abs(a.astype(np.float64) - b.astype(np.float64))
    largest = float(np.nanmax(gaps)) if not np.isnan(gaps).all() else math.nan
    return f"{num_differing} of {a.size} values, largest difference {largest:.3g}"


def _table_differences(name: str, table_a: np.ndarray, table_b: np.ndarray) -> list[str]:
    """Name the rows that only one table has, and each column's first difference in the others."""
    keys = _KEYS[name]
    rows_a = {tuple(row[key] for key in keys): row for row in table_a}
    rows_b = {tuple(row[key] for key in keys): row for row in table_b}
    lines = []
    for values in [*rows_a, *rows_b]:
        if values not in rows_a or values not in rows_b:
            run = "first" if values in rows_a else "second"
            lines.append(f"{name}: {_key_text(keys, values)} is only in the {run} run")
    in_both = [values for values in rows_a if values in rows_b]
    columns_a = table_a.dtype.names or ()
    columns_b = table_b.dtype.names or ()
    for column in dict.fromkeys([*columns_a, *columns_b]):
        if column.startswith(_MACHINE_COLUMNS):
            continue
        if column not in columns_a or column not in columns_b:
            run = "first" if column in columns_a else "second"
            lines.append(f"{name}: the column {column} is only in the {run} run")
            continue
        for values in in_both:
            cell_a = rows_a[values][column]
            cell_b = rows_b[values][column]
            both_nan = cell_a != cell_a and cell_b != cell_b
            if cell_a != cell_b and not both_nan:
                lines.append(
                    f"{name}: {column} differs first at {_key_text(keys, values)}: "
                    f"{cell_a!s} and {cell_b!s}"
                )
                break
    return lines


def _key_text(keys: Sequence[str], values: Sequence[object]) -> str:
    return ", ".join(f"{key} {value}" for key, value in zip(keys, values))
