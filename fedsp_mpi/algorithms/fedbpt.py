"""FedBPT (Sun et al., 2023, arXiv 2310.01467): prompts that are searched for, by forward passes
alone.

A prompt is the first one + A z, with a random A that follows from the seed (models/subspace.py).
Clients search for z by CMA-ES, and the server searches among what they found by a CMA-ES of its
own. Up go z and a few numbers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from fedsp_mpi import rng
from fedsp_mpi.aggregation.fedavg import Updates, weighted_mean
from fedsp_mpi.aggregation.step_size import corrected, effective
from fedsp_mpi.algorithms.client_state import ShardError, StatelessClients
from fedsp_mpi.algorithms.inference import InferenceBackend, Limits, answered
from fedsp_mpi.config import SearchConfig
from fedsp_mpi.data.perturb import perturbed
from fedsp_mpi.data.tokens import Text
from fedsp_mpi.log import RoundProgress
from fedsp_mpi.models.backbone import LanguageModel
from fedsp_mpi.models.losses import LEAST, fitness
from fedsp_mpi.models.prompts import Prompt
from fedsp_mpi.models.subspace import Subspace
from fedsp_mpi.tensors import NamedTensors, State, Update
from fedsp_mpi.training.cma_es import CmaEs
from fedsp_mpi.training.loop import NonFiniteError, Trace

# fitness: what a client's mean is ranked by; step_size: the root of the sum of squares of its
# iterations' step sizes.
METRICS = (
    "fitness",
    "step_size",
    "loss_prompt_first",
    "loss_prompt_last",
    "seconds_prompt",
    "seconds_other",
)
FINITE = ("fitness", "step_size")  # what the server merges by


class Server:
    """Owns the global model and the search. All that it knows is fp32, as it travels, so that both
    sides know the same.

    Args:
        model: the frozen global model.
        prompt: the first prompts, of the global model's depth.
        subspace: leads from z to what is added to them.
        settings: of the search.
        forward: runs the clients' forward passes too, if they hold no model.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompt: Prompt,
        subspace: Subspace,
        settings: SearchConfig,
        forward: InferenceBackend | None = None,
    ) -> None:
        self.model, self.prompt, self._forward = model, prompt.requires_grad_(False), forward
        self._first, self._subspace, self._settings = (
            prompt.matrix().cpu().clone(),
            subspace,
            settings,
        )
        begin = {"mean": np.zeros(settings.dimension), "step_size": np.array([settings.step_size])}
        self._known = NamedTensors.of(CmaEs.of(begin).state())

    def broadcast(self) -> NamedTensors:
        """The search as it goes down."""
        return NamedTensors.of({name: self._known[name] for name in self._settings.travelling()[0]})

    def answer(self, question: np.ndarray) -> np.ndarray:
        """The losses that a client without a model asks for (`forward.packed`)."""
        assert self._forward is not None, "clients hold the model"
        num_tokens = self.model.model.get_input_embeddings().weight.shape[0]
        longest = (
            self.model.shape.num_positions - self.prompt.spec.num_tokens + 1
        )  # the last token is predicted only
        return answered(
            self._forward, question, Limits(self._settings.dimension, num_tokens, longest)
        )

    def merge(self, updates: Updates) -> NamedTensors:
        """The search that comes of the clients'; of a single one FedBPT takes what it sent."""
        if self._settings.rule == "average":
            return weighted_mean(updates)
        rows, told = self._with_step_sizes(updates)
        if not told:
            return NamedTensors.of(self._known)
        if len(told) == 1:
            return NamedTensors(updates.schema, rows[0].copy())
        losses, spread = ([numbers[name] for numbers in told] for name in ("fitness", "step_size"))
        means, ends = np.split(rows.astype(np.float64), [self._settings.dimension], axis=1)
        search = CmaEs.of(self._known)
        local = float(np.exp(np.log(ends).mean())) if ends.size else search.step_size
        points = (
            effective(self._settings.population) if ends.size else self._settings.population / 2
        )
        parents = self._settings.parents
        search.step_size = corrected(
            losses, spread, points, len(told) if parents == "all" else len(told) // 2
        )
        factor = local / search.step_size
        search.update(means, np.array(losses), parents)
        search.step_size *= factor  # the clients' changes as the server's does
        return NamedTensors.of(search.state())

    def _with_step_sizes(self, updates: Updates) -> tuple[np.ndarray, list[Mapping[str, float]]]:
        """The rows and metrics of the updates whose step sizes are above 0; the others are rejected
        by name.
        """
        rows = updates.rows()
        ends = rows[:, self._settings.dimension :]
        smallest = np.minimum(
            [report.metrics["step_size"] for report in updates.reports], ends.min(1, initial=np.inf)
        )
        for report, step_size in zip(updates.reports, smallest):
            if step_size <= 0:
                updates.reject(report.client, f"step size {step_size:g}, expected one above 0")
        kept = smallest > 0
        return rows[kept], [report.metrics for report, is_in in zip(updates.reports, kept) if is_in]

    def take(self, merged: NamedTensors) -> None:
        """Go on from the merged search, and let the prompts be those of its mean."""
        for name, value in merged.items():
            self._known[name][...] = value
        self._steer()

    def absorb(self, round: int) -> Trace:
        """Nothing: the server does not tune."""
        return Trace()

    def parameters(self) -> Iterable[nn.Parameter]:
        """The prompts."""
        return self.prompt.parameters()

    def tuned(self) -> NamedTensors:
        """A copy of the prompts at the depth of the global model."""
        return NamedTensors.pack(self.prompt.tensors())

    def load(self, tuned: NamedTensors) -> None:
        """Copy such prompts in; the search stays where it is."""
        self.prompt.load(tuned.torch())

    def state(self) -> State:
        """Everything that the next round depends on."""
        return dict(self._known)

    def load_state(self, state: State) -> None:
        """Go on from `state()`, which is copied."""
        for name, value in state.items():
            self._known[name][...] = value
        self._steer()

    def _steer(self) -> None:
        self.prompt.load(
            {"prompt": self._first + self._subspace.expand(self._known["mean"][None])[0]}
        )


