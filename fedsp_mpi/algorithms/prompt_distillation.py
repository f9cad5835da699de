"""Distillation from the auxiliary model, with the merged prompt, into the global model's prompt.

A prompt steers the model that it was tuned on; in another one, of other depth, it steers less well.
But the server holds both models. It can ask the auxiliary one, with the merged prompt, about text
of its own, and tune the global model's prompt towards those answers: distillation (Hinton et al.,
2015) from a weak teacher into a strong student (Burns et al., 2023, arXiv 2312.09390), which keeps
what it knows better. Not in the FedSP paper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedsp_mpi.algorithms.client_state import arrays, tensors
from fedsp_mpi.config import StageConfig
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.models.losses import logits_loss
from fedsp_mpi.models.prompts import Prompt
from fedsp_mpi.tensors import Batch, NamedTensors, State
from fedsp_mpi.training.engine import TorchEngine
from fedsp_mpi.training.loop import Batches, Trace, train


class PromptDistiller:
    """The auxiliary model at the server, with the merged prompt, as the teacher.

    Args:
        teacher: the auxiliary model as it was handed out; is frozen here.
        client_prompt: of its depth; what is in it goes down to the clients.
        batches: questions about the server's own text; their targets only say where an answer is
            due.
        stage: steps of a round. Each round has a schedule of its own, because the last teacher is
            the best one.
    """

    def __init__(
        self, teacher: LanguageModel, client_prompt: Prompt, batches: Batches, *, stage: StageConfig
    ) -> None:
        self.client_prompt = client_prompt.requires_grad_(False)
        self._teacher = teacher
        self._batches = batches
        self._stage = stage
        teacher.train_weights(False)

    def distill(self, model: LanguageModel, prompt: Prompt, round: int) -> Trace:
        """Tune a prompt on the global model; the loss is the KL divergence from the teacher.

        Args:
            model: the global model, frozen.
            prompt: of its depth; is tuned in place.
            round: whose batches are taken.
        """
        engine = TorchEngine(prompt.parameters(), self._stage.optimizer, self._stage.steps)

        def loss(batch: Batch) -> Tensor:
            with torch.no_grad():
                teacher_logits, _ = self._teacher.answer_logits(batch, self.client_prompt)
            logits, _ = model.answer_logits(batch, prompt)
            return logits_loss(logits, teacher_logits, temperature=1.0)

        return train(
            engine,
            self._batches,
            loss,
            first_step=(round - 1) * self._stage.steps,
            num_steps=self._stage.steps,
            device=model.device,
        )

    def set_teacher_prompt(self, merged: NamedTensors) -> None:
        """Let the teacher, and the clients in the next round, have the merged prompt."""
        self.client_prompt.load(merged.torch())

    def state(self) -> State:
        """Return all that the next round depends on."""
        return arrays(self.client_prompt.tensors())

    def load_state(self, state: State) -> None:
        """Continue from `state()`, which is copied."""
        self.client_prompt.load(tensors(state))
