"""What a method is to the rest of the package: a server, clients, and what may travel between them.

A method's file defines two classes, one for each side, and at its end a subclass of `Method` that
builds them. It reads the configuration there and nowhere else. `config/methods.py` has a row for
each method: what must be known before torch is loaded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
from torch import nn

from fedsp_mpi.aggregation.fedavg import Updates
from fedsp_mpi.config import Config, StageConfig
from fedsp_mpi.data.instructions import InstructionTokens
from fedsp_mpi.data.tokens import Batches, Question, Text
from fedsp_mpi.log import RoundProgress
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.models.prompts import DepthMap, Prompt, PromptBatch, PromptSpec
from fedsp_mpi.record.tables import SERVER_COLUMNS
from fedsp_mpi.tensors import ClientError, NamedTensors, Schema, State, Update
from fedsp_mpi.training.device import Compute
from fedsp_mpi.training.loop import Trace
from fedsp_mpi.training.process_group import ServerGroup

if TYPE_CHECKING:
    from fedsp_mpi.models.families import PreTrainedConfig
    from fedsp_mpi.record.client_cache import StateHolder

Rule = Callable[[Updates], NamedTensors]
InferenceCall = Callable[[int, np.ndarray], np.ndarray]
Shard = TypeVar("Shard")


class ShardError(ClientError):
    """A client's text cannot be trained on."""


class ChoiceLosses(Protocol):
    """How wrong a model is under each of several prompts; see `ClientContext.choice_losses`."""

    def __call__(
        self,
        model: LanguageModel,
        prompts: PromptBatch,
        questions: Sequence[Question],
        *,
        batch_tokens: int,
    ) -> np.ndarray: ...


class Server(Protocol):
    """The server's side of a method: what the round calls, in the order in which it does.

    Attributes:
        model: the global model.
    """

    model: LanguageModel

    @property
    def prompt(self) -> Prompt | None:
        """The prompt in front of every text; None where the model itself is tuned."""

    @property
    def tunes(self) -> bool:
        """Whether the server has a step of its own in each round."""

    def broadcast(self) -> NamedTensors:
        """Return what clients start the round from."""

    def aggregate(self, updates: Updates) -> NamedTensors:
        """Return one set of tensors from those of all clients."""

    def load_aggregate(self, aggregate: NamedTensors) -> None:
        """Make the aggregate the server's own."""

    def server_update(self, round: int) -> Trace | None:
        """Tune on the global model; None, if there is no such step."""

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return what the server tunes."""

    def export(self) -> NamedTensors:
        """Return a copy of what the run is for: the prompt, or the model's weights."""

    def restore(self, exported: NamedTensors) -> None:
        """Copy in what `export` returned."""

    def state(self) -> State:
        """Return all that the next round depends on."""

    def load_state(self, state: State) -> None:
        """Continue from `state()`."""


class Client(Protocol):
    """The clients' side of a method: all clients of one process, which share one working model.

    Attributes:
        model: what the clients work on; None if the server runs their forward passes.
        prompt: what they tune while they work; None where the model itself is tuned.
    """

    @property
    def model(self) -> LanguageModel | None: ...

    @property
    def prompt(self) -> Prompt | None: ...

    @property
    def states(self) -> StateHolder:
        """What clients keep between rounds."""

    def local_update(self, client: int, round: int, broadcast: NamedTensors) -> Update:
        """Train one client on its own text, starting from the broadcast.

        Args:
            client: its id.
            round: from 1.
            broadcast: the server's tensors of this round.

        Raises:
            ClientError: the client cannot contribute to this round.
        """

    def hold(self, client: int, broadcast: NamedTensors) -> None:
        """Load what a client holds into `model` and `prompt`, to score it: nothing is trained.

        Args:
            client: its id.
            broadcast: the server's tensors; the client's own weights stay, where it has some.
        """


class TextClient(Client, Protocol):
    """Clients that train on examples, and can be given others than they began with."""

    def train_on(self, client: int, texts: Sequence[Text]) -> None:
        """Train a client on these texts from now on, at least one, in the place of its own."""


