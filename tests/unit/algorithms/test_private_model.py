"""Clients that hold no model: their forward passes run at the server, which answers what they ask
in a round.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from fedsp_mpi import config
from fedsp_mpi.algorithms.fedbpt import Projection
from fedsp_mpi.algorithms.inference import (
    Limits,
    LocalInference,
    RemoteInference,
    decode_request,
    encode_request,
    handle_request,
)
from fedsp_mpi.comm import Handout, Solo
from fedsp_mpi.data.tokens import Text
from fedsp_mpi.estimate import cost
from fedsp_mpi.estimate import text as plan_text
from fedsp_mpi.models.prompts import DepthMap, Prompt, PromptSpec
from fedsp_mpi.models.subspace import Subspace
from fedsp_mpi.record import Run, read
from fedsp_mpi.report import difference
from fedsp_mpi.run.inputs import ExperimentInputs
from fedsp_mpi.tensors import Contract, NamedTensors, Schema, SealedTensorError, seal
from helpers import tiny
from helpers.mpi import both_ends, only_report
from helpers.runs import FAULTY, FEDBPT, gap_settings, short, short_run

PRIVATE = (*FEDBPT, "search.forward=server")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The same search in this process and on 3 ranks; and by clients that hold the model.

    That 2 and 4 ranks have the same bits too, tests/ranks/test_golden.py says.
    """
    folder = tmp_path_factory.mktemp("private")
    for n in (0, 3):
        done = short_run(n, folder, f"n{n}", *PRIVATE)
        (folder / f"n{n}.txt").write_text(done.stdout)
    short_run(0, folder, "held", *FEDBPT)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("other", ["n3", "held"])
def test_bits_depend_neither_on_ranks_nor_on_who_holds_the_model(runs, other):
    one, two = read(runs / "n0"), read(runs / other)
    assert one.status == two.status == "complete"
    for round in (1, 2):
        assert one.prompts(round)["prompt"].tobytes() == two.prompts(round)["prompt"].tobytes()
    for column in ("fitness", "step_size", "loss_prompt_first", "loss_prompt_last"):
        assert one.clients[column].tobytes() == two.clients[column].tobytes(), column
    for column in ("acc", "loss"):
        assert one.results[column].tobytes() == two.results[column].tobytes()


def asked_bytes(run: Run) -> tuple[int, int]:
    """What client 0 asks in a round and is handle_request, counted from its texts by hand."""
    materials = ExperimentInputs(config.load(run.file.parent / "config.yaml"))
    texts = 2 * len(materials.shard(1))
    tokens = 2 * sum(len(text.ids) for text in materials.shard(1))  # copies are as long
    up = down = 0
    for points in (5, 5, 1):  # two iterations, and the mean
        up += 256 + 4 * (3 + 2 + points * 20 + 3 * texts + tokens)
        down += 256 + 4 * points * texts
    return up, down


@pytest.mark.slow
@pytest.mark.parametrize("name", ["n0", "n3"])
def test_every_byte_has_a_name(runs, name):
    run = read(runs / name)
    assert run.sections["models"]["auxiliary"] == 0
    up, down = asked_bytes(run)
    first = run.clients[run.clients["client"] == 0]
    assert set(first["bytes_up"].tolist()) == {256 + 4 * 20 + up}
    assert set(first["bytes_down"].tolist()) == {256 + 4 * (20 + 1 + 210) + down}
    book = {(str(row["direction"]), str(row["phase"]), str(row["name"])): row for row in run.wire}
    assert not any(direction == "handout" and "(" not in name for direction, _, name in book)
    questions, answers = (
        book["up", "questions", "(question)"],
        book["down", "questions", "(answer)"],
    )
    assert questions["count"] == answers["count"] == 3 * 3 * 2  # times, clients, rounds
    headers = 256 * (3 + 1) * 3 * 2
    assert int(run.clients["bytes_up"].sum()) == int(questions["bytes"]) + headers + 4 * 20 * 3 * 2
    assert int(questions["bytes_crossed"]) == (int(questions["bytes"]) if name == "n3" else 0)


