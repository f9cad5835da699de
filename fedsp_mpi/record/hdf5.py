"""What `run.h5` looks like inside: a frozen view of it, its bytes, and the way between the two.

Layout 1. Attributes of the root: format, layout, name, status, created, updated, committed_rounds
(written last).

    reason, config, config_text, environment    texts; config and environment are JSON
    sections/<name>                             JSON
    rounds, clients, silos, tiers, results, wire       tables, see tables.py
    prompts/<0007>/<tensor>                     a group for each round; while a run goes on, a link
                                                to the round's own file

The digest of the file's bytes follows the HDF5 file, see trailer.py.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from fedsp_mpi.files import untrusted
from fedsp_mpi.files.untrusted import JsonObject
from fedsp_mpi.log import one_line
from fedsp_mpi.record import additions, lock, reader, shapes, tables, trailer
from fedsp_mpi.record.additions import Addition

FORMAT = "fedsp_mpi run"
LAYOUT = 1
# The reason of a run whose lock nobody holds any more; readers find it out, nobody records it.
KILLED = "it was killed: no process writes to it any more"
_TEXTS = ("reason", "config_text")
_JSONS = ("config", "environment")
# In this order: the commit mark comes last.
_ATTRIBUTES = ("name", "status", "created", "updated", "committed_rounds")
# What may be added to a record beside rows of its tables, and the type that JSON has for it.
ADDED: dict[str, type] = {
    "status": str,
    "reason": str,
    "updated": str,
    "committed_rounds": int,
    "sections": dict,
}
# Likewise: a round, and the rounds from there on whose prompts were kept.
PROMPT_ROUNDS = "prompt_rounds"
_MAX_READS = 5  # of a run.h5 that another process replaces meanwhile
_MAX_REPORT_BYTES = 1 << 20  # of failure.txt
# Level 1: on 24.6 MB of normal fp32 noise (GPT2-XL's prefix) 0.3 s for 10.4 % less; level 4 takes
# 0.5 s for 11.1 %.
_PACKING = {"compression": "gzip", "compression_opts": 1, "shuffle": True, "fletcher32": True}


def _empty(name: str) -> np.ndarray:
    return tables.table(tables.TABLES[name])


@dataclass(frozen=True, eq=False, repr=False)
class Run:
    """A record as it was when it was read; only `prompts` reads the file again.

    Attributes:
        file: the run.h5.
        config: the resolved configuration; `config_text` is the same as YAML.
        environment: hosts, versions, commit.
        sections: more of what the record says about the run, by topic.
        status: "running", "complete", "stopped" or "failed"; `reason` says why.
        created, updated: UTC, ISO 8601, to the second.
        committed_rounds: number of the last round that is completely on disk; nothing above it is
            shown.
        rounds, clients, silos, tiers, results, wire: structured arrays [rows] with the fields of
            the row classes, read-only.
        prompt_rounds: the rounds whose prompts were kept.
        has_digest: whether the file's bytes were compared with a digest; those of earlier versions
            have none.
        digest: of the run.h5 that was read, by which what was added to it since is known.
    """

    file: Path
    name: str
    config: JsonObject
    config_text: str = ""
    environment: JsonObject = field(default_factory=dict)
    sections: dict[str, JsonObject] = field(default_factory=dict)
    status: str = "running"
    reason: str = ""
    created: str = ""
    updated: str = ""
    committed_rounds: int = 0
    rounds: np.ndarray = field(default_factory=lambda: _empty("rounds"))
    clients: np.ndarray = field(default_factory=lambda: _empty("clients"))
    silos: np.ndarray = field(default_factory=lambda: _empty("silos"))
    tiers: np.ndarray = field(default_factory=lambda: _empty("tiers"))
    results: np.ndarray = field(default_factory=lambda: _empty("results"))
    wire: np.ndarray = field(default_factory=lambda: _empty("wire"))
    prompt_rounds: tuple[int, ...] = ()
    has_digest: bool = True
    digest: str = ""

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.file.parent

    @property
    def prompt(self) -> Path | None:
        """The folder of the best prompts, a stock peft adapter; None where there is none."""
        return _existing(self.folder / "prompt")

    @property
    def adapter(self) -> Path | None:
        """The folder of low-rank adapters, in peft's form; None where there is none."""
        return _existing(self.folder / "adapter")

    @property
    def head(self) -> Path | None:
        """The folder of a classification head, as safetensors; None where there is none."""
        return _existing(self.folder / "head")

    @property
    def model(self) -> Path | None:
        """The folder of a fine-tuned model, in Hugging Face's form; None where there is none."""
        return _existing(self.folder / "model")

    def __repr__(self) -> str:
        return f"<Run {self.name}: {self.status}, {self.committed_rounds} rounds, {self.folder}>"

    def methods(self) -> set[str]:
        """Return the methods that have a result."""
        names = self.results["method"].tolist()
        return {name.decode() if isinstance(name, bytes) else name for name in names}

    def prompts(self, round: int) -> dict[str, np.ndarray]:
        """Return the prompts after a round by name, in the order and with the bits that were
        committed: `prompt` [num_tokens, row_width], or the parameters that `models.prompts.Prompt`
        names.

        Raises:
            ValueError: they were not kept, or cannot be read.
        """
        if round not in self.prompt_rounds:
            expected = "no round: this run kept no prompts"
            if self.prompt_rounds:
                expected = f"one of {_ranges(self.prompt_rounds)}"
            raise ValueError(f"{self.file}: found no prompts of round {round}, expected {expected}")
        with _reading(self.file):
            try:
                return _read_prompts(self.file, round)
            except KeyError:
                # The run may have finished since, and moved its prompts into the file.
                return _read_prompts(self.file, round)


