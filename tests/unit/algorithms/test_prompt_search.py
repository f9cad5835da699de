"""Prompts in words: edits, the server's step, scores against words typed by hand, whole runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedsp_mpi import config, rng
from fedsp_mpi.aggregation.fedavg import weighted_mean
from fedsp_mpi.algorithms import prompt_search
from fedsp_mpi.algorithms.base import ShardError
from fedsp_mpi.algorithms.prompt_search import (
    Examples,
    InstructionClient,
    InstructionServer,
    Search,
)
from fedsp_mpi.comm import Refused
from fedsp_mpi.comm.messages import Report
from fedsp_mpi.comm.updates import Updates
from fedsp_mpi.config import EMBEDDED, InstructionsConfig
from fedsp_mpi.data.instructions import InstructionTokens
from fedsp_mpi.data.tasks import Example
from fedsp_mpi.data.tokens import Question, Text
from fedsp_mpi.estimate import cost
from fedsp_mpi.estimate import text as plan_text
from fedsp_mpi.evaluation import scoring
from fedsp_mpi.models.prompts import PromptSpec, read_adapter
from fedsp_mpi.record import read
from fedsp_mpi.report import summarize
from fedsp_mpi.tensors import NamedTensors
from fedsp_mpi.training.loop import NonFiniteError
from helpers import tiny
from helpers.runs import PROMPT_SEARCH, gap_settings, short, short_run

POOL = ("w1 w2", "w3", "w4 w5 w6", "w7")
LENGTH = 6  # tokens of a row
SETTINGS = InstructionsConfig(pool=POOL, candidates=7, beam=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.load(tiny.model_folder(tmp_path_factory.mktemp("model"), "gpt2"))


def server_of(model, settings: InstructionsConfig = SETTINGS, seed: int = 1) -> InstructionServer:
    return InstructionServer(
        model,
        PromptSpec.of(model.shape, "input", LENGTH),
        InstructionTokens(tiny.tokenizer(), LENGTH),
        settings=settings,
        seed=seed,
        rule=weighted_mean,
    )


def client_of(model, shards, choice_losses=scoring.choice_losses) -> InstructionClient:
    spec = PromptSpec.of(model.shape, "input", LENGTH)
    return InstructionClient(model, spec, shards, choice_losses=choice_losses, batch_tokens=60)


def questions(number: int = 5) -> list[Question]:
    random = np.random.default_rng(number)
    examples = []
    for place in range(number):
        context = " ".join(random.choice(tiny.words(), 2 + place % 3))
        examples.append(Example(context, " w8", ("w8", "w9 w10", "w11"), (place % 3,)))
    return scoring.questions(tiny.tokenizer(), examples)


def rows_of(*instructions: list[str]) -> NamedTensors:
    tokens = InstructionTokens(tiny.tokenizer(), LENGTH)
    return NamedTensors.of({"instructions": np.stack([tokens.row(x) for x in instructions])})


# -- edits -----------------------------------------------------------------------------------------


def neighbours(parent: tuple[int, ...], num_phrases: int) -> set[tuple[int, ...]]:
    """All instructions that one edit leads to, one kind after the other."""
    found = set()
    for phrase in range(num_phrases):
        found |= {(*parent, phrase), (phrase, *parent)}
        for place in range(len(parent)):
            found.add((*parent[:place], phrase, *parent[place + 1 :]))
    for place in range(len(parent)):
        found.add((*parent[:place], *parent[place + 1 :]))
        for other in range(len(parent)):
            swapped = list(parent)
            swapped[place], swapped[other] = parent[other], parent[place]
            found.add(tuple(swapped))
    return found


def test_an_edit_leads_to_each_neighbour_and_to_nothing_else():
    random = rng.generator(1, "test")
    for parent in ((), (2,), (0, 2, 1)):
        drawn = {prompt_search.edited(parent, 4, random) for _ in range(2000)}
        assert drawn == neighbours(parent, 4) - ({()} if not parent else set())


def test_proposals_are_new_short_enough_and_follow_from_seed_and_round():
    tokens = InstructionTokens(tiny.tokenizer(), 4)
    search = Search.start(POOL).after([(), (0,), (1, 3)], np.array([3.0, 1.0, 2.0]), 2)
    assert search.beam == ((0,), (1, 3)) and search.tried == ((), (0,), (1, 3))
    drawn = prompt_search.proposals(search, 5, 1, fits=tokens.fits)
    near = neighbours((0,), 4) | neighbours((1, 3), 4)
    assert len(set(drawn)) == len(drawn) == 5 and set(drawn) <= near - set(search.tried)
    for edit in drawn:
        words = " ".join(POOL[phrase] for phrase in edit).split()
        assert len(words) <= 4 and len(set(edit)) == len(edit)
    assert drawn == prompt_search.proposals(search, 5, 1, fits=tokens.fits)
    assert drawn != prompt_search.proposals(search, 5, 2, fits=tokens.fits)
    later = search.after([(0,), (1, 3)], np.array([1.0, 2.0]), 2)
    assert drawn != prompt_search.proposals(later, 5, 1, fits=tokens.fits)


def test_a_small_pool_has_an_end(model):
    """The rest of the rows is filled with the best, whose score counts once."""
    server = server_of(model, InstructionsConfig(pool=("w1",), candidates=5, beam=2))
    rows = server.broadcast()["instructions"]
    assert rows[:, 0].tolist() == [-1, 5, -1, -1, -1] and (rows[:, 1:] == -1).all()  # 5: w1
    server.load_aggregate(NamedTensors.of({"scores": np.array([1.0, 2.0, 1.0, 1.0, 1.0])}))
    assert np.array_equal(server.broadcast()["instructions"], rows)


# -- the server ------------------------------------------------------------------------------------


def scored(rows: np.ndarray, weights: list[float], num_tokens: int = LENGTH) -> Updates:
    schema = NamedTensors.of({"scores": rows[0]}).schema
    reports = [Report(client, weight, {}) for client, weight in enumerate(weights)]
    pieces = iter([(slice(0, rows.shape[1]), rows.astype(np.float32))])
    return Updates(reports, [], schema, source=pieces)


def test_the_server_keeps_the_best_by_the_weighted_mean(model):
    """Three rounds against plain Python; of equal scores the first stays in front."""
    server, random, weights = server_of(model), np.random.default_rng(3), [1.0, 3.0, 4.0]
    beam: list[list[float]] = []
    for _ in range(3):
        rows = server.broadcast()["instructions"].tolist()
        assert rows[: len(beam)] == beam
        scores = random.integers(1, 4, (3, 7)) / 4  # so that some are equal
        means = []
        for place in range(7):
            total = 0.0
            for weight, row in zip(weights, scores):
                total += weight * row[place]
            means.append(total / sum(weights))
        num_distinct = len({tuple(row) for row in rows})
        order = sorted(range(num_distinct), key=lambda place: (means[place], place))
        merged = server.aggregate(scored(scores, weights))
        assert merged["scores"].tolist() == pytest.approx(means, abs=1e-7)
        server.load_aggregate(merged)
        beam = [rows[place] for place in order[:2]]
        assert server.export()["tokens"].tolist() == beam[0]
        ids = [int(token) for token in beam[0] if token >= 0]
        weight = model.model.get_input_embeddings().weight.detach()
        assert torch.equal(server.prompt.matrix(), weight[ids])


@pytest.mark.parametrize("paraphrases", [0, 3])
def test_a_server_goes_on_from_its_state(model, paraphrases):
    settings = InstructionsConfig(
        pool=(*POOL, "w0 “”"), candidates=7, beam=2, paraphrases=paraphrases
    )
    server = server_of(model, settings)
    for round in range(2):
        before = server.state()
        down = server.broadcast()
        assert all(before[name].tobytes() == x.tobytes() for name, x in server.state().items())
        again = server_of(model, settings)
        again.load_state({name: value.copy() for name, value in before.items()})
        assert np.array_equal(again.broadcast().flat, down.flat)
        assert np.array_equal(again.export().flat, server.export().flat)
        scores = np.random.default_rng(round).random(7)
        server.load_aggregate(NamedTensors.of({"scores": scores}))
    assert (len(server._search.pool) > len(settings.pool)) == bool(paraphrases)


def test_what_the_model_writes_joins_the_pool_line_by_line(model, monkeypatch):
    """The first line with words, without what is there already or too long."""
    settings = InstructionsConfig(pool=POOL, candidates=7, beam=2, paraphrases=4)
    server, tokenizer = server_of(model, settings), tiny.tokenizer()
    lines = ["w20 w21", "w3", "w20 w21", " ".join(["w9"] * 7)]
    ids = [[*tokenizer.encode(line), 2] for line in lines]
    contexts = []

    def written(context, num, max_tokens):
        contexts.append((context, num, max_tokens))
        return ids

    monkeypatch.setattr(model, "continuations", written)
    rows = server.broadcast()["instructions"]
    assert rows[1].tolist() == [*tokenizer.encode("w20 w21"), -1, -1, -1, -1]
    [(context, num, max_tokens)] = contexts
    assert (num, max_tokens) == (4, LENGTH) and len(context) > 5


# -- the clients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "opt"])
def test_a_score_is_that_of_words_typed_by_hand(tmp_path, family):
    """The scorer's log-likelihoods of texts that begin with the words, or with none of them."""
    model = tiny.load(tiny.model_folder(tmp_path, family))
    instructions = [["w7"], ["w1 w2", "w4 w5 w6", "w7"], ["w7"], [], ["w3", "w1 w2"]]
    asked = questions()
    own = [question.options[question.gold[0]] for question in asked]
    down = rows_of(*instructions)
    by_choices = client_of(model, {0: Examples(own, asked)}).local_update(0, 1, down)
    scores = by_choices.tensors["scores"]
    assert scores[0] == scores[2] and len(set(scores.tolist())) == 4 and by_choices.weight == 5.0
    assert by_choices.metrics["loss_prompt_last"] == pytest.approx(scores.min())
    by_answers = client_of(model, {0: Examples(own)}).local_update(0, 1, down).tensors["scores"]
    for place, words in enumerate(instructions):
        behind = [typed_in_front(" ".join(words), question) for question in asked]
        assert scores[place] == pytest.approx(mean_choice_loss(model, behind), rel=1e-5)
        texts = [question.options[question.gold[0]] for question in behind]
        assert by_answers[place] == pytest.approx(mean_answer_loss(model, texts), rel=1e-5)


