"""Prompts in words, searched for without gradients: the server edits, clients score.

An instruction is a row of phrases out of a pool, to which the global model may add phrases that it
writes itself. In each round the server proposes edits of the best instructions so far (append,
prepend, replace, delete, swap), which is GrIPS (Prasad et al., 2023, arXiv 2203.07281) with its
score taken where the text is: token ids of instructions go down, and a score of each comes up.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from fedsp_mpi import rng
from fedsp_mpi.aggregation.fedavg import Updates
from fedsp_mpi.algorithms.base import (
    ChoiceLosses,
    Client,
    ClientContext,
    HandedOut,
    Method,
    MethodInputs,
    Rule,
    Server,
    ServerContext,
    ShardError,
)
from fedsp_mpi.algorithms.client_state import StatelessClients
from fedsp_mpi.algorithms.inference import LocalInference
from fedsp_mpi.config import InstructionsConfig
from fedsp_mpi.data.instructions import InstructionTokens, tokens_of
from fedsp_mpi.data.tokens import Question, Text
from fedsp_mpi.log import RoundProgress
from fedsp_mpi.models import auxiliary
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.models.prompts import Prompt, PromptSpec
from fedsp_mpi.tensors import NamedTensors, Schema, State, TensorSpec, Update
from fedsp_mpi.training.device import oom_as_client_error
from fedsp_mpi.training.loop import NonFiniteError

Instruction = tuple[int, ...]  # phrases by their place in the pool

NO_PHRASE: Instruction = ()  # the task's own words
_EDITS = ("append", "prepend", "replace", "delete", "swap")
_TRIES = 50  # edits that are drawn for each one that is wanted
_NONE = -1  # behind the phrases of an instruction in a checkpoint
_REWORD = "Instruction: {}\nThe same instruction in other words:"


# -- edits -----------------------------------------------------------------------------------------


def edited(instruction: Instruction, num_phrases: int, random: np.random.Generator) -> Instruction:
    """Return an instruction after one random edit, which may leave it as it is.

    Args:
        instruction: to edit; without a phrase, one is appended.
        num_phrases: of the pool.
        random: draws the edit, its phrase and its place.
    """
    edit = _EDITS[random.integers(len(_EDITS))]
    phrase = int(random.integers(num_phrases))
    if edit == "append" or not instruction:
        return (*instruction, phrase)
    if edit == "prepend":
        return (phrase, *instruction)
    place = int(random.integers(len(instruction)))
    if edit == "replace":
        return (*instruction[:place], phrase, *instruction[place + 1 :])
    if edit == "delete":
        return (*instruction[:place], *instruction[place + 1 :])
    other_place = int(random.integers(len(instruction)))
    phrases = list(instruction)
    phrases[place] = instruction[other_place]
    phrases[other_place] = instruction[place]
    return tuple(phrases)


@dataclass(frozen=True)
class Search:
    """What is known after some rounds.

    Attributes:
        round: that is complete; 0 before the first.
        pool: phrases.
        beam: the best instructions, the best first.
        scores: of these, fp64 [beam], lower is better; nan before the first round.
        tried: all instructions that clients have scored, in the order of the rounds.
    """

    round: int
    pool: tuple[str, ...]
    beam: tuple[Instruction, ...]
    scores: np.ndarray
    tried: tuple[Instruction, ...]

    @classmethod
    def start(cls, pool: Sequence[str]) -> Search:
        """Begin with the task's own words."""
        return cls(0, tuple(pool), (NO_PHRASE,), np.array([np.nan]), (NO_PHRASE,))

    def phrases(self, instruction: Instruction) -> list[str]:
        """Return the phrases of an instruction."""
        return [self.pool[phrase] for phrase in instruction]

    def after(self, candidates: Sequence[Instruction], scores: np.ndarray, beam: int) -> Search:
        """Return what is known after one more round; of equal scores the first is better.

        Args:
            candidates: that were scored, the beam first.
            scores: of these, [candidates].
            beam: instructions that are kept.
        """
        order = np.argsort(scores, kind="stable")[:beam]
        return replace(
            self,
            round=self.round + 1,
            beam=tuple(candidates[place] for place in order),
            scores=scores[order].astype(np.float64),
            tried=tuple(dict.fromkeys((*self.tried, *candidates))),
        )

    def state(self) -> State:
        """Return all of it as a checkpoint stores it: the pool as the bytes of JSON, int64."""
        pool_text = json.dumps(self.pool).encode()
        return {
            "round": np.array(self.round),
            "pool": np.frombuffer(pool_text, dtype=np.uint8).astype(np.int64),
            "beam": _padded(self.beam),
            "scores": self.scores,
            "tried": _padded(self.tried),
        }

    @classmethod
    def of(cls, state: State) -> Search:
        """Read what `state()` returned, which is copied."""
        return cls(
            int(state["round"]),
            tuple(json.loads(state["pool"].astype(np.uint8).tobytes())),
            _without_padding(state["beam"]),
            state["scores"].copy(),
            _without_padding(state["tried"]),
        )


