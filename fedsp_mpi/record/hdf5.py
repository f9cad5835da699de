"""What `run.h5` looks like inside: a frozen view of it, and the way from the view to bytes and
back.

Layout 1. Attributes of the root: format, layout, name, status, created, updated, committed_rounds
(written last).
    reason, config, config_text, environment     text; all but reason and config_text are JSON
    sections/<name>                              JSON rounds, clients, results, wire
    tables, see rows.py prompts/<0007>/<tensor>                      one group a round; while a run
    goes on, a link to its own file

The digest of the file's bytes follows the HDF5 file, see trailer.py.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from fedsp_mpi.files import untrusted
from fedsp_mpi.record import lock, reader, shapes, trailer
from fedsp_mpi.record import tables as rows

KILLED = "it was killed: no process writes to it any more"  # what a reader finds out from the lock
FORMAT, LAYOUT = "fedsp_mpi run", 1
_TEXTS = ("reason", "config_text")
_JSONS = ("config", "environment")
_LONGEST_REPORT = 1 << 20  # bytes of failure.txt
_ATTRIBUTES = (
    "name",
    "status",
    "created",
    "updated",
    "committed_rounds",
)  # in this order: the commit mark comes last
# Level 1: on 24.6 MB of normal fp32 noise (GPT2-XL's prefix) 0.3 s for 10.4 % less; level 4 takes
# 0.5 s for 11.1 %.
_PACKING = {"compression": "gzip", "compression_opts": 1, "shuffle": True, "fletcher32": True}


def _empty(name: str) -> np.ndarray:
    return rows.table(rows.TABLES[name])


@dataclass(frozen=True, eq=False)
class Run:
    """A record as it was when it was read; only `prompts` goes back to the file.

    Attributes:
        status: "running", "complete", "stopped" or "failed".
        created, updated: UTC, ISO 8601, to the second.
        committed_rounds: number of the last round that is wholly on disk; nothing above it is
            shown. rounds, clients, results, wire: structured arrays [rows] with the fields of the
            row classes, read-only.
        prompt_rounds: the rounds whose prompts were kept.
        has_digest: whether the file's bytes were compared with a digest; those of earlier versions
            have none.
    """

    file: Path
    name: str
    config: dict[str, Any]
    config_text: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    status: str = "running"
    reason: str = ""
    created: str = ""
    updated: str = ""
    committed_rounds: int = 0
    rounds: np.ndarray = field(default_factory=lambda: _empty("rounds"))
    clients: np.ndarray = field(default_factory=lambda: _empty("clients"))
    results: np.ndarray = field(default_factory=lambda: _empty("results"))
    wire: np.ndarray = field(default_factory=lambda: _empty("wire"))
    prompt_rounds: tuple[int, ...] = ()
    has_digest: bool = True

    def methods(self) -> set[str]:
        """The methods that have a result."""
        return {row.decode() if isinstance(row, bytes) else row for row in self.results["method"]}

    def prompts(self, round: int) -> dict[str, np.ndarray]:
        """The prompts after `round`, in the order and with the bits in which they were committed.

        Raises ValueError if they were not kept, or cannot be read.
        """
        if round not in self.prompt_rounds:
            kept = (
                f"one of {_spans(self.prompt_rounds)}"
                if self.prompt_rounds
                else "no round: this run kept no prompts"
            )
            raise ValueError(f"{self.file}: found no prompts of round {round}, expected {kept}")
        with _reading(self.file):
            try:
                return _read_prompts(self.file, round)
            except (
                KeyError
            ):  # the run may have finished since, and folded its prompts into the file
                return _read_prompts(self.file, round)


def read(folder_or_file: str | Path) -> Run:
    """Read a run folder or a run.h5; also while the run goes on, and after it was killed.

    Raises ValueError if the file is missing, truncated, damaged, or not a record.
    """
    path = Path(folder_or_file)
    file = path / "run.h5" if path.is_dir() else path
    with _reading(file), reader.opened(file) as opened:
        _check_format(opened.h5, file)
        run = _restore(opened)
    report = file.with_name("failure.txt")
    if (
        run.status == "running" and report.exists()
    ):  # the job ended too fast for the record to be told
        return dataclasses.replace(run, status="failed", reason=_first_line(report))
    if run.status == "running" and lock.is_abandoned(file.parent):
        return dataclasses.replace(run, status="stopped", reason=KILLED)
    return run


def _first_line(report: Path) -> str:
    try:
        return rows.clean(
            untrusted.read_bytes(report, _LONGEST_REPORT).decode(errors="replace").split("\n")[0]
        )
    except (OSError, ValueError) as error:
        return f"{report.name} cannot be read ({error})"


def resume_command(folder: Path, config: Mapping[str, Any]) -> str:
    """What a user types to go on with the run in a folder, whatever the options of its start were."""
    folder = folder if folder.name not in ("", "..") else folder.resolve()
    words = [
        "python",
        "-m",
        "fedsp_mpi",
        "run",
        str(folder / "config.yaml"),
        "--name",
        folder.name,
        "--resume",
    ]
    runs = Path(str(config.get("run", {}).get("folder", ""))).expanduser()
    if runs.resolve() != folder.parent.resolve():
        words += ["--set", f"run.folder={folder.parent}"]
    return shlex.join(words)


def link_name(round: int) -> str:
    """The name of a round's prompts inside run.h5."""
    return f"{round:04d}"


