"""The server of every method in which prompts travel and are tuned by gradients."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from torch import nn

from fedsp_mpi.aggregation.fedavg import Updates
from fedsp_mpi.algorithms.base import Rule
from fedsp_mpi.algorithms.client_state import arrays, tensors
from fedsp_mpi.algorithms.prompt_distillation import PromptDistiller
from fedsp_mpi.config import StageConfig
from fedsp_mpi.log import RoundProgress
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.models.losses import answer_loss_of
from fedsp_mpi.models.prompts import DepthMap, Prompt
from fedsp_mpi.tensors import NamedTensors, State, join_states, part_of_state
from fedsp_mpi.training.engine import TorchEngine
from fedsp_mpi.training.loop import Batches, Trace, train
from fedsp_mpi.training.process_group import SINGLE_RANK, ServerGroup


class PromptServer:
    """Aggregates the clients' prompts and tunes the result on the global model (Algorithm 1).

    Run without clients it is the server-only control: the same steps, on the same batches, from the
    same first prompt.

    Args:
        model: the frozen global model.
        prompt: the first prompt, of the global model's depth.
        depths: converts prompts to the depth of the clients' model, at which they travel, and back.
        batches: the server's shard; None if it does not tune.
        stage: its tuning in each round.
        total_rounds: length of the learning-rate schedule, in rounds.
        rule: makes one prompt of many updates.
        group: the ranks that tune together, each on its part of the batches.
        progress: is told of every step of the tuning.
        distiller: teaches the global model to answer as the auxiliary model does with the merged
            prompt. With it, the merged prompt itself goes down again, and what the server tunes
            stays here.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompt: Prompt,
        depths: DepthMap,
        *,
        batches: Batches | None,
        stage: StageConfig,
        total_rounds: int,
        rule: Rule,
        group: ServerGroup = SINGLE_RANK,
        progress: RoundProgress | None = None,
        distiller: PromptDistiller | None = None,
    ) -> None:
        self.model = model
        self.prompt = prompt
        self._depths = depths
        self._batches = batches
        self._stage = stage
        self._rule = rule
        self._progress = progress or RoundProgress()
        self._distiller = distiller
        total_steps = stage.steps * total_rounds
        self._engine = TorchEngine(prompt.parameters(), stage.optimizer, total_steps, group=group)

    @property
    def tunes(self) -> bool:
        """Whether there is a shard, or a distiller, to tune with."""
        return self._batches is not None or self._distiller is not None

    def broadcast(self) -> NamedTensors:
        """Return the prompt at the depth of the clients' model."""
        if self._distiller:
            return NamedTensors.pack(self._distiller.client_prompt.tensors())
        return NamedTensors.pack(self._depths.down(self.prompt.tensors()))

    def aggregate(self, updates: Updates) -> NamedTensors:
        """Return one prompt of many, by the rule."""
        return self._rule(updates)

    def load_aggregate(self, aggregate: NamedTensors) -> None:
        """Make the merged prompt the server's own, at the depth of the global model."""
        self.prompt.load(self._depths.up(aggregate.torch(), self.prompt.tensors()))
        if self._distiller:
            self._distiller.set_teacher_prompt(aggregate)

    def server_update(self, round: int) -> Trace | None:
        """Tune the prompt on the global model, by distillation and then on the server's shard.

        Returns:
            The trace of the latter; None, if there is neither.
        """
        if self._distiller:
            self._distiller.distill(self.model, self.prompt, round)
        if self._batches is None:
            return Trace() if self._distiller else None
        self._progress.server(round)
        self._progress.stage("step", self._stage.steps)
        loss = partial(answer_loss_of, self.model, self.prompt)
        return train(
            self._engine,
            self._batches,
            loss,
            first_step=(round - 1) * self._stage.steps,
            num_steps=self._stage.steps,
            device=self.model.device,
            on_step=self._progress.step,
        )

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return the prompt's parameters."""
        return self.prompt.parameters()

    def export(self) -> NamedTensors:
        """Return a copy of the prompt at the depth of the global model."""
        return NamedTensors.pack(self.prompt.tensors())

    def restore(self, exported: NamedTensors) -> None:
        """Copy in a prompt that `export` returned."""
        self.prompt.load(exported.torch())

    def state(self) -> State:
        """Return all that the next round depends on."""
        parts = {"prompt": arrays(self.prompt.tensors()), "engine": self._engine.state()}
        if self._distiller:
            parts["translator"] = self._distiller.state()
        return join_states(parts)

    def load_state(self, state: State) -> None:
        """Continue from `state()`, which is copied."""
        self.prompt.load(tensors(part_of_state(state, "prompt")))
        self._engine.load_state(part_of_state(state, "engine"))
        if self._distiller:
            self._distiller.load_state(part_of_state(state, "translator"))
