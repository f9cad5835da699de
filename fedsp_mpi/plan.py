"""What an experiment costs, before it is run: parameters, bytes, memory, FLOPs and hours, without weights or network.

FLOPs count one multiplication and one addition as two. Forward, for one text (`forward`):
    2 x (weights of the linear layers, as often as they run) x tokens + 4 x tokens x seen x width x layers + 2 x head x
    answers
with `seen` keys a token (text and prompts; what causality masks is counted, because kernels differ in it) and the head
at answers only, as the package computes it. Backward costs one forward through the activations, and one more where
weights are trained. So a text costs
    distillation         1 x forward of the global model + 3 x forward of the auxiliary model, both without prompts
    client alignment     3 x forward of the auxiliary model
    client prompt tuning 2 x forward of the auxiliary model; 3 x where both are trained at once
    server tuning        2 x forward of the global model; the server-only control takes as much again
    fine-tuning          3 x forward of the global model, without prompts
and one forward more wherever activations are recomputed. A projection of prompts runs once a micro-batch: 2 x its
weights x prompt tokens, three times that where it is trained. Padding, norms, optimizers, validation and scoring are
left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from fedsp_mpi import capacity
from fedsp_mpi.capacity import Need, Sizes, outline
from fedsp_mpi.comm.messages import HEADER_BYTES
from fedsp_mpi.config import EMBEDDED, Config, StageConfig
from fedsp_mpi.models import auxiliary, backbone
from fedsp_mpi.models.architectures import config_of, forward, ratios
from fedsp_mpi.models.backbone import LanguageModel
from fedsp_mpi.models.prompts import Prompt, PromptSpec, require_positions

_Trained = Literal["weights", "prompts", "both"]
_Stage = tuple[str, StageConfig, _Trained]
_STAGES = ("client alignment", "client prompt tuning")
_PROMPTS: _Trained = "prompts"
_VALUE = 4  # bytes on the wire: fp32


@dataclass(frozen=True)
class Texts:
    """Tokens of a training text, context and answer: the mean, its answer's part, the longest; and who says so."""

    tokens: int
    answers: int
    longest: int
    source: str = "measured"


# Means over the training splits, GPT-2's tokenizer (of sciq over its validation split, which has all supports).
TEXTS = {
    "arc_easy": Texts(32, 5, 124),
    "arc_challenge": Texts(36, 6, 143),
    "openbookqa": Texts(16, 4, 80),
    "web_questions": Texts(18, 3, 107),
    "hellaswag": Texts(77, 28, 145),
    "sciq": Texts(110, 2, 572),
    "sst2": Texts(26, 1, 75),
    "ag_news": Texts(61, 1, 336),
    "rte": Texts(78, 1, 264),
    "piqa": Texts(30, 20, 256, "estimated"),
    "race": Texts(400, 8, 1024, "estimated"),
}
UNKNOWN = Texts(64, 4, 256, "assumed")
# How many times smaller than the global one the auxiliary model is, as the paper says.
PAPER = {"gpt2-xl": 14.5, "openai-community/gpt2-xl": 14.5, "facebook/opt-1.3b": 8.5}


@dataclass(frozen=True)
class Method:
    """What one way of tuning asks of a client, with the rounds, steps and batches of the configuration.

    Attributes:
        holds, trains: parameters of a client, prompts among the latter.
        handout, down, up: bytes for a client, once and in each round; headers are counted, the hand-out's JSON is not.
        total: bytes of all rounds and participating clients, and of the hand-out to all clients.
        steps: FLOPs of one optimizer step, of each stage that a round has.
        round: FLOPs of a client's local work in a round.
    """

    name: str
    holds: int
    trains: int
    handout: int
    down: int
    up: int
    total: int
    steps: tuple[float, ...]
    round: float


@dataclass(frozen=True)
class Plan:
    """The costs of one experiment.

    Attributes:
        label: the configuration's file.
        ratios: global to auxiliary parameters under ways of counting: "as held", and others that apply.
        phases: FLOPs of the whole run by phase, of all clients together.
        critical: FLOPs that come one after another where every client, and the server, has a GPU of its own.
        server, client: bytes that a rank needs, the client's for one client, without `capacity.LIBRARIES`.
    """

    label: str
    config: Config
    texts: Texts
    sizes: Sizes
    ratios: dict[str, float]
    methods: tuple[Method, ...]
    phases: dict[str, float]
    critical: float
    server: Need
    client: Need

    @property
    def flops(self) -> float:
        """FLOPs of the whole run."""
        return sum(self.phases.values())


