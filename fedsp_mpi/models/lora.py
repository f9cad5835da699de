"""Low-rank adapters (LoRA, Hu et al., 2021, arXiv 2106.09685) of a model's linear maps, by peft."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from fedsp_mpi import rng
from fedsp_mpi.config.lora import LoraConfig
from fedsp_mpi.config.parsing import ConfigError
from fedsp_mpi.files import fingerprint, ownership
from fedsp_mpi.files.untrusted import JsonMapping
from fedsp_mpi.models import auxiliary
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.tensors import NamedTensors

_WEIGHTS_FILE = "adapter_model.safetensors"
_IN_MODEL = ".default.weight"  # how the names of peft's parameters end
_IN_FILE = "base_model.model."  # how they begin in its files


class Lora:
    """The adapters of one model, which they become part of: fp32 A [rank, in] and B [out, rank].

    Args:
        model: whose own weights stay as they are.
        settings: of the adapters.

    Raises:
        ConfigError: the model has no such maps.
    """

    def __init__(self, model: LanguageModel, settings: LoraConfig) -> None:
        self._model = model
        self._settings = settings
        self._parameters: dict[str, nn.Parameter] = {}
        self.attach()

    def attach(self) -> None:
        """Put new adapters, with B = 0, into the model as it is now.

        Raises:
            ConfigError: the model has no such maps, or they cannot be merged.
        """
        import peft  # here: it takes a tenth of a start, and most runs have no adapters

        targets = list(self._settings.targets) or None
        settings = peft.LoraConfig(
            r=self._settings.rank,
            lora_alpha=self._settings.alpha,
            lora_dropout=self._settings.dropout,
            target_modules=targets,
        )
        family = self._model.model.config.model_type
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that GPT-2's maps are transposed
                peft.inject_adapter_in_model(settings, self._model.model)
            # Adapters of embeddings have other names, and begin in another way.
            if any("lora_embedding_" in name for name, _ in self._model.model.named_parameters()):
                raise ValueError("an embedding is no linear map")
        except ValueError:
            named = ", ".join(self._settings.targets) or "none, and peft knows no usual ones"
            raise ConfigError(
                f"lora.targets: found {named} for a {family}, expected endings of names of its "
                f"linear maps, such as {', '.join(linear_maps(self._model.model)[:4])}"
            ) from None
        self._require_mergeable()
        for weight in self._model.weights.values():
            weight.requires_grad = False
        self._parameters = {}
        for name, parameter in self._model.model.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.float()
                self._parameters[name.removesuffix(_IN_MODEL)] = parameter

    def _require_mergeable(self) -> None:
        """Raise ConfigError if adapters of a head are to be merged whose weight is that of the
        embeddings: merged into it, they would change these, too.
        """
        model = self._model.model
        is_adapted = hasattr(model.get_output_embeddings(), "base_layer")
        if self._settings.merged and is_adapted and model.config.tie_word_embeddings:
            raise ConfigError(
                f"lora.targets: found {', '.join(self._settings.targets)} with lora.merged=true, "
                "expected maps without the head, whose weight is that of the embeddings here; "
                "leave it out, or set lora.merged=false"
            )

    def initialise(self, seed: int) -> Lora:
        """Draw A as peft does, by a seed of its own, with B = 0; return self."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            rng.seed_torch(seed, "lora")
            for name, parameter in self._parameters.items():
                values = torch.zeros(parameter.shape)
                if name.endswith("lora_A"):
                    nn.init.kaiming_uniform_(values, a=5**0.5)
                parameter.data.copy_(values)
        return self

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return A and B of all maps, in the order of the model."""
        return self._parameters.values()

    def tensors(self) -> Mapping[str, nn.Parameter]:
        """Return A and B by name: "model.layers.0.self_attn.q_proj.lora_A", [rank, in]."""
        return self._parameters

    def pack(self) -> NamedTensors:
        """Copy A [rank, in] and B [out, rank] into the tensors that travel, fp32."""
        return NamedTensors.pack(self._parameters)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy in A [rank, in] and B [out, rank] by the names of `tensors`, any float dtype."""
        for name, tensor in tensors.items():
            self._parameters[name].data.copy_(tensor)

    def limit_rank(self, rank: int) -> None:
        """Keep the first rows of A and columns of B, and set the others to 0.

        They stay 0 while the adapters are trained: the gradient of each is a product with the
        other.
        """
        for name, parameter in self._parameters.items():
            dropped = parameter.data[rank:] if name.endswith("lora_A") else parameter.data[:, rank:]
            dropped.zero_()

    def clear(self) -> None:
        """Set B to 0, so that the model is as it was without adapters."""
        for name, parameter in self._parameters.items():
            if name.endswith("lora_B"):
                parameter.data.zero_()

    def begin_training(self) -> None:
        """Turn the adapters' dropout on if they have any; the model's own stays off."""
        for parameter in self._parameters.values():
            parameter.requires_grad = True
        if self._settings.dropout:
            self._model.draws = True
            for name, module in self._model.model.named_modules():
                if ".lora_dropout" in name:
                    module.train()

    def end_training(self) -> None:
        """Turn dropout off."""
        if self._settings.dropout:
            self._model.draws = False
            self._model.model.eval()


