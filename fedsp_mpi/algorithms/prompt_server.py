"""Tuning a soft prompt against a model, and the server of every method whose messengers are
prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from fedsp_mpi.aggregation.fedavg import Updates
from fedsp_mpi.algorithms.client_state import arrays, tensors
from fedsp_mpi.algorithms.prompt_distillation import PromptDistiller
from fedsp_mpi.config import StageConfig
from fedsp_mpi.models.backbone import LanguageModel
from fedsp_mpi.models.losses import answer_loss
from fedsp_mpi.models.prompts import DepthMap, Prompt
from fedsp_mpi.tensors import Batch, NamedTensors, State, join_states, part_of_state
from fedsp_mpi.training.engine import TorchEngine
from fedsp_mpi.training.loop import Batches, Engine, Trace, num_answer_tokens, train
from fedsp_mpi.training.process_group import SINGLE_RANK, ServerGroup


def tune(
    model: LanguageModel,
    prompt: Prompt | None,
    engine: Engine,
    batches: Batches,
    stage: StageConfig,
    round: int,
    until: float | None = None,
    on_step: Callable[[Tensor], None] | None = None,
) -> Trace:
    """Take a round's steps on the answers' cross entropy; what moves is what the engine owns and
    needs a gradient.

    A round's batches follow from its number, whoever took part in the rounds before. `until`,
    `on_step`: see `train`.
    """

    def loss(batch: Batch) -> Tensor:
        return answer_loss(*model.answer_logits(batch, prompt))

    first = (round - 1) * stage.steps
    return train(
        engine, batches, first, stage.steps, loss, num_answer_tokens, model.device, on_step, until
    )


class Server:
    """Owns the global model and the prompts: merges what the clients learned, then tunes it on the
    global model.

    Run without clients it is the server-only control: the same steps, on the same batches, from the
    same first prompts.

    Args:
        model: the frozen global model.
        prompt: the first prompts, of the global model's depth.
        depths: how prompts come to the depth of the clients' model, at which they travel, and back.
        batches: the server's shard; None if it does not tune.
        stage: its tuning in each round.
        total_rounds: length of the schedule, in rounds.
        rule: makes one prompt of many updates.
        team: the ranks that tune together, each on its part of the batches.
        translator: tells the global model what the merged prompts mean on the auxiliary one; None:
            they have to speak for themselves. With it, what goes down again is what was merged, and
            the server's own tuning stays here.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompt: Prompt,
        depths: DepthMap,
        batches: Batches | None,
        stage: StageConfig,
        total_rounds: int,
        rule: Callable[[Updates], NamedTensors],
        team: ServerGroup = SINGLE_RANK,
        translator: PromptDistiller | None = None,
    ) -> None:
        self.model, self.prompt, self._depths, self._translator = model, prompt, depths, translator
        self._batches, self._stage, self._rule = batches, stage, rule
        self._engine = TorchEngine(
            prompt.parameters(), stage.optimizer, stage.steps * total_rounds, team
        )

    def broadcast(self) -> NamedTensors:
        """The prompts as they go down: at the depth of the clients' model."""
        if self._translator:
            return NamedTensors.pack(self._translator.messengers.tensors())
        return NamedTensors.pack(self._depths.down(self.prompt.tensors()))

    def merge(self, updates: Updates) -> NamedTensors:
        """One prompt of many, by the rule given."""
        return self._rule(updates)

    def take(self, merged: NamedTensors) -> None:
        """Let the merged prompts be the server's, at the depth of the global model."""
        self.prompt.load(self._depths.up(merged.torch(), self.prompt.tensors()))
        if self._translator:
            self._translator.hear(merged)

    def absorb(self, round: int) -> Trace:
        """Tune the prompts on the frozen global model: towards the messengers' answers, then on the
        server's shard.

        The trace is that of the latter.
        """
        if self._translator:
            self._translator.translate(self.model, self.prompt, round)
        if self._batches is None:
            return Trace()
        return tune(self.model, self.prompt, self._engine, self._batches, self._stage, round)

    def parameters(self) -> Iterable[nn.Parameter]:
        """What is tuned."""
        return self.prompt.parameters()

    def tuned(self) -> NamedTensors:
        """A copy of the prompts at the depth of the global model."""
        return NamedTensors.pack(self.prompt.tensors())

    def load(self, tuned: NamedTensors) -> None:
        """Copy such prompts in."""
        self.prompt.load(tuned.torch())

    def state(self) -> State:
        """Everything that the next round depends on."""
        parts = {"prompt": arrays(self.prompt.tensors()), "engine": self._engine.state()}
        return join_states(
            parts | ({"translator": self._translator.state()} if self._translator else {})
        )

    def load_state(self, state: State) -> None:
        """Go on from `state()`, which is copied."""
        self.prompt.load(tensors(part_of_state(state, "prompt")))
        self._engine.load_state(part_of_state(state, "engine"))
        if self._translator:
            self._translator.load_state(part_of_state(state, "translator"))
