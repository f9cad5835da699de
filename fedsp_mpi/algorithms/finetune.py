"""Fine-tuning by federated averaging (McMahan et al., 2017, algorithm 1): the messengers are the
model's own weights.

Nothing stays secret here: every client gets the global model. It is what prompts as messengers are
compared with.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

from torch import nn

from fedsp_mpi.aggregation.fedavg import Updates
from fedsp_mpi.algorithms.client_state import ClientStates, ShardError, arrays, tensors
from fedsp_mpi.algorithms.prompt_server import tune
from fedsp_mpi.config import StageConfig
from fedsp_mpi.log import RoundProgress
from fedsp_mpi.models import auxiliary
from fedsp_mpi.models.backbone import LanguageModel
from fedsp_mpi.tensors import NamedTensors, State, Update, join_states, part_of_state
from fedsp_mpi.training.device import oom_as_client_error
from fedsp_mpi.training.engine import TorchEngine
from fedsp_mpi.training.loop import Batches, NonFiniteError, Trace
from fedsp_mpi.training.process_group import SINGLE_RANK, ServerGroup

METRICS = ("loss_model_first", "loss_model_last", "seconds_model", "seconds_other")


class Server:
    """Owns the global model: merges what clients made of it, then trains it on its own shard.

    Without clients it is centralised fine-tuning.

    Args:
        model: the global model, its weights fp32 and trainable.
        batches: the server's shard; None if it does not tune.
        stage: its tuning in each round.
        total_rounds: length of the schedule, in rounds.
        rule: makes one set of weights of many.
        team: the ranks that tune together, each on its part of the batches.
    """

    prompt = None

    def __init__(
        self,
        model: LanguageModel,
        batches: Batches | None,
        stage: StageConfig,
        total_rounds: int,
        rule: Callable[[Updates], NamedTensors],
        team: ServerGroup = SINGLE_RANK,
    ) -> None:
        self.model, self._batches, self._stage, self._rule = model, batches, stage, rule
        self._engine = TorchEngine(
            self.parameters(), stage.optimizer, stage.steps * total_rounds, team
        )

    def parameters(self) -> Iterable[nn.Parameter]:
        """What is tuned: all weights, shared ones once."""
        return self.model.weights.values()

    def broadcast(self) -> NamedTensors:
        """The weights as they go down."""
        return self.tuned()

    def merge(self, updates: Updates) -> NamedTensors:
        """One set of weights of many, by the rule given."""
        return self._rule(updates)

    def take(self, merged: NamedTensors) -> None:
        """Let the merged weights be the server's."""
        self.load(merged)

    def absorb(self, round: int) -> Trace:
        """Train the global model on the server's own shard."""
        if self._batches is None:
            return Trace()
        return tune(self.model, None, self._engine, self._batches, self._stage, round)

    def tuned(self) -> NamedTensors:
        """A copy of the weights."""
        return auxiliary.pack(self.model)

    def load(self, tuned: NamedTensors) -> None:
        """Copy such weights in."""
        auxiliary.load_weights(self.model, tuned.torch())

    def state(self) -> State:
        """Everything that the next round depends on."""
        return join_states({"weights": arrays(self.model.weights), "engine": self._engine.state()})

    def load_state(self, state: State) -> None:
        """Go on from `state()`, which is copied."""
        auxiliary.load_weights(self.model, tensors(part_of_state(state, "weights")))
        self._engine.load_state(part_of_state(state, "engine"))


class Client:
    """Any number of owners of text that share one process, and one model to work in.

    Args:
        model: as large as the global one; the weights come with every round.
        shards: text by client id, or why it cannot be trained on.
        stage: a round's training.
        total_rounds: length of the schedule, in rounds.
        keep: whether optimizers and schedules live on from round to round, at twice the model's
            size a client.
        seconds: of one client's work in a round; when they are over, it ends after its step. None:
            no limit.
        progress: hears of every step.

    Attributes:
        benches: what the clients keep between rounds.
    """

    def __init__(
        self,
        model: LanguageModel,
        shards: Mapping[int, Batches | ShardError],
        stage: StageConfig,
        total_rounds: int,
        keep: bool,
        seconds: float | None = None,
        progress: RoundProgress | None = None,
    ) -> None:
        self._progress = progress or RoundProgress()
        self._model, self._shards, self._stage = model, shards, stage
        self._rounds, self._keep, self._seconds = total_rounds if keep else 1, keep, seconds
        self.states = ClientStates(
            model, NamedTensors.pack({}), self._engines, trains=False, keep=keep
        )

    def local(self, client: int, round: int, down: NamedTensors) -> Update:
        """One client's round, and the weights that come of it.

        Raises ClientError: NonFiniteError if a loss or a weight is not finite, OutOfMemoryError,
        ShardError.
        """
        start, shard = time.perf_counter(), self._shards[client]
        if isinstance(shard, ShardError):
            raise shard
        with oom_as_client_error():
            bench = self.states.take(client)
            auxiliary.load_weights(self._model, down.torch())
            engine = bench.engines["tuning"]
            engine.steps_done = (round - 1) * self._stage.steps if self._keep else 0
            self._model.train_weights(True)
            until = None if self._seconds is None else start + self._seconds
            self._progress.stage("step", self._stage.steps)
            trace = tune(
                self._model, None, engine, shard, self._stage, round, until, self._progress.step
            )
            weights = auxiliary.pack(self._model)
            if not weights.is_finite():
                raise NonFiniteError("the trained model holds numbers that are not finite")
            self.states.put(client, bench)
        numbers = (
            trace.first,
            trace.last,
            trace.seconds,
            time.perf_counter() - start - trace.seconds,
        )
        return Update(client, float(trace.samples), weights, dict(zip(METRICS, numbers)))

    def _engines(self) -> dict[str, TorchEngine]:
        total = self._stage.steps * self._rounds
        return {"tuning": TorchEngine(self._model.weights.values(), self._stage.optimizer, total)}
