"""What `RECORD.md` says of a record, held against what a run has written, with plain h5py."""

from __future__ import annotations

import json
import re
from pathlib import Path

import h5py
import pytest

from fedsp_mpi.config import EMBEDDED
from fedsp_mpi.record import tables
from helpers.paths import ROOT
from helpers.runs import short

DOCUMENT = (ROOT / "fedsp_mpi" / "record" / "RECORD.md").read_text(encoding="utf-8")
NOT_IN_THIS_RUN = {f"sections/{name}" for name in ("instruction", "labels", "origin", "resumes")}
TENSOR = re.compile(r"prompts/\d{4}/prompt")


def rows(title: str) -> list[list[str]]:
    """Return the cells of the table below a heading, without its head."""
    section = DOCUMENT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def type_of(dtype: object) -> str:
    """Return a type as the document has it."""
    return "text" if h5py.check_string_dtype(dtype) else str(dtype)


def columns(dataset: h5py.Dataset) -> list[list[str]]:
    return [[name, type_of(dataset.dtype[name])] for name in dataset.dtype.names]


def test_every_column_of_the_code_is_documented() -> None:
    """The cheap part, without a run."""
    for name, row in tables.TABLES.items():
        dtype = tables.table_type(row)
        expected = [[column, type_of(dtype[column])] for column in dtype.names or ()]
        assert [cells[:2] for cells in rows(f"Table `{name}`")] == expected


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the record of a run with silos that score, with noise, and sealed."""
    data = EMBEDDED.parent / "data"
    silos = json.dumps([{"name": name, "source": str(data)} for name in ("a", "b", "c")])
    run = short(
        tmp_path_factory.mktemp("runs"),
        f"federation.silos={silos}",
        "data.source=null",
        f"server.data.source={data}",
        "evaluation.at=both",
        "client.privacy.clip=1.0",
        "client.privacy.noise_scale=0.1",
        "wire.encryption=true",
    )
    return run.file


@pytest.mark.slow
def test_every_attribute_is_documented(file: Path) -> None:
    with h5py.File(file) as h5:
        found = [[name, "root", type_of(h5.attrs.get_id(name).dtype)] for name in h5.attrs]
        tensor = h5["prompts/0001/prompt"]
        found += [
            [name, "tensor", type_of(tensor.attrs.get_id(name).dtype)] for name in tensor.attrs
        ]
    assert sorted(found) == sorted(row[:3] for row in rows("Attributes"))


@pytest.mark.slow
def test_every_data_set_is_documented(file: Path) -> None:
    shapes = {}
    types = {}
    tensors = []

    def look(name: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Group):
            return
        if name.startswith("prompts/"):
            tensors.append(name)
            return
        shapes[name] = len(item.shape)
        types[name] = "table" if item.dtype.names else type_of(item.dtype)
        if name in ("config", "environment") or name.startswith("sections/"):
            assert isinstance(json.loads(item[()]), dict)

    with h5py.File(file) as h5:
        h5.visititems(look)
        prompt = h5["prompts/0002/prompt"]
        assert (prompt.ndim, str(prompt.dtype), prompt.compression) == (2, "float32", "gzip")
    documented = {name: cells for name, *cells in rows("Data sets")}
    assert documented.pop("prompts/NNNN/TENSOR")[2] == "with record.prompts"
    assert [name for name in tensors if not TENSOR.fullmatch(name)] == []
    assert documented.keys() - shapes.keys() == NOT_IN_THIS_RUN
    assert shapes.keys() <= documented.keys()
    for name, rank in shapes.items():
        shape, kind, *_ = documented[name]
        assert (shape == "[]", kind) == (rank == 0, types[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rounds", "clients", "silos", "results", "wire"])
def test_every_column_is_documented_in_its_order(file: Path, name: str) -> None:
    with h5py.File(file) as h5:
        assert len(h5[name]), "a table without rows shows little"
        assert columns(h5[name]) == [row[:2] for row in rows(f"Table `{name}`")]
