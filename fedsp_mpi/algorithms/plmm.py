"""PLMM (Gong, 2023, arXiv 2309.14726): personal, expert and general models, as two tiers of rounds.

The paper is a concept: users' personal models learn from experts, which have a domain each, and
those from a general model; what is learned goes up again. How is not said. Here all three are soft
prompts on frozen weights, so that prompts are all that moves between them:

- a *personal* prompt, on the auxiliary model, never leaves its user's rank. It is tuned towards the
  user's text and held near the expert's prompt, as in Ditto (Li et al., 2021, arXiv 2012.04221);
- an *expert's* prompt is that of a federated round of its own (fedsp.py) among its users;
- the *general* prompt is the mean of the experts', distilled from their answers; it teaches them.

The experts are the server of one round (`Experts`, with `Users` as clients) and the clients of
another (`ExpertClients`, with `GeneralServer`): `federate.run_round` runs the second inside the
first. Where several ranks are the server, experts are dealt out among them: each rank tunes and
validates its own, and all of them know the result.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from fedsp_mpi.aggregation.fedavg import Updates, fold, shares_of, weighted_mean
from fedsp_mpi.algorithms import fedsp
from fedsp_mpi.algorithms.base import (
    ClientContext,
    HandedOut,
    Method,
    MethodInputs,
    Server,
    ServerContext,
    ShardError,
    TierAbove,
)
from fedsp_mpi.algorithms.client_state import StatelessClients, arrays, tensors
from fedsp_mpi.algorithms.prompt_server import PromptServer
from fedsp_mpi.config import StageConfig
from fedsp_mpi.config.tiers import GENERAL
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.models.losses import answer_loss_of, hidden_loss, logits_loss
from fedsp_mpi.models.prompts import DepthMap, Prompt
from fedsp_mpi.record.client_cache import StateHolder
from fedsp_mpi.tensors import (
    Batch,
    ClientError,
    NamedTensors,
    Report,
    Schema,
    State,
    Update,
    join_states,
    part_of_state,
)
from fedsp_mpi.training.device import oom_as_client_error
from fedsp_mpi.training.engine import TorchEngine
from fedsp_mpi.training.loop import Batches, NonFiniteError, Trace, train
from fedsp_mpi.training.process_group import SINGLE_RANK, ServerGroup

TierName = Literal["personal", "expert", "general"]


# -- distillation between prompts of one model -----------------------------------------------------


@dataclass(frozen=True)
class Teaching:
    """How one prompt learns what a model answers under another one.

    Attributes:
        stage: steps of a round; each round has a schedule of its own.
        hidden_weight: of the mean squared error of the last hidden states.
        temperature: of the KL divergence of the logits.
    """

    stage: StageConfig
    hidden_weight: float
    temperature: float

    def teach(
        self,
        model: LanguageModel,
        student: Prompt,
        teachers: Sequence[tuple[Prompt, Batches]],
        *,
        round: int,
    ) -> Trace:
        """Tune a prompt in place, towards each teacher's answers in turn, a step on the text of
        each.

        The loss of an answer's token is T^2 KL(teacher || student) (Hinton et al., 2015) plus
        `hidden_weight` times the mean squared error of the last hidden states.

        Args:
            model: runs under all prompts, frozen.
            student: is tuned.
            teachers: prompts, each with the batches that it answers.
            round: from 1; a round goes on where the last one ended in the batches.
        """
        engine = TorchEngine(student.parameters(), self.stage.optimizer, self.stage.steps)
        student.requires_grad_(True)
        losses: list[float] = []
        samples = 0
        start = time.perf_counter()
        first = (round - 1) * self.stage.steps
        for step in range(first, first + self.stage.steps):
            teacher, batches = teachers[step % len(teachers)]
            trace = train(
                engine,
                batches,
                partial(self._loss, model=model, student=student, teacher=teacher),
                first_step=step // len(teachers),
                num_steps=1,
                device=model.device,
            )
            losses += trace.losses
            samples += trace.samples
        return Trace(tuple(losses), samples, time.perf_counter() - start)

    def _loss(
        self, batch: Batch, *, model: LanguageModel, student: Prompt, teacher: Prompt
    ) -> Tensor:
        """Return the loss of a batch [batch, length], summed over its answers' tokens."""
        with torch.no_grad():
            teacher_states = model.answer_states(batch, teacher)
            teacher_logits, _ = model.logits_and_targets(teacher_states, batch)
        states = model.answer_states(batch, student)
        logits, _ = model.logits_and_targets(states, batch)
        loss = logits_loss(logits, teacher_logits, self.temperature)
        if self.hidden_weight:
            mask = torch.ones(states.shape[:-1], device=states.device)
            loss = loss + self.hidden_weight * hidden_loss(states, teacher_states, mask)
        return loss