@pytest.mark.slow
def test_the_plan_and_the_check_know_that_clients_hold_nothing(runs, tmp_path):
    run = read(runs / "n3")
    settings = config.load(
        None, [*PRIVATE, "federation.clients=3", "federation.rounds=2", "data.limit.train=64"]
    )
    tokens = [len(text.ids) for id in (1, 2, 3) for text in ExperimentInputs(settings).shard(id)]
    found = cost.plan(settings, "embedded", round(np.mean(tokens)))
    own, text = found.methods[0], plan_text.text(found, 40)
    assert (own.holds, own.handout, own.round) == (0, 0, 0.0)
    assert own.up == pytest.approx(run.clients["bytes_up"].mean(), rel=0.03)
    assert own.down == pytest.approx(run.clients["bytes_down"].mean(), rel=0.03)
    held = cost.plan(
        config.load(None, [*FEDBPT, "federation.clients=3", "federation.rounds=2"]), "embedded", 12
    )
    assert found.client.device == 0 < held.client.device and found.client.host < held.client.host
    assert "none: clients hold no model" in text and "clients' forward passes" in text
    assert "their text goes to the server (search.forward=server)" in (runs / "n3.txt").read_text()


def test_the_work_is_counted_where_it_is_done():
    settings = [*FEDBPT, "data.limit.train=64"]
    held, private = (
        cost.plan(config.load(None, some), "x", 20) for some in (settings, [*settings, PRIVATE[-1]])
    )
    assert private.phases["clients' forward passes"] == pytest.approx(held.phases["client search"])
    assert private.critical > held.critical  # one server for all clients


def test_texts_and_points_come_through():
    groups = [
        [
            Text(np.array([1, 2, 16_000_001], dtype=np.int32), 2),
            Text(np.array([5, 7], dtype=np.int32), 1),
        ],
        [Text(np.array([9, 3, 4], dtype=np.int32), 1, gap=250_001)],
    ]
    points = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    found, texts = decode_request(encode_request(points, groups), Limits(6, 16_000_002, 3))
    assert np.array_equal(found, points) and [len(group) for group in texts] == [2, 1]
    for text, other in zip(
        (t for group in groups for t in group), (t for group in texts for t in group)
    ):
        assert np.array_equal(text.ids, other.ids) and (text.answer, text.gap) == (
            other.answer,
            other.gap,
        )
        assert other.ids.dtype == np.int32


def test_a_question_that_is_none_is_refused_before_it_is_handle_request():
    """Whatever a client sends: a ValueError, or points and texts within the limits; and no memory
    for what is not.
    """
    limits, random = Limits(3, 100, 4), np.random.default_rng(0)
    points = random.standard_normal((2, 3)).astype(np.float32)
    good = encode_request(
        points,
        [
            [Text(np.array([1, 2, 99], dtype=np.int32), 2)],
            [Text(np.array([5, 7], dtype=np.int32), 1)],
        ],
    )
    accepted = 0
    for _ in range(3000):
        question = good.copy()
        for place in random.integers(0, len(question), random.integers(1, 4)):
            question[place] = random.choice(
                [-1, 0, 0.5, 1, 2, 3, 100, 1e30, np.nan, np.inf, 2.0**23]
            )
        question = question[: random.integers(len(question))] if random.random() < 0.1 else question
        try:
            tried, groups = decode_request(question, limits)
        except ValueError as error:
            assert "expected" in str(error)
            continue
        accepted += 1
        assert np.isfinite(tried).all() and tried.shape[1] == 3
        for text in (text for group in groups for text in group):
            assert (
                0 <= text.answer < len(text.ids) <= 4
                and text.ids.min() >= 0
                and text.ids.max() < 100
            )
    assert 30 < accepted < 2900


