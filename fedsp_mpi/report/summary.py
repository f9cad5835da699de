"""Records as text: the summary of one run, and several runs as a Markdown table.

Everything here takes `Run` views and returns strings; nothing is printed and no file of another
kind is opened.

What the summary takes from free-form parts, where they are there and have this form:
    environment: hosts = [{"host", "device"}, ...], one a rank (or host and num_ranks); machine;
    commit sections["models"]: {part: number of parameters}, or {part: {"name", "num_parameters"}}
    sections["data"]: task, train, validation, test, server_shard, client_shards
    sections["distillation"]: seconds, reused_from; sections["timing"]: seconds, seconds_checkpoints
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fedsp_mpi.files.untrusted import printable
from fedsp_mpi.record.hdf5 import KILLED, Run, resume_command
from fedsp_mpi.record.tables import TRIGGERED
from fedsp_mpi.report import attack
from fedsp_mpi.report.formatting import (
    as_bytes,
    as_count,
    as_seconds,
    clip,
    date,
    loss,
    markdown_row,
    percent,
    spread,
    table,
    wrapped,
)

_RANKS = 16  # that are named after a kill
ZERO_SHOT, SERVER_ONLY = "zero-shot", "server-only"
_SAME_EXPERIMENT = (
    "run",
    "topology",
    "deadlines",
    "record",
)  # sections that do not change what is computed


def summarize(run: Run) -> str:
    """One run as plain text, at most 100 columns wide: header, rounds, results and their verdict,
    wire, time.
    """
    parts = [_header(run), _rounds(run), _results(run), _wire(run), _seconds(run)]
    lines = [printable(line) for part in parts if part for line in [*part, ""]]
    return "\n".join(
        clip(line) for line in [*lines, f"folder    {run.file.parent}", *_going_on(run)]
    )


def markdown(runs: Iterable[Run]) -> str:
    """Runs as a Markdown table: one row for each experiment, method and split, mean ± standard
    deviation over seeds.

    Runs that differ only in their seed, name, ranks or deadlines are one experiment. Measures are
    percent, `gain` is points over the server-only control of the same run. Runs without results are
    named below the table.
    """
    runs = list(runs)
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(_experiment(run), sort_keys=True), []).append(run)
    labels = _given(list(groups.values())) or _labels(
        [_flat(_experiment(each[0])) for each in groups.values()]
    )
    head = [
        "experiment",
        "method",
        "split",
        "seeds",
        "n",
        "acc",
        "acc_norm",
        "exact match",
        "val. loss",
        "gain",
    ]
    studies = any(len(attack.successes(run)) for run in runs)
    head += ["attack success"] if studies else []
    body = [
        line
        for label, members in zip(labels, groups.values())
        for line in _group_rows(label, members)
    ]
    lines = [head, ["---"] * 4 + ["---:"] * (len(head) - 4), *(line[: len(head)] for line in body)]
    text = "\n".join(map(markdown_row, lines))
    open_runs = [
        printable(f"{run.name} ({run.status})")
        for run in runs
        if run.status != "complete" or not len(run.results)
    ]
    return text + (f"\n\nNot complete: {', '.join(open_runs)}." if open_runs else "")


def main_measure(row: np.void) -> tuple[str, float]:
    """The measure that a result is compared by: exact match where the task has it, else accuracy;
    with its value.
    """
    name = "acc" if math.isnan(row["exact_match"]) else "exact_match"
    return name, float(row[name])


# --- summary ---


def _going_on(run: Run) -> list[str]:
    """The command that goes on with a run that ended before its end; after a kill, which process
    was which rank.
    """
    if run.status not in ("stopped", "failed") or not (run.file.parent / "config.yaml").exists():
        return []
    ranks = wrapped("ranks     ", _processes(run)) if run.reason == KILLED else []
    if ranks:
        ranks.append("          the launcher's last lines name the process that was killed first")
    return [*ranks, f"go on     {resume_command(run.file.parent, run.config)}"]


def _processes(run: Run) -> list[str]:
    """Rank and process of the run's last stretch, if there are several."""
    resumes = run.sections.get("resumes", {})
    last = resumes[max(resumes, key=int)].get("environment", {}) if resumes else run.environment
    hosts = last.get("hosts")
    known = [host for host in hosts if isinstance(host, Mapping)] if isinstance(hosts, list) else []
    shown = [
        f"{rank} is process {host.get('pid')} on {host.get('host')}"
        for rank, host in enumerate(known)
    ]
    more = [f"and {len(shown) - _RANKS} more"] if len(shown) > _RANKS else []
    return [*shown[:_RANKS], *more] if len(shown) > 1 else []


