"""Whatever a run writes, with a bit flipped or its end cut off: seen for what it is, or without
effect.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from fedsp_mpi.files import fingerprint
from fedsp_mpi.models import auxiliary
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.models.prompts import Prompt, PromptSpec, read_adapter, write_adapter
from fedsp_mpi.record import Checkpoint, Checkpoints, RunRecord, WireRow, read, writer
from fedsp_mpi.tensors import NamedTensors
from helpers import tiny
from helpers.record_samples import make, results

# 60 damages of each kind of file with every commit, 500 where minutes do not matter.
numbers = pytest.mark.parametrize("number", [60, pytest.param(500, marks=pytest.mark.slow)])


def damage(path: Path, dice: random.Random) -> str:
    """Flip one bit of a file, or cut off its end, and say what was done."""
    image = bytearray(path.read_bytes())
    place = dice.randrange(len(image))
    if dice.random() < 0.3:
        path.write_bytes(image[:place])
        return f"{path.name} cut to {place} bytes"
    bit = dice.randrange(8)
    image[place] ^= 1 << bit
    path.write_bytes(image)
    return f"{path.name} with bit {bit} of byte {place} flipped"


def outcomes(
    files: Sequence[Path], number: int, look: Callable[[], str], seed: int
) -> Counter[str]:
    """Count what becomes of damages: `look` says "seen", "no effect", or what went wrong."""
    dice, ends = random.Random(seed), Counter[str]()
    for _ in range(number):
        path = dice.choice(files)
        before = path.read_bytes()
        what = damage(path, dice)
        end = look()
        path.write_bytes(before)
        ends[end if end in ("seen", "no effect") else f"{end}: {what}"] += 1
    print(dict(ends))
    return ends


def require_seen(ends: Counter[str], number: int, at_least: float) -> None:
    """Require that every damage was seen or had no effect, and that enough of them were seen."""
    assert set(ends) <= {"seen", "no effect"} and ends.total() == number, ends
    assert ends["seen"] >= at_least * number, ends


# --- the record ---


def content(folder: Path) -> list[Any]:
    """Return all that can be read from a record."""
    run = read(folder)
    tables = [getattr(run, name).tolist() for name in ("rounds", "clients", "results", "wire")]
    prompts = [
        {name: (a.shape, a.tobytes()) for name, a in run.prompts(n).items()}
        for n in run.prompt_rounds
    ]
    texts = [
        run.name,
        run.status,
        run.reason,
        run.created,
        run.updated,
        run.committed_rounds,
        run.config_text,
    ]
    return [repr(tables), prompts, texts, run.config, run.environment, run.sections]


@numbers
@pytest.mark.parametrize("kind", ["running", "complete", "large"])
def test_a_damaged_record_is_never_read_as_another(tmp_path, monkeypatch, *, kind, number):
    if kind == "large":
        monkeypatch.setattr(writer, "_MAX_REWRITTEN", 0)
    record = make(tmp_path / "a", rounds=2)
    record.write_wire(
        [WireRow(name="p", shape=(8, 4), dtype="float32", direction="up", count=6, bytes=768)]
    )
    record.write_results(results(0.7))
    record.describe(models={"auxiliary": 46})
    if kind == "complete":
        record.finish()
    folder = tmp_path / "a"
    files = [*sorted(folder.glob("run.*")), *sorted(folder.glob("rounds/*.h5"))]
    assert len(files) == {"running": 3, "complete": 1, "large": 5}[kind]
    original = content(tmp_path / "a")

    def look() -> str:
        try:
            return "no effect" if content(tmp_path / "a") == original else "read as something else"
        except ValueError as error:
            return (
                "seen"
                if str(error).count("\n") == 0 and ": found " in str(error)
                else f"said badly ({error})"
            )

    require_seen(outcomes(files, number, look, seed=1), number, at_least=0.99)


def test_a_value_without_a_checksum_of_its_own_is_covered_by_the_digest_of_its_round(tmp_path):
    make(tmp_path / "a", rounds=2).finish()
    file = tmp_path / "a" / "run.h5"
    with h5py.File(file) as h5:
        place = h5["prompts/0001/a/scale"].id.get_offset()
    image = bytearray(file.read_bytes())
    image[place] ^= 1
    file.write_bytes(image)
    run = read(file)  # tables do not wait for prompts to be read
    assert len(run.prompts(2)) == 3
    with pytest.raises(
        ValueError, match="found prompts of round 0001 that are not what was written"
    ):
        run.prompts(1)
    with pytest.raises(ValueError, match="found prompts of round 0001"):
        RunRecord.open(tmp_path / "a")


# --- checkpoints ---


def state(round: int, seed: int) -> dict[str, np.ndarray]:
    dice = np.random.default_rng((round, seed))
    return {
        "w": dice.standard_normal((3, 2)).astype("f4"),
        "steps": np.array(round),
        "loss": dice.standard_normal(2),
    }


def written(folder: Path) -> Checkpoints:
    """Checkpoints of rounds 1 and 2 with three clients, of which client 2 has rested in round 2."""
    place, pieces = Checkpoints(folder), {}
    for round in (1, 2):
        pieces |= {
            id: place.write_client(id, round, state(round, id))
            for id in range(3)
            if (id, round) != (2, 2)
        }
        place.commit(round, state(round, 9), pieces, keep=2, inputs="0" * 32)
    return place


def holds(place: Checkpoints, checkpoint: Checkpoint) -> bool:
    """Return whether a checkpoint has the states of its round, bit by bit."""
    rounds = {id: min(checkpoint.round, 1 if id == 2 else 2) for id in range(3)}
    pairs = [(place.read_server(checkpoint), state(checkpoint.round, 9))]
    pairs += [
        (place.read_client(id, piece), state(rounds[id], id))
        for id, piece in checkpoint.clients.items()
    ]
    return len(pairs) == 4 and all(
        list(a) == list(b) and all(np.array_equal(a[name], b[name]) for name in b) for a, b in pairs
    )


@numbers
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, number):
    place = written(tmp_path)
    newest, _ = place.newest()

    def look() -> str:
        checkpoint, wrong = place.newest()
        if checkpoint is None or not holds(place, checkpoint):
            return "gone on from something else"
        if checkpoint == newest:
            return "no effect"
        return (
            "seen"
            if checkpoint.round == 1 and len(wrong) == 1 and "\n" not in wrong[0]
            else f"said badly {wrong}"
        )

    names = [
        "server-0002.safetensors",
        "client-00000-0002.safetensors",
        "client-00001-0002.safetensors",
    ]
    states = outcomes([tmp_path / "checkpoints" / name for name in names], number, look, seed=2)
    require_seen(states, number, at_least=0.99)
    require_seen(
        outcomes([tmp_path / "checkpoints" / "0002.json"], number, look, seed=3),
        number,
        at_least=0.9,
    )


@pytest.mark.parametrize(
    "mark",
    [
        "[]",
        "3",
        '{"layout": 2}',
        "[" * 10_000,
        '{"layout": 2, "round": 2, "server": {}, "clients": []}',
        "null",
    ],
)
def test_a_mark_of_another_kind_is_no_checkpoint(tmp_path, mark):
    place = written(tmp_path)
    (tmp_path / "checkpoints" / "0002.json").write_text(mark)
    (tmp_path / "checkpoints" / "distillation.json").write_text(mark)
    checkpoint, [wrong] = place.newest()
    assert (
        checkpoint is not None
        and checkpoint.round == 1
        and "0002.json: found no checkpoint (" in wrong
    )
    assert place.read_distillation({"a": 1}) is None
    with pytest.raises(ValueError, match=r"0002\.json: found no checkpoint"):
        place.newest_client_state(0)


@pytest.mark.parametrize("kind", ["file", "link"])
def test_checkpoints_that_cannot_be_looked_for_are_not_taken_for_none(tmp_path, kind):
    """A resume would cut its record down to no round."""
    place = written(tmp_path)
    (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")
    assert place.newest() == (None, [])
    if kind == "file":
        (tmp_path / "checkpoints").write_text("x")
    else:
        (tmp_path / "checkpoints").symlink_to("a file system that is not mounted")
    with pytest.raises(ValueError, match="checkpoints: found no folder that can be read"):
        place.newest()


@numbers
def test_a_damaged_distillation_is_begun_anew(tmp_path, number):
    place, recipe = Checkpoints(tmp_path), {"depth": 3, "seed": 1}
    place.write_distillation(40, state(1, 1), recipe)
    original = state(1, 1)

    def look() -> str:
        restored = place.read_distillation(recipe)
        if restored is None:
            return "seen"
        return (
            "no effect"
            if all(np.array_equal(restored[name], original[name]) for name in original)
            else "another state"
        )

    files = [
        tmp_path / "checkpoints" / name
        for name in ("distillation.json", "distillation-40.safetensors")
    ]
    require_seen(outcomes(files, number, look, seed=4), number, at_least=0.9)


# --- models and prompts ---


def is_whole(folder: Path) -> bool:
    """Return whether a model's files are those that were written, as every reader asks first."""
    try:
        return fingerprint.require_digests(folder)
    except ValueError as error:
        assert "\n" not in str(error) and ": found " in str(error)
        return False


