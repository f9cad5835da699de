"""What the package adds to bare torch and bare mpi4py, as ratios of medians in one run."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch.nn import functional as F

from fedsp_mpi.comm import Handout, Solo, Topology
from fedsp_mpi.config import Config
from fedsp_mpi.log import Log
from fedsp_mpi.models import auxiliary, backbone
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.models.prompts import Prompt
from fedsp_mpi.run import build
from fedsp_mpi.run.handout import HandoutMeta
from fedsp_mpi.run.inputs import ExperimentInputs
from fedsp_mpi.tensors import Batch, Contract, NamedTensors
from fedsp_mpi.training.device import Compute
from fedsp_mpi.training.engine import adamw, learning_rate


def local(config: Config, repeats: int, log: Log) -> dict[str, float]:
    """Time a client's local rounds, one after the other, against a bare PyTorch loop over the same
    batches.

    The bare loop has its batches ready and knows no client state, no record and no failure; it
    makes the same forward passes and ends with the same prompts, which is checked. The two take
    turns, and turns at being first.

    Returns:
        Medians in seconds ("package", "bare") and their "ratio"; the first round is not counted.

    Raises:
        ValueError: no repetition, a mistake in model or data, or a configuration that asks for what
            the bare loop does not do.
        AssertionError: the two disagree in the prompts.
    """
    _require_comparable(config, repeats)
    materials = ExperimentInputs(config)
    materials.check()
    compute = Compute.of(config.client.compute, Topology.alone())
    compute.begin()
    handout, bare = _bare_side(materials, compute)
    client = build.hosted_clients(
        materials, compute, handout, ids=[0], call_server=Solo().call
    ).client
    down = handout.tensors.select("prompt/")
    times: dict[str, list[float]] = {"package": [], "bare": []}
    tuned: dict[str, NamedTensors] = {}
    for round in range(1, repeats + 2):
        ready = _ready(materials, compute, round)
        turns = [
            ("package", lambda round=round: client.local_update(0, round, down).tensors),
            ("bare", lambda ready=ready: bare.round(ready, down)),
        ]
        for name, action in turns if round % 2 else reversed(turns):
            seconds, tuned[name] = _timed(action)
            times[name].append(seconds)
        apart = float(abs(tuned["package"].flat - tuned["bare"].flat).max())
        assert apart < 1e-5, f"the bare loop ended {apart} away from the package"
        log.say(f"round {round}: {times['package'][-1]:.4f} s, bare {times['bare'][-1]:.4f} s")
    package, plain = (median(times[name][1:]) for name in ("package", "bare"))
    return {"package": package, "bare": plain, "ratio": package / plain}


def _require_comparable(config: Config, repeats: int) -> None:
    if repeats < 1:
        raise ValueError(f"--repeats: found {repeats}, expected at least 1 round that counts")
    for key, found, expected in (
        ("method", config.method, "fedsp"),
        ("federation.client_state", config.federation.client_state, "kept"),
        ("federation.stragglers", config.federation.stragglers, "wait"),
        ("client.training", config.client.training, "alternating"),
        ("client.privacy.clip", config.client.privacy.clip, None),
        ("attack.clients", config.attack.clients, ()),
        ("auxiliary.dropout", config.auxiliary.dropout, False),
        ("model.gradient_checkpointing", config.model.gradient_checkpointing, False),
    ):
        if found != expected:
            shown = [str(value).lower() for value in (found, expected)]
            raise ValueError(
                f"{key}: found {shown[0]}, expected {shown[1]}, all that the bare loop does; "
                "set it for the comparison"
            )


def _bare_side(materials: ExperimentInputs, compute: Compute) -> tuple[Handout, _BareLoop]:
    """A hand-out without distillation, and the loop that begins with it as well."""
    config = materials.config
    model = backbone.load_global(materials.model_name, device=compute.device)
    whole = auxiliary.unroll(auxiliary.cut(model, config.auxiliary), materials.depth)
    small = LanguageModel(whole, compute.dtype, candidates=materials.candidates)
    prompt = Prompt(materials.prompt_spec.at_depth(materials.depth))
    prompt.initialise(config.run.seed, config.prompt.init_std).to(compute.device)
    down = NamedTensors.pack(prompt.tensors())
    cell = auxiliary.cell_config(model.model.config, config.auxiliary)
    meta = HandoutMeta([], [], "", cell=cell.to_dict(), depth=materials.depth)
    handout = Handout(
        meta.to_json(),
        NamedTensors.join({"auxiliary/": auxiliary.pack(small), "prompt/": down}),
        Contract(down.schema, down.schema),
    )
    return handout, _BareLoop(small, prompt, config)


def _ready(materials: ExperimentInputs, compute: Compute, round: int) -> list[list[list[Batch]]]:
    """The micro-batches of every step of both stages of client 0."""
    stages = {
        "alignment": materials.config.client.alignment,
        "prompt": materials.config.client.tuning,
    }
    batches = {name: materials.batches(1, stage, name) for name, stage in stages.items()}
    return [
        [
            [batch.to(compute.device) for batch in batches[name].step(index)]
            for index in range((round - 1) * stage.steps, round * stage.steps)
        ]
        for name, stage in stages.items()
    ]


def _timed(action: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


class _BareLoop:
    """The loop as one would write it in a notebook: first the weights, then the prompt, round after
    round.
    """

    def __init__(self, model: LanguageModel, prompt: Prompt, config: Config) -> None:
        self._model, self._prompt, self._rounds = model, prompt, config.federation.rounds
        self._stages = (config.client.alignment, config.client.tuning)
        self._optimizers = [
            adamw(owner.parameters(), stage.optimizer)
            for owner, stage in zip((model.model, prompt), self._stages)
        ]
        self._steps_done = [0, 0]

    def round(self, ready: list[list[list[Batch]]], down: NamedTensors) -> NamedTensors:
        """One round from the prompts `down`; gives the tuned prompts."""
        self._prompt.load(down.torch())
        for which, steps in enumerate(ready):
            self._model.model.requires_grad_(which == 0)
            self._prompt.requires_grad_(which == 1)
            for micro_batches in steps:
                self._step(which, micro_batches)
        return NamedTensors.pack(self._prompt.tensors())

    def _step(self, which: int, micro_batches: list[Batch]) -> None:
        stage, optimizer = self._stages[which], self._optimizers[which]
        total = sum(int((batch.targets != -100).sum()) for batch in micro_batches)
        for batch in micro_batches:
            logits, targets = self._model.answer_logits(batch, self._prompt)
            (F.cross_entropy(logits.float(), targets, reduction="sum") / total).backward()
        group = optimizer.param_groups[0]
        if stage.optimizer.clip is not None:
            torch.nn.utils.clip_grad_norm_(group["params"], stage.optimizer.clip)
        group["lr"] = learning_rate(
            stage.optimizer, self._steps_done[which], stage.steps * self._rounds
        )
        optimizer.step()
        optimizer.zero_grad()
        self._steps_done[which] += 1