def test_asking_gives_the_losses_of_holding(tmp_path):
    model = tiny.load(tiny.model_folder(tmp_path, "gpt2"))
    spec = PromptSpec.of(model.shape, "input", 3)
    layers = model.shape.num_layers
    first = model.model.get_input_embeddings().weight[4:7].detach().clone()
    space, whole = Subspace(spec, 6, 0.1, 1), DepthMap(spec, layers, tuple(range(layers)))
    held = LocalInference(model, Prompt(spec), Projection(first, space, whole), batch_tokens=40)
    groups = [tiny.texts((9, 8, 12, 6)), tiny.texts((7, 5), seed=1)]
    points = np.random.default_rng(0).standard_normal((2, 6))
    wanted = held.losses(0, points, groups)
    found = RemoteInference(
        lambda client, values: handle_request(held, values, Limits(6, tiny.VOCABULARY, 40))
    ).losses(0, points, groups)
    assert [each.shape for each in found] == [(2, 4), (2, 2)]
    assert all(np.array_equal(one, other) for one, other in zip(wanted, found))
    with pytest.raises(
        ValueError, match="found 3 losses from the server, expected 2 x 6 for client 4"
    ):
        RemoteInference(lambda client, values: np.zeros(3, np.float32)).losses(4, points, groups)


def test_an_answer_is_never_the_global_model():
    weights, nothing = torch.nn.Linear(2, 3), NamedTensors.pack({})
    seal.add([("some", weights.weight)])
    try:
        wire = Solo()
        wire.handout(Handout({}, nothing, Contract(nothing.schema, Schema(()), servers=1)))
        wire.serve(lambda values: weights.weight.detach().numpy())
        with pytest.raises(SealedTensorError, match="which never leaves the server"):
            wire.call(0, np.ones(4, np.float32))
    finally:
        seal.clear()


def test_models_that_fill_in_a_gap_answer_too(tmp_path):
    own = [item for item in PRIVATE if not item.startswith(("prompt", "auxiliary"))]
    words = ("prompt.init=text", "prompt.init_text=w3 w4", "data.loss_over=auto")
    run = short(tmp_path / "runs", *gap_settings(tmp_path, "roberta", *own, *words))
    assert run.status == "complete" and np.isfinite(run.clients["fitness"]).all()


@pytest.mark.slow
def test_two_ranks_of_the_server_share_the_questions(runs, tmp_path):
    short_run(4, tmp_path, "two", *PRIVATE, "topology.server_ranks=2")
    one, two = read(runs / "n0"), read(tmp_path / "two")
    assert two.rounds["validation_loss"] == pytest.approx(one.rounds["validation_loss"], rel=1e-5)
    assert two.clients["fitness"] == pytest.approx(one.clients["fitness"], rel=1e-5)
    assert two.clients["bytes_up"].tolist() == one.clients["bytes_up"].tolist()


@pytest.mark.slow
def test_a_killed_run_goes_on_with_equal_bits(tmp_path):
    settings = (*PRIVATE, "federation.rounds=3", "search.dimension=10")
    short_run(0, tmp_path, "whole", *settings)
    program = (FAULTY, "kill:local training:1:3")  # the checkpoint of round 1 is complete then
    killed = short_run(2, tmp_path, "killed", *settings, program=program, status=None)
    assert killed.returncode != 0 and "Traceback" not in killed.stderr, both_ends(killed)
    short_run(3, tmp_path, "killed", *settings, "run.resume=must")
    assert difference(read(tmp_path / "whole"), read(tmp_path / "killed")) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "limit", "named"),
    [
        ("hang:local training:2:1", "gather", "rank 2"),
        ("stop:local work:0:1", "broadcast", "rank 0"),
    ],
    ids=["who asks", "who answers"],
)
def test_who_does_not_come_to_the_desk_is_named_within_the_deadline(tmp_path, fault, limit, named):
    settings = (*PRIVATE, f"deadlines.{limit}=4")
    ended = short_run(3, tmp_path, "run", *settings, program=(FAULTY, fault), status=None)
    assert ended.returncode == 124, both_ends(ended)
    assert re.search(
        rf"found nothing from {named} after 4\.\d s, expected an answer within 4 s", ended.stderr
    )
    assert only_report(ended)


def test_only_a_search_asks():
    assert not config.load(None, ["search.forward=server"]).asks_server
    with pytest.raises(
        config.ConfigError, match=r"search\.forward: found 'model', expected one of clients, server"
    ):
        config.load(None, [*FEDBPT, "search.forward=model"])
