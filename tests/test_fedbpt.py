"""FedBPT: the search itself on functions, its parts against hand loops, and whole runs of it."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from mpi import ROOT, both_ends
from test_masked import settings as gap_settings
from test_resume import FAULTY
from test_run import short_run
from test_variants import short
from torch.nn import functional as F

from fedsp_mpi import config, record, rng
from fedsp_mpi.aggregation.fedavg import weighted_mean
from fedsp_mpi.aggregation.step_size import corrected, effective
from fedsp_mpi.algorithms import fedavg_bbt, fedbpt
from fedsp_mpi.algorithms.base import ShardError
from fedsp_mpi.algorithms.inference import LocalInference
from fedsp_mpi.comm import Refused
from fedsp_mpi.comm.messages import Report
from fedsp_mpi.comm.updates import Updates
from fedsp_mpi.config.search import SearchConfig
from fedsp_mpi.data.perturb import perturbed
from fedsp_mpi.data.tokens import Text, collate
from fedsp_mpi.estimate import cost
from fedsp_mpi.estimate import text as plan_text
from fedsp_mpi.models.losses import answer_losses, fitness
from fedsp_mpi.models.prompts import DepthMap, Prompt, PromptSpec
from fedsp_mpi.models.subspace import Subspace, scale_of
from fedsp_mpi.record import read
from fedsp_mpi.report import difference
from fedsp_mpi.tensors import NamedTensors, Update
from fedsp_mpi.training.cma_es import CmaEs, sizes
from fedsp_mpi.training.loop import NonFiniteError

# The embedded default as FedBPT, with a small search.
FEDBPT = (
    "method=fedbpt",
    "server.tuning.steps=0",
    "distillation.stage.steps=0",
    "auxiliary.layers_per_cell=null",
    "prompt.kind=input",
    "prompt.init=text",
    "prompt.num_tokens=8",
    "search.dimension=20",
    "search.iterations=2",
)
AVERAGE = (*FEDBPT, "search.rule=average", "search.objective=loss")
KEPT = (*FEDBPT, "search.step_size_by=clients", "search.rank_by=improvement", "search.parents=all")


# -- the search on functions -----------------------------------------------------------------------


def sphere(x: np.ndarray) -> float:
    """Its least value is 0, at (1, ..., 1)."""
    return float(((x - 1) ** 2).sum())


def rosenbrock(x: np.ndarray) -> float:
    """A bent valley; its least value is 0, at (1, ..., 1)."""
    return float((100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum())


def function_server(settings: SearchConfig) -> fedbpt.SearchServer:
    """The server without a model: nothing is made of z."""
    method = fedavg_bbt.METHOD if settings.rule == "average" else fedbpt.METHOD
    spec = PromptSpec("input", 1, 1, 1, 1)
    subspace = Subspace(spec, settings.dimension, 1.0, 1)
    return method.server_class(SimpleNamespace(), Prompt(spec), subspace, settings=settings)


class Function:
    """A function of z in the place of a model's loss, which knows how often it was asked, and its
    least value.
    """

    def __init__(self, function: Callable[[np.ndarray], float]) -> None:
        self._function, self.best, self.evaluations = function, math.inf, 0

    def losses(self, client: int, points: np.ndarray, groups: object) -> list[np.ndarray]:
        values = np.array([self._function(point.astype(np.float64)) for point in points])
        self.best, self.evaluations = min(self.best, *values), self.evaluations + len(values)
        return [values[:, None]]


def function_client(
    function: Callable[[np.ndarray], float] | Function, settings, seed, clients
) -> fedbpt.SearchClient:
    """Clients whose objective is a function of z."""
    shards = {client: [None] * (client + 1) for client in range(clients)}
    forward = function if isinstance(function, Function) else Function(function)
    method = fedavg_bbt.METHOD if settings.rule == "average" else fedbpt.METHOD
    return method.client_class(forward, shards, np.arange(9), settings=settings, seed=seed)


def gathered(updates: list[Update]) -> Updates:
    """Updates as the loop would hand them to the server."""
    schema = updates[0].tensors.schema
    reports = [Report(update.client, update.weight, update.metrics) for update in updates]
    rows = np.array([update.tensors.flat for update in updates])
    return Updates(reports, [], schema, iter([(slice(0, schema.num_values), rows)]))


def evaluations_together(function, settings: SearchConfig, clients: int, seed: int) -> float:
    """How often each of the clients asks the function until one of them is below 1e-8."""
    server, asked = function_server(settings), Function(function)
    client = function_client(asked, settings, seed, clients)
    for round in range(1, 400):
        down = server.broadcast()
        updates = [client.local_update(id, round, down) for id in range(clients)]
        if asked.best < 1e-8:
            return asked.evaluations / clients
        server.load_aggregate(server.aggregate(gathered(updates)))
    return math.inf


def evaluations_alone(function, settings: SearchConfig, seed: int) -> float:
    """The same for one client that goes on by itself, without beginning anew in each round."""
    search = CmaEs.of(
        {"mean": np.zeros(settings.dimension), "step_size": np.array([settings.step_size])}
    )
    for generation in range(2000):
        points = search.sample(settings.population, rng.key(seed, "alone", generation))
        values = np.array([function(point) for point in points])
        if values.min() < 1e-8:
            return (generation + 1) * settings.population
        search.update(points, values)
    return math.inf


# What each search sets apart from the paper's.
SEARCHES: dict[str, dict] = {
    "paper": {},
    "kept": {"step_size_by": "clients"},
    "default": {"step_size_by": "clients", "rank_by": "improvement", "parents": "all"},
    "average": {"rule": "average"},
}


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize(
    ("function", "dimension", "step_size"),
    [(sphere, 10, 0.5), (rosenbrock, 5, 0.3)],
    ids=["sphere", "rosenbrock"],
)
def test_ten_clients_reach_1e_8_with_fewer_evaluations_each_than_one_alone(
    function, dimension, step_size, search
):
    settings = SearchConfig(
        dimension, step_size=step_size, iterations=1, objective="loss", **SEARCHES[search]
    )
    alone = [evaluations_alone(function, settings, seed) for seed in range(2)]
    together = [evaluations_together(function, settings, 10, seed) for seed in range(1)]
    assert max(together) < min(alone) < math.inf, (together, alone)


@pytest.mark.slow
def test_eight_iterations_a_round_help_where_step_sizes_are_kept():
    """What the README says of the paper's eight: by the paper, what clients learn of step sizes is
    lost each round.
    """
    settings = SearchConfig(10, step_size=0.5, iterations=8, objective="loss")
    alone = [evaluations_alone(sphere, settings, seed) for seed in range(3)]
    for search in ("kept", "default", "average"):
        assert evaluations_together(sphere, replace(settings, **SEARCHES[search]), 10, 0) < min(
            alone
        ), search
    assert evaluations_together(sphere, settings, 10, 1) > max(alone)


@pytest.mark.slow
def test_eight_iterations_a_round_follow_a_valley_where_all_clients_count():
    settings = SearchConfig(5, step_size=0.3, iterations=8, objective="loss")
    alone = max(evaluations_alone(rosenbrock, settings, seed) for seed in range(2))
    assert evaluations_together(rosenbrock, replace(settings, rule="average"), 10, 0) < alone
    assert evaluations_together(rosenbrock, replace(settings, **SEARCHES["default"]), 10, 0) < alone
    assert (
        evaluations_together(rosenbrock, replace(settings, **SEARCHES["kept"]), 10, 0) == math.inf
    )


@pytest.mark.slow
def test_in_500_dimensions_the_covariance_hardly_moves():
    search, random = (
        CmaEs.of({"mean": np.zeros(500), "step_size": np.ones(1)}),
        np.random.default_rng(0),
    )
    for _ in range(200):
        points = search.mean + search.step_size * random.standard_normal((10, 500))
        search.update(points, np.array([sphere(point + 1) for point in points]))
    matrix = np.zeros((500, 500))
    matrix[np.triu_indices(500)] = search.covariance
    values = np.linalg.eigvalsh(matrix, UPLO="U")
    assert 0.985 < values.min() < 0.995 and 1.05 < values.max() < 1.1


def test_a_search_goes_on_from_its_state_with_equal_bits():
    whole = CmaEs.of({"mean": np.arange(6.0), "step_size": np.array([0.5])})
    for generation in range(12):
        if generation in (4, 9):
            copied = {name: value.copy() for name, value in whole.state().items()}
            whole.sample(5, 99)  # what is not told is forgotten
            whole = CmaEs.of(copied)
            assert {name: value.size for name, value in copied.items()} == sizes(6)
        points = whole.sample(5, generation)
        whole.update(points, np.array([sphere(point) for point in points]))
    other = CmaEs.of({"mean": np.arange(6.0), "step_size": np.array([0.5])})
    for generation in range(12):
        points = other.sample(5, generation)
        other.update(points, np.array([sphere(point) for point in points]))
    for name, value in whole.state().items():
        assert value.tobytes() == other.state()[name].tobytes(), name
    assert whole.generation == 12


def test_points_follow_the_distribution_and_the_seed():
    root = np.array([[2.0, 0.0], [1.0, 0.5]])
    search = CmaEs.of(
        {
            "mean": np.array([1.0, -1.0]),
            "step_size": np.array([3.0]),
            "covariance": (root @ root.T)[[0, 0, 1], [0, 1, 1]],
        }
    )
    points = search.sample(4000, 7)
    assert np.array_equal(points, search.sample(4000, 7)) and not np.array_equal(
        points, search.sample(4000, 8)
    )
    assert np.abs(points.mean(0) - search.mean).max() < 0.3
    assert np.abs(np.cov(points.T) / 9 - root @ root.T).max() < 0.3


# -- the server's merge ----------------------------------------------------------------------------


def told(
    server: fedbpt.SearchServer, clients: int, losses: list[float] | None = None
) -> list[Update]:
    """One update of each client from the server's broadcast."""
    client = function_client(sphere, server._settings, 3, clients)
    return [client.local_update(id, 1, server.broadcast()) for id in range(clients)]


