"""Writes the summary of one run as plain text.

What it takes from the free-form parts of a record, where they are there and have this form:
    environment: hosts = [{"host", "device"}, ...], one per rank (or host and num_ranks); machine;
        commit
    sections["models"]: {part: number of parameters}, or {part: {"name", "num_parameters"}};
        what clients hold of the global model: layers, layers_copied, exact_copies (values)
    sections["data"]: task, train, validation, test, server_shard, client_shards
    sections["distillation"]: seconds, reused_from
    sections["origin"]: runs = [{"run", "method", "round", "rounds"}, ...], the last one first
    sections["timing"]: seconds, seconds_checkpoints
    sections["instruction"]: text
    sections["encryption"]: {start: {cipher, server, clients = {id: fingerprint}}}
"""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Mapping

import numpy as np

from fedsp_mpi.files.untrusted import printable
from fedsp_mpi.record.going_on import newest_environment, resume_command
from fedsp_mpi.record.hdf5 import KILLED, Run
from fedsp_mpi.record.tables import LABELS, TRIGGERED
from fedsp_mpi.report import attack, handed_out, phases, plain_use, pseudo_labels, silos
from fedsp_mpi.report.costs import training_seconds
from fedsp_mpi.report.facts import (
    CONTROLS,
    PERPLEXITY,
    SERVER_ONLY,
    ZERO_SHOT,
    baselines,
    better_by,
    client_losses,
    machine,
    main_measure,
    ranks_of,
    result_of,
)
from fedsp_mpi.report.formatting import (
    WIDTH,
    as_bytes,
    as_count,
    as_date,
    as_decimal,
    as_percent,
    as_seconds,
    clip,
    table,
    wrapped,
)
from fedsp_mpi.report.significance import includes_zero, result_difference, wilson

_MAX_RANKS_NAMED = 16  # after a kill
_MAX_FAILURES_NAMED = 5
_USE = "use it    with plain transformers and peft, for instance so (Python):"
_MAX_REASON_LINES = 6
# Of the record's section `models`: what is no number of parameters of a part.
_NO_PARAMETERS = ("layers", "layers_copied", "exact_copies")
_MAX_KEYS_NAMED = 8  # clients whose fingerprints are shown
_INDENT = " " * 10  # the width of a label


def summarize(run: Run) -> str:
    """Write a run as plain text of at most 100 columns: header, rounds, results, bytes, seconds."""
    lines = []
    parts = (_header, _rounds, pseudo_labels.lines, silos.lines, _results, _wire, _seconds)
    for part in (write(run) for write in parts):
        if part:
            lines += [printable(line) for line in part]
            lines.append("")
    lines.append(f"folder    {run.file.parent}")
    lines += _how_to_resume(run)
    text = "\n".join(clip(line) for line in lines)
    code = plain_use.lines(run)
    if code:
        text += "\n" + "\n".join([_USE, "", *code])
    return text


# -- header ----------------------------------------------------------------------------------------


def num_rounds(run: Run) -> str:
    """Write how many rounds a run has: "1 round", "6 rounds"."""
    return f"{run.committed_rounds} round{'' if run.committed_rounds == 1 else 's'}"


def _header(run: Run) -> list[str]:
    reason = " ".join(run.reason.split())
    start = f"run       {run.name}   {run.status}"
    end = f", {num_rounds(run)}"
    line = f"{start} ({reason}){end}" if reason else start + end
    lines = [line]
    if reason and len(line) > WIDTH:
        lines = [start + end]
        words = f"reason    {reason}"
        lines += textwrap.wrap(words, WIDTH, max_lines=_MAX_REASON_LINES, subsequent_indent=_INDENT)
    lines += wrapped("machine   ", [*machine(run.environment), *_num_clients(run)])
    lines.append(f"date      {as_date(run.created)} to {as_date(run.updated)} UTC")
    if not run.has_digest:
        lines.append(
            "digest    none: an earlier version wrote this file, or it was changed; damage "
            "would not be seen"
        )
    if run.environment.get("commit"):
        lines.append(f"commit    {run.environment['commit']}")
    lines += wrapped("models    ", _models(run))
    lines += wrapped("starts    ", phases.origin_words(run))
    handout = handed_out.sentence(run.sections.get("models", {}))
    if handout:
        lines += wrapped("clients   ", [f"get {handout}"])
    lines += wrapped("data      ", _data(run))
    instruction = run.sections.get("instruction", {}).get("text")
    if instruction is not None:
        words = f"prompt    {instruction or 'none but the words of the task'}"
        lines += textwrap.wrap(words, WIDTH, subsequent_indent=_INDENT)
    return lines + wrapped("sealed    ", _keys(run))