# -- the experts, as the server of their users -----------------------------------------------------


class Group:
    """The updates of one expert's users, or a range of their values, as a rule reads them.

    Args:
        updates: of all users.
        rows: places of the expert's users among them.
        values: what they have tuned, from this expert's prompt: fp32 [users, values].
        schema: names and shapes of these values.
    """

    def __init__(
        self, updates: Updates, rows: Sequence[int], values: np.ndarray, *, schema: Schema
    ) -> None:
        self._updates = updates
        self._values = values
        self.schema = schema
        self.reports: Sequence[Report] = [updates.reports[row] for row in rows]

    def columns(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield all values at once: fp32 [users, values]."""
        yield slice(0, self._values.shape[1]), self._values

    def rows(self) -> np.ndarray:
        """Return all values, fp32 [users, values]."""
        return self._values

    def reject(self, client: int, reason: str) -> None:
        """Record that a user's update was not used."""
        self._updates.reject(client, reason)


class Experts:
    """All experts: each merges what its users send, and tunes the result on its own text.

    Users start from their expert's prompt, one who belongs to several from the mean of theirs; what
    such a user has changed counts for each of them.

    Args:
        experts: by name; a FedSP server each.
        general: the tier above, whose prompt goes down with theirs.
        members: the experts of each user, by client id.
        depths: converts prompts to the depth of the users' model.
        merges_values: whether the rule merges each value by itself, so that updates can be read a
            range of values at a time; otherwise all of them are in memory at once.
        group: the server's ranks, among which experts are dealt out.
    """

    def __init__(
        self,
        experts: Mapping[str, PromptServer],
        general: GeneralServer,
        members: Sequence[tuple[int, ...]],
        *,
        depths: DepthMap,
        merges_values: bool = False,
        group: ServerGroup = SINGLE_RANK,
    ) -> None:
        self.experts = dict(experts)
        self.general = general
        self.group = group
        self.model = general.model
        self._members = members
        self._depths = depths
        self._merges_values = merges_values
        self._sent = NamedTensors.pack({})  # the broadcast of the round
        self._tuned: dict[str, Trace | None] = {}  # in the round `_round`
        self._round = 0

    @property
    def prompt(self) -> Prompt:
        """The general prompt."""
        return self.general.prompt

    @property
    def tunes(self) -> bool:
        """Whether prompts change after the merge: the round of the tier above changes them."""
        return True

    @property
    def prompts(self) -> dict[str, Prompt]:
        """The prompts of all experts and of the general model, by name."""
        return {name: server.prompt for name, server in self._servers().items()}

    def broadcast(self) -> NamedTensors:
        """Return all prompts at the depth of the users' model, "expert/NAME/" and "general/"."""
        parts = {part_name(name): server.broadcast() for name, server in self.experts.items()}
        general = NamedTensors.pack(self._depths.down(self.general.prompt.tensors()))
        self._sent = NamedTensors.join({**parts, part_name(GENERAL): general})
        return self._sent

    def aggregate(self, updates: Updates) -> NamedTensors:
        """Return the broadcast with each expert's prompt replaced by what its users have made of
        it; an expert none of whose users took part keeps its own.
        """
        starts = [self._sent.select(part_name(name)) for name in self.experts]
        merged = [start.copy() for start in starts]
        members = [self._members[report.client] for report in updates.reports]
        shifts = _shifts(starts, members)
        schema = updates.schema
        for part, columns in self._parts(updates):
            if self._merges_values:
                schema = Schema.of([("values", (columns.shape[1],))])
            for index, expert in enumerate(self.experts.values()):
                rows = [row for row, experts in enumerate(members) if index in experts]
                if not rows:
                    continue
                values = columns[rows]
                for place, row in enumerate(rows):
                    if (index, members[row]) in shifts:
                        values[place] += shifts[index, members[row]][part]
                group = Group(updates, rows, values, schema=schema)
                merged[index].flat[part] = expert.aggregate(group).flat
        prompts = {part_name(name): prompt for name, prompt in zip(self.experts, merged)}
        prompts[part_name(GENERAL)] = self._sent.select(part_name(GENERAL))
        return NamedTensors.join(prompts)

    def _parts(self, updates: Updates) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield ranges of all updates, fp32 [users, range]; one range, where a rule needs all."""
        if self._merges_values:
            yield from updates.columns()
        else:
            yield slice(0, updates.schema.num_values), updates.rows()

    def load_aggregate(self, aggregate: NamedTensors) -> None:
        """Make the merged prompts the experts' own, at the depth of the global model."""
        for name, expert in self.experts.items():
            expert.load_aggregate(aggregate.select(part_name(name)))

    def tune(self, name: str, round: int) -> Trace | None:
        """Tune an expert's prompt on its own text, once in a round; None without such steps.

        On the rank that plays the expert.
        """
        if round != self._round:
            self._round = round
            self._tuned = {}
        if name not in self._tuned:
            self._tuned[name] = self.experts[name].server_update(round)
        return self._tuned[name]

    def server_update(self, round: int) -> Trace | None:
        """Tune every expert that the round of the tier above has not tuned already.

        Afterwards all ranks of the server hold what each of them has tuned, and the general prompt.

        Returns:
            The mean losses of all experts by step; None, if there are no such steps.

        Raises:
            ClientError: NonFiniteError, with the expert's name.
        """
        own_traces: dict[int, Trace | None] = {}
        for index, name in enumerate(self.experts):
            if self.group.is_mine(index):
                try:
                    own_traces[index] = self.tune(name, round)
                except NonFiniteError as error:
                    raise NonFiniteError(f"expert {name}: {error}") from error
        shared = [
            self._share(index, expert, own_traces.get(index))
            for index, expert in enumerate(self.experts.values())
        ]
        self.group.lead(self.general.parameters())
        traces = [trace for trace in shared if trace is not None]
        if not traces:
            return None
        losses = np.mean([trace.losses for trace in traces], axis=0)
        seconds = sum(trace.seconds for trace in traces)
        return Trace(tuple(losses.tolist()), sum(trace.samples for trace in traces), seconds)

    def _share(self, index: int, expert: PromptServer, trace: Trace | None) -> Trace | None:
        """Take over an expert's state, and how it was tuned, from the rank that plays it.

        Args:
            index: of the expert.
            expert: the same.
            trace: of its tuning, on that rank.
        """
        group = self.group
        if group.size == 1:
            return trace
        owner = group.owner_of(index)
        state = group.tell_arrays(expert.state(), owner)
        if not group.is_mine(index):
            expert.load_state(state)
        fields = [trace.losses, trace.samples, trace.seconds] if trace is not None else None
        fields = group.tell(fields, owner)
        if fields is None:
            return None
        losses, samples, seconds = fields
        return Trace(tuple(losses), samples, seconds)

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return all prompts' parameters."""
        return chain.from_iterable(prompt.parameters() for prompt in self.prompts.values())

    def export(self) -> NamedTensors:
        """Return a copy of all prompts at the depth of the global model."""
        return NamedTensors.join(
            {part_name(name): server.export() for name, server in self._servers().items()}
        )

    def restore(self, exported: NamedTensors) -> None:
        """Copy in the prompts that `export` returned."""
        for name, server in self._servers().items():
            server.restore(exported.select(part_name(name)))

    def state(self) -> State:
        """Return all that the next round depends on; the tier above keeps its own."""
        return join_states({name: expert.state() for name, expert in self.experts.items()})

    def load_state(self, state: State) -> None:
        """Continue from `state()`, which is copied."""
        for name, expert in self.experts.items():
            expert.load_state(part_of_state(state, name))

    def _servers(self) -> dict[str, PromptServer]:
        return {**self.experts, GENERAL: self.general}


def part_name(tier: str) -> str:
    """Return what stands in front of the names of an expert's tensors, or of the general ones."""
    return f"{GENERAL}/" if tier == GENERAL else f"expert/{tier}/"


def _shifts(
    starts: Sequence[NamedTensors], members: Sequence[tuple[int, ...]]
) -> dict[tuple[int, tuple[int, ...]], np.ndarray]:
    """Return by how much an expert's prompt differs from what users of several began with.

    Args:
        starts: the experts' prompts.
        members: the experts of each user.

    Returns:
        fp32 [values] by the expert, and all experts of such a user.
    """
    shifts = {}
    for experts in {experts for experts in members if len(experts) > 1}:
        start = mean_prompt([starts[expert] for expert in experts])
        for expert in experts:
            shifts[expert, experts] = starts[expert].flat - start.flat
    return shifts


def mean_prompt(prompts: Sequence[NamedTensors]) -> NamedTensors:
    """Return the mean of prompts, each fp32 [*shape]; of one prompt, a copy with its bits."""
    if len(prompts) == 1:
        return prompts[0].copy()
    shares = shares_of([1.0] * len(prompts))
    mean = fold(shares, np.stack([prompt.flat for prompt in prompts]))
    return NamedTensors(prompts[0].schema, mean.astype(np.float32))


# -- the experts, as the clients of the general model ----------------------------------------------


class GeneralServer(PromptServer):
    """Averages the experts' prompts, and learns what they answer on text of their domains.

    Args:
        model: the global model, frozen.
        prompt: the first one.
        depths: from the global model's depth to itself.
        experts: prompts and texts of the experts, which have been tuned in the round; none
            without such steps, and where another rank does them.
        teaching: how their answers are learned; without steps the mean stays.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompt: Prompt,
        depths: DepthMap,
        *,
        experts: Sequence[tuple[Prompt, Batches]],
        teaching: Teaching,
    ) -> None:
        super().__init__(
            model,
            prompt,
            depths,
            batches=None,
            stage=teaching.stage,
            total_rounds=1,
            rule=weighted_mean,
        )
        self._experts = experts
        self._teaching = teaching

    @property
    def tunes(self) -> bool:
        """Whether the mean of the experts' prompts learns from their answers."""
        return self._teaching.stage.steps > 0

    def aggregate(self, updates: Updates) -> NamedTensors:
        """Return the mean of the experts' prompts, whose answers are those of what they sent."""
        rows = updates.rows()
        for (prompt, _), values in zip(self._experts, rows):
            prompt.load(NamedTensors(updates.schema, values).torch())
        everyone = range(len(updates.reports))
        return super().aggregate(Group(updates, everyone, rows, schema=updates.schema))

    def server_update(self, round: int) -> Trace | None:
        """Distil the experts' answers into the mean of their prompts; None without such steps."""
        if not self._teaching.stage.steps:
            return None
        return self._teaching.teach(self.model, self.prompt, self._experts, round=round)


class ExpertClients:
    """The experts that this rank plays, as the clients of a round of the general model.

    Args:
        tier: all experts.
        texts: the text of each expert of this rank, by its index, in an order for this purpose;
            empty without such steps.
        teaching: how the general model teaches them.
        first_id: of the experts, whose ids follow those of the users.
    """

    prompt = None

    def __init__(
        self, tier: Experts, texts: Mapping[int, Batches], teaching: Teaching, *, first_id: int
    ) -> None:
        self.model = tier.model
        self.states = StatelessClients()  # what experts keep belongs to `tier`
        self._tier = tier
        self._names = list(tier.experts)
        self._texts = texts
        self._teaching = teaching
        self._first_id = first_id
        self._teacher = Prompt(tier.prompt.spec).to(tier.model.device).requires_grad_(False)

    def local_update(self, client: int, round: int, broadcast: NamedTensors) -> Update:
        """Teach an expert what the general model answers on its text, then tune it on that text.

        See `base.Client.local_update`. Every expert's prompt counts the same.

        Raises:
            ClientError: NonFiniteError.
        """
        index = client - self._first_id
        name = self._names[index]
        expert = self._tier.experts[name]
        taught = Trace()
        if self._teaching.stage.steps:
            self._teacher.load(broadcast.torch())
            pair = (self._teacher, self._texts[index])
            taught = self._teaching.teach(self.model, expert.prompt, [pair], round=round)
        tuned = self._tier.tune(name, round) or Trace()
        metrics = {"loss_upgrade_last": taught.last, "loss_prompt_last": tuned.last}
        return Update(client, 1.0, expert.export(), metrics)

    def hold(self, client: int, broadcast: NamedTensors) -> None:
        """Do nothing: experts are scored where they are the server."""


# -- users -----------------------------------------------------------------------------------------


@dataclass
class Personal:
    """What one user keeps for itself.

    Attributes:
        prompt: fp32 on the CPU, by name.
        engine: its optimizer.
    """

    prompt: Mapping[str, Tensor]
    engine: TorchEngine


class UserStates:
    """What users keep between rounds: what a client of FedSP keeps, and their personal prompts.

    Args:
        shared: the former.
        build_engine: builds the optimizer of a personal prompt.
    """

    def __init__(self, shared: StateHolder, build_engine: partial[TorchEngine]) -> None:
        self._shared = shared
        self._build_engine = build_engine
        self.personal: dict[int, Personal] = {}

    def begin(self, client: int, start: Mapping[str, Tensor]) -> Personal:
        """Return what a user keeps; one that begins starts from a prompt, fp32 [*shape] by name."""
        if client in self.personal:
            return self.personal[client]
        return Personal(start, self._build_engine())

    def drop_moments(self, client: int) -> None:
        """Give a user's prompt a new optimizer: the moments of the old one are from a round that
        failed, and may not be finite. One that has no prompt yet begins in its next round.
        """
        if client in self.personal:
            self.personal[client] = Personal(self.personal[client].prompt, self._build_engine())

    def has_state(self, client: int) -> bool:
        """Return whether a user keeps something; before its first round it does not."""
        return client in self.personal or self._shared.has_state(client)

    def client_state(self, client: int) -> State:
        """Return what a user keeps, as a checkpoint stores it."""
        parts: dict[str, State] = {}
        if self._shared.has_state(client):
            parts["shared"] = self._shared.client_state(client)
        if client in self.personal:
            personal = self.personal[client]
            parts["personal"] = arrays(personal.prompt)
            parts["engine"] = personal.engine.state()
        return join_states(parts)

    def load_client_state(self, client: int, state: State) -> None:
        """Continue from `client_state()`, whose arrays belong to the user from now on."""
        shared = part_of_state(state, "shared")
        if shared:
            self._shared.load_client_state(client, shared)
        prompt = part_of_state(state, "personal")
        if prompt:
            engine = self._build_engine()
            engine.load_state(part_of_state(state, "engine"))
            self.personal[client] = Personal(tensors(prompt), engine)

    def forget(self, client: int) -> None:
        """Drop what a user keeps."""
        self._shared.forget(client)
        self.personal.pop(client, None)


class Users:
    """All users of one process: each tunes its expert's prompt, which it sends, and then its own.

    Args:
        shared: tunes what is sent, as FedSP's clients do.
        experts: names of the experts of each user, by client id.
        texts: the users' text for their own prompt, by client id, or why it cannot be trained on.
        stage: a round's tuning of their own prompt.
        total_rounds: length of its learning-rate schedule, in rounds.
        proximal: Ditto's lambda (Li et al., 2021, equation 1): the loss of the personal prompt v
            has a term lambda / 2 ||v - w||^2 more, where w is the expert's prompt of the round.

    Attributes:
        states: what users keep between rounds.
    """

    def __init__(
        self,
        shared: fedsp.Client,
        experts: Mapping[int, Sequence[str]],
        texts: Mapping[int, Batches | ShardError],
        *,
        stage: StageConfig,
        total_rounds: int,
        proximal: float,
    ) -> None:
        self._shared = shared
        self._experts = experts
        self._texts = texts
        self._stage = stage
        self.model = shared.model
        self.prompt = shared.prompt
        build_engine = partial(
            TorchEngine,
            list(shared.prompt.parameters()),
            stage.optimizer,
            stage.steps * total_rounds,
            proximal=proximal,
        )
        self.states = UserStates(shared.states, build_engine)

    def local_update(self, client: int, round: int, broadcast: NamedTensors) -> Update:
        """Tune the prompt that is sent, from the experts' one, and the user's own.

        See `base.Client.local_update`. After an error of its tuning the user's own prompt is as it
        was, and its optimizer a new one: moments of the failed steps may not be finite.

        Raises:
            ClientError: as FedSP's clients; NonFiniteError if the user's own prompt is not finite.
        """
        start = self.start(client, broadcast)
        update = self._shared.local_update(client, round, start)
        trace = Trace()
        if self._stage.steps:
            try:
                with oom_as_client_error():
                    trace = self._tune_own(client, round, start)
            except ClientError:
                self.states.drop_moments(client)
                raise
        return replace(update, metrics={**update.metrics, **_personal_metrics(trace)})

    def _tune_own(self, client: int, round: int, start: NamedTensors) -> Trace:
        """Tune a user's own prompt near the prompt of its experts, and keep it."""
        texts = self._texts[client]
        assert not isinstance(texts, ShardError), "FedSP's client has refused it"
        personal = self.states.begin(client, start.torch())
        engine = personal.engine
        self.prompt.load(start.torch())
        engine.to(self.model.device)
        engine.zero_grad()
        engine.anchor()
        self.prompt.load(personal.prompt)
        self.prompt.requires_grad_(True)
        engine.steps_done = (round - 1) * self._stage.steps
        trace = train(
            engine,
            texts,
            partial(answer_loss_of, self.model, self.prompt),
            first_step=(round - 1) * self._stage.steps,
            num_steps=self._stage.steps,
            device=self.model.device,
        )
        tuned = NamedTensors.pack(self.prompt.tensors())
        if not tuned.is_finite():
            raise NonFiniteError("the personal prompt holds numbers that are not finite")
        engine.to(torch.device("cpu"))
        self.states.personal[client] = Personal(tuned.torch(), engine)
        return trace

    def start(self, client: int, broadcast: NamedTensors) -> NamedTensors:
        """Return the prompt that a user starts from: its expert's, or the mean of its experts'."""
        return mean_prompt([broadcast.select(part_name(name)) for name in self._experts[client]])

    def hold(self, client: int, broadcast: NamedTensors) -> None:
        """Load a user's own prompt; see `base.Client.hold`."""
        self.show(client, broadcast, "personal")

    def show(self, client: int, broadcast: NamedTensors, tier: TierName) -> None:
        """Load a tier's prompt as a user has it, to score it on the user's model.

        Args:
            client: of the user.
            broadcast: all experts' prompts and the general one.
            tier: whose prompt.
        """
        self._shared.hold(client, self.start(client, broadcast))
        if tier == "personal" and client in self.states.personal:
            self.prompt.load(self.states.personal[client].prompt)
        elif tier == "general":
            self.prompt.load(broadcast.select(part_name(GENERAL)).torch())


def _personal_metrics(trace: Trace) -> dict[str, float]:
    return {
        "loss_personal_first": trace.first,
        "loss_personal_last": trace.last,
        "seconds_personal": trace.seconds,
    }


# -- the method ------------------------------------------------------------------------------------


class PersonalLargeModels(Method):
    """Prompts travel between three tiers; users hold the auxiliary model."""

    metrics = (
        *fedsp.METHOD.metrics,
        "loss_personal_first",
        "loss_personal_last",
        "seconds_personal",
    )

    def build_server(self, context: ServerContext) -> Experts:
        """Return all experts, each a FedSP server on its domain, and the general model above."""
        inputs = context.inputs
        group = context.group
        prompt_servers: dict[str, PromptServer] = {}
        for index, (name, domain) in enumerate(zip(_names(inputs), inputs.domains, strict=True)):
            own_context = replace(
                context,
                inputs=domain,
                client_model=None,
                group=SINGLE_RANK,
                reads_text=group.is_mine(index),
            )
            server = fedsp.METHOD.build_server(own_context)
            assert isinstance(server, PromptServer)
            prompt_servers[name] = server
        consensus = inputs.config.tiers.consensus
        every_domain = range(len(inputs.domains)) if group.rank == 0 else ()
        texts = _texts(inputs, consensus, "consensus", domains=every_domain)
        spec = inputs.prompt_spec
        general = GeneralServer(
            context.model,
            inputs.first_prompt(context.model).to(context.compute.device),
            DepthMap(spec, spec.num_layers),
            experts=[
                (prompt_servers[_names(inputs)[index]].prompt, batches)
                for index, batches in texts.items()
            ],
            teaching=_teaching(inputs, consensus),
        )
        return Experts(
            prompt_servers,
            general,
            inputs.members,
            depths=inputs.depth_map,
            merges_values=inputs.config.federation.rule in ("mean", "median"),
            group=group,
        )

    def tier_above(self, inputs: MethodInputs, server: Server) -> TierAbove:
        """Return the general model's round, whose clients are the experts."""
        assert isinstance(server, Experts)
        upgrade = inputs.config.tiers.upgrade
        first_id = len(inputs.members)
        group = server.group
        indexes = range(len(server.experts))
        own_domains = [index for index in indexes if group.is_mine(index)]
        experts = ExpertClients(
            server,
            _texts(inputs, upgrade, "upgrade", domains=own_domains),
            _teaching(inputs, upgrade),
            first_id=first_id,
        )
        return TierAbove(
            server.general,
            experts,
            {first_id + index: group.owner_of(index) for index in indexes},
            metrics=("loss_upgrade_last", "loss_prompt_last"),
        )

    def hand_out(
        self, inputs: MethodInputs, server: Server, client_model: LanguageModel
    ) -> HandedOut:
        """Return the auxiliary model; prompts come with every round; see `Method.hand_out`."""
        handed_out = fedsp.METHOD.hand_out(inputs, server, client_model)
        assert isinstance(server, Experts)
        first = next(iter(server.experts))
        up = server.broadcast().select(part_name(first)).schema
        return replace(handed_out, up=up)

    def build_client(self, context: ClientContext) -> Users:
        """Return the users of one process."""
        inputs = context.inputs
        config = inputs.config
        names = _names(inputs)
        stage = config.tiers.personal.tuning
        return Users(
            fedsp.METHOD.build_client(context),
            {id: [names[expert] for expert in inputs.members[id]] for id in context.ids},
            context.shards(lambda client: inputs.batches(client + 1, stage, "personal")),
            stage=stage,
            total_rounds=config.federation.rounds,
            proximal=config.tiers.personal.proximal,
        )


def _names(inputs: MethodInputs) -> list[str]:
    return [expert.name for expert in inputs.config.tiers.experts]


def _texts(
    inputs: MethodInputs, stage: StageConfig, purpose: str, *, domains: Iterable[int]
) -> dict[int, Batches]:
    """Return the text of some experts in batches, by their index.

    Args:
        inputs: of the experiment.
        stage: steps and sizes of the batches; without steps there is no text.
        purpose: of the stage, for the order.
        domains: indexes of the experts.
    """
    if not stage.steps:
        return {}
    return {index: inputs.domains[index].batches(0, stage, purpose) for index in domains}


def _teaching(inputs: MethodInputs, stage: StageConfig) -> Teaching:
    tiers = inputs.config.tiers
    return Teaching(stage, tiers.hidden_weight, tiers.temperature)


METHOD = PersonalLargeModels()