def typed_in_front(words: str, question: Question) -> Question:
    typed = np.array(tiny.tokenizer().encode(words), dtype=np.int32)
    options = tuple(
        Text(np.concatenate([typed, text.ids]), text.answer + len(typed))
        for text in question.options
    )
    return Question(options, question.lengths, question.gold)


def mean_choice_loss(model, asked: list[Question]) -> float:
    loss = 0.0
    for question, scores in zip(
        asked, scoring.loglikelihoods(model, None, asked, batch_tokens=1000)
    ):
        shares = [math.exp(value) for value in scores.loglikelihood]
        loss -= math.log(shares[question.gold[0]] / sum(shares)) / len(asked)
    return loss


def mean_answer_loss(model, texts: list[Text]) -> float:
    loss = 0.0
    for text in texts:
        logits = model.model(torch.from_numpy(text.ids)[None].long()).logits[0].double()
        shares = torch.log_softmax(logits, -1)
        answers = range(text.answer, len(text.ids))
        total = sum(float(shares[place - 1, text.ids[place]]) for place in answers)
        loss -= total / len(answers) / len(texts)
    return loss


def test_a_client_holds_the_first_instruction_to_be_judged(model):
    client = client_of(model, {})
    client.hold(0, rows_of(["w3"], ["w7"]))
    weight = model.model.get_input_embeddings().weight.detach()
    assert torch.equal(client.prompt.matrix(), weight[[7]])


