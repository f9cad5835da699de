"""What a configuration says about the model: its shape, its tokenizer, and the prompts for it."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from fedsp_mpi.config import Config, ConfigError
from fedsp_mpi.data.instructions import InstructionTokens
from fedsp_mpi.data.tokens import token_ids
from fedsp_mpi.files.untrusted import JsonObject
from fedsp_mpi.models import auxiliary, backbone, families
from fedsp_mpi.models.prompts import DepthMap, Prompt, PromptSpec
from fedsp_mpi.run import origin

if TYPE_CHECKING:
    from fedsp_mpi.models.families import PreTrainedConfig
    from fedsp_mpi.models.reading import PreTrainedTokenizerBase

RESOURCES = Path(__file__).parent.parent / "resources"


class ModelInputs:
    """What a configuration says about the model, read when it is first used. No weight is loaded.

    Args:
        config: of the experiment.

    Attributes:
        config: of the experiment.
        model_name: hub name or folder of the global model, which may be an earlier run's result.
    """

    def __init__(self, config: Config) -> None:
        backbone.quiet()
        self.config = config
        name = config.model.name
        self.model_name = str(RESOURCES / "model") if name == "embedded" else str(name)
        if config.model.after is not None:
            self.model_name = origin.model_folder(config.model.after)

    @property
    def initial_seed(self) -> int | None:
        """Seed of weights that are drawn; None where they are read."""
        return self.config.run.seed if self.config.model.weights == "random" else None

    @cached_property
    def origin(self) -> JsonObject | None:
        """The earlier runs that the global model comes from, as the record has it; None: none.

        Raises:
            ConfigError: `model.after` is no complete run of this model.
        """
        return origin.origin(self.config)

    @cached_property
    def model_config(self) -> PreTrainedConfig:
        """The configuration of the global model, as transformers has it."""
        return backbone.read_config(self.model_name, self.config.model.revision)

    @cached_property
    def shape(self) -> families.Shape:
        """Layers, widths and positions of the global model."""
        return families.shape_of(self.model_config)

    @property
    def is_cloze(self) -> bool:
        """Whether the model fills in a gap in the text, rather than continue it."""
        return families.kind_of(self.model_config) != "causal"

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, or the one that the configuration names."""
        name = self.config.model.tokenizer
        if name:
            return backbone.read_tokenizer(name, None)
        return backbone.read_tokenizer(self.model_name, self.config.model.revision)

    @property
    def word_token_ids(self) -> np.ndarray:
        """Ascending ids of the tokens that are words or parts of them: [num_words], int64.

        These are all tokens but the tokenizer's special ones.
        """
        return np.setdiff1d(np.arange(len(self.tokenizer)), self.tokenizer.all_special_ids)

    # -- the auxiliary model -----------------------------------------------------------------------

    @property
    def depth(self) -> int:
        """Layers of the auxiliary model; shared ones count as often as they run."""
        return auxiliary.depth(self.config.auxiliary, self.shape.num_layers)

    @property
    def layers_per_cell(self) -> int:
        """Layers of the auxiliary model that are stored."""
        return auxiliary.cell_size(self.config.auxiliary, self.shape.num_layers)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers of the global model that the auxiliary model consists of, by index."""
        return auxiliary.layers(self.config.auxiliary, self.shape.num_layers)

    # -- prompts -----------------------------------------------------------------------------------

    @property
    def num_prompt_tokens(self) -> int:
        """Positions that prompts take from a text."""
        return 0 if self.config.tunes_weights else self.config.prompt.num_tokens

    @property
    def max_text_positions(self) -> int:
        """Positions that the prompts leave for a text."""
        return self.shape.num_positions - self.num_prompt_tokens

    @property
    def max_length(self) -> int:
        """Most tokens of a training text.

        The last token of a text that is continued is predicted, not read, and takes no position.
        """
        num_unread = 0 if self.is_cloze else 1
        return min(self.config.data.max_length, self.max_text_positions + num_unread)

    @property
    def prompt_spec(self) -> PromptSpec:
        """The prompts at the depth of the global model."""
        prompt = self.config.prompt
        return PromptSpec.of(
            self.shape,
            prompt.kind,
            prompt.num_tokens,
            projection=prompt.projection,
            encoder=prompt.encoder,
        )

    @cached_property
    def instruction_tokens(self) -> InstructionTokens:
        """What turns phrases into rows of token ids; raises ConfigError if nothing can pad them."""
        return InstructionTokens(self.tokenizer, self.config.prompt.num_tokens)

    @property
    def depth_map(self) -> DepthMap:
        """How prompts go between the global model and the auxiliary one."""
        by_layer = self.config.prompt.mapping == "same_layers"
        return DepthMap(self.prompt_spec, self.depth, self.layers if by_layer else None)

    def first_prompt(self, model: backbone.LanguageModel) -> Prompt:
        """Return the prompt that everybody begins with, at the global model's depth, on the CPU.

        Args:
            model: the global model, which reads the words of `prompt.init_text`.

        Raises:
            ConfigError: these words have no token.
        """
        settings = self.config.prompt
        prompt = Prompt(self.prompt_spec)
        if settings.init == "random":
            return prompt.initialise(self.config.run.seed, settings.init_std)
        if self.is_cloze:
            ids = self.tokenizer(settings.init_text, add_special_tokens=False)["input_ids"]
        else:
            [ids] = token_ids(self.tokenizer, [settings.init_text])
        if not ids:
            raise ConfigError(
                "prompt.init_text: found a text without a token to this tokenizer, expected one at "
                "least; write another"
            )
        repeated = (ids * settings.num_tokens)[: settings.num_tokens]
        tokens = torch.tensor(repeated)  # [num_tokens], int64
        if settings.kind == "input":
            embedding = model.model.get_input_embeddings()
            values = embedding(tokens.to(model.device)).detach().float()
        else:
            states = model.keys_and_values(tokens)
            # [layers, 2, heads, num_tokens, head_size] -> [num_tokens, all values of a token]
            values = states.permute(3, 0, 1, 2, 4).reshape(settings.num_tokens, -1)
        prompt.load({"prompt": values.cpu()})
        return prompt