def _header(run: Run) -> list[str]:
    state = run.status + (f" ({' '.join(run.reason.split())})" if run.reason else "")
    lines = [f"run       {run.name}   {state}, {run.committed_rounds} rounds"]
    lines += wrapped("machine   ", [*machine(run.environment), *_clients(run)])
    lines.append(f"date      {date(run.created)} to {date(run.updated)} UTC")
    if not run.has_digest:
        lines.append(
            "digest    none: an earlier version wrote this file, or it was changed; damage "
            "would not be seen"
        )
    if run.environment.get("commit"):
        lines.append(f"commit    {run.environment['commit']}")
    named = {"global": run.config.get("model", {}).get("name", "")}
    models = [
        _model(part, value, named.get(part, ""))
        for part, value in run.sections.get("models", {}).items()
    ]
    return [
        *lines,
        *wrapped("models    ", list(filter(None, models))),
        *wrapped("data      ", _data(run)),
    ]


def machine(environment: Mapping[str, Any]) -> list[str]:
    """Hosts, kind of machine, number of ranks and their devices, as far as they are known."""
    found = environment.get("hosts")
    ranks = [rank for rank in found if isinstance(rank, Mapping)] if isinstance(found, list) else []
    hosts = list(dict.fromkeys(str(rank["host"]) for rank in ranks if "host" in rank))
    devices = list(dict.fromkeys(str(rank["device"]) for rank in ranks if "device" in rank))
    num_ranks = len(ranks) or environment.get("num_ranks")
    facts = hosts or [str(environment.get("host", "unknown machine"))]
    facts += [str(environment["machine"])] if environment.get("machine") else []
    return [*facts, *([f"{num_ranks} ranks"] if num_ranks else []), *devices]


def _clients(run: Run) -> list[str]:
    configured = run.config.get("federation", {}).get("clients")
    num = configured or (int(run.rounds["num_clients"].max()) if len(run.rounds) else 0)
    return [f"{num} clients"] if num else []


def _model(part: str, value: Any, name: str) -> str:
    if isinstance(value, Mapping):
        name, value = str(value.get("name", name)), value.get("num_parameters")
    size = f"({as_count(value)} parameters)" if isinstance(value, (int, float)) else ""
    return " ".join(filter(None, [part.replace("_", " "), name, size])) if name or size else ""


def _data(run: Run) -> list[str]:
    data = run.sections.get("data", {})
    facts = [str(data["task"])] if "task" in data else []
    facts += [
        f"{data[split]} {split}" for split in ("train", "validation", "test") if split in data
    ]
    facts += [f"server's shard {data['server_shard']}"] if "server_shard" in data else []
    shards = data.get("client_shards")
    if isinstance(shards, list) and shards:
        sizes = dict.fromkeys([min(shards), max(shards)])
        facts.append(f"clients' shards {' to '.join(map(str, sizes))}")
    return facts


def _rounds(run: Run) -> list[str]:
    if not len(run.rounds):
        return ["no round was committed"]
    means = _client_losses(run)
    head = [
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
    ]
    body = [
        [
            str(row["round"]),
            f"{int(row['num_clients']) - int(row['num_failed'])}/{row['num_clients']}",
            loss(means.get(int(row["round"]), math.nan)),
            *(loss(row[name]) for name in ("server_loss_last", *_VALIDATION)),
            *(
                as_seconds(row[name])
                for name in ("seconds_clients", "seconds_server", "seconds_total")
            ),
            "best" if row["is_best"] and row["round"] == _best_round(run) else "",
        ]
        for row in run.rounds
    ]
    legend = (
        (
            "losses in nats a token: client = last prompt steps, mean of the clients; "
            "server = last tuning step;"
        ),
        (
            "on the validation split: merged = before the server's tuning, tuned = after, "
            "control = server only;"
        ),
        (
            "seconds: wait s = until the last client's update, server s = the server's "
            "tuning, round s = in all;"
        ),
        "best = the round of the lowest validation loss, whose prompts or weights are tested",
    )
    return [*table(head, body, num_left=0), *legend, *_failures(run)]


_VALIDATION = ("validation_merged", "validation_loss", "control_validation_loss")


def _best_round(run: Run) -> int:
    best = run.rounds["round"][run.rounds["is_best"]]
    return int(best[-1]) if len(best) else 0


def _client_losses(run: Run) -> dict[int, float]:
    """Mean last prompt loss of the clients that did not fail, by round."""
    good = run.clients[run.clients["status"] == "ok"] if len(run.clients) else run.clients
    return {
        int(r): float(good["loss_prompt_last"][good["round"] == r].mean())
        for r in np.unique(good["round"])
    }


