"""Clients that label text of their own: what they hold, whom they ask, what they keep and send."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fedsp_mpi import config
from fedsp_mpi.algorithms.augment import AugmentedClient
from fedsp_mpi.algorithms.base import ShardError
from fedsp_mpi.algorithms.client_state import StatelessClients
from fedsp_mpi.algorithms.label_monitor import LabelMonitor
from fedsp_mpi.commands.split import split
from fedsp_mpi.config import AugmentConfig
from fedsp_mpi.data.few_labels import ClientText
from fedsp_mpi.data.tokens import Question, Text, collate
from fedsp_mpi.log import Log
from fedsp_mpi.models.losses import answer_loss, answer_loss_of
from fedsp_mpi.record import Run, read
from fedsp_mpi.report import difference, summarize
from fedsp_mpi.run import participation
from fedsp_mpi.run.inputs import ExperimentInputs
from fedsp_mpi.tensors import ClientError, NamedTensors, Update
from fedsp_mpi.training.loop import num_answer_tokens
from helpers import tiny
from helpers.configs import load, refused
from helpers.runs import SHORT, WHOLE_MODEL, gap_settings, here, short

DOWN = NamedTensors.of({"prompt": np.arange(6.0).reshape(2, 3)})


class Trainer:
    """Clients that note what they are given, and send 1 more in every value."""

    model = None
    prompt = None

    def __init__(self) -> None:
        self.states = StatelessClients()
        self.texts: dict[int, list[Text]] = {}
        self.holds: list[tuple[int, float]] = []

    def train_on(self, client: int, texts: list[Text]) -> None:
        self.texts[client] = list(texts)

    def hold(self, client: int, broadcast: NamedTensors) -> None:
        self.holds.append((client, float(broadcast.flat[1])))

    def local_update(self, client: int, round: int, broadcast: NamedTensors) -> Update:
        assert self.texts[client]
        tensors = NamedTensors(broadcast.schema, broadcast.flat + 1)
        return Update(client, 99.0, tensors, {"loss_prompt_last": 0.5})


def question(number: int, gold: tuple[int, ...] = ()) -> Question:
    options = tuple(Text(np.array([number, 50 + option], dtype=np.int32), 1) for option in (0, 1))
    return Question(options, (1, 1), gold)


def holding(labels: list[int], num_unlabelled: int) -> ClientText:
    """A client's text: labelled ones are numbered from 0, others from 20."""
    questions = [question(number, (label,)) for number, label in enumerate(labels)]
    labelled = [held.options[held.gold[0]] for held in questions]
    return ClientText(labelled, questions, [question(20 + n) for n in range(num_unlabelled)])


def says(classes: dict[int, int], margin: float = 1.0):
    """A model that says these classes of texts, by number; 0 of others."""

    def score(questions: list[Question]) -> np.ndarray:
        rows = [classes.get(int(held.options[0].ids[0]), 0) for held in questions]
        return np.array([[-margin * (option != row) for option in (0, 1)] for row in rows])

    return score


def augmented(text: ClientText | ShardError, score=None, labels=True, **settings) -> tuple:
    trainer = Trainer()
    client = AugmentedClient(
        trainer,
        {3: text},
        settings=AugmentConfig(clients=1, **settings),
        seed=1,
        labels_in=lambda id, round: labels,
        score=score or says({}),
    )
    return client, trainer


def trained_on(trainer: Trainer) -> list[tuple[int, int]]:
    """Number and class of the texts that the client was trained on."""
    return [(int(text.ids[0]), int(text.ids[1]) - 50) for text in trainer.texts.get(3, [])]


def test_labels_come_from_the_model_that_came_down_and_count_in_the_mean():
    client, trainer = augmented(holding([0, 1], 3), says({21: 1}), per_client=5)
    update = client.local_update(3, 1, DOWN)
    assert trained_on(trainer) == [(0, 0), (1, 1), (20, 0), (21, 1), (22, 0)]
    assert trainer.holds == [(3, 1.0)] and update.weight == 5
    assert update.tensors.flat.tolist() == (DOWN.flat + 1).tolist()
    assert update.metrics["pseudo_labels"] == 3 and update.metrics["texts_scored"] == 3
    assert update.metrics["loss_prompt_last"] == 0.5 and update.metrics["seconds_labels"] >= 0


