"""Whether the auxiliary model points prompts the right way: its gradients beside the global
model's.

Prompts that are tuned on the auxiliary model help the global one only if both models want them
moved the same way. So the gradients of both are compared at the same prompts, on the same text,
before and after some steps on either model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from fedsp_mpi.comm import Topology
from fedsp_mpi.config import Config
from fedsp_mpi.evaluation.scoring import answer_loss_mean
from fedsp_mpi.log import Log
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.models.losses import answer_loss, answer_loss_of
from fedsp_mpi.models.prompts import Prompt
from fedsp_mpi.record.lock import RunLock
from fedsp_mpi.run import auxiliary_model, build
from fedsp_mpi.run.inputs import ExperimentInputs
from fedsp_mpi.tensors import Batch
from fedsp_mpi.training.device import Compute
from fedsp_mpi.training.engine import TorchEngine
from fedsp_mpi.training.loop import train
from fedsp_mpi.training.process_group import SINGLE_RANK

FOLDER = "bench-transfer"
_BATCHES = 4  # whose gradients are compared


@dataclass(frozen=True)
class Place:
    """What is found at some prompts.

    Attributes:
        name: which prompts. loss, auxiliary_loss: on the validation split, of the global model and
            of the auxiliary one, nats a token.
        cosine: of the two models' gradients by the prompts, at the auxiliary model's depth.
        ceiling: of the global model's own gradients on two halves of the text (four batches; the
            halves are alike if client 0 owns less): more cannot be hoped for.
    """

    name: str
    loss: float
    auxiliary_loss: float
    cosine: float
    ceiling: float


def transfer(config: Config, steps: int, log: Log) -> list[Place]:
    """Compare both models at the first prompts, and after `steps` of client.tuning on either, on
    client 0's text.

    The auxiliary model is made as a run makes it, into `FOLDER` below run.folder, where later runs
    of the same recipe find it.

    Raises ValueError for a mistake in model, data or steps, or if a run lives in that folder.
    """
    if steps < 1:
        raise ValueError(f"--steps: found {steps}, expected at least 1")
    if config.tunes_weights or not config.federation.clients:
        raise ValueError(
            "method, federation.clients: found no clients with prompts, whose transfer "
            "could be measured"
        )
    if (Path(config.run.folder) / FOLDER / "run.h5").exists():
        raise ValueError(
            f"{Path(config.run.folder) / FOLDER}: found a run, expected a folder for the "
            "auxiliary model of `bench "
            "transfer`; choose another run.folder"
        )
    materials = ExperimentInputs(config)
    materials.check()
    compute = Compute.of(config.server.compute, Topology.alone())
    compute.begin()
    large = build.global_model(materials, compute)
    folder = Path(config.run.folder) / FOLDER
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
    return _Pair(materials, large, small, steps).places()


class _Pair:
    """A global model and its auxiliary one."""

    def __init__(
        self, materials: ExperimentInputs, large: LanguageModel, small: LanguageModel, steps: int
    ) -> None:
        self._materials, self._large, self._small = materials, large, small
        self._first = materials.first_prompt(large).to(large.device)
        self._stage = replace(materials.config.client.tuning, steps=steps)
        batches = materials.batches(1, self._stage, "transfer")
        self._text = [batch for index in range(_BATCHES) for batch in batches.step(index)]

    def places(self) -> list[Place]:
        """The first prompts, and where each model leads them."""
        steps = self._stage.steps
        first = self._first
        found = [self._place("first prompts", self._fitted(first, self._small))]
        for name, model in (
            ("the auxiliary model", self._small),
            ("the global model", self._large),
        ):
            prompt = self._fitted(first, model)
            engine = TorchEngine(prompt.parameters(), self._stage.optimizer, steps)
            train(
                engine,
                self._materials.batches(1, self._stage, "prompt"),
                partial(answer_loss_of, model, prompt),
                first_step=0,
                num_steps=steps,
                device=model.device,
            )
            found.append(self._place(f"{steps} steps on {name}", self._fitted(prompt, self._small)))
        return found

    def _place(self, name: str, prompt: Prompt) -> Place:
        above, half = self._fitted(prompt, self._large), len(self._text) // 2
        parts = [
            self._gradient(self._large, above, some)
            for some in (self._text[:half], self._text[half:])
        ]
        whole = {name: parts[0][name] + parts[1][name] for name in parts[0]}
        own = self._gradient(self._small, prompt, self._text)
        losses = (self._loss(self._large, above), self._loss(self._small, prompt))
        return Place(name, *losses, cosine(whole, own), cosine(*parts))

    def _fitted(self, prompt: Prompt, model: LanguageModel) -> Prompt:
        """The same prompts at the depth of a model; layers that only the global model has keep the
        first prompts.
        """
        depths = self._materials.depth_map
        tensors, spec = prompt.tensors(), depths.small if model is self._small else depths.spec
        if prompt.spec != spec:
            tensors = (
                depths.down(tensors)
                if model is self._small
                else depths.up(tensors, self._first.tensors())
            )
        fitted = Prompt(spec).to(model.device)
        fitted.load(tensors)
        return fitted

    def _gradient(
        self, model: LanguageModel, prompt: Prompt, text: Sequence[Batch]
    ) -> dict[str, Tensor]:
        prompt.zero_grad()
        for batch in text:
            answer_loss(*model.answer_logits(batch.to(model.device), prompt)).backward()
        found = {name: p.grad for name, p in prompt.named_parameters() if p.grad is not None}
        return (
            found
            if prompt.spec == self._materials.depth_map.small
            else self._materials.depth_map.down(found)
        )

    def _loss(self, model: LanguageModel, prompt: Prompt) -> float:
        tokens = self._materials.config.evaluation.batch_tokens
        return answer_loss_mean(model, prompt, self._materials.validation, tokens)


def cosine(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Of two sets of tensors, each taken as one vector; nan if one of them is zero."""
    pairs = [(one[name].double(), other[name].double()) for name in one]
    product, first, second = (
        sum(float((a * b).sum()) for a, b in some) for some in _products(pairs)
    )
    return product / math.sqrt(first * second) if first * second else math.nan


def _products(pairs: list[tuple[Tensor, Tensor]]) -> list[list[tuple[Tensor, Tensor]]]:
    return [pairs, [(a, a) for a, _ in pairs], [(b, b) for _, b in pairs]]


def table(places: Sequence[Place]) -> str:
    """What was found, as plain text."""
    head = f"{'prompts':<32} {'global loss':>12} {'auxiliary':>10} {'cosine':>8} {'ceiling':>8}"
    rows = [
        f"{p.name:<32} {p.loss:>12.4f} {p.auxiliary_loss:>10.4f} {p.cosine:>8.3f} {p.ceiling:>8.3f}"
        for p in places
    ]
    legend = (
        "losses on the validation split, nats a token; cosine of both models' "
        "gradients by the prompts, on the same\n"
        "text; ceiling: of the global model's own, on two halves of that text"
    )
    return "\n".join([head, *rows, legend])
