"""Writes a run as one HTML page that needs nothing else: tables, curves, clients, configuration.

The page is filled in by the template beside this file, which escapes every text: names of runs,
silos and methods come from outside. The only importer of jinja2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedsp_mpi.files import ownership
from fedsp_mpi.files.untrusted import JsonMapping, printable
from fedsp_mpi.record.hdf5 import Run
from fedsp_mpi.record.tables import mean_silo_loss
from fedsp_mpi.report import silos, summary
from fedsp_mpi.report.chart import Bar, Chart, Line, Spark, bar, chart, spark
from fedsp_mpi.report.costs import training_seconds
from fedsp_mpi.report.facts import (
    PERPLEXITY,
    client_losses,
    last_losses,
    main_measure,
    ranks_of,
)
from fedsp_mpi.report.formatting import (
    as_bytes,
    as_count,
    as_decimal,
    as_percent,
    as_seconds,
)

ENDINGS = (".html", ".htm")
# In the head of every page: a file without it is somebody else's.
_MARK = '<meta name="generator" content="fedsp_mpi report">'
_TEMPLATE = "page.html.j2"
_MAX_CLIENTS = 500  # rows, so that a page of a large federation can still be opened
_NATS = "nats per token"

Cell = str | Spark | Bar | None


@dataclass(frozen=True)
class Table:
    """A table of the page.

    Attributes:
        caption: says what it shows; no two tables of a page have the same.
        head: titles of the columns.
        body: a cell for each column, row by row; the first one is the row's title.
        num_left: number of columns that are aligned to the left, from the first on.
    """

    caption: str
    head: Sequence[str]
    body: Sequence[Sequence[Cell]]
    num_left: int = 1


def write_page(run: Run, path: str | Path) -> None:
    """Write the page of a run, whole or not at all.

    Raises:
        ValueError: the file is somebody else's, has another ending, or cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(
            f"{path}: found the ending {path.suffix!r}, expected {' or '.join(ENDINGS)}"
        )
    ownership.require_picture(path, _MARK.encode())
    content = page(run).encode("utf-8", "backslashreplace")
    try:
        ownership.replace_picture(path, content, _MARK.encode())
    except OSError as error:
        raise ValueError(
            f"{path}: found no place to write to ({error.strerror}), expected a file"
        ) from None