def _keys(run: Run) -> list[str]:
    """Name the keys of the newest start that seals what goes up; nothing of other runs."""
    starts = run.sections.get("encryption", {})
    newest = starts.get(str(len(starts)), {})
    clients = newest.get("clients", {})
    if not newest:
        return []
    names = [
        f"{silos.client_name(run, int(client))} {key}"
        for client, key in list(clients.items())[:_MAX_KEYS_NAMED]
    ]
    if len(clients) > _MAX_KEYS_NAMED:
        names.append(f"and {len(clients) - _MAX_KEYS_NAMED} more")
    facts = [f"what goes up, by {newest.get('cipher')}", f"key of server {newest.get('server')}"]
    return facts + names


def _num_clients(run: Run) -> list[str]:
    num_clients = run.config.get("federation", {}).get("clients")
    if not num_clients and len(run.rounds):
        num_clients = int(run.rounds["num_clients"].max())
    return [f"{num_clients} clients"] if num_clients else []


def _models(run: Run) -> list[str]:
    """Name the parts of the model with their numbers of parameters."""
    texts = []
    for part, value in run.sections.get("models", {}).items():
        if part in _NO_PARAMETERS:
            continue
        name = run.config.get("model", {}).get("name", "") if part == "global" else ""
        num_parameters = value
        if isinstance(value, Mapping):
            name = str(value.get("name", name))
            num_parameters = value.get("num_parameters")
        words = [part.replace("_", " ")]
        if name:
            words.append(str(name))
        if isinstance(num_parameters, (int, float)):
            words.append(f"({as_count(num_parameters)} parameters)")
        if len(words) > 1:
            texts.append(" ".join(words))
    return texts


def _data(run: Run) -> list[str]:
    """Name the task and the sizes of its parts."""
    data = run.sections.get("data", {})
    facts = [str(data["task"])] if "task" in data else []
    for split in ("train", "validation", "test"):
        if split in data:
            facts.append(f"{data[split]} {split}")
    if "server_shard" in data:
        facts.append(f"server's shard {data['server_shard']}")
    shards = data.get("client_shards")
    if isinstance(shards, list) and shards:
        sizes = dict.fromkeys([min(shards), max(shards)])
        facts.append(f"clients' shards {' to '.join(map(str, sizes))}")
    return facts


def _how_to_resume(run: Run) -> list[str]:
    """Return how to resume a run that ended early; after a kill also the ranks' processes."""
    if run.status not in ("stopped", "failed") or not (run.file.parent / "config.yaml").exists():
        return []
    lines = wrapped("ranks     ", _processes(run)) if run.reason == KILLED else []
    if lines:
        lines.append(f"{_INDENT}the launcher's last lines name the process that was killed first")
    environment = newest_environment(run.environment, run.sections)
    return [*lines, f"go on     {resume_command(run.file.parent, environment)}"]


def _processes(run: Run) -> list[str]:
    """Name the process of each rank since the last start of the run; nothing for a single rank."""
    environment = newest_environment(run.environment, run.sections)
    processes = [
        f"{rank} is process {host.get('pid')} on {host.get('host')}"
        for rank, host in enumerate(ranks_of(environment))
    ]
    if len(processes) < 2:
        return []
    if len(processes) > _MAX_RANKS_NAMED:
        num_more = len(processes) - _MAX_RANKS_NAMED
        processes = [*processes[:_MAX_RANKS_NAMED], f"and {num_more} more"]
    return processes


# -- rounds ----------------------------------------------------------------------------------------

_ROUNDS_HEAD = (
    "round",
    "clients",
    "client",
    "server",
    "merged",
    "tuned",
    "control",
    "wait s",
    "server s",
    "round s",
    "",
)
_ROUNDS_LEGEND = (
    "losses in nats per token: client = last steps, mean over clients; server = last tuning step;",
    "on the validation split: merged = before the server's tuning, tuned = after, "
    "control = server only;",
    "seconds: wait s = until the last client's update, server s = the server's tuning, "
    "round s = in all;",
    "best = the round of the lowest validation loss, whose prompts or weights are tested",
)


def _rounds(run: Run) -> list[str]:
    if not len(run.rounds):
        return ["no round was committed"]
    losses = {round: float(values.mean()) for round, values in client_losses(run).items()}
    best = best_round(run)
    body = []
    for row in run.rounds:
        number = int(row["round"])
        num_merged = int(row["num_clients"]) - int(row["num_failed"])
        body.append(
            [
                str(number),
                f"{num_merged}/{row['num_clients']}",
                as_decimal(losses.get(number, math.nan)),
                as_decimal(row["server_loss_last"]),
                as_decimal(row["validation_merged"]),
                as_decimal(row["validation_loss"]),
                as_decimal(row["control_validation_loss"]),
                as_seconds(row["seconds_clients"]),
                as_seconds(row["seconds_server"]),
                as_seconds(row["seconds_total"]),
                "best" if row["is_best"] and number == best else "",
            ]
        )
    return [*table(_ROUNDS_HEAD, body, num_left=0), *_ROUNDS_LEGEND, *failures(run)]


