"""FedBPT's parts against loops by hand: the server's merge, objectives, clients with a model."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fedsp_mpi import rng
from fedsp_mpi.aggregation.fedavg import weighted_mean
from fedsp_mpi.aggregation.step_size import corrected, effective
from fedsp_mpi.algorithms import fedbpt
from fedsp_mpi.algorithms.base import ShardError
from fedsp_mpi.algorithms.inference import LocalInference
from fedsp_mpi.config.search import SearchConfig
from fedsp_mpi.data.tokens import collate
from fedsp_mpi.models.losses import answer_losses, fitness
from fedsp_mpi.models.prompts import DepthMap, Prompt, PromptSpec
from fedsp_mpi.models.subspace import Subspace
from fedsp_mpi.tensors import NamedTensors
from fedsp_mpi.training.cma_es import CmaEs, sizes
from fedsp_mpi.training.loop import NonFiniteError
from helpers import tiny
from helpers.paths import ROOT
from helpers.searches import (
    function_client,
    function_server,
    gathered,
    sphere,
    told,
)


def test_the_step_size_is_that_of_equation_6():
    losses, population = [3.0, 1.0, 2.0, 4.0], 5
    sigmas = np.array([[1.0, 0.9], [0.5, 0.4], [0.8, 0.7], [2.0, 2.0]])
    total = 0.0
    for client in (1, 2):  # the better half
        for sigma in sigmas[client]:
            total += sigma**2
    spreads = np.sqrt((sigmas**2).sum(1)).tolist()
    assert corrected(losses, spreads, points=population / 2, parents=2) == pytest.approx(
        2 * math.sqrt(total / (4 * population)), rel=1e-12
    )
    # The reference sums over all clients and knows mu = lambda / 2: the same where the sums are.
    assert corrected(losses, [1.3] * 4, points=2, parents=4) == pytest.approx(
        math.sqrt(4 * 1.3**2 / 4 / 2), rel=1e-12
    )
    assert corrected([5.0], [2.0], points=4, parents=1) == pytest.approx(math.sqrt(2 * 4.0 / 8))


@pytest.mark.parametrize("population", [4, 5, 10, 21])
def test_the_effective_parents_are_the_library_s(population):
    """And a mean of points of no meaning moves by so much."""
    from cmaes import CMA

    assert effective(population) == pytest.approx(
        CMA(np.zeros(4), 1.0, population_size=population)._mu_eff, rel=1e-12
    )
    search, moved = CmaEs.of({"mean": np.zeros(500), "step_size": np.ones(1)}), []
    for seed in range(4):
        points = search.sample(population, seed)
        other = CmaEs.of(search.state())
        other.update(points, np.arange(float(population)))
        moved.append(np.square(other.mean).mean())
    assert np.mean(moved) == pytest.approx(1 / effective(population), rel=0.15)


def test_a_client_tells_the_sum_of_its_squared_step_sizes():
    settings = SearchConfig(6, iterations=3, objective="loss")
    server = function_server(settings)
    [update] = told(server, 1)
    search, squares = CmaEs.of(server.broadcast()), 0.0
    for iteration in range(3):
        squares += search.step_size**2
        points = search.sample(5, rng.key(3, "search", 1, 0, iteration))
        search.update(points, np.array([sphere(point) for point in points]))
    assert update.metrics["step_size"] ** 2 == pytest.approx(squares, rel=1e-12)
    assert np.array_equal(update.tensors["mean"], search.mean.astype(np.float32)) and list(
        update.tensors
    ) == ["mean"]
    assert update.metrics["fitness"] == sphere(update.tensors["mean"].astype(np.float64))
    assert set(update.metrics) == set(fedbpt.METHOD.metrics) and update.weight == 1.0


def test_the_server_ranks_the_clients_means():
    """By the arithmetic of Hansen's tutorial, for a first generation: mean, path, step size."""
    settings = SearchConfig(4, iterations=2, objective="loss", step_size=0.7)
    server = function_server(settings)
    updates = told(server, 6)
    merged = server.aggregate(gathered(updates))
    best = sorted(updates, key=lambda update: update.metrics["fitness"])[:3]
    weights = np.log(3.5) - np.log(np.arange(1, 4))
    weights /= weights.sum()
    mean = sum(weight * update.tensors["mean"] for weight, update in zip(weights, best))
    assert merged["mean"] == pytest.approx(mean, abs=1e-6)
    sigma = corrected(
        [update.metrics["fitness"] for update in updates],
        [update.metrics["step_size"] for update in updates],
        points=2.5,
        parents=3,
    )
    strength = 1 / (weights**2).sum()
    rate = (strength + 2) / (4 + strength + 5)
    path = math.sqrt(rate * (2 - rate) * strength) * mean / sigma
    assert merged["step_path"] == pytest.approx(path, rel=1e-5)
    damping = 1 + 2 * max(0, math.sqrt((strength - 1) / 5) - 1) + rate
    length = math.sqrt(4) * (1 - 1 / 16 + 1 / (21 * 16))
    change = math.exp(rate / damping * (np.linalg.norm(path) / length - 1))
    assert merged["step_size"].item() == pytest.approx(0.7 * change, rel=1e-5)
    assert merged["generation"].item() == 1 and list(merged) == list(sizes(4))