def test_the_step_size_is_that_of_equation_6():
    losses, population = [3.0, 1.0, 2.0, 4.0], 5
    sigmas = np.array([[1.0, 0.9], [0.5, 0.4], [0.8, 0.7], [2.0, 2.0]])
    total = 0.0
    for client in (1, 2):  # the better half
        for sigma in sigmas[client]:
            total += sigma**2
    spreads = np.sqrt((sigmas**2).sum(1)).tolist()
    assert corrected(losses, spreads, population / 2, 2) == pytest.approx(
        2 * math.sqrt(total / (4 * population)), rel=1e-12
    )
    # The reference sums over all clients and knows mu = lambda / 2: the same where the sums are.
    assert corrected(losses, [1.3] * 4, 2, 4) == pytest.approx(
        math.sqrt(4 * 1.3**2 / 4 / 2), rel=1e-12
    )
    assert corrected([5.0], [2.0], 4, 1) == pytest.approx(math.sqrt(2 * 4.0 / 8))


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
    """Against the arithmetic of Hansen's tutorial, for a first generation: mean, path, step size."""
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
        *([u.metrics[name] for u in updates] for name in ("fitness", "step_size")), 2.5, 3
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
    begin = corrected(losses, spreads, effective(5), 3)
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


# -- the projection --------------------------------------------------------------------------------

