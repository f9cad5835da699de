"""Soft prompts, with or without a re-parameterisation: per-layer key/value prefixes and input
prompts, mapped between models of different depth, and in peft's file format.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

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
    """The kind and the sizes of a prompt.

    Attributes:
        kind: "prefix", keys and values for every layer; "input", embeddings before the text.
        num_tokens: soft tokens; 0 for an instruction without a word.
        num_layers: layers that a prefix serves; 1 for an input prompt.
        num_heads: key/value heads; 1 for an input prompt.
        width: of all heads together; for an input prompt, the width of an embedding.
        projection: hidden width of a prefix's re-parameterisation (Li and Liang, 2021), or None.
        encoder: network that computes an input prompt from embeddings (P-tuning, Liu et al., 2021,
            arXiv 2103.10385), or None.
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
        *,
        projection: int | None = None,
        encoder: Encoder | None = None,
    ) -> PromptSpec:
        """Return the spec of a prompt that fits a model.

        Args:
            shape: of the model.
            kind: "prefix" or "input".
            num_tokens: soft tokens.
            projection: used by a prefix only.
            encoder: used by an input prompt only.
        """
        if kind == "input":
            return cls(kind, num_tokens, 1, 1, shape.hidden_size, encoder=encoder)
        return cls(
            kind,
            num_tokens,
            num_layers=shape.num_layers,
            num_heads=shape.num_kv_heads,
            width=shape.num_kv_heads * shape.head_dim,
            projection=projection,
        )

    def at_depth(self, num_layers: int) -> PromptSpec:
        """Return the spec for a model of another depth; an input prompt has no depth."""
        return self if self.kind == "input" else replace(self, num_layers=num_layers)

    @property
    def row_width(self) -> int:
        """Values of one soft token: layers * 2 * width of a prefix, else the embedding's width."""
        return self.width if self.kind == "input" else self.num_layers * 2 * self.width


def require_positions(num_tokens: int, num_positions: int, name: str) -> None:
    """Raise ConfigError unless a model has positions left for a text of two tokens.

    Args:
        num_tokens: soft tokens of the prompt.
        num_positions: of the model.
        name: of the model, for the message.
    """
    if num_tokens > num_positions - 2:
        raise ConfigError(
            f"prompt.num_tokens: found {num_tokens}, expected at most {num_positions - 2}: "
            f"{name} has {num_positions} positions, and a text needs two at least"
        )


