"""The frozen global model: its weights are loaded once per process, and sealed."""

from __future__ import annotations

import os

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from fedsp_mpi import rng
from fedsp_mpi.models import structure
from fedsp_mpi.models.families import model_class, without_dropout
from fedsp_mpi.models.hub import locate
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.models.reading import read_config, read_tokenizer, refusing
from fedsp_mpi.models.remote_code import NO_PICKLES
from fedsp_mpi.tensors import seal

__all__ = ["load_global", "quiet", "read_config", "read_tokenizer", "reload"]


def load_global(
    name: str,
    *,
    device: torch.device,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    checkpointing: bool = False,
    trainable: bool = False,
    candidates: Tensor | None = None,
    initial_seed: int | None = None,
) -> LanguageModel:
    """Load the global model: frozen, in evaluation mode, and sealed, so that it cannot be sent.

    Args:
        name: folder or hub name.
        device: that the weights are moved to.
        revision: of the hub's files; None is the main one.
        dtype: of the forward pass, and of frozen weights.
        checkpointing: recompute activations in the backward pass; turns the model's dropout off.
        trainable: fp32 weights that are trained and sent instead: neither frozen nor sealed.
        candidates: sorted ids of the tokens that an answer's token is chosen from, int64
            [candidates]; None: the whole vocabulary.
        initial_seed: draws new weights by this seed, instead of reading some.

    Raises:
        ValueError: the weights cannot be read.
    """
    weights_dtype = torch.float32 if trainable else dtype
    model = LanguageModel(
        _read_model(
            name,
            revision,
            device,
            dtype=weights_dtype,
            checkpointing=checkpointing,
            initial_seed=initial_seed,
        ),
        dtype,
        checkpointing=checkpointing,
        candidates=candidates,
    )
    model.train_weights(trainable)
    if not trainable:
        seal.add(model.weights.items())
    return model


def reload(
    model: LanguageModel,
    name: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype,
    initial_seed: int | None = None,
) -> None:
    """Read the global model's weights again, in another type and in place; freeze and seal them.

    Weights that were rounded do not become exact by being widened. The old ones are freed first.

    Args:
        model: the global model; of no use any more if this raises.
        name: folder or hub name.
        revision: of the hub's files; None is the main one.
        dtype: of the weights and the forward pass.
        initial_seed: draws the weights by this seed again.

    Raises:
        ValueError: the weights cannot be read.
    """
    seal.clear()
    del model.model, model.weights
    weights = _read_model(
        name,
        revision,
        model.device,
        dtype=dtype,
        checkpointing=model.checkpointing,
        initial_seed=initial_seed,
    )
    model.set_model(weights, dtype)
    model.train_weights(False)
    seal.add(model.weights.items())


def _read_model(
    name: str,
    revision: str | None,
    device: torch.device,
    *,
    dtype: torch.dtype,
    checkpointing: bool,
    initial_seed: int | None = None,
) -> PreTrainedModel:
    """Read a transformers model with its head; raise ValueError unless its weights are complete."""
    config = read_config(name, revision)
    if checkpointing:
        config = without_dropout(config)
    if initial_seed is not None:
        drawn = _initialised(config, initial_seed)
        structure.require_causal(name, drawn)
        return drawn.to(device=device, dtype=dtype)  # type: ignore[call-arg]
    with refusing(
        "model.name",
        name,
        "whose weights could not be read",
        expected="those of its config.json, whole; copy the folder again",
    ):
        folder = locate(name, revision, "weights")
        model, loading = model_class(config).from_pretrained(
            folder, dtype=dtype, config=config, output_loading_info=True, **NO_PICKLES
        )
    missing = sorted(loading["missing_keys"])
    if missing:  # transformers fills them with noise
        raise ValueError(
            f"model.name: found {name!r} without {len(missing)} of its weights "
            f"({missing[0]}, ...), expected all that its config.json asks for"
        )
    _require_tied(name, model)
    model = model.to(device)
    structure.require_causal(name, model)
    return model


def _initialised(config: transformers.PretrainedConfig, seed: int) -> transformers.PreTrainedModel:
    """Return a model with weights as its family is initialised, fp32 on the CPU: equal seeds give
    equal weights, whatever the device.
    """
    with torch.random.fork_rng(devices=[]):
        rng.seed_torch(seed, "initial weights")
        return model_class(config).from_config(config).eval()


def _require_tied(name: str, model: PreTrainedModel) -> None:
    """Raise ValueError if the output head is separate although the configuration ties it.

    So it is in T5 1.1 and Flan-T5; a copy of such a model would have its embeddings as its head.
    """
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    if model.config.tie_word_embeddings and head.weight is not embedding.weight:
        raise ValueError(
            f"model.name: found {name!r} with an output head of its own under a configuration "
            "that ties it to the embeddings, expected them to be one, as in T5 1.0; "
            "take another model"
        )


def quiet() -> None:
    """Turn off the progress bars, advice and warnings of the libraries underneath."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Left to choose the accelerator itself, DeepSpeed warns of its choice.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
