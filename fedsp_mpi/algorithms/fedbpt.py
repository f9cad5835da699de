"""FedBPT (Sun et al., 2023, arXiv 2310.01467): prompts searched for without gradients.

A prompt is the first one + A z, with a random matrix A that follows from the seed
(models/subspace.py). Clients search for z by CMA-ES, with forward passes alone, and the server
searches among the clients' means by a CMA-ES of its own. Up go z and a few numbers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fedsp_mpi import rng
from fedsp_mpi.aggregation.fedavg import Updates
from fedsp_mpi.aggregation.step_size import corrected, effective
from fedsp_mpi.algorithms.base import (
    ClientContext,
    HandedOut,
    Method,
    MethodInputs,
    Server,
    ServerContext,
    ShardError,
)
from fedsp_mpi.algorithms.client_state import StatelessClients
from fedsp_mpi.algorithms.inference import (
    InferenceBackend,
    Limits,
    LocalInference,
    RemoteInference,
    handle_request,
)
from fedsp_mpi.config import SearchConfig
from fedsp_mpi.data.perturb import perturbed
from fedsp_mpi.data.tokens import Text
from fedsp_mpi.log import RoundProgress
from fedsp_mpi.models import auxiliary
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.models.losses import MIN_LOSS, fitness
from fedsp_mpi.models.prompts import DepthMap, Prompt
from fedsp_mpi.models.subspace import Subspace, scale_of
from fedsp_mpi.tensors import NamedTensors, Schema, State, Update
from fedsp_mpi.training.cma_es import CmaEs
from fedsp_mpi.training.loop import NonFiniteError


@dataclass(frozen=True)
class Projection:
    """The map from points of the search to prompts of a model.

    Attributes:
        initial: the first prompt, at the depth of that model, [tokens, row width].
        subspace: maps z to what is added to it, at the depth of the global model.
        depths: maps that to this model's depth.
    """

    initial: Tensor
    subspace: Subspace
    depths: DepthMap

    def __call__(self, points: np.ndarray) -> Tensor:
        """Return the prompt of each point z [points, dimension]: fp32 [points, tokens, width]."""
        changes = [
            self.depths.down({"prompt": change})["prompt"]
            for change in self.subspace.expand(points)
        ]
        return self.initial + torch.stack(changes)


class SearchServer:
    """Searches among the clients' means, and steers the global model's prompt.

    The search's state is fp32, as it travels, so that both sides know the same.

    Args:
        model: the frozen global model.
        prompt: the first prompt, of the global model's depth.
        subspace: maps z to what is added to it.
        settings: of the search.
        inference: runs the clients' forward passes too, if they hold no model.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompt: Prompt,
        subspace: Subspace,
        *,
        settings: SearchConfig,
        inference: InferenceBackend | None = None,
    ) -> None:
        self.model = model
        self.prompt = prompt.requires_grad_(False)
        self._initial = prompt.matrix().cpu().clone()
        self._subspace = subspace
        self._settings = settings
        self._inference = inference
        initial_search = CmaEs.of(
            {"mean": np.zeros(settings.dimension), "step_size": np.array([settings.step_size])}
        )
        self._search_state = NamedTensors.of(initial_search.state())

    @property
    def tunes(self) -> bool:
        """False: clients search alone."""
        return False

    def broadcast(self) -> NamedTensors:
        """Return the parts of the search's state that go down."""
        names = self._settings.travelling()[0]
        return NamedTensors.of({name: self._search_state[name] for name in names})

    def answer(self, request: np.ndarray) -> np.ndarray:
        """Return the losses that a client without a model asks for.

        Args:
            request: fp32 [any number], as `inference.encode_request` makes it.

        Returns:
            fp32 [points x texts], in nats a token.

        Raises:
            ValueError: the values are no request.
        """
        assert self._inference is not None, "clients hold the model"
        vocabulary = self.model.model.get_input_embeddings().weight.shape[0]
        # The last token of a text is only predicted, so it needs no position.
        max_length = self.model.shape.num_positions - self.prompt.spec.num_tokens + 1
        limits = Limits(self._settings.dimension, vocabulary, max_length)
        return handle_request(self._inference, request, limits)

    def aggregate(self, updates: Updates) -> NamedTensors:
        """Take the clients' means as the points of one step of the server's CMA-ES (section 4.2).

        A single update is taken as it is.
        """
        rows, metrics = self._with_step_sizes(updates)
        if not metrics:
            return NamedTensors.of(self._search_state)
        if len(metrics) == 1:
            return NamedTensors(updates.schema, rows[0].copy())
        settings = self._settings
        means, step_sizes = np.split(rows.astype(np.float64), [settings.dimension], axis=1)
        search = CmaEs.of(self._search_state)
        if settings.step_size_by == "clients":
            next_step_size = float(np.exp(np.log(step_sizes).mean()))
            points = effective(settings.population)
        else:
            next_step_size = search.step_size
            points = settings.population / 2
        fitnesses = [client["fitness"] for client in metrics]
        num_parents = len(metrics) if settings.parents == "all" else len(metrics) // 2
        search.step_size = corrected(
            fitnesses,
            [client["step_size"] for client in metrics],
            points=points,
            parents=num_parents,
        )
        ratio = next_step_size / search.step_size
        search.update(means, np.array(fitnesses), settings.parents)
        search.step_size *= ratio  # the clients' step size changes as the server's does
        return NamedTensors.of(search.state())

    def _with_step_sizes(self, updates: Updates) -> tuple[np.ndarray, list[Mapping[str, float]]]:
        """Return rows [updates, values] and metrics of the updates whose step sizes are above 0.

        The others are rejected by name.
        """
        rows = updates.rows()
        reported = [report.metrics["step_size"] for report in updates.reports]
        next_step_sizes = rows[:, self._settings.dimension :]  # no column unless they travel
        smallest = np.minimum(reported, next_step_sizes.min(axis=1, initial=np.inf))
        metrics = []
        for report, step_size in zip(updates.reports, smallest):
            if step_size <= 0:
                updates.reject(report.client, f"step size {step_size:g}, expected one above 0")
            else:
                metrics.append(report.metrics)
        return rows[smallest > 0], metrics

    def load_aggregate(self, aggregate: NamedTensors) -> None:
        """Continue from the merged search, and set the prompt to that of its mean."""
        self.load_state(dict(aggregate))

    def server_update(self, round: int) -> None:
        """Do nothing: the server does not tune."""

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return the prompt's parameters."""
        return self.prompt.parameters()

    def export(self) -> NamedTensors:
        """Return a copy of the prompt at the depth of the global model."""
        return NamedTensors.pack(self.prompt.tensors())

    def restore(self, exported: NamedTensors) -> None:
        """Copy in a prompt that `export` returned; the search stays where it is."""
        self.prompt.load(exported.torch())

    def state(self) -> State:
        """Return all that the next round depends on."""
        return dict(self._search_state)

    def load_state(self, state: State) -> None:
        """Continue from `state()`, which is copied."""
        for name, value in state.items():
            self._search_state[name][...] = value
        change = self._subspace.expand(self._search_state["mean"][None])[0]
        self.prompt.load({"prompt": self._initial + change})


