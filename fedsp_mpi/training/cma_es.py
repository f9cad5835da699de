"""CMA-ES (Hansen, 2016, arXiv 1604.00772) as plain arrays: a search that sends, keeps and resumes
all that it knows.

The library is `cmaes`, and this is its one importer. Its whole state is the arrays and numbers that
it gives to be pickled, and takes back (nothing is pickled here). `cma` (pycma), which FedBPT's
reference uses, spreads its state over samplers, step-size adapters and options that only a pickle
keeps together. Linear algebra runs on one thread, so that bits do not depend on the cores that a
rank may use, and nothing follows from the eigenvectors that a processor's BLAS happens to choose:
see `CmaEs.sample`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Literal

import numpy as np
from threadpoolctl import ThreadpoolController

from fedsp_mpi.tensors import State

if TYPE_CHECKING:
    from cmaes import CMA

_PATHS = ("step_path", "mean_path")


def sizes(dimension: int) -> dict[str, int]:
    """How many numbers each part of a state has, by its name in `CmaEs.state`."""
    return {
        "mean": dimension,
        "step_size": 1,
        "covariance": dimension * (dimension + 1) // 2,
        **dict.fromkeys(_PATHS, dimension),
        "generation": 1,
    }


def identity(dimension: int) -> np.ndarray:
    """The identity's upper triangle, row by row, fp64."""
    return np.eye(dimension)[np.triu_indices(dimension)]


@dataclass
class CmaEs:
    """The normal distribution N(mean, step_size^2 covariance) that CMA-ES moves, and the ways that
    it came.

    Attributes:
        mean: fp64 [dimension].
        step_size: above 0.
        covariance: its upper triangle, row by row, fp64 [dimension (dimension + 1) / 2].
        step_path, mean_path: the two evolution paths (p_sigma and p_c), fp64 [dimension].
        generation: updates so far.
    """

    mean: np.ndarray
    step_size: float
    covariance: np.ndarray
    step_path: np.ndarray
    mean_path: np.ndarray
    generation: int = 0
    _ready: CMA | None = field(default=None, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, state: Mapping[str, np.ndarray]) -> CmaEs:
        """The search of `state()`, copied.

        A covariance that is not there is the identity, paths are 0.
        """
        mean = np.array(state["mean"], dtype=np.float64)
        own = {
            name: np.array(state.get(name, np.zeros_like(mean)), dtype=np.float64)
            for name in _PATHS
        }
        covariance = np.array(state.get("covariance", identity(len(mean))), dtype=np.float64)
        generation = int(state["generation"].item()) if "generation" in state else 0
        return cls(mean, float(state["step_size"].item()), covariance, **own, generation=generation)

    def state(self) -> State:
        """All that it knows: mean, step_size [1], covariance, step_path, mean_path, generation [1];
        views, fp64.
        """
        numbers = {
            name: np.array([getattr(self, name)], dtype=np.float64)
            for name in ("step_size", "generation")
        }
        paths = {name: getattr(self, name) for name in _PATHS}
        return (
            {"mean": self.mean, "step_size": numbers["step_size"], "covariance": self.covariance}
            | paths
            | numbers
        )

    def sample(self, num: int, seed: int) -> np.ndarray:
        """Draw `num` points, fp64 [num, dimension], which follow from the distribution and the seed
        alone; at least 2.

        A point is mean + step_size * C^(1/2) z, with z standard normal and C^(1/2) = B D B^T, the
        symmetric root, where B and D^2 are the eigenvectors and eigenvalues of the covariance C.
        Hansen (2016, Eq. 39) and the library draw with B D, which has the same distribution. But
        the eigenvectors of (nearly) equal eigenvalues, such as those of the identity that a search
        begins with, are whatever the BLAS kernel of a processor makes of them, and with other
        eigenvectors the same z gives other points. The symmetric root is unique.
        """
        standard = np.random.default_rng(seed).standard_normal((num, len(self.mean)))
        with _one_thread():
            self._ready = self._library(num)
            vectors, deviations = (
                self._ready._eigen_decomposition()
            )  # which `update` takes from there
            root = (vectors * deviations) @ vectors.T
            return self.mean + self.step_size * (standard @ root)

    def update(
        self, points: np.ndarray, losses: np.ndarray, parents: Literal["half", "all"] = "half"
    ) -> None:
        """Move towards those of the points, [2 or more, dimension], whose losses are low; equal
        ones in their order.

        `parents` says which of them the new mean is made of: the better "half", rounded down, or
        "all". Then they have the weights, and the search the learning rates, of the better half of
        twice as many, and none counts against.
        """
        ready, self._ready = self._ready, None
        with _one_thread():
            if parents == "all":
                ready = self._library(2 * len(points), worse=False)
                points = np.concatenate([points, np.broadcast_to(self.mean, np.shape(points))])
                losses = np.concatenate([losses, np.full(len(losses), np.inf)])
            elif ready is None or ready.population_size != len(points):
                ready = self._library(len(points))
            with np.errstate(divide="ignore"):
                ready.tell(
                    [
                        (np.asarray(point, np.float64), float(loss))
                        for point, loss in zip(points, losses)
                    ]
                )
        found = ready.__getstate__()
        self.mean, self.step_size, self.covariance = (
            found["_mean"],
            float(found["_sigma"]),
            found["_c_1d"],
        )
        self.step_path, self.mean_path, self.generation = (
            found["_p_sigma"],
            found["_pc"],
            found["_g"],
        )

    def _library(self, population: int, worse: bool = True) -> CMA:
        """The library's object with this state. Its learning rates follow from dimension and
        population alone.

        Unless `worse`, the covariance hears nothing of the worse half.
        """
        from cmaes import CMA  # here, because it loads scipy.stats, for a second or more

        with np.errstate(
            divide="ignore"
        ):  # of 2 or 3 points one is taken, and the rank-mu rate is 0
            made = CMA(mean=self.mean, sigma=self.step_size, population_size=population)
        paths = {"_p_sigma": self.step_path, "_pc": self.mean_path, "_g": self.generation}
        known = made.__getstate__()
        weights = known["_weights"] if worse else np.maximum(known["_weights"], 0)
        made.__setstate__({**known, "_weights": weights, "_c_1d": self.covariance, **paths})
        return made


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


@contextmanager
def _one_thread() -> Iterator[None]:
    with _controller().limit(limits=1, user_api="blas"):
        yield
