"""Outer optimizers against an oracle of a few lines and against torch.optim; FedProx; in a run."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch

from fedsp_mpi.aggregation.outer import RULES, OuterOptimizer, OuterSettings
from fedsp_mpi.config.training import OptimizerConfig
from fedsp_mpi.tensors import NamedTensors, Schema
from fedsp_mpi.training.engine import TorchEngine

SETTINGS = OuterSettings(learning_rate=0.3, momentum=0.8, decay=0.95, adaptivity=1e-2)
ROUNDS = 5
SCHEMA = Schema.of([("w", (3, 4)), ("b", (5,))])


def means() -> np.ndarray:
    """Return what clients find in each round, relative to where they start."""
    return np.random.default_rng(3).normal(0, 0.1, (ROUNDS, SCHEMA.num_values))


def oracle(name: str) -> np.ndarray:
    """Return the server's values after each round, as algorithm 2 of arXiv 2003.00295 has it."""
    eta, beta, decay, tau = 0.3, 0.8, 0.95, 1e-2
    x = np.ones(SCHEMA.num_values)
    m, v = np.zeros_like(x), np.full_like(x, tau**2)
    path = []
    for delta in means():
        is_adaptive = name in ("fedadagrad", "fedadam", "fedyogi")
        m = beta * m + ((1 - beta) if is_adaptive else 1) * delta
        v = {
            "fedadagrad": v + delta**2,
            "fedyogi": v - (1 - decay) * delta**2 * np.sign(v - delta**2),
        }.get(name, decay * v + (1 - decay) * delta**2)
        steps = {"fedavg": delta, "fedavgm": m, "diloco": delta + beta * m}
        x = x + eta * steps.get(name, m / (np.sqrt(v) + tau))
        path.append(x)
    return np.array(path)


def path(outer: OuterOptimizer, rounds: range, x: np.ndarray) -> np.ndarray:
    values = []
    for round in rounds:
        start = NamedTensors(SCHEMA, x.astype(np.float32))
        mean = NamedTensors(SCHEMA, (x + means()[round]).astype(np.float32))
        outer.step(start, mean)
        x = mean.flat.astype(np.float64)
        values.append(x)
    return np.array(values)


@pytest.mark.parametrize("name", RULES)
def test_a_step_needs_memory_for_its_moments_and_one_stretch(name, monkeypatch):
    monkeypatch.setattr("fedsp_mpi.aggregation.outer._STRETCH", 10_000)
    schema = Schema.of([("w", (2_000_000,))])
    start, mean = (NamedTensors(schema, np.ones(2_000_000, dtype=np.float32)) for _ in range(2))
    tracemalloc.start()
    OuterOptimizer(name, SETTINGS).step(start, mean)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < len(RULES[name].moments) * mean.flat.nbytes + 12 * 8 * 10_000


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_that_of_the_paper(name, monkeypatch):
    monkeypatch.setattr("fedsp_mpi.aggregation.outer._STRETCH", 4)
    got = path(OuterOptimizer(name, SETTINGS), range(ROUNDS), np.ones(SCHEMA.num_values))
    np.testing.assert_allclose(got, oracle(name), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_it_goes_on_from_its_state(name):
    whole = path(OuterOptimizer(name, SETTINGS), range(ROUNDS), np.ones(SCHEMA.num_values))
    first = OuterOptimizer(name, SETTINGS)
    x = path(first, range(2), np.ones(SCHEMA.num_values))[-1]
    second = OuterOptimizer(name, SETTINGS)
    second.load_state({key: value.copy() for key, value in first.state().items()})
    path(first, range(2, 3), x)  # the first goes another way; the second has its own moments
    assert (path(second, range(2, ROUNDS), x) == whole[2:]).all()


@pytest.mark.parametrize(
    "name, momentum, build",
    [
        ("fedavg", 0.0, lambda p: torch.optim.SGD(p, lr=0.3)),
        ("fedavgm", 0.8, lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.8)),
        ("diloco", 0.8, lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.8, nesterov=True)),
        (
            "fedadagrad",
            0.0,
            lambda p: torch.optim.Adagrad(p, lr=0.3, initial_accumulator_value=1e-4, eps=1e-2),
        ),
    ],
)
def test_it_is_torchs_optimizer_of_the_pseudo_gradient(name, momentum, build):
    parameter = torch.ones(SCHEMA.num_values, dtype=torch.float64, requires_grad=True)
    optimizer = build([parameter])
    expected = []
    for change in means():
        parameter.grad = torch.from_numpy(-change)
        optimizer.step()
        expected.append(parameter.detach().numpy().copy())
    settings = OuterSettings(0.3, momentum, 0.95, 1e-2)
    got = path(OuterOptimizer(name, settings), range(ROUNDS), np.ones(SCHEMA.num_values))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


def test_the_mean_itself_is_taken_over_bit_by_bit():
    mean = NamedTensors(SCHEMA, np.random.default_rng(0).normal(size=17).astype(np.float32))
    before = mean.flat.copy()
    OuterOptimizer().step(NamedTensors(SCHEMA, np.full(17, 1e8, np.float32)), mean)
    assert (mean.flat == before).all()


def test_fedprox_has_the_gradient_of_its_term():
    values = torch.tensor([1.0, -2.0, 3.0])
    parameter = torch.nn.Parameter(values.clone())
    settings = OptimizerConfig(learning_rate=0.0, weight_decay=0.0, clip=1e9)
    engine = TorchEngine([parameter], settings, 1, proximal=0.5)
    engine.anchor()
    parameter.data += torch.tensor([0.1, 0.2, -0.4])
    seen = []
    parameter.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad))
    (parameter * torch.tensor([1.0, 1.0, 1.0])).sum().backward()
    engine.step()
    expected = torch.tensor([1.05, 1.1, 0.8])
    torch.testing.assert_close(seen[0], expected)
