"""Batches of tuning as they are cut by default: little padding, and the same losses."""

from __future__ import annotations

import pytest

from fedsp_mpi import config
from fedsp_mpi.run.any_inputs import inputs_of
from helpers.paths import SHARED
from helpers.runs import gap_settings, short


def test_losses_of_a_run_are_those_of_whole_batches(tmp_path):
    settings = gap_settings(tmp_path, "bert", "server.tuning.steps=2")
    whole = ("client.tuning.max_padding=null", "server.tuning.max_padding=null")
    cut = short(tmp_path / "cut", *settings)
    at_once = short(tmp_path / "whole", *settings, *whole)
    assert cut.clients["loss_prompt_last"].tolist() != at_once.clients["loss_prompt_last"].tolist()
    for name in ("loss_prompt_first", "loss_prompt_last"):
        assert cut.clients[name].tolist() == pytest.approx(at_once.clients[name], rel=1e-6)
    for name in ("server_loss_first", "server_loss_last", "validation_loss"):
        assert cut.rounds[name].tolist() == pytest.approx(at_once.rounds[name], rel=1e-6)


@pytest.mark.parametrize("task", ["sst2", "arc_easy"])
def test_at_most_15_percent_of_real_batches_is_padding(task):
    model, source = SHARED / "models" / "stories15m", SHARED / "data" / task
    if not (model.exists() and source.exists()):
        pytest.skip(f"no local copy of stories15m and {task} in ../shared")
    settings = (f"model.name={model}", f"data.task={task}", f"data.source={source}")
    inputs = inputs_of(config.load(None, [*settings, "data.limit.train=1000"]))
    for owner, stage in [(0, inputs.config.server.tuning), (1, inputs.config.client.tuning)]:
        batches = inputs.batches(owner, stage, "prompt")
        for step in range(20):
            masks = [batch.attention_mask for batch in batches.step(step)]
            num_tokens = sum(mask.numel() for mask in masks)
            num_padding = num_tokens - sum(int(mask.sum()) for mask in masks)
            assert num_padding <= 0.15 * num_tokens
            assert sum(map(len, masks)) == stage.batch_size
