"""The sections `model`, `auxiliary`, `distillation` and `prompt`, and recipes.

A recipe is a file of values for keys that a configuration leaves out. The defaults below are the
paper's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedsp_mpi.config.options import option
from fedsp_mpi.config.parsing import ConfigError, Section, parse
from fedsp_mpi.config.training import StageConfig
from fedsp_mpi.config.yaml_reader import read_yaml

Recipe = Literal["bridged", "paper"]
_FOLDER = Path(__file__).parent.parent / "resources" / "recipes"


def recipe(name: object) -> Section:
    """Read a recipe: its values, section by section.

    Raises:
        ConfigError: there is no recipe of this name.
    """
    return read_yaml(_FOLDER / f"{parse(Recipe, name, 'recipe')}.yaml")


@dataclass(frozen=True)
class ModelConfig:
    """The global model: a hub name or a folder; `embedded` is the tiny GPT-2 of the package."""

    name: str | None = option(
        None,
        "required: hub name or folder of a model of one of the families in configs/families.md. "
        "`embedded` is the tiny GPT-2 of the package",
    )
    revision: str | None = option(None, "branch, tag or commit on the hub")
    tokenizer: str | None = option(None, "hub name or folder; `null`: the model's own")
    weights: Literal["pretrained", "random"] = option(
        "pretrained",
        "`random`: new weights from `config.json` alone, drawn with the seed, with methods that "
        "train all weights",
    )
    after: str | None = option(
        None,
        "folder of an earlier run whose result is the global model: complete, of the same "
        "`model.name`, and with a folder `model` (`finetune`, `pretrain`, or `lora` with "
        "`lora.merged`)",
    )
    gradient_checkpointing: bool = option(
        False,
        "recompute activations in the backward pass; refused with prefixes, which checkpointed "
        "layers drop",
    )


@dataclass(frozen=True)
class AuxiliaryConfig:
    """The clients' model: a cell of the global model's layers, shared across depth.

    FedSP calls this cross-layer sharing. A depth below 1 is a fraction of the global model's.
    """

    start_layer: int = option(
        0, "first layer of the global model that the auxiliary model takes", "layer"
    )
    layers_per_cell: int | None = option(
        1,
        "layers that are stored, and run again and again until the depth is reached; `null`: as "
        "many as the depth, none is shared",
        "layers",
    )
    depth: float | None = option(
        None,
        "how many layers are run; below 1, a fraction of the global model's; `null`: as many as "
        "the global model has",
        "layers or fraction",
    )
    first_layers: int | None = option(
        None,
        "this many are the global model's first ones and the others its last ones, with a linear "
        "bridge between; `null`: consecutive layers and no bridge",
        "layers",
    )
    dropout: bool = option(False, "use the model's own dropout while its weights are trained")

    @property
    def shares_layers(self) -> bool:
        """Whether layers run more than once."""
        return self.layers_per_cell not in (None, self.depth)

    def check(self, where: str) -> None:
        """Raise ConfigError, under the section's key `where`, on values that cannot work."""
        if self.depth is not None and self.depth > 1 and self.depth % 1:
            raise ConfigError(
                f"{where}.depth: found {self.depth}, expected a whole number of layers, or a "
                "fraction between 0 and 1"
            )
        if self.first_layers is not None and self.shares_layers:
            raise ConfigError(
                f"{where}.first_layers: found {self.first_layers} with "
                f"layers_per_cell={self.layers_per_cell}, which shares layers; expected null, or "
                f"{where}.layers_per_cell=null"
            )


@dataclass(frozen=True)
class DistillationConfig:
    """Aligns the auxiliary model with the global one before the first round.

    First its bridge is fitted, then all its weights are trained.
    """

    bridge_texts: int = option(800, "that the bridge is fitted to, by least squares", "texts")
    bridge_ridge: float = option(
        0.01, "how strongly the bridge is held to the identity", "mean square of the states"
    )
    stage: StageConfig = option(
        StageConfig(steps=200),
        "of gradient distillation, once, before the first round; they may follow a fitted bridge",
    )
    text: str | None = option(
        None,
        "plain text: a .txt or .txt.gz file, or a folder of them. It is distilled on, and made "
        "into questions in the task's words, to which the bridge is fitted and from which "
        "translation learns. `null`: the server's shard",
    )
    text_length: int = option(128, "of a piece of plain text", "tokens")
    text_lines: int | None = option(None, "read at most this many; `null`: all", "lines")
    hidden_weight: float = option(1.0, "of the masked mean squared error of hidden states")
    logits_weight: float = option(
        0.0,
        "of the KL divergence of logits; an output head of its own is trained only if this is "
        "above 0",
    )
    temperature: float = option(1.0, "of that divergence")
    engine: Literal["deepspeed", "torch"] = option("deepspeed", "what runs its steps")
    zero_stage: int = option(
        0, "what the server's ranks shard: 0 nothing, 1 moments, 2 gradients too, 3 weights too"
    )
    reuse: bool = option(
        True,
        "take the auxiliary model that an earlier run below `run.folder` made by the same recipe",
    )

    def check(self, where: str) -> None:
        """Raise ConfigError, under the section's key `where`, on values that cannot work."""
        if self.stage.max_padding not in (None, "auto") and self.engine == "deepspeed":
            raise ConfigError(
                f"{where}.stage.max_padding: found {self.stage.max_padding} with DeepSpeed, "
                "whose steps have equally many forward passes, expected null; set "
                f"{where}.engine=torch, or micro_batch instead"
            )
        if self.stage.steps and not (self.hidden_weight or self.logits_weight):
            raise ConfigError(
                f"{where}: found hidden_weight 0 and logits_weight 0 with "
                f"{self.stage.steps} steps, expected one of them above 0; set "
                f"{where}.stage.steps=0 to leave distillation out"
            )


@dataclass(frozen=True)
class PromptConfig:
    """The soft prompt: key/value prefixes of every layer, or input embeddings."""

    kind: Literal["prefix", "input"] = option(
        "prefix",
        "`prefix`: keys and values in every layer; `input`: embeddings before the text, which a "
        "causal model reads once for all texts of a batch",
    )
    num_tokens: int = option(40, "length; they take the first positions, as in peft", "tokens")
    init: Literal["random", "text"] = option(
        "random",
        "initialise from Gaussian noise (`random`), or from what the global model makes of a "
        "`text`",
    )
    init_std: float = option(0.02, "standard deviation of the noise")
    init_text: str = option(
        "Read the text carefully and answer the question about it. "
        "Choose the answer that fits best.",
        "the text, repeated until the prompt is filled",
    )
    mapping: Literal["repeat", "same_layers"] = option(
        "repeat",
        "between models of different depth: layer to the same layer; or `repeat` upwards and "
        "average downwards",
    )
    projection: int | None = option(
        None,
        "width of a prefix's re-parameterisation, whose weights are tuned and sent instead; "
        "`null`: none",
        "units",
    )
    encoder: Literal["lstm", "mlp"] | None = option(
        None, "of input prompts (P-tuning), whose weights are tuned and sent too; `null`: none"
    )