def plan(config: Config, label: str, tokens: int | None = None) -> Plan:
    """Reckon what an experiment costs.

    Args:
        config: checked.
        label: what the plan is called.
        tokens: of every training text, context and answer; None: what is typical of the task.

    Raises ValueError if the model is not known, the cell does not fit it, or `tokens` is less than two.
    """
    name = str(EMBEDDED.parent / "model") if config.model.name == "embedded" else str(config.model.name)
    backbone.quiet()
    settings = config_of(name, config.model.revision)
    auxiliary.require_cell(config.auxiliary, settings.num_hidden_layers, str(config.model.name))
    costs = _Costs(config, settings, tokens)
    longest = max(costs.texts.longest, config.distillation.text_length if config.distillation.text else 0)
    sizes = Sizes.between(costs.large, costs.small, costs.spec, longest)
    needs = capacity.server(config, sizes), capacity.client(config, sizes, 1)
    phases, methods = costs.phases(), costs.methods()
    turn = max(methods[0].round, phases["server-only control"] / config.federation.rounds)  # they run side by side
    critical = phases["distillation"] + phases["server tuning"] + config.federation.rounds * turn
    counted = ratios(costs.large, costs.small)
    return Plan(label, config, costs.texts, sizes, counted, methods, phases, critical, *needs)


def _texts(config: Config, num_positions: int, tokens: int | None) -> Texts:
    """The task's texts, none longer than a run would read; ValueError if `tokens` are no text."""
    if tokens is not None and tokens < 2:
        raise ValueError(f"--tokens: found {tokens}, expected at least 2, a context and an answer")
    texts = TEXTS.get(config.data.task, UNKNOWN)
    if tokens is not None:
        texts = Texts(tokens, min(4, tokens - 1), tokens, "--tokens")
    require_positions(config.prompt.num_tokens, num_positions, str(config.model.name))
    most = min(config.data.max_length, num_positions - config.prompt.num_tokens + 1)
    return Texts(min(most, texts.tokens), min(most - 1, texts.answers), min(most, texts.longest), texts.source)


