"""What an experiment costs, before it is run: parameters, bytes, memory, FLOPs and hours, without
weights or network.

FLOPs count one multiplication and one addition as two. Forward, for one text (`forward`):
    2 x (weights of the linear layers, as often as they run) x tokens + 4 x tokens x seen x width x
    layers + 2 x head x answers
with `seen` keys a token (text and prompts; what causality masks is counted, because kernels differ
in it) and the head at answers only, as the package computes it. Backward costs one forward through
the activations, and one more where weights are trained. So a text costs
    distillation         1 x forward of the global model + 3 x forward of the auxiliary model, both
    without prompts;
                         a bridge costs one forward of both models, with prompts, for each of its
                         texts, or less
    client alignment     3 x forward of the auxiliary model client prompt tuning 2 x forward of the
    auxiliary model; 3 x where both are trained at once server tuning        2 x forward of the
    global model; the server-only control takes as much again; translation
                         costs the same and 1 x forward of the auxiliary model
    fine-tuning          3 x forward of the global model, without prompts, at clients and server
    client search        1 x forward of the auxiliary model for each point, and for the mean at the
    end; twice that
                         where a perturbed copy is looked at. At the server, and of the global
                         model, for clients that hold none
and one forward more wherever activations are recomputed. A causal model reads an input prompt once
for all texts of a pass, unless activations are recomputed (or a GPU saves less than 1024 positions
by it). A projection or encoder of prompts runs once a micro-batch: 2 x its weights x prompt tokens,
three times that where it is trained. Padding, norms, optimizers, validation and scoring are left
out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from fedsp_mpi.comm.messages import HEADER_BYTES
from fedsp_mpi.config import EMBEDDED, AuxiliaryConfig, Config, SearchConfig, StageConfig
from fedsp_mpi.data.tasks import ASSUMED_LENGTHS, TASKS, TextLengths
from fedsp_mpi.estimate import memory
from fedsp_mpi.estimate.memory import MemoryNeed, Sizes, outline
from fedsp_mpi.models import auxiliary, backbone
from fedsp_mpi.models.architectures import config_of, forward, ratios
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.models.prompts import Prompt, PromptSpec, require_positions
from fedsp_mpi.training.cma_es import sizes as search_sizes

_Trained = Literal["weights", "prompts", "both"]
_Stage = tuple[str, StageConfig, _Trained]
_STAGES = ("client alignment", "client prompt tuning")
_FINE_TUNING, _SEARCH, _SERVED = "client fine-tuning", "client search", "clients' forward passes"
_PROMPTS: _Trained = "prompts"
FP32_BYTES = 4  # of a value on the wire
ASSUMED_CLASSES = 2  # of tasks whose rows have choices of their own


@dataclass(frozen=True)
class Method:
    """What one way of tuning asks of a client, with the rounds, steps and batches of the
    configuration.

    Attributes:
        holds, trains: parameters of a client, prompts among the latter. handout, down, up: bytes
            for a client, once and in each round; headers are counted, the hand-out's JSON is not.
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
        ratios: global to auxiliary parameters under ways of counting: "as held", and others that
            apply.
        phases: FLOPs of the whole run by phase, of all clients together.
        critical: FLOPs that come one after another where every client, and the server, has a GPU of
            its own. server, client: bytes that a rank needs, the client's for one client, without
            `capacity.LIBRARIES`.
    """

    label: str
    config: Config
    texts: TextLengths
    sizes: Sizes
    ratios: dict[str, float]
    methods: tuple[Method, ...]
    phases: dict[str, float]
    critical: float
    server: MemoryNeed
    client: MemoryNeed

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

    Raises ValueError if the model is not known, the cell does not fit it, or `tokens` is less than
    two.
    """
    name = (
        str(EMBEDDED.parent / "model")
        if config.model.name == "embedded"
        else str(config.model.name)
    )
    backbone.quiet()
    settings = config_of(name, config.model.revision)
    if not config.tunes_weights:
        auxiliary.require_cell(config.auxiliary, settings.num_hidden_layers, str(config.model.name))
    costs = _Costs(config, settings, tokens)
    longest = max(
        costs.texts.longest, config.distillation.text_length if config.distillation.text else 0
    )
    sizes = (
        Sizes.all_weights(costs.large, longest) if config.tunes_weights else costs.sizes(longest)
    )
    needs = memory.server(config, sizes), memory.client(config, sizes, 1)
    phases, methods = costs.phases(), costs.methods()
    busy = methods[0].round if config.federation.clients else 0.0
    turn = max(
        busy, phases["server-only control"] / config.federation.rounds
    )  # they run side by side
    critical = phases["distillation"] + phases["server tuning"] + config.federation.rounds * turn
    critical += phases.get(_SERVED, 0.0) / config.topology.server_ranks
    counted = {} if config.tunes_weights else ratios(costs.large, costs.small)
    return Plan(label, config, costs.texts, sizes, counted, methods, phases, critical, *needs)