SPEC = PromptSpec("prefix", 5, 3, 2, 100)


def test_the_projection_follows_from_the_seed_and_is_linear():
    space = Subspace(SPEC, 7, 0.5, 1)
    matrix = space.expand(np.eye(7)).flatten(1).T  # [3000, 7], in two pieces
    points = np.random.default_rng(0).standard_normal((3, 7))
    assert space.expand(points).shape == (3, 5, 600)
    assert torch.allclose(
        space.expand(points).flatten(1), torch.from_numpy(points).float() @ matrix.T, atol=1e-5
    )
    assert torch.equal(space.expand(points), Subspace(SPEC, 7, 0.5, 1).expand(points))
    assert not torch.equal(space.expand(points), Subspace(SPEC, 7, 0.5, 2).expand(points))
    assert torch.allclose(Subspace(SPEC, 7, 1.0, 1).expand(points), 2 * space.expand(points))
    assert matrix.std().item() == pytest.approx(0.5, rel=0.03) and abs(matrix.mean().item()) < 0.02
    assert len({row.numpy().tobytes() for row in matrix}) == 3000


def test_what_is_added_spreads_like_an_embedding(tmp_path):
    model = tiny.load(tiny.model_folder(tmp_path, "gpt2"))
    weights = model.model.get_input_embeddings().weight
    first = Prompt(PromptSpec.of(model.shape, "input", 40, None))
    scale = scale_of(model, first, 50, step_size=2.0, spread=3.0)
    assert scale == pytest.approx(
        3 * weights.std(correction=0).item() / (math.sqrt(50) * 2), rel=1e-5
    )
    points = 2.0 * np.random.default_rng(0).standard_normal((8, 50))
    added = Subspace(first.spec, 50, scale, 1).expand(points)
    assert added.std().item() == pytest.approx(3 * weights.std().item(), rel=0.1)
    prefix = Prompt(PromptSpec.of(model.shape, "prefix", 4, None)).initialise(1, 0.7)
    assert scale_of(model, prefix, 50, step_size=1.0, spread=1.0) == pytest.approx(
        0.7 / math.sqrt(50), rel=0.05
    )