class WrappedClient:
    """Clients of any method, around whose local update a subclass does something.

    Args:
        client: does the work.
    """

    def __init__(self, client: Client) -> None:
        self._client = client

    @property
    def model(self) -> LanguageModel | None:
        """The model that the clients work on."""
        return self._client.model

    @property
    def prompt(self) -> Prompt | None:
        """The prompt that the clients tune."""
        return self._client.prompt

    @property
    def states(self) -> StateHolder:
        """What clients keep between rounds."""
        return self._client.states

    def hold(self, client: int, broadcast: NamedTensors) -> None:
        """Load what a client holds; see `Client.hold`."""
        self._client.hold(client, broadcast)


class MethodInputs(Protocol):
    """What a method may ask of the experiment's inputs (run/inputs.py)."""

    config: Config

    @property
    def model_config(self) -> PreTrainedConfig: ...

    @property
    def prompt_spec(self) -> PromptSpec: ...

    @property
    def depth_map(self) -> DepthMap: ...

    @property
    def server_questions(self) -> Sequence[Text]: ...

    @property
    def classes(self) -> tuple[str, ...]:
        """The choices that all examples have in common, in order."""

    @property
    def word_token_ids(self) -> np.ndarray:
        """Sorted ids of the tokens that are words, int64 [number]."""

    @property
    def instruction_tokens(self) -> InstructionTokens:
        """What turns phrases into the rows of token ids that instructions are."""

    @property
    def scores_choices(self) -> bool:
        """Whether instructions are scored by the choices of questions, not by the answers' loss."""

    @property
    def domains(self) -> Sequence[MethodInputs]:
        """The inputs of each expert's domain, whose server is the expert; none without tiers."""

    @property
    def members(self) -> Sequence[tuple[int, ...]]:
        """The experts of each client; none without tiers."""

    def first_prompt(self, model: LanguageModel) -> Prompt: ...

    def shard(self, owner: int) -> Sequence[Text]: ...

    def questions(self, owner: int) -> Sequence[Question]:
        """Return the texts of client `owner` - 1 as `ClientContext.choice_losses` takes them."""

    def batches(
        self,
        owner: int,
        stage: StageConfig,
        purpose: str,
        *,
        texts: Sequence[Text] | None = None,
        group: ServerGroup = ...,
    ) -> Batches:
        """Return the batches of one owner's stage; see `run.inputs.ExperimentInputs.batches`."""


@dataclass(frozen=True)
class ServerContext:
    """What a method's server is built from.

    Attributes:
        inputs: configuration, data and first prompt.
        model: the global model, on the device.
        compute: the server's device and dtype.
        group: the ranks that are the server together.
        rule: makes one update of many.
        client_model: the model that clients get, for a server that learns from it; None for the
            server-only control and on the server's other ranks.
        progress: is told of every step of the server's tuning, and shows lines.
        reads_text: whether this rank may read the server's text; without it, another rank tunes.
    """

    inputs: MethodInputs
    model: LanguageModel
    compute: Compute
    group: ServerGroup
    rule: Rule
    client_model: LanguageModel | None = None
    progress: RoundProgress = field(default_factory=RoundProgress)
    reads_text: bool = True

    def batches(self) -> Batches | None:
        """Return the server's training batches; None if it does not tune, or not here."""
        stage = self.inputs.config.server.tuning
        if not stage.steps or not self.reads_text:
            return None
        return self.inputs.batches(0, stage, "server", group=self.group)