def _padded(instructions: Sequence[Instruction]) -> np.ndarray:
    """Return instructions as int64 [instructions, phrases of the longest and one more]."""
    length = 1 + max(len(instruction) for instruction in instructions)
    rows = np.full((len(instructions), length), _NONE, dtype=np.int64)
    for row, instruction in zip(rows, instructions):
        row[: len(instruction)] = instruction
    return rows


def _without_padding(rows: np.ndarray) -> tuple[Instruction, ...]:
    """Return the instructions of rows [instructions, phrases] that `_padded` made."""
    return tuple(tuple(phrase for phrase in row if phrase != _NONE) for row in rows.tolist())


def proposals(
    search: Search,
    num: int,
    seed: int,
    *,
    fits: Callable[[Sequence[str]], bool],
    first: Sequence[Instruction] = (),
) -> list[Instruction]:
    """Return new edits of the best instructions; they follow from the search and the seed.

    No phrase is twice in one, and none has been tried before. There may be fewer than `num` where
    the pool is small.

    Args:
        search: so far.
        num: of edits that are wanted.
        seed: of the run.
        fits: returns whether phrases are not too long together.
        first: edits that come before those that are drawn.
    """
    random = rng.generator(seed, "proposals", search.round + 1)
    seen = set(search.tried)
    edits: list[Instruction] = []

    def add(edit: Instruction) -> None:
        is_new = edit not in seen and len(set(edit)) == len(edit)
        if is_new and len(edits) < num and fits(search.phrases(edit)):
            seen.add(edit)
            edits.append(edit)

    for edit in first:
        add(edit)
    for _ in range(_TRIES * num):
        if len(edits) == num:
            break
        parent = search.beam[random.integers(len(search.beam))]
        add(edited(parent, len(search.pool), random))
    return edits


# -- in front of a text ----------------------------------------------------------------------------


def input_prompt(model: LanguageModel, spec: PromptSpec, row: np.ndarray) -> Prompt:
    """Return an instruction as what its tokens are embedded as, an input prompt of as many tokens.

    Args:
        model: that embeds them.
        spec: of the longest instruction.
        row: of `InstructionTokens`, [tokens of the longest].
    """
    ids = tokens_of(row)
    prompt = Prompt(replace(spec, num_tokens=len(ids))).to(model.device)
    prompt.load({"prompt": model.embeddings(torch.from_numpy(ids))})
    return prompt.requires_grad_(False)


# -- the server ------------------------------------------------------------------------------------


