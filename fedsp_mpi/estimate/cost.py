"""Estimate what an experiment costs: parameters, bytes, memory, FLOPs and hours.

Neither weights nor a network are needed.

FLOPs count one multiplication and one addition as two. The forward pass of one text
(`models.architectures.forward`) costs

    2 x (weights of the linear layers, as often as they run) x tokens
    + 4 x tokens x keys x width x layers
    + 2 x head x answers

with `keys` that each token attends to (text and prompts; what causality masks is counted, because
kernels differ in it), and the head at answers only, as the package computes it. The last layer is
counted at all tokens; where nothing but answers is read, it runs at theirs. The backward pass costs
one forward through the activations, and one more where weights are trained. So a text costs

    distillation          1 x forward of the global model + 3 x forward of the auxiliary model, both
                          without prompts; a bridge costs at most one forward of both models, with
                          prompts, for each of its texts
    client alignment      3 x forward of the auxiliary model
    client prompt tuning  2 x forward of the auxiliary model; 3 x where both are trained at once
    server tuning         2 x forward of the global model; the server-only control takes as much
                          again; translation costs the same and 1 x forward of the auxiliary model
    fine-tuning           3 x forward of the global model, without prompts, at clients and server
    client search         1 x forward of the auxiliary model for each point, and for the mean at
                          the end; twice that where a perturbed copy is evaluated. At the server,
                          and of the global model, for clients that hold no model. Instructions
                          are points too; where choices are scored, a text's context is read once
                          for all of them
    client labelling      1 x forward of what the client holds for each text without a label, whose
                          context is read once for all classes; 2 x with a second template
    silos' validation     1 x forward of what the client holds for each text held out, and 1 x more
                          where options are scored, whose context is read once for all of them

and one forward more wherever activations are recomputed. A causal model reads an input prompt once
for all texts of a pass, unless activations are recomputed (or a GPU saves less than 1024 positions
by it). A projection or encoder of prompts runs once per micro-batch: 2 x its weights x prompt
tokens, three times that where it is trained. Padding, norms, optimizers, and the server's
validation and scoring are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from fedsp_mpi.comm.compression import num_bytes
from fedsp_mpi.comm.envelope import SEAL_BYTES, update_seal_bytes
from fedsp_mpi.comm.messages import CHUNK_BYTES, HEADER_BYTES
from fedsp_mpi.config import EMBEDDED, AuxiliaryConfig, Config, StageConfig
from fedsp_mpi.data.tasks import ASSUMED_LENGTHS, TASKS, TextLengths
from fedsp_mpi.estimate import memory
from fedsp_mpi.estimate.memory import MemoryNeed, ModelSizes, meta_model
from fedsp_mpi.models import auxiliary, backbone, class_head, lora
from fedsp_mpi.models.architectures import config_of, forward, ratios
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.models.prompts import Prompt, PromptSpec, require_positions
from fedsp_mpi.run.silos import found_here
from fedsp_mpi.training.cma_es import sizes as search_sizes

if TYPE_CHECKING:
    from fedsp_mpi.models.families import PreTrainedConfig

Trained = Literal["weights", "prompts", "both"]

# Names of the phases of a run.
_DISTILLATION = "distillation"
_ALIGNMENT = "client alignment"
_PROMPT_TUNING = "client prompt tuning"
_PERSONAL_TUNING = "client tuning of personal prompts"
_FINE_TUNING = "client fine-tuning"
_LABELLING = "client labelling"
_SEARCH = "client search"
_SERVED_SEARCH = "clients' forward passes"  # of clients that hold no model, at the server
_SERVER_TUNING = "server tuning"
_CONTROL = "server-only control"
_SILO_VALIDATION = "silos' validation"

FP32_BYTES = 4  # of a value on the wire


_NUM_LABELS = 2  # assumed of tasks whose rows have choices of their own


@dataclass(frozen=True)
class MethodCost:
    """What a method asks of a client, with the rounds, steps and batches of the configuration.

    Attributes:
        name: of the method.
        holds: parameters that a client holds, prompts not among them.
        trains: parameters that a client trains, prompts among them.
        handout: bytes to a client, once; without header and JSON.
        down: bytes to a client per round, with header.
        up: bytes from a client per round, with header, and with what sealing adds.
        judged: bytes to a client at the end of a round that silos judge, with header; else 0.
        total: bytes of all rounds with their participating clients, and of the hand-out to all; of
            what silos judge, to all.
        steps: FLOPs of one optimizer step of each stage that a round has.
        round: FLOPs of a client's local work in a round.
    """

    name: str
    holds: int
    trains: int
    handout: int
    down: int
    up: int
    judged: int
    total: int
    steps: tuple[float, ...]
    round: float


@dataclass(frozen=True)
class SiloSizes:
    """Examples of a silo, which are assumed: nobody opens one for an estimate.

    Attributes:
        train: examples that it trains on.
        held_out: examples that it judges each round by.
        source: what the numbers are taken from.
    """

    train: int
    held_out: int
    source: str


@dataclass(frozen=True)
class CostEstimate:
    """The costs of one experiment.

    Attributes:
        label: the configuration's file.
        config: the configuration, with the silos that patterns match on this host.
        silos: what is assumed of each silo; None: clients have none.
        texts: tokens of its texts.
        sizes: parameters, layers and widths.
        ratios: parameters of the global model by those of the auxiliary one under several ways of
            counting: "as held", and others that apply.
        methods: the configured method, then others with its rounds, steps and batches.
        handed_out: what clients are given of the global model; see `report.handed_out`.
        phases: FLOPs of the whole run by phase, of all clients together.
        critical: FLOPs that come one after another where every client, and the server, has a GPU of
            its own.
        server: bytes of a server rank, without `memory.LIBRARIES`.
        client: bytes of a client rank that plays one client, without `memory.LIBRARIES`.
    """

    label: str
    config: Config
    silos: SiloSizes | None
    texts: TextLengths
    sizes: ModelSizes
    ratios: dict[str, float]
    methods: tuple[MethodCost, ...]
    handed_out: dict[str, int]
    phases: dict[str, float]
    critical: float
    server: MemoryNeed
    client: MemoryNeed

    @property
    def flops(self) -> float:
        """FLOPs of the whole run."""
        return sum(self.phases.values())


def plan(config: Config, label: str, tokens: int | None = None) -> CostEstimate:
    """Estimate what an experiment costs.

    Args:
        config: checked.
        label: name of the estimate.
        tokens: of every training text, context and answer; None: typical of the task.

    Raises:
        ValueError: the model is not known, the auxiliary model does not fit it, or `tokens` is less
            than two.
    """
    config = found_here(config)
    model_name = str(config.model.name)
    model_path = str(EMBEDDED.parent / "model") if model_name == "embedded" else model_name
    backbone.quiet()
    architecture = config_of(model_path, config.model.revision)
    if not config.tunes_weights:
        auxiliary.require_cell(config.auxiliary, architecture.num_hidden_layers, model_name)
        auxiliary.require_positions_kept(
            config.auxiliary, config.prompt, architecture, name=model_name
        )
    costs = _Costs(config, architecture, tokens)
    sizes = costs.sizes()
    phases = costs.phases()
    methods = costs.methods()
    return CostEstimate(
        label=label,
        config=config,
        silos=costs.silo_sizes() if config.federation.silos else None,
        texts=costs.texts,
        sizes=sizes,
        ratios={} if config.tunes_weights else ratios(costs.large, costs.small),
        methods=methods,
        handed_out=costs.handed_out(),
        phases=phases,
        critical=_critical_flops(config, phases, methods[0]),
        server=memory.server(config, sizes),
        client=memory.client(config, sizes, num_clients=1),
    )


def _critical_flops(config: Config, phases: dict[str, float], method: MethodCost) -> float:
    """Return the FLOPs that come one after another with a GPU for each client and the server.

    Args:
        config: checked.
        phases: FLOPs of the whole run by phase.
        method: the configured one.
    """
    rounds = config.federation.rounds
    client_round = method.round if config.federation.clients else 0.0
    # Those who label work at the same time, too, and train afterwards.
    num_labellers = min(config.augment.clients, config.federation.clients)
    client_round += phases.get(_LABELLING, 0.0) / max(1, num_labellers) / rounds
    # The server tunes the control while it waits for the clients.
    local_round = max(client_round, phases[_CONTROL] / rounds)
    flops = phases[_DISTILLATION] + phases[_SERVER_TUNING] + rounds * local_round
    flops += phases.get(_SILO_VALIDATION, 0.0) / max(1, config.federation.clients)
    return flops + phases.get(_SERVED_SEARCH, 0.0) / config.topology.server_ranks


def _text_lengths(config: Config, num_positions: int, tokens: int | None) -> TextLengths:
    """Return the tokens of the task's texts as a run would read them, cut to what fits.

    Args:
        config: checked.
        num_positions: of the global model.
        tokens: of every text, instead of what is typical of the task.

    Raises:
        ValueError: `tokens` is less than two, or the prompt leaves no positions for a text.
    """
    if tokens is None:
        task = TASKS.get(config.data.task)
        lengths = task.lengths if task else ASSUMED_LENGTHS
    elif tokens >= 2:
        lengths = TextLengths(tokens, min(4, tokens - 1), tokens, "--tokens")
    else:
        raise ValueError(f"--tokens: found {tokens}, expected at least 2, a context and an answer")
    prompt_tokens = 0 if config.tunes_weights else config.prompt.num_tokens
    require_positions(prompt_tokens, num_positions, str(config.model.name))
    # The last token is predicted, not read.
    max_tokens = min(config.data.max_length, num_positions - prompt_tokens + 1)
    return TextLengths(
        tokens=min(max_tokens, lengths.tokens),
        answers=min(max_tokens - 1, lengths.answers),
        longest=min(max_tokens, lengths.longest),
        source=lengths.source,
    )


@dataclass(frozen=True)
class _Stage:
    """A stage of a client's round.

    Attributes:
        phase: its name in the table of phases.
        settings: steps and batches.
        trained: what its optimizer updates.
    """

    phase: str
    settings: StageConfig
    trained: Trained


@dataclass(frozen=True)
class _SearchFlops:
    """FLOPs of a client that searches.

    Attributes:
        point: of one point, on all of the client's examples.
        round: of a round.
    """

    point: float
    round: float


class _Costs:
    """FLOPs and bytes of one configuration, computed from models without weights.

    Attributes:
        config: checked.
        large: the global model, on the meta device.
        small: the auxiliary model, on the meta device.
        single: the global model's first layer alone, on the meta device.
        spec: the prompt at the global model's depth.
        texts: tokens of the task's texts.

    Args:
        config: checked.
        architecture: transformers' configuration of the global model.
        tokens: of every text; None: typical of the task.
    """

    def __init__(self, config: Config, architecture: PreTrainedConfig, tokens: int | None) -> None:
        num_layers = architecture.num_hidden_layers
        cell_config = auxiliary.cell_config(architecture, config.auxiliary)
        single_config = auxiliary.cell_config(architecture, AuxiliaryConfig(layers_per_cell=1))
        prompt = config.prompt
        self.config = config
        self.large = meta_model(architecture, num_layers)
        self.small = meta_model(cell_config, auxiliary.depth(config.auxiliary, num_layers))
        self.single = meta_model(single_config, 1)
        self.spec = PromptSpec.of(
            self.large.shape,
            prompt.kind,
            prompt.num_tokens,
            projection=prompt.projection,
            encoder=prompt.encoder,
        )
        self.texts = _text_lengths(config, self.large.shape.num_positions, tokens)
        self._num_beside = 0  # values of adapters or a head, beside frozen weights
        if config.adapts:
            self._num_beside = lora.num_parameters(
                meta_model(architecture, num_layers), config.lora
            )
        if config.classifies:
            self._num_beside = class_head.num_parameters(self.large, self._num_labels())
        # Forward passes that each backward pass repeats.
        self._recompute_passes = 1 if config.model.gradient_checkpointing else 0

    def sizes(self) -> ModelSizes:
        """Return what the estimate of memory depends on."""
        distillation = self.config.distillation
        longest = self.texts.longest
        if distillation.text:
            longest = max(longest, distillation.text_length)
        if self._num_beside:
            return ModelSizes.with_adapters(self.large, self._num_beside, longest)
        if self.config.tunes_weights:
            return ModelSizes.all_weights(self.large, longest)
        sizes = ModelSizes.between(self.large, self.small, spec=self.spec, length=longest)
        return sizes.held_by(self.config)

    def handed_out(self) -> dict[str, int]:
        """Return what clients are given of the global model, as the record has it (`models`).

        What a distillation trains is no exact copy any more.
        """
        config = self.config
        num_layers = self.large.shape.num_layers
        counts = {
            "global": self.large.num_parameters(),
            "auxiliary": self.small.num_parameters(),
            "layers": num_layers,
            "layers_copied": 0,
            "exact_copies": 0,
        }
        if config.asks_server:
            return counts | {"auxiliary": 0}
        if config.tunes_weights:
            num_values = counts["global"]
            return counts | {
                "auxiliary": num_values,
                "exact_copies": num_values,
                "layers_copied": num_layers,
            }
        if config.distillation.stage.steps:
            return counts
        bridge = sum(
            weight.numel() for name, weight in self.small.weights.items() if ".bridge." in name
        )
        layers = auxiliary.layers(config.auxiliary, num_layers)
        copied = counts["auxiliary"] - bridge
        return counts | {"exact_copies": copied, "layers_copied": len(set(layers))}

    # -- FLOPs of the whole run, by phase ----------------------------------------------------------

    def phases(self) -> dict[str, float]:
        """Return the FLOPs of the whole run by phase, of all clients together."""
        config = self.config
        rounds = config.federation.rounds
        tuning = config.server.tuning
        if config.tunes_weights:
            distillation = 0.0
            server_step = self._weights_step(tuning)
        else:
            distillation = self._distillation()
            server_step = self._prompt_step(tuning, self.large, "prompts")
        server_tuning = rounds * tuning.steps * server_step
        has_control = config.evaluation.server_only and config.federation.clients > 0
        return {
            _DISTILLATION: distillation,
            **self._client_phases(),
            **self._labelling(),
            _SERVER_TUNING: server_tuning + self._translation(),
            _CONTROL: server_tuning if has_control else 0.0,
            **self._silo_validation(),
        }

    def _client_phases(self) -> dict[str, float]:
        """Return the FLOPs of all clients and rounds, by phase."""
        config = self.config
        num_updates = config.federation.rounds * self._clients_per_round()
        if config.searches:
            if config.asks_server:
                return {_SERVED_SEARCH: num_updates * self._search_flops(self.large).round}
            return {_SEARCH: num_updates * self._search_flops(self.small).round}
        if config.tunes_weights:
            tuning = config.client.tuning
            return {_FINE_TUNING: num_updates * tuning.steps * self._weights_step(tuning)}
        phases = {_ALIGNMENT: 0.0, _PROMPT_TUNING: 0.0}
        for stage in self._stages():
            step = self._prompt_step(stage.settings, self.small, stage.trained)
            phases[stage.phase] = num_updates * (stage.settings.steps * step)
        return phases

    def _labelling(self) -> dict[str, float]:
        """Return the FLOPs of all clients that label text; nothing where nobody does."""
        config = self.config
        augment = config.augment
        if not augment.is_on:
            return {}
        num_rounds = max(0, config.federation.rounds - augment.start_round + 1)
        num_labellers = min(augment.clients, config.federation.clients)
        labels_per_client = (config.data.labels or 0) // max(1, config.federation.clients)
        num_texts = max(0, self._examples_per_client() - labels_per_client)
        if augment.second_template is not None:
            num_texts *= 2
        num_answers = self.texts.answers * self._num_labels()
        tokens = self.texts.tokens + num_answers - self.texts.answers
        if config.tunes_weights:
            text_flops = forward(self.large, tokens, seen=tokens, answers=num_answers)
        else:
            texts_per_pass = max(1, config.evaluation.batch_tokens // tokens)
            text_flops = forward(
                self.small,
                self._tokens_per_forward(texts_per_pass) + tokens - self.texts.tokens,
                seen=tokens + self.spec.num_tokens,
                answers=num_answers,
            )
        return {_LABELLING: num_rounds * num_labellers * num_texts * text_flops}

    def _silo_validation(self) -> dict[str, float]:
        """Return the FLOPs of all silos that judge all rounds; nothing where the server judges."""
        config = self.config
        if config.evaluation.at == "server":
            return {}
        tokens = self.texts.tokens
        if config.tunes_weights:
            text_flops = forward(self.large, tokens, seen=tokens, answers=self.texts.answers)
        else:
            texts_per_pass = max(1, config.evaluation.batch_tokens // tokens)
            text_flops = forward(
                self.small,
                self._tokens_per_forward(texts_per_pass),
                seen=tokens + self.spec.num_tokens,
                answers=self.texts.answers,
            )
        task = TASKS.get(config.data.task)
        has_options = task is None or task.metric == "multiple_choice"
        num_passes = 2 if has_options else 1
        num_judgements = config.federation.rounds * config.federation.clients
        num_texts = num_judgements * self.silo_sizes().held_out
        return {_SILO_VALIDATION: num_texts * num_passes * text_flops}

    def _translation(self) -> float:
        """Return the FLOPs of all steps that imitate the auxiliary model's answers."""
        if not self.config.translates:
            return 0.0
        stage = self.config.server.translation
        tokens = self.texts.tokens
        teacher = stage.batch_size * forward(
            self.small, tokens, seen=tokens + self.spec.num_tokens, answers=self.texts.answers
        )
        step = self._prompt_step(stage, self.large, "prompts") + teacher
        return self.config.federation.rounds * stage.steps * step

    def _distillation(self) -> float:
        """Return the FLOPs of all distillation steps, and of fitting a bridge."""
        settings = self.config.distillation
        tokens = settings.text_length if settings.text else self.texts.tokens
        bridge = 0.0
        if self.config.auxiliary.first_layers:
            keys = tokens + self.spec.num_tokens
            bridge = settings.bridge_texts * (
                forward(self.large, tokens, seen=keys, answers=0)
                + forward(self.small, tokens, seen=keys, answers=0)
            )
        num_logits = tokens if settings.logits_weight else 0
        teacher = forward(self.large, tokens, seen=tokens, answers=num_logits)
        student = forward(self.small, tokens, seen=tokens, answers=num_logits)
        step = settings.stage.batch_size * (teacher + (3 + self._recompute_passes) * student)
        return bridge + settings.stage.steps * step

    # -- FLOPs of one step -------------------------------------------------------------------------

    def _weights_step(self, stage: StageConfig) -> float:
        """Return the FLOPs of one optimizer step on all weights of the global model, no prompts."""
        tokens = self.texts.tokens
        if self.config.classifies:  # no gradient goes into the model, and its own head is not run
            return stage.batch_size * forward(self.large, tokens, seen=tokens, answers=0)
        passes = (2 if self.config.adapts else 3) + self._recompute_passes
        text_flops = forward(self.large, tokens, seen=tokens, answers=self.texts.answers)
        return stage.batch_size * passes * text_flops

    def _prompt_step(self, stage: StageConfig, model: LanguageModel, trained: Trained) -> float:
        """Return the FLOPs of one optimizer step with prompts.

        Args:
            stage: batch sizes.
            model: that runs.
            trained: what the optimizer updates.
        """
        prompt_tokens = self.spec.num_tokens
        texts_per_pass = stage.micro_batch or stage.batch_size
        text_flops = forward(
            model,
            self._tokens_per_forward(texts_per_pass),
            seen=self.texts.tokens + prompt_tokens,
            answers=self.texts.answers,
        )
        passes = (2 if trained == "prompts" else 3) + self._recompute_passes
        encoder_passes = 1 if trained == "weights" else 3
        encoder_flops = 2.0 * self._encoder_weights(model) * prompt_tokens * encoder_passes
        num_micro_batches = -(-stage.batch_size // texts_per_pass)
        return stage.batch_size * passes * text_flops + num_micro_batches * encoder_flops

    def _encoder_weights(self, model: LanguageModel) -> int:
        """Return the weights of the prompt's projection and encoder at a model's depth."""
        with torch.device("meta"):
            prompt = Prompt(self.spec.at_depth(model.shape.num_layers))
        return sum(
            weight.numel()
            for module in prompt.modules()
            if isinstance(module, (nn.Linear, nn.LSTM))
            for weight in module.parameters()
            if weight.dim() == 2
        )

    def _tokens_per_forward(self, texts_per_pass: int) -> float:
        """Return the tokens that pass the layers for each text, those of an input prompt included.

        Args:
            texts_per_pass: texts that share a forward pass, and the prompt's positions in it.
        """
        if self.spec.kind == "prefix":
            return self.texts.tokens
        is_read_once = self.large.kind == "causal" and not self._recompute_passes
        readers = texts_per_pass if is_read_once else 1
        return self.texts.tokens + self.spec.num_tokens / readers

    # -- methods -----------------------------------------------------------------------------------

    def methods(self) -> tuple[MethodCost, ...]:
        """Return the configured method, then others with its rounds, steps and batches."""
        prompts_only = [_Stage(_PROMPT_TUNING, self.config.client.tuning, "prompts")]
        if self.config.tunes_weights:
            return (self._fine_tuning(),)
        if self.config.searches:
            return (
                self._search(),
                self._prompt_method("FedPrompt", self.large, prompts_only),
                self._fine_tuning(),
            )
        stages = self._stages()
        trains_weights = any(stage.trained != "prompts" for stage in stages)
        is_fedsp = trains_weights or self.config.auxiliary.first_layers
        name = "FedSP (as configured)" if is_fedsp else "as configured"
        num_down = 1
        if self.config.method_facts.has_tiers:
            name = f"{self.config.method_facts.title} (as configured)"
            num_down = len(self.config.tiers.experts) + 1  # the experts' and the general prompt
        methods = [self._prompt_method(name, self.small, stages, num_down=num_down)]
        if trains_weights:
            methods.append(self._prompt_method("FedSP, no sharing", self.single, stages))
        methods += [
            self._prompt_method("FedPrompt", self.large, prompts_only),
            self._prompt_method("FedPrompt-single", self.single, prompts_only),
            self._prompt_method("prefix-tuning, 1 client", self.large, prompts_only, num_clients=1),
            self._fine_tuning(),
        ]
        return tuple(methods)

    def _clients_per_round(self) -> int:
        federation = self.config.federation
        return federation.clients_per_round or federation.clients

    def _stages(self) -> list[_Stage]:
        """Return the stages of a client's round."""
        client = self.config.client
        if client.training == "joint":
            return [_Stage(_PROMPT_TUNING, client.tuning, "both")]
        stages = [_Stage(_PROMPT_TUNING, client.tuning, "prompts")]
        if client.alignment.steps:
            stages.insert(0, _Stage(_ALIGNMENT, client.alignment, "weights"))
        personal = self.config.tiers.personal.tuning
        if self.config.method_facts.has_tiers and personal.steps:
            stages.append(_Stage(_PERSONAL_TUNING, personal, "prompts"))
        return stages

    def _prompt_method(
        self,
        name: str,
        model: LanguageModel,
        stages: list[_Stage],
        *,
        num_clients: int | None = None,
        num_down: int = 1,
    ) -> MethodCost:
        """Return the cost of a method whose clients exchange prompts.

        Args:
            name: of the method.
            model: that each client holds; the prompts that travel have its depth.
            stages: of a client's round.
            num_clients: all of which take part in every round; None: as configured.
            num_down: prompts that go down in a round; one comes up.
        """
        holds = model.num_parameters()
        with torch.device("meta"):
            num_values = Prompt(self.spec.at_depth(model.shape.num_layers)).num_parameters()
        steps = tuple(self._prompt_step(stage.settings, model, stage.trained) for stage in stages)
        round_flops = sum(
            stage.settings.steps * step for stage, step in zip(stages, steps, strict=True)
        )
        trains = num_values
        if any(stage.trained != "prompts" for stage in stages):
            trains += holds
        num_values_down = num_down * num_values
        handout = FP32_BYTES * (holds + num_values_down) + self._reference_bytes(num_values)
        down = self._message_bytes(num_values_down)
        update = self._message_bytes(num_values) + self._seal_bytes(num_values)
        clients_per_round = num_clients or self._clients_per_round()
        all_clients = num_clients or self.config.federation.clients
        judged = self._judged(down)
        rounds = self.config.federation.rounds
        total = all_clients * handout
        total += rounds * (clients_per_round * (down + update) + all_clients * judged)
        return MethodCost(
            name=name,
            holds=holds,
            trains=trains,
            handout=handout,
            down=down,
            up=update,
            judged=judged,
            total=total,
            steps=steps,
            round=round_flops,
        )

    def _fine_tuning(self) -> MethodCost:
        """Return the cost of fine-tuning, where clients train the whole model, its adapters or a
        head.

        It takes the steps of the prompt stage. All weights come with every round, so there is no
        hand-out unless rounds are compressed; beside adapters or a head, they are handed out once.
        """
        stage = self.config.client.tuning
        num_weights = self.large.num_parameters()
        num_tuned = self._num_beside or num_weights
        message = self._message_bytes(num_tuned)
        update = message + self._seal_bytes(num_tuned)
        handout = self._reference_bytes(num_tuned)
        if self._num_beside:
            handout += FP32_BYTES * num_weights
        if self.config.classifies:
            handout += FP32_BYTES * num_tuned  # the first head
        judged = self._judged(message)
        federation = self.config.federation
        total = self._clients_per_round() * (message + update) + federation.clients * judged
        step = self._weights_step(stage)
        return MethodCost(
            name=self.config.method_facts.title if self.config.tunes_weights else "fine-tuning",
            holds=num_weights,
            trains=num_tuned,
            handout=handout,
            down=message,
            up=update,
            judged=judged,
            total=federation.rounds * total + federation.clients * handout,
            steps=(step,),
            round=stage.steps * step,
        )

    def _message_bytes(self, num_values: int) -> int:
        """Return the bytes of a broadcast or an update, as the configuration compresses it."""
        return num_bytes(num_values, self.config.federation.compression) + HEADER_BYTES

    def _seal_bytes(self, num_values: int) -> int:
        """Return the bytes that sealing adds to an update; 0 if nothing is sealed."""
        if not self.config.wire.encryption:
            return 0
        return update_seal_bytes(num_values, CHUNK_BYTES, self.config.federation.compression)

    def _reference_bytes(self, num_values: int) -> int:
        """Return the bytes of what changes are sent against, which is handed out with them."""
        return FP32_BYTES * num_values if self.config.federation.compression.is_on else 0

    def _judged(self, message: int) -> int:
        """Return the bytes to a client of a round's result, if silos judge it.

        Args:
            message: bytes of the broadcast that a round begins with.
        """
        return 0 if self.config.evaluation.at == "server" else message

    def silo_sizes(self) -> SiloSizes:
        """Return what is assumed of a silo's examples: its limit, or the texts of a round."""
        config = self.config
        assumed = self._texts_per_round()
        limits = [silo.limit or config.data.limit.train for silo in config.federation.silos]
        numbers = [limit or assumed for limit in limits]
        num_examples = max(2, round(sum(numbers) / len(numbers)))
        source = "the limits" if any(limits) else "the texts of a round's steps"
        if config.evaluation.at == "server":
            return SiloSizes(num_examples, held_out=0, source=source)
        held_out = min(num_examples - 1, max(1, round(config.evaluation.held_out * num_examples)))
        return SiloSizes(num_examples - held_out, held_out=held_out, source=source)

    def _texts_per_round(self) -> int:
        return self.config.client.tuning.steps * self.config.client.tuning.batch_size

    # -- search without gradients ------------------------------------------------------------------

    def _search(self) -> MethodCost:
        """Return the cost of clients that search; a step is one point on all of their examples."""
        config = self.config
        values_down, values_up = self._values_of_search()
        down = FP32_BYTES * values_down + HEADER_BYTES
        up = FP32_BYTES * values_up + HEADER_BYTES + self._seal_bytes(values_up)
        if config.asks_server:
            # The clients hold no model: their texts travel, and the server computes.
            requests = self._request_bytes()
            responses = self._response_bytes()
            holds = 0
            handout = 0
            flops = _SearchFlops(0.0, 0.0)
            down += responses
            up += requests
        else:
            with torch.device("meta"):
                prompt = Prompt(self.spec.at_depth(self.small.shape.num_layers))
            holds = self.small.num_parameters()
            # The model, the first prompt, and the scale of the search's projection; of
            # instructions, the model alone.
            num_first = 0 if config.in_words else prompt.num_parameters() + 1
            handout = FP32_BYTES * (holds + num_first)
            flops = self._search_flops(self.small)
        judged = self._judged(down)
        num_updates = config.federation.rounds * self._clients_per_round()
        num_judgements = config.federation.rounds * config.federation.clients
        total = config.federation.clients * handout
        total += num_updates * (down + up) + num_judgements * judged
        return MethodCost(
            name=config.method_facts.title,
            holds=holds,
            trains=config.num_searched,
            handout=handout,
            down=down,
            up=up,
            judged=judged,
            total=total,
            steps=(flops.point,),
            round=flops.round,
        )

    def _values_of_search(self) -> tuple[int, int]:
        """Return how many numbers go down in a round, and how many come up."""
        if self.config.in_words:
            num_candidates = self.config.instructions.candidates
            return num_candidates * self.spec.num_tokens, num_candidates
        part_sizes = search_sizes(self.config.search.dimension)
        parts_down, parts_up = self.config.search.travelling()
        return (
            sum(part_sizes[name] for name in parts_down),
            sum(part_sizes[name] for name in parts_up),
        )

    def _search_flops(self, model: LanguageModel) -> _SearchFlops:
        """Return the FLOPs of one client's search on a model."""
        num_texts = self._texts_per_point()
        # Of a text's choices, each but the right one is read behind the same context.
        num_answers = self.texts.answers * self._choices_per_text()
        text_flops = forward(
            model,
            self._tokens_per_forward(num_texts) + num_answers - self.texts.answers,
            seen=self.texts.tokens + self.spec.num_tokens,
            answers=num_answers,
        )
        point = num_texts * text_flops
        search = self.config.search
        num_points = self.config.instructions.candidates if self.config.in_words else search.points
        return _SearchFlops(point=point, round=num_points * point)

    def _choices_per_text(self) -> int:
        """Return the choices that are scored of each text; 1: its answer alone."""
        config = self.config
        task = TASKS.get(config.data.task)
        has_choices = task is None or task.metric == "multiple_choice"
        if not config.in_words or config.instructions.objective == "loss" or not has_choices:
            return 1
        return self._num_labels()

    def _num_labels(self) -> int:
        """Return the choices of the task's rows; of rows with choices of their own, a guess."""
        task = TASKS.get(self.config.data.task)
        num_classes = len(self.config.data.classes)
        return num_classes or (task.num_classes if task else None) or _NUM_LABELS

    def _request_bytes(self) -> int:
        """Return the bytes of a client's requests in a round, for texts of mean length.

        The layout is that of algorithms/inference.py.
        """
        search = self.config.search
        num_requests = search.iterations + 1
        num_texts = self._texts_per_point()
        num_values = 3 + self._copies_per_text() + num_texts * (3 + self.texts.tokens)
        points = FP32_BYTES * search.points * search.dimension
        seal_bytes = 2 * SEAL_BYTES if self.config.wire.encryption else 0
        return num_requests * (HEADER_BYTES + FP32_BYTES * num_values + seal_bytes) + points

    def _response_bytes(self) -> int:
        """Return the bytes of the server's responses to a client in a round."""
        search = self.config.search
        num_requests = search.iterations + 1
        losses = FP32_BYTES * search.points * self._texts_per_point()
        return num_requests * HEADER_BYTES + losses

    def _texts_per_point(self) -> int:
        """Return the texts on which a client evaluates each point."""
        return self._copies_per_text() * self._examples_per_client()

    def _copies_per_text(self) -> int:
        """Return 2 where the search evaluates a perturbed copy of each text too, else 1."""
        is_perturbed = not self.config.in_words and self.config.search.objective != "loss"
        return 2 if is_perturbed else 1

    def _examples_per_client(self) -> int:
        """Return the examples of a client that searches or labels.

        Its share of data.shots or data.limit.train, else what client.tuning takes in a round.
        """
        config = self.config
        data = config.data
        if config.federation.silos:
            return self.silo_sizes().train
        if data.shots is not None:
            num_examples = data.shots * self._num_labels()
        elif data.limit.train is not None:
            num_examples = data.limit.train
        else:
            return self._texts_per_round()
        num_owners = config.federation.clients
        if data.resolved_server_share != 0:
            num_owners += 1
        return -(-num_examples // num_owners)