def best_round(run: Run) -> int:
    """Return the last round that was the best so far; 0 if there is none."""
    best = run.rounds["round"][run.rounds["is_best"]]
    return int(best[-1]) if len(best) else 0


def failures(run: Run) -> list[str]:
    """Say why clients failed or were rejected, for the first of them."""
    failed = run.clients[run.clients["status"] != "ok"] if len(run.clients) else run.clients
    lines = []
    for row in failed[:_MAX_FAILURES_NAMED]:
        reason = " ".join(row["reason"].split())
        name = silos.client_name(run, int(row["client"]))
        lines.append(f"{name} {row['status']} in round {row['round']}: {reason}")
    if len(failed) > _MAX_FAILURES_NAMED:
        lines.append(f"... and {len(failed) - _MAX_FAILURES_NAMED} more")
    return lines


# -- results ---------------------------------------------------------------------------------------

RESULTS_HEAD = (
    "method",
    "split",
    "round",
    "n",
    "acc %",
    "acc_norm %",
    "exact %",
    "perplexity",
    "std. error",
    "val. loss",
    "seconds",
)


def result_cells(row: np.void) -> list[str]:
    """Write a row of the table of results, in the columns of RESULTS_HEAD."""
    return [
        str(row["method"]),
        str(row["split"]),
        str(row["round"]) if row["round"] else "",
        str(row["n"]),
        as_percent(row["acc"]),
        as_percent(row["acc_norm"]),
        as_percent(row["exact_match"]),
        as_decimal(row["perplexity"], 2),
        as_percent(row["stderr"]),
        as_decimal(row["loss"]),
        as_seconds(row["seconds"]),
    ]


def _results(run: Run) -> list[str]:
    if not len(run.results):
        return ["no results yet"]
    body = []
    for row in run.results:
        if row["split"] == TRIGGERED:
            continue
        body.append(result_cells(row))
    lines = table(RESULTS_HEAD, body, num_left=2)
    if baselines(run):
        lines.append("chance = a guess; majority = always the server's most frequent answer")
    return [*lines, *verdicts(run), *attack.summary_lines(run)]


def verdicts(run: Run) -> list[str]:
    """Say what the federated methods gained over their controls, split by split."""
    lines = []
    for row in run.results:
        if row["method"] in CONTROLS or row["split"] in (LABELS, TRIGGERED):
            continue
        for name in (SERVER_ONLY, ZERO_SHOT):
            control = result_of(run, name, row["split"])
            if control is not None:
                lines += _verdict(row, control)
        lines += _baseline_verdict(run, row)
    return lines


def _baseline_verdict(run: Run, row: np.void) -> list[str]:
    """Say that a method is no better than the best answer without a model; nothing if it is."""
    rows = baselines(run).values() if row["split"] == "test" else []
    best = max(rows, key=lambda baseline: float(baseline["acc"]), default=None)
    if best is None:
        return []
    interval = wilson(float(row["acc"]), int(row["n"]))
    if math.isnan(interval[0]) or interval[0] > float(best["acc"]):
        return []
    return [
        f"{row['method']} ({row['split']}) is not shown to be better than {best['method']}, "
        f"{as_percent(best['acc'])} %:",
        f"    95 % interval {as_percent(interval[0])} to {as_percent(interval[1])}",
    ]


def _verdict(row: np.void, control: np.void) -> list[str]:
    """Say what a method gained over one control.

    By the main measure or, where no test was scored, by the loss.
    """
    measure, _ = main_measure(row)
    gain = better_by(row, control)
    if math.isnan(gain):
        return _loss_verdict(row, control)
    method = row["method"]
    if measure == PERPLEXITY:
        change = "lower" if gain > 0 else "higher"
        against = f"{method} against {control['method']} ({row['split']})"
        return [f"{against}: perplexity {change} by {abs(gain):.2f}"]
    text = f"{method} against {control['method']} ({row['split']}): "
    text += f"{100 * gain:+.2f} points of {measure}"
    error = math.hypot(row["stderr"], control["stderr"])
    if not math.isnan(error):
        text += f", standard error {100 * error:.2f} (unpaired)"
    lines = [text]
    interval = result_difference(row, control)
    if includes_zero(interval):
        lines.append(
            f"    no difference that {row['n']} questions can show: 95 % interval "
            f"{100 * interval[0]:+.2f} to {100 * interval[1]:+.2f}"
        )
    elif gain < 0:
        lines.append(
            f"    {method} is worse than {control['method']}: 95 % interval "
            f"{100 * interval[0]:+.2f} to {100 * interval[1]:+.2f}"
        )
    return lines


