"""A model's configuration and its tokenizer, read from a folder or the hub, and what is wrong with
them in one line.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import transformers

from fedsp_mpi.log import one_line
from fedsp_mpi.models.families import FAMILIES, SIZES, shape_of
from fedsp_mpi.models.hub import AbsentError, locate
from fedsp_mpi.models.remote_code import NO_CODE, require_no_code, require_whole_numbers


def read_config(name: str, revision: str | None = None) -> Any:
    """The configuration of a model, from a folder or the hub, without its weights.

    Raises ValueError if there is no such model, if it asks to run code of its own or is quantised,
    if its family is not one of `FAMILIES`, or if its sizes make no model.
    """
    expected = "a folder with a config.json, or a name that the hub or its local cache knows"
    with refusing("model.name", name, "which could not be read", expected):
        folder = locate(name, revision, "config.json")
    require_no_code(folder, "model.name", name)
    require_whole_numbers(folder, name)
    with refusing("model.name", name, "which could not be read", expected):
        config = transformers.AutoConfig.from_pretrained(folder, **NO_CODE)
    if hasattr(config, "auto_map"):
        del (
            config.auto_map
        )  # of classes that transformers has: what is written later needs no code either
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model.name: found {name!r} of the family {config.model_type!r}, expected one "
            f"of {', '.join(FAMILIES)}"
        )
    _check_sizes(name, config)
    return config


def read_tokenizer(name: str, revision: str | None = None) -> Any:
    """The tokenizer of a model, from a folder or the hub.

    Raises ValueError if there is none, or code comes with it.
    """
    expected = "a folder with a tokenizer.json, or a hub name"
    with refusing("model.tokenizer", name, "which has no readable tokenizer", expected):
        folder = locate(name, revision, "tokenizer")
    require_no_code(folder, "model.tokenizer", name)
    with refusing("model.tokenizer", name, "which has no readable tokenizer", expected):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **NO_CODE)
    if not tokenizer("a b", add_special_tokens=False)[
        "input_ids"
    ]:  # what transformers makes up where there is none
        raise ValueError(
            f"model.tokenizer: found {name!r}, whose tokenizer turns a text into nothing; "
            "expected a folder with the "
            "tokenizer.json that belongs to the model"
        )
    return tokenizer


def _check_sizes(name: str, config: Any) -> None:
    for size in SIZES:
        value = getattr(config, size, None)
        if value is not None and (not isinstance(value, int) or value < 1):
            key = config.attribute_map.get(size, size)
            raise ValueError(
                f"model.name: found {name!r} with {key} {value!r} in its config.json, "
                "expected at least 1"
            )
    heads, groups = config.num_attention_heads, shape_of(config).num_kv_heads
    if heads % groups:
        raise ValueError(
            f"model.name: found {name!r} with {heads} heads over {groups} of keys and "
            "values in its config.json, "
            "expected a multiple of them"
        )


@contextmanager
def refusing(key: str, name: str, what: str, expected: str) -> Iterator[None]:
    """Turn into one ValueError what transformers throws at files that are not as they should be:
    nearly anything.

    Args:
        key: of the configuration.
        name: what the key says.
        what: what is wrong with it.
        expected: what would be right, and what to do.
    """
    try:
        yield
    except AbsentError as error:
        raise ValueError(f"{key}: {error}") from None
    except pickle.UnpicklingError:  # its text advises to trust the file
        raise ValueError(
            f"{key}: found {name!r}, whose weights are pickled, which hold more than "
            "numbers, or are damaged; expected "
            "plain weights; take a copy with safetensors"
        ) from None
    except Exception as error:
        raise ValueError(
            f"{key}: found {name!r}, {what} ({one_line(error, first_line=True)}); expected {expected}"
        ) from None
