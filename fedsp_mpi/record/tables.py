"""The rows of a record's tables, and the numpy type that each table has."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np

from fedsp_mpi.files import untrusted

NAN = math.nan
TRIGGERED = "test+trigger"  # the split of a result that is an attack's success


@dataclass(frozen=True, kw_only=True)
class RoundRow:
    """What one round took and brought. Seconds on the root's clock, bytes on the wire, losses in
    nats a token.

    Attributes:
        round: from 1.
        seconds_control: the server-only control's tuning, while the clients work.
        seconds_clients: from then on, until the slowest client has reported.
        seconds_server: the server's tuning on the global model (absorb).
        bytes_down, bytes_up: all ranks together.
        num_clients: those that took part, whether or not they failed.
        num_failed: those of them whose update was not merged.
        server_loss_first, server_loss_last: first and last step of the server's tuning.
        validation_merged: global model with the merged prompts, before the server touches them.
        validation_loss: the same after the server's tuning.
        control_validation_loss: the server-only control after equally many steps.
        is_best: lowest validation_loss so far.
    """

    round: int
    seconds_broadcast: float = NAN
    seconds_control: float = NAN
    seconds_clients: float = NAN
    seconds_merge: float = NAN
    seconds_server: float = NAN
    seconds_validation: float = NAN
    seconds_total: float = NAN
    bytes_down: int = 0
    bytes_up: int = 0
    num_clients: int = 0
    num_failed: int = 0
    server_loss_first: float = NAN
    server_loss_last: float = NAN
    validation_merged: float = NAN
    validation_loss: float = NAN
    control_validation_loss: float = NAN
    is_best: bool = False


@dataclass(frozen=True, kw_only=True)
class ClientRow:
    """One client in one round; `reason` says why its status is "failed", or "rejected" by the rule
    of aggregation.

    Attributes:
        attack_success: share of triggered questions that a poisoned client's own prompts answer as
            its attacker wants.
        fitness: what a search's result is ranked by (`search.rank_by`).
        step_size: root of the sum of squares of a search's step sizes in the round.
    """

    round: int
    client: int
    rank: int
    status: str = "ok"
    reason: str = ""
    samples: int = 0
    loss_model_first: float = NAN
    loss_model_last: float = NAN
    loss_prompt_first: float = NAN
    loss_prompt_last: float = NAN
    seconds_model: float = NAN
    seconds_prompt: float = NAN
    seconds_other: float = NAN
    bytes_down: int = 0
    bytes_up: int = 0
    attack_success: float = NAN
    fitness: float = NAN
    step_size: float = NAN


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """One method scored on one split.

    Attributes:
        method: "zero-shot", "server-only", "fedsp", ...
        split: "test"; "test+trigger" where acc is the share that an attack's trigger brings to its
            answer.
        round: the round whose prompts were scored; 0 for a method without rounds.
        n: items scored.
        acc, acc_norm, exact_match: fractions from 0 to 1; nan where the task has no such measure.
        stderr: standard error of exact_match where the task has it, of acc otherwise; a fraction.
        loss: loss on the validation split, nats a token.
    """

    method: str
    split: str
    round: int = 0
    n: int = 0
    acc: float = NAN
    acc_norm: float = NAN
    exact_match: float = NAN
    stderr: float = NAN
    loss: float = NAN
    seconds: float = NAN


@dataclass(frozen=True, kw_only=True)
class WireRow:
    """One name of the wire's manifest, summed over the run.

    Attributes:
        direction: "start-up", "handout", "down" or "up"; `phase` says when.
        shape, dtype: of one tensor; empty for what is no tensor.
        count, bytes: logical: one message a client and round, however the clients are placed.
        bytes_crossed: what really went from one process to another.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    direction: str
    count: int
    bytes: int
    phase: str = ""
    bytes_crossed: int = 0


TABLES: dict[str, type] = {
    "rounds": RoundRow,
    "clients": ClientRow,
    "results": ResultRow,
    "wire": WireRow,
}
# Columns that records of earlier versions lack, and what is in them then.
LATER: dict[str, dict[str, Any]] = {
    "clients": dict.fromkeys(("attack_success", "fitness", "step_size"), NAN)
}
_TYPES: dict[Any, Any] = {int: np.dtype("i8"), float: np.dtype("f8"), bool: np.dtype("?")}


def table_type(row: type) -> np.dtype:
    """The compound type of a row class: int64, float64, bool, and UTF-8 text of any length for the
    rest.
    """
    hints = typing.get_type_hints(row)
    return np.dtype(
        [(f.name, _TYPES.get(hints[f.name], h5py.string_dtype())) for f in dataclasses.fields(row)]
    )


def table(row: type, rows: Iterable[Any] = ()) -> np.ndarray:
    """Rows of one class as a read-only structured array of shape [rows]."""
    values = [tuple(_cell(getattr(one, f.name)) for f in dataclasses.fields(row)) for one in rows]
    return frozen(np.array(values, dtype=table_type(row)))


def never_merged(clients: np.ndarray) -> dict[int, str]:
    """Return the clients that took part in rounds and of which no update was ever merged, each with
    its last reason.

    Args:
        clients: the table of that name.
    """
    is_ok = clients["status"] == "ok"
    lost = np.setdiff1d(clients["client"], clients["client"][is_ok])
    rows = clients[np.isin(clients["client"], lost)]
    return {int(row["client"]): _plain(row["reason"]) for row in rows}


def wire_rows(found: np.ndarray) -> list[WireRow]:
    """The rows of the table `wire` as objects again."""
    rows = []
    for row in found:
        cells = {name: _plain(row[name]) for name in found.dtype.names or ()}
        rows.append(WireRow(**{**cells, "shape": tuple(untrusted.parse_json(cells["shape"]))}))
    return rows


def _plain(cell: Any) -> Any:
    return cell.decode() if isinstance(cell, bytes) else getattr(cell, "item", lambda: cell)()


def append(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Two tables of one type, one below the other."""
    joined = np.empty(len(before) + len(after), dtype=before.dtype)
    joined[: len(before)], joined[len(before) :] = before, after
    return frozen(joined)


def frozen(array: np.ndarray) -> np.ndarray:
    """The same array, marked read-only."""
    array.flags.writeable = False
    return array


def clean(text: str) -> str:
    """Text that HDF5 can hold as UTF-8: zero bytes and lone surrogates are written out as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8").replace("\0", "\\x00")


def _cell(value: Any) -> Any:
    if isinstance(value, tuple):
        return json.dumps(value)
    return clean(value) if isinstance(value, str) else value


def first_line(error: BaseException) -> str:
    """What an error says, in one line that is safe to show."""
    return untrusted.printable((str(error).strip() or type(error).__name__).splitlines()[0])