# -- perturbed copies and objectives ---------------------------------------------------------------


def framed(lengths: list[int]) -> list[Text]:
    """Texts that begin with 1 50, end their contexts with 60 61, and have answers of two tokens."""
    random = np.random.default_rng(0)
    own = [random.integers(10, 40, length) for length in lengths]
    return [
        Text(np.array([1, 50, *ids, 60, 61, 5, 6], dtype=np.int32), len(ids) + 4) for ids in own
    ]


def test_a_share_of_a_text_s_own_words_is_replaced():
    texts, words = framed([200, 300, 250]), np.arange(4, 100)
    texts[0].ids[7] = 2  # a special token
    copies = perturbed(texts, 0.4, words, rng.generator(1, "perturbation", 2, 3))
    again = perturbed(texts, 0.4, words, rng.generator(1, "perturbation", 2, 3))
    other = perturbed(texts, 0.4, words, rng.generator(1, "perturbation", 3, 3))
    changed = []
    for text, copy, same, late in zip(texts, copies, again, other):
        assert (
            copy.answer == text.answer
            and copy.ids.dtype == text.ids.dtype
            and len(copy.ids) == len(text.ids)
        )
        assert np.array_equal(copy.ids[:2], text.ids[:2]) and np.array_equal(
            copy.ids[-4:], text.ids[-4:]
        )
        assert np.array_equal(copy.ids, same.ids) and not np.array_equal(copy.ids, late.ids)
        assert np.isin(copy.ids[2:-4], [2, *words]).all()
        changed.append((copy.ids != text.ids)[2:-4].mean())
    assert copies[0].ids[7] == 2 and np.mean(changed) == pytest.approx(0.4, abs=0.06)
    everything = perturbed(texts, 1.0, np.array([77]), rng.generator(1, "perturbation", 1, 1))
    assert (everything[1].ids[2:-4] == texts[1].ids[2:-4]).all(), (
        "only words are replaced, and 77 is the only one"
    )


def test_around_a_gap_both_sides_are_a_text_s_own():
    texts = [
        Text(np.append(text.ids, [7, *text.ids[2:-4], 8]), len(text.ids) - 2, gap=3)
        for text in framed([90, 80])
    ]
    copies = perturbed(texts, 1.0, np.arange(10, 50), rng.generator(1, "perturbation", 1, 0))
    for text, copy in zip(texts, copies):
        assert (
            copy.gap == 3
            and copy.answer == text.answer
            and copy.ids[copy.answer] == text.ids[text.answer]
        )
        own = (text.ids >= 10) & (text.ids < 50)
        assert (copy.ids != text.ids)[own].mean() > 0.9 and (copy.ids == text.ids)[~own].all()


def test_of_one_text_all_of_the_context_may_be_replaced():
    [text] = framed([500])
    [copy] = perturbed([text], 1.0, np.arange(4, 100), rng.generator(1, "perturbation", 1, 0))
    assert (copy.ids != text.ids)[2:-2].mean() > 0.9 and np.array_equal(
        copy.ids[-2:], text.ids[-2:]
    )
    assert copy.ids[0] == 1, "which is no word"