class InstructionServer:
    """Proposes instructions, and keeps those with the best mean scores.

    Args:
        model: the frozen global model, which embeds instructions and writes paraphrases.
        spec: of an input prompt of as many tokens as a row of `tokens`.
        tokens: turns phrases into rows of token ids.
        settings: of the search.
        seed: of the run.
        rule: makes one set of scores of many.
        progress: shows a line for each round.
    """

    def __init__(
        self,
        model: LanguageModel,
        spec: PromptSpec,
        tokens: InstructionTokens,
        *,
        settings: InstructionsConfig,
        seed: int,
        rule: Rule,
        progress: RoundProgress | None = None,
    ) -> None:
        self.model = model
        self._spec = spec
        self._tokens = tokens
        self._settings = settings
        self._seed = seed
        self._rule = rule
        self._progress = progress or RoundProgress()
        self._search = Search.start(settings.pool)
        self._proposed: tuple[Search, list[Instruction]] | None = None
        # The row of the best instruction: a parameter, in which the server's other ranks get it.
        row = torch.empty(spec.num_tokens, device=model.device)
        self._row = nn.Parameter(row, requires_grad=False)
        self._show_best()

    @property
    def prompt(self) -> Prompt:
        """The best instruction as an input prompt; without a phrase it has no token."""
        return input_prompt(self.model, self._spec, self._row.cpu().numpy())

    @property
    def tunes(self) -> bool:
        """False: the server proposes, and clients score."""
        return False

    def broadcast(self) -> NamedTensors:
        """Return the candidates' rows of token ids, fp32 [candidates, tokens of the longest].

        The best so far come first. Where there are fewer candidates than rows, the very best fills
        the rest.
        """
        search, candidates = self._candidates()
        num_rows = self._settings.candidates
        rows = [self._tokens.row(search.phrases(candidate)) for candidate in candidates]
        rows += [rows[0]] * (num_rows - len(rows))
        return NamedTensors.of({"instructions": np.stack(rows)})

    def aggregate(self, updates: Updates) -> NamedTensors:
        """Return one score of each candidate, fp32 [candidates], by the rule."""
        return self._rule(updates)

    def load_aggregate(self, aggregate: NamedTensors) -> None:
        """Keep the best of the candidates by their scores, and show the very best."""
        search, candidates = self._candidates()
        scores = aggregate["scores"][: len(candidates)]
        self._search = search.after(candidates, scores, self._settings.beam)
        self._proposed = None
        self._show_best()
        best = self._search.phrases(self._search.beam[0])
        words = json.dumps(" ".join(best), ensure_ascii=False) if best else "the task's own words"
        self._progress.say(
            f"round {self._search.round}: best instruction, {self._search.scores[0]:.4f} nats: "
            f"{words}"
        )

    def server_update(self, round: int) -> None:
        """Do nothing: the server does not tune."""

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return the row of the best instruction's token ids."""
        return [self._row]

    def export(self) -> NamedTensors:
        """Return the best instruction's token ids, `tokens` [tokens of the longest]."""
        return NamedTensors.of({"tokens": self._row.cpu().numpy()})

    def restore(self, exported: NamedTensors) -> None:
        """Copy in what `export` returned; the search stays where it is."""
        self._row.data.copy_(exported.torch()["tokens"])

    def state(self) -> State:
        """Return all that the next round depends on."""
        return self._search.state()

    def load_state(self, state: State) -> None:
        """Continue from `state()`, which is copied."""
        self._search = Search.of(state)
        self._proposed = None
        self._show_best()

    def _candidates(self) -> tuple[Search, list[Instruction]]:
        """Return the search with the pool of the next round, and that round's candidates.

        They are worked out once. Until scores come, the search itself stays as it is, so that a
        checkpoint in between leads to the same candidates.
        """
        if self._proposed is None:
            search = self._search
            reworded: list[Instruction] = []
            if self._settings.paraphrases:
                search, reworded = self._reworded(search)
            edits = proposals(
                search,
                self._settings.candidates - len(search.beam),
                self._seed,
                fits=self._tokens.fits,
                first=reworded,
            )
            self._proposed = (search, [*search.beam, *edits])
        return self._proposed

    def _reworded(self, search: Search) -> tuple[Search, list[Instruction]]:
        """Have the global model reword one phrase of the best instruction.

        Returns:
            The search with what is new in its pool, and the best instruction with each of these in
            the phrase's place. Without a phrase to reword, it is one of the pool, and stays alone.
        """
        best = search.beam[0]
        random = rng.generator(self._seed, "paraphrases", search.round + 1)
        place = int(random.integers(len(best) or len(search.pool)))
        phrase = search.pool[best[place] if best else place]
        context = self._tokens.context(_REWORD.format(phrase))
        num_paraphrases = self._settings.paraphrases
        rows = self.model.continuations(context, num_paraphrases, self._tokens.num_tokens)
        lines = dict.fromkeys(self._tokens.first_line(row) for row in rows)
        new_phrases = [
            line for line in lines if line and line not in search.pool and self._tokens.fits([line])
        ]
        first_new = len(search.pool)
        search = replace(search, pool=(*search.pool, *new_phrases))
        instructions = [
            (*best[:place], first_new + number, *best[place + 1 :])
            if best
            else (first_new + number,)
            for number in range(len(new_phrases))
        ]
        return search, instructions

    def _show_best(self) -> None:
        """Make the best instruction that of the prompt."""
        best = self._search.phrases(self._search.beam[0])
        self._row.data.copy_(torch.from_numpy(self._tokens.row(best)))