def round_file(round: int) -> str:
    """The file of a round's prompts, relative to the run folder."""
    return f"rounds/{link_name(round)}.h5"


def is_folded(file: Path) -> bool:
    """Whether the prompts lie in `file` itself. Raises ValueError if it cannot be read."""
    with _reading(file), reader.opened(file) as opened:
        every = map(link_name, reader.round_numbers(opened))
        return any(reader.linked_round(opened, name) is None for name in every)


def plain(value: Any, where: str) -> Any:
    """The value as it comes back from JSON.

    Raises ValueError naming `where` if JSON has no such thing.
    """
    try:
        return json.loads(json.dumps(value, default=_to_json))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}; expected numbers, texts, lists and mappings") from None


def run_image(run: Run) -> bytes:
    """The bytes of run.h5, prompts as links.

    Built in memory, so that a full disk cannot leave HDF5 half-way.
    """
    with h5py.File("run.h5", "w", driver="core", backing_store=False) as h5:
        for name in _TEXTS:
            _write_text(h5, name, getattr(run, name))
        for name in _JSONS:
            _write_text(h5, name, json.dumps(getattr(run, name), ensure_ascii=False))
        sections = h5.create_group("sections")
        for name, section in run.sections.items():
            _write_text(sections, name, json.dumps(section, ensure_ascii=False))
        for name in rows.TABLES:
            data = getattr(run, name)
            # A chunk of just these rows: HDF5 fills up a longer one with whatever lay in memory.
            table = h5.create_dataset(
                name, data.shape, data.dtype, maxshape=(None,), chunks=(max(1, len(data)),)
            )
            table[...] = data
        prompts = h5.create_group("prompts")
        for round in run.prompt_rounds:
            prompts[link_name(round)] = h5py.ExternalLink(round_file(round), "/prompt")
        h5.attrs["format"], h5.attrs["layout"] = FORMAT, LAYOUT
        for name in _ATTRIBUTES:
            value = getattr(run, name)
            h5.attrs[name] = rows.clean(value) if isinstance(value, str) else value
        h5.flush()
        return h5.id.get_file_image()


def prompts_image(prompts: Mapping[str, np.ndarray]) -> bytes:
    """The bytes of one round's file: `prompt/<tensor>`, gzip with shuffle, each chunk with a
    checksum.

    Trained fp32 values look like noise, and noise shrinks by a tenth only (normal values: to
    0.896); what is fp16 inside shrinks to 0.53. The bits come back exactly.
    """
    with h5py.File("prompts.h5", "w", driver="core", backing_store=False) as h5:
        group = h5.create_group("prompt")
        for position, (name, array) in enumerate(prompts.items()):
            array = np.asarray(array)
            assert array.dtype.kind in "fiu", f"{name}: a prompt of {array.dtype}"
            packing = {"chunks": True, **_PACKING} if array.size and array.ndim else {}
            group.create_dataset(name, data=array, **packing).attrs["position"] = position
        h5.flush()
        return h5.id.get_file_image()


def unfolded_image(file: Path, round: int) -> bytes:
    """The bytes of one round's file, taken out of a folded run.h5.

    Raises ValueError if they are damaged.
    """
    name = link_name(round)
    with _reading(file), reader.opened(file) as folded:
        if folded.trailer is not None:
            folded.trailer.require_round(folded.file, name)
        prompts = reader.subgroup(folded.h5, "prompts")
        with h5py.File("prompts.h5", "w", driver="core", backing_store=False) as h5:
            folded.h5.copy(reader.subgroup(prompts, name), h5, "prompt")
            h5.flush()
            return h5.id.get_file_image()


def fold_into(part: Path, folder: Path, prompt_rounds: tuple[int, ...]) -> None:
    """Replace the links in `part`, which has no trailer, by what they point to, as it lies on disk;
    add the trailer.

    Raises ValueError if a round's file is damaged, OSError, KeyError or RuntimeError if one cannot
    be read or written.
    """
    with h5py.File(part, "r+", locking="best-effort") as h5:
        for round in prompt_rounds:
            del h5["prompts"][link_name(round)]
            path = folder / round_file(round)
            with _reading(path), reader.opened(path) as source:
                source.h5.copy(
                    reader.subgroup(source.h5, "prompt"), h5["prompts"], link_name(round)
                )
    with part.open("r+b") as file:
        with h5py.File(file, "r") as h5:
            extents = {
                name: reader.extents(h5["prompts"][name]) for name in map(link_name, prompt_rounds)
            }
        end = trailer.of_file(file, extents)
        file.seek(0, 2)
        file.write(end)


