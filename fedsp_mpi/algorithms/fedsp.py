"""FedSP (Dong et al., 2023, arXiv 2311.06805): soft prompts travel, model and text stay.

FedPrompt (Zhao et al., 2023, arXiv 2208.12268) is the same method with clients that hold the whole
model and do not train it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

from fedsp_mpi import rng
from fedsp_mpi.algorithms.base import (
    ClientContext,
    HandedOut,
    Method,
    MethodInputs,
    Server,
    ServerContext,
    ShardError,
)
from fedsp_mpi.algorithms.client_state import ClientState, ClientStates
from fedsp_mpi.algorithms.prompt_distillation import PromptDistiller
from fedsp_mpi.algorithms.prompt_server import PromptServer
from fedsp_mpi.config import StageConfig
from fedsp_mpi.data.tokens import Batches, Text
from fedsp_mpi.log import RoundProgress
from fedsp_mpi.models import auxiliary
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.models.losses import answer_loss_of
from fedsp_mpi.models.prompts import Prompt
from fedsp_mpi.tensors import NamedTensors, Update
from fedsp_mpi.training.device import max_padding, oom_as_client_error
from fedsp_mpi.training.engine import JointEngine, TorchEngine
from fedsp_mpi.training.loop import Engine, NonFiniteError, Trace, train


@dataclass(frozen=True)
class Shard:
    """One client's text in batches, in an order of its own for each stage."""

    alignment: Batches
    tuning: Batches


@dataclass(frozen=True)
class LocalTraining:
    """What a client does in a round (section 3.3, alternating training).

    Attributes:
        alignment: trains the auxiliary model, with the prompt frozen; without steps the model stays
            as handed out.
        tuning: trains the prompt, with the auxiliary model frozen.
        joint: train both at once, in the steps of `tuning`, instead of one after the other.
        total_rounds: length of the learning-rate schedules, in rounds.
        keep_state: whether weights, optimizers and schedules live on from round to round; otherwise
            every round begins from the hand-out, with a schedule of its own.
        seed: of dropout.
        proximal: FedProx's mu, for the prompt; see `TorchEngine`.
        max_seconds: of one client's work in a round. When they are over, a stage ends after its
            step; alignment has its share of them. None: no limit.
    """

    alignment: StageConfig
    tuning: StageConfig
    joint: bool
    total_rounds: int
    keep_state: bool
    seed: int
    proximal: float = 0.0
    max_seconds: float | None = None

    def num_steps(self, stage: str) -> int:
        """Return the steps that a stage takes in a round."""
        if stage == "alignment" and not self.joint:
            return self.alignment.steps
        return self.tuning.steps

    def alignment_seconds(self) -> float | None:
        """Return the share of `max_seconds` that alignment has."""
        if self.max_seconds is None:
            return None
        total_steps = self.alignment.steps + self.tuning.steps
        return self.alignment.steps / total_steps * self.max_seconds


