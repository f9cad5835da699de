"""Records that somebody else made: nothing outside of them is read, nothing is believed, and no
terminal obeys them.
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
import re
import resource
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from fedsp_mpi.cli import main
from fedsp_mpi.config import Config
from fedsp_mpi.files import untrusted
from fedsp_mpi.record import ClientRow, RoundRow, read
from fedsp_mpi.record.hdf5 import to_plain
from fedsp_mpi.report import (
    compare,
    comparison_table,
    difference,
    draw_bars,
    draw_curves,
    gain_table,
    markdown,
    summarize,
)
from helpers.record_samples import make, results, tensors

TEXT = h5py.string_dtype()


def put_text(h5: h5py.File, name: str, text: str) -> None:
    del h5[name]
    h5.create_dataset(name, data=text, dtype=TEXT)


def link_out(h5: h5py.File) -> None:
    del h5["prompts/0001"]
    h5["prompts/0001"] = h5py.ExternalLink("../secret/rounds/0001.h5", "/prompt")


def link_to_another_group(h5: h5py.File) -> None:
    del h5["prompts/0001"]
    h5["prompts/0001"] = h5py.ExternalLink("rounds/0001.h5", "/")


def linked_table(h5: h5py.File) -> None:
    del h5["results"]
    h5["results"] = h5py.ExternalLink("../secret/run.h5", "/results")


def soft_link(h5: h5py.File) -> None:
    del h5["reason"]
    h5["reason"] = h5py.SoftLink("/config_text")


def external_storage(h5: h5py.File) -> None:
    kind = h5["rounds"].dtype
    del h5["rounds"]
    h5.create_dataset("rounds", (4,), kind, external=[("/etc/passwd", 0, 4 * kind.itemsize)])


def virtual(h5: h5py.File) -> None:
    layout = h5py.VirtualLayout((3,), h5["rounds"].dtype)
    layout[:] = h5py.VirtualSource("../secret/run.h5", "rounds", (3,))
    del h5["rounds"]
    h5.create_virtual_dataset("rounds", layout)


def claimed_rows(h5: h5py.File) -> None:
    kind = h5["rounds"].dtype
    del h5["rounds"]
    h5.create_dataset("rounds", (1 << 40,), kind, chunks=(1 << 16,))


def packed_table(h5: h5py.File) -> None:
    kind = h5["rounds"].dtype
    del h5["rounds"]
    h5.create_dataset("rounds", (1 << 16,), kind, compression="gzip", data=np.zeros(1 << 16, kind))


def one_text_many_times(h5: h5py.File) -> None:
    """100 kB of text that 20,000 cells point to: 2 GB."""
    cells = np.array([("x" * 100_000,)] + [("",)] * 19_999, dtype=[("reason", TEXT)])
    del h5["clients"]
    table = h5.create_dataset("clients", data=cells)
    h5.flush()
    start = table.id.get_offset()
    with open(h5.filename, "r+b") as file:  # noqa: PTH123 - below HDF5's back
        file.seek(start)
        cell = file.read(16)
        file.seek(start)
        file.write(cell * 20_000)


def references(h5: h5py.File) -> None:
    del h5["results"]
    cells = np.array([(1, h5.ref)], dtype=[("n", "i8"), ("method", h5py.ref_dtype)])
    h5.create_dataset("results", data=cells)


def lists_in_cells(h5: h5py.File) -> None:
    del h5["results"]
    h5.create_dataset("results", (1,), np.dtype([("method", h5py.vlen_dtype(np.int64))]))


def texts(cells: np.ndarray) -> list[tuple[Any, ...]]:
    return [
        tuple(str(row[n]) if n == "seconds_total" else row[n] for n in cells.dtype.names)
        for row in cells
    ]


def real_seconds_as_text(h5: h5py.File) -> None:
    cells = h5["rounds"][()]
    kinds = [
        (name, TEXT if name == "seconds_total" else cells.dtype[name]) for name in cells.dtype.names
    ]
    del h5["rounds"]
    h5.create_dataset("rounds", data=np.array(texts(cells), dtype=kinds))


def long_attribute(h5: h5py.File) -> None:
    h5.attrs["name"] = np.zeros(4000)


REFUSED: dict[Callable[[h5py.File], None], str] = {
    link_out: "a link to '../secret/rounds/0001.h5', which is no file of round 0001",
    link_to_another_group: "a link to 'rounds/0001.h5', which is no file of round 0001",
    linked_table: "a link to somewhere else at results",
    soft_link: "a link to somewhere else at reason",
    external_storage: "data at rounds that lie in another file .*/etc/passwd",
    virtual: "virtual data at rounds",
    claimed_rows: "bytes claimed at /rounds where 0 are stored",
    packed_table: "compressed data at /rounds",
    one_text_many_times: "2000000000 bytes of text claimed at /clients",
    references: "holds neither numbers nor texts",
    lists_in_cells: "holds neither numbers nor texts",
    real_seconds_as_text: "object in column seconds_total of table rounds",
    long_attribute: "attribute name that is neither a text nor a whole number",
    lambda h5: put_text(h5, "config", "[" * 100_000): "JSON that is nested too deeply",
    lambda h5: put_text(h5, "config", "[" * 60 + "]" * 60): "JSON of more than 50 levels",
    lambda h5: put_text(h5, "environment", '{"num_ranks": 1%s}' % ("0" * 400)): "more than 70 bits",
    lambda h5: put_text(
        h5, "environment", "[1]"
    ): "a list at environment, where a run writes a mapping",
    lambda h5: put_text(
        h5, "config", '{"run": [1]}'
    ): "a list at config.run, where a run writes a mapping",
    lambda h5: put_text(h5, "config", '{"run": {"seed": "x"}}'): "a text at config.run.seed",
    lambda h5: h5.create_dataset(
        "sections/data", data='{"client_shards": ["x"]}', dtype=TEXT
    ): "a text at sections.da",
}


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "a"
    make(folder).write_results(results(0.7))
    make(folder.parent / "secret")
    return folder


def altered(sample: Path, tmp_path: Path, alter: Callable[[h5py.File], Any]) -> Path:
    """Copy a record and change it; h5py leaves no digest behind."""
    folder = tmp_path / "a"
    (folder / "rounds").mkdir(parents=True)
    for file in ("run.h5", *(f"rounds/000{round}.h5" for round in (1, 2, 3))):
        (folder / file).write_bytes((sample / file).read_bytes())
    with h5py.File(folder / "run.h5", "r+") as h5:
        alter(h5)
    return folder


def peak() -> int:
    """Bytes of memory that this process had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize(
    "alter", REFUSED, ids=[re.sub(r"\W+", "-", words)[:40] for words in REFUSED.values()]
)
def test_what_no_run_writes_is_refused(sample, tmp_path, alter, capsys):
    folder, before = altered(sample, tmp_path, alter), peak()
    status = main(["report", str(folder)])
    if alter in (link_out, link_to_another_group):  # which only prompts follow
        assert status == 0
        status = main(["diff", str(folder), str(sample)])
    [line] = capsys.readouterr().err.splitlines()
    assert (
        status == 2
        and re.search(REFUSED[alter], line)
        and ", expected the record of a run; " in line
    )
    assert peak() - before < 200 << 20


