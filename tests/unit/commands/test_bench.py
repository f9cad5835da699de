"""The bare loop comes to the same prompts; what it cannot be compared with is one line."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedsp_mpi import config
from fedsp_mpi.commands import bench_local
from fedsp_mpi.log import Log
from fedsp_mpi.models.by_hand import loss_by_hand, loss_by_peft
from fedsp_mpi.models.losses import answer_loss_of
from fedsp_mpi.models.prompts import Prompt, PromptSpec
from helpers import tiny
from helpers.mpi import both_ends, environment_of_ranks
from helpers.paths import ROOT
from helpers.runs import fedsp

SHORT = [
    "client.alignment.steps=2",
    "client.tuning.steps=3",
    "client.tuning.batch_size=4",
    "client.tuning.micro_batch=3",
]


def local(*settings: str, repeats: int = 1) -> bench_local.LocalTiming:
    return bench_local.local(config.load(None, [*SHORT, *settings]), repeats, Log(None))


@pytest.mark.parametrize(
    "settings", [[], ["federation.rounds=1"], ["prompt.kind=input", "prompt.projection=null"]]
)
def test_the_bare_loop_is_compared_with_the_client(settings):
    timing = local(*settings)
    assert math.isfinite(timing.package_seconds) and math.isfinite(timing.bare_seconds)
    assert timing.ratio == timing.package_seconds / timing.bare_seconds > 0


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_passes_of_a_step_come_to_the_losses_of_a_model_written_by_hand(tmp_path, family):
    """And to its gradients, and to peft's losses."""
    folder = tiny.model_folder(tmp_path / "model", family)
    model = tiny.load(folder)
    prompt = Prompt(PromptSpec.of(model.shape, "prefix", 5))
    prompt.initialise(1, 0.5)
    batch = tiny.batch()
    gradients = []
    losses = [answer_loss_of(model, prompt, batch), loss_by_hand(model)(prompt, batch)]
    for loss in losses:
        prompt.zero_grad()
        loss.backward()
        gradients.append(prompt.get_parameter("prompt").grad.clone())
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
    by_peft = loss_by_peft(model, prompt)(prompt, batch)
    torch.testing.assert_close(by_peft, losses[0], rtol=1e-5, atol=0)


def test_the_passes_of_a_step_are_timed():
    timing = bench_local.step(config.load(None, SHORT), 1)
    assert timing is not None
    assert min(timing.package_seconds, timing.by_hand_seconds, timing.peft_seconds) > 0
    assert bench_local.step(config.load(None, [*SHORT, "prompt.kind=input"]), 1) is None


@pytest.mark.parametrize(
    ("settings", "repeats", "words"),
    [
        ([], 0, ["--repeats: found 0", "at least 1"]),
        ([], -3, ["--repeats: found -3", "at least 1"]),
        (
            ["federation.client_state=restarted"],
            1,
            ["federation.client_state: found restarted", "expected kept"],
        ),
        (
            ["federation.stragglers=drop", "federation.client_seconds=60"],
            1,
            ["federation.stragglers: found drop", "expected wait"],
        ),
        (["auxiliary.dropout=true"], 1, ["auxiliary.dropout: found true", "expected false"]),
        (
            ["model.gradient_checkpointing=true", "prompt.kind=input"],
            1,
            ["model.gradient_checkpointing: found true", "expected false"],
        ),
    ],
)
def test_what_the_bare_loop_does_not_do(settings, repeats, words):
    with pytest.raises(ValueError) as error:
        local(*settings, repeats=repeats)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("n", "arguments", "words"),
    [
        (0, ["local", "--set", "model.name=/nowhere/x"], "model.name: found '/nowhere/x'"),
        (0, ["local", "--set", "auxiliary.start_layer=99"], "start_layer 99"),
        (0, ["local", "--repeats", "0"], "--repeats: found 0"),
        (2, ["wire", "--repeats", "0"], "--repeats: found 0"),
    ],
)
def test_a_mistake_is_one_line(n, arguments, words):
    result = fedsp(n, ["bench", *arguments], status=2)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("fedsp_mpi: ") and words in lines[0], both_ends(
        result
    )


def test_the_record_is_measured_where_runs_live_and_leaves_nothing(tmp_path):
    where = ["--set", f"run.folder={tmp_path / 'runs'}"]
    printed = fedsp(0, ["bench", "record", "--rounds", "12", "--clients", "3", *where]).stdout
    line = re.search(
        r"12 rounds of 3 clients: .* ratio (\S+); (\S+) MB, written (\S+) times", printed
    )
    assert line, printed
    ratio, megabytes, written = map(float, line.groups())
    # A prompt of 49 kB for each round, which is written twice: by itself, and when it is folded.
    assert ratio > 0 and 0.58 < megabytes < 0.7 and 1.9 < written < 4
    assert list((tmp_path / "runs").iterdir()) == []
    (tmp_path / "file").write_text("")
    said = fedsp(0, ["bench", "record", "--set", f"run.folder={tmp_path / 'file'}"], status=2)
    assert "where nothing can be written" in said.stderr


@pytest.mark.slow
def test_the_script_for_gpus_measures_everything_on_a_cpu_too(tmp_path):
    command = [ROOT / "configs" / "comparison" / "gpu.sh", tmp_path / "speed", "embedded"]
    environment = environment_of_ranks() | {"FEDSP_GPU_STEPS": "2"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(
        list(map(str, [*command, "client.tuning.steps=2"])),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    measured = [line.partition(":")[0] for line in done.stdout.splitlines()]
    engines = ["torch, ZeRO 0", *(f"deepspeed, ZeRO {stage}" for stage in range(4))]
    rows = ["float32, matmul highest"] * 2 + ["float32, matmul high"] * 2
    rows += ["bfloat16, matmul highest"]  # passes by hand are of fp32 alone
    assert measured == [
        *(f"distillation step, {engine}" for engine in engines),
        "scoring",
        *rows,
        *(f"{row}, compiled" for row in rows),
        "exchange",
    ]