def test_clients_that_cannot_score_say_why(model):
    client = client_of(
        model,
        {
            0: ShardError("its text cannot be used: found no example"),
            1: Examples(tiny.texts((5, 4)), questions(2)),
        },
        lambda *_, **__: np.array([[1.0, math.inf]]),
    )
    with pytest.raises(ShardError, match="found no example"):
        client.local_update(0, 1, rows_of(["w3"]))
    with pytest.raises(NonFiniteError, match="the score of instruction 1 is inf, expected a fin"):
        client.local_update(1, 1, rows_of(["w3"]))


def test_a_long_context_loses_its_beginning_for_all_options_alike():
    [question] = questions(1)
    short_question = question.shortened(3)
    assert [len(text.ids) for text in short_question.options] == [2, 3, 2]
    assert [text.answer for text in short_question.options] == [1, 1, 1]
    assert question.shortened(9) is question


# -- whole runs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """A short run, and what it printed."""
    folder = tmp_path_factory.mktemp("words")
    result = short_run(0, folder, "run", *PROMPT_SEARCH, "federation.rounds=3")
    return folder / "run", result.stdout


def test_the_wire_carries_ids_and_scores_as_planned(printed):
    folder, _ = printed
    run = read(folder)
    planned = cost.plan(config.load(None, [*PROMPT_SEARCH, "federation.clients=3"]), "embedded")
    method = planned.methods[0]
    assert set(run.clients["bytes_down"].tolist()) == {4 * 6 * 8 + 256} == {method.down}
    assert set(run.clients["bytes_up"].tolist()) == {4 * 6 + 256} == {method.up}
    names = {(str(row["direction"]), str(row["name"])) for row in run.wire}
    travelling = {name for way, name in names if way in ("down", "up") and "(" not in name}
    assert travelling == {"instructions", "scores"}
    handed_out = [row for row in run.wire if str(row["direction"]) == "handout"]
    assert method.handout == sum(
        int(row["bytes"]) for row in handed_out if "(" not in str(row["name"])
    )
    assert method.trains == run.sections["models"]["searched"] == 8
    text = plan_text.text(planned, 40)
    assert "6 instructions, without gradients" in text
    assert "192 bytes down and 24 up" in text and "instructions of at most 8 tokens" in text
    # 2 choices are counted where rows have their own: one more answer for each point.
    by_loss = ["instructions.objective=loss", "federation.clients=3"]
    loss = cost.plan(config.load(None, [*PROMPT_SEARCH, *by_loss]), "embedded").methods[0]
    assert 1.0 < method.round / loss.round < 1.5 and method.round == 6 * method.steps[0]


