"""The parts of a configuration that a recipe decides: the auxiliary model, its alignment, the
prompts; and the recipes.

A recipe is a file of values for keys that a configuration does not give. The defaults below are the
paper's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedsp_mpi.config.parsing import ConfigError, parse
from fedsp_mpi.config.training import StageConfig
from fedsp_mpi.config.yaml_reader import read_yaml

Recipe = Literal["bridged", "paper"]
_FOLDER = Path(__file__).parent.parent / "resources" / "recipes"


def recipe(name: Any) -> dict[str, Any]:
    """What a recipe says, by key. Raises ConfigError if there is none of this name."""
    return read_yaml(_FOLDER / f"{parse(Recipe, name, 'recipe')}.yaml")


@dataclass(frozen=True)
class AuxiliaryConfig:
    """The clients' model: a cell of the global model's layers, shared across depth (FedSP,
    cross-layer sharing).

    A depth below 1 is a fraction of the global model's.
    """

    start_layer: int = 0
    layers_per_cell: int | None = 1  # None: as many as it is deep, so that none is shared
    depth: float | None = None  # layers; None: as deep as the global model
    # So many of them are the global model's first ones, the others its last ones, with a linear
    # bridge between; None: they lie side by side, and there is no bridge.
    first_layers: int | None = None
    dropout: bool = False  # the model's own dropout while its weights are trained

    def check(self, where: str) -> None:
        if self.depth is not None and self.depth > 1 and self.depth % 1:
            raise ConfigError(
                f"{where}.depth: found {self.depth}, expected a whole number of layers, or a "
                "fraction between 0 and 1"
            )
        if self.first_layers is not None and self.layers_per_cell not in (None, self.depth):
            raise ConfigError(
                f"{where}.first_layers: found {self.first_layers} with "
                f"layers_per_cell={self.layers_per_cell}, "
                f"which shares layers; expected null, or {where}.layers_per_cell=null"
            )


@dataclass(frozen=True)
class DistillationConfig:
    """Aligns the auxiliary model with the global one before the first round: its bridge first, then
    all its weights.
    """

    bridge_texts: int = 800  # that a bridge is fitted to, by least squares
    bridge_ridge: float = (
        0.01  # how strongly it is held to the identity, in units of the states' mean square
    )
    stage: StageConfig = StageConfig(steps=200)
    text: str | None = (
        None  # a .txt or .txt.gz file, or a folder of them, of plain text; None: the server's shard
    )
    text_length: int = 128  # tokens of a piece of plain text
    text_lines: int | None = None  # read so many lines of it at most; None: all
    hidden_weight: float = 1.0
    logits_weight: float = 0.0
    temperature: float = 1.0
    engine: Literal["deepspeed", "torch"] = "deepspeed"
    zero_stage: int = 0
    reuse: bool = True  # take an auxiliary model that an earlier run made by the same recipe

    def check(self, where: str) -> None:
        if self.stage.steps and not (self.hidden_weight or self.logits_weight):
            raise ConfigError(
                f"{where}: found hidden_weight 0 and logits_weight 0 with "
                f"{self.stage.steps} steps, "
                f"expected one of them above 0; set {where}.stage.steps=0 to leave distillation out"
            )


@dataclass(frozen=True)
class PromptConfig:
    """The soft prompt: key/value prefixes of every layer, or input embeddings."""

    kind: Literal["prefix", "input"] = "prefix"
    num_tokens: int = 40
    # Where it begins: noise, or what the global model makes of the words of init_text, over and
    # over.
    init: Literal["random", "text"] = "random"
    init_std: float = 0.02
    init_text: str = "Read the text carefully and answer the question about it. Choose the answer that fits best."
    # Between models of different depth: repeat up and average down; or layer by layer, where the
    # auxiliary model's layers are some of the global one's.
    mapping: Literal["repeat", "same_layers"] = "repeat"
    projection: int | None = (
        None  # width of the re-parameterisation's hidden layer; None: no projection
    )
    encoder: Literal["lstm", "mlp"] | None = (
        None  # of input prompts (P-tuning); its weights are tuned, and travel, too
    )
