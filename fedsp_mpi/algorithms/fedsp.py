"""FedSP (Dong et al., 2023, arXiv 2311.06805): soft prompts as messengers between a large model and private text."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedsp_mpi import rng
from fedsp_mpi.aggregation.average import Updates
from fedsp_mpi.config import StageConfig
from fedsp_mpi.models import auxiliary
from fedsp_mpi.models.backbone import LanguageModel
from fedsp_mpi.models.losses import answer_loss
from fedsp_mpi.models.prompts import Prompt, to_depth
from fedsp_mpi.tensors import Batch, ClientError, NamedTensors, State, Update, join_states, part_of_state
from fedsp_mpi.training.device import named_out_of_memory
from fedsp_mpi.training.engine import Together, TorchEngine
from fedsp_mpi.training.loop import Batches, Engine, NonFiniteError, Trace, num_answer_tokens, train
from fedsp_mpi.training.team import ALONE, Team

METRICS = (
    "loss_model_first",
    "loss_model_last",
    "loss_prompt_first",
    "loss_prompt_last",
    "seconds_model",
    "seconds_prompt",
    "seconds_other",
)


def tune(
    model: LanguageModel,
    prompt: Prompt,
    engine: Engine,
    batches: Batches,
    stage: StageConfig,
    round: int,
    until: float | None = None,
) -> Trace:
    """Take a round's steps on the answers' cross entropy; what moves is what the engine owns and needs a gradient.

    A round's batches follow from its number, whoever took part in the rounds before. `until`: see `train`.
    """

    def loss(batch: Batch) -> Tensor:
        return answer_loss(*model.answer_logits(batch, prompt))

    first = (round - 1) * stage.steps
    return train(engine, batches, first, stage.steps, loss, num_answer_tokens, model.device, until=until)


class Server:
    """Owns the global model and the prompts: merges what the clients learned, then tunes it on the global model.

    Run without clients it is the server-only control: the same steps, on the same batches, from the same first prompts.

    Args:
        model: the frozen global model.
        prompt: the first prompts, of the global model's depth.
        num_layers: depth of the clients' model; prompts travel at that depth.
        batches: the server's shard; None if it does not tune.
        stage: its tuning in each round.
        total_rounds: length of the schedule, in rounds.
        rule: makes one prompt of many updates.
        team: the ranks that tune together, each on its part of the batches.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompt: Prompt,
        num_layers: int,
        batches: Batches | None,
        stage: StageConfig,
        total_rounds: int,
        rule: Callable[[Updates], NamedTensors],
        team: Team = ALONE,
    ) -> None:
        self.model, self.prompt = model, prompt
        self._client_spec = prompt.spec.at_depth(num_layers)
        self._batches, self._stage, self._rule = batches, stage, rule
        self._engine = TorchEngine(prompt.parameters(), stage.optimizer, stage.steps * total_rounds, team)

    def broadcast(self) -> NamedTensors:
        """The prompts as they go down: at the depth of the clients' model (mean over its layers)."""
        return NamedTensors.pack(to_depth(self.prompt.tensors(), self.prompt.spec, self._client_spec.num_layers))

    def merge(self, updates: Updates) -> NamedTensors:
        """One prompt of many, by the rule given."""
        return self._rule(updates)

    def take(self, merged: NamedTensors) -> None:
        """Let the merged prompts be the server's (repeated up to the depth of the global model)."""
        self.prompt.load(to_depth(merged.torch(), self._client_spec, self.prompt.spec.num_layers))

    def absorb(self, round: int) -> Trace:
        """Tune the prompts against the frozen global model on the server's own shard."""
        if self._batches is None:
            return Trace()
        return tune(self.model, self.prompt, self._engine, self._batches, self._stage, round)

    def prompts(self) -> NamedTensors:
        """A copy of the prompts at the depth of the global model."""
        return NamedTensors.pack(self.prompt.tensors())

    def state(self) -> State:
        """Everything that the next round depends on."""
        return join_states({"prompt": _arrays(self.prompt.tensors()), "engine": self._engine.state()})

    def load_state(self, state: State) -> None:
        """Go on from `state()`, which is copied."""
        self.prompt.load(_tensors(part_of_state(state, "prompt")))
        self._engine.load_state(part_of_state(state, "engine"))


@dataclass
class _Bench:
    """What one client keeps between rounds: its auxiliary weights, off the device, and an optimizer for each stage."""

    weights: Mapping[str, Tensor]
    alignment: TorchEngine
    tuning: TorchEngine


@dataclass(frozen=True)
class Shard:
    """One client's text, once for each stage, in an order of its own."""

    alignment: Batches
    tuning: Batches


class ShardError(ClientError):
    """A client's text cannot be trained on."""


def _arrays(tensors: Mapping[str, Tensor]) -> State:
    return {name: tensor.cpu().numpy() for name, tensor in tensors.items()}


def _tensors(state: State) -> dict[str, Tensor]:
    return {name: torch.from_numpy(value) for name, value in state.items()}