class Prompt(nn.Module):
    """A trainable soft prompt, always fp32.

    `matrix()` is what stock peft stores: [num_tokens, row_width], for a prefix layer by layer, each
    its key, then its value. The parameters are:

    - without re-parameterisation: `prompt`, that matrix;
    - with a projection: peft's `embedding` [num_tokens, width] and `transform` (Linear to
      `projection`, tanh, Linear to row_width);
    - with an encoder: `embedding` [num_tokens, width]; for "lstm" a bidirectional LSTM of two
      layers over it; and two linear layers with a ReLU between them, all as wide as an embedding,
      as in OpenPrompt, which FedPrompt's authors used.
    """

    # The same attributes as `PromptBatch`, so that either can go into a forward pass.
    num = 1
    cache = None

    def __init__(self, spec: PromptSpec) -> None:
        super().__init__()
        self.spec = spec
        width = spec.width
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
        num_directions = 1
        if spec.encoder == "lstm":
            num_directions = 2
            self.lstm = nn.LSTM(width, width, num_layers=2, bidirectional=True, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(num_directions * width, width), nn.ReLU(), nn.Linear(width, width)
        )

    def initialise(self, seed: int, std: float) -> Prompt:
        """Fill the parameters with random numbers, and return self.

        The prompt or its embedding gets N(0, std^2), the weights of a projection or an encoder
        N(0, 1 / number of inputs), and their biases 0. The numbers depend on the seed and the
        parameters' names alone.
        """
        for name, parameter in self.named_parameters():
            scale = std if name in ("prompt", "embedding") else parameter.shape[-1] ** -0.5
            noise = rng.generator(seed, f"prompt {name}").standard_normal(
                tuple(parameter.shape), dtype="float32"
            )
            parameter.data = torch.from_numpy(noise).mul_(0.0 if "bias" in name else scale)
        return self

    def matrix(self) -> Tensor:
        """Return the prompt in peft's layout, fp32 [num_tokens, row_width]."""
        if self.spec.encoder is not None:
            return self._encoded()
        return self.prompt if self.spec.projection is None else self.transform(self.embedding)

    def _encoded(self) -> Tensor:
        """Apply the encoder to the embeddings, in fp32 even where the model uses autocast."""
        with torch.autocast(self.embedding.device.type, enabled=False):
            rows = self.embedding
            if self.spec.encoder == "lstm":
                rows = self.lstm(self.embedding[None])[0][0]
            return self.mlp(rows)

    def matrices(self) -> Tensor:
        """Return `matrix()` as a stack of one, fp32 [1, num_tokens, row_width]."""
        return self.matrix()[None]

    def expand(self, stacked: Tensor, num_texts: int) -> Tensor:
        """Repeat what was computed from `matrices()` for every text: [1, ...] -> [num_texts, ...].

        The result is a view: all texts share one memory.
        """
        return stacked.expand(num_texts, *[-1] * (stacked.dim() - 1))

    def tensors(self) -> dict[str, Tensor]:
        """Return fp32 views of the parameters by name, which are what travels: `prompt`
        [num_tokens, row_width], or those that the class names.
        """
        return {name: parameter.data for name, parameter in self.named_parameters()}

    def num_parameters(self) -> int:
        """Return the number of values that are trained."""
        return sum(parameter.numel() for parameter in self.parameters())

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy values into the parameters, on whatever device the prompt is.

        Tensors [*shape] are of any float dtype; names and shapes are those of `tensors()`.
        """
        assert set(tensors) == {name for name, _ in self.named_parameters()}
        for name, parameter in self.named_parameters():
            parameter.data.copy_(tensors[name])


@dataclass(frozen=True)
class PromptBatch:
    """Several prompts, one of which goes in front of each text; a pass takes it like a `Prompt`.

    Attributes:
        spec: of every prompt.
        values: in peft's layout, fp32 [num, num_tokens, row_width].
        prompt_index: the prompt of each text, int64 [num_texts].
        cache: each layer's keys and values, [num, num_heads, num_tokens, head_dim], where a model
            has computed them already.
    """

    spec: PromptSpec
    values: Tensor
    prompt_index: Tensor
    cache: list[tuple[Tensor, Tensor]] | None = None

    @property
    def num(self) -> int:
        """The number of prompts."""
        return len(self.values)

    def matrices(self) -> Tensor:
        """Return all prompts, fp32 [num, num_tokens, row_width]."""
        return self.values

    def expand(self, stacked: Tensor, num_texts: int) -> Tensor:
        """Select each text's own row of what was computed from all prompts.

        [num, ...] -> [num_texts, ...].
        """
        return stacked[self.prompt_index]


def key_values(prompts: Prompt | PromptBatch) -> Tensor:
    """Return the keys and values of prefixes.

    Returns:
        fp32 [num_layers, 2, num, num_heads, num_tokens, head_dim].
    """
    spec = prompts.spec
    assert spec.kind == "prefix"
    matrices = prompts.matrices()
    by_token = matrices.view(len(matrices), spec.num_tokens, spec.num_layers, 2, spec.num_heads, -1)
    return by_token.permute(2, 3, 0, 4, 1, 5)


# --- between models of different depth ---


def depth_axis(spec: PromptSpec, name: str) -> int | None:
    """Return the axis of a parameter along which the layers lie, or None."""
    if spec.kind == "input" or name == "embedding" or name.startswith("transform.0"):
        return None
    return 1 if name == "prompt" else 0


def to_depth(tensors: Mapping[str, Tensor], spec: PromptSpec, num_layers: int) -> dict[str, Tensor]:
    """Map a prompt to a model of another depth: repeat layers up, average them down.

    Source: the reference's `merge_param_dict`. Layer i of L belongs to layer floor(i * l / L) of
    the l of the shallower model, so every layer keeps its place in the order of depth.

    Args:
        tensors: the prompt's parameters by name: `prompt` [num_tokens, row_width], or those that
            `Prompt` names.
        spec: of that prompt.
        num_layers: of the other model.

    Returns:
        The parameters by name; the axis of layers is `num_layers / spec.num_layers` times as long.
    """
    return {
        name: _axis_to_depth(
            tensor, depth_axis(spec, name), num_before=spec.num_layers, num_layers=num_layers
        )
        for name, tensor in tensors.items()
    }


def _axis_to_depth(tensor: Tensor, axis: int | None, *, num_before: int, num_layers: int) -> Tensor:
    """Map one parameter from `num_before` layers, which lie along `axis`, to `num_layers`."""
    if axis is None or num_layers == num_before:
        return tensor
    deep = max(num_layers, num_before)
    shallow = min(num_layers, num_before)
    owner = torch.arange(deep, device=tensor.device) * shallow // deep  # of each deep layer
    by_layer = tensor.unflatten(axis, (num_before, -1))
    if num_layers > num_before:
        mapped = by_layer.index_select(axis, owner)
    else:
        groups = [(owner == index).nonzero().flatten() for index in range(shallow)]
        means = [by_layer.index_select(axis, group).mean(axis) for group in groups]
        mapped = torch.stack(means, dim=axis)
    return mapped.flatten(axis, axis + 1).contiguous()


@dataclass(frozen=True)
class DepthMap:
    """The mapping of prompts between the global model and an auxiliary one of another depth.

    Attributes:
        spec: of the prompts at the depth of the global model.
        num_layers: of the auxiliary model.
        layers: the layer of the global model that each layer of the auxiliary one is a copy of;
            prompts stay with their layers. None: repeat and average (`to_depth`).
    """

    spec: PromptSpec
    num_layers: int
    layers: tuple[int, ...] | None = None

    @property
    def small(self) -> PromptSpec:
        """The spec of the prompts at the depth of the auxiliary model."""
        return self.spec.at_depth(self.num_layers)

    def down(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Map the parameters of a prompt from the global to the auxiliary model.

        Of `prompt` [num_tokens, row_width] it is row_width that changes with the depth.
        """
        if self.layers is None:
            return to_depth(tensors, self.spec, self.num_layers)
        return {name: self._select_layers(name, tensor) for name, tensor in tensors.items()}

    def up(self, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Map the parameters of a prompt from the auxiliary to the global model.

        Args:
            tensors: by name, `prompt` [num_tokens, row_width] at the auxiliary model's depth.
            own: the global model's parameters, whose layers without a counterpart stay as they are.
        """
        if self.layers is None:
            return to_depth(tensors, self.small, self.spec.num_layers)
        return {
            name: self._replace_layers(name, tensor, own[name]) for name, tensor in tensors.items()
        }

    def _select_layers(self, name: str, tensor: Tensor) -> Tensor:
        """Copy the layers that the auxiliary model has out of a parameter of the global one."""
        axis = depth_axis(self.spec, name)
        if axis is None:
            return tensor.clone()
        by_layer = tensor.unflatten(axis, (self.spec.num_layers, -1))
        return by_layer[self._layers_along(axis)].flatten(axis, axis + 1)

    def _replace_layers(self, name: str, small: Tensor, large: Tensor) -> Tensor:
        """Copy a parameter of the global model, with the auxiliary model's layers in it."""
        axis = depth_axis(self.spec, name)
        if axis is None:
            return small.clone()
        merged = large.clone()
        by_layer = merged.unflatten(axis, (self.spec.num_layers, -1))  # a view
        by_layer[self._layers_along(axis)] = small.unflatten(axis, (self.num_layers, -1))
        return merged

    def _layers_along(self, axis: int) -> tuple[slice | list[int], ...]:
        """Return the index of the auxiliary model's layers along an axis of the global one's."""
        assert self.layers is not None
        return (slice(None),) * axis + (list(self.layers),)


# --- peft's file format ---


def write_adapter(
    folder: Path,
    tensors: NamedTensors,
    spec: PromptSpec,
    *,
    base: str,
    task: str = "CAUSAL_LM",
    words: str | None = None,
) -> None:
    """Write a stock peft adapter: `PeftModel.from_pretrained(model, folder)` uses this prompt.

    A projection or an encoder is applied first, as peft itself does when it saves; the file holds
    fp32 [num_tokens, row_width].

    Args:
        folder: made if it does not exist.
        tensors: the prompt's parameters, at the depth of the global model; others are left out.
        spec: of the prompt.
        base: name or folder of the global model, noted in the adapter.
        task: peft's name for the kind of model.
        words: of a prompt in words, for a text file beside it.
    """
    prompt = Prompt(spec)
    prompt.load({name: tensors.torch()[name] for name in prompt.tensors()})
    with torch.no_grad():
        matrix = prompt.matrix().contiguous()
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = ownership.begin_model(folder)
    safetensors.torch.save_file({"prompt_embeddings": matrix}, part / "adapter_model.safetensors")
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
    }
    if spec.kind == "prefix":
        settings |= {"encoder_hidden_size": spec.width, "prefix_projection": False}
    (part / "adapter_config.json").write_text(
        json.dumps(settings, indent=2) + "\n", encoding="utf-8"
    )
    if words is not None:
        (part / "instruction.txt").write_text(words + "\n", encoding="utf-8")
    fingerprint.list_folder(part)
    ownership.place_model(part, folder)


def read_adapter(folder: Path) -> Tensor:
    """Return the prompt [num_tokens, row_width] of a peft prefix- or prompt-tuning adapter.

    Raises:
        ValueError: the folder holds none.
    """
    try:
        tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
        return tensors["prompt_embeddings"]
    except (OSError, KeyError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"{folder}: found no peft prompt ({error}), expected adapter_model.safetensors "
            "with 'prompt_embeddings'"
        ) from None
