"""Write what a simulation deals out as one folder per silo, and the server's.

Each folder holds Parquet files in the task's columns. Reading one back gives the very examples of
that owner, in its order.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from fedsp_mpi import config, report
from fedsp_mpi.config import Config, ConfigError, DataConfig
from fedsp_mpi.config.limits import MOST_SILOS
from fedsp_mpi.config.parsing import Section, put
from fedsp_mpi.config.yaml_reader import key_value, setting
from fedsp_mpi.data import loading, sources
from fedsp_mpi.data.examples import Example, without_label
from fedsp_mpi.data.labels import number_in_cell
from fedsp_mpi.data.partition import ColumnValue
from fedsp_mpi.data.tasks import Task
from fedsp_mpi.files import ownership
from fedsp_mpi.files.untrusted import JsonObject
from fedsp_mpi.log import Log
from fedsp_mpi.run.inputs import ExperimentInputs

PICTURE = "labels.png"
CONFIGURATION = "silos.yaml"
_SERVER = "server"
_LEAST_DIGITS = 3  # of a client's number in its name
_LONGEST_NAME = 40  # characters of a value in its name
_NO_CLASSES = "examples"  # the only label where a task has no classes
_NO_LABEL = "no label"


@dataclass(frozen=True)
class Owner:
    """The server or a client, and what it owns.

    Attributes:
        name: of its folder.
        examples: by split, at least one in each.
        value: of the column that makes it a client, if one does.
    """

    name: str
    examples: Mapping[str, Sequence[Example]]
    value: ColumnValue | None = None

    @property
    def train(self) -> Sequence[Example]:
        """The training examples; empty for a server without a shard."""
        return self.examples.get("train", ())


def split(
    path: str | None, overrides: list[str], folder: Path, *, log: Log, replace: bool = False
) -> None:
    """Write the shards of a configuration's simulation as folders, with a manifest and a picture.

    Args:
        path: of the configuration; None: the embedded default.
        overrides: items `key=value`.
        folder: to write into: absent, empty, or that of a split that was killed.
        log: gets a line for each owner at most, and where to go on.
        replace: write a complete split in `folder` anew.

    Raises:
        ValueError: the configuration cannot be split, or the folder cannot be written.
    """
    settings = _settings(path, overrides)
    inputs = ExperimentInputs(settings)
    ownership.require_split(folder, replace=replace)
    ownership.require_apart(
        folder,
        {"the configuration": path, **inputs.paths},
        owner="split",
        advice="choose another --to",
    )
    if inputs.column_shards is not None and not _gives_clients(path, overrides):
        clients = f"federation.clients={len(inputs.column_shards.values)}"
        settings = config.load(path, [*overrides, clients])
        inputs = ExperimentInputs(settings)
    owners = _owners(inputs)
    for note in inputs.splits.notes + inputs.partition_notes:
        log.say(note)
    try:
        names = [owner.name for owner in owners]
        ownership.begin_split(folder, names, private=settings.run.permissions == "private")
        tables = _Tables(inputs, owners)
        digests = _write_rows(folder, owners, tables, log=log)
        classes = _classes(owners, inputs.task)
        _draw(folder / PICTURE, owners, classes, log=log)
        text = _configuration(path, overrides, folder.resolve(), owners=owners, inputs=inputs)
        ownership.write_new(folder / CONFIGURATION, text)
        manifest = _manifest(owners, classes, digests, inputs=inputs)
        ownership.finish_split(folder, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise ValueError(
            f"{folder}: found no way to write the split ({error.strerror or error}), expected a "
            "folder with room; make room or give permission, and run the same command again"
        ) from None
    log.say(f"run it: python -m fedsp_mpi run {shlex.quote(str(folder / CONFIGURATION))}")


# -- what is split ---------------------------------------------------------------------------------


def _settings(path: str | None, overrides: list[str]) -> Config:
    """Load a configuration that can be split.

    Raises:
        ConfigError: it cannot.
    """
    settings = config.load(path, overrides)
    if settings.attack.target is not None:
        raise ConfigError(
            f"attack.target: found {settings.attack.target}, expected none: a split writes what "
            "clients own, and no poisoned copies; add --set attack.target=null --set "
            "attack.clients=[], and set them again when you run the silos"
        )
    if settings.tiers.experts:
        raise ConfigError(
            f"tiers.experts: found {len(settings.tiers.experts)}, expected none: a split has one "
            "server's text and no experts'; split each domain's data by a configuration of another "
            "method"
        )
    if settings.federation.silos:
        raise ConfigError(
            f"federation.silos: found {len(settings.federation.silos)}, expected none: their text "
            "is divided already; split the configuration that they come from"
        )
    num_clients = settings.federation.clients
    if not 1 <= num_clients <= MOST_SILOS:
        raise ConfigError(
            f"federation.clients: found {num_clients}, expected from 1 to {MOST_SILOS}, each of "
            "which gets a folder; set it"
        )
    return settings


def _gives_clients(path: str | None, overrides: list[str]) -> bool:
    """Return whether the user says how many clients there are."""
    section = config.given(path, overrides).get("federation")
    return isinstance(section, dict) and "clients" in section


def _owners(inputs: ExperimentInputs) -> list[Owner]:
    """Return the server, then the clients, with their examples in the simulation's order."""
    splits = inputs.splits
    server_shard, *client_shards = [
        [splits.train[row] for row in shard.tolist()] for shard in inputs.shards
    ]
    server_examples: dict[str, Sequence[Example]] = {"train": server_shard} if server_shard else {}
    server_examples |= {"validation": splits.validation, "test": splits.test}
    for shard, places in zip(client_shards, inputs.labelled_places or ()):
        labelled = set(places.tolist())
        shard[:] = [
            example if place in labelled else without_label(example)
            for place, example in enumerate(shard)
        ]
    column = inputs.column_shards
    values = column.values if column else [None] * len(client_shards)
    num_digits = max(_LEAST_DIGITS, len(str(len(client_shards) - 1)))
    owners = [Owner(_SERVER, server_examples)]
    for client, (shard, value) in enumerate(zip(client_shards, values)):
        number = f"{client:0{num_digits}d}"
        name = f"client_{number}" if value is None else f"{number}_{_as_name(value)}"
        owners.append(Owner(name, {"train": shard}, value))
    return owners