def test_the_server_moves_to_all_clients():
    """Weighted by their ranks, as the better half of 12."""
    settings = SearchConfig(4, iterations=2, objective="loss", parents="all")
    server = function_server(settings)
    updates = told(server, 6)
    merged = server.aggregate(gathered(updates))
    ranked = sorted(updates, key=lambda update: update.metrics["fitness"])
    weights = np.log(6.5) - np.log(np.arange(1, 7))
    weights /= weights.sum()
    means = np.array([update.tensors["mean"] for update in ranked], np.float64)
    assert merged["mean"] == pytest.approx(weights @ means, abs=1e-6)
    sigma = math.sqrt(sum(update.metrics["step_size"] ** 2 for update in updates) / 6 / 2.5)
    strength = 1 / (weights**2).sum()
    rate = (strength + 2) / (4 + strength + 5)
    path = math.sqrt(rate * (2 - rate) * strength) * (weights @ means) / sigma
    assert merged["step_path"] == pytest.approx(path, rel=1e-5)


def test_of_all_points_the_covariance_hears_too():
    """Hansen's arithmetic for the better half of 12, without the other one."""
    points, losses = (
        np.random.default_rng(4).standard_normal((6, 4)),
        np.array([3.0, 1.0, 5.0, 2.0, 6.0, 4.0]),
    )
    search = CmaEs.of({"mean": np.zeros(4), "step_size": np.array([2.0])})
    search.update(points, losses, "all")
    weights = np.log(6.5) - np.log(np.arange(1, 7))
    weights /= weights.sum()
    strength, steps = 1 / (weights**2).sum(), points[np.argsort(losses)] / 2
    rate = (4 + strength / 4) / (8 + 2 * strength / 4)
    path = math.sqrt(rate * (2 - rate) * strength) * (weights @ steps)
    assert search.mean == pytest.approx(weights @ points[np.argsort(losses)])
    assert search.mean_path == pytest.approx(path)
    one = 2 / (5.3**2 + strength)
    many = 2 * (strength - 2 + 1 / strength) / (6**2 + strength)
    covariance = (1 - one - many) * np.eye(4) + one * np.outer(path, path)
    covariance += many * sum(weight * np.outer(step, step) for weight, step in zip(weights, steps))
    assert search.covariance == pytest.approx(covariance[np.triu_indices(4)])


def test_clients_step_sizes_go_on_where_they_were():
    """Their geometric mean changes as the server's does by itself; paths stay where they are."""
    own = {"iterations": 3, "objective": "loss", "step_size": 0.7}
    server = function_server(SearchConfig(4, step_size_by="clients", **own))
    updates = told(server, 6)
    assert [list(update.tensors) for update in updates] == [["mean", "step_size"]] * 6
    merged, ends = (
        server.aggregate(gathered(updates)),
        [update.tensors["step_size"].item() for update in updates],
    )
    assert len(set(ends)) == 6
    losses, spreads = (
        [update.metrics[name] for update in updates] for name in ("fitness", "step_size")
    )
    begin = corrected(losses, spreads, points=effective(5), parents=3)
    wanted = CmaEs.of({"mean": np.zeros(4), "step_size": np.array([begin])})
    before = wanted.step_size
    wanted.update(np.array([update.tensors["mean"] for update in updates]), np.array(losses))
    assert merged["mean"] == pytest.approx(wanted.mean, rel=1e-6)
    assert merged["step_path"] == pytest.approx(wanted.step_path, rel=1e-5)
    change = wanted.step_size / before
    assert merged["step_size"].item() == pytest.approx(
        math.prod(ends) ** (1 / 6) * change, rel=1e-5
    )
    server.load_aggregate(merged)
    assert list(server.broadcast()) == ["mean", "step_size", "covariance"]
    [again], search = told(server, 1), CmaEs.of(server.broadcast())
    assert server.state()["step_path"].any() and not search.step_path.any()
    for iteration in range(3):
        points = search.sample(5, rng.key(3, "search", 1, 0, iteration))
        search.update(points, np.array([sphere(point) for point in points]))
    assert np.array_equal(again.tensors["mean"], search.mean.astype(np.float32))
    assert again.tensors["step_size"].item() == np.float32(search.step_size)


