"""The messengers' way into the global model: it learns to answer as the auxiliary model does under
the merged prompts.

A prompt steers the model that it was tuned on; in another one of other depth it steers less well.
But the server holds both models, so it can ask the auxiliary one, under the merged prompts, about
text of its own, and tune the global model's prompts towards those answers: distillation (Hinton et
al., 2015) from a weak teacher into a strong student (Burns et al., 2023, arXiv 2312.09390), in
which the strong one keeps what it knows better. Not in the FedSP paper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedsp_mpi.algorithms.client_state import arrays, tensors
from fedsp_mpi.config import StageConfig
from fedsp_mpi.models.backbone import LanguageModel
from fedsp_mpi.models.losses import logits_loss
from fedsp_mpi.models.prompts import Prompt
from fedsp_mpi.tensors import Batch, NamedTensors, State
from fedsp_mpi.training.engine import TorchEngine
from fedsp_mpi.training.loop import Batches, Trace, num_answer_tokens, train


class PromptDistiller:
    """The auxiliary model at the server, under the merged prompts, as the teacher of the global
    model's prompts.

    Args:
        teacher: the auxiliary model as it was handed out, frozen.
        messengers: prompts of its depth; what is in them goes down to the clients.
        batches: questions about the server's own text; their targets only say where an answer is
            due.
        stage: steps of a round. Each round has a schedule of its own, because the last messengers
            are the best ones.
    """

    def __init__(
        self, teacher: LanguageModel, messengers: Prompt, batches: Batches, stage: StageConfig
    ) -> None:
        self.messengers = messengers.requires_grad_(False)
        self._teacher, self._batches, self._stage = teacher, batches, stage
        teacher.train_weights(False)

    def translate(self, model: LanguageModel, prompt: Prompt, round: int) -> Trace:
        """Tune `prompt` on the global model towards the teacher's answers; the loss is their KL
        divergence.
        """
        engine = TorchEngine(prompt.parameters(), self._stage.optimizer, self._stage.steps)

        def loss(batch: Batch) -> Tensor:
            with torch.no_grad():
                taught, _ = self._teacher.answer_logits(batch, self.messengers)
            answered, _ = model.answer_logits(batch, prompt)
            return logits_loss(answered, taught, temperature=1.0)

        first = (round - 1) * self._stage.steps
        return train(
            engine, self._batches, first, self._stage.steps, loss, num_answer_tokens, model.device
        )

    def hear(self, merged: NamedTensors) -> None:
        """Let these be the messengers."""
        self.messengers.load(merged.torch())

    def state(self) -> State:
        """Everything that the next round depends on."""
        return arrays(self.messengers.tensors())

    def load_state(self, state: State) -> None:
        """Go on from `state()`, which is copied."""
        self.messengers.load(tensors(state))