def test_the_run_tells_its_instruction(printed):
    folder, out = printed
    run = read(folder)
    assert run.status == "complete"
    row = run.results[-1]
    section = run.sections["instruction"]
    assert (str(row["method"]), section["round"]) == ("prompt_search", int(row["round"]))
    assert (folder / "prompt" / "instruction.txt").read_text() == section["text"] + "\n"
    tuned = run.prompts(section["round"])
    tokenizer = _tokenizer()
    ids = tokenizer.encode(section["text"] + "\n" if section["text"] else "")
    assert list(tuned) == ["tokens"] and tuned["tokens"].tolist() == ids + [-1] * (8 - len(ids))
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED.parent / "model")
    words = model.get_input_embeddings()(torch.tensor(ids, dtype=torch.long))
    assert torch.equal(read_adapter(folder / "prompt"), words)
    assert f"prompt    {section['text']}" in summarize(run)
    assert out.count(": best instruction, ") == 3
    first, last = run.clients["loss_prompt_first"], run.clients["loss_prompt_last"]
    assert (last <= first).all() and np.isfinite(first).all()


def test_where_no_phrase_helps_nothing_stands_in_front_of_a_text(tmp_path):
    """The same scores as zero-shot, and an adapter without a token, as peft takes it."""
    settings = ("instructions.pool=[zzz]", "instructions.candidates=2", "instructions.beam=1")
    run = short(tmp_path, *PROMPT_SEARCH, *settings)
    assert run.sections["instruction"]["text"] == ""
    zero_shot, best = run.results[-2:]
    assert [str(row["method"]) for row in (zero_shot, best)] == ["zero-shot", "prompt_search"]
    assert (best["loss"], best["acc"]) == (zero_shot["loss"], zero_shot["acc"])
    assert read_adapter(run.prompt).shape[0] == 0
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED.parent / "model").eval()
    ids = torch.tensor([_tokenizer().encode("Question: one two")])
    alone = model(input_ids=ids).logits
    assert torch.equal(PeftModel.from_pretrained(model, run.prompt)(input_ids=ids).logits, alone)