def test_of_a_single_client_the_server_takes_the_mean():
    server = function_server(SearchConfig(4, iterations=2, objective="loss"))
    [update] = told(server, 1)
    before = server.broadcast()
    server.load_aggregate(server.aggregate(gathered([update])))
    after = server.broadcast()
    assert np.array_equal(after["mean"], update.tensors["mean"])
    assert all(np.array_equal(after[name], before[name]) for name in ("step_size", "covariance"))


def test_the_other_rule_averages_all_that_the_clients_know():
    server = function_server(SearchConfig(4, iterations=2, objective="loss", rule="average"))
    updates = told(server, 3)
    assert list(updates[0].tensors) == ["mean", "step_size", "covariance", "step_path", "mean_path"]
    merged = server.aggregate(gathered(updates))
    assert np.array_equal(merged.flat, weighted_mean(gathered(updates)).flat)
    wanted = (
        sum(u.weight * u.tensors["covariance"].astype(np.float64) for u in updates) / 6
    )  # of 1, 2 and 3 examples
    assert merged["covariance"] == pytest.approx(wanted, rel=1e-6)
    server.load_aggregate(merged)
    assert np.array_equal(server.broadcast().flat, merged.flat)


def test_the_identity_does_not_travel():
    server = function_server(SearchConfig(9, covariance="identity", iterations=2, objective="loss"))
    updates = told(server, 4)
    server.load_aggregate(server.aggregate(gathered(updates)))
    assert [(spec.name, spec.shape) for spec in server.broadcast().schema] == [
        ("mean", (9,)),
        ("step_size", (1,)),
    ]
    assert not np.array_equal(
        server.state()["covariance"], np.eye(9)[np.triu_indices(9)]
    )  # but it is the server's own


def test_a_server_goes_on_from_its_state_with_equal_bits():
    settings = SearchConfig(5, iterations=2, objective="loss")
    one, client = function_server(settings), function_client(sphere, settings, 1, 4)
    for round in range(1, 7):
        if round == 4:
            kept = {name: value.copy() for name, value in one.state().items()}
            other = function_server(settings)
            other.load_state(kept)
        for server in [one] + ([other] if round >= 4 else []):
            updates = [
                client.local_update(id, round, server.broadcast()) for id in (3, 1, 0, 2)
            ]  # in any order
            server.load_aggregate(
                server.aggregate(gathered(sorted(updates, key=lambda update: update.client)))
            )
    assert (
        NamedTensors.of(one.state()).flat.tobytes() == NamedTensors.of(other.state()).flat.tobytes()
    )
    assert torch.equal(one.prompt.prompt, other.prompt.prompt)


# -- objectives ------------------------------------------------------------------------------------


def test_the_objectives_are_those_of_loops(tmp_path):
    model = tiny.load(tiny.model_folder(tmp_path, "gpt2"))
    batch, copy = tiny.batch((11, 7, 4, 9), seed=1), tiny.batch((11, 7, 4, 9), seed=2)
    by_hand = []
    for some in (batch, copy):
        losses = []
        for ids, mask, targets in zip(*some[:3]):
            length = int(mask.sum())
            logits = model.model(input_ids=ids[None, :length]).logits[0]
            each = [
                F.cross_entropy(logits[i], targets[i]).item()
                for i in range(length)
                if targets[i] != -100
            ]
            losses.append(sum(each) / len(each))
        by_hand.append(losses)
    found = []
    for some in (batch, copy):
        counts = (some.targets != -100).sum(1).tolist()
        found.append(answer_losses(*model.answer_logits(some), counts).double())
    assert found[0].tolist() == pytest.approx(by_hand[0], rel=1e-4)
    plain, others = by_hand
    wanted = {
        "loss": sum(plain) / 4,
        "ratio_of_means": (sum(plain) / 4) / (sum(others) / 4),
        "mean_of_ratios": sum(x / y for x, y in zip(plain, others)) / 4,
    }
    for objective, value in wanted.items():
        assert fitness(objective, *found).item() == pytest.approx(value, rel=1e-4), objective
    assert fitness("mean_of_ratios", torch.ones(2), torch.zeros(2)).isfinite()


