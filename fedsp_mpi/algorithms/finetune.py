"""Fine-tuning by federated averaging (McMahan et al., 2017, algorithm 1): the model's own weights
travel.

Nothing stays secret here: every client gets the global model. Prompts are compared with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Protocol

from torch import Tensor, nn

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
from fedsp_mpi.data.tokens import Text
from fedsp_mpi.log import RoundProgress
from fedsp_mpi.models import auxiliary
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.models.losses import answer_loss_of
from fedsp_mpi.tensors import NamedTensors, Schema, State, Update, join_states, part_of_state
from fedsp_mpi.training.device import oom_as_client_error
from fedsp_mpi.training.engine import TorchEngine
from fedsp_mpi.training.loop import Batches, NonFiniteError, Trace, train
from fedsp_mpi.training.process_group import SINGLE_RANK, ServerGroup


class Tuned(Protocol):
    """What is tuned of a model, and travels."""

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return the tensors themselves, fp32."""

    def tensors(self) -> Mapping[str, nn.Parameter]:
        """Return them by name."""

    def pack(self) -> NamedTensors:
        """Copy them into the tensors that travel, fp32 [*shape]."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy values [*shape] in, by name."""

    def limit_rank(self, rank: int) -> None:
        """Keep what a client of a lower rank has."""

    def attach(self) -> None:
        """Become part of the model, whose weights have been read again."""

    def begin_training(self) -> None:
        """Make them trainable."""

    def end_training(self) -> None:
        """Make the model ready to be scored."""


class AllWeights:
    """All weights of a model; see `Tuned`."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return all weights, shared ones once."""
        return self._model.weights.values()

    def tensors(self) -> Mapping[str, nn.Parameter]:
        """Return them by name."""
        return self._model.weights

    def pack(self) -> NamedTensors:
        """Copy them into the tensors that travel, fp32 [*shape]."""
        return auxiliary.pack(self._model)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy values [*shape] in, by name."""
        auxiliary.load_weights(self._model, tensors)

    def limit_rank(self, rank: int) -> None:
        """Keep all."""

    def attach(self) -> None:
        """Do nothing: they are part of the model."""

    def begin_training(self) -> None:
        """Make them trainable."""
        self._model.train_weights(True)

    def end_training(self) -> None:
        """Do nothing: there is no dropout."""


class WeightServer:
    """Averages what the clients tuned, and tunes the result on the server's own shard.

    Without clients it is centralised fine-tuning.

    Args:
        model: the global model.
        tuned: what of it is tuned.
        batches: the server's shard; None if it does not tune.
        stage: its tuning in each round.
        total_rounds: length of the learning-rate schedule, in rounds.
        rule: makes one set of weights of many updates.
        group: the ranks that train together, each on its part of the batches.
        progress: is told of every step.
    """

    prompt = None

    def __init__(
        self,
        model: LanguageModel,
        tuned: Tuned,
        batches: Batches | None,
        *,
        stage: StageConfig,
        total_rounds: int,
        rule: Rule,
        group: ServerGroup = SINGLE_RANK,
        progress: RoundProgress | None = None,
    ) -> None:
        self.model = model
        self.tuned = tuned
        self._batches = batches
        self._stage = stage
        self._rule = rule
        self._progress = progress or RoundProgress()
        total_steps = stage.steps * total_rounds
        self._engine = TorchEngine(self.parameters(), stage.optimizer, total_steps, group=group)

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return what is tuned."""
        return self.tuned.parameters()

    @property
    def tunes(self) -> bool:
        """Whether there is a shard to tune on."""
        return self._batches is not None

    def broadcast(self) -> NamedTensors:
        """Return a copy of what is tuned."""
        return self.export()

    def aggregate(self, updates: Updates) -> NamedTensors:
        """Return one set of tensors of many, by the rule."""
        return self._rule(updates)

    def load_aggregate(self, aggregate: NamedTensors) -> None:
        """Make the merged tensors the server's own."""
        self.restore(aggregate)

    def server_update(self, round: int) -> Trace | None:
        """Tune the global model on the server's own shard, if it has one to tune on."""
        if self._batches is None:
            return None
        self._progress.server(round)
        self._progress.stage("step", self._stage.steps)
        loss = partial(answer_loss_of, self.model, None)
        self.tuned.begin_training()
        trace = train(
            self._engine,
            self._batches,
            loss,
            first_step=(round - 1) * self._stage.steps,
            num_steps=self._stage.steps,
            device=self.model.device,
            on_step=self._progress.step,
        )
        self.tuned.end_training()
        return trace

    def export(self) -> NamedTensors:
        """Return a copy of what is tuned."""
        return self.tuned.pack()

    def restore(self, exported: NamedTensors) -> None:
        """Copy in what `export` returned."""
        self.tuned.load(exported.torch())

    def state(self) -> State:
        """Return all that the next round depends on."""
        parts = {"weights": arrays(self.tuned.tensors()), "engine": self._engine.state()}
        return join_states(parts)

    def load_state(self, state: State) -> None:
        """Continue from `state()`, which is copied."""
        self.tuned.load(tensors(part_of_state(state, "weights")))
        self._engine.load_state(part_of_state(state, "engine"))