# -- the clients -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Examples:
    """What a client scores instructions by.

    Attributes:
        texts: with their answers.
        questions: the same with all choices; none where the loss of the answers counts.
    """

    texts: Sequence[Text]
    questions: Sequence[Question] = ()


class InstructionClient:
    """All clients of one process, which score instructions and keep nothing between rounds.

    Args:
        model: frozen.
        spec: of an input prompt of as many tokens as a row has.
        shards: of each client what it scores by, or why it cannot be used.
        choice_losses: returns the cross entropy of the right choice of each question.
        batch_tokens: most tokens of a forward pass.

    Attributes:
        model: that runs the forward passes.
        prompt: the instruction that the last client found best.
        states: empty.
    """

    def __init__(
        self,
        model: LanguageModel,
        spec: PromptSpec,
        shards: Mapping[int, Examples | ShardError],
        *,
        choice_losses: ChoiceLosses,
        batch_tokens: int,
    ) -> None:
        self.model = model
        self.prompt = Prompt(replace(spec, num_tokens=0))
        self._spec = spec
        self._shards = shards
        self._choice_losses = choice_losses
        self._batch_tokens = batch_tokens
        self.states = StatelessClients()

    def local_update(self, client: int, round: int, broadcast: NamedTensors) -> Update:
        """Score the round's instructions on one client's text; see `Client.local_update`.

        Raises:
            ClientError: NonFiniteError if a score is not finite, OutOfMemoryError, ShardError.
        """
        start = time.perf_counter()
        shard = self._shards[client]
        if isinstance(shard, ShardError):
            raise shard
        rows = broadcast["instructions"]
        distinct_rows, inverse = np.unique(rows, axis=0, return_inverse=True)
        scores = self._scores(client, distinct_rows, shard)[inverse.ravel()]
        if not np.isfinite(scores).all():
            wrong = int(np.flatnonzero(~np.isfinite(scores))[0])
            raise NonFiniteError(
                f"the score of instruction {wrong + 1} is {scores[wrong]}, expected a finite number"
            )
        self.prompt = input_prompt(self.model, self._spec, rows[scores.argmin()])
        metrics = {
            "loss_prompt_first": float(scores[0]),
            "loss_prompt_last": float(scores.min()),
            "seconds_prompt": time.perf_counter() - start,
        }
        tensors = NamedTensors.of({"scores": scores})
        return Update(client, float(len(shard.texts)), tensors, metrics)

    def hold(self, client: int, broadcast: NamedTensors) -> None:
        """Set the prompt to the best instruction of the broadcast; see `base.Client.hold`."""
        self.prompt = input_prompt(self.model, self._spec, broadcast["instructions"][0])

    def _scores(self, client: int, rows: np.ndarray, shard: Examples) -> np.ndarray:
        """Return the mean loss under each instruction, fp64; those of one length share passes.

        Args:
            client: whose text it is.
            rows: of the instructions, [instructions, tokens of the longest].
            shard: what they are scored by.
        """
        scores = np.empty(len(rows))
        ids_of_rows = [tokens_of(row) for row in rows]
        num_tokens = np.array([len(ids) for ids in ids_of_rows])
        for length in np.unique(num_tokens):
            places = np.flatnonzero(num_tokens == length)
            ids = np.stack([ids_of_rows[place] for place in places])
            inference = LocalInference(
                self.model,
                Prompt(replace(self._spec, num_tokens=int(length))),
                lambda points: self.model.embeddings(torch.from_numpy(points)),
                batch_tokens=self._batch_tokens,
            )
            if not shard.questions:
                [losses] = inference.losses(client, ids, [shard.texts])
            else:
                with oom_as_client_error():
                    losses = self._choice_losses(
                        self.model,
                        inference.prompts(ids),
                        shard.questions,
                        batch_tokens=self._batch_tokens,
                    )
            scores[places] = losses.mean(axis=1)
        return scores