@dataclass(frozen=True)
class ClientContext:
    """What a method's clients in one process are built from.

    Attributes:
        inputs: configuration and the clients' own text.
        compute: the clients' device and dtype.
        ids: of the clients in this process.
        tensors: those of the hand-out.
        depth: layers of the clients' model.
        build_model: builds the clients' model without weights; True: with dropout.
        call_server: asks the server for losses, where clients hold no model.
        choice_losses: returns, under a model and each of several prompts, the cross entropy of
            the right choice of each question, fp64 [prompts, questions], in nats; a forward pass
            takes at most `batch_tokens` tokens.
        progress: is told of every step.
    """

    inputs: MethodInputs
    compute: Compute
    ids: Sequence[int]
    tensors: NamedTensors
    depth: int
    build_model: Callable[[bool], LanguageModel]
    call_server: InferenceCall
    choice_losses: ChoiceLosses
    progress: RoundProgress

    def shards(self, read: Callable[[int], Shard]) -> dict[int, Shard | ShardError]:
        """Return each client's text, or why it cannot be used.

        One owner's unusable text is no reason to stop the others.

        Args:
            read: returns a client's text by its id; raises ValueError.
        """
        shards: dict[int, Shard | ShardError] = {}
        for client in self.ids:
            try:
                shards[client] = read(client)
            except ValueError as error:
                shards[client] = ShardError(f"its text cannot be used: {error}")
        return shards


@dataclass(frozen=True)
class HandedOut:
    """What a method hands out once, before the first round.

    Attributes:
        model_config: transformers' configuration of the clients' model.
        tensors: what clients get at the start.
        down, up: names and shapes of a broadcast and of an update.
        finite: names of the metrics that the server merges by, which must be finite.
        num_inference_ranks: server ranks that run forward passes for clients; 0 if clients hold the
            model.
    """

    model_config: PreTrainedConfig
    tensors: NamedTensors
    down: Schema
    up: Schema
    finite: tuple[str, ...] = ()
    num_inference_ranks: int = 0


@dataclass(frozen=True)
class TierAbove:
    """A round whose clients are parts of a method's server.

    Attributes:
        server: of that round, which rank 0 plays.
        client: all its clients.
        rank_of: the server's rank that plays each client, by id; ids follow those of the run's
            clients.
        metrics: names of the numbers that come with their updates.
    """

    server: Server
    client: Client
    rank_of: Mapping[int, int]
    metrics: tuple[str, ...]


class Method(ABC):
    """Builds the two sides of one method, and says what travels between them.

    Attributes:
        metrics: names of the numbers that come with an update; each is a column of the record's
            table of clients, and none is one that the server writes (`require_metrics`).
    """

    metrics: tuple[str, ...]

    @abstractmethod
    def build_server(self, context: ServerContext) -> Server:
        """Return a server around a global model."""

    @abstractmethod
    def hand_out(
        self, inputs: MethodInputs, server: Server, client_model: LanguageModel
    ) -> HandedOut:
        """Return what every client gets before the first round.

        Args:
            inputs: of the experiment.
            server: as `build_server` returned it.
            client_model: the model that clients get.
        """

    @abstractmethod
    def build_client(self, context: ClientContext) -> Client:
        """Return the clients of one process."""

    def answer(self, server: Server) -> Callable[[np.ndarray], np.ndarray] | None:
        """Return what answers clients that hold no model, from fp32 [any number] to the same.

        None if every client holds a model.
        """
        return None

    def tier_above(self, inputs: MethodInputs, server: Server) -> TierAbove | None:
        """Return the round that belongs to the server's part of each round; None without tiers.

        Args:
            inputs: of the experiment.
            server: as `build_server` returned it.
        """
        return None

    def words(self, inputs: MethodInputs, exported: NamedTensors) -> str | None:
        """Return what the server exported as text, where it is words; else None.

        Args:
            inputs: of the experiment.
            exported: as `Server.export` returns it.
        """
        return None


def require_metrics(method: str, metrics: Sequence[str]) -> None:
    """Check that the metrics of a method can be columns of the record's table of clients.

    Args:
        method: its name, for the error.
        metrics: their names.

    Raises:
        ValueError: the server writes such a column itself, or two metrics have one name.
    """
    for position, name in enumerate(metrics):
        if name in SERVER_COLUMNS:
            raise ValueError(
                f"method {method}: found a metric {name!r}, which is a column that the server "
                f"writes, expected none of {', '.join(SERVER_COLUMNS)}; give it another name"
            )
        if name in metrics[:position]:
            raise ValueError(
                f"method {method}: found two metrics {name!r}, expected each name once; give one "
                "of them another name"
            )