def _failures(run: Run) -> list[str]:
    failed = run.clients[run.clients["status"] != "ok"] if len(run.clients) else run.clients
    lines = [
        f"client {r['client']} {r['status']} in round {r['round']}: {' '.join(r['reason'].split())}"
        for r in failed[:5]
    ]
    return lines + ([f"... and {len(failed) - 5} more"] if len(failed) > 5 else [])


def _results(run: Run) -> list[str]:
    if not len(run.results):
        return ["no results yet"]
    usual = run.results[run.results["split"] != TRIGGERED]
    head = [
        "method",
        "split",
        "round",
        "n",
        "acc %",
        "acc_norm %",
        "exact %",
        "std. error",
        "val. loss",
        "seconds",
    ]
    body = [
        [
            str(row["method"]),
            str(row["split"]),
            str(row["round"]) if row["round"] else "",
            str(row["n"]),
            *(percent(row[name]) for name in ("acc", "acc_norm", "exact_match", "stderr")),
            loss(row["loss"]),
            as_seconds(row["seconds"]),
        ]
        for row in usual
    ]
    return [*table(head, body, num_left=2), *_verdicts(run), *attack.lines(run)]


def _verdicts(run: Run) -> list[str]:
    """Sentences on what the federated methods gained over their controls, split by split."""
    lines = []
    for row in run.results:
        if row["method"] in (ZERO_SHOT, SERVER_ONLY) or row["split"] == TRIGGERED:
            continue
        for control in (SERVER_ONLY, ZERO_SHOT):
            other = _result(run, control, row["split"])
            if other is not None:
                lines += _verdict(row, other)
    return lines


def _verdict(row: np.void, control: np.void) -> list[str]:
    """The gain over one control, by the main measure or, where no test was scored, by the loss."""
    method, other, split = row["method"], control["method"], row["split"]
    name, value = main_measure(row)
    gain, error = value - float(control[name]), math.hypot(row["stderr"], control["stderr"])
    text = f"{100 * gain:+.2f} points of {name}"
    text += "" if math.isnan(error) else f", standard error {100 * error:.2f} (unpaired)"
    if math.isnan(gain):
        return _loss_verdict(row, control)
    lines = [f"{method} against {other} ({split}): {text}"]
    if gain == 0 or abs(gain) < 2 * error:
        lines.append(
            f"    no difference that {row['n']} questions can show: less than two standard errors"
        )
    elif gain < 0:
        beyond = "" if math.isnan(error) else ", by two standard errors or more"
        lines.append(f"    {method} is worse than {other}{beyond}")
    return lines


def _loss_verdict(row: np.void, control: np.void) -> list[str]:
    """Say by how much the loss is lower than that of one control; nothing where it is not known."""
    gain = float(control["loss"]) - float(row["loss"])
    if math.isnan(gain):
        return []
    direction = "lower" if gain > 0 else "higher"
    text = f"validation loss {direction} by {abs(gain):.4f}" if gain else "the same validation loss"
    return [f"{row['method']} against {control['method']} ({row['split']}): {text}"]


def _wire(run: Run) -> list[str]:
    """Bytes by direction: down and up from the round rows, which a resumed run still has, others
    from the manifest.
    """
    sizes = {"down": int(run.rounds["bytes_down"].sum()), "up": int(run.rounds["bytes_up"].sum())}
    for row in run.wire:
        if row["direction"] not in ("down", "up"):
            sizes[row["direction"]] = sizes.get(row["direction"], 0) + int(row["bytes"])
    if not sum(sizes.values()):
        return []
    listed = [f"{direction} {as_bytes(size)}" for direction, size in sizes.items()]
    lines = wrapped("wire      ", [*listed, f"in all {as_bytes(sum(sizes.values()))}"])
    num = int(run.rounds["num_clients"].sum())
    if num:
        lines.append(
            f"          a client and round: down {as_bytes(sizes['down'] / num)}, up "
            f"{as_bytes(sizes['up'] / num)}"
        )
    return lines