def _as_name(value: ColumnValue) -> str:
    """Write a value of a column in letters, digits, '.', '_' and '-', which any folder may have."""
    text = unicodedata.normalize("NFKD", str(value)).encode("ascii", "ignore").decode()
    name = re.sub(r"[^A-Za-z0-9.-]+", "_", text).strip("_.")
    return name[:_LONGEST_NAME].rstrip("_.") or "value"


# -- rows ------------------------------------------------------------------------------------------


class _Tables:
    """The rows of owners, as they are written.

    Args:
        inputs: of the experiment that the owners are those of.
        owners: all of them.
    """

    def __init__(self, inputs: ExperimentInputs, owners: Sequence[Owner]) -> None:
        self._tables, _ = loading.read_tables(
            inputs.task, inputs.source, inputs.config.data.columns
        )
        self._task, _ = loading.with_found_classes(inputs.task, self._tables)
        self._has_numerals = self._labels_are_numerals(owners)

    def of(self, owner: Owner, split: str) -> sources.Table:
        """Return an owner's rows of a split, in the task's columns, those of few labels without.

        Raises:
            ValueError: they would be read back to other examples.
        """
        examples = owner.examples[split]
        table = loading.rows_of(self._tables, examples)
        if self._has_numerals:
            answer_column = self._task.columns[-1]
            numbers = [number_in_cell(cell) for cell in table[answer_column]]
            table = sources.with_values(table, answer_column, numbers)
        is_labelled = [bool(example.gold) for example in examples]
        if not all(is_labelled):
            table = sources.without_values(table, self._task.columns[-1], is_labelled)
        expected = [example if example.gold else None for example in examples]
        if loading.read_again(self._task, table) != expected:
            raise ValueError(
                f"data.source: found rows of {split} of {owner.name} that would be read back to "
                "other examples from Parquet, expected labels of one kind, numbers or words; "
                "correct the labels"
            )
        return table

    def _labels_are_numerals(self, owners: Sequence[Owner]) -> bool:
        """Return whether labels are texts that all write whole numbers, as those of CSV may be.

        Parquet has numbers for them, and a text in it may mean a choice's words.
        """
        answer_column = self._task.columns[-1]
        is_csv = any(table.info.builder_name == "csv" for table in self._tables.values())
        if not is_csv or not self._task.answers_are_positions:
            return False
        for owner in owners:
            for examples in owner.examples.values():
                cells = loading.rows_of(self._tables, examples)[answer_column]
                if not all(isinstance(number_in_cell(cell), int) for cell in cells):
                    return False
        return True