def test_a_client_without_any_label_sends_back_what_came_down_for_nothing():
    client, trainer = augmented(holding([], 3), labels=False)
    update = client.local_update(3, 1, DOWN)
    assert (update.weight, trained_on(trainer)) == (0.0, [])
    assert update.tensors.flat.tobytes() == DOWN.flat.tobytes()
    assert update.tensors.flat is not DOWN.flat
    nobody, _ = augmented(holding([], 0))
    assert nobody.local_update(3, 1, DOWN).weight == 0


def test_a_client_without_any_label_trains_on_pseudo_labels():
    client, trainer = augmented(holding([], 3), says({21: 1}))
    assert client.local_update(3, 1, DOWN).weight == 3
    assert trained_on(trainer) == [(20, 0), (21, 1), (22, 0)]


def test_a_client_without_unlabelled_text_asks_nobody():
    client, trainer = augmented(holding([0, 1], 0))
    update = client.local_update(3, 1, DOWN)
    assert update.weight == 2 and trainer.holds == []
    assert update.metrics["pseudo_labels"] == update.metrics["texts_scored"] == 0


def test_a_client_that_knows_one_class_makes_labels_of_that_one():
    client, trainer = augmented(
        holding([1, 1], 4), says({20: 1, 21: 1}), per_client=4, quota="labels"
    )
    assert client.local_update(3, 1, DOWN).weight == 4
    assert trained_on(trainer) == [(0, 1), (1, 1), (20, 1), (21, 1)]


def test_fewer_texts_than_the_quota():
    client, _ = augmented(holding([0], 2), per_client=100)
    assert client.local_update(3, 1, DOWN).weight == 3


def test_as_many_pseudo_labels_as_are_missing_and_more_in_later_rounds():
    client, _ = augmented(holding([0, 1, 0], 50), per_client=5, growth=4, start_round=2)
    weights = [client.local_update(3, round, DOWN).weight for round in (2, 3, 5)]
    assert weights == [5, 9, 17]
    plenty, _ = augmented(holding([0] * 7, 9), per_client=5)
    assert plenty.local_update(3, 1, DOWN).weight == 7


def test_labels_count_until_they_are_made_again():
    text = holding([0], 6)
    client, trainer = augmented(text, says({20: 1, 21: 1, 22: 1}), per_client=4)
    client.local_update(3, 1, DOWN)
    first = trained_on(trainer)
    client._labels_in = lambda id, round: False
    update = client.local_update(3, 2, DOWN)
    assert trained_on(trainer) == first and update.metrics["texts_scored"] == 0
    assert client.pseudo_labels(3).round == 1
    client._labels_in = lambda id, round: True
    client.local_update(3, 3, DOWN)
    assert client.pseudo_labels(3).round == 3 and len(trained_on(trainer)) == 4


def test_what_a_client_keeps_survives_a_checkpoint_to_the_bit():
    client, _ = augmented(holding([0], 6), says({20: 1}, margin=0.3), per_client=4)
    assert not client.states.has_state(3)
    client.local_update(3, 1, DOWN)
    state = {name: value.copy() for name, value in client.states.client_state(3).items()}
    other, trainer = augmented(holding([0], 6), labels=False)
    other.states.load_client_state(3, state)
    other.local_update(3, 2, DOWN)
    assert len(trained_on(trainer)) == 4
    for name, value in other.states.client_state(3).items():
        assert value.tobytes() == state[name].tobytes() and value.dtype == state[name].dtype
    other.states.forget(3)
    assert not other.states.has_state(3) and other.pseudo_labels(3) is None


def test_two_templates_must_agree():
    text = holding([0], 4)
    reworded = [question(40 + n) for n in range(4)]
    text = ClientText(text.labelled, text.questions, text.unlabelled, reworded)
    client, trainer = augmented(text, says({20: 1, 21: 1, 40: 1, 42: 1}))
    update = client.local_update(3, 1, DOWN)
    assert trained_on(trainer) == [(0, 0), (20, 1), (23, 0)]
    assert update.metrics["texts_scored"] == 8