# -- the method ------------------------------------------------------------------------------------


class PromptSearch(Method):
    """Token ids of instructions go down, and scores come up; clients hold the auxiliary model."""

    metrics = ("loss_prompt_first", "loss_prompt_last", "seconds_prompt")

    def build_server(self, context: ServerContext) -> Server:
        """Return the server's search, which begins with the task's own words."""
        inputs = context.inputs
        return InstructionServer(
            context.model,
            inputs.prompt_spec,
            inputs.instruction_tokens,
            settings=inputs.config.instructions,
            seed=inputs.config.run.seed,
            rule=context.rule,
            progress=context.progress,
        )

    def hand_out(
        self, inputs: MethodInputs, server: Server, client_model: LanguageModel
    ) -> HandedOut:
        """Return the auxiliary model alone; see `Method.hand_out`."""
        settings = inputs.config.instructions
        num_rows = settings.candidates
        return HandedOut(
            model_config=auxiliary.cell_config(inputs.model_config, inputs.config.auxiliary),
            tensors=NamedTensors.join({"auxiliary/": auxiliary.pack(client_model)}),
            down=Schema([TensorSpec("instructions", (num_rows, inputs.prompt_spec.num_tokens))]),
            up=Schema([TensorSpec("scores", (num_rows,))]),
        )

    def build_client(self, context: ClientContext) -> Client:
        """Return the clients of one process."""
        inputs = context.inputs
        settings = inputs.config.instructions
        model = context.build_model(False)
        auxiliary.load_weights(model, context.tensors.select("auxiliary/").torch())
        model.train_weights(False)
        return InstructionClient(
            model.round_weights(),
            inputs.prompt_spec,
            context.shards(lambda client: _examples(inputs, client)),
            choice_losses=context.choice_losses,
            batch_tokens=settings.batch_tokens,
        )

    def words(self, inputs: MethodInputs, exported: NamedTensors) -> str | None:
        """Return the words of the instruction that the server exported."""
        return inputs.instruction_tokens.words(exported["tokens"])


def _examples(inputs: MethodInputs, client: int) -> Examples:
    """Return what a client scores by.

    Raises:
        ValueError: it has no example.
    """
    texts = inputs.shard(client + 1)
    if not texts:
        raise ValueError("found no example to score by, expected at least one")
    return Examples(texts, inputs.questions(client + 1) if inputs.scores_choices else ())


METHOD = PromptSearch()
