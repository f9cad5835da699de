"""The sections `model`, `auxiliary`, `distillation` and `prompt`, and recipes.

A recipe is a file of values for keys that a configuration leaves out. The defaults below are the
paper's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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

    name: str | None = None
    revision: str | None = None
    tokenizer: str | None = None  # None: the model's own
    # random: from config.json alone, drawn with the seed, as transformers initialises the family.
    weights: Literal["pretrained", "random"] = "pretrained"
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class AuxiliaryConfig:
    """The clients' model: a cell of the global model's layers, shared across depth.

    FedSP calls this cross-layer sharing. A depth below 1 is a fraction of the global model's.
    """

    start_layer: int = 0
    layers_per_cell: int | None = 1  # None: as many as it is deep, so that none is shared
    depth: float | None = None  # layers; None: as deep as the global model
    # So many of them are the global model's first ones, the others its last ones, with a linear
    # bridge between; None: they lie side by side, and there is no bridge.
    first_layers: int | None = None
    dropout: bool = False  # the model's own dropout while its weights are trained

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

    bridge_texts: int = 800  # that a bridge is fitted to, by least squares
    # How strongly it is held to the identity, in units of the states' mean square.
    bridge_ridge: float = 0.01
    stage: StageConfig = StageConfig(steps=200)
    # A .txt or .txt.gz file, or a folder of them, of plain text; None: the server's shard.
    text: str | None = None
    text_length: int = 128  # tokens of a piece of plain text
    text_lines: int | None = None  # read so many lines of it at most; None: all
    hidden_weight: float = 1.0
    logits_weight: float = 0.0
    temperature: float = 1.0
    engine: Literal["deepspeed", "torch"] = "deepspeed"
    zero_stage: int = 0
    reuse: bool = True  # take an auxiliary model that an earlier run made by the same recipe

    def check(self, where: str) -> None:
        """Raise ConfigError, under the section's key `where`, on values that cannot work."""
        if self.stage.steps and not (self.hidden_weight or self.logits_weight):
            raise ConfigError(
                f"{where}: found hidden_weight 0 and logits_weight 0 with "
                f"{self.stage.steps} steps, expected one of them above 0; set "
                f"{where}.stage.steps=0 to leave distillation out"
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
    init_text: str = (
        "Read the text carefully and answer the question about it. "
        "Choose the answer that fits best."
    )
    # Between models of different depth: repeat up and average down; or layer by layer, where the
    # auxiliary model's layers are some of the global one's.
    mapping: Literal["repeat", "same_layers"] = "repeat"
    # Width of the re-parameterisation's hidden layer; None: no projection.
    projection: int | None = None
    # Of input prompts (P-tuning); its weights are tuned, and travel, too.
    encoder: Literal["lstm", "mlp"] | None = None