def test_a_fitted_temperature_decides_who_is_sure_enough():
    """Half of its own labels are wrong to the model: it should not be sure of anything."""
    text = holding([0, 1], 4)
    sure, _ = augmented(text, says({}, margin=4.0), confidence=0.9)
    assert sure.local_update(3, 1, DOWN).weight == 6
    doubting, _ = augmented(text, says({}, margin=4.0), confidence=0.9, calibrate=True)
    update = doubting.local_update(3, 1, DOWN)
    assert update.weight == 2 and update.metrics["texts_scored"] == 6


def test_unusable_text_and_a_model_that_says_nan_fail_the_client():
    client, _ = augmented(ShardError("its text cannot be used"))
    with pytest.raises(ShardError):
        client.local_update(3, 1, DOWN)
    client, _ = augmented(holding([0], 2), lambda questions: np.full((len(questions), 2), math.nan))
    with pytest.raises(ClientError, match="says nan"):
        client.local_update(3, 1, DOWN)


def test_precision_is_measured_from_answers_that_the_client_lacks():
    client, _ = augmented(holding([0], 4), says({20: 1}))
    monitor = LabelMonitor(client, {3: np.array([1, 0, 1, 0])})
    assert monitor.local_update(3, 1, DOWN).metrics["pseudo_precision"] == 0.75
    silent, _ = augmented(holding([0], 4), labels=False)
    nothing = LabelMonitor(silent, {3: np.zeros(4, dtype=np.int64)})
    assert math.isnan(nothing.local_update(3, 1, DOWN).metrics["pseudo_precision"])


def test_soft_labels_weigh_the_loss_of_each_class(tmp_path):
    model = tiny.load(tiny.model_folder(tmp_path / "m", "llama"))
    plain = tiny.texts([9, 7, 6], seed=1)
    weights = [0.25, 1.0, 0.5]
    weighted = [
        Text(text.ids, text.answer, text.gap, weight) for text, weight in zip(plain, weights)
    ]
    assert collate(plain).weights is None
    batch = collate(weighted)
    by_hand = sum(
        weight * float(answer_loss(*model.answer_logits(collate([text]), None)))
        for text, weight in zip(plain, weights)
    )
    with torch.no_grad():
        assert float(answer_loss_of(model, None, batch)) == pytest.approx(by_hand, rel=1e-5)
    expected = sum(weight * text.num_answers for text, weight in zip(plain, weights))
    assert num_answer_tokens(batch) == pytest.approx(expected)


# -- runs ------------------------------------------------------------------------------------------

FEW = (
    *WHOLE_MODEL,
    "data.server_share=0",
    "server.tuning.steps=0",
    "data.verbaliser=[grey, blue]",
    "data.limit.train=null",
    "data.labels=6",
    "data.label_spread=0.1",
    "augment.clients=2",
    "augment.per_client=8",
    "evaluation.zero_shot=false",
)


def relabelled(folder: Path, rows: set[int], target: Path) -> str:
    """Copy a task of two classes; rows of train but these get the other class."""
    target.mkdir()
    for name in ("train", "validation", "test"):
        lines = (folder / f"{name}.jsonl").read_text().splitlines()
        examples = [json.loads(line) for line in lines]
        for number, example in enumerate(examples):
            if name == "train" and number not in rows:
                example["label"] = 1 - example["label"]
        text = "".join(json.dumps(example) + "\n" for example in examples)
        (target / f"{name}.jsonl").write_text(text)
    return str(target)


def labelled_rows(settings: tuple[str, ...]) -> set[int]:
    inputs = ExperimentInputs(config.load(None, list(settings)))
    places = inputs.labelled_places
    assert places is not None
    return {
        int(shard[place])
        for shard, rows in zip(inputs.shards[1:], places)
        for place in rows.tolist()
    }


