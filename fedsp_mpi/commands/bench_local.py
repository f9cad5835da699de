"""Measure what the package adds to a bare PyTorch loop, as a ratio of medians in one run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TypeVar

import torch
from torch.nn import functional as F

from fedsp_mpi.comm import Solo, Topology
from fedsp_mpi.config import Config
from fedsp_mpi.log import Log
from fedsp_mpi.models import auxiliary, backbone
from fedsp_mpi.models.by_hand import Loss, loss_by_hand, loss_by_peft
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.models.losses import answer_loss_of
from fedsp_mpi.models.prompts import Prompt
from fedsp_mpi.run import build
from fedsp_mpi.run.handout import HandoutMeta
from fedsp_mpi.run.inputs import ExperimentInputs
from fedsp_mpi.tensors import Batch, NamedTensors
from fedsp_mpi.training.device import Compute
from fedsp_mpi.training.engine import adamw, learning_rate

_TOLERANCE = 1e-5  # largest difference between the prompts of the two loops

# The micro-batches of a step, and the steps of a stage.
Step = list[Batch]
Stage = list[Step]
Result = TypeVar("Result")


@dataclass(frozen=True)
class LocalTiming:
    """Seconds of a client's local round, medians over the counted rounds.

    Attributes:
        package_seconds: by the package.
        bare_seconds: by the bare loop.
    """

    package_seconds: float
    bare_seconds: float

    @property
    def ratio(self) -> float:
        """The package's time in units of the bare loop's."""
        return self.package_seconds / self.bare_seconds


def local(config: Config, repeats: int, log: Log) -> LocalTiming:
    """Time a client's local rounds against a bare PyTorch loop over the same batches.

    The bare loop has its batches ready and knows no client state, no record and no failure; it
    makes the same forward passes and ends with the same prompts, which is checked. The two
    alternate, and so does which of them is first. The first round is not counted.

    Args:
        config: checked.
        repeats: counted rounds.
        log: gets a line for each round.

    Raises:
        ValueError: no repetition, a mistake in model or data, or a configuration that asks for what
            the bare loop does not do.
        AssertionError: the two end with different prompts.
    """
    _require_comparable(config, repeats)
    materials = ExperimentInputs(config)
    materials.check()
    compute = Compute.of(config.client.compute, Topology.alone())
    compute.begin()
    tensors, meta, bare_loop = _bare_side(materials, compute)
    client = build.hosted_clients(
        materials, compute, tensors, meta=meta, ids=[0], call_server=Solo().call
    ).client
    prompt = tensors.select("prompt/")
    package_times: list[float] = []
    bare_times: list[float] = []
    for round in range(1, repeats + 2):
        stages = _prepare_stages(materials, compute, round)

        def package_round(round: int = round) -> NamedTensors:
            return client.local_update(0, round, prompt).tensors

        def bare_round(stages: list[Stage] = stages) -> NamedTensors:
            return bare_loop.round(stages, prompt)

        if round % 2:
            package_seconds, package_prompt = _timed(package_round)
            bare_seconds, bare_prompt = _timed(bare_round)
        else:
            bare_seconds, bare_prompt = _timed(bare_round)
            package_seconds, package_prompt = _timed(package_round)
        package_times.append(package_seconds)
        bare_times.append(bare_seconds)
        difference = float(abs(package_prompt.flat - bare_prompt.flat).max())
        assert difference < _TOLERANCE, f"the bare loop ended {difference} away from the package"
        log.say(f"round {round}: {package_seconds:.4f} s, bare {bare_seconds:.4f} s")
    return LocalTiming(median(package_times[1:]), median(bare_times[1:]))


@dataclass(frozen=True)
class StepTiming:
    """Seconds of a forward and a backward pass of prompt tuning, medians over the counted steps.

    Attributes:
        package_seconds: by the package.
        by_hand_seconds: by the model written out for it alone.
        peft_seconds: by stock peft with labels.
    """

    package_seconds: float
    by_hand_seconds: float
    peft_seconds: float


def step(config: Config, repeats: int) -> StepTiming | None:
    """Time passes of a client's prompt tuning against the same written by hand, and against peft.

    The three take turns on the same batches, also in being the first, and come to the same losses,
    which is checked.

    Args:
        config: checked by `local`.
        repeats: counted steps.

    Returns:
        The times; None for a family, a prompt or a dtype that is not written out.

    Raises:
        AssertionError: two losses differ.
    """
    materials = ExperimentInputs(config)
    compute = Compute.of(config.client.compute, Topology.alone())
    compute.begin()
    _, _, bare_loop = _bare_side(materials, compute)
    model = bare_loop.model
    prompt = bare_loop.prompt
    by_hand = loss_by_hand(model)
    is_plain = prompt.spec.kind == "prefix" and prompt.spec.projection is None and not model.casts
    if by_hand is None or not is_plain:
        return None
    model.model.requires_grad_(False)
    losses: dict[str, Loss] = {
        "package": partial(answer_loss_of, model),
        "by_hand": by_hand,
        "peft": loss_by_peft(model, prompt),
    }
    batches = materials.batches(1, config.client.tuning, "prompt")
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    for index in range(repeats + 1):
        batch = batches.step(index)[0].to(compute.device)
        num_answers = int((batch.targets != -100).sum())
        means = []
        names = list(losses)
        first = index % len(names)
        for name in names[first:] + names[:first]:
            loss = losses[name]

            def passes(loss: Loss = loss, batch: Batch = batch) -> float:
                total = loss(prompt, batch)
                total.backward()
                return total.item()

            prompt.zero_grad()
            duration, total = _timed(passes)
            seconds[name].append(duration)
            means.append(total / num_answers)
        assert max(means) - min(means) < _TOLERANCE, f"losses of one batch: {means}"
    medians = {f"{name}_seconds": median(times[1:]) for name, times in seconds.items()}
    return StepTiming(**medians)


def _require_comparable(config: Config, repeats: int) -> None:
    """Raise ValueError if the configuration asks for what the bare loop does not do."""
    if repeats < 1:
        raise ValueError(f"--repeats: found {repeats}, expected at least 1 round that counts")
    require_one_source(config)
    for key, value, expected in (
        ("method", config.method, "fedsp"),
        ("federation.client_state", config.federation.client_state, "kept"),
        ("federation.stragglers", config.federation.stragglers, "wait"),
        ("client.training", config.client.training, "alternating"),
        ("client.privacy.clip", config.client.privacy.clip, None),
        ("attack.clients", config.attack.clients, ()),
        ("auxiliary.dropout", config.auxiliary.dropout, False),
        ("model.gradient_checkpointing", config.model.gradient_checkpointing, False),
    ):
        if value != expected:
            raise ValueError(
                f"{key}: found {str(value).lower()}, expected {str(expected).lower()}, which is "
                "all that the bare loop does; set it for the comparison"
            )


def require_one_source(config: Config) -> None:
    """Raise ValueError if clients have silos or experts: a benchmark's text is of data.source."""
    experts = config.tiers.experts
    if experts:
        raise ValueError(
            f"tiers.experts: found {len(experts)}, expected none: the text of a benchmark is a "
            "part of data.source; take another method"
        )
    silos = config.federation.silos
    if silos:
        raise ValueError(
            f"federation.silos: found {len(silos)}, expected none: the text of a benchmark is a "
            "part of data.source; leave out federation.silos and server.data, and name data.source"
        )


