"""Read a model's configuration and its tokenizer, from a folder or the hub; say in one line what is
wrong with them.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import transformers
from transformers import PreTrainedConfig

from fedsp_mpi.log import one_line
from fedsp_mpi.models import structure
from fedsp_mpi.models.families import SIZES, shape_of
from fedsp_mpi.models.hub import AbsentError, locate
from fedsp_mpi.models.remote_code import NO_CODE, require_no_code, require_whole_numbers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_config(name: str, revision: str | None = None) -> PreTrainedConfig:
    """Read the configuration of a model, without its weights.

    Args:
        name: folder or hub name.
        revision: of the hub's files; None is the main one.

    Raises:
        ValueError: there is no such model, it asks to run code of its own or is quantised, its
            family cannot be used, or its sizes make no model.
    """
    problem = "which could not be read"
    expected = "a folder with a config.json, or a name that the hub or its local cache knows"
    with refusing("model.name", name, problem, expected=expected):
        folder = locate(name, revision, "config.json")
    require_no_code(folder, "model.name", name)
    require_whole_numbers(folder, name)
    with refusing("model.name", name, problem, expected=expected):
        config = transformers.AutoConfig.from_pretrained(folder, **NO_CODE)
    if hasattr(config, "auto_map"):
        # It names classes that transformers has. A model written later is not to need code either.
        del config.auto_map
    structure.require_known(name, config)
    _check_sizes(name, config)
    structure.require_usable(name, config)
    return config


def read_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a model.

    Args:
        name: folder or hub name.
        revision: of the hub's files; None is the main one.

    Raises:
        ValueError: there is none, or it asks to run code of its own.
    """
    problem = "which has no readable tokenizer"
    expected = "a folder with a tokenizer.json, or a hub name"
    with refusing("model.tokenizer", name, problem, expected=expected):
        folder = locate(name, revision, "tokenizer")
    require_no_code(folder, "model.tokenizer", name)
    with refusing("model.tokenizer", name, problem, expected=expected):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **NO_CODE)
    # Where there is no tokenizer, transformers makes up one that knows no token, or a blank alone.
    words = set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)
    if len(words) < 2 or not tokenizer("a b", add_special_tokens=False)["input_ids"]:
        raise ValueError(
            f"model.tokenizer: found {name!r}, whose tokenizer knows no words; "
            "expected a folder with the tokenizer.json that belongs to the model"
        )
    return tokenizer


def _check_sizes(name: str, config: PreTrainedConfig) -> None:
    """Raise ValueError unless the sizes are positive, and heads share keys and values evenly."""
    for size in SIZES:
        value = getattr(config, size, None)
        if value is not None and (not isinstance(value, int) or value < 1):
            key = config.attribute_map.get(size, size)
            raise ValueError(
                f"model.name: found {name!r} with {key} {value!r} in its config.json, "
                "expected at least 1"
            )
    num_heads = config.num_attention_heads
    num_kv_heads = shape_of(config).num_kv_heads
    if num_heads % num_kv_heads:
        raise ValueError(
            f"model.name: found {name!r} with {num_heads} heads over {num_kv_heads} of keys and "
            "values in its config.json, expected a multiple of them"
        )


@contextmanager
def refusing(key: str, name: str, problem: str, *, expected: str) -> Iterator[None]:
    """Turn whatever a library raises at files that it cannot read into one ValueError.

    Args:
        key: of the configuration.
        name: the key's value.
        problem: what is wrong with the files, as a clause: "which could not be read".
        expected: what would be right, and what to do.
    """
    try:
        yield
    except AbsentError as error:
        raise ValueError(f"{key}: {error}") from None
    except pickle.UnpicklingError:  # its message advises to trust the file
        raise ValueError(
            f"{key}: found {name!r}, whose weights are pickled with more than numbers in them, "
            "or are damaged; expected plain weights; take a copy with safetensors"
        ) from None
    except Exception as error:
        raise ValueError(
            f"{key}: found {name!r}, {problem} ({one_line(error, first_line=True)}); "
            f"expected {expected}"
        ) from None