def require_round_files(run: Run, last: int) -> None:
    """Check that the prompts of a run's rounds can be read, which its end moves into run.h5.

    Args:
        run: that is to go on.
        last: the last round whose prompts are looked at.

    Raises:
        ValueError: a round's file is missing or damaged.
    """
    if is_folded(run.file):
        return
    for round in run.prompt_rounds:
        path = run.folder / round_file(round)
        if round > last:
            continue
        with _reading(path):
            if not path.is_file():
                raise _RecordFileError(
                    f"{path}: found no file, expected the prompts of round {round}; copy the whole "
                    "run folder again, or begin it anew with --replace"
                )
            with reader.open_file(path) as source:
                reader.subgroup(source.h5, "prompt")


def _existing(folder: Path) -> Path | None:
    return folder if folder.is_dir() else None


# -- reading ---------------------------------------------------------------------------------------


def read(folder_or_file: str | Path) -> Run:
    """Read a run folder or a run.h5, also while the run goes on or after it was killed.

    Raises:
        ValueError: the file is missing, truncated, damaged, or not a record.
    """
    path = Path(folder_or_file)
    file = path / "run.h5" if path.is_dir() else path
    run = _read_file(file)
    if run.status != "running":
        return run
    report = file.with_name("failure.txt")
    if report.exists():  # the job ended too fast for the record to learn of it
        reason = _first_line(report)
        # The guard's word where a signal, or the death of another rank, ended the job.
        verdict, _, cause = reason.partition(": ")
        if verdict.endswith(" stopped"):
            return dataclasses.replace(run, status="stopped", reason=cause)
        return dataclasses.replace(run, status="failed", reason=reason)
    if lock.is_abandoned(file.parent):
        return dataclasses.replace(run, status="stopped", reason=KILLED)
    return run


def _read_file(file: Path) -> Run:
    """Read a run.h5 with what was added to it since; raise ValueError if that cannot be read.

    Of a file that another process replaces all the time, this is one of the states that it had.
    """
    earlier: Run | None = None
    with _reading(file):
        for _ in range(_MAX_READS):
            before = _identity(file)
            with reader.open_file(file) as source:
                _check_format(source.h5, file)
                run = _to_run(source)
            if not run.digest:
                return run
            # A run that ends writes a new run.h5, and removes what was added to this one.
            try:
                run = _with_additions(run, additions.read(file.parent, run.digest))
            except (OSError, ValueError):
                if _identity(file) == before:
                    raise
            else:
                if _identity(file) == before:
                    return run
                earlier = run
        if earlier is None:
            raise ValueError("a file that changes all the time")
        return earlier


