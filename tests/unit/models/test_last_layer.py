"""The last layer at the answers' positions alone: the states and gradients of a complete pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedsp_mpi.config.lora import LoraConfig
from fedsp_mpi.models.families import layers_of, position_wise_parts
from fedsp_mpi.models.lora import Lora
from fedsp_mpi.models.prompts import Prompt, PromptSpec
from fedsp_mpi.tensors import AnswerPlaces, Batch
from helpers import tiny

IGNORED = -100


def batch_of(lengths, num_answers):
    """Random texts that end with their answers, padded on the right."""
    longest = max(lengths)
    ids = torch.randint(5, tiny.VOCABULARY, (len(lengths), longest))
    positions = torch.arange(longest)
    ends = torch.tensor(lengths)[:, None]
    starts = ends - torch.tensor(num_answers)[:, None]
    is_text = positions < ends
    targets = torch.where(is_text & (positions >= starts), ids, IGNORED)
    return Batch(ids * is_text, is_text.long(), targets)


def gap_batch(lengths):
    """Texts with one gap each, not at their end."""
    batch = batch_of(lengths, [0] * len(lengths))
    for row, length in enumerate(lengths):
        batch.input_ids[row, length:] = 3  # RoBERTa counts the positions of what is no padding
        batch.targets[row, length // 2] = 7
    return batch


def gradients_of(states, model, prompt):
    """The gradients of some function of the states, by name."""
    weight = torch.linspace(0.5, 1.5, states.numel()).reshape(states.shape)
    parameters = dict(model.weights) | ({} if prompt is None else dict(prompt.named_parameters()))
    for parameter in parameters.values():
        parameter.grad = None
    (states * weight).sum().backward()
    grads = {name: parameter.grad for name, parameter in parameters.items()}
    return {name: grad.clone() for name, grad in grads.items() if grad is not None}


def last_layer_rows(model, num_rows):
    """Have the number of positions that go through the last layer appended to a list."""
    return layers_of(model.model)[-1].register_forward_hook(
        lambda _, __, output: num_rows.append(output.shape[1])
    )


@pytest.mark.parametrize("family", [*tiny.CAUSAL_FAMILIES, "bert", "roberta"])
def test_answers_have_the_states_and_gradients_of_a_complete_pass(family, tmp_path):
    """With texts in and beyond a sliding window, one answer a text and several, and any prompt."""
    model = tiny.load(tiny.model_folder(tmp_path, family), trainable=True)
    torch.manual_seed(0)
    if model.kind == "masked":
        batches = [gap_batch([9, 5, 12])]
    else:
        batches = [batch_of([12, 9, 4, 12], [1, 1, 1, 1]), batch_of([6, 4, 7], [3, 1, 2])]
    for kind in (None, "prefix", "input"):
        prompt = None
        if kind is not None:
            prompt = Prompt(PromptSpec.of(model.shape, kind, 5)).initialise(1, 0.5)
        for batch in batches:
            complete = model.hidden(batch, prompt)[batch.targets != IGNORED]
            expected = gradients_of(complete, model, prompt)
            num_rows = []
            with_hook = last_layer_rows(model, num_rows)
            states = model.answer_states(batch, prompt)
            with_hook.remove()
            # Before them, an input prompt may have gone through the model for all texts at once.
            assert num_rows[-1] == (batch.targets != IGNORED).sum(1).max()
            torch.testing.assert_close(states, complete, rtol=1e-4, atol=1e-5)
            actual = gradients_of(states, model, prompt)
            assert set(actual) == set(expected)
            for name, gradient in expected.items():
                largest = float(gradient.abs().max())
                difference = float((actual[name] - gradient).abs().max())
                assert difference < 1e-4 * largest + 1e-5, name


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "t5"])
def test_compiled_parts_give_the_same_states_and_gradients(family, tmp_path):
    """With one batch after another of other sizes; a layer more costs no compilation."""
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    plain = tiny.load(tiny.model_folder(tmp_path, family), trainable=True)
    compiled = tiny.load(tiny.model_folder(tmp_path, family), trainable=True).compile()
    torch.manual_seed(0)
    make = batch_of if plain.kind == "causal" else lambda lengths, _: gap_batch(lengths)
    for lengths in ([12, 9, 4, 12], [6, 7, 5]):
        batch = make(lengths, [1] * len(lengths))
        states = [model.answer_states(batch) for model in (plain, compiled)]
        torch.testing.assert_close(*states, rtol=1e-4, atol=1e-5)
        expected, actual = map(gradients_of, states, (plain, compiled), (None, None))
        assert set(actual) == set(expected)
        for name, gradient in expected.items():
            torch.testing.assert_close(actual[name], gradient, rtol=1e-3, atol=1e-4)
    kinds = {type(part) for part in position_wise_parts(compiled.model)}
    assert 0 < counters["stats"]["unique_graphs"] <= 4 * len(kinds)


def test_a_layer_that_draws_random_numbers_runs_once(tmp_path):
    """Two runs with a dropout each would not be those of one layer."""
    model = tiny.load(tiny.model_folder(tmp_path, "gpt2"))
    adapters = Lora(model, LoraConfig(rank=2, dropout=0.5)).initialise(1)
    batch = batch_of([12, 9], [1, 1])
    num_rows = []
    last_layer_rows(model, num_rows)
    model.answer_states(batch)
    adapters.begin_training()
    model.answer_states(batch)
    adapters.end_training()
    model.answer_states(batch)
    model.train_weights(True)
    model.model.train()
    model.answer_states(batch)
    assert num_rows == [1, 12, 1, 12]


def test_places_of_answers():
    for counts in ([1, 1], [2, 2, 2], [0, 3, 1]):
        is_target = np.zeros((len(counts), 8), dtype=bool)
        for row, count in enumerate(counts):
            is_target[row, 2 + row : 2 + row + count] = True
        positions, flat, slots = AnswerPlaces.of(is_target)
        rows, columns = is_target.nonzero()
        assert flat.tolist() == (rows * 8 + columns).tolist()
        assert positions.shape == (len(counts), max(counts))
        chosen = positions.flatten() if slots is None else positions.flatten()[slots]
        assert chosen.tolist() == columns.tolist()