def _bare_side(
    materials: ExperimentInputs, compute: Compute
) -> tuple[NamedTensors, HandoutMeta, _BareLoop]:
    """Return what is handed out without distillation, and a bare loop that starts from it too."""
    config = materials.config
    model = backbone.load_global(materials.model_name, device=compute.device)
    unrolled = auxiliary.unroll(auxiliary.cut(model, config.auxiliary), materials.depth)
    small = LanguageModel(unrolled, compute.dtype, candidates=materials.candidates)
    if compute.compiles:
        small.compile()
    prompt = Prompt(materials.prompt_spec.at_depth(materials.depth))
    prompt.initialise(config.run.seed, config.prompt.init_std).to(compute.device)
    down = NamedTensors.pack(prompt.tensors())
    cell = auxiliary.cell_config(model.model.config, config.auxiliary)
    meta = HandoutMeta([], [], "", cell=cell.to_dict(), depth=materials.depth)
    tensors = NamedTensors.join({"auxiliary/": auxiliary.pack(small), "prompt/": down})
    return tensors, meta, _BareLoop(small, prompt, config)


def _prepare_stages(materials: ExperimentInputs, compute: Compute, round: int) -> list[Stage]:
    """Return client 0's micro-batches of every step of both stages of a round, on the device.

    Args:
        materials: of the experiment.
        compute: the client's device.
        round: counted from 1.
    """
    client = materials.config.client
    prepared = []
    for name, stage in (("alignment", client.alignment), ("prompt", client.tuning)):
        batches = materials.batches(1, stage, name)
        first_step = (round - 1) * stage.steps
        prepared.append(
            [
                [batch.to(compute.device) for batch in batches.step(step)]
                for step in range(first_step, first_step + stage.steps)
            ]
        )
    return prepared


def _timed(action: Callable[[], Result]) -> tuple[float, Result]:
    """Return the seconds that an action takes, and its result."""
    start = time.perf_counter()
    result = action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


class _BareLoop:
    """The loop as one would write it in a notebook: in each round first the weights, then the
    prompt.

    Args:
        model: the auxiliary model.
        prompt: on the model's device.
        config: of the experiment.
    """

    def __init__(self, model: LanguageModel, prompt: Prompt, config: Config) -> None:
        self.model = model
        self.prompt = prompt
        self._rounds = config.federation.rounds
        self._stages = (config.client.alignment, config.client.tuning)
        self._optimizers = [
            adamw(model.model.parameters(), config.client.alignment.optimizer),
            adamw(prompt.parameters(), config.client.tuning.optimizer),
        ]
        self._steps_done = [0, 0]

    def round(self, stages: list[Stage], down: NamedTensors) -> NamedTensors:
        """Run a round.

        Args:
            stages: micro-batches of alignment and of prompt tuning.
            down: the prompt that the round starts from.

        Returns:
            The tuned prompt.
        """
        self.prompt.load(down.torch())
        for index, steps in enumerate(stages):
            self.model.model.requires_grad_(index == 0)
            self.prompt.requires_grad_(index == 1)
            for micro_batches in steps:
                self._step(index, micro_batches)
        return NamedTensors.pack(self.prompt.tensors())

    def _step(self, index: int, micro_batches: Step) -> None:
        """Make one optimizer step of stage `index`."""
        stage = self._stages[index]
        optimizer = self._optimizers[index]
        num_answers = sum(int((batch.targets != -100).sum()) for batch in micro_batches)
        for batch in micro_batches:
            logits, targets = self.model.answer_logits(batch, self.prompt)
            loss = F.cross_entropy(logits.float(), targets, reduction="sum")
            (loss / num_answers).backward()
        group = optimizer.param_groups[0]
        if stage.optimizer.clip is not None:
            torch.nn.utils.clip_grad_norm_(group["params"], stage.optimizer.clip)
        total_steps = stage.steps * self._rounds
        group["lr"] = learning_rate(stage.optimizer, self._steps_done[index], total_steps)
        optimizer.step()
        optimizer.zero_grad()
        self._steps_done[index] += 1