def test_the_objectives_are_those_of_loops(tmp_path):
    model = tiny.load(tiny.model_folder(tmp_path, "gpt2"))
    batch, copy = tiny.batch((11, 7, 4, 9), seed=1), tiny.batch((11, 7, 4, 9), seed=2)
    by_hand = []
    for some in (batch, copy):
        losses = []
        for ids, mask, targets in zip(*some):
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
    spec = PromptSpec.of(model.shape, "input", 3, None)
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
        first,
        subspace=space,
        depths=depths,
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
    change = held._subspace.expand(update.tensors["mean"][None])[0]
    prompt.load({"prompt": held._initial + change})
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
    own = held._initial + held._subspace.expand(update.tensors["mean"][None])[0]
    assert torch.allclose(held.prompt.prompt, own, atol=1e-6), (
        "what was tuned is what an attack is tried on"
    )
    texts = client._both(client._shards[0], 0, 1)
    before = client._judge(0, np.zeros((1, 6)), texts)[0][0]
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
    client._seconds = 0.0
    update = client.local_update(0, 1, beginning(client._settings))
    assert update.metrics["step_size"] == 1.0  # of one iteration


MEMORY = """
import numpy as np, torch
from transformers import AutoModelForCausalLM, GPT2Config
from fedsp_mpi.algorithms.fedbpt import SearchClient
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
spec, random = PromptSpec.of(model.shape, "input", 50, None), np.random.default_rng(0)
texts = [Text(np.append(random.integers(100, 5000, 40), i % 4).astype(np.int32), 40) for i in range(45)]
settings = SearchConfig(iterations=2)
space = Subspace(spec, settings.dimension, 0.01, 1)
prompt = Prompt(spec)
inference = LocalInference(
    model,
    prompt,
    torch.zeros(50, 512),
    subspace=space,
    depths=DepthMap(spec, 2),
    batch_tokens=settings.batch_tokens,
)
client = SearchClient(inference, {0: texts}, np.arange(9), settings=settings, seed=1)
state = CmaEs.of({"mean": np.zeros(settings.dimension), "step_size": np.ones(1)}).state()
down = NamedTensors.of({name: state[name] for name in settings.travelling()[0]})

def peak(work):
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark begins anew
    work()
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

def forward():
    with torch.inference_mode():
        return model.answer_logits(collate(texts), prompt)

def gradient():
    prompt.requires_grad_(True)
    torch.nn.functional.cross_entropy(*model.answer_logits(collate(texts), prompt)).backward()

forward()
print(peak(forward), peak(lambda: client.local_update(0, 1, down)), peak(gradient))
"""


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


# -- whole runs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A short run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("fedbpt")
    short(folder, *FEDBPT)
    return folder / "run"


def names_on_the_wire(run: record.Run) -> dict[str, set[str]]:
    rows = [(str(row["direction"]), str(row["name"])) for row in run.wire]
    return {way: {name for direction, name in rows if direction == way} for way in ("down", "up")}


def test_every_byte_has_a_name_and_the_plan_knows_it(whole):
    run = read(whole)
    found = cost.plan(
        config.load(None, [*FEDBPT, "federation.clients=3", "federation.rounds=2"]), "embedded"
    )
    own = found.methods[0]
    assert set(run.clients["bytes_up"].tolist()) == {4 * 20 + 256} == {own.up}
    assert set(run.clients["bytes_down"].tolist()) == {4 * (20 + 1 + 210) + 256} == {own.down}
    assert names_on_the_wire(run) == {
        "down": {"(header)", "mean", "step_size", "covariance"},
        "up": {"(header)", "mean"},
    }
    handed_out = [
        row
        for row in run.wire
        if str(row["direction"]) == "handout" and "(" not in str(row["name"])
    ]
    assert sum(int(row["bytes"]) for row in handed_out) == own.handout
    assert (own.holds, own.trains) == (run.sections["models"]["auxiliary"], 20)
    text = plan_text.text(found, 40)
    assert (
        "924 bytes down and 80 up" in text
        and "searched for in 20 dimensions" in text
        and "client search" in text
    )