class _Costs:
    """FLOPs and bytes of one configuration, from outlines of its models."""

    def __init__(self, config: Config, settings: Any, tokens: int | None) -> None:
        self.config = config
        self.large = outline(settings, settings.num_hidden_layers)
        cell = auxiliary.cell_config(settings, config.auxiliary.layers_per_cell)
        self.small = outline(cell, config.auxiliary.depth or settings.num_hidden_layers)
        self.single = outline(auxiliary.cell_config(settings, 1), 1)
        shape, prompt = self.large.shape, config.prompt
        self.spec = PromptSpec.of(shape, prompt.kind, prompt.num_tokens, prompt.projection)
        self.texts = _texts(config, shape.num_positions, tokens)
        self.again = int(config.model.gradient_checkpointing)  # forwards more where there is a backward

    def phases(self) -> dict[str, float]:
        """FLOPs of the whole run by phase."""
        config, rounds = self.config, self.config.federation.rounds
        client = {name: 0.0 for name in _STAGES}
        for name, stage, trained in self._stages():
            client[name] = rounds * self._per_round() * stage.steps * self._step(stage, self.small, trained)
        tuning = rounds * config.server.tuning.steps * self._step(config.server.tuning, self.large, "prompts")
        return {
            "distillation": config.distillation.stage.steps * self._distillation_step(),
            **client,
            "server tuning": tuning,
            "server-only control": tuning if config.evaluation.server_only else 0.0,
        }

    def methods(self) -> tuple[Method, ...]:
        """The configuration itself, then other ways with its rounds, steps and batches."""
        own: list[_Stage] = self._stages()
        prompts_only: list[_Stage] = [(_STAGES[1], self.config.client.prompt, _PROMPTS)]
        is_fedsp = own != prompts_only
        return (
            self._prompting("FedSP (as configured)" if is_fedsp else "as configured", self.small, own),
            *([self._prompting("FedSP, no sharing", self.single, own)] if is_fedsp else []),
            self._prompting("FedPrompt", self.large, prompts_only),
            self._prompting("FedPrompt-single", self.single, prompts_only),
            self._prompting("prefix-tuning, 1 client", self.large, prompts_only, clients=1),
            self._fine_tuning(),
        )

    def _per_round(self) -> int:
        plan = self.config.federation
        return plan.clients_per_round or plan.clients

    def _stages(self) -> list[_Stage]:
        """What a client does in a round: the phase, its settings, and what is trained."""
        client = self.config.client
        if client.training == "joint":
            return [(_STAGES[1], client.prompt, "both")]
        alignment: list[_Stage] = [(_STAGES[0], client.alignment, "weights")] if client.alignment.steps else []
        return [*alignment, (_STAGES[1], client.prompt, _PROMPTS)]

    def _prompting(self, name: str, model: LanguageModel, stages: list[_Stage], clients: int | None = None) -> Method:
        """A method whose clients hold `model`, and exchange prompts of its depth."""
        rounds, holds = self.config.federation.rounds, model.num_parameters()
        with torch.device("meta"):
            wire = Prompt(self.spec.at_depth(model.shape.num_layers)).num_parameters()
        steps = tuple(self._step(stage, model, trained) for _, stage, trained in stages)
        work = sum(stage.steps * step for (_, stage, _), step in zip(stages, steps))
        trains = wire + (holds if any(trained != _PROMPTS for *_, trained in stages) else 0)
        handout, message = _VALUE * (holds + wire), _VALUE * wire + HEADER_BYTES
        total = (clients or self.config.federation.clients) * handout
        total += 2 * rounds * (clients or self._per_round()) * message
        return Method(name, holds, trains, handout, message, message, total, steps, work)

    def _fine_tuning(self) -> Method:
        """Clients train the whole model with the steps of the prompt stage; the weights come with every round."""
        stage, holds, tokens = self.config.client.prompt, self.large.num_parameters(), self.texts.tokens
        message = _VALUE * holds + HEADER_BYTES
        step = stage.batch_size * (3 + self.again) * forward(self.large, tokens, tokens, self.texts.answers)
        total = 2 * self.config.federation.rounds * self._per_round() * message
        return Method("fine-tuning", holds, holds, 0, message, message, total, (step,), stage.steps * step)

    def _step(self, stage: StageConfig, model: LanguageModel, trained: _Trained) -> float:
        """FLOPs of one optimizer step with prompts."""
        prompt, text = self.spec.num_tokens, self.texts.tokens
        tokens = text + prompt if self.spec.kind == "input" else text
        once = forward(model, tokens, text + prompt, self.texts.answers)
        with torch.device("meta"):
            soft = Prompt(self.spec.at_depth(model.shape.num_layers))
        layers = [part.weight.numel() for part in soft.modules() if isinstance(part, nn.Linear)]
        projected = 2.0 * sum(layers) * prompt * (1 if trained == "weights" else 3)
        passes = -(-stage.batch_size // (stage.micro_batch or stage.batch_size))
        return stage.batch_size * ((2 if trained == _PROMPTS else 3) + self.again) * once + passes * projected

    def _distillation_step(self) -> float:
        settings = self.config.distillation
        text = settings.text_length if settings.text else self.texts.tokens
        logits = text if settings.logits_weight else 0
        teacher, student = (forward(model, text, text, logits) for model in (self.large, self.small))
        return settings.stage.batch_size * (teacher + (3 + self.again) * student)


# -- as text -------------------------------------------------------------------------------------------------------

_HEAD = ("method", "holds", "trains", "hand-out", "down", "up", "in all", "FLOPs a step", "a round")


def text(plan: Plan, tflops: float) -> str:
    """One plan as plain text; hours are those of GPUs that sustain `tflops` * 10^12 FLOPs a second."""
    one, each = (hours(flops, tflops) for flops in (plan.flops, plan.critical))
    phases = [
        f"{phase:<21} {_scaled(flops, 'FLOP'):>11} {hours(flops, tflops):>12}" for phase, flops in plan.phases.items()
    ]
    whole = [
        f"{one} on one GPU of {tflops:g} TFLOP/s sustained, all clients one after another;",
        f"{each} with such a GPU for each client of a round and one for the server",
        "left out: padding, validation and scoring, optimizers, loading, waiting",
    ]
    lines = [
        *_facts(plan),
        "",
        *_aligned([_HEAD, *(_row(method) for method in plan.methods)]),
        "of a client: parameters; bytes once, in a round, and of all clients and rounds; FLOPs, alignment / prompts",
        "where a round has both. All methods with the rounds, steps and batches of this configuration.",
        "",
        *_labelled("memory", _memory(plan)),
        *_labelled("work", phases),
        *_labelled("hours", whole),
    ]
    return "\n".join(lines)


def markdown(plans: list[Plan], tflops: float) -> str:
    """Plans as two Markdown tables: what each method asks of a client, and what each whole run costs."""
    methods = [(plan.label, *_row(method)) for plan in plans for method in plan.methods]
    sizes = ("global", "auxiliary", "ratio", "server's memory", "a client's")
    head = ("configuration", *sizes, *plans[0].phases, "hours, one GPU", "a GPU each")
    runs = [
        (
            plan.label,
            *(f"{number:,}" for number in (plan.sizes.global_model, plan.sizes.auxiliary)),
            f"{plan.ratios['as held']:#.3g} x",
            *(_gib(need.device + need.host + capacity.LIBRARIES) for need in (plan.server, plan.client)),
            *(_scaled(flops, "FLOP") for flops in plan.phases.values()),
            *(hours(flops, tflops) for flops in (plan.flops, plan.critical)),
        )
        for plan in plans
    ]
    tables = _piped([("configuration", *_HEAD), *methods], num_left=2), _piped([head, *runs], num_left=1)
    return "\n\n".join([*tables, f"Hours at {tflops:g} TFLOP/s sustained, without padding, validation and scoring."])


def _facts(plan: Plan) -> list[str]:
    """Models, prompts, rounds and texts."""
    sizes, config, texts = plan.sizes, plan.config, plan.texts
    federation, client = config.federation, config.client
    cell = f"{config.auxiliary.layers_per_cell} of the layers, run {sizes.depth} deep"
    steps = f"{client.prompt.steps} of prompts" + (" and weights" if client.training == "joint" else "")
    if client.training == "alternating" and client.alignment.steps:
        steps = f"{client.alignment.steps} of alignment and {steps}"
    some = federation.clients_per_round or federation.clients
    ways = [f"{ratio:#.3g} x {way}" for way, ratio in plan.ratios.items() if way != "as held"]
    paper = PAPER.get(str(config.model.name)) if config.auxiliary.layers_per_cell == 1 else None
    lines = [f"counted otherwise: {', '.join(ways)}"] if ways else []
    lines += [f"FedSP's paper says {paper} x, and does not say how it counts"] if paper else []
    return [
        f"plan      {plan.label}",
        f"global    {config.model.name}: {sizes.global_model:,} parameters, {sizes.num_layers} layers",
        f"auxiliary {sizes.auxiliary:,} parameters, {cell}: {plan.ratios['as held']:#.3g} x fewer",
        *_labelled("", lines),
        f"prompts   {sizes.prompt:,} values at the global model's depth, {sizes.wire:,} on the wire:",
        f"          {_VALUE * sizes.wire:,} bytes down, as many up for a client and round, + {HEADER_BYTES} of header",
        f"rounds    {federation.rounds}, of {some} of {federation.clients} clients, steps in each: {steps}",
        f"texts     {texts.tokens} tokens, {texts.answers} of them the answer; the longest {texts.longest} "
        f"({config.data.task}: {texts.source})",
    ]


def _memory(plan: Plan) -> list[str]:
    libraries = _gib(capacity.LIBRARIES)
    return [
        f"server's rank: {_gib(plan.server.device)} on its device; on its host {libraries} of libraries",
        f"client's rank: {_gib(plan.client.device)} on its device; on its host {libraries}, and "
        f"{_gib(plan.client.host)} for one client",
    ]


def _row(method: Method) -> tuple[str, ...]:
    counts = (_scaled(number).replace("G", "B") for number in (method.holds, method.trains))
    sizes = (_scaled(size, "B") for size in (method.handout, method.down, method.up, method.total))
    steps = " / ".join(_scaled(step) for step in method.steps)
    return (method.name, *counts, *sizes, steps, _scaled(method.round))


def _labelled(label: str, lines: list[str]) -> list[str]:
    return [f"{label if i == 0 else '':<9} {line}" for i, line in enumerate(lines)]


def _aligned(lines: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines)]
    padded = ([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines)
    return ["  ".join(cells) for cells in padded]


def _piped(lines: list[tuple[str, ...]], num_left: int) -> str:
    rule = ("---",) * num_left + ("---:",) * (len(lines[0]) - num_left)
    return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:]))


def _scaled(number: float, unit: str = "") -> str:
    """Three digits and a decimal prefix: 24.6 MB."""
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if number < 999.5:
            return f"{number:.3g} {prefix}{unit}".rstrip()
        number /= 1000
    return f"{number:,.0f} Z{unit}"


def hours(flops: float, tflops: float) -> str:
    """How long that takes at `tflops` * 10^12 FLOPs a second, as text: 6.26 h."""
    found = flops / (tflops * 1e12) / 3600
    return "0 h" if not found else "< 0.01 h" if found < 0.01 else f"{found:.2f} h" if found < 10 else f"{found:,.0f} h"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
