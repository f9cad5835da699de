"""The embedded default is small, whole, what its script makes, and not to be answered without a
prompt.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedsp_mpi import resources, rng
from fedsp_mpi.resources import make_embedded

FOLDER = Path(resources.__file__).parent
SPLITS = ("train", "validation", "test")
FORMAT_WORDS = ("question", "answer", "which", "goes", "with", "?", ":", "\n")


def read(split: str) -> list[dict[str, Any]]:
    """The rows of one split."""
    with gzip.open(FOLDER / "data" / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, Any]]]:
    return {split: read(split) for split in SPLITS}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER / "model")


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER / "model").eval()


def test_it_is_small() -> None:
    total = sum(
        path.stat().st_size
        for path in FOLDER.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    )
    assert total < 5_000_000


def test_the_rows_are_well_formed(rows: dict[str, list[dict[str, Any]]]) -> None:
    assert {split: len(rows[split]) for split in SPLITS} == {
        "train": 560,
        "validation": 120,
        "test": 600,
    }
    for row in (row for split in SPLITS for row in rows[split]):
        assert set(row) == {"context", "choices", "label"}
        assert len(set(row["choices"])) == 4 and 0 <= row["label"] < 4
        assert all(choice == choice.strip() for choice in row["choices"])
    labels = Counter(row["label"] for row in rows["test"])
    assert all(0.2 < labels[label] / 600 < 0.3 for label in range(4)), (
        "a constant answer must not score"
    )


def test_no_question_occurs_twice(rows: dict[str, list[dict[str, Any]]]) -> None:
    contexts = [row["context"] for split in SPLITS for row in rows[split]]
    assert len(set(contexts)) == len(contexts)


def test_the_answers_are_true() -> None:
    world = make_embedded.World.make()
    nouns = {relation.question_noun: relation.noun for relation in make_embedded.RELATIONS}
    for row in read("test"):
        words = row["context"].replace("?", " ").split()
        assert row["choices"][row["label"]] == world.facts[words[5]][nouns[words[2]]]


def test_no_sentence_has_a_word_of_the_questions() -> None:
    world = make_embedded.World.make()
    draw = make_embedded.source("test")
    text = "".join(world.sentence(draw) for _ in range(20_000)).lower()
    asked = [relation.question_noun for relation in make_embedded.RELATIONS]
    assert not {*FORMAT_WORDS, *asked} & set(re.findall(r"\w+|[^\w ]", text))


def test_every_word_is_one_known_token(
    rows: dict[str, list[dict[str, Any]]], tokenizer: Any
) -> None:
    """The tokens of context + " " + choice are those of the context and that of " choice"."""
    for row in rows["test"]:
        context = tokenizer(row["context"])["input_ids"]
        assert tokenizer.unk_token_id not in context and tokenizer.decode(context) == row["context"]
        for choice in row["choices"]:
            whole = tokenizer(f"{row['context']} {choice}")["input_ids"]
            assert (
                whole == context + tokenizer(f" {choice}")["input_ids"]
                and len(whole) == len(context) + 1
            )
            assert tokenizer.unk_token_id not in whole
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_the_model_loads_whole(model: Any, tokenizer: Any) -> None:
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.n_layer == 3
    first, *others = [
        torch.cat([p.flatten() for p in block.parameters()]) for block in model.transformer.h
    ]
    assert all(not torch.equal(first, other) for other in others), "each layer has its own weights"


def test_the_model_knows_what_is_a_job(model: Any, tokenizer: Any) -> None:
    """After the beginning of a sentence, nearly all probability lies on words of the right kind."""
    world = make_embedded.World.make()
    for relation in make_embedded.RELATIONS:
        text = f" The {relation.noun} of {world.people[0]} is"
        with torch.no_grad():
            shares = model(**tokenizer(text, return_tensors="pt")).logits[0, -1].softmax(-1)
        assert (
            shares[
                tokenizer.convert_tokens_to_ids([f"Ġ{value}" for value in relation.values])
            ].sum()
            > 0.9
        )


def test_zero_shot_is_near_chance(
    model: Any, tokenizer: Any, rows: dict[str, list[dict[str, Any]]]
) -> None:
    right = 0
    for row in rows["test"]:
        ids = tokenizer(row["context"], return_tensors="pt")["input_ids"]
        choices = [tokenizer(f" {choice}")["input_ids"][0] for choice in row["choices"]]
        with torch.no_grad():
            right += int(model(input_ids=ids).logits[0, -1, choices].argmax()) == row["label"]
    assert 0.2 <= right / 600 <= 0.4


def test_the_script_makes_the_same_data(tmp_path: Path) -> None:
    make_embedded.write_data(make_embedded.World.make(), tmp_path)
    for split in SPLITS:
        name = f"{split}.jsonl.gz"
        assert (tmp_path / name).read_bytes() == (FOLDER / "data" / name).read_bytes()


def test_the_script_makes_the_same_tokenizer(tmp_path: Path) -> None:
    made, _ = make_embedded.make_tokenizer(make_embedded.World.make())
    made.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (
        FOLDER / "model" / "tokenizer.json"
    ).read_bytes()


def test_training_repeats_bit_for_bit(model: Any) -> None:
    """Three steps twice give the same bits; the vectors that training leaves alone are those of the
    model shipped.
    """
    world = make_embedded.World.make()
    made, unread = make_embedded.make_tokenizer(world)
    how = replace(make_embedded.Training(), num_steps=3, num_tied=2)
    once, again = (make_embedded.train(world, made, unread, how=how).state_dict() for _ in range(2))
    assert all(torch.equal(tensor, again[name]) for name, tensor in once.items())
    table = "transformer.wte.weight"
    torch.manual_seed(rng.key(make_embedded.SEED, "model"))
    initial = make_embedded.make_model(made, how, unread).state_dict()
    assert torch.equal(once[table][unread], initial[table][unread])
    # Random vectors differ in their last bits between processors with AVX2 and without.
    shipped = model.state_dict()[table][unread]
    assert torch.allclose(once[table][unread], shipped, rtol=0, atol=1e-6)
    assert not torch.equal(once[table], model.state_dict()[table])
