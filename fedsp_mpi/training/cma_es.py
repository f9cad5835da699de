"""CMA-ES (Hansen, 2016, arXiv 1604.00772) as plain arrays: a search whose complete state can be
sent, stored and resumed.

The library is `cmaes`, and this is its one importer. Its complete state is the arrays and numbers
that it hands to pickle and takes back (nothing is pickled here). `cma` (pycma), which FedBPT's
reference uses, spreads its state over samplers, step-size adapters and options that only a pickle
keeps together. Linear algebra runs on one thread, so that bits do not depend on the cores that a
rank may use, and no result depends on the eigenvectors that a processor's BLAS happens to choose:
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
    """Return the number of values of each part of a state, by its name in `CmaEs.state`."""
    return {
        "mean": dimension,
        "step_size": 1,
        "covariance": dimension * (dimension + 1) // 2,
        **dict.fromkeys(_PATHS, dimension),
        "generation": 1,
    }


def identity(dimension: int) -> np.ndarray:
    """Return the identity's upper triangle, row by row, fp64 [dimension (dimension + 1) / 2]."""
    return np.eye(dimension)[np.triu_indices(dimension)]


@dataclass
class CmaEs:
    """The normal distribution N(mean, step_size^2 covariance) that CMA-ES moves, and its paths.

    Attributes:
        mean: fp64 [dimension].
        step_size: above 0.
        covariance: its upper triangle, row by row, fp64 [dimension (dimension + 1) / 2].
        step_path: evolution path of the step size (p_sigma), fp64 [dimension].
        mean_path: evolution path of the covariance (p_c), fp64 [dimension].
        generation: number of updates so far.
    """

    mean: np.ndarray
    step_size: float
    covariance: np.ndarray
    step_path: np.ndarray
    mean_path: np.ndarray
    generation: int = 0
    # The library's object after `sample`, whose eigendecomposition `update` reuses.
    _sampler: CMA | None = field(default=None, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, state: Mapping[str, np.ndarray]) -> CmaEs:
        """Build a search from a copy of what `state` returned.

        Args:
            state: at least mean [dimension] and step_size [1]. A missing covariance is the
                identity, missing paths and a missing generation are 0.
        """
        mean = np.array(state["mean"], dtype=np.float64)
        paths = {
            name: np.array(state.get(name, np.zeros_like(mean)), dtype=np.float64)
            for name in _PATHS
        }
        covariance = np.array(state.get("covariance", identity(len(mean))), dtype=np.float64)
        generation = int(state["generation"].item()) if "generation" in state else 0
        step_size = float(state["step_size"].item())
        return cls(mean, step_size, covariance, **paths, generation=generation)

    def state(self) -> State:
        """Return the complete state by name, fp64, as views where it is an array.

        Returns:
            mean, step_path, mean_path [dimension], step_size, generation [1] and covariance
            [dimension (dimension + 1) / 2].
        """
        return {
            "mean": self.mean,
            "step_size": np.array([self.step_size], dtype=np.float64),
            "covariance": self.covariance,
            "step_path": self.step_path,
            "mean_path": self.mean_path,
            "generation": np.array([self.generation], dtype=np.float64),
        }

    def sample(self, num: int, seed: int) -> np.ndarray:
        """Draw points that follow from the distribution and the seed alone.

        A point is mean + step_size * C^(1/2) z, with z standard normal and C^(1/2) = B D B^T, the
        symmetric root, where B and D^2 are the eigenvectors and eigenvalues of the covariance C.
        Hansen (2016, Eq. 39) and the library draw with B D, which has the same distribution. But
        the eigenvectors of (nearly) equal eigenvalues, such as those of the identity that a search
        begins with, are whatever the BLAS kernel of a processor makes of them, and with other
        eigenvectors the same z gives other points. The symmetric root is unique.

        Args:
            num: number of points, at least 2.
            seed: of z.

        Returns:
            fp64 [num, dimension].
        """
        standard = np.random.default_rng(seed).standard_normal((num, len(self.mean)))
        with _one_thread():
            self._sampler = self._to_library(num)
            vectors, deviations = self._sampler._eigen_decomposition()
            root = (vectors * deviations) @ vectors.T
            return self.mean + self.step_size * (standard @ root)

    def update(
        self, points: np.ndarray, losses: np.ndarray, parents: Literal["half", "all"] = "half"
    ) -> None:
        """Move towards the points of low loss; equal ones count in their order.

        Args:
            points: fp64 [num, dimension], at least 2.
            losses: [num].
            parents: the points that the new mean is made of: the better "half", rounded down, or
                "all". With "all" they have the weights, and the search the learning rates, of the
                better half of twice as many points, and none has a negative weight.
        """
        sampler = self._sampler
        self._sampler = None
        with _one_thread():
            if parents == "all":
                # The worse half is made up: it lies at the mean, and its weights are 0.
                sampler = self._to_library(2 * len(points), negative_weights=False)
                points = np.concatenate([points, np.broadcast_to(self.mean, np.shape(points))])
                losses = np.concatenate([losses, np.full(len(losses), np.inf)])
            elif sampler is None or sampler.population_size != len(points):
                sampler = self._to_library(len(points))
            solutions = [
                (np.asarray(point, np.float64), float(loss)) for point, loss in zip(points, losses)
            ]
            with np.errstate(divide="ignore"):
                sampler.tell(solutions)
        state = sampler.__getstate__()
        self.mean = state["_mean"]
        self.step_size = float(state["_sigma"])
        self.covariance = state["_c_1d"]
        self.step_path = state["_p_sigma"]
        self.mean_path = state["_pc"]
        self.generation = state["_g"]

    def _to_library(self, population: int, negative_weights: bool = True) -> CMA:
        """Return the library's object with this state.

        Its learning rates follow from dimension and population alone.

        Args:
            population: number of points of an update.
            negative_weights: whether the worse half takes part in the update of the covariance.
        """
        from cmaes import CMA  # here, because it loads scipy.stats, for a second or more

        # Of 2 or 3 points only one is a parent; the rate of the rank-mu update is 0 then.
        with np.errstate(divide="ignore"):
            library = CMA(mean=self.mean, sigma=self.step_size, population_size=population)
        state = dict(library.__getstate__())
        if not negative_weights:
            state["_weights"] = np.maximum(state["_weights"], 0)
        state["_c_1d"] = self.covariance
        state["_p_sigma"] = self.step_path
        state["_pc"] = self.mean_path
        state["_g"] = self.generation
        library.__setstate__(state)
        return library


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run the block with one thread in BLAS."""
    with _controller().limit(limits=1, user_api="blas"):
        yield
