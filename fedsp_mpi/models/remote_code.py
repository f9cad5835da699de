"""Refuse what a model's folder may ask for beyond being read: code to run, and weights that are not
plain numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import transformers

from fedsp_mpi.files.untrusted import JsonMapping, JsonObject

# For every `from_pretrained` and `from_config`: no code of a folder is run, and nothing but numbers
# is unpickled.
NO_CODE: JsonObject = {"trust_remote_code": False}
NO_PICKLES: JsonObject = {**NO_CODE, "weights_only": True}
_ATTENTION = ("attn_implementation", "_attn_implementation")
_QUANTISED = ("quantization_config", "compression_config")


def require_no_code(folder: Path, key: str, name: str) -> None:
    """Raise ValueError if a model's or a tokenizer's files name code outside transformers.

    A class that transformers has under the same name is no such code: transformers takes its own,
    whatever the folder holds.

    Args:
        folder: holds config.json, tokenizer_config.json, or both.
        key: of the configuration, for the message: "model.name" or "model.tokenizer".
        name: the key's value.
    """
    for file in ("config.json", "tokenizer_config.json"):
        settings = _read_settings(folder / file)
        for code in [*_custom_classes(settings.get("auto_map")), *_hub_kernels(settings)]:
            raise ValueError(
                f"{key}: found {name!r}, whose {file} asks to run code of its own ({code[:100]}), "
                "which is never done, expected files that transformers reads by itself; "
                "take another model or tokenizer"
            )


def require_whole_numbers(folder: Path, name: str) -> None:
    """Raise ValueError if a model's weights are quantised, or are an adapter to another model.

    Args:
        folder: holds config.json.
        name: of the model, for the message.
    """
    settings = _read_settings(folder / "config.json")
    for key in _QUANTISED:
        quantised = settings.get(key)
        if quantised:
            method = quantised.get("quant_method") if isinstance(quantised, Mapping) else None
            raise ValueError(
                f"model.name: found {name!r}, whose weights are quantised ({method or key}), "
                "expected weights in float32, bfloat16 or float16; name the unquantised model "
                "that it was made from"
            )
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"model.name: found {name!r} with an adapter_config.json, in whose place "
            "transformers would read another model, expected a whole model; merge the adapter "
            "into its model and save that, or remove the file"
        )


def _read_settings(path: Path) -> JsonObject:
    """Read a JSON file; return no settings if that fails, which its real reader will report."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _custom_classes(auto_map: object) -> Iterator[str]:
    """Yield the classes of an auto_map that transformers does not have.

    They are written "module.Class" or "repository--module.Class".
    """
    values = auto_map.values() if isinstance(auto_map, Mapping) else [auto_map]
    for value in values:
        references = value if isinstance(value, (list, tuple)) else [value]
        for reference in references:
            if reference is None:
                continue
            class_name = str(reference).rpartition(".")[2]
            if not hasattr(transformers, class_name):
                yield str(reference)


def _hub_kernels(settings: JsonMapping) -> Iterator[str]:
    """Yield the attention implementations that are hub repositories.

    transformers would load and run their code.
    """
    for key in _ATTENTION:
        value = settings.get(key)
        choices = value.values() if isinstance(value, Mapping) else [value]
        for choice in choices:
            if isinstance(choice, str) and "/" in choice:
                yield choice
