"""Compare the auxiliary model's gradients with the global model's.

Prompts that are tuned on the auxiliary model help the global one only if both models want them
moved in the same direction. So the gradients of both are compared at the same prompts, on the same
text, before and after some steps on either model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from fedsp_mpi.comm import Topology
from fedsp_mpi.commands.bench_local import require_one_source
from fedsp_mpi.config import Config
from fedsp_mpi.evaluation.scoring import answer_loss_mean
from fedsp_mpi.log import Log
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.models.losses import answer_loss, answer_loss_of
from fedsp_mpi.models.prompts import Prompt
from fedsp_mpi.record.lock import RunLock
from fedsp_mpi.report import formatting
from fedsp_mpi.run import auxiliary_model, build
from fedsp_mpi.run.inputs import ExperimentInputs
from fedsp_mpi.tensors import Batch
from fedsp_mpi.training.device import Compute
from fedsp_mpi.training.engine import TorchEngine
from fedsp_mpi.training.loop import train
from fedsp_mpi.training.process_group import SINGLE_RANK

FOLDER = "bench-transfer"
_NUM_STEPS_COMPARED = 4  # steps whose batches the gradients are computed on


@dataclass(frozen=True)
class TransferPoint:
    """What is measured at one prompt.

    Attributes:
        name: says which prompt.
        loss: of the global model on the validation split, nats per token.
        auxiliary_loss: the same of the auxiliary model.
        cosine: of the two models' gradients by the prompt, at the auxiliary model's depth.
        ceiling: of the global model's gradients on two halves of the text (four batches; the halves
            are alike if client 0 owns less): the best that can be hoped for.
    """

    name: str
    loss: float
    auxiliary_loss: float
    cosine: float
    ceiling: float


def transfer(config: Config, steps: int, log: Log) -> list[TransferPoint]:
    """Compare both models at the first prompt, and after some steps on either model.

    The auxiliary model is made as a run makes it, in `FOLDER` below run.folder, where later calls
    with the same recipe find it. The text is client 0's.

    Args:
        config: checked.
        steps: of client.tuning.
        log: gets the progress of the distillation.

    Raises:
        ValueError: a mistake in model, data or steps, or there is a run in that folder.
    """
    if steps < 1:
        raise ValueError(f"--steps: found {steps}, expected at least 1")
    require_one_source(config)
    if config.tunes_weights or not config.federation.clients:
        raise ValueError(
            "method, federation.clients: found no clients with prompts, whose transfer "
            "could be measured"
        )
    folder = Path(config.run.folder) / FOLDER
    if (folder / "run.h5").exists():
        raise ValueError(
            f"{folder}: found a run, expected a folder for the auxiliary model of `bench "
            "transfer`; choose another run.folder"
        )
    materials = ExperimentInputs(config)
    materials.check()
    compute = Compute.of(config.server.compute, Topology.alone())
    compute.begin()
    large = build.global_model(materials, compute)
    lock = RunLock.take(folder, config.run.permissions == "private")
    small, _ = auxiliary_model.auxiliary_model(
        materials,
        large,
        compute,
        group=SINGLE_RANK,
        folder=folder,
        log=log,
        stop=lambda: False,
        is_resumed=False,
    )
    lock.release()
    small.train_weights(False)
    return _ModelPair(materials, large, small, steps=steps).measure()


class _ModelPair:
    """A global model and its auxiliary one.

    Args:
        materials: of the experiment.
        large: the global model.
        small: the auxiliary model, on the same device.
        steps: of prompt tuning on either.
    """

    def __init__(
        self,
        materials: ExperimentInputs,
        large: LanguageModel,
        small: LanguageModel,
        *,
        steps: int,
    ) -> None:
        self._materials = materials
        self._large = large
        self._small = small
        self._first_prompt = materials.first_prompt(large).to(large.device)
        self._stage = replace(materials.config.client.tuning, steps=steps)
        batches = materials.batches(1, self._stage, "transfer")
        self._text = [batch for step in range(_NUM_STEPS_COMPARED) for batch in batches.step(step)]

    def measure(self) -> list[TransferPoint]:
        """Measure at the first prompt, and at those that each model tunes."""
        first_prompt = self._at_depth_of(self._small, self._first_prompt)
        points = [self._measure_at("first prompts", first_prompt)]
        for name, model in (
            ("the auxiliary model", self._small),
            ("the global model", self._large),
        ):
            prompt = self._at_depth_of(model, self._first_prompt)
            engine = TorchEngine(prompt.parameters(), self._stage.optimizer, self._stage.steps)
            train(
                engine,
                self._materials.batches(1, self._stage, "prompt"),
                partial(answer_loss_of, model, prompt),
                first_step=0,
                num_steps=self._stage.steps,
                device=model.device,
            )
            tuned = self._at_depth_of(self._small, prompt)
            points.append(self._measure_at(f"{self._stage.steps} steps on {name}", tuned))
        return points

    def _measure_at(self, name: str, prompt: Prompt) -> TransferPoint:
        """Measure at a prompt of the auxiliary model's depth."""
        large_prompt = self._at_depth_of(self._large, prompt)
        half = len(self._text) // 2
        first_half = self._gradient(self._large, large_prompt, self._text[:half])
        second_half = self._gradient(self._large, large_prompt, self._text[half:])
        large_gradient = {key: first_half[key] + second_half[key] for key in first_half}
        small_gradient = self._gradient(self._small, prompt, self._text)
        return TransferPoint(
            name=name,
            loss=self._validation_loss(self._large, large_prompt),
            auxiliary_loss=self._validation_loss(self._small, prompt),
            cosine=cosine(large_gradient, small_gradient),
            ceiling=cosine(first_half, second_half),
        )

    def _at_depth_of(self, model: LanguageModel, prompt: Prompt) -> Prompt:
        """Copy a prompt to the depth of a model.

        Layers that only the global model has get the first prompt.
        """
        depths = self._materials.depth_map
        tensors = prompt.tensors()
        if model is self._small:
            spec = depths.small
            if prompt.spec != spec:
                tensors = depths.down(tensors)
        else:
            spec = depths.spec
            if prompt.spec != spec:
                tensors = depths.up(tensors, self._first_prompt.tensors())
        copy = Prompt(spec).to(model.device)
        copy.load(tensors)
        return copy

    def _gradient(
        self, model: LanguageModel, prompt: Prompt, text: Sequence[Batch]
    ) -> dict[str, Tensor]:
        """Return the gradient of the loss by the prompt, at the auxiliary model's depth.

        Args:
            model: either of the two.
            prompt: at the model's depth.
            text: batches, whose gradients are summed.

        Returns:
            By parameter, each tensor of the parameter's shape and dtype.
        """
        prompt.zero_grad()
        for batch in text:
            answer_loss(*model.answer_logits(batch.to(model.device), prompt)).backward()
        gradient = {
            name: parameter.grad
            for name, parameter in prompt.named_parameters()
            if parameter.grad is not None
        }
        depths = self._materials.depth_map
        return gradient if prompt.spec == depths.small else depths.down(gradient)

    def _validation_loss(self, model: LanguageModel, prompt: Prompt) -> float:
        batch_tokens = self._materials.config.evaluation.batch_tokens
        return answer_loss_mean(
            model, prompt, self._materials.validation, batch_tokens=batch_tokens
        )


