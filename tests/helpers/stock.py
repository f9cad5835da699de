"""What stock transformers and stock peft make of the same prompt."""

from __future__ import annotations

from pathlib import Path

import peft
import torch
from transformers import AutoModelForCausalLM

from fedsp_mpi.models import prompts
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.models.prompts import Prompt
from fedsp_mpi.tensors import NamedTensors
from helpers import tiny


def as_peft(path: str, prompt: Prompt, target: Path) -> peft.PeftModel:
    """The adapter that is written for a prompt, read back by stock peft over a stock model."""
    prompts.write_adapter(target, NamedTensors.pack(prompt.tensors()), prompt.spec, base=path)
    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), target).eval()


@torch.no_grad()
def apart_from_peft(path: str, model: LanguageModel, prompt: Prompt, target: Path) -> float:
    """Largest difference of logits where there is text."""
    batch = tiny.batch()
    answered = as_peft(path, prompt, target)(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask
    )
    expected = answered.logits[:, -batch.input_ids.shape[1] :]
    assert expected.abs().max() > 0.5
    return float(
        (expected - model.head(model.hidden(batch, prompt)))[batch.attention_mask.bool()]
        .abs()
        .max()
    )