def bomb(h5: h5py.File) -> None:
    """Add a chunk that is declared to have 1 MiB, is stored in less, and unpacks to 384 MiB."""
    data = h5.create_dataset("prompt/p", (1 << 18,), "f4", chunks=(1 << 18,), compression="gzip")
    packer = zlib.compressobj()
    packed = b"".join(packer.compress(bytes(1 << 20)) for _ in range(384)) + packer.flush()
    data.id.write_direct_chunk((0,), packed)


def empty_chunks(h5: h5py.File) -> None:
    h5.create_dataset("prompt/p", (1 << 28,), "f4", chunks=(1 << 18,), compression="gzip")


def too_large(h5: h5py.File) -> None:
    h5.create_dataset("prompt/p", (1 << 33,), "f4", chunks=(1 << 18,), compression="gzip")


def circle(h5: h5py.File) -> None:
    h5["prompt/x"] = h5["prompt"]


PROMPTS = {
    bomb: "a chunk at /prompt/p that does not unpack to 1048576 bytes",
    empty_chunks: "0 of 1024 chunks",
    too_large: "prompts of 343597385.. bytes",
    circle: "groups in groups without end",
    lambda h5: h5["prompt"].create_dataset("p", data="text", dtype=TEXT): "data of object at p",
    lambda h5: h5["prompt"].create_dataset(
        "p", (9,), "f4", external=[("/etc/passwd", 0, 36)]
    ): "lie in another file",
}