def cosine(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Return the cosine of two sets of tensors, each taken as one vector, computed in fp64.

    Args:
        first: by name a prompt's parameters or gradients, [num_tokens, row_width] for `prompt`.
        second: of the same names and shapes.

    Returns:
        The cosine; nan if one of the vectors is zero.
    """
    product = 0.0
    first_square = 0.0
    second_square = 0.0
    for name in first:
        a = first[name].double()
        b = second[name].double()
        product += float((a * b).sum())
        first_square += float((a * a).sum())
        second_square += float((b * b).sum())
    squares = first_square * second_square
    return product / math.sqrt(squares) if squares else math.nan


def table(points: Sequence[TransferPoint]) -> str:
    """Write the measurements as plain text."""
    head = ["prompts", "global loss", "auxiliary", "cosine", "ceiling"]
    body = [
        [
            point.name,
            formatting.as_decimal(point.loss),
            formatting.as_decimal(point.auxiliary_loss),
            formatting.as_decimal(point.cosine, 3),
            formatting.as_decimal(point.ceiling, 3),
        ]
        for point in points
    ]
    legend = [
        "losses on the validation split, nats per token; cosine of the two models' gradients by",
        "the prompts, on the same text; ceiling: cosine of the global model's gradients on two",
        "halves of that text",
    ]
    return "\n".join([*formatting.table(head, body), *legend])