def _seconds(run: Run) -> list[str]:
    """Where the time went; a distillation that an earlier run paid for is not counted here."""
    distillation = run.sections.get("distillation", {})
    known = (
        {"distillation": distillation.get("seconds")} if "reused_from" not in distillation else {}
    )
    for phase in ("broadcast", "control", "clients", "merge", "server", "validation"):
        known[phase] = float(np.nansum(run.rounds[f"seconds_{phase}"]))
    known["all rounds"] = float(np.nansum(run.rounds["seconds_total"]))
    known["checkpoints"] = run.sections.get("timing", {}).get("seconds_checkpoints")
    known["scoring"] = float(np.nansum(run.results["seconds"]))
    known["whole run"] = run.sections.get("timing", {}).get("seconds")
    shown = [
        f"{label} {as_seconds(value)}"
        for label, value in known.items()
        if isinstance(value, (int, float)) and value > 0
    ]
    reused = ["distillation reused"] if "reused_from" in distillation else []
    beyond, legend = [_beyond_training(run, row) for row in run.rounds], []
    if known_ones := [value for value in beyond if not math.isnan(value)]:
        shown.append(f"overhead {as_seconds(statistics.median(known_ones))} a client and round")
        legend = [
            (
                "          overhead = local work other than training: loading and saving "
                "states, sending, waiting"
            )
        ]
    return [*wrapped("seconds   ", [*reused, *shown]), *legend]


def _beyond_training(run: Run, row: np.void) -> float:
    """Seconds of a round's local work that are not training, by client, at the rank that trained
    longest.
    """
    clients = run.clients[run.clients["round"] == row["round"]]
    training = np.nan_to_num(clients["seconds_model"]) + np.nan_to_num(clients["seconds_prompt"])
    by_rank = {rank: training[clients["rank"] == rank] for rank in set(clients["rank"].tolist())}
    if not by_rank:
        return math.nan
    busiest = max(by_rank.values(), key=np.sum)
    seconds = row["seconds_clients"] + np.nan_to_num(row["seconds_control"])
    return float(seconds - busiest.sum()) / len(busiest)


def _result(run: Run, method: str, split: str) -> np.void | None:
    return next((r for r in run.results if r["method"] == method and r["split"] == split), None)


# --- several runs ---


def _group_rows(label: str, runs: Sequence[Run]) -> Iterator[list[str]]:
    """The Markdown rows of one experiment, in the order in which its methods were first seen."""
    keys = dict.fromkeys(
        (str(row["method"]), str(row["split"])) for run in runs for row in run.results
    )
    for method, split in keys:
        if split == TRIGGERED:
            continue
        found = [(run, row) for run in runs if (row := _result(run, method, split)) is not None]
        gains = (
            [] if method in (ZERO_SHOT, SERVER_ONLY) else [_gain(run, row) for run, row in found]
        )
        counts = sorted({int(row["n"]) for _, row in found})
        yield [
            label,
            method,
            split,
            ", ".join(str(run.config.get("run", {}).get("seed", "?")) for run, _ in found),
            "-".join(str(n) for n in dict.fromkeys((counts[0], counts[-1]))),
            *(
                spread([100 * float(row[name]) for _, row in found])
                for name in ("acc", "acc_norm", "exact_match")
            ),
            spread([float(row["loss"]) for _, row in found], digits=4),
            spread([100 * gain for gain in gains], sign=True),
            spread(
                [
                    100 * attack.successes(run)[method]
                    for run, _ in found
                    if method in attack.successes(run)
                ]
            ),
        ]


def _gain(run: Run, row: np.void) -> float:
    control = _result(run, SERVER_ONLY, row["split"])
    name, value = main_measure(row)
    return math.nan if control is None else value - float(control[name])


def _experiment(run: Run) -> dict[str, Any]:
    return {
        key: value
        for key, value in run.config.items()
        if key not in _SAME_EXPERIMENT and key != "seed"
    }


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= (
            _flat(value, f"{prefix}{key}.")
            if isinstance(value, Mapping) and value
            else {f"{prefix}{key}": value}
        )
    return flat


def _given(groups: Sequence[Sequence[Run]]) -> list[str] | None:
    """What the user calls each experiment: its task and its method, as far as they have labels.

    None where an experiment has no such name, or one that is another's too.
    """
    names = [
        ", ".join(filter(None, (_agreed(runs, key) for key in ("task_label", "label"))))
        for runs in groups
    ]
    if not all(names) or len(set(names)) < len(names):
        return None
    return names if len(groups) > 1 or _agreed(groups[0], "task_label") else None


def _agreed(runs: Sequence[Run], key: str) -> str | None:
    """The value of a key of the section `run`, if all of these runs have the same."""
    values = {run.config.get("run", {}).get(key) for run in runs}
    return values.pop() if len(values) == 1 else None


def _labels(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What sets each experiment apart from the others; for a single one its model and task."""
    keys = dict.fromkeys(key for config in configs for key in config)
    apart = [
        key
        for key in keys
        if len({json.dumps(config.get(key), sort_keys=True) for config in configs}) > 1
    ]
    shown = apart or ["model.name", "data.task"]
    return [
        ", ".join(f"{key}={config[key]}" for key in shown if key in config) or "all"
        for config in configs
    ]
