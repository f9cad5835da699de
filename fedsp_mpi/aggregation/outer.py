"""Outer optimizers: how the server moves its values, given the mean of what its clients found.

Source: Reddi et al., 2021, "Adaptive Federated Optimization", arXiv 2003.00295, algorithm 2. The
mean's difference from what was broadcast is the negative of a gradient, the *pseudo-gradient*, for
an optimizer of the server's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedsp_mpi.tensors import NamedTensors, State

# Values that are in memory as fp64 at once.
_STRETCH = 1 << 20


@dataclass(frozen=True)
class OuterSettings:
    """What the rules below compute with; each takes what it needs.

    Attributes:
        learning_rate: factor of the step.
        momentum: of FedAvgM and DiLoCo, and decay of the first moment of the adaptive rules.
        decay: of the second moment of FedAdam and FedYogi (beta_2).
        adaptivity: added to the root of the second moment (tau), which begins at its square.
    """

    learning_rate: float = 1.0
    momentum: float = 0.9
    decay: float = 0.99
    adaptivity: float = 1e-3


class Rule(Protocol):
    """An outer optimizer: one of the functions below."""

    def __call__(
        self, change: np.ndarray, moments: dict[str, np.ndarray], settings: OuterSettings
    ) -> np.ndarray:
        """Return the server's step, fp64 [values].

        Args:
            change: difference of the mean from the broadcast, fp64 [values].
            moments: by name, fp64 [values]; updated in place.
            settings: of which it takes what it needs.
        """
        ...


def fedavg(
    change: np.ndarray, moments: dict[str, np.ndarray], settings: OuterSettings
) -> np.ndarray:
    """Return eta times the change, [values]; eta = 1 takes over the mean; see `Rule`."""
    return settings.learning_rate * change


def fedavgm(
    change: np.ndarray, moments: dict[str, np.ndarray], settings: OuterSettings
) -> np.ndarray:
    """Return a step with momentum, [values] (Hsu et al., 2019, arXiv 1909.06335); see `Rule`."""
    first = moments["first"]
    first[:] = settings.momentum * first + change
    return settings.learning_rate * first


def diloco(
    change: np.ndarray, moments: dict[str, np.ndarray], settings: OuterSettings
) -> np.ndarray:
    """Return a step with Nesterov's momentum, [values]; see `Rule`.

    Source: DiLoCo, Douillard et al., 2023, arXiv 2311.08105.
    """
    first = moments["first"]
    first[:] = settings.momentum * first + change
    return settings.learning_rate * (change + settings.momentum * first)


def fedadagrad(
    change: np.ndarray, moments: dict[str, np.ndarray], settings: OuterSettings
) -> np.ndarray:
    """Return FedAdagrad's step, [values]: the second moment sums all squares; see `Rule`."""
    moments["second"] += np.square(change)
    return _adaptive_step(change, moments, settings)


def fedadam(
    change: np.ndarray, moments: dict[str, np.ndarray], settings: OuterSettings
) -> np.ndarray:
    """Return FedAdam's step, [values], without correction of the bias (algorithm 2); see `Rule`."""
    second = moments["second"]
    second[:] = settings.decay * second + (1 - settings.decay) * np.square(change)
    return _adaptive_step(change, moments, settings)


def fedyogi(
    change: np.ndarray, moments: dict[str, np.ndarray], settings: OuterSettings
) -> np.ndarray:
    """Return FedYogi's step, [values]: the second moment moves at a bounded rate; see `Rule`."""
    second = moments["second"]
    square = np.square(change)
    second -= (1 - settings.decay) * square * np.sign(second - square)
    return _adaptive_step(change, moments, settings)


def _adaptive_step(
    change: np.ndarray, moments: dict[str, np.ndarray], settings: OuterSettings
) -> np.ndarray:
    first = moments["first"]
    first[:] = settings.momentum * first + (1 - settings.momentum) * change
    return settings.learning_rate * first / (np.sqrt(moments["second"]) + settings.adaptivity)


@dataclass(frozen=True)
class _Row:
    """A rule, and which moments it keeps: each as large as an update, fp32."""

    rule: Rule
    moments: tuple[str, ...]


RULES: dict[str, _Row] = {
    "fedavg": _Row(fedavg, ()),
    "fedavgm": _Row(fedavgm, ("first",)),
    "diloco": _Row(diloco, ("first",)),
    "fedadagrad": _Row(fedadagrad, ("first", "second")),
    "fedadam": _Row(fedadam, ("first", "second")),
    "fedyogi": _Row(fedyogi, ("first", "second")),
}


class OuterOptimizer:
    """The server's optimizer over rounds; its moments are kept in fp32, and computed in fp64.

    Args:
        name: a key of `RULES`.
        settings: of the rule.
    """

    def __init__(self, name: str = "fedavg", settings: OuterSettings = OuterSettings()) -> None:
        self._row = RULES[name]
        self._settings = settings
        self._takes_over = name == "fedavg" and settings.learning_rate == 1
        self._moments: dict[str, np.ndarray] = {}

    def step(self, start: NamedTensors, mean: NamedTensors) -> None:
        """Replace the clients' mean, in place, by what the server goes on from.

        Args:
            start: what the clients started from, fp32 [*shape] by name.
            mean: of their updates, of the same schema.
        """
        if self._takes_over:
            return
        assert start.schema == mean.schema, "an outer optimizer needs updates like the broadcast"
        if not self._moments:
            self._moments = self._first_moments(mean.flat.size)
        for begin in range(0, mean.flat.size, _STRETCH):
            where = slice(begin, begin + _STRETCH)
            origin = start.flat[where].astype(np.float64)
            moments = {
                name: value[where].astype(np.float64) for name, value in self._moments.items()
            }
            step = self._row.rule(mean.flat[where] - origin, moments, self._settings)
            mean.flat[where] = origin + step
            for name, value in moments.items():
                self._moments[name][where] = value

    def state(self) -> State:
        """Return the moments, fp32 [values]; none before the first step."""
        return dict(self._moments)

    def load_state(self, state: State) -> None:
        """Continue from `state()`, which is copied."""
        self._moments = {name: value.astype(np.float32) for name, value in state.items()}

    def _first_moments(self, num_values: int) -> dict[str, np.ndarray]:
        begins = {"first": 0.0, "second": self._settings.adaptivity**2}
        return {
            name: np.full(num_values, begins[name], dtype=np.float32) for name in self._row.moments
        }