@numbers
def test_a_damaged_prompt_is_seen(tmp_path, number):
    spec = PromptSpec(kind="prefix", num_tokens=3, num_layers=2, width=8, num_heads=2)
    prompt, folder = Prompt(spec), tmp_path / "prompt"
    write_adapter(folder, NamedTensors.pack(prompt.tensors()), spec, base="tiny")
    original = read_adapter(folder)

    def look() -> str:
        if not is_whole(folder):
            return "seen"
        return "no effect" if torch.equal(read_adapter(folder), original) else "another prompt"

    require_seen(outcomes(sorted(folder.iterdir()), number, look, seed=5), number, at_least=0.9)


@numbers
def test_a_damaged_model_is_seen(tmp_path, number):
    model = tiny.load(tiny.model_folder(tmp_path / "global", "gpt2"))
    cell, folder = auxiliary.cut(model, tiny.cell(2)), tmp_path / "auxiliary"
    small = LanguageModel(auxiliary.unroll(cell, 2), model.dtype)
    auxiliary.save(
        folder,
        small,
        2,
        tokenizer=tiny.tokenizer(),
        recipe={"depth": 2, "recipe": {}, "distillation": {}},
    )
    original = fingerprint.of_weights(auxiliary.load(folder).weights)
    shutil.rmtree(tmp_path / "global")

    def look() -> str:
        if not is_whole(folder):
            return "seen"
        return (
            "no effect"
            if fingerprint.of_weights(auxiliary.load(folder).weights) == original
            else "another model"
        )

    require_seen(outcomes(sorted(folder.iterdir()), number, look, seed=6), number, at_least=0.9)