class Client:
    """All clients of one process: each aligns its auxiliary model, then tunes the prompt.

    Args:
        model: the auxiliary model, which all clients share while they work.
        initial: the weights that the server handed out, where every client begins.
        prompt: of the auxiliary model's depth; a client tunes it in place.
        shards: text by client id, or why it cannot be trained on.
        make_shard: cuts a client's other texts into batches.
        training: what a client does in a round.
        progress: is told of every step.

    Attributes:
        states: what clients keep between rounds.
    """

    def __init__(
        self,
        model: LanguageModel,
        initial: NamedTensors,
        prompt: Prompt,
        *,
        shards: Mapping[int, Shard | ShardError],
        make_shard: Callable[[int, Sequence[Text]], Shard],
        training: LocalTraining,
        progress: RoundProgress | None = None,
    ) -> None:
        self.model = model
        self.prompt = prompt
        self._shards = dict(shards)
        self._make_shard = make_shard
        self._training = training
        self._progress = progress or RoundProgress()
        self.states = ClientStates(
            model,
            initial,
            self._build_engines,
            trains_model=training.joint or training.alignment.steps > 0,
            keep=training.keep_state,
        )

    def local_update(self, client: int, round: int, broadcast: NamedTensors) -> Update:
        """Train one client on its own text, starting from the broadcast prompt.

        See `base.Client.local_update`. What the client keeps is stored only when all went well;
        after an error it begins anew from the hand-out.

        Raises:
            ClientError: NonFiniteError if a loss or the tuned prompt is not finite,
                OutOfMemoryError, ShardError.
        """
        start = time.perf_counter()
        shard = self._shards[client]
        if isinstance(shard, ShardError):
            raise shard
        with oom_as_client_error():
            state = self.states.restore(client)
            self._begin_round(state, client, round, broadcast=broadcast)

            # --- align the auxiliary model, the prompt frozen ---
            aligned = Trace()
            if not self._training.joint:
                self._select_trained(model=True, prompt=False)
                self._progress.stage("alignment step", self._training.alignment.steps)
                aligned = train(
                    state.engines["alignment"],
                    shard.alignment,
                    partial(answer_loss_of, self.model, self.prompt),
                    first_step=(round - 1) * self._training.alignment.steps,
                    num_steps=self._training.alignment.steps,
                    device=self.model.device,
                    on_step=self._progress.step,
                    until=_later(start, self._training.alignment_seconds()),
                )

            # --- tune the prompt, the auxiliary model frozen (joint: both) ---
            engine: Engine = state.engines["tuning"]
            if self._training.joint:
                engine = JointEngine(*state.engines.values())
            self._select_trained(model=self._training.joint, prompt=True)
            self._progress.stage(
                "step" if self._training.joint else "tuning step", self._training.tuning.steps
            )
            with nullcontext() if self._training.joint else self.model.frozen():
                tuned = train(
                    engine,
                    shard.tuning,
                    partial(answer_loss_of, self.model, self.prompt),
                    first_step=(round - 1) * self._training.tuning.steps,
                    num_steps=self._training.tuning.steps,
                    device=self.model.device,
                    on_step=self._progress.step,
                    until=_later(start, self._training.max_seconds),
                )
            self.model.train_weights(False)

            tensors = NamedTensors.pack(self.prompt.tensors())
            if not tensors.is_finite():
                raise NonFiniteError("the tuned prompt holds numbers that are not finite")
            self.states.store(client, state)
        seconds = time.perf_counter() - start
        metrics = {
            "loss_model_first": aligned.first,
            "loss_model_last": aligned.last,
            "loss_prompt_first": tuned.first,
            "loss_prompt_last": tuned.last,
            "seconds_model": aligned.seconds,
            "seconds_prompt": tuned.seconds,
            "seconds_other": seconds - aligned.seconds - tuned.seconds,
        }
        return Update(client, float(tuned.samples), tensors, metrics)

    def hold(self, client: int, broadcast: NamedTensors) -> None:
        """Load a client's auxiliary model and the broadcast prompt; see `base.Client.hold`."""
        self.states.show(client)
        self.prompt.load(broadcast.torch())
        self._select_trained(model=False, prompt=False)

    def train_on(self, client: int, texts: Sequence[Text]) -> None:
        """Train a client on these texts from now on; see `base.TextClient`."""
        self._shards[client] = self._make_shard(client, texts)

    def _begin_round(
        self, state: ClientState, client: int, round: int, *, broadcast: NamedTensors
    ) -> None:
        self.prompt.load(broadcast.torch())
        for stage, engine in state.engines.items():
            previous_rounds = round - 1 if self._training.keep_state else 0
            engine.steps_done = previous_rounds * self._training.num_steps(stage)
        state.engines["tuning"].anchor()
        if self.model.dropout:
            rng.seed_torch(self._training.seed, "client", round, client)

    def _select_trained(self, *, model: bool, prompt: bool) -> None:
        self.prompt.requires_grad_(prompt)
        self.model.train_weights(model)

    def _build_engines(self) -> dict[str, TorchEngine]:
        training = self._training
        rounds = training.total_rounds if training.keep_state else 1
        alignment = TorchEngine(
            self.model.weights.values(),
            training.alignment.optimizer,
            training.num_steps("alignment") * rounds,
        )
        tuning = TorchEngine(
            self.prompt.parameters(),
            training.tuning.optimizer,
            training.num_steps("tuning") * rounds,
            proximal=training.proximal,
        )
        return {"alignment": alignment, "tuning": tuning}