class WeightClient:
    """All clients of one process, which tune all of one model, or a part of it, one by one.

    Args:
        model: as large as the global one.
        tuned: what of it is tuned, which comes with every round.
        shards: text by client id, or why it cannot be trained on.
        make_shard: cuts a client's other texts into batches.
        stage: a round's training.
        total_rounds: length of the learning-rate schedule, in rounds.
        keep_state: whether optimizers and schedules live on from round to round, which takes twice
            the model's size a client.
        proximal: FedProx's mu; see `TorchEngine`.
        max_seconds: of one client's work in a round; when they are over, it ends after its step.
            None: no limit.
        progress: is told of every step.
        initial: the model's own weights where they do not travel with what is tuned.
        rank_of: returns the rank of a client's adapters.

    Attributes:
        states: what clients keep between rounds.
    """

    prompt = None

    def __init__(
        self,
        model: LanguageModel,
        tuned: Tuned,
        shards: Mapping[int, Batches | ShardError],
        *,
        make_shard: Callable[[int, Sequence[Text]], Batches],
        stage: StageConfig,
        total_rounds: int,
        keep_state: bool,
        proximal: float = 0.0,
        max_seconds: float | None = None,
        progress: RoundProgress | None = None,
        initial: NamedTensors | None = None,
        rank_of: Callable[[int], int] | None = None,
    ) -> None:
        self.model = model
        self._tuned = tuned
        self._rank_of = rank_of
        self._shards = dict(shards)
        self._make_shard = make_shard
        self._stage = stage
        self._rounds = total_rounds if keep_state else 1
        self._keep_state = keep_state
        self._proximal = proximal
        self._max_seconds = max_seconds
        self._progress = progress or RoundProgress()
        if initial is None:
            initial = NamedTensors.pack({})
        self.states = ClientStates(
            model, initial, self._build_engines, trains_model=False, keep=keep_state
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
            self._load(client, broadcast)
            engine = state.engines["tuning"]
            engine.steps_done = (round - 1) * self._stage.steps if self._keep_state else 0
            engine.anchor()
            self._tuned.begin_training()
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
            self._tuned.end_training()
            weights = self._tuned.pack()
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
        """Load what was broadcast; see `base.Client.hold`."""
        self.states.show(client)
        self._load(client, broadcast)

    def train_on(self, client: int, texts: Sequence[Text]) -> None:
        """Train a client on these texts from now on; see `base.TextClient`."""
        self._shards[client] = self._make_shard(client, texts)

    def _load(self, client: int, broadcast: NamedTensors) -> None:
        self._tuned.load(broadcast.torch())
        if self._rank_of is not None:
            self._tuned.limit_rank(self._rank_of(client))

    def _build_engines(self) -> dict[str, TorchEngine]:
        total_steps = self._stage.steps * self._rounds
        engine = TorchEngine(
            self._tuned.parameters(), self._stage.optimizer, total_steps, proximal=self._proximal
        )
        return {"tuning": engine}


# -- the method ------------------------------------------------------------------------------------


class Finetune(Method):
    """The model's own weights travel, and every client trains all of them."""

    metrics = ("loss_model_first", "loss_model_last", "seconds_model", "seconds_other")

    def build_server(self, context: ServerContext) -> Server:
        """Return the server that trains the merged weights."""
        return weight_server(context, AllWeights(context.model), context.rule)

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
        model = context.build_model(False)
        return weight_client(context, model, AllWeights(model))


def weight_server(context: ServerContext, tuned: Tuned, rule: Rule) -> WeightServer:
    """Build the server as configured.

    Args:
        context: of the server.
        tuned: what of the context's model is tuned.
        rule: makes one update of many.
    """
    config = context.inputs.config
    return WeightServer(
        context.model,
        tuned,
        context.batches(),
        stage=config.server.tuning,
        total_rounds=config.federation.rounds,
        rule=rule,
        group=context.group,
        progress=context.progress,
    )


def weight_client(
    context: ClientContext,
    model: LanguageModel,
    tuned: Tuned,
    *,
    initial: NamedTensors | None = None,
    rank_of: Callable[[int], int] | None = None,
) -> WeightClient:
    """Build the clients of one process as configured.

    Args:
        context: of the clients.
        model: that they work on.
        tuned: what of it is tuned.
        initial: see `WeightClient`.
        rank_of: see `WeightClient`.
    """
    config = context.inputs.config
    stage = config.client.tuning

    def read_shard(client: int, texts: Sequence[Text] | None = None) -> Batches:
        return context.inputs.batches(client + 1, stage, "prompt", texts=texts)

    return WeightClient(
        model,
        tuned,
        context.shards(read_shard),
        make_shard=read_shard,
        stage=stage,
        total_rounds=config.federation.rounds,
        keep_state=config.federation.client_state == "kept",
        proximal=config.client.proximal,
        max_seconds=config.federation.client_seconds,
        progress=context.progress,
        initial=initial,
        rank_of=rank_of,
    )


METHOD = Finetune()