def num_parameters(model: LanguageModel, settings: LoraConfig) -> int:
    """Return the number of values of the adapters of a model, which becomes useless for others.

    Args:
        model: best on the meta device.
        settings: of the adapters.
    """
    return sum(parameter.numel() for parameter in Lora(model, settings).parameters())


def require_targets(config: JsonMapping, num_layers: int, settings: LoraConfig) -> None:
    """Check, without weights, that a model has the maps that are to be adapted.

    Args:
        config: transformers' configuration, as its `to_dict` has it.
        num_layers: of the model.
        settings: of the adapters.

    Raises:
        ConfigError: the model has no such maps.
    """
    meta = torch.device("meta")
    with meta:
        Lora(auxiliary.build(config, num_layers, meta, dtype=torch.float32), settings)


def linear_maps(model: nn.Module) -> list[str]:
    """Return the endings of the names of a model's linear maps, without its head."""
    endings = {
        name.rpartition(".")[2]: None
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and "." in name
    }
    return list(endings)


def write(folder: Path, tensors: NamedTensors, settings: LoraConfig, *, base: str) -> None:
    """Write a stock peft adapter: `PeftModel.from_pretrained(model, folder)` uses it.

    Args:
        folder: made if it does not exist.
        tensors: A [rank, in] and B [out, rank] of each map, fp32.
        settings: of the adapters.
        base: name or folder of the global model, noted in the adapter.
    """
    import peft

    folder.parent.mkdir(parents=True, exist_ok=True)
    part = ownership.begin_model(folder)
    names = {name: f"{_IN_FILE}{name}.weight" for name in tensors}
    safetensors.torch.save_file(
        {names[name]: tensor for name, tensor in tensors.torch().items()}, part / _WEIGHTS_FILE
    )
    adapted = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in tensors}
    peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=sorted(settings.targets or adapted),
        base_model_name_or_path=base,
        task_type="CAUSAL_LM",
        inference_mode=True,
    ).save_pretrained(str(part))
    fingerprint.list_folder(part)
    ownership.place_model(part, folder)


def merged(model: nn.Module, folder: Path) -> nn.Module:
    """Return a model with an adapter that `write` wrote merged into its weights, as peft does it.

    Args:
        model: of transformers, fp32; it is changed.
        folder: of the adapter.
    """
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that GPT-2's maps are transposed
        adapted = peft.PeftModel.from_pretrained(model, str(folder))
    merged_model: nn.Module = adapted.merge_and_unload()
    return merged_model


def read(folder: Path) -> dict[str, Tensor]:
    """Return A [rank, in] and B [out, rank] of each map of an adapter that `write` wrote.

    Raises:
        ValueError: the folder holds none.
    """
    try:
        tensors = safetensors.torch.load_file(folder / _WEIGHTS_FILE)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"{folder}: found no peft adapter ({error}), expected {_WEIGHTS_FILE}; copy the whole "
            "run folder again"
        ) from None
    return {
        name.removeprefix(_IN_FILE).removesuffix(".weight"): tensor
        for name, tensor in tensors.items()
    }