def page(run: Run) -> str:
    """Return a run as HTML."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    template = Path(__file__).with_name(_TEMPLATE).read_text(encoding="utf-8")
    text = environment.from_string(template).render(
        name=run.name,
        status=run.status,
        facts=_facts(run),
        results=_results(run),
        verdicts=_verdicts(run),
        charts=[drawn for drawn in (_loss_chart(run), _training_chart(run)) if drawn],
        rounds=_rounds(run),
        clients=_clients(run),
        num_clients_left_out=max(0, len(np.unique(run.clients["client"])) - _MAX_CLIENTS),
        failures=summary.failures(run),
        silo_charts=_silo_charts(run),
        silos=_silos(run),
        traffic=summary.traffic(run),
        wire=_wire(run),
        hosts=_hosts(run.environment),
        versions=_versions(run.environment),
        notes=_notes(run),
        config_text=run.config_text,
        folder=str(run.file.parent),
    )
    return f"{text.strip()}\n"


def _finalize(value: object) -> object:
    """Write out what a terminal or a browser would obey; line ends stay."""
    return printable(value, keep="\n\t") if type(value) is str else value


# -- what the run was ------------------------------------------------------------------------------


def _facts(run: Run) -> dict[str, str]:
    """Return what the run was by label: its configuration's words, then the summary's header."""
    config = run.config
    settings = config.get("run", {})
    facts = {
        "state": f"{run.status}, {summary.num_rounds(run)}",
        "reason": " ".join(run.reason.split()),
        "method": str(config.get("method", "")),
        "label": str(settings.get("label") or ""),
        "recipe": str(config.get("recipe") or ""),
        "model": str(config.get("model", {}).get("name", "")),
        "task": str(settings.get("task_label") or config.get("data", {}).get("task", "")),
        "seed": str(settings.get("seed", "")),
    }
    for label, text in (summary.header(run) | summary.seconds(run)).items():
        if label != "run":
            facts.setdefault(label, text)
    return {label: text for label, text in facts.items() if text}


def _notes(run: Run) -> list[str]:
    """Return what the record notes on the data."""
    notes = run.sections.get("data", {}).get("notes", [])
    return list(map(str, notes)) if isinstance(notes, list) else []


# -- results and rounds ----------------------------------------------------------------------------


def _results(run: Run) -> Table:
    place = summary.RESULTS_HEAD.index("std. error") + 1
    head = [*summary.RESULTS_HEAD]
    head.insert(place, "score, two std. errors")
    body: list[list[Cell]] = []
    for row in run.results:
        measure, score = main_measure(row)
        if measure == PERPLEXITY:  # which no bar from 0 to 100 % shows
            score = math.nan
        cells: list[Cell] = [*summary.result_cells(row)]
        cells.insert(place, bar(score, float(row["stderr"])))
        body.append(cells)
    return _without_empty_columns("Results of the method and its controls", head, body, num_left=2)


def _verdicts(run: Run) -> list[str]:
    """Return what the summary says of gains, each with what follows from its error."""
    verdicts: list[str] = []
    for line in summary.verdicts(run):
        if line.startswith(" ") and verdicts:
            verdicts[-1] += f": {line.strip()}"
        else:
            verdicts.append(line.strip())
    return verdicts


def _rounds(run: Run) -> Table:
    head = [
        "round",
        "clients",
        "client loss",
        "server loss",
        "merged",
        "tuned",
        "control",
        "best",
        "down",
        "up",
        "wait s",
        "server s",
        "round s",
    ]
    losses = {round: float(values.mean()) for round, values in client_losses(run).items()}
    best = summary.best_round(run)
    body: list[list[Cell]] = []
    for row in run.rounds:
        number = int(row["round"])
        body.append(
            [
                str(number),
                f"{row['num_clients'] - row['num_failed']}/{row['num_clients']}",
                as_decimal(losses.get(number, math.nan)),
                as_decimal(row["server_loss_last"]),
                as_decimal(row["validation_merged"]),
                as_decimal(row["validation_loss"]),
                as_decimal(row["control_validation_loss"]),
                "best" if number == best else "",
                as_bytes(int(row["bytes_down"])),
                as_bytes(int(row["bytes_up"])),
                as_seconds(row["seconds_clients"]),
                as_seconds(row["seconds_server"]),
                as_seconds(row["seconds_total"]),
            ]
        )
    return _without_empty_columns("Losses, bytes and seconds of each round", head, body)


def _loss_chart(run: Run) -> Chart | None:
    """Lay out the losses on the validation split."""
    columns = {
        "server-tuned": "validation_loss",
        "merged": "validation_merged",
        "server-only": "control_validation_loss",
    }
    rounds = run.rounds["round"]
    lines = [Line(label, rounds, run.rounds[column]) for label, column in columns.items()]
    return chart("Validation loss by round", lines, unit=_NATS)


def _training_chart(run: Run) -> Chart | None:
    """Lay out the losses of the last training steps: clients with their range, and the server."""
    lines = [Line("server", run.rounds["round"], run.rounds["server_loss_last"])]
    by_round = client_losses(run)
    if by_round:
        means = np.array([losses.mean() for losses in by_round.values()])
        band = _band(list(by_round.values()))
        lines.insert(0, Line("clients: mean", np.array(list(by_round)), means, band=band))
    return chart("Training loss by round", lines, unit=_NATS)


# -- clients and silos -----------------------------------------------------------------------------


def _clients(run: Run) -> Table:
    """Tell of each client how its training went, with a curve on one scale for all."""
    head = [
        "client",
        "rank",
        "rounds",
        "samples",
        "first loss",
        "last loss",
        "loss by round",
        "seconds a round",
        "down",
        "up",
        "last failure",
    ]
    low, high = _range(last_losses(run.clients))
    body: list[list[Cell]] = []
    for client in np.unique(run.clients["client"])[:_MAX_CLIENTS]:
        rows = run.clients[run.clients["client"] == client]
        is_ok = rows["status"] == "ok"
        losses = last_losses(rows)
        reached = losses[np.isfinite(losses)]
        failed = rows[~is_ok]
        failure = f"round {failed[-1]['round']}: {_one_line(failed[-1])}" if len(failed) else ""
        body.append(
            [
                silos.client_name(run, int(client)),
                ", ".join(map(str, np.unique(rows["rank"]))),
                f"{is_ok.sum()}/{len(rows)}",
                f"{rows['samples'].max():,}",
                as_decimal(reached[0]) if len(reached) else "",
                as_decimal(reached[-1]) if len(reached) else "",
                spark(losses, low, high),
                as_seconds(float(training_seconds(rows).mean())),
                as_bytes(int(rows["bytes_down"].sum())),
                as_bytes(int(rows["bytes_up"].sum())),
                failure,
            ]
        )
    return _without_empty_columns("Training of each client", head, body)


def _one_line(row: np.void) -> str:
    return f"{row['status']}, {' '.join(str(row['reason']).split())}"


def _silos(run: Run) -> Table:
    """Tell of each silo what it scored on the text that it holds back."""
    head = ["silo", "examples", "first loss", "last loss", "loss by round", "last acc %"]
    rows = run.silos[np.isfinite(run.silos["loss"])]
    low, high = _range(rows["loss"])
    body: list[list[Cell]] = []
    for silo in np.unique(rows["silo"])[:_MAX_CLIENTS]:
        scores = rows[rows["silo"] == silo]
        last = scores[-1]
        body.append(
            [
                silos.client_name(run, int(silo)).removeprefix("silo "),
                f"{last['n']:,}" if last["n"] else "",
                as_decimal(scores[0]["loss"]),
                as_decimal(last["loss"]),
                spark(scores["loss"], low, high),
                as_percent(last["acc"]),
            ]
        )
    return _without_empty_columns("Each silo on its own held-out text", head, body)


def _silo_charts(run: Run) -> list[Chart]:
    """Lay out losses and accuracies of silos: their mean, with the range over silos."""
    scores = silos.scored(run)
    if not scores:
        return []
    rounds = np.array(list(scores))
    mean_losses = np.array([mean_silo_loss(rows) for rows in scores.values()])
    loss_band = _band([rows["loss"] for rows in scores.values()])
    line = Line("mean of silos", rounds, mean_losses, band=loss_band)
    charts = [chart("Silos' held-out loss by round", [line], unit=_NATS)]
    accuracies = [100 * rows["acc"] for rows in scores.values()]
    if all(np.isfinite(values).all() for values in accuracies):
        means = np.array([values.mean() for values in accuracies])
        line = Line("mean of silos", rounds, means, band=_band(accuracies))
        charts.append(chart("Silos' held-out accuracy by round", [line], unit="percent"))
    return [drawn for drawn in charts if drawn]


def _band(values: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    lowest = np.array([of_round.min() for of_round in values])
    highest = np.array([of_round.max() for of_round in values])
    return lowest, highest


def _range(values: np.ndarray) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)


# -- the wire and the machine ----------------------------------------------------------------------


def _wire(run: Run) -> Table:
    head = ["name", "direction", "phase", "shape", "dtype", "count", "bytes", "between processes"]
    body: list[list[Cell]] = [
        [
            str(row["name"]),
            str(row["direction"]),
            str(row["phase"]),
            str(row["shape"]),
            str(row["dtype"]),
            as_count(int(row["count"])) if row["count"] > 9999 else str(row["count"]),
            as_bytes(int(row["bytes"])),
            as_bytes(int(row["bytes_crossed"])),
        ]
        for row in run.wire
    ]
    return _without_empty_columns("Wire manifest: all that travelled", head, body, num_left=5)


def _hosts(environment: JsonMapping) -> Table:
    """Tell where each rank ran."""
    columns = ("host", "device", "cores", "pid")
    body: list[list[Cell]] = [
        [str(rank), *(str(host.get(column, "")) for column in columns)]
        for rank, host in enumerate(ranks_of(environment))
    ]
    head = ["rank", "host", "device", "cores", "process"]
    return _without_empty_columns("Ranks and their hosts", head, body, num_left=3)


def _versions(environment: JsonMapping) -> Table:
    versions = environment.get("versions", {})
    body: list[list[Cell]] = []
    if isinstance(versions, Mapping):
        body = [[str(name), str(version)] for name, version in versions.items()]
    return _without_empty_columns("Versions", ["package", "version"], body, num_left=2)


def _without_empty_columns(
    caption: str, head: Sequence[str], body: Iterable[Sequence[Cell]], *, num_left: int = 1
) -> Table:
    """Return a table without the columns that have no entry.

    Args:
        caption: of the table.
        head: titles of the columns.
        body: a cell for each column, row by row.
        num_left: number of columns that are aligned to the left, from the first on.
    """
    rows = list(body)
    shown = [column for column in range(len(head)) if any(row[column] for row in rows)]
    return Table(
        caption,
        [head[column] for column in shown],
        [[row[column] for column in shown] for row in rows],
        num_left=sum(column < num_left for column in shown),
    )
