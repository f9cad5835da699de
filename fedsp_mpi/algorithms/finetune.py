"""Fine-tuning by federated averaging (McMahan et al., 2017, algorithm 1): the model's own weights
travel.

Nothing stays secret here: every client gets the global model. Prompts are compared with it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from functools import partial

from torch import nn

from fedsp_mpi.aggregation.fedavg import Updates
from fedsp_mpi.algorithms.base import (
    ClientContext,
    HandedOut,
    Method,
    MethodInputs,
    Rule,
    Server,
    ServerContext,
    ShardError,
)
from fedsp_mpi.algorithms.client_state import ClientStates, arrays, tensors
from fedsp_mpi.config import StageConfig
from fedsp_mpi.log import RoundProgress
from fedsp_mpi.models import auxiliary
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.models.losses import answer_loss_of
from fedsp_mpi.tensors import NamedTensors, Schema, State, Update, join_states, part_of_state
from fedsp_mpi.training.device import oom_as_client_error
from fedsp_mpi.training.engine import TorchEngine
from fedsp_mpi.training.loop import Batches, NonFiniteError, Trace, train
from fedsp_mpi.training.process_group import SINGLE_RANK, ServerGroup


class WeightServer:
    """Averages the clients' models, and trains the result on the server's own shard.

    Without clients it is centralised fine-tuning.

    Args:
        model: the global model, its weights fp32 and trainable.
        batches: the server's shard; None if it does not tune.
        stage: its tuning in each round.
        total_rounds: length of the learning-rate schedule, in rounds.
        rule: makes one set of weights of many updates.
        group: the ranks that train together, each on its part of the batches.
    """

    prompt = None

    def __init__(
        self,
        model: LanguageModel,
        batches: Batches | None,
        stage: StageConfig,
        *,
        total_rounds: int,
        rule: Rule,
        group: ServerGroup = SINGLE_RANK,
    ) -> None:
        self.model = model
        self._batches = batches
        self._stage = stage
        self._rule = rule
        total_steps = stage.steps * total_rounds
        self._engine = TorchEngine(self.parameters(), stage.optimizer, total_steps, group=group)

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return all weights, shared ones once."""
        return self.model.weights.values()

    def broadcast(self) -> NamedTensors:
        """Return a copy of the weights."""
        return self.export()

    def aggregate(self, updates: Updates) -> NamedTensors:
        """Return one set of weights of many, by the rule."""
        return self._rule(updates)

    def load_aggregate(self, aggregate: NamedTensors) -> None:
        """Make the merged weights the server's own."""
        self.restore(aggregate)

    def server_update(self, round: int) -> Trace:
        """Train the global model on the server's own shard."""
        if self._batches is None:
            return Trace()
        loss = partial(answer_loss_of, self.model, None)
        return train(
            self._engine,
            self._batches,
            loss,
            first_step=(round - 1) * self._stage.steps,
            num_steps=self._stage.steps,
            device=self.model.device,
        )

    def export(self) -> NamedTensors:
        """Return a copy of the weights."""
        return auxiliary.pack(self.model)

    def restore(self, exported: NamedTensors) -> None:
        """Copy in weights that `export` returned."""
        auxiliary.load_weights(self.model, exported.torch())

    def state(self) -> State:
        """Return all that the next round depends on."""
        return join_states({"weights": arrays(self.model.weights), "engine": self._engine.state()})

    def load_state(self, state: State) -> None:
        """Continue from `state()`, which is copied."""
        auxiliary.load_weights(self.model, tensors(part_of_state(state, "weights")))
        self._engine.load_state(part_of_state(state, "engine"))