def test_the_record_says_what_was_searched(whole):
    run = read(whole)
    assert run.status == "complete" and run.sections["models"]["searched"] == 20
    assert [str(row["method"]) for row in run.results] == ["zero-shot", "fedbpt"]
    for column in ("fitness", "step_size", "loss_prompt_first", "loss_prompt_last"):
        assert np.isfinite(run.clients[column]).all(), column
    assert run.rounds["validation_merged"].tolist() == run.rounds["validation_loss"].tolist()
    assert set(run.clients["samples"].tolist()) == {16}
    assert not np.array_equal(run.prompts(1)["prompt"], run.prompts(2)["prompt"])
    table = record.comparison.comparison_table(record.comparison.compare([run]))
    assert "| fedbpt |" in table and "| 20 |" in table


def test_the_prompt_is_the_first_one_and_a_projection(whole):
    """The adapter is what the best round's mean leads to, from the words that prompts begin as."""
    from fedsp_mpi.models.backbone import load_global
    from fedsp_mpi.models.prompts import read_adapter
    from fedsp_mpi.run.inputs import ExperimentInputs

    run, materials = read(whole), ExperimentInputs(config.load(whole / "config.yaml"))
    best = int(run.results[-1]["round"])
    adapter = read_adapter(whole / "prompt")
    assert np.array_equal(adapter.numpy(), run.prompts(best)["prompt"])
    large = load_global(materials.model_name, device=tiny.CPU)
    first = materials.first_prompt(large).prompt.detach()
    space = Subspace(
        materials.prompt_spec,
        20,
        scale_of(large, materials.first_prompt(large), 20, step_size=1.0, spread=1.0),
        1,
    )
    matrix = space.expand(np.eye(20)).flatten(1).T
    rest = torch.linalg.lstsq(matrix, (adapter - first).flatten()[:, None])
    assert torch.allclose(matrix @ rest.solution[:, 0], (adapter - first).flatten(), atol=1e-4)


def test_what_clients_know_travels(tmp_path):
    for settings, name in ((AVERAGE, "FedAvg-BBT"), (KEPT, "FedBPT")):
        run, wanted = short(tmp_path / name, *settings), config.load(None, list(settings))
        down, up = wanted.search.travelling()
        assert names_on_the_wire(run) == {"down": {"(header)", *down}, "up": {"(header)", *up}}
        found = cost.plan(wanted, "embedded").methods[0]
        assert (found.name, found.up) == (
            name,
            run.clients["bytes_up"][0],
        ) and found.down == run.clients["bytes_down"][0]
    assert down == ["mean", "step_size", "covariance"] and up == ["mean", "step_size"]


@pytest.mark.parametrize(
    "more",
    [
        (
            "prompt.kind=prefix",
            "auxiliary.depth=2",
            "auxiliary.first_layers=1",
            "prompt.mapping=same_layers",
        ),
        (
            "prompt.kind=prefix",
            "auxiliary.layers_per_cell=1",
            "auxiliary.depth=1",
            "prompt.init=random",
        ),
    ],
    ids=["both ends", "one layer"],
)
def test_clients_may_hold_less_than_the_whole_model(tmp_path, more):
    run = short(tmp_path, *FEDBPT, *more, "data.loss_over=auto")
    assert run.sections["models"]["auxiliary"] < run.sections["models"]["global"]
    assert np.isfinite(run.rounds["validation_loss"]).all()
    assert set(run.clients["bytes_up"].tolist()) == {4 * 20 + 256}


@pytest.mark.parametrize("family", ["roberta", "t5"])
def test_models_that_fill_in_a_gap_are_searched_too(tmp_path, family):
    own = [item for item in FEDBPT if not item.startswith(("prompt", "auxiliary"))]
    words = (
        "prompt.init=text",
        "prompt.init_text=w3 w4",
        "data.loss_over=auto",
        "search.objective=mean_of_ratios",
    )
    run = short(tmp_path / "runs", *gap_settings(tmp_path, family, *own, *words))
    assert run.status == "complete" and np.isfinite(run.clients["fitness"]).all()
    assert not np.array_equal(run.prompts(1)["prompt"], run.prompts(2)["prompt"])