# -- clients with a model --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.load(tiny.model_folder(tmp_path_factory.mktemp("model"), "gpt2"))


def searching(model, **changes) -> fedbpt.SearchClient:
    """Two clients, and one without text, that search in 6 dimensions for an input prompt of 3
    tokens.
    """
    settings = SearchConfig(**{"dimension": 6, "iterations": 2, "batch_tokens": 40, **changes})
    spec = PromptSpec.of(model.shape, "input", 3)
    first = model.model.get_input_embeddings().weight[4:7].detach().clone()
    shards = {
        0: tiny.texts((9, 8, 12, 6)),
        1: tiny.texts((7, 5), seed=1),
        2: ShardError("nothing here"),
    }
    space = Subspace(spec, 6, 0.1, 1)
    depths = DepthMap(spec, model.shape.num_layers)
    inference = LocalInference(
        model,
        Prompt(spec),
        fedbpt.Projection(first, space, depths),
        batch_tokens=settings.batch_tokens,
    )
    return fedbpt.SearchClient(inference, shards, np.arange(4, 100), settings=settings, seed=1)


def beginning(settings: SearchConfig) -> NamedTensors:
    """What goes down in the first round."""
    return function_server(settings).broadcast()


@pytest.mark.parametrize("objective", ["loss", "ratio_of_means", "mean_of_ratios"])
def test_a_client_s_round_is_forward_passes(model, objective, monkeypatch):
    client, passes, graphs = searching(model, objective=objective), [], []
    answer_logits = model.answer_logits

    def noted(batch, prompt):
        logits, targets = answer_logits(batch, prompt)
        passes.append(len(batch.input_ids))
        graphs.append(logits.requires_grad)
        return logits, targets

    monkeypatch.setattr(model, "answer_logits", noted)
    update = client.local_update(0, 1, beginning(client._settings))
    assert sum(passes) == 4 * (2 * 5 + 1) * (
        1 if objective == "loss" else 2
    )  # texts, points, copies
    held = client._inference
    assert not any(graphs) and all(
        p.grad is None for p in [*model.weights.values(), held.prompt.prompt]
    )
    assert update.weight == 4 and np.isfinite(list(update.metrics.values())).all()
    texts = client._shards[0]
    prompt = Prompt(held.prompt.spec)
    space = held._matrices
    change = space.subspace.expand(update.tensors["mean"][None])[0]
    prompt.load({"prompt": space.initial + change})
    with torch.no_grad():
        losses = [F.cross_entropy(*answer_logits(collate([text]), prompt)).item() for text in texts]
    assert update.metrics["loss_prompt_last"] == pytest.approx(np.mean(losses), rel=1e-4)
    if objective == "loss":
        assert update.metrics["fitness"] == update.metrics["loss_prompt_last"]


@pytest.mark.parametrize("objective", ["loss", "ratio_of_means"])
def test_clients_may_be_ranked_by_their_improvement(model, objective):
    client, plain = (
        searching(model, objective=objective, rank_by=by) for by in ("improvement", "objective")
    )
    update, other = (
        some.local_update(0, 1, beginning(client._settings)) for some in (client, plain)
    )
    assert np.array_equal(update.tensors["mean"], other.tensors["mean"])
    held = client._inference
    space = held._matrices
    own = space.initial + space.subspace.expand(update.tensors["mean"][None])[0]
    assert torch.allclose(held.prompt.prompt, own, atol=1e-6), (
        "what was tuned is what an attack is tried on"
    )
    texts = client._with_perturbed_copy(client._shards[0], 0, 1)
    before = client._evaluate(0, np.zeros((1, 6)), texts)[0][0]
    assert update.metrics["fitness"] == pytest.approx(other.metrics["fitness"] / before, rel=1e-6)
    assert update.metrics["loss_prompt_last"] == pytest.approx(
        other.metrics["loss_prompt_last"], rel=1e-6
    )
    assert (client._settings.points, plain._settings.points) == (12, 11)
    assert not replace(client._settings, rule="average").compares, "nobody is ranked then"