class WeightClient:
    """All clients of one process, which share one model to work in.

    Args:
        model: as large as the global one; its weights come with every round.
        shards: text by client id, or why it cannot be trained on.
        stage: a round's training.
        total_rounds: length of the learning-rate schedule, in rounds.
        keep_state: whether optimizers and schedules live on from round to round, which takes twice
            the model's size a client.
        proximal: FedProx's mu; see `TorchEngine`.
        max_seconds: of one client's work in a round; when they are over, it ends after its step.
            None: no limit.
        progress: is told of every step.

    Attributes:
        states: what clients keep between rounds.
    """

    prompt = None

    def __init__(
        self,
        model: LanguageModel,
        shards: Mapping[int, Batches | ShardError],
        stage: StageConfig,
        *,
        total_rounds: int,
        keep_state: bool,
        proximal: float = 0.0,
        max_seconds: float | None = None,
        progress: RoundProgress | None = None,
    ) -> None:
        self.model = model
        self._shards = shards
        self._stage = stage
        self._rounds = total_rounds if keep_state else 1
        self._keep_state = keep_state
        self._proximal = proximal
        self._max_seconds = max_seconds
        self._progress = progress or RoundProgress()
        no_weights = NamedTensors.pack({})
        self.states = ClientStates(
            model, no_weights, self._build_engines, trains_model=False, keep=keep_state
        )

    def local_update(self, client: int, round: int, broadcast: NamedTensors) -> Update:
        """Train one client's model on its own text, starting from the broadcast weights.

        See `base.Client.local_update`.

        Raises:
            ClientError: NonFiniteError if a loss or a weight is not finite, OutOfMemoryError,
                ShardError.
        """
        start = time.perf_counter()
        shard = self._shards[client]
        if isinstance(shard, ShardError):
            raise shard
        with oom_as_client_error():
            state = self.states.restore(client)
            auxiliary.load_weights(self.model, broadcast.torch())
            engine = state.engines["tuning"]
            engine.steps_done = (round - 1) * self._stage.steps if self._keep_state else 0
            engine.anchor()
            self.model.train_weights(True)
            self._progress.stage("step", self._stage.steps)
            trace = train(
                engine,
                shard,
                partial(answer_loss_of, self.model, None),
                first_step=(round - 1) * self._stage.steps,
                num_steps=self._stage.steps,
                device=self.model.device,
                on_step=self._progress.step,
                until=None if self._max_seconds is None else start + self._max_seconds,
            )
            weights = auxiliary.pack(self.model)
            if not weights.is_finite():
                raise NonFiniteError("the trained model holds numbers that are not finite")
            self.states.store(client, state)
        metrics = {
            "loss_model_first": trace.first,
            "loss_model_last": trace.last,
            "seconds_model": trace.seconds,
            "seconds_other": time.perf_counter() - start - trace.seconds,
        }
        return Update(client, float(trace.samples), weights, metrics)

    def hold(self, client: int, broadcast: NamedTensors) -> None:
        """Load the broadcast weights, which all clients hold; see `base.Client.hold`."""
        auxiliary.load_weights(self.model, broadcast.torch())

    def _build_engines(self) -> dict[str, TorchEngine]:
        total_steps = self._stage.steps * self._rounds
        weights = self.model.weights.values()
        engine = TorchEngine(weights, self._stage.optimizer, total_steps, proximal=self._proximal)
        return {"tuning": engine}


# -- the method ------------------------------------------------------------------------------------


class Finetune(Method):
    """The model's own weights travel, and every client trains all of them."""

    metrics = ("loss_model_first", "loss_model_last", "seconds_model", "seconds_other")

    def build_server(self, context: ServerContext) -> Server:
        """Return the server that trains the merged weights."""
        config = context.inputs.config
        return WeightServer(
            context.model,
            context.batches(),
            config.server.tuning,
            total_rounds=config.federation.rounds,
            rule=context.rule,
            group=context.group,
        )

    def hand_out(
        self, inputs: MethodInputs, server: Server, client_model: LanguageModel
    ) -> HandedOut:
        """Return no tensors: the weights come with every round; see `Method.hand_out`."""
        schema = Schema.of((name, weight.shape) for name, weight in client_model.weights.items())
        return HandedOut(
            model_config=client_model.model.config,
            tensors=NamedTensors.pack({}),
            down=schema,
            up=schema,
        )

    def build_client(self, context: ClientContext) -> WeightClient:
        """Return the clients of one process."""
        inputs = context.inputs
        config = inputs.config
        stage = config.client.tuning
        return WeightClient(
            context.build_model(False),
            context.shards(lambda client: inputs.batches(client + 1, stage, "prompt")),
            stage,
            total_rounds=config.federation.rounds,
            keep_state=config.federation.client_state == "kept",
            proximal=config.client.proximal,
            max_seconds=config.federation.client_seconds,
            progress=context.progress,
        )


METHOD = Finetune()