def _restore(opened: reader.Opened) -> Run:
    """The view of an open file; rows above the commit mark are not trusted."""
    attributes = {name: reader.attribute(opened.h5, name) for name in _ATTRIBUTES}
    committed = attributes["committed_rounds"]
    for name, value in attributes.items():
        if not isinstance(value, str if name != "committed_rounds" else int):
            raise ValueError(f"{value!r} as attribute {name}")
    tables: dict[str, Any] = {name: _read_table(opened, name) for name in rows.TABLES}
    for name in ("rounds", "clients"):
        tables[name] = rows.frozen(tables[name][tables[name]["round"] <= committed])
    texts = reader.texts(opened, "/", (*_TEXTS, *_JSONS))
    sections = reader.texts(opened, "sections")
    parts: dict[str, Any] = {name: texts[name] for name in _TEXTS}
    parts |= {name: _mapping(name, texts[name]) for name in _JSONS}
    parts["sections"] = {name: _mapping(name, text) for name, text in sections.items()}
    shapes.require(parts["config"], parts["sections"])
    return Run(
        file=opened.path,
        **attributes,
        **parts,
        **tables,
        prompt_rounds=tuple(
            number for number in reader.round_numbers(opened) if number <= committed
        ),
        has_digest=opened.trailer is not None,
    )


def _mapping(name: str, text: str) -> dict[str, Any]:
    try:
        value = untrusted.parse_json(text)
    except ValueError as error:
        raise ValueError(f"damaged text at {untrusted.printable(name)} ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(
            f"a {type(value).__name__} at {untrusted.printable(name)}, where a run writes a mapping"
        )
    return value


def _read_table(opened: reader.Opened, name: str) -> np.ndarray:
    stored, kind = reader.table(opened, name), rows.table_type(rows.TABLES[name])
    data = np.empty(len(stored), dtype=kind)
    for column in kind.names or ():
        if column not in (stored.dtype.names or ()):
            if column in rows.LATER.get(name, {}):
                data[column] = rows.LATER[name][column]
                continue
            raise KeyError(f"table {name} has no column {column}")
        values, is_text = stored[column], kind[column].hasobject
        if is_text != values.dtype.hasobject or (
            not is_text and not np.can_cast(values.dtype, kind[column], "safe")
        ):
            raise ValueError(
                f"{values.dtype} in column {column} of table {name}, which a run writes as "
                f"{kind[column]}"
            )
        data[column] = [text.decode() for text in values] if is_text else values
    return rows.frozen(data)


def _read_prompts(file: Path, round: int) -> dict[str, np.ndarray]:
    name = link_name(round)
    with reader.opened(file) as opened:
        path = reader.linked_round(opened, name)
        if path is None:
            if opened.trailer is not None:
                opened.trailer.require_round(opened.file, name)
            return reader.tensors(reader.subgroup(reader.subgroup(opened.h5, "prompts"), name))
    if not path.exists():
        raise KeyError(f"no file {round_file(round)}")
    with _reading(path), reader.opened(path) as alone:
        return reader.tensors(reader.subgroup(alone.h5, "prompt"))


def _check_format(h5: h5py.File, file: Path) -> None:
    if reader.attribute(h5, "format") != FORMAT:
        held = untrusted.printable(", ".join(reader.names(h5)[:4])) or "nothing"
        raise _Misnamed(
            f"{file}: found an HDF5 file of something else (it holds {held}), "
            "expected the record of a run; name a run folder, or its run.h5"
        )
    if (layout := reader.attribute(h5, "layout")) != LAYOUT:
        raise _Misnamed(
            f"{file}: found layout {layout!r}, expected {LAYOUT}; read it with the version "
            "of fedsp_mpi that wrote it"
        )


class _Misnamed(ValueError):
    """A whole sentence on a file that is none of ours."""


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turn what is wrong with a file, as reader.py or HDF5 says it, into one message for the user."""
    advice = "expected the record of a run"
    try:
        yield
    except _Misnamed:
        raise
    except FileNotFoundError:
        raise _Misnamed(
            f"{file}: found no such file, {advice}; name a run folder, or its run.h5"
        ) from None
    except (OSError, RuntimeError, KeyError, TypeError, OverflowError, MemoryError) as error:
        size = f"{file.stat().st_size} bytes" if file.is_file() else "no plain file"
        raise _Misnamed(
            f"{file}: found {size} that cannot be read ({rows.first_line(error)}), "
            f"{advice}; the file is truncated, is "
            "not HDF5, or was moved away from its rounds/ folder: copy the whole run folder again"
        ) from error
    except ValueError as error:
        raise _Misnamed(
            f"{file}: found {rows.first_line(error)}, {advice}; the file was damaged, or "
            "made by something else: copy "
            "the run folder again, or leave this run out"
        ) from error


def _write_text(group: h5py.Group, name: str, text: str) -> None:
    """Text as a dataset: HDF5 attributes end at 64 KiB."""
    group.create_dataset(name, data=rows.clean(text), dtype=h5py.string_dtype())


def _to_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"found a {type(value).__name__}")


def _spans(numbers: tuple[int, ...]) -> str:
    """[1, 2, 3, 7] as "1-3, 7"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
