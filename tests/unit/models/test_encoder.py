"""P-tuning: input prompts that an encoder makes, whose weights are tuned and travel as well."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
import transformers

from fedsp_mpi import config
from fedsp_mpi.estimate import cost
from fedsp_mpi.models.prompts import DepthMap, Prompt, PromptSpec, read_adapter
from fedsp_mpi.tensors import NamedTensors
from helpers.configs import load, refused
from helpers.runs import FEDPROMPT, short

WIDTH, TOKENS = 6, 4
SPEC = PromptSpec("input", TOKENS, 1, 1, WIDTH)
ENCODERS = ["lstm", "mlp"]


def made(encoder: str) -> Prompt:
    return Prompt(replace(SPEC, encoder=encoder)).initialise(3, 0.5)


def by_hand(t: dict[str, np.ndarray], encoder: str) -> np.ndarray:
    """Apply the encoder in numpy: LSTM cells step by step, both ways, then two linear layers."""
    rows = t["embedding"].astype(float)
    if encoder == "lstm":
        for layer in (0, 1):
            rows = np.concatenate(
                [
                    _one_way(t, rows, f"l{layer}"),
                    _one_way(t, rows[::-1], f"l{layer}_reverse")[::-1],
                ],
                axis=1,
            )
    hidden = np.maximum(rows @ t["mlp.0.weight"].T + t["mlp.0.bias"], 0)
    return hidden @ t["mlp.2.weight"].T + t["mlp.2.bias"]


def _one_way(t: dict[str, np.ndarray], rows: np.ndarray, name: str) -> np.ndarray:
    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))

    state, cell, out = np.zeros(WIDTH), np.zeros(WIDTH), []
    for row in rows:
        gates = t[f"lstm.weight_ih_{name}"] @ row + t[f"lstm.bias_ih_{name}"]
        gates = gates + t[f"lstm.weight_hh_{name}"] @ state + t[f"lstm.bias_hh_{name}"]
        i, f, g, o = np.split(gates, 4)
        cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
        state = sigmoid(o) * np.tanh(cell)
        out.append(state)
    return np.array(out)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_matrix_is_what_the_encoder_makes(encoder):
    prompt = made(encoder)
    prompt.load(
        {name: value + 0.1 for name, value in prompt.tensors().items()}
    )  # offsets are not 0
    expected = by_hand({name: value.numpy() for name, value in prompt.tensors().items()}, encoder)
    assert prompt.matrix().shape == (TOKENS, WIDTH)
    assert np.abs(prompt.matrix().detach().numpy() - expected).max() < 1e-5


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_weight_is_trained_and_begins_as_the_seed_says(encoder):
    prompt = made(encoder)
    prompt.matrix().square().sum().backward()
    assert all(parameter.grad is not None for parameter in prompt.parameters())
    same, other = (
        made(encoder).tensors(),
        Prompt(replace(SPEC, encoder=encoder)).initialise(4, 0.5).tensors(),
    )
    assert all(torch.equal(value, same[name]) for name, value in prompt.tensors().items())
    assert not torch.equal(prompt.tensors()["mlp.0.weight"], other["mlp.0.weight"])
    assert all(not value.any() for name, value in same.items() if "bias" in name)


def test_sizes_are_those_that_are_reckoned():
    """Of BERT-base, 25.40 M values, of which the paper says 25.42 M."""
    with torch.device("meta"):
        large = Prompt(PromptSpec("input", 20, 1, 1, 768, encoder="lstm"))
    cells = 2 * (4 * 768 * (768 + 768) + 8 * 768) + 2 * (4 * 768 * (2 * 768 + 768) + 8 * 768)
    assert (
        large.num_parameters()
        == 20 * 768 + cells + (2 * 768 * 768 + 768) + (768 * 768 + 768)
        == 25_403_904
    )


@pytest.mark.parametrize("encoder", ENCODERS)
def test_it_has_no_depth_and_is_computed_in_fp32(encoder):
    prompt = made(encoder)
    depths = DepthMap(prompt.spec, 2)
    down = depths.down(prompt.tensors())
    assert all(torch.equal(value, prompt.tensors()[name]) for name, value in down.items())
    with torch.autocast("cpu", torch.bfloat16):
        assert prompt.matrix().dtype is torch.float32


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_run_sends_the_encoder_and_saves_what_it_makes(tmp_path, encoder):
    run = short(
        tmp_path / "runs",
        *FEDPROMPT,
        "prompt.kind=input",
        f"prompt.encoder={encoder}",
        "prompt.num_tokens=4",
    )
    best = run.prompts(int(run.results["round"][-1]))
    assert {name.partition(".")[0] for name in best} == {"embedding", "mlp"} | (
        {"lstm"} if encoder == "lstm" else set()
    )
    assert run.sections["models"]["prompt_on_the_wire"] == sum(
        value.size for value in best.values()
    )
    assert set(run.clients["bytes_up"].tolist()) == {
        4 * sum(value.size for value in best.values()) + 256
    }
    first, last = run.prompts(1), run.prompts(2)
    assert all(not np.array_equal(first[name], last[name]) for name in first)
    width = best["embedding"].shape[1]
    prompt = Prompt(PromptSpec("input", 4, 1, 1, width, encoder=encoder))
    prompt.load(
        NamedTensors.pack({name: torch.from_numpy(value) for name, value in best.items()}).torch()
    )
    saved = read_adapter(run.file.parent / "prompt")
    with torch.no_grad():  # an LSTM takes another way where it keeps no gradient
        assert torch.equal(saved, prompt.matrix())
    base = transformers.AutoModelForCausalLM.from_pretrained(config.EMBEDDED.parent / "model")
    theirs = peft.PeftModel.from_pretrained(base, run.file.parent / "prompt")
    assert torch.isfinite(theirs(input_ids=torch.tensor([[5, 6, 7]])).logits).all()
    planned = cost.plan(config.load(run.file.parent / "config.yaml"), "own").methods[0]
    assert planned.trains == run.sections["models"]["prompt_on_the_wire"]


def test_what_cannot_be_is_refused(tmp_path):
    refused(lambda: load(tmp_path, {}, "prompt.encoder=mlp"), "prompt.encoder", "prompt.kind=input")
    text = ("prompt.kind=input", "prompt.encoder=mlp", "prompt.init=text")
    refused(lambda: load(tmp_path, {}, *text), "prompt.init", "expected random")
    refused(
        lambda: load(tmp_path, {}, "prompt.kind=input", "prompt.encoder=gru"),
        "prompt.encoder",
        "lstm",
    )