def _digest(table: sources.Table) -> str:
    """Return the SHA-256 digest of a table's rows in their order, in hexadecimal.

    Of each row as JSON with sorted keys, with a line end behind it.
    """
    combined = hashlib.sha256()
    for row in table.to_list():
        line = json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)
        combined.update(f"{line}\n".encode("utf-8", "surrogatepass"))
    return combined.hexdigest()


# -- files -----------------------------------------------------------------------------------------


def _write_rows(
    folder: Path, owners: Sequence[Owner], tables: _Tables, *, log: Log
) -> dict[str, dict[str, str]]:
    """Write the rows of all owners.

    Args:
        folder: to write into.
        owners: the server and the clients.
        tables: their rows.
        log: gets how far it is.

    Returns:
        Digests of rows by owner and split.
    """
    progress = log.progress("folder", len(owners))
    digests: dict[str, dict[str, str]] = {}
    for owner in owners:
        ownership.make_folder(folder / owner.name)
        digests[owner.name] = {}
        for split_name in owner.examples:
            table = tables.of(owner, split_name)
            path = folder / owner.name / f"{split_name}.parquet"
            part = path.with_name(f"{path.name}.part")
            sources.write_parquet(table, part)
            ownership.apply_folder_mode(part)
            part.replace(path)
            digests[owner.name][split_name] = _digest(table)
        progress.step()
    sizes = [len(owner.train) for owner in owners[1:]]
    server_sizes = ", ".join(
        f"{len(examples)} of {split_name}" for split_name, examples in owners[0].examples.items()
    )
    log.say(
        f"{len(sizes)} silos with {min(sizes)} to {max(sizes)} examples, a server with "
        f"{server_sizes}, in {folder}"
    )
    return digests


def _draw(path: Path, owners: Sequence[Owner], classes: Sequence[str], *, log: Log) -> None:
    """Draw who owns how many training examples of each class.

    Args:
        path: of the picture.
        owners: the server, which is left out without a shard, and the clients.
        classes: of the task; none: it has no classes.
        log: gets a line if there is no matplotlib.
    """
    if not report.can_draw():
        log.say(
            f"no {path.name}, because matplotlib is missing: pip install -c constraints.txt -e "
            "'.[plot]'"
        )
        return
    drawn = [owner for owner in owners if owner.train]
    counts: dict[str, list[int]] = {}
    for place, owner in enumerate(drawn):
        labels = _labels(owner.train, classes) if classes else {_NO_CLASSES: len(owner.train)}
        for name, count in labels.items():
            counts.setdefault(name, [0] * len(drawn))[place] = count
    report.draw_shards([owner.name for owner in drawn], counts, path)
    ownership.apply_folder_mode(path)


def _classes(owners: Sequence[Owner], task: Task) -> tuple[str, ...]:
    """Return the choices that all examples have in common; none if they differ."""
    if task.metric != "multiple_choice":
        return ()
    choices = {
        example.choices
        for owner in owners
        for examples in owner.examples.values()
        for example in examples
    }
    return choices.pop() if len(choices) == 1 else ()