def _texts(config: Config, num_positions: int, tokens: int | None) -> TextLengths:
    """The task's texts, none longer than a run would read; ValueError if `tokens` are no text."""
    if tokens is not None and tokens < 2:
        raise ValueError(f"--tokens: found {tokens}, expected at least 2, a context and an answer")
    task = TASKS.get(config.data.task)
    texts = task.lengths if task else ASSUMED_LENGTHS
    if tokens is not None:
        texts = TextLengths(tokens, min(4, tokens - 1), tokens, "--tokens")
    prompt = 0 if config.tunes_weights else config.prompt.num_tokens
    require_positions(prompt, num_positions, str(config.model.name))
    most = min(config.data.max_length, num_positions - prompt + 1)
    return TextLengths(
        min(most, texts.tokens),
        min(most - 1, texts.answers),
        min(most, texts.longest),
        texts.source,
    )


class _Costs:
    """FLOPs and bytes of one configuration, from outlines of its models."""

    def __init__(self, config: Config, settings: Any, tokens: int | None) -> None:
        self.config = config
        self.large = outline(settings, settings.num_hidden_layers)
        cell = auxiliary.cell_config(settings, config.auxiliary)
        self.small = outline(cell, auxiliary.depth(config.auxiliary, settings.num_hidden_layers))
        self.single = outline(
            auxiliary.cell_config(settings, AuxiliaryConfig(layers_per_cell=1)), 1
        )
        shape, prompt = self.large.shape, config.prompt
        self.spec = PromptSpec.of(
            shape, prompt.kind, prompt.num_tokens, prompt.projection, encoder=prompt.encoder
        )
        self.texts = _texts(config, shape.num_positions, tokens)
        self.again = int(
            config.model.gradient_checkpointing
        )  # forwards more where there is a backward

    def sizes(self, longest: int) -> Sizes:
        """What the memory is reckoned from; `longest`: tokens of the longest text."""
        return Sizes.between(self.large, self.small, self.spec, longest).held_by(self.config)

    def phases(self) -> dict[str, float]:
        """FLOPs of the whole run by phase."""
        config, rounds, all_weights = (
            self.config,
            self.config.federation.rounds,
            self.config.tunes_weights,
        )
        turns, stage = rounds * self._per_round(), config.client.tuning
        if config.searches:
            where, model = (_SERVED, self.large) if config.asks_server else (_SEARCH, self.small)
            client = {where: turns * self._searched(model)[1]}
        elif all_weights:
            client = {_FINE_TUNING: turns * stage.steps * self._weights_step(stage)}
        else:
            done = {
                name: stage.steps * self._step(stage, self.small, how)
                for name, stage, how in self._stages()
            }
            client = {name: turns * done.get(name, 0.0) for name in _STAGES}
        stage = config.server.tuning
        once = self._weights_step(stage) if all_weights else self._step(stage, self.large, _PROMPTS)
        tuning = rounds * stage.steps * once
        return {
            "distillation": 0.0 if all_weights else self._distillation(),
            **client,
            "server tuning": tuning + self._translation(),
            "server-only control": tuning
            if config.evaluation.server_only and config.federation.clients
            else 0.0,
        }

    def methods(self) -> tuple[Method, ...]:
        """The configuration itself, then other ways with its rounds, steps and batches."""
        if self.config.tunes_weights:
            return (self._fine_tuning(),)
        prompts_only: list[_Stage] = [(_STAGES[1], self.config.client.tuning, _PROMPTS)]
        if self.config.searches:
            return (
                self._search(),
                self._prompting("FedPrompt", self.large, prompts_only),
                self._fine_tuning(),
            )
        own: list[_Stage] = self._stages()
        is_fedsp, aligns = (
            own != prompts_only or self.config.auxiliary.first_layers,
            own != prompts_only,
        )
        return (
            self._prompting(
                "FedSP (as configured)" if is_fedsp else "as configured", self.small, own
            ),
            *([self._prompting("FedSP, no sharing", self.single, own)] if aligns else []),
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
            return [(_STAGES[1], client.tuning, "both")]
        alignment: list[_Stage] = (
            [(_STAGES[0], client.alignment, "weights")] if client.alignment.steps else []
        )
        return [*alignment, (_STAGES[1], client.tuning, _PROMPTS)]

    def _prompting(
        self, name: str, model: LanguageModel, stages: list[_Stage], clients: int | None = None
    ) -> Method:
        """A method whose clients hold `model`, and exchange prompts of its depth."""
        rounds, holds = self.config.federation.rounds, model.num_parameters()
        with torch.device("meta"):
            wire = Prompt(self.spec.at_depth(model.shape.num_layers)).num_parameters()
        steps = tuple(self._step(stage, model, trained) for _, stage, trained in stages)
        work = sum(stage.steps * step for (_, stage, _), step in zip(stages, steps))
        trains = wire + (holds if any(trained != _PROMPTS for *_, trained in stages) else 0)
        handout, message = FP32_BYTES * (holds + wire), FP32_BYTES * wire + HEADER_BYTES
        total = (clients or self.config.federation.clients) * handout
        total += 2 * rounds * (clients or self._per_round()) * message
        return Method(name, holds, trains, handout, message, message, total, steps, work)

    def _search(self) -> Method:
        """Clients that search: forward passes over all of their examples for each point; a step is
        one point's.
        """
        config, search = self.config, self.config.search
        numbers = search_sizes(search.dimension)
        down, up = (
            FP32_BYTES * sum(numbers[name] for name in names) + HEADER_BYTES
            for names in search.travelling()
        )
        with torch.device("meta"):
            first = Prompt(self.spec.at_depth(self.small.shape.num_layers)).num_parameters()
        holds, (step, work) = self.small.num_parameters(), self._searched(self.small)
        handout = FP32_BYTES * (holds + first + 1)
        if config.asks_server:
            asked, answered = self._questions()
            holds, handout, step, work, down, up = 0, 0, 0.0, 0.0, down + answered, up + asked
        total = (
            config.federation.clients * handout
            + config.federation.rounds * self._per_round() * (down + up)
        )
        name = self.config.method_facts.title
        return Method(name, holds, search.dimension, handout, down, up, total, (step,), work)

    def _searched(self, model: LanguageModel) -> tuple[float, float]:
        """FLOPs of one point of a client, and of its round, on `model`."""
        search, seen = self.config.search, self.texts.tokens + self.spec.num_tokens
        once = forward(
            model, self._passing(self.examples() * _groups(search)), seen, self.texts.answers
        )
        step = self.examples() * _groups(search) * once
        return step, search.points * step

    def _questions(self) -> tuple[int, int]:
        """Bytes that a client asks in a round, and of the answers (algorithms/inference.py), for
        texts of mean length.
        """
        search, groups = self.config.search, _groups(self.config.search)
        texts, times = groups * self.examples(), search.iterations + 1
        head = 3 + groups + texts * (3 + self.texts.tokens)
        asked = (
            times * (HEADER_BYTES + FP32_BYTES * head)
            + FP32_BYTES * search.points * search.dimension
        )
        return asked, times * HEADER_BYTES + FP32_BYTES * search.points * texts

    def examples(self) -> int:
        """Of a client that searches: its share of data.shots or data.limit.train, else what
        client.tuning takes.
        """
        data, tuning, clients = (
            self.config.data,
            self.config.client.tuning,
            self.config.federation.clients,
        )
        task = TASKS.get(data.task)
        classes = (task.num_classes if task else None) or ASSUMED_CLASSES
        some = data.limit.train if data.shots is None else data.shots * classes
        owners = clients if data.server_share == 0 else clients + 1
        return tuning.steps * tuning.batch_size if some is None else -(-some // owners)

    def _fine_tuning(self) -> Method:
        """Clients train the whole model with the steps of the prompt stage; the weights come with
        every round.
        """
        stage, holds = self.config.client.tuning, self.large.num_parameters()
        message = FP32_BYTES * holds + HEADER_BYTES
        step = self._weights_step(stage)
        total = 2 * self.config.federation.rounds * self._per_round() * message
        return Method(
            "fine-tuning", holds, holds, 0, message, message, total, (step,), stage.steps * step
        )

    def _weights_step(self, stage: StageConfig) -> float:
        """FLOPs of one optimizer step on all weights of the global model, without prompts."""
        tokens = self.texts.tokens
        return (
            stage.batch_size
            * (3 + self.again)
            * forward(self.large, tokens, tokens, self.texts.answers)
        )

    def _step(self, stage: StageConfig, model: LanguageModel, trained: _Trained) -> float:
        """FLOPs of one optimizer step with prompts."""
        prompt, rows = self.spec.num_tokens, stage.micro_batch or stage.batch_size
        once = forward(model, self._passing(rows), self.texts.tokens + prompt, self.texts.answers)
        with torch.device("meta"):
            soft = Prompt(self.spec.at_depth(model.shape.num_layers))
        parts = [part for part in soft.modules() if isinstance(part, (nn.Linear, nn.LSTM))]
        layers = [
            weight.numel() for part in parts for weight in part.parameters() if weight.dim() == 2
        ]
        projected = 2.0 * sum(layers) * prompt * (1 if trained == "weights" else 3)
        passes = -(-stage.batch_size // rows)
        return (
            stage.batch_size * ((2 if trained == _PROMPTS else 3) + self.again) * once
            + passes * projected
        )

    def _passing(self, rows: int) -> float:
        """Tokens that pass the layers for each text, of so many in a pass; an input prompt's among
        them.
        """
        if self.spec.kind == "prefix":
            return self.texts.tokens
        is_read_once = self.large.kind == "causal" and not self.again
        return self.texts.tokens + self.spec.num_tokens / (rows if is_read_once else 1)

    def _translation(self) -> float:
        """FLOPs of all steps towards the auxiliary model's answers."""
        if not self.config.translates:
            return 0.0
        stage, tokens, prompt = (
            self.config.server.translation,
            self.texts.tokens,
            self.spec.num_tokens,
        )
        asked = stage.batch_size * forward(self.small, tokens, tokens + prompt, self.texts.answers)
        step = self._step(stage, self.large, _PROMPTS) + asked
        return self.config.federation.rounds * stage.steps * step

    def _distillation(self) -> float:
        """FLOPs of all steps, and of fitting a bridge."""
        settings = self.config.distillation
        text, prompt = (
            settings.text_length if settings.text else self.texts.tokens,
            self.spec.num_tokens,
        )
        models = (self.large, self.small) if self.config.auxiliary.first_layers else ()
        bridge = settings.bridge_texts * sum(
            forward(model, text, text + prompt, 0) for model in models
        )
        return bridge + settings.stage.steps * self._distillation_step()

    def _distillation_step(self) -> float:
        settings = self.config.distillation
        text = settings.text_length if settings.text else self.texts.tokens
        logits = text if settings.logits_weight else 0
        teacher, student = (
            forward(model, text, text, logits) for model in (self.large, self.small)
        )
        return settings.stage.batch_size * (teacher + (3 + self.again) * student)


def _groups(search: SearchConfig) -> int:
    """Of a client's texts that each point is tried on: its own, and their perturbed copies."""
    return 1 if search.objective == "loss" else 2
