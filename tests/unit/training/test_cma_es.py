"""The search itself: on functions, from its state, and the projection of what it searches."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedsp_mpi.config.search import SearchConfig
from fedsp_mpi.models.prompts import Prompt, PromptSpec
from fedsp_mpi.models.subspace import Subspace, scale_of
from fedsp_mpi.training.cma_es import CmaEs, sizes
from helpers import tiny
from helpers.searches import (
    evaluations_alone,
    evaluations_together,
    rosenbrock,
    sphere,
)

# What each search sets apart from the paper's.
SEARCHES: dict[str, dict] = {
    "paper": {},
    "kept": {"step_size_by": "clients"},
    "default": {"step_size_by": "clients", "rank_by": "improvement", "parents": "all"},
    "average": {"rule": "average"},
}


@pytest.mark.each_once
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
    first = Prompt(PromptSpec.of(model.shape, "input", 40))
    scale = scale_of(model, first, 50, step_size=2.0, spread=3.0)
    assert scale == pytest.approx(
        3 * weights.std(correction=0).item() / (math.sqrt(50) * 2), rel=1e-5
    )
    points = 2.0 * np.random.default_rng(0).standard_normal((8, 50))
    added = Subspace(first.spec, 50, scale, 1).expand(points)
    assert added.std().item() == pytest.approx(3 * weights.std().item(), rel=0.1)
    prefix = Prompt(PromptSpec.of(model.shape, "prefix", 4)).initialise(1, 0.7)
    assert scale_of(model, prefix, 50, step_size=1.0, spread=1.0) == pytest.approx(
        0.7 / math.sqrt(50), rel=0.05
    )
