"""Soft prompts: per-layer key/value prefixes and input prompts, as they are or re-parameterised; in
peft's formats.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import safetensors.torch
import torch
from torch import Tensor, nn

from fedsp_mpi import rng
from fedsp_mpi.config.parsing import ConfigError
from fedsp_mpi.files import fingerprint, ownership
from fedsp_mpi.tensors import NamedTensors

if TYPE_CHECKING:
    from fedsp_mpi.models.families import Shape


Encoder = Literal["lstm", "mlp"]


@dataclass(frozen=True)
class PromptSpec:
    """What a prompt is made of.

    Attributes:
        kind: "prefix", keys and values for every layer; "input", embeddings before the text.
        num_tokens: soft tokens.
        num_layers: layers that a prefix serves; 1 for an input prompt. num_heads, width: key/value
            heads, and their joint width; an input prompt has one head as wide as an embedding.
        projection: hidden width of a prefix's re-parameterisation (Li and Liang, 2021), or None.
        encoder: what makes an input prompt of embeddings (P-tuning, Liu et al., 2021, arXiv
            2103.10385), or None.
    """

    kind: Literal["prefix", "input"]
    num_tokens: int
    num_layers: int
    num_heads: int
    width: int
    projection: int | None = None
    encoder: Encoder | None = None

    @classmethod
    def of(
        cls,
        shape: Shape,
        kind: Literal["prefix", "input"],
        num_tokens: int,
        projection: int | None,
        encoder: Encoder | None = None,
    ) -> PromptSpec:
        """The prompt of `num_tokens` soft tokens that fits a model of this shape."""
        if kind == "input":
            return cls(kind, num_tokens, 1, 1, shape.hidden_size, encoder=encoder)
        return cls(
            kind,
            num_tokens,
            shape.num_layers,
            shape.num_kv_heads,
            shape.num_kv_heads * shape.head_dim,
            projection,
        )

    def at_depth(self, num_layers: int) -> PromptSpec:
        """The same prompt for a model of another depth; an input prompt has no depth."""
        return self if self.kind == "input" else replace(self, num_layers=num_layers)

    @property
    def row_width(self) -> int:
        """Values of one soft token: layers * 2 * width of a prefix, the embedding's width of an
        input prompt.
        """
        return self.width if self.kind == "input" else self.num_layers * 2 * self.width


def require_positions(num_tokens: int, num_positions: int, name: str) -> None:
    """Raise ConfigError if `num_tokens` soft tokens leave a model, called `name`, no room for a
    text of two tokens.
    """
    if num_tokens > num_positions - 2:
        raise ConfigError(
            f"prompt.num_tokens: found {num_tokens}, expected at most "
            f"{num_positions - 2}: {name} has "
            f"{num_positions} positions, and a text needs two at least"
        )


class Prompt(nn.Module):
    """A trainable soft prompt, always fp32.

    `matrix()` is what stock peft stores: [num_tokens, row_width], of a prefix layer by layer, each
    its key, then its value. By itself the one parameter is that matrix. With a projection they are
    peft's `embedding` and `transform` (embedding [num_tokens, width], Linear to `projection`, tanh,
    Linear to row_width); with an encoder `embedding` [num_tokens, width], for "lstm" a
    bidirectional LSTM of two layers over it, and two linear layers with a ReLU between them, all as
    wide as an embedding, as in OpenPrompt, which FedPrompt's authors used.
    """

    num, read = 1, None  # as of `PromptBatch`

    def __init__(self, spec: PromptSpec) -> None:
        super().__init__()
        self.spec, width = spec, spec.width
        if spec.projection is None and spec.encoder is None:
            self.prompt = nn.Parameter(torch.zeros(spec.num_tokens, spec.row_width))
            return
        self.embedding = nn.Parameter(torch.zeros(spec.num_tokens, width))
        if spec.projection is not None:
            self.transform = nn.Sequential(
                nn.Linear(width, spec.projection),
                nn.Tanh(),
                nn.Linear(spec.projection, spec.row_width),
            )
            return
        sides = 2 if spec.encoder == "lstm" else 1
        if spec.encoder == "lstm":
            self.lstm = nn.LSTM(width, width, num_layers=2, bidirectional=True, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(sides * width, width), nn.ReLU(), nn.Linear(width, width)
        )

    def initialise(self, seed: int, std: float) -> Prompt:
        """Fill with N(0, std^2), a projection's or encoder's weights with N(0, 1/inputs) and its
        offsets with 0.

        The numbers depend on the seed and the names alone.
        """
        for name, parameter in self.named_parameters():
            scale = std if name in ("prompt", "embedding") else parameter.shape[-1] ** -0.5
            noise = rng.generator(seed, f"prompt {name}").standard_normal(
                tuple(parameter.shape), dtype="float32"
            )
            parameter.data = torch.from_numpy(noise).mul_(0.0 if "bias" in name else scale)
        return self

    def matrix(self) -> Tensor:
        """The prompt in peft's layout, [num_tokens, row_width]."""
        if self.spec.encoder is not None:
            return self._encoded()
        return self.prompt if self.spec.projection is None else self.transform(self.embedding)

    def _encoded(self) -> Tensor:
        """What the encoder makes of the embeddings, in fp32 whatever the model computes in."""
        with torch.autocast(self.embedding.device.type, enabled=False):
            rows = (
                self.lstm(self.embedding[None])[0][0]
                if self.spec.encoder == "lstm"
                else self.embedding
            )
            return self.mlp(rows)

    def matrices(self) -> Tensor:
        """`matrix()` as the only one of several, [1, num_tokens, row_width]."""
        return self.matrix()[None]

    def of_texts(self, each: Tensor, num_texts: int) -> Tensor:
        """What was made of `matrices()`, [1, ...], for every text of a batch: [num_texts, ...], all
        in one memory.
        """
        return each.expand(num_texts, *(-1 for _ in each.shape[1:]))

    def tensors(self) -> dict[str, Tensor]:
        """The parameters by name: what travels."""
        return {name: parameter.data for name, parameter in self.named_parameters()}

    def num_parameters(self) -> int:
        """Values that are trained."""
        return sum(parameter.numel() for parameter in self.parameters())

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy values in, wherever the prompt lives.

        Names and shapes must be those of `tensors()`.
        """
        assert set(tensors) == {name for name, _ in self.named_parameters()}
        for name, parameter in self.named_parameters():
            parameter.data.copy_(tensors[name])


@dataclass(frozen=True)
class PromptBatch:
    """Prompts of one kind, of which each text of a batch has its own; they stand where a `Prompt`
    does in a pass.

    Attributes:
        spec: of every one.
        values: in peft's layout, [num, num_tokens, row_width].
        owners: which of them each text has, [num_texts].
        read: of each layer keys and values, [num, num_heads, num_tokens, head_dim], if a model has
            read them already.
    """

    spec: PromptSpec
    values: Tensor
    owners: Tensor
    read: list[tuple[Tensor, Tensor]] | None = None

    @property
    def num(self) -> int:
        """How many they are."""
        return len(self.values)

    def matrices(self) -> Tensor:
        """All of them."""
        return self.values

    def of_texts(self, each: Tensor, num_texts: int) -> Tensor:
        """What was made of all of them, [num, ...], for every text of the batch: [num_texts, ...]."""
        return each[self.owners]


def key_values(prompts: Prompt | PromptBatch) -> Tensor:
    """Keys and values of one or several prefixes, [num_layers, 2, num, num_heads, num_tokens,
    head_dim].
    """
    s, matrices = prompts.spec, prompts.matrices()
    assert s.kind == "prefix"
    return matrices.view(len(matrices), s.num_tokens, s.num_layers, 2, s.num_heads, -1).permute(
        2, 3, 0, 4, 1, 5
    )


def depth_axis(spec: PromptSpec, name: str) -> int | None:
    """The axis of a parameter along which the layers lie, or None."""
    if spec.kind == "input" or name == "embedding" or name.startswith("transform.0"):
        return None
    return 1 if name == "prompt" else 0


def to_depth(tensors: Mapping[str, Tensor], spec: PromptSpec, num_layers: int) -> dict[str, Tensor]:
    """Map a prompt of `spec` to a model of another depth: repeat up, mean down.

    Source: the reference's `merge_param_dict`. Layer i of L belongs to layer floor(i * l / L) of
    the l of the shallower model, so every layer keeps its place in the order of depth.
    """
    return {
        name: _axis_to_depth(t, depth_axis(spec, name), spec, num_layers)
        for name, t in tensors.items()
    }


def _axis_to_depth(tensor: Tensor, axis: int | None, spec: PromptSpec, num_layers: int) -> Tensor:
    if axis is None or num_layers == spec.num_layers:
        return tensor
    deep, shallow = max(num_layers, spec.num_layers), min(num_layers, spec.num_layers)
    owner = torch.arange(deep, device=tensor.device) * shallow // deep
    by_layer = tensor.unflatten(axis, (spec.num_layers, -1))
    if num_layers > spec.num_layers:
        mapped = by_layer.index_select(axis, owner)
    else:
        mapped = torch.stack(
            [by_layer.index_select(axis, i).mean(axis) for i in _members(owner, shallow)], dim=axis
        )
    return mapped.flatten(axis, axis + 1).contiguous()


def _members(owner: Tensor, num_groups: int) -> list[Tensor]:
    return [(owner == group).nonzero().flatten() for group in range(num_groups)]


@dataclass(frozen=True)
class DepthMap:
    """How prompts go between the global model and an auxiliary one of another depth.

    Attributes:
        spec: of the prompts at the depth of the global model.
        num_layers: of the auxiliary model.
        layers: which layers of the global model those of the auxiliary one are, and prompts belong
            to the same ones in both; None: repeat and mean (`to_depth`).
    """

    spec: PromptSpec
    num_layers: int
    layers: tuple[int, ...] | None = None

    @property
    def small(self) -> PromptSpec:
        """The prompts at the depth of the auxiliary model."""
        return self.spec.at_depth(self.num_layers)

    def down(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The global model's prompts for the auxiliary model."""
        if self.layers is None:
            return to_depth(tensors, self.spec, self.num_layers)
        return {name: self._same(name, tensor) for name, tensor in tensors.items()}

    def up(self, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The auxiliary model's prompts for the global model, whose layers without a counterpart
        keep their own.
        """
        if self.layers is None:
            return to_depth(tensors, self.small, self.spec.num_layers)
        return {name: self._with_same(name, tensor, own[name]) for name, tensor in tensors.items()}

    def _same(self, name: str, whole: Tensor) -> Tensor:
        """The part of one of the global model's parameters that the auxiliary model has as well,
        copied.
        """
        axis = depth_axis(self.spec, name)
        if axis is None:
            return whole.clone()
        return whole.unflatten(axis, (self.spec.num_layers, -1))[self._at(axis)].flatten(
            axis, axis + 1
        )

    def _with_same(self, name: str, part: Tensor, whole: Tensor) -> Tensor:
        """A copy of one of the global model's parameters with that part."""
        axis = depth_axis(self.spec, name)
        if axis is None:
            return part.clone()
        found = whole.clone()
        found.unflatten(axis, (self.spec.num_layers, -1))[self._at(axis)] = part.unflatten(
            axis, (self.num_layers, -1)
        )
        return found

    def _at(self, axis: int) -> tuple[Any, ...]:
        """Where the auxiliary model's layers lie along an axis of the global one's."""
        return (slice(None),) * axis + (list(self.layers or ()),)


def write_adapter(
    folder: Path, tensors: NamedTensors, spec: PromptSpec, base: str, task: str = "CAUSAL_LM"
) -> None:
    """Write a stock peft adapter: `PeftModel.from_pretrained(model, folder)` then answers with this
    prompt.

    A projection or an encoder is applied first, as peft itself does when it saves.

    Args:
        folder: made if it is not there.
        tensors: the prompt's parameters, of the depth of the global model.
        spec: what they are.
        base: name or folder of the global model, for the adapter's own note.
        task: peft's name for the kind of model.
    """
    prompt = Prompt(spec)
    prompt.load(tensors.torch())
    with torch.no_grad():
        matrix = prompt.matrix().contiguous()
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = ownership.begin_model(folder)
    safetensors.torch.save_file({"prompt_embeddings": matrix}, part / "adapter_model.safetensors")
    prefix = (
        {"encoder_hidden_size": spec.width, "prefix_projection": False}
        if spec.kind == "prefix"
        else {}
    )
    settings = {
        "peft_type": "PREFIX_TUNING" if spec.kind == "prefix" else "PROMPT_TUNING",
        "task_type": task,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "num_virtual_tokens": spec.num_tokens,
        "token_dim": spec.width,
        "num_transformer_submodules": 1,
        "num_attention_heads": spec.num_heads,
        "num_layers": spec.num_layers,
        **prefix,
    }
    (part / "adapter_config.json").write_text(
        json.dumps(settings, indent=2) + "\n", encoding="utf-8"
    )
    fingerprint.list_folder(part)
    ownership.place_model(part, folder)


def read_adapter(folder: Path) -> Tensor:
    """The matrix [num_tokens, row_width] of a peft prefix- or prompt-tuning adapter.

    Raises ValueError if the folder holds none.
    """
    try:
        return safetensors.torch.load_file(folder / "adapter_model.safetensors")[
            "prompt_embeddings"
        ]
    except (OSError, KeyError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"{folder}: found no peft prompt ({error}), expected adapter_model.safetensors "
            "with 'prompt_embeddings'"
        ) from None