def _later(start: float, seconds: float | None) -> float | None:
    return None if seconds is None else start + seconds


# -- the method ------------------------------------------------------------------------------------


class FedSP(Method):
    """Prompts travel; clients hold the auxiliary model."""

    metrics = (
        "loss_model_first",
        "loss_model_last",
        "loss_prompt_first",
        "loss_prompt_last",
        "seconds_model",
        "seconds_prompt",
        "seconds_other",
    )

    def build_server(self, context: ServerContext) -> Server:
        """Return the server that tunes the merged prompt on the global model (Algorithm 1)."""
        inputs = context.inputs
        config = inputs.config
        prompt = inputs.first_prompt(context.model).to(context.compute.device)
        distiller = None
        if context.client_model is not None and config.translates:
            distiller = _prompt_distiller(inputs, context.client_model, prompt)
        return PromptServer(
            context.model,
            prompt,
            inputs.depth_map,
            batches=context.batches(),
            stage=config.server.tuning,
            total_rounds=config.federation.rounds,
            rule=context.rule,
            group=context.group,
            distiller=distiller,
            progress=context.progress,
        )

    def hand_out(
        self, inputs: MethodInputs, server: Server, client_model: LanguageModel
    ) -> HandedOut:
        """Return the auxiliary model and the first prompt; see `Method.hand_out`."""
        prompt = server.broadcast()
        weights = auxiliary.pack(client_model)
        return HandedOut(
            model_config=auxiliary.cell_config(inputs.model_config, inputs.config.auxiliary),
            tensors=NamedTensors.join({"auxiliary/": weights, "prompt/": prompt}),
            down=prompt.schema,
            up=prompt.schema,
        )

    def build_client(self, context: ClientContext) -> Client:
        """Return the clients of one process."""
        inputs = context.inputs
        config = inputs.config
        model = context.build_model(config.auxiliary.dropout)
        if not config.clients_train_weights:
            model = model.round_weights()
        prompt = Prompt(inputs.prompt_spec.at_depth(context.depth))

        def read_shard(client: int, texts: Sequence[Text] | None = None) -> Shard:
            owner = client + 1
            return Shard(
                inputs.batches(owner, config.client.alignment, "alignment", texts=texts),
                inputs.batches(owner, config.client.tuning, "prompt", texts=texts),
            )

        return Client(
            model,
            context.tensors.select("auxiliary/"),
            prompt.to(context.compute.device),
            shards=context.shards(read_shard),
            make_shard=read_shard,
            training=LocalTraining(
                alignment=config.client.alignment,
                tuning=config.client.tuning,
                joint=config.client.training == "joint",
                total_rounds=config.federation.rounds,
                keep_state=config.federation.client_state == "kept",
                seed=config.run.seed,
                proximal=config.client.proximal,
                max_seconds=config.federation.client_seconds,
            ),
            progress=context.progress,
        )


def _prompt_distiller(
    inputs: MethodInputs, client_model: LanguageModel, prompt: Prompt
) -> PromptDistiller:
    """Build the auxiliary model's part as the teacher of the global model's prompt."""
    stage = inputs.config.server.translation
    client_prompt = Prompt(inputs.depth_map.small).to(client_model.device)
    client_prompt.load(inputs.depth_map.down(prompt.tensors()))
    batches = Batches(
        inputs.server_questions,
        stage.batch_size,
        stage.micro_batch,
        seed=inputs.config.run.seed,
        purpose="translation",
        max_padding=max_padding(stage, client_model.device.type),
    )
    teacher = client_model
    if client_model.casts:  # the model itself is still to be handed out in full precision
        teacher = copy.deepcopy(client_model).round_weights()
    return PromptDistiller(teacher, client_prompt, batches, stage=stage)


METHOD = FedSP()
