"""A classification head: a linear map from a model's last hidden state to logits of classes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import safetensors.torch
from torch import Tensor, nn

from fedsp_mpi.files import fingerprint, ownership
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.tensors import NamedTensors

_WEIGHTS_FILE = "head.safetensors"
_CLASSES_FILE = "config.json"


class ClassHead:
    """The head of one model, in the place of its own: a linear map, fp32.

    Its weight [classes, hidden] and bias [classes] begin as 0: all classes are equally likely.

    Args:
        model: whose own weights stay as they are.
        num_classes: that there are.
    """

    def __init__(self, model: LanguageModel, num_classes: int) -> None:
        self._model = model
        self._linear = nn.Linear(model.shape.hidden_size, num_classes, device=model.device)
        for parameter in self._linear.parameters():
            nn.init.zeros_(parameter)
        self.attach()

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return weight and bias."""
        return self._linear.parameters()

    def tensors(self) -> Mapping[str, nn.Parameter]:
        """Return them by name."""
        return dict(self._linear.named_parameters(prefix="head"))

    def pack(self) -> NamedTensors:
        """Copy weight [classes, hidden] and bias [classes] into the tensors that travel, fp32."""
        return NamedTensors.pack(self.tensors())

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy in weight [classes, hidden] and bias [classes], by name."""
        parameters = self.tensors()
        for name, tensor in tensors.items():
            parameters[name].data.copy_(tensor)

    def limit_rank(self, rank: int) -> None:
        """Do nothing: a head has no rank of its own."""

    def attach(self) -> None:
        """Give the model's answers, and freeze all else."""
        self._model.classifier = self._linear
        self._model.train_weights(False)

    def begin_training(self) -> None:
        """Do nothing: the head is always trainable, and has no dropout."""

    def end_training(self) -> None:
        """Do nothing: the model was never in training."""


def write(folder: Path, tensors: NamedTensors, classes: Sequence[str], *, base: str) -> None:
    """Write a head as safetensors, with the names of its classes beside it.

    Args:
        folder: made if it does not exist.
        tensors: weight [classes, hidden] and bias [classes], fp32.
        classes: their names, in order.
        base: name or folder of the global model.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = ownership.begin_model(folder)
    weights = {name.removeprefix("head."): tensor for name, tensor in tensors.torch().items()}
    safetensors.torch.save_file(weights, part / _WEIGHTS_FILE)
    description = {"base_model_name_or_path": base, "classes": list(classes)}
    (part / _CLASSES_FILE).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    fingerprint.list_folder(part)
    ownership.place_model(part, folder)


def num_parameters(model: LanguageModel, num_classes: int) -> int:
    """Return the number of values of a model's head."""
    return num_classes * (model.shape.hidden_size + 1)