class SearchClient:
    """All clients of one process; they keep nothing between rounds.

    Args:
        inference: runs the forward passes.
        shards: text by client id, or why it cannot be used.
        words: int64 [number], sorted ids of the tokens that are words, for perturbed copies.
        settings: of the search.
        seed: of the run.
        max_seconds: of one client's work in a round; when they are over, it ends after its
            iteration. None: no limit.
        progress: is told of every iteration.

    Attributes:
        states: empty.
    """

    def __init__(
        self,
        inference: InferenceBackend,
        shards: Mapping[int, Sequence[Text] | ShardError],
        words: np.ndarray,
        *,
        settings: SearchConfig,
        seed: int,
        max_seconds: float | None = None,
        progress: RoundProgress | None = None,
    ) -> None:
        self._inference = inference
        self._shards = shards
        self._words = words
        self._settings = settings
        self._seed = seed
        self._max_seconds = max_seconds
        self._progress = progress or RoundProgress()
        self.states = StatelessClients()

    @property
    def model(self) -> LanguageModel | None:
        """The model that runs the forward passes; None if the server does."""
        return self._inference.model

    @property
    def prompt(self) -> Prompt | None:
        """The prompt that was tried last."""
        return self._inference.prompt

    def local_update(self, client: int, round: int, broadcast: NamedTensors) -> Update:
        """Take one client's iterations, and return their mean; see `Client.local_update`.

        Raises:
            ClientError: NonFiniteError if an objective is not finite, OutOfMemoryError, ShardError.
        """
        start = time.perf_counter()
        settings = self._settings
        shard = self._shards[client]
        if isinstance(shard, ShardError):
            raise shard
        groups = self._with_perturbed_copy(shard, client, round)
        search = self.start_search(broadcast, round)
        first_loss = math.nan
        sum_of_squares = 0.0
        search_start = time.perf_counter()
        self._progress.stage("iteration", settings.iterations)
        for iteration in range(settings.iterations):
            sum_of_squares += search.step_size**2
            key = rng.key(self._seed, "search", round, client, iteration)
            points = search.sample(settings.population, key)
            objectives, losses = self._evaluate(client, points, groups)
            search.update(points, objectives)
            if iteration == 0:
                first_loss = float(losses.mean())
            self._progress.step()
            is_late = (
                self._max_seconds is not None and time.perf_counter() >= start + self._max_seconds
            )
            if is_late:
                break
        state = search.state()
        tensors = NamedTensors.of({name: state[name] for name in settings.travelling()[1]})

        # --- the objective of the mean that goes up, which the server ranks it by ---
        means = [tensors["mean"]]
        if settings.compares:
            means.insert(0, broadcast["mean"])
        objectives, losses = self._evaluate(client, np.stack(means), groups)
        rank = objectives[-1]
        if settings.compares:
            rank = objectives[-1] / max(objectives[0], MIN_LOSS)
        metrics = {
            "fitness": float(rank),
            "step_size": math.sqrt(sum_of_squares),
            "loss_prompt_first": first_loss,
            "loss_prompt_last": float(losses[-1]),
            "seconds_prompt": time.perf_counter() - search_start,
            "seconds_other": search_start - start,
        }
        return Update(client, float(len(shard)), tensors, metrics)

    def hold(self, client: int, broadcast: NamedTensors) -> None:
        """Set the prompt to that of the broadcast mean; see `base.Client.hold`."""
        self._inference.hold(broadcast["mean"])

    def start_search(self, broadcast: NamedTensors, round: int) -> CmaEs:
        """Return the search that a client begins a round with: without paths (section 4.1)."""
        search = CmaEs.of(broadcast)
        search.generation = 0
        return search

    def _with_perturbed_copy(
        self, shard: Sequence[Text], client: int, round: int
    ) -> list[Sequence[Text]]:
        """Return a client's text, and this round's perturbed copy if the objective has one."""
        if self._settings.objective == "loss":
            return [shard]
        random = rng.generator(self._seed, "perturbation", round, client)
        return [shard, perturbed(shard, self._settings.perturbation, self._words, random=random)]

    def _evaluate(
        self, client: int, points: np.ndarray, groups: Sequence[Sequence[Text]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return objective and mean loss, fp64 [points] each, of points [points, dimension]."""
        by_group = self._inference.losses(client, points, groups)
        losses = torch.from_numpy(by_group[0])
        perturbed_losses = torch.from_numpy(by_group[-1])  # the same ones where there is no copy
        objectives = np.array(
            [
                float(fitness(self._settings.objective, original, copy))
                for original, copy in zip(losses, perturbed_losses)
            ]
        )
        if not np.isfinite(objectives).all():
            wrong = objectives[~np.isfinite(objectives)][0]
            raise NonFiniteError(f"the objective is {wrong}, expected a finite number")
        return objectives, np.array([float(row.mean()) for row in losses])


# -- the method ------------------------------------------------------------------------------------


class FedBPT(Method):
    """Points of a search travel; clients hold the auxiliary model, or no model at all."""

    metrics = (
        "fitness",
        "step_size",
        "loss_prompt_first",
        "loss_prompt_last",
        "seconds_prompt",
        "seconds_other",
    )
    server_class: type[SearchServer] = SearchServer
    client_class: type[SearchClient] = SearchClient

    def build_server(self, context: ServerContext) -> Server:
        """Return the server's search; it runs forward passes for clients that hold no model."""
        inputs = context.inputs
        search = inputs.config.search
        prompt = inputs.first_prompt(context.model)
        subspace = _subspace(inputs, _scale(inputs, context.model, prompt))
        inference = None
        if inputs.config.asks_server:
            layers = context.model.shape.num_layers
            inference = LocalInference(
                context.model,
                Prompt(inputs.prompt_spec).to(context.compute.device),
                Projection(
                    prompt.matrix().detach().clone(),
                    subspace,
                    DepthMap(inputs.prompt_spec, layers, tuple(range(layers))),
                ),
                batch_tokens=search.batch_tokens,
            )
        return self.server_class(
            context.model,
            prompt.to(context.compute.device),
            subspace,
            settings=search,
            inference=inference,
        )

    def hand_out(
        self, inputs: MethodInputs, server: Server, client_model: LanguageModel
    ) -> HandedOut:
        """Return the auxiliary model, the first prompt and the scale of A, or nothing at all.

        See `Method.hand_out`.
        """
        search = inputs.config.search
        down = server.broadcast().schema
        travels_up = search.travelling()[1]
        up = Schema(spec for spec in down if spec.name in travels_up)
        finite = ("fitness", "step_size")
        if inputs.config.asks_server:
            return HandedOut(
                model_config=inputs.model_config,
                tensors=NamedTensors.pack({}),
                down=down,
                up=up,
                finite=finite,
                num_inference_ranks=inputs.config.topology.server_ranks,
            )
        prompt = inputs.first_prompt(server.model)
        scale = np.array([_scale(inputs, server.model, prompt)])
        parts = {
            "auxiliary/": auxiliary.pack(client_model),
            "prompt/": NamedTensors.pack(inputs.depth_map.down(prompt.tensors())),
            "search/": NamedTensors.of({"scale": scale}),
        }
        return HandedOut(
            model_config=auxiliary.cell_config(inputs.model_config, inputs.config.auxiliary),
            tensors=NamedTensors.join(parts),
            down=down,
            up=up,
            finite=finite,
        )

    def build_client(self, context: ClientContext) -> SearchClient:
        """Return the clients of one process."""
        inputs = context.inputs
        config = inputs.config
        inference: InferenceBackend = RemoteInference(context.call_server)
        if not config.asks_server:
            model = context.build_model(False)
            auxiliary.load_weights(model, context.tensors.select("auxiliary/").torch())
            model.train_weights(False)
            inference = LocalInference(
                model.round_weights(),
                Prompt(inputs.depth_map.small).to(context.compute.device),
                Projection(
                    context.tensors.select("prompt/").torch()["prompt"].clone(),
                    _subspace(inputs, context.tensors["search/scale"].item()),
                    inputs.depth_map,
                ),
                batch_tokens=config.search.batch_tokens,
            )
        return self.client_class(
            inference,
            context.shards(lambda client: inputs.shard(client + 1)),
            inputs.word_token_ids,
            settings=config.search,
            seed=config.run.seed,
            max_seconds=config.federation.client_seconds,
            progress=context.progress,
        )

    def answer(self, server: Server) -> Callable[[np.ndarray], np.ndarray] | None:
        """Return the server's `answer`, from fp32 [any number] to fp32 [any number]."""
        assert isinstance(server, SearchServer)
        return server.answer


def _scale(inputs: MethodInputs, model: LanguageModel, prompt: Prompt) -> float:
    """Return the scale of A, rounded to fp32 as it travels."""
    search = inputs.config.search
    scale = scale_of(
        model,
        prompt,
        search.dimension,
        step_size=search.step_size,
        spread=search.spread,
    )
    return float(np.float32(scale))


def _subspace(inputs: MethodInputs, scale: float) -> Subspace:
    config = inputs.config
    return Subspace(inputs.prompt_spec, config.search.dimension, scale, config.run.seed)


METHOD = FedBPT()
