"""What the package adds to bare torch and bare mpi4py, as ratios of medians in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from torch.nn import functional as F

from fedsp_mpi import build
from fedsp_mpi.comm import Handout
from fedsp_mpi.config import Config, StageConfig
from fedsp_mpi.log import Log
from fedsp_mpi.models import auxiliary, backbone
from fedsp_mpi.models.backbone import LanguageModel
from fedsp_mpi.models.prompts import Prompt
from fedsp_mpi.tensors import Batch, Contract, NamedTensors
from fedsp_mpi.training.device import Compute
from fedsp_mpi.training.engine import adamw, learning_rate


def local(config: Config, repeats: int, log: Log) -> dict[str, float]:
    """Time a client's local round against the bare PyTorch loop over the same batches, in turns.

    The bare loop has its batches ready, knows no client state, no record and no failure; it makes the same forward
    passes and ends with the same prompts, which is checked.

    Returns:
        Medians in seconds ("package", "bare") and their "ratio".

    Raises AssertionError if the two disagree in the prompts.
    """
    materials = build.Materials(config)
    materials.check()
    compute = Compute.of(config.client.compute, 0)
    compute.begin()
    model = backbone.load_global(materials.model_name, dtype=compute.dtype, device=compute.device)
    cell = config.auxiliary.layers_per_cell
    small = LanguageModel(
        auxiliary.unroll(auxiliary.cut(model, config.auxiliary.start_layer, cell), materials.depth), compute.dtype
    )
    prompt = Prompt(materials.prompt_spec.at_depth(materials.depth)).to(compute.device)
    prompt.initialise(config.run.seed, config.prompt.init_std)
    down = NamedTensors.pack(prompt.tensors())
    weights = auxiliary.pack(small)
    given = Handout(
        {"cell": auxiliary.cell_config(model.model.config, cell).to_dict(), "depth": materials.depth},
        NamedTensors.join({"auxiliary/": weights, "prompt/": down}),
        Contract(down.schema, down.schema),
    )
    stages = [("alignment", config.client.alignment), ("prompt", config.client.prompt)]
    ready = [(list(_ready(materials, name, stage, compute)), stage) for name, stage in stages]
    times: dict[str, list[float]] = {"package": [], "bare": []}
    for repeat in range(repeats + 1):
        client = build.client_side(materials, compute, given, [0])
        seconds, update = _timed(lambda client=client: client.local(0, 1, down))  # type: ignore[misc]
        times["package"].append(seconds)
        auxiliary.load_weights(small, weights.torch())
        prompt.load(down.torch())
        times["bare"].append(_timed(lambda: _bare_round(small, prompt, ready, config.federation.rounds))[0])
        apart = float(abs(update.tensors.flat - NamedTensors.pack(prompt.tensors()).flat).max())
        assert apart < 1e-5, f"the bare loop ended {apart} away from the package"
        log.say(
            f"{'warm-up' if repeat == 0 else f'{repeat}/{repeats}'}: {times['package'][-1]:.4f} s, bare "
            f"{times['bare'][-1]:.4f} s"
        )
    package, bare = (median(times[name][1:]) for name in ("package", "bare"))
    return {"package": package, "bare": bare, "ratio": package / bare}


def _ready(materials: build.Materials, name: str, stage: StageConfig, compute: Compute) -> Iterator[list[Batch]]:
    batches = materials.batches(1, stage, name)
    for step in range(stage.steps):
        yield [batch.to(compute.device) for batch in batches.step(step)]


def _timed(action: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def _bare_round(model: LanguageModel, prompt: Prompt, ready: list[Any], rounds: int) -> None:
    """The loop as one would write it in a notebook: first the weights, then the prompt."""
    for train_weights, (steps, stage) in zip((True, False), ready):
        model.model.requires_grad_(train_weights)
        prompt.requires_grad_(not train_weights)
        settings = stage.optimizer
        optimizer = adamw(model.model.parameters() if train_weights else prompt.parameters(), settings)
        for index, micro_batches in enumerate(steps):
            total = sum(int((batch.targets != -100).sum()) for batch in micro_batches)
            for batch in micro_batches:
                logits, targets = model.answer_logits(batch, prompt)
                (F.cross_entropy(logits.float(), targets, reduction="sum") / total).backward()
            if settings.clip is not None:
                torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], settings.clip)
            optimizer.param_groups[0]["lr"] = learning_rate(settings, index, stage.steps * rounds)
            optimizer.step()
            optimizer.zero_grad()