def _identity(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_ino, status.st_mtime_ns


def _with_additions(run: Run, added: Sequence[Addition]) -> Run:
    """Return the record with all additions.

    Raises:
        ValueError: they are none that a run writes.
        KeyError: a table lacks a column.
    """
    if not added:
        return run
    fields: JsonObject = {}
    stays = {name: [getattr(run, name)] for name in tables.TABLES}
    parts: dict[str, list[np.ndarray]] = {name: [] for name in tables.TABLES}
    prompt_rounds = list(run.prompt_rounds)
    for addition in added:
        fields |= addition.fields
        new_rounds = fields.pop(PROMPT_ROUNDS, None)
        if new_rounds is not None:
            from_round, *rounds = map(int, new_rounds)
            prompt_rounds = [round for round in prompt_rounds if round < from_round] + rounds
        for name, rows in addition.replaced.items():
            stays[name] = []
            parts[name] = [rows]
        for name, rows in addition.appended.items():
            parts[name].append(rows)
    if not set(fields) <= set(ADDED):
        raise ValueError(f"additions of {untrusted.printable(str(sorted(fields)))}")
    for name, value in fields.items():
        if not isinstance(value, ADDED[name]):
            raise ValueError(f"a {type(value).__name__} as {name}")
    fields["prompt_rounds"] = tuple(prompt_rounds)
    for name, new_parts in parts.items():
        if new_parts:
            new_rows = _current(name, tables.joined(new_parts))
            fields[name] = tables.joined([*stays[name], new_rows])
    merged = dataclasses.replace(run, **fields)
    shapes.require(merged.config, merged.sections)
    return merged


def _first_line(report: Path) -> str:
    try:
        text = untrusted.read_bytes(report, _MAX_REPORT_BYTES).decode(errors="replace")
    except (OSError, ValueError) as error:
        return f"{report.name} cannot be read ({error})"
    return tables.clean(text.split("\n")[0])


def _to_run(source: reader.OpenFile) -> Run:
    """Build the view of an open file; rows above the commit mark are left out."""
    attributes: JsonObject = {}
    for name in _ATTRIBUTES:
        value = reader.attribute(source.h5, name)
        if not isinstance(value, int if name == "committed_rounds" else str):
            raise ValueError(f"{value!r} as attribute {name}")
        attributes[name] = value
    committed = attributes["committed_rounds"]

    arrays: JsonObject = {name: _read_table(source, name) for name in tables.TABLES}
    for name in ("rounds", "clients", "silos", "tiers"):
        is_committed = arrays[name]["round"] <= committed
        arrays[name] = tables.frozen(arrays[name][is_committed])

    texts = reader.texts(source, "/", (*_TEXTS, *_JSONS))
    sections = reader.texts(source, "sections")
    config = _parse_mapping("config", texts["config"])
    environment = _parse_mapping("environment", texts["environment"])
    parsed_sections = {name: _parse_mapping(name, text) for name, text in sections.items()}
    shapes.require(config, parsed_sections)

    prompt_rounds = [number for number in reader.round_numbers(source) if number <= committed]
    return Run(
        file=source.path,
        config=config,
        config_text=texts["config_text"],
        environment=environment,
        sections=parsed_sections,
        reason=texts["reason"],
        prompt_rounds=tuple(prompt_rounds),
        has_digest=source.trailer is not None,
        digest=source.trailer.digest if source.trailer else "",
        **attributes,
        **arrays,
    )


def _parse_mapping(name: str, text: str) -> JsonObject:
    try:
        value = untrusted.parse_json(text)
    except ValueError as error:
        raise ValueError(f"damaged text at {untrusted.printable(name)} ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(
            f"a {type(value).__name__} at {untrusted.printable(name)}, where a run writes a mapping"
        )
    return value


def _read_table(source: reader.OpenFile, name: str) -> np.ndarray:
    """Return a table [rows] of a file with the columns and types of today's row class."""
    if name in tables.LATER_TABLES and name not in source.h5:
        return _empty(name)
    return _current(name, reader.table(source, name))


def _current(name: str, stored: np.ndarray) -> np.ndarray:
    """Return a stored table [rows] with the columns and types of today's row class.

    Raises:
        KeyError: it lacks a column.
        ValueError: a column has another type.
    """
    extra = _extra_columns(name, stored.dtype)
    table_type = tables.table_type(tables.TABLES[name], extra)
    later_columns = tables.LATER.get(name, {})
    table = np.empty(len(stored), dtype=table_type)
    for column in table_type.names or ():
        if column not in (stored.dtype.names or ()):
            if column not in later_columns:
                raise KeyError(f"table {name} has no column {column}")
            table[column] = later_columns[column]
            continue
        values = stored[column]
        column_type = table_type[column]
        is_text = column_type.hasobject
        can_cast = is_text or np.can_cast(values.dtype, column_type, "safe")
        if is_text != values.dtype.hasobject or not can_cast:
            raise ValueError(
                f"{values.dtype} in column {column} of table {name}, which a run writes as "
                f"{column_type}"
            )
        if is_text:
            table[column] = [text.decode() if isinstance(text, bytes) else text for text in values]
        else:
            table[column] = values
    return tables.frozen(table)


def _extra_columns(name: str, stored: np.dtype) -> list[str]:
    """Return the columns of a method of one's own; other tables have none."""
    if tables.TABLES[name] is not tables.ClientRow:
        return []
    extra = tables.extra_columns(tables.ClientRow, stored)
    return [column for column in extra if stored[column] == np.float64]


def _read_prompts(file: Path, round: int) -> dict[str, np.ndarray]:
    """Return a round's prompts [*shape] by name, from run.h5 or from the round's own file."""
    name = link_name(round)
    with reader.open_file(file) as source:
        path: Path | None
        try:
            path = reader.linked_round(source, name)
        except KeyError:  # of a round that was added
            path = file.parent / round_file(round)
        if path is None:
            if source.trailer is not None:
                source.trailer.require_round(source.raw, name)
            prompts = reader.subgroup(source.h5, "prompts")
            return reader.tensors(reader.subgroup(prompts, name))
    if not path.exists():
        raise KeyError(f"no file {round_file(round)}")
    with _reading(path), reader.open_file(path) as source:
        return reader.tensors(reader.subgroup(source.h5, "prompt"))


def _check_format(h5: h5py.File, file: Path) -> None:
    if reader.attribute(h5, "format") != FORMAT:
        content = untrusted.printable(", ".join(reader.names(h5)[:4])) or "nothing"
        raise _RecordFileError(
            f"{file}: found an HDF5 file of something else (it holds {content}), "
            "expected the record of a run; name a run folder, or its run.h5"
        )
    layout = reader.attribute(h5, "layout")
    if layout != LAYOUT:
        raise _RecordFileError(
            f"{file}: found layout {layout!r}, expected {LAYOUT}; read it with the version "
            "of fedsp_mpi that wrote it"
        )


class _RecordFileError(ValueError):
    """A file is no record, or a damaged one; its message is a whole sentence for the user."""


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turn the errors of reader.py and of HDF5 into one message for the user.

    Raises ValueError.
    """
    expected = "expected the record of a run"
    try:
        yield
    except _RecordFileError:
        raise
    except FileNotFoundError:
        raise _RecordFileError(
            f"{file}: found no such file, {expected}; name a run folder, or its run.h5"
        ) from None
    except (OSError, RuntimeError, KeyError, TypeError, OverflowError, MemoryError) as error:
        if isinstance(error, PermissionError):
            raise _RecordFileError(
                f"{file}: found no permission to read it, {expected}; give permission"
            ) from None
        size = f"{file.stat().st_size} bytes" if file.is_file() else "no plain file"
        raise _RecordFileError(
            f"{file}: found {size} that cannot be read ({one_line(error, first_line=True)}), "
            f"{expected}; the file is truncated, is not HDF5, or was moved away from its rounds/ "
            "folder: copy the whole run folder again"
        ) from error
    except ValueError as error:
        raise _RecordFileError(
            f"{file}: found {one_line(error, first_line=True)}, {expected}; the file was damaged, "
            "or made by something else: copy the run folder again, or leave this run out"
        ) from error


# -- writing ---------------------------------------------------------------------------------------


def link_name(round: int) -> str:
    """Return the name of a round's prompts inside run.h5."""
    return f"{round:04d}"


def round_file(round: int) -> str:
    """Return the file of a round's prompts, relative to the run folder."""
    return f"rounds/{link_name(round)}.h5"


def is_folded(file: Path) -> bool:
    """Return whether prompts lie in `file` itself. Raises ValueError if it cannot be read."""
    with _reading(file), reader.open_file(file) as source:
        names = [link_name(round) for round in reader.round_numbers(source)]
        return any(reader.linked_round(source, name) is None for name in names)


def to_plain(value: object, where: str) -> Any:
    """Return a value as it comes back from JSON.

    Raises:
        ValueError: JSON cannot hold it; the error names `where`.
    """
    try:
        return json.loads(json.dumps(value, default=_to_json))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}; expected numbers, texts, lists and mappings") from None