@pytest.mark.parametrize(
    "alter", PROMPTS, ids=[re.sub(r"\W+", "-", words)[:40] for words in PROMPTS.values()]
)
def test_prompts_that_no_run_writes_are_refused(sample, tmp_path, alter):
    folder = altered(sample, tmp_path, lambda h5: None)
    with h5py.File(folder / "rounds" / "0001.h5", "r+") as h5:
        alter(h5)
        if "p" in h5["prompt"]:
            h5["prompt/p"].attrs["position"] = 9
    run, before = read(folder), peak()
    with pytest.raises(ValueError, match=PROMPTS[alter]):
        run.prompts(1)
    assert peak() - before < 200 << 20
    assert list(run.prompts(2)) == list(tensors(2))


def test_a_record_that_was_changed_by_hand_is_read_with_a_note(sample, tmp_path, capsys):
    folder = altered(sample, tmp_path, lambda h5: None)
    assert (
        main(["report", str(folder)]) == 0
        and "digest    none: an earlier version" in capsys.readouterr().out
    )
    assert main(["report", str(sample)]) == 0 and "digest    none" not in capsys.readouterr().out
    assert main(["diff", str(folder), str(sample)]) == 0


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, kind, capsys):
    path = tmp_path / "run.h5"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    assert main(["report", str(tmp_path)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "found no regular file" in line or "found no such file" in line


# --- values ---

JUNK = (
    None,
    True,
    0,
    -1,
    1e308,
    math.inf,
    math.nan,
    "x",
    "",
    [],
    [1],
    ["x"],
    {},
    {"a": 1},
    {"a": {"b": [1]}},
    1 << 69,
)
SECTIONS = {
    "models": {
        "global": {"name": "x", "num_parameters": 3},
        "auxiliary": 5,
        "prompt": 2,
        "prompt_on_the_wire": 2,
    },
    "data": {"task": "t", "train": 3, "client_shards": [1, 2], "server_shard": 3},
    "timing": {"seconds": 3.0, "seconds_checkpoints": 1.0},
    "distillation": {"seconds": 1.0},
    "memory": {"clients": 5},
}


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in nested mappings and lists, and of the whole."""
    yield place
    below = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, item in below:
        yield from places(item, (*place, key))


def put(value: Any, place: tuple[Any, ...], junk: Any) -> Any:
    if not place:
        return junk
    value = copy.copy(value)
    value[place[0]] = put(value[place[0]], place[1:], junk)
    return value


def put_junk(h5: h5py.File, dice: random.Random) -> None:
    """Replace one value of a mapping by junk of any type, or one cell of a table by an odd one."""
    if dice.random() < 0.7:
        name = dice.choice(["config", "environment", *(f"sections/{name}" for name in SECTIONS)])
        value = json.loads(h5[name].asstr()[()])
        put_text(
            h5, name, json.dumps(put(value, dice.choice(list(places(value))), dice.choice(JUNK)))
        )
        return
    name = dice.choice(["rounds", "clients", "results"])
    rows = h5[name][()]
    column = dice.choice(rows.dtype.names)
    values = {
        "i": [0, -1, -(1 << 63)],
        "f": [math.inf, -math.inf, math.nan, 1e308],
        "b": [False],
        "O": ["", "x"],
    }
    rows[column][dice.randrange(len(rows))] = dice.choice(values[rows.dtype[column].kind])
    h5[name][...] = rows


@pytest.mark.parametrize("number", [60, pytest.param(1500, marks=pytest.mark.slow)])
def test_no_value_in_a_record_is_a_traceback(tmp_path, number):
    dice, config = random.Random(5), to_plain(asdict(Config()), "config")
    for seed, name in enumerate(("a", "b"), 1):
        record = make(
            tmp_path / name,
            seed=seed,
            **{key: value for key, value in config.items() if key != "run"},
        )
        record.describe(**SECTIONS)
        record.write_results(results(0.7))
        record.finish()
    file, other = tmp_path / "a" / "run.h5", read(tmp_path / "b")
    image, refused = file.read_bytes(), 0
    for _ in range(number):
        file.write_bytes(image)
        with h5py.File(file, "r+") as h5:
            put_junk(h5, dice)
        try:
            run = read(file)
            assert summarize(run) and markdown([run, other])
            difference(run, other)
            comparison = compare([run, other])
            assert comparison_table(comparison)
            gain_table(comparison)
        except ValueError as error:
            assert (
                "found " in str(error) and ", expected " in str(error) and "\n" not in str(error)
            ), error
            refused += 1
    assert 0 < refused < number


# --- terminals and pictures ---

ESCAPE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e|\n| forged | $\\frac{$ |"


def test_no_text_of_a_record_speaks_to_the_terminal(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for name, seed in (("one", 1), ("two", 2)):
        config = {
            "run": {"seed": seed, "label": ESCAPE},
            "data": {"task": ESCAPE},
            "model": {"name": ESCAPE},
        }
        record = make(tmp_path / name, offset=seed)
        record.run = record.run.__class__(**{**vars(record.run), "config": config, "name": ESCAPE})
        record.describe(models={ESCAPE: 1}, data={"task": ESCAPE, "client_shards": [1, 2]})
        failed = ClientRow(round=4, client=0, rank=1, status="failed" + ESCAPE, reason=ESCAPE)
        record.commit_round(
            RoundRow(round=4, num_clients=1, num_failed=1, validation_loss=1.0 * seed), [failed]
        )
        record.write_results(
            [*results(0.7), results(0.5 + seed / 10)[2].__class__(method=ESCAPE, split="test", n=4)]
        )
        record.finish(reason="complete" + ESCAPE)
    runs = [str(tmp_path / name) for name in ("one", "two")]
    for arguments in (["report", *runs], ["report", "--markdown", *runs], ["diff", *runs]):
        assert main(arguments) in (0, 1), capsys.readouterr().err
    assert main(["report", "--table", "comparison", *runs]) == 0
    shown = capsys.readouterr().out
    assert "\\x1b]0;owned\\x07" in shown and "owned" in shown
    assert [sign for sign in shown if not sign.isprintable() and sign != "\n"] == []
    assert not [line for line in shown.splitlines() if line.startswith("| forged")]
    records = [read(run) for run in runs]
    for ending in ("svg", "png"):
        draw_curves(records, tmp_path / f"curves.{ending}")
        draw_bars(compare(records), tmp_path / f"bars.{ending}")
    assert "\x1b" not in (tmp_path / "bars.svg").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match=r"it holds \\x1b\]0;owned"):
        read(_misnamed(tmp_path))


def _misnamed(tmp_path: Path) -> Path:
    path = tmp_path / "other.h5"
    with h5py.File(path, "w") as h5:
        h5[ESCAPE.replace("/", "")] = 1
    return path


def test_json_that_others_wrote():
    assert untrusted.parse_json('{"a": [1, NaN]}')["a"][0] == 1
    for text in (
        "[" * 5000,
        '{"a":' * 5000,
        "1" + "0" * 5000,
        "1" + "0" * 30,
        b"\xff",
        "",
        "[" * 51 + "]" * 51,
    ):
        with pytest.raises(ValueError):
            untrusted.parse_json(text)
    assert untrusted.printable("größer 漢字 ±") == "größer 漢字 ±"
    assert untrusted.printable("a\x1b\n\ud800\u2028", keep="\n") == "a\\x1b\n\\ud800\\u2028"
    assert json.loads(json.dumps(untrusted.printable("\x00"))) == "\\x00"
