"""FedBPT's search on functions of z: no model, no text, and the values that a test can work out."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np

from fedsp_mpi import rng
from fedsp_mpi.algorithms import fedavg_bbt, fedbpt
from fedsp_mpi.comm.messages import Report
from fedsp_mpi.comm.updates import Updates
from fedsp_mpi.config.search import SearchConfig
from fedsp_mpi.models.prompts import Prompt, PromptSpec
from fedsp_mpi.models.subspace import Subspace
from fedsp_mpi.tensors import Update
from fedsp_mpi.training.cma_es import CmaEs


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
    pieces = iter([(slice(0, schema.num_values), rows)])
    return Updates(reports, [], schema, source=pieces)


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


def told(
    server: fedbpt.SearchServer, clients: int, losses: list[float] | None = None
) -> list[Update]:
    """One update of each client from the server's broadcast."""
    client = function_client(sphere, server._settings, 3, clients)
    return [client.local_update(id, 1, server.broadcast()) for id in range(clients)]