def _loss_verdict(row: np.void, control: np.void) -> list[str]:
    """Say how much lower the validation loss is than a control's; nothing if it is not known."""
    gain = float(control["loss"]) - float(row["loss"])
    if math.isnan(gain):
        return []
    if gain == 0:
        text = "the same validation loss"
    else:
        text = f"validation loss {'lower' if gain > 0 else 'higher'} by {abs(gain):.4f}"
    return [f"{row['method']} against {control['method']} ({row['split']}): {text}"]


# -- bytes and seconds -----------------------------------------------------------------------------


def _wire(run: Run) -> list[str]:
    """Say how many bytes were sent in each direction.

    Down and up are those of the rounds that a resumed run still has; others are the manifest's.
    """
    sizes = {"down": int(run.rounds["bytes_down"].sum()), "up": int(run.rounds["bytes_up"].sum())}
    for row in run.wire:
        if row["direction"] not in ("down", "up"):
            sizes[row["direction"]] = sizes.get(row["direction"], 0) + int(row["bytes"])
        elif row["phase"] == "evaluation":  # results of rounds, which silos judge
            sizes["evaluation"] = sizes.get("evaluation", 0) + int(row["bytes"])
    total = sum(sizes.values())
    if not total:
        return []
    texts = [f"{direction} {as_bytes(size)}" for direction, size in sizes.items()]
    lines = wrapped("wire      ", [*texts, f"in all {as_bytes(total)}"])
    num_updates = int(run.rounds["num_clients"].sum())
    if num_updates:
        down = as_bytes(sizes["down"] / num_updates)
        up = as_bytes(sizes["up"] / num_updates)
        lines.append(f"{_INDENT}per client and round: down {down}, up {up}")
    return lines


def _seconds(run: Run) -> list[str]:
    """Say where the time went; a distillation that an earlier run paid for is not counted."""
    distillation = run.sections.get("distillation", {})
    timing = run.sections.get("timing", {})
    is_reused = "reused_from" in distillation
    seconds: dict[str, object] = {}
    if not is_reused:
        seconds["distillation"] = distillation.get("seconds")
    for phase in ("broadcast", "control", "clients", "merge", "server", "validation"):
        seconds[phase] = float(np.nansum(run.rounds[f"seconds_{phase}"]))
    seconds["all rounds"] = float(np.nansum(run.rounds["seconds_total"]))
    seconds["checkpoints"] = timing.get("seconds_checkpoints")
    seconds["scoring"] = float(np.nansum(run.results["seconds"]))
    seconds["whole run"] = timing.get("seconds")

    texts = ["distillation reused"] if is_reused else []
    for label, value in seconds.items():
        if isinstance(value, (int, float)) and value > 0:
            texts.append(f"{label} {as_seconds(value)}")
    overheads = [_overhead(run, row) for row in run.rounds]
    overheads = [value for value in overheads if not math.isnan(value)]
    if not overheads:
        return wrapped("seconds   ", texts)
    texts.append(f"overhead per client and round {as_seconds(statistics.median(overheads))}")
    legend = (
        f"{_INDENT}overhead = local work other than training: loading and saving states, "
        "sending, waiting"
    )
    return [*wrapped("seconds   ", texts), legend]


def _overhead(run: Run, row: np.void) -> float:
    """Return the seconds per client of a round's local work that are not training.

    On the rank that trained longest; nan without clients.
    """
    clients = run.clients[run.clients["round"] == row["round"]]
    if not len(clients):
        return math.nan
    training = training_seconds(clients)
    by_rank = [training[clients["rank"] == rank] for rank in set(clients["rank"].tolist())]
    busiest = max(by_rank, key=np.sum)
    seconds = row["seconds_clients"] + np.nan_to_num(row["seconds_control"])
    return float(seconds - busiest.sum()) / len(busiest)


# -- for the page of a run -------------------------------------------------------------------------


def header(run: Run) -> dict[str, str]:
    """Return the summary's header by label: "machine" -> "node01, 3 ranks, 2 clients".

    Of a run that ended early with "go on", the command that resumes it.
    """
    return _by_label([*_header(run), *_how_to_resume(run)])


def seconds(run: Run) -> dict[str, str]:
    """Return where the time went, by label."""
    return _by_label([line for line in _seconds(run) if "overhead = " not in line])


def traffic(run: Run) -> str:
    """Return how many bytes were sent, in one line; empty text where none were."""
    text = _by_label(_wire(run)).get("wire", "")
    return text.replace(" per client and round:", "; per client and round:")


def _by_label(lines: list[str]) -> dict[str, str]:
    """Join what follows each label; lines without a label go on with the one before."""
    texts: dict[str, list[str]] = {}
    label = ""
    for line in lines:
        label = line[: len(_INDENT)].strip() or label
        texts.setdefault(label, []).append(line[len(_INDENT) :].strip())
    return {label: " ".join(words) for label, words in texts.items()}