def test_a_client_s_round_follows_from_who_and_when(model):
    client = searching(model)
    down = beginning(client._settings)
    one = client.local_update(0, 1, down)
    client.local_update(1, 1, down)
    again, later = client.local_update(0, 1, down), client.local_update(0, 2, down)
    assert (
        np.array_equal(one.tensors.flat, again.tensors.flat)
        and one.metrics["fitness"] == again.metrics["fitness"]
    )
    assert not np.array_equal(one.tensors.flat, later.tensors.flat)
    assert not any(client.states.has_state(id) for id in range(3))


def test_a_client_that_cannot_search_says_so(model, monkeypatch):
    client = searching(model)
    with pytest.raises(ShardError, match="nothing here"):
        client.local_update(2, 1, beginning(client._settings))
    monkeypatch.setattr(fedbpt, "fitness", lambda *some: torch.tensor(math.nan))
    with pytest.raises(NonFiniteError, match="the objective is nan, expected a finite number"):
        client.local_update(0, 1, beginning(client._settings))


def test_a_slow_client_ends_after_its_iteration(model):
    client = searching(model, iterations=50)
    client._max_seconds = 0.0
    update = client.local_update(0, 1, beginning(client._settings))
    assert update.metrics["step_size"] == 1.0  # of one iteration


MEMORY = """
import numpy as np, torch
from transformers import AutoModelForCausalLM, GPT2Config
from fedsp_mpi.algorithms.fedbpt import Projection, SearchClient
from fedsp_mpi.algorithms.inference import LocalInference
from fedsp_mpi.data.tokens import Text, collate
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.models.prompts import DepthMap, Prompt, PromptSpec
from fedsp_mpi.models.subspace import Subspace
from fedsp_mpi.config.search import SearchConfig
from fedsp_mpi.tensors import NamedTensors
from fedsp_mpi.training.cma_es import CmaEs

torch.set_num_threads(1)
config = GPT2Config(vocab_size=250000, n_embd=512, n_layer=2, n_head=8, n_positions=128)
model = LanguageModel(AutoModelForCausalLM.from_config(config), candidates=torch.arange(4))
model.train_weights(False)
spec, random = PromptSpec.of(model.shape, "input", 50), np.random.default_rng(0)
ids = [np.append(random.integers(100, 5000, 40), i % 4) for i in range(45)]
texts = [Text(tokens.astype(np.int32), 40) for tokens in ids]
settings = SearchConfig(iterations=2, population=3)
space = Subspace(spec, settings.dimension, 0.01, 1)
prompt = Prompt(spec)
held = LocalInference(
    model,
    prompt,
    Projection(torch.zeros(50, 512), space, DepthMap(spec, 2)),
    batch_tokens=settings.batch_tokens,
)
client = SearchClient(held, {0: texts}, np.arange(9), settings=settings, seed=1)
state = CmaEs.of({"mean": np.zeros(settings.dimension), "step_size": np.ones(1)}).state()
down = NamedTensors.of({name: state[name] for name in settings.travelling()[0]})

def peak(work):
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark begins anew
    work()
    lines = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(lines[0].split()[1])

def forward():
    with torch.inference_mode():
        return model.answer_logits(collate(texts), prompt)

def gradient():
    prompt.requires_grad_(True)
    torch.nn.functional.cross_entropy(*model.answer_logits(collate(texts), prompt)).backward()

forward()
print(peak(forward), peak(lambda: client.local_update(0, 1, down)), peak(gradient))
"""


@pytest.mark.slow
def test_a_client_needs_hardly_more_memory_than_its_forward_passes():
    """Resident memory of a process, with a model of 134 million parameters and a search in 500
    dimensions.
    """
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this system does not measure peaks anew")
    done = subprocess.run(
        [sys.executable, "-c", MEMORY],
        cwd=ROOT,
        # Memory is given back at once, or the peaks would be those of the allocator's moods.
        env={"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": ""}
        | dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), "65536"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    forward, search, gradient = map(int, done.stdout.split())
    assert search <= 1.05 * forward, (search, forward)
    assert gradient > search, "or the measure sees nothing"