def run_image(run: Run) -> bytes:
    """Return the bytes of run.h5, with links to the prompts.

    They are built in memory, so that a full disk cannot leave HDF5 half-way.
    """
    with h5py.File("run.h5", "w", driver="core", backing_store=False) as h5:
        for name in _TEXTS:
            _write_text(h5, name, getattr(run, name))
        for name in _JSONS:
            _write_text(h5, name, json.dumps(getattr(run, name), ensure_ascii=False))
        sections = h5.create_group("sections")
        for name, section in run.sections.items():
            _write_text(sections, name, json.dumps(section, ensure_ascii=False))
        for name in tables.TABLES:
            table = getattr(run, name)
            # A chunk of just these rows: HDF5 fills up a longer one with whatever lay in memory.
            chunks = (max(1, len(table)),)
            data = h5.create_dataset(
                name, table.shape, table.dtype, maxshape=(None,), chunks=chunks
            )
            data[...] = table
        prompts = h5.create_group("prompts")
        for round in run.prompt_rounds:
            prompts[link_name(round)] = h5py.ExternalLink(round_file(round), "/prompt")
        h5.attrs["format"] = FORMAT
        h5.attrs["layout"] = LAYOUT
        for name in _ATTRIBUTES:
            value = getattr(run, name)
            h5.attrs[name] = tables.clean(value) if isinstance(value, str) else value
        h5.flush()
        return h5.id.get_file_image()