def _labels(examples: Sequence[Example], classes: Sequence[str]) -> dict[str, int]:
    """Return the number of examples by class, and of those without a label if there are any."""
    numbers = Counter(example.gold[0] if example.gold else None for example in examples)
    counts = {name: numbers[number] for number, name in enumerate(classes)}
    return counts | {_NO_LABEL: numbers[None]} if numbers[None] else counts


def _manifest(
    owners: Sequence[Owner],
    classes: Sequence[str],
    digests: Mapping[str, Mapping[str, str]],
    *,
    inputs: ExperimentInputs,
) -> JsonObject:
    """Return what was written: the data's configuration, and what is in each owner's folder.

    Args:
        owners: the server and the clients.
        classes: of the task; none: it has no classes.
        digests: of rows, by owner and split.
        inputs: of the experiment.
    """
    data = asdict(inputs.config.data)
    if data["source"] is not None and Path(data["source"]).expanduser().is_absolute():
        data["source"] = Path(data["source"]).name
    entries: list[JsonObject] = []
    for owner in owners:
        entry: JsonObject = {"name": owner.name, "folder": owner.name}
        if owner.value is not None:
            entry["value"] = owner.value
        entry["rows"] = {name: len(examples) for name, examples in owner.examples.items()}
        entry["digests"] = digests[owner.name]
        if classes:
            entry["labels"] = {
                name: _labels(examples, classes) for name, examples in owner.examples.items()
            }
        entries.append(entry)
    return {
        "format": ownership.SPLIT_FORMAT,
        "version": ownership.SPLIT_VERSION,
        "seed": inputs.config.run.seed,
        "data": data,
        "left_out": inputs.column_shards.num_left_out if inputs.column_shards else 0,
        "owners": entries,
    }


def _configuration(
    path: str | None,
    overrides: list[str],
    folder: Path,
    *,
    owners: Sequence[Owner],
    inputs: ExperimentInputs,
) -> str:
    """Return a configuration of the silos: the given one, with what was dealt out in its place.

    Args:
        path: of the given configuration; None: the embedded default.
        overrides: of it.
        folder: of the silos, absolute.
        owners: the server and the clients.
        inputs: of the given configuration.
    """
    base = Path(path) if path is not None else config.EMBEDDED
    content: Section = {"extends": str(base.resolve())}
    for item in overrides:
        key, value = key_value(item)
        put(content, key, value, whose=setting(item))
    names = [owner.name for owner in owners[1:]]
    values: dict[str, object] = {
        "federation.clients": len(names),
        "federation.silos": {"source": f"{folder}/{{silo}}", "names": names},
        "server.data": {"source": f"{folder}/{_SERVER}"},
        "data.source": None,
        "data.limit": dict.fromkeys(asdict(inputs.config.data.limit)),
        "data.shots": None,
        "data.labels": None,
        "data.partition": "iid",
        "data.partition_column": None,
        "data.server_share": None,
    }
    if inputs.config.data.columns:
        # The files have the task's names. An empty section would change nothing.
        values["data.columns"] = {
            name: name if isinstance(column, str) else list(column)
            for name, column in inputs.config.data.columns.items()
        }
        if inputs.config.data.template is not None:
            values["data.template"] = _with_task_names(inputs.config.data)
    if inputs.task.reader is not None:
        # A silo may lack rows of a class: all have those of the one source.
        tables, _ = loading.read_tables(inputs.task, inputs.source, inputs.config.data.columns)
        values["data.classes"] = list(loading.class_names(inputs.task, tables))
    for key, value in values.items():
        put(content, key, value, whose=key)
    head = "# Written by `split`: the same experiment, with a folder for each silo.\n"
    return head + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _with_task_names(data: DataConfig) -> str | None:
    """Return the template with the task's names of columns in the place of the source's."""
    template = data.template
    for name, column in data.columns.items():
        if template is not None and isinstance(column, str):
            field = rf"(?<!\{{)\{{{re.escape(column)}\}}(?!\}})"
            template = re.sub(field, f"{{{name}}}", template)
    return template