def test_poisoned_clients_are_watched(tmp_path):
    attack = ("attack.target=1", "attack.clients=[0]", "attack.trigger=w20", "federation.rounds=1")
    run = short(tmp_path, *FEDBPT, *attack)
    assert np.isfinite(run.clients["attack_success"]).tolist() == [True, False, False]


def test_a_record_of_before_has_no_fitness(whole, tmp_path, monkeypatch):
    import h5py

    old = tmp_path / "run.h5"
    old.write_bytes((whole / "run.h5").read_bytes())
    with h5py.File(old, "r+") as file:
        table = file["clients"][()]
        kept = [name for name in table.dtype.names if name not in ("fitness", "step_size")]
        del file["clients"]
        file["clients"] = np.array(
            table[kept].tolist(), dtype=[(name, table.dtype[name]) for name in kept]
        )
    assert (
        np.isnan(read(old).clients["fitness"]).all()
        and read(old).clients["samples"].tolist() == [16] * 6
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [FEDBPT, KEPT, AVERAGE], ids=["fedbpt", "step sizes", "fedavg_bbt"]
)
def test_a_killed_run_goes_on_with_equal_bits(tmp_path, settings):
    settings = (*settings, "federation.rounds=3", "client.resident=1", "search.dimension=10")
    short_run(2, tmp_path, "whole", *settings)
    program = (FAULTY, "kill:checkpoint:0:2")
    killed = short_run(2, tmp_path, "killed", *settings, program=program, status=None)
    assert killed.returncode != 0 and "Traceback" not in killed.stderr, both_ends(killed)
    short_run(3, tmp_path, "killed", *settings, "run.resume=must")
    assert difference(read(tmp_path / "whole"), read(tmp_path / "killed")) == []


@pytest.mark.slow
def test_a_server_of_two_ranks_has_the_losses_of_one(tmp_path):
    short_run(3, tmp_path, "one", *FEDBPT, "federation.clients=2")
    short_run(4, tmp_path, "two", *FEDBPT, "federation.clients=2", "topology.server_ranks=2")
    one, two = read(tmp_path / "one"), read(tmp_path / "two")
    assert two.rounds["validation_loss"] == pytest.approx(one.rounds["validation_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("server.tuning.steps=2",), "server.tuning.steps: found 2 with method=fedbpt, expected 0"),
        (
            ("federation.clients=0",),
            "federation.clients: found 0 with method=fedbpt, expected at least 1",
        ),
        (
            ("prompt.kind=prefix", "prompt.init=random", "prompt.projection=4"),
            "prompt.projection: found 4 with method=fedbpt, expected null",
        ),
        (
            ("prompt.kind=prefix", "prompt.init=random", "prompt.init_std=0"),
            "prompt.init_std: found 0 with method=fedbpt",
        ),
        (("prompt.encoder=mlp",), "prompt.encoder: found mlp with method=fedbpt, expected null"),
        (
            ("federation.rule=median",),
            "federation.rule: found median with method=fedbpt, expected mean",
        ),
        (
            ("client.privacy.clip=1", "client.privacy.noise_scale=1"),
            "client.privacy.clip: found 1.0 with method=fedbpt, expected null",
        ),
        (("search.dimension=1",), "search.dimension: found 1, expected at least 2"),
        (("search.population=1",), "search.population: found 1, expected at least 2"),
        (("search.iterations=0",), "search.iterations: found 0, expected at least 1"),
        (("search.step_size=0",), "search.step_size: found 0.0, expected a number above 0"),
        (("search.perturbation=0",), "search.perturbation: found 0.0, expected a number above 0"),
        (
            ("search.objective=ratio",),
            "search.objective: found 'ratio', expected one of loss, ratio_of_means",
        ),
        (("search.sigma=1",), "search.sigma: found an unknown key"),
        (("method=fedbtp",), "did you mean 'fedbpt'?"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, settings, message):
    with pytest.raises((ValueError, Refused)) as told:
        short(tmp_path, *FEDBPT, *settings)
    assert message in str(told.value) and "\n" not in str(told.value)