def prompts_image(prompts: Mapping[str, np.ndarray]) -> bytes:
    """Return the bytes of one round's file: `prompt/<tensor>`, gzip with shuffle and checksums.

    Trained fp32 values look like noise, and noise shrinks by a tenth only (normal values: to
    0.896); what is fp16 inside shrinks to 0.53. The bits come back exactly.

    Args:
        prompts: arrays [*shape] of any numeric dtype, by name.
    """
    with h5py.File("prompts.h5", "w", driver="core", backing_store=False) as h5:
        group = h5.create_group("prompt")
        for position, (name, value) in enumerate(prompts.items()):
            array = np.asarray(value)
            assert array.dtype.kind in "fiu", f"{name}: a prompt of {array.dtype}"
            # HDF5 cannot pack scalars and empty arrays.
            packing = {"chunks": True, **_PACKING} if array.size and array.ndim else {}
            data = group.create_dataset(name, data=array, **packing)
            data.attrs["position"] = position
        h5.flush()
        return h5.id.get_file_image()


def unfolded_image(file: Path, round: int) -> bytes:
    """Return the bytes of one round's file, taken out of a run.h5 that holds the prompts itself.

    Raises:
        ValueError: they are damaged.
    """
    name = link_name(round)
    with _reading(file), reader.open_file(file) as source:
        if source.trailer is not None:
            source.trailer.require_round(source.raw, name)
        prompts = reader.subgroup(source.h5, "prompts")
        with h5py.File("prompts.h5", "w", driver="core", backing_store=False) as h5:
            source.h5.copy(reader.subgroup(prompts, name), h5, "prompt")
            h5.flush()
            return h5.id.get_file_image()


def fold_into(part: Path, folder: Path, prompt_rounds: tuple[int, ...]) -> None:
    """Replace the links in a run.h5 by the prompts that they lead to, and add the trailer.

    Args:
        part: a run.h5 without a trailer.
        folder: of the run.
        prompt_rounds: the rounds whose prompts were kept.

    Raises:
        ValueError: a round's file is damaged.
        OSError, KeyError, RuntimeError: a file cannot be read or written.
    """
    with h5py.File(part, "r+", locking="best-effort") as h5:
        for round in prompt_rounds:
            del h5["prompts"][link_name(round)]
            path = folder / round_file(round)
            with _reading(path), reader.open_file(path) as source:
                prompt = reader.subgroup(source.h5, "prompt")
                source.h5.copy(prompt, h5["prompts"], link_name(round))
    with part.open("r+b") as file:
        with h5py.File(file, "r") as h5:
            names = [link_name(round) for round in prompt_rounds]
            extents = {name: reader.extents(h5["prompts"][name]) for name in names}
        end = trailer.of_file(file, extents)
        file.seek(0, 2)
        file.write(end)


def _write_text(group: h5py.Group, name: str, text: str) -> None:
    """Write a text as a data set: HDF5 attributes end at 64 KiB."""
    group.create_dataset(name, data=tables.clean(text), dtype=h5py.string_dtype())


def _to_json(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"found a {type(value).__name__}")


def _ranges(numbers: tuple[int, ...]) -> str:
    """Write [1, 2, 3, 7] as "1-3, 7"."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in ranges]
    return ", ".join(texts)