class Client:
    """Any number of owners of text that share one process: each aligns its auxiliary model, then tunes the prompts.

    Args:
        model: the auxiliary model, one for all: a client's weights are put into it while it works.
        handed_out: the weights that the server handed out, where every client begins.
        prompt: the prompts while a client works on them, of the auxiliary model's depth.
        shards: text by client id, or why it cannot be trained on.
        alignment, tuning: the two stages of a round.
        total_rounds: length of the schedules, in rounds.
        seed: of dropout.
        keep: whether auxiliary weights, optimizers and schedules live on from round to round; otherwise every round
            begins from the hand-out, with a schedule of its own.
        joint: both stages at once, in the steps of `tuning`, instead of one after the other.
        seconds: of one client's work in a round; when they are over, a stage ends after its step, the first one after
            its share of the steps. None: no limit.
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
    ) -> None:
        self._model, self._prompt, self._shards, self._seconds = model, prompt, shards, seconds
        self._handed_out = handed_out.torch()
        self._alignment, self._tuning, self._rounds = alignment, tuning, total_rounds
        self._seed, self._keep, self._joint = seed, keep, joint
        self._benches: dict[int, _Bench] = {}

    def local(self, client: int, round: int, down: NamedTensors) -> Update:
        """The two stages of one client's round, and the prompts that come of it.

        What the client keeps is renewed only when both stages went well; after an error it begins anew from the
        hand-out.

        Raises ClientError: NonFiniteError if a loss or the tuned prompt is not finite, OutOfMemoryError, ShardError.
        """
        start = time.perf_counter()
        bench, shard = self._benches.pop(client, None) or self._new_bench(), self._shards[client]
        if isinstance(shard, ShardError):
            raise shard
        with named_out_of_memory():
            model, prompt = self._stages(bench, shard, client, round, down, start)
            tensors = NamedTensors.pack(self._prompt.tensors())
            if not tensors.is_finite():
                raise NonFiniteError("the tuned prompt holds numbers that are not finite")
            if self._keep:
                self._benches[client] = self._put_away(bench)
        seconds = time.perf_counter() - start - model.seconds - prompt.seconds
        numbers = (model.first, model.last, prompt.first, prompt.last, model.seconds, prompt.seconds, seconds)
        return Update(client, float(prompt.samples), tensors, dict(zip(METRICS, numbers)))

    def _stages(
        self, bench: _Bench, shard: Shard, client: int, round: int, down: NamedTensors, start: float
    ) -> tuple[Trace, Trace]:
        """Align the auxiliary model with the prompts frozen, then tune the prompts with the auxiliary model frozen.

        Or both at once: then all is told as the prompts' stage.
        """
        auxiliary.load_weights(self._model, bench.weights)
        self._prompt.load(down.torch())
        for engine, stage in ((bench.alignment, self._alignment), (bench.tuning, self._tuning)):
            engine.to(self._model.device)
            engine.forget_gradient()  # of a client that failed in the middle of a step
            engine.steps_done = (round - 1) * self._steps(stage) if self._keep else 0
        middle, end = self._limits(start)

        if self._model.dropout:
            rng.seed_torch(self._seed, "client", round, client)
        if self._joint:
            self._prompt.requires_grad_(True)
            self._model.train_weights(True)
            both = Together(bench.alignment, bench.tuning)
            trace = tune(self._model, self._prompt, both, shard.tuning, self._tuning, round, end)
            self._model.train_weights(False)
            return Trace(), trace
        self._prompt.requires_grad_(False)
        self._model.train_weights(True)
        model = tune(self._model, self._prompt, bench.alignment, shard.alignment, self._alignment, round, middle)
        self._model.train_weights(False)
        self._prompt.requires_grad_(True)
        prompt = tune(self._model, self._prompt, bench.tuning, shard.tuning, self._tuning, round, end)
        return model, prompt

    def _steps(self, stage: StageConfig) -> int:
        return self._tuning.steps if self._joint else stage.steps

    def _limits(self, start: float) -> tuple[float | None, float | None]:
        if self._seconds is None:
            return None, None
        share = self._alignment.steps / (self._alignment.steps + self._tuning.steps)
        return start + share * self._seconds, start + self._seconds

    def has_state(self, client: int) -> bool:
        """Whether a client keeps something between rounds; before it has begun, it does not."""
        return client in self._benches

    def client_state(self, client: int) -> State:
        """What a client keeps between rounds."""
        bench = self._benches[client]
        parts = {
            "weights": _arrays(bench.weights),
            "alignment": bench.alignment.state(),
            "tuning": bench.tuning.state(),
        }
        return join_states(parts)

    def load_client_state(self, client: int, state: State) -> None:
        """Go on from `client_state()`, whose arrays are the client's from now on."""
        bench = self._new_bench()
        bench.alignment.load_state(part_of_state(state, "alignment"))
        bench.tuning.load_state(part_of_state(state, "tuning"))
        self._benches[client] = _Bench(_tensors(part_of_state(state, "weights")), bench.alignment, bench.tuning)

    def forget(self, client: int) -> None:
        """Drop what a client keeps."""
        self._benches.pop(client, None)

    def _new_bench(self) -> _Bench:
        """A beginning from the hand-out."""

        def engine(parameters: Iterable[nn.Parameter], stage: StageConfig) -> TorchEngine:
            return TorchEngine(parameters, stage.optimizer, self._steps(stage) * (self._rounds if self._keep else 1))

        return _Bench(
            self._handed_out,
            engine(self._model.weights.values(), self._alignment),
            engine(self._prompt.parameters(), self._tuning),
        )

    def _put_away(self, bench: _Bench) -> _Bench:
        """Copy the working weights off the device; the hand-out itself stays as it was."""
        working = self._model.weights.items()
        if bench.weights is self._handed_out:
            weights = {name: parameter.data.to("cpu", copy=True) for name, parameter in working}
        else:
            weights = {name: bench.weights[name].copy_(parameter.data) for name, parameter in working}
        bench.alignment.to(torch.device("cpu"))
        bench.tuning.to(torch.device("cpu"))
        return _Bench(weights, bench.alignment, bench.tuning)
