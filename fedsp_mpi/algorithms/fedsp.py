"""FedSP (Dong et al., 2023, arXiv 2311.06805): soft prompts as messengers between a large model and
private text.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from fedsp_mpi import rng
from fedsp_mpi.algorithms.client_state import ClientState, ClientStates, ShardError
from fedsp_mpi.algorithms.prompt_server import tune
from fedsp_mpi.config import StageConfig
from fedsp_mpi.log import RoundProgress
from fedsp_mpi.models.backbone import LanguageModel
from fedsp_mpi.models.prompts import Prompt
from fedsp_mpi.tensors import NamedTensors, Update
from fedsp_mpi.training.device import oom_as_client_error
from fedsp_mpi.training.engine import JointEngine, TorchEngine
from fedsp_mpi.training.loop import Batches, NonFiniteError, Trace

METRICS = (
    "loss_model_first",
    "loss_model_last",
    "loss_prompt_first",
    "loss_prompt_last",
    "seconds_model",
    "seconds_prompt",
    "seconds_other",
)


@dataclass(frozen=True)
class Shard:
    """One client's text, once for each stage, in an order of its own."""

    alignment: Batches
    tuning: Batches


class Client:
    """Any number of owners of text that share one process: each aligns its auxiliary model, then
    tunes the prompts.

    Args:
        model: the auxiliary model, one for all.
        handed_out: the weights that the server handed out, where every client begins.
        prompt: the prompts while a client works on them, of the auxiliary model's depth.
        shards: text by client id, or why it cannot be trained on. alignment, tuning: the two stages
            of a round; without steps of `alignment` the model stays as handed out.
        total_rounds: length of the schedules, in rounds.
        seed: of dropout.
        keep: whether auxiliary weights, optimizers and schedules live on from round to round;
            otherwise every round begins from the hand-out, with a schedule of its own.
        joint: both stages at once, in the steps of `tuning`, instead of one after the other.
        seconds: of one client's work in a round; when they are over, a stage ends after its step,
            the first one after its share of the steps. None: no limit.
        progress: hears of every step.

    Attributes:
        benches: what the clients keep between rounds.
    """

    def __init__(
        self,
        model: LanguageModel,
        handed_out: NamedTensors,
        prompt: Prompt,
        shards: Mapping[int, Shard | ShardError],
        alignment: StageConfig,
        tuning: StageConfig,
        total_rounds: int,
        seed: int,
        keep: bool,
        joint: bool = False,
        seconds: float | None = None,
        progress: RoundProgress | None = None,
    ) -> None:
        self._model, self._prompt, self._shards, self._seconds = model, prompt, shards, seconds
        self._progress = progress or RoundProgress()
        self._alignment, self._tuning, self._rounds = alignment, tuning, total_rounds
        self._seed, self._keep, self._joint = seed, keep, joint
        self.states = ClientStates(
            model, handed_out, self._engines, joint or alignment.steps > 0, keep
        )

    def local(self, client: int, round: int, down: NamedTensors) -> Update:
        """One client's round, and the prompts that come of it.

        What the client keeps is renewed only when all went well; after an error it begins anew from
        the hand-out.

        Raises ClientError: NonFiniteError if a loss or the tuned prompt is not finite,
        OutOfMemoryError, ShardError.
        """
        start, shard = time.perf_counter(), self._shards[client]
        if isinstance(shard, ShardError):
            raise shard
        with oom_as_client_error():
            bench = self.states.take(client)
            self._begin(bench, client, round, down)
            model, prompt = (self._both_at_once if self._joint else self._stages)(
                bench, shard, round, start
            )
            tensors = NamedTensors.pack(self._prompt.tensors())
            if not tensors.is_finite():
                raise NonFiniteError("the tuned prompt holds numbers that are not finite")
            self.states.put(client, bench)
        seconds = time.perf_counter() - start - model.seconds - prompt.seconds
        numbers = (
            model.first,
            model.last,
            prompt.first,
            prompt.last,
            model.seconds,
            prompt.seconds,
            seconds,
        )
        return Update(client, float(prompt.samples), tensors, dict(zip(METRICS, numbers)))

    def _begin(self, bench: ClientState, client: int, round: int, down: NamedTensors) -> None:
        self._prompt.load(down.torch())
        for name, engine in bench.engines.items():
            engine.steps_done = (round - 1) * self._steps(name) if self._keep else 0
        if self._model.dropout:
            rng.seed_torch(self._seed, "client", round, client)

    def _stages(
        self, bench: ClientState, shard: Shard, round: int, start: float
    ) -> tuple[Trace, Trace]:
        """Align the auxiliary model with the prompts frozen, then tune the prompts with the
        auxiliary model frozen.
        """
        middle, end = self._limits(start)
        alignment, tuning = bench.engines["alignment"], bench.engines["tuning"]
        self._prompt.requires_grad_(False)
        self._model.train_weights(True)
        self._progress.stage("alignment step", self._alignment.steps)
        on_step = self._progress.step
        model = tune(
            self._model,
            self._prompt,
            alignment,
            shard.alignment,
            self._alignment,
            round,
            middle,
            on_step,
        )
        self._model.train_weights(False)
        self._prompt.requires_grad_(True)
        self._progress.stage("tuning step", self._tuning.steps)
        return model, tune(
            self._model, self._prompt, tuning, shard.tuning, self._tuning, round, end, on_step
        )

    def _both_at_once(
        self, bench: ClientState, shard: Shard, round: int, start: float
    ) -> tuple[Trace, Trace]:
        """Train auxiliary model and prompts on one loss; all of it is told as the second stage."""
        _, end = self._limits(start)
        self._prompt.requires_grad_(True)
        self._model.train_weights(True)
        together = JointEngine(*bench.engines.values())
        self._progress.stage("step", self._tuning.steps)
        on_step = self._progress.step
        trace = tune(
            self._model, self._prompt, together, shard.tuning, self._tuning, round, end, on_step
        )
        self._model.train_weights(False)
        return Trace(), trace

    def _limits(self, start: float) -> tuple[float | None, float | None]:
        if self._seconds is None:
            return None, None
        share = self._alignment.steps / (self._alignment.steps + self._tuning.steps)
        return start + share * self._seconds, start + self._seconds

    def _engines(self) -> dict[str, TorchEngine]:
        owned = {"alignment": self._model.weights.values(), "tuning": self._prompt.parameters()}
        optimizers = {"alignment": self._alignment.optimizer, "tuning": self._tuning.optimizer}
        rounds = self._rounds if self._keep else 1
        return {
            name: TorchEngine(owned[name], optimizers[name], self._steps(name) * rounds)
            for name in owned
        }

    def _steps(self, name: str) -> int:
        return (
            self._alignment.steps if name == "alignment" and not self._joint else self._tuning.steps
        )
