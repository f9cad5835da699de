"""The rows of a record's tables, and the numpy type that each table has."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np

from fedsp_mpi.files import untrusted
from fedsp_mpi.files.untrusted import JsonObject

NAN = math.nan
OF_GENERAL = "test, general model"  # the split of a result under the general prompt, with tiers
TRIGGERED = "test+trigger"  # the split of a result that is an attack's success
# The split of results that no model has: the test split's answers alone (evaluation/baselines.py).
LABELS = "test labels"
CHANCE = "chance"
MAJORITY = "majority"
MAJORITY_OF_TEST = "majority (of the test)"


@dataclass(frozen=True, kw_only=True)
class RoundRow:
    """One round: times in seconds on rank 0's clock, bytes on the wire, losses in nats per token.

    Attributes:
        round: counted from 1.
        seconds_control: tuning and validation of the server-only control, while the clients train.
        seconds_clients: from then until the slowest client has reported.
        seconds_server: the server's tuning on the global model.
        seconds_validation: without such tuning, and with several ranks, in the next round's time.
        seconds_total: until the next round can begin.
        bytes_down, bytes_up: all ranks together.
        num_clients: clients that took part, whether or not they failed.
        num_failed: clients among them whose update was not aggregated.
        server_loss_first, server_loss_last: first and last step of the server's tuning.
        validation_merged: global model with the aggregated prompts, before the server tunes them.
        validation_loss: the same after the server's tuning.
        control_validation_loss: of the server-only control after as many steps.
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
    """One client in one round.

    Attributes:
        status: "ok", "failed", or "rejected" by the aggregation rule.
        reason: why it failed or was rejected.
        attack_success: fraction of triggered questions that a poisoned client's own prompts answer
            as its attacker wants.
        fitness: by which a search's result is ranked (`search.rank_by`).
        step_size: root of the sum of squares of a search's step sizes in the round.
        extra: further columns, of a method of one's own; nan in rows that lack them.
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
    extra: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SiloRow:
    """One silo's own score of what a round has brought, on the text that it holds back.

    Attributes:
        silo: the client's id.
        n: number of examples, as `federation.disclose` has it; 0: not said.
        loss: in nats per token, of what the silo's client holds, with the round's prompts.
        acc: fraction from 0 to 1; nan where the task has no choices.
    """

    round: int
    silo: int
    n: int = 0
    loss: float = NAN
    acc: float = NAN


@dataclass(frozen=True, kw_only=True)
class TierRow:
    """One score of a tier's prompt on one text (`method: plmm`), with accuracy and loss.

    Attributes:
        round: that ended; 0 before the first.
        name: of the user whose prompt or text it is; of the server's rows, of the expert.
        model: whose prompt: "personal", "expert" or "general".
        text: "own", what the user holds back; "domain", the test split of its experts' domains, or
            their public text; "other", that of the other domains.
        at: "device", the users' model on the user's rank; "server", the global model.
        n: number of questions; of own text of a silo as `federation.disclose` has it.
        loss: in nats per token.
        acc: fraction from 0 to 1.
    """

    round: int
    name: str
    model: str
    text: str
    at: str
    n: int = 0
    loss: float = NAN
    acc: float = NAN


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """One method scored on one split.

    Attributes:
        method: "zero-shot", "server-only", "fedsp", ...
        split: "test", with tiers each domain's questions under its expert; "test, general model",
            the same questions under the general prompt; or "test+trigger", where acc is the
            fraction of questions that an attack's trigger makes the model answer as the attacker
            wants; or "test labels" of what needs no model, "chance" and "majority".
        round: the round whose prompts were scored; 0 for a method without rounds.
        n: number of questions that were scored; of plain text, of tokens.
        acc, acc_norm, exact_match: fractions from 0 to 1; nan where the task has no such measure.
        stderr: standard error of exact_match where the task has it, of acc otherwise; a fraction.
        loss: on the validation split, in nats per token.
        perplexity: of the split's tokens, where the text is plain; else nan.
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
    perplexity: float = NAN


@dataclass(frozen=True, kw_only=True)
class WireRow:
    """One entry of the wire's manifest: what travelled under one name, summed over the run.

    Attributes:
        direction: "start-up", "handout", "down" or "up".
        phase: of the run, in which it travelled.
        shape, dtype: of one tensor; empty for what is no tensor.
        count, bytes: logical: one message per client and round, however the clients are placed.
        bytes_crossed: bytes that really went from one process to another.
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
    "silos": SiloRow,
    "tiers": TierRow,
    "results": ResultRow,
    "wire": WireRow,
}
# Columns of `clients` that are no metric of a method: the server fills them in.
SERVER_COLUMNS = tuple(
    field.name for field in dataclasses.fields(ClientRow) if field.type != "float"
)
# Columns that records of earlier versions lack, and what they are filled with then.
LATER: dict[str, JsonObject] = {
    "clients": dict.fromkeys(("attack_success", "fitness", "step_size"), NAN),
    "results": {"perplexity": NAN},
}
# Tables that records of earlier versions lack.
LATER_TABLES = ("silos", "tiers")
_EXTRA = "extra"  # the field of a row whose names are columns of their own
_TYPES: dict[type, np.dtype] = {int: np.dtype("i8"), float: np.dtype("f8"), bool: np.dtype("?")}


def table_type(row: type, extra: Sequence[str] = ()) -> np.dtype:
    """Return the numpy type of a row class: int64, float64, bool, and UTF-8 text for the rest.

    Args:
        row: the class.
        extra: names of further float64 columns.
    """
    hints = typing.get_type_hints(row)
    columns = []
    for field in dataclasses.fields(row):
        if field.name != _EXTRA:
            columns.append((field.name, _TYPES.get(hints[field.name], h5py.string_dtype())))
    return np.dtype(columns + [(name, _TYPES[float]) for name in extra])


def extra_columns(row: type, table_type: np.dtype) -> list[str]:
    """Return the columns of a table's type that are not fields of its row class."""
    fields = {field.name for field in dataclasses.fields(row)}
    return [name for name in table_type.names or () if name not in fields]