class Client:
    """Any number of owners of text that share one process; they keep nothing between rounds.

    Args:
        forward: what runs the forward passes.
        shards: text by client id, or why it cannot be used.
        words: sorted ids of the tokens that are words, which perturbed copies are made of.
        settings: of the search.
        seed: of the run.
        seconds: of one client's work in a round; when they are over, it ends after its iteration.
        None: no limit.
        progress: hears of every iteration.
    """

    def __init__(
        self,
        forward: InferenceBackend,
        shards: Mapping[int, Sequence[Text] | ShardError],
        words: np.ndarray,
        settings: SearchConfig,
        seed: int,
        seconds: float | None = None,
        progress: RoundProgress | None = None,
    ) -> None:
        self._progress = progress or RoundProgress()
        self._forward, self._shards, self._words = forward, shards, words
        self._settings, self._seed, self._seconds = settings, seed, seconds
        self.states = StatelessClients()

    def local(self, client: int, round: int, down: NamedTensors) -> Update:
        """One client's iterations, and the mean that comes of them; forward passes only.

        Raises ClientError: NonFiniteError if an objective is not finite, OutOfMemoryError,
        ShardError.
        """
        start, shard, settings = time.perf_counter(), self._shards[client], self._settings
        if isinstance(shard, ShardError):
            raise shard
        groups = self._both(shard, client, round)
        search, first, squares = CmaEs.of(down), math.nan, 0.0
        search.generation = (round - 1) * settings.iterations if "step_path" in down else 0
        begun = time.perf_counter()
        self._progress.stage("iteration", settings.iterations)
        for iteration in range(settings.iterations):
            squares += search.step_size**2
            key = rng.key(self._seed, "search", round, client, iteration)
            points = search.sample(settings.population, key)
            values, losses = self._judge(client, points, groups)
            search.update(points, values)
            first = float(losses.mean()) if iteration == 0 else first
            self._progress.step()
            if self._seconds is not None and time.perf_counter() >= start + self._seconds:
                break
        state = search.state()
        up = NamedTensors.of({name: state[name] for name in settings.travelling()[1]})
        means = [*([down["mean"]] if settings.compares else []), up["mean"]]
        values, losses = self._judge(client, np.stack(means), groups)
        ranked = values[-1] / max(values[0], LEAST) if settings.compares else values[0]
        end = time.perf_counter()
        numbers = (ranked, math.sqrt(squares), first, losses[-1], end - begun, begun - start)
        return Update(
            client,
            float(len(shard)),
            up,
            {name: float(value) for name, value in zip(METRICS, numbers)},
        )

    def _both(self, shard: Sequence[Text], client: int, round: int) -> list[Sequence[Text]]:
        """A client's text, and this round's perturbed copy of it, if the objective has one."""
        if self._settings.objective == "loss":
            return [shard]
        random = rng.generator(self._seed, "perturbation", round, client)
        return [shard, perturbed(shard, self._settings.perturbation, self._words, random)]

    def _judge(
        self, client: int, points: np.ndarray, groups: Sequence[Sequence[Text]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The objective and the mean loss of each of the points [num, dimension]."""
        losses, *copies = (
            torch.from_numpy(each) for each in self._forward.losses(client, points, groups)
        )
        rows = zip(losses, copies[0] if copies else losses)
        values = np.array([float(fitness(self._settings.objective, *row)) for row in rows])
        if not np.isfinite(values).all():
            raise NonFiniteError(
                f"the objective is {values[~np.isfinite(values)][0]}, expected a finite number"
            )
        return values, np.array([float(row.mean()) for row in losses])