def without_precision(run: Run) -> list[str]:
    return [name for name in run.clients.dtype.names if name != "pseudo_precision"]


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The settings of a run with six labels among 48 texts of three clients."""
    data = tiny.gap_task_folder(tmp_path_factory.mktemp("few") / "data")
    return (*FEW, f"data.source={data}", "federation.clients=3")


@pytest.fixture(scope="module")
def few_run(few: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return short(tmp_path_factory.mktemp("runs"), *few)


def source_of(settings: tuple[str, ...]) -> Path:
    return Path(config.load(None, list(settings)).data.source or "")


def test_the_method_never_reads_the_labels_of_unlabelled_rows(few, few_run, tmp_path):
    """With all of them wrong a run has the same bits; only the record's precision differs."""
    rows = labelled_rows(few)
    assert len(rows) == 6
    wrong = relabelled(source_of(few), rows, tmp_path / "wrong")
    first = few_run
    second = short(tmp_path / "others", *few, f"data.source={wrong}")
    assert all("pseudo_precision" in line for line in difference(first, second))
    pseudo = first.clients["pseudo_labels"] > 0
    assert pseudo.any()
    right = first.clients["pseudo_precision"][pseudo]
    assert right + second.clients["pseudo_precision"][pseudo] == pytest.approx(1.0)
    assert (first.clients["samples"] <= 16).all() and len(np.unique(first.clients["samples"])) > 1


def inputs_of(tmp_path: Path, *settings: str) -> ExperimentInputs:
    data = tmp_path / "data"
    if not data.exists():
        tiny.gap_task_folder(data)
    own = (*FEW, f"data.source={data}", "federation.clients=8")
    return ExperimentInputs(config.load(None, [*own, *settings]))


def test_a_client_holds_all_of_its_text_and_no_answers_but_its_own(tmp_path):
    inputs = inputs_of(tmp_path)
    num_labels = 0
    for owner in range(1, 9):
        text = inputs.client_text(owner)
        num_labels += len(text.labelled)
        assert len(text.labelled) + len(text.unlabelled) == inputs.shard_sizes[owner]
        assert all(question.gold == () for question in text.unlabelled)
        assert len(inputs.shard(owner)) == len(inputs.questions(owner)) == len(text.labelled)
    assert num_labels == 6


def test_who_has_nothing_to_train_on_does_not_take_part(tmp_path):
    inputs = inputs_of(tmp_path, "augment.start_round=3")
    with_labels = {client for client, rows in enumerate(inputs.labelled_places or []) if len(rows)}
    assert 1 <= len(with_labels) < 8
    assert participation.chosen(inputs, 1) == participation.chosen(inputs, 2) == sorted(with_labels)
    active = set(with_labels)
    for round in range(3, 9):
        labellers = participation.labellers_of(inputs, round)
        assert len(labellers) == 2
        active |= set(labellers)
        assert participation.chosen(inputs, round) == sorted(active)
    assert participation.labellers_of(inputs, 2) == []


def test_of_few_places_in_a_round_those_who_label_come_first(tmp_path):
    inputs = inputs_of(tmp_path, "federation.clients_per_round=3")
    for round in range(1, 12):
        chosen = participation.chosen(inputs, round)
        assert set(participation.labellers_of(inputs, round)) <= set(chosen)
        assert len(chosen) == len(set(chosen)) <= 3
    assert len(participation.chosen(inputs, 11)) == 3
    expected = participation.expected(inputs, dict.fromkeys(range(8), 1), 11)
    assert all(
        expected.max_samples[client] == inputs.shard_sizes[client + 1] for client in expected.ranks
    )