def table(row_class: type, rows: Iterable[object] = ()) -> np.ndarray:
    """Build a read-only structured array [rows] from rows of one class."""
    rows = list(rows)
    extras: list[Mapping[str, float]] = [getattr(row, _EXTRA, {}) for row in rows]
    extra_names = list(dict.fromkeys(name for extra in extras for name in extra))
    names = [field.name for field in dataclasses.fields(row_class) if field.name != _EXTRA]
    cells = []
    for row, extra in zip(rows, extras):
        own_cells = [_to_cell(getattr(row, name)) for name in names]
        cells.append((*own_cells, *(extra.get(name, NAN) for name in extra_names)))
    return frozen(np.array(cells, dtype=table_type(row_class, extra_names)))


def never_merged(clients: np.ndarray) -> dict[int, str]:
    """Return the clients that trained but none of whose updates was ever aggregated.

    Args:
        clients: the table of that name, [rows].

    Returns:
        Client id -> the reason of its last round.
    """
    is_ok = clients["status"] == "ok"
    lost = np.setdiff1d(clients["client"], clients["client"][is_ok])
    rows = clients[np.isin(clients["client"], lost)]
    return {int(row["client"]): _from_cell(row["reason"]) for row in rows}


def mean_silo_loss(silos: np.ndarray) -> float:
    """Return the mean loss of rows of the table `silos`, [rows], in nats per token.

    Weighted by their examples, one at least; losses that are not finite are left out; nan without
    any other.
    """
    rows = silos[np.isfinite(silos["loss"])]
    if not len(rows):
        return NAN
    return float(np.average(rows["loss"], weights=np.maximum(rows["n"], 1)))


def wire_rows(wire: np.ndarray) -> list[WireRow]:
    """Turn the table `wire`, [rows], into objects again."""
    rows = []
    for row in wire:
        cells = {name: _from_cell(row[name]) for name in wire.dtype.names or ()}
        cells["shape"] = tuple(untrusted.parse_json(cells["shape"]))
        rows.append(WireRow(**cells))
    return rows


class GrowingTable:
    """A table with room behind its last row, so that adding rows does not copy those before."""

    def __init__(self) -> None:
        self._buffer = np.empty(0)

    def extended(self, table: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return a table [rows] with the rows of another one below; see `append`.

        What was returned before stays as it is. A table that is extended twice has the rows of the
        last time.
        """
        if table.dtype != rows.dtype:
            return append(table, rows)
        size = len(table) + len(rows)
        if table.base is not self._buffer or size > len(self._buffer):
            self._buffer = np.empty(2 * size, table.dtype)
            self._buffer[: len(table)] = table
        self._buffer[len(table) : size] = rows
        return frozen(self._buffer[:size])


def append(table: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return a table [rows] with the rows of another one below; columns that one lacks are nan."""
    return joined([table, rows])


def joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Return one table [rows] of several; columns that some lack are nan there."""
    if len(parts) == 1:
        return parts[0]
    columns: dict[str, np.dtype] = {}
    for part in parts:
        columns |= {name: part.dtype[name] for name in part.dtype.names or ()}
    table = np.empty(sum(map(len, parts)), dtype=list(columns.items()))
    start = 0
    for part in parts:
        end = start + len(part)
        for name in columns:
            table[name][start:end] = part[name] if name in (part.dtype.names or ()) else NAN
        start = end
    return frozen(table)


def frozen(array: np.ndarray) -> np.ndarray:
    """Mark an array [*shape] read-only, and return it."""
    array.flags.writeable = False
    return array


def clean(text: str) -> str:
    """Write out zero bytes and lone surrogates, which HDF5 cannot hold as UTF-8, as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8").replace("\0", "\\x00")


def _to_cell(value: object) -> object:
    """Turn an attribute of a row into what a table holds: tuples become JSON."""
    if isinstance(value, tuple):
        return json.dumps(value)
    if isinstance(value, str):
        return clean(value)
    return value


def _from_cell(cell: object) -> Any:
    """Turn a cell of a table into a plain Python value."""
    if isinstance(cell, bytes):
        return cell.decode()
    if isinstance(cell, np.generic):
        return cell.item()
    return cell