def _tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED.parent / "model")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["roberta", "t5"])
def test_models_that_fill_in_a_gap_are_searched_too(tmp_path, family):
    settings = [item for item in PROMPT_SEARCH if not item.startswith("auxiliary")]
    words = ("instructions.pool=[w3, w4, w5 w6]", "prompt.num_tokens=4")
    run = short(tmp_path / "runs", *gap_settings(tmp_path, family, *settings, *words))
    assert run.status == "complete" and run.sections["instruction"]["text"].count("w") < 5
    assert not (run.clients["loss_prompt_first"] == run.clients["loss_prompt_last"]).all()


@pytest.mark.slow
def test_silos_judge_what_the_server_found_best(tmp_path):
    """On the same text they come to the server's loss: they hold the same words."""
    data = EMBEDDED.parent / "data"
    silos = json.dumps([{"name": name, "source": str(data)} for name in ("a", "b", "c")])
    texts = (f"federation.silos={silos}", "data.source=null", f"server.data.source={data}")
    more = ("evaluation.at=both", "instructions.objective=loss", "data.limit.validation=null")
    run = short(tmp_path, *PROMPT_SEARCH, *texts, *more)
    assert set(run.clients["samples"].tolist()) == {64}
    for row in run.silos:
        validation_loss = run.rounds["validation_loss"][row["round"] - 1]
        assert row["loss"] == pytest.approx(validation_loss, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("instructions.pool=[]",), "instructions.pool: found no phrase, expected at least one"),
        (
            ("instructions.pool=[a, ' ']",),
            "instructions.pool: found phrase 2 without words or of several lines",
        ),
        (("instructions.pool=[a, b, a]",), "instructions.pool: found phrase 3 twice"),
        (
            ("instructions.pool=[a, one two three four five six seven eight]",),
            "instructions.pool: found phrase 2 of 9 tokens, expected at most prompt.num_tokens=8",
        ),
        (
            ("instructions.beam=6",),
            "instructions.beam: found 6, expected fewer than instructions.candidates=6",
        ),
        (("instructions.candidates=1",), "instructions.candidates: found 1, expected at least 2"),
        (("instructions.objective=acc",), "instructions.objective: found 'acc', expected one of"),
        (
            ("prompt.kind=prefix",),
            "prompt.kind: found prefix with method=prompt_search, expected input",
        ),
        (
            ("server.tuning.steps=2",),
            "server.tuning.steps: found 2 with method=prompt_search, expected 0",
        ),
        (
            ("federation.outer.optimizer=fedadam",),
            "federation.outer.optimizer: found fedadam with method=prompt_search, expected fedavg",
        ),
        (
            ("search.forward=server",),
            "search.forward: found server with method=prompt_search, expected clients",
        ),
        (("federation.clients=0",), "federation.clients: found 0 with method=prompt_search"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, settings, message):
    with pytest.raises((ValueError, Refused)) as told:
        short(tmp_path, *PROMPT_SEARCH, *settings)
    assert message in str(told.value) and "\n" not in str(told.value)
    assert len(str(told.value)) <= 300