REFUSED = {
    "all text is labelled": {"augment": {"clients": 2}},
    "expected 0, or a method that trains": {
        "method": "fedbpt",
        "server": {"tuning": {"steps": 0}},
        "data": {"labels": 9},
        "augment": {"clients": 2},
    },
    "spread over clients": {"data": {"labels": 9}, "federation": {"clients": 0}},
    "silos have labels of their own": {
        "data": {"labels": 9},
        "federation": {"silos": [{"source": "/a"}]},
        "server": {"data": {"source": "/b"}},
    },
    "who can take part changes": {
        "data": {"labels": 9},
        "augment": {"clients": 2},
        "federation": {"clients_per_round": 3, "sampling": "round_robin"},
    },
    "label is not defined": {
        "data": {"labels": 9},
        "augment": {"clients": 2},
        "attack": {"target": 1},
    },
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_work_is_refused(tmp_path, words):
    refused(lambda: load(tmp_path, REFUSED[words]), words)


def test_text_without_classes_and_wrong_templates_are_refused_before_a_run(tmp_path):
    settings = ["data.labels=6", "augment.clients=2", "data.server_share=16"]
    refused(lambda: ExperimentInputs(config.load(None, settings)).check(), "no classes in common")
    words = inputs_of(tmp_path, "augment.second_template='{nothing} {mask}'")
    refused(words.check, "augment.second_template", "nothing")
    many = inputs_of(tmp_path, "data.labels=1000")
    refused(many.check, "data.labels: found 1000 labels for 48 examples of 8 clients")


@pytest.mark.slow
def test_silos_with_unlabelled_rows_run_to_the_bits_of_the_simulation(few, tmp_path):
    """`split` leaves out the labels that a client does not hold; its silo labels the same text."""
    few = (*few, "augment.clients=3", "augment.quota=labels")
    simulated = short(tmp_path / "runs", *few)
    split(None, [*SHORT, *few, "distillation.engine=torch"], tmp_path / "silos", log=Log())
    manifest = json.loads((tmp_path / "silos" / "manifest.json").read_text())
    labels = [owner["labels"]["train"] for owner in manifest["owners"][1:]]
    assert sum(counts["no label"] for counts in labels) == 42
    assert sum(counts["grey"] + counts["blue"] for counts in labels) == 6
    silos = tmp_path / "silos" / "silos.yaml"
    here(["run", str(silos), "--name", "silos", "--set", f"run.folder={tmp_path / 'runs'}"])
    run = read(tmp_path / "runs" / "silos")
    for round in (1, 2):
        for name, prompt in simulated.prompts(round).items():
            assert run.prompts(round)[name].tobytes() == prompt.tobytes()
    for name in ("pseudo_labels", "texts_scored", "samples"):
        assert run.clients[name].tolist() == simulated.clients[name].tolist()
    assert (
        "pseudo_precision" not in run.clients.dtype.names
        or np.isnan(run.clients["pseudo_precision"]).all()
    )
    quiet = ["--set", "federation.disclose=nothing", "--name", "quiet"]
    here(["run", str(silos), *quiet, "--set", f"run.folder={tmp_path / 'runs'}"])
    undisclosed = read(tmp_path / "runs" / "quiet").clients
    assert set(undisclosed["samples"].tolist()) == {1}
    assert np.isnan(undisclosed["pseudo_labels"]).all()


def test_the_record_says_whose_labels_there_are_and_how_many_pseudo_labels_are_right(few, few_run):
    section = few_run.sections["labels"]
    assert section["classes"] == ["grey", "blue"]
    assert sum(map(sum, section["labels"])) == sum(map(len, section["rows"])) == 6
    assert {row for rows in section["rows"] for row in rows} == labelled_rows(few)
    rows = [json.loads(line) for line in (source_of(few) / "train.jsonl").read_text().splitlines()]
    for counts, numbers in zip(section["labels"], section["rows"]):
        assert counts[1] == sum(rows[number]["label"] for number in numbers)
    summary = summarize(few_run)
    assert "precision %" in summary and "pseudo = pseudo-labels among them" in summary


LABELS = (
    "data.labels=6",
    "data.label_spread=0.1",
    "augment.clients=2",
    "augment.per_client=8",
    "evaluation.zero_shot=false",
    "evaluation.server_only=false",
)
WEIGHTS = (
    "client.tuning.optimizer.learning_rate=1e-3",
    "server.tuning.optimizer.learning_rate=1e-3",
)
# What else may be tuned, and by which models.
TUNED = {
    "weights": ("method=finetune", *WEIGHTS),
    "adapters": ("method=lora", *WEIGHTS, "lora.merge=products"),
    "auxiliary": ("auxiliary.depth=2", "client.training=joint"),
    "bert": None,
    "t5": None,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TUNED)
def test_whatever_clients_train_labels_their_text(few, tmp_path, name):
    """Weights, adapters, FedSP's auxiliary model, and models that fill in a gap."""
    tuned = TUNED[name]
    if tuned is None:
        settings = (*gap_settings(tmp_path, name), *LABELS)
    else:
        data = (f"data.source={source_of(few)}", "data.verbaliser=[grey, blue]")
        settings = (*data, "data.limit.train=null", *LABELS, *tuned)
    run = short(tmp_path / "runs", *settings)
    ok = run.clients[run.clients["status"] == "ok"]
    assert len(ok) == len(run.clients)
    labelled = ok[ok["texts_scored"] > 0]
    assert len(labelled) and (labelled["pseudo_labels"] > 0).all()
    assert np.isfinite(run.rounds["validation_loss"]).all()
