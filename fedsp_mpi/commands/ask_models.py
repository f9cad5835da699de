"""Who answers a user of a run with tiers: its personal model, and experts on the global model.

The personal model is the auxiliary model with the user's prompt, as it is on the user's device; of
the states of all users only this user's is opened. The expert is the global model with the expert's
prompt. Either is loaded when it is asked for the first time.
"""

from __future__ import annotations

import math
import resource
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch

from fedsp_mpi.algorithms.plmm import mean_prompt, part_name
from fedsp_mpi.config import Config, load
from fedsp_mpi.config.tiers import GENERAL
from fedsp_mpi.data.examples import Example
from fedsp_mpi.data.tokens import token_ids
from fedsp_mpi.evaluation.scoring import loglikelihoods
from fedsp_mpi.files import fingerprint
from fedsp_mpi.models import auxiliary, backbone
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.models.prompts import Prompt
from fedsp_mpi.record import Checkpoints, Run, read
from fedsp_mpi.run.any_inputs import inputs_of
from fedsp_mpi.run.tier_inputs import DomainInputs, DomainText, TierInputs
from fedsp_mpi.tensors import NamedTensors, part_of_state

MAX_TOKENS = 24  # of an answer that is written freely


@dataclass(frozen=True)
class Answer:
    """What a model says.

    Attributes:
        tier: "personal", or "expert NAME".
        text: of the answer.
        confidence: probability of the choice among all choices; of an answer that is written
            freely, the geometric mean of its tokens' probabilities.
        first_token_seconds: from the question to the first token, or to the choice.
        seconds: to the end of the answer.
        num_tokens: of the answer.
        way_seconds: that question and answer took between two processes, with sealing and waiting.
    """

    tier: str
    text: str
    confidence: float
    first_token_seconds: float
    seconds: float
    num_tokens: int
    way_seconds: float | None = None


class Choice(NamedTuple):
    """The likeliest option of a question, by its place, and its probability among all options."""

    option: int
    confidence: float


@dataclass(frozen=True)
class Budget:
    """What a personal model costs on a device.

    Attributes:
        threads: cores that it used.
        model_bytes: of its weights.
        prompt_bytes: of the prompt.
        resident_bytes: most memory of the process, libraries among it, before any expert is loaded.
        token_seconds: of a token of a question that is read, median over questions.
    """

    threads: int
    model_bytes: int
    prompt_bytes: int
    resident_bytes: int
    token_seconds: float


class Experts(Protocol):
    """Experts and the general model, of this process or of another one."""

    def answer(self, text: str, expert: str) -> Answer:
        """Return an expert's answer to a text, which is a question of its domain."""
        ...

    def choose(self, tier: str, expert: str, examples: Sequence[Example]) -> list[Choice]:
        """Return what a tier chooses for each question.

        Args:
            tier: name of the expert, or "general".
            expert: whose domain the questions are of.
            examples: the questions; which options are right is not looked at.
        """
        ...


class Models:
    """The models of a run: that of all users, and that of the experts.

    Args:
        run: complete, with `method: plmm`.
        config: of the run.

    Attributes:
        folder: of the run.
        inputs: of the run.
    """

    def __init__(self, run: Run, config: Config) -> None:
        self.run = run
        self.folder = run.file.parent
        inputs = inputs_of(config)
        assert isinstance(inputs, TierInputs)
        self.inputs = inputs
        torch.set_num_threads(config.client.compute.threads or 1)

    @classmethod
    def of(cls, folder: str | Path) -> Models:
        """Read a complete run with tiers.

        Raises:
            ValueError: it is another run, it is not complete, or prompts were not kept.
        """
        run = read(folder)
        place = run.file.parent
        config = load(place / "config.yaml")
        if not config.method_facts.has_tiers:
            raise ValueError(
                f"{place}: found method={config.method}, expected a run with method=plmm"
            )
        if run.status != "complete":
            raise ValueError(
                f"{place}: found a run that is {run.status}, expected a complete one; go on with "
                "it by run --resume"
            )
        if run.committed_rounds not in run.prompt_rounds:
            raise ValueError(
                f"{place}: found no prompts of experts in the record, expected those of its last "
                "round; run with record.prompts=true"
            )
        return cls(run, config)

    @cached_property
    def personal(self) -> LanguageModel:
        """The auxiliary model, which users share.

        Raises:
            ValueError: its files are not what the run wrote.
        """
        with _intact():
            fingerprint.require_digests(self.folder / "auxiliary")
            model = auxiliary.load(self.folder / "auxiliary")
        model.train_weights(False)
        return model

    @cached_property
    def shared(self) -> LanguageModel:
        """The global model, which experts and the general prompt share."""
        return backbone.load_global(
            self.inputs.model_name,
            device=torch.device("cpu"),
            revision=self.inputs.config.model.revision,
        )

    def domain(self, expert: str) -> DomainInputs:
        """Return an expert's domain; raise ValueError if there is no such expert."""
        for domain in self.inputs.domains:
            if domain.name == expert:
                return domain
        names = ", ".join(domain.name for domain in self.inputs.domains)
        raise ValueError(f"found {expert!r}, expected one of the experts {names}")

    def exported(self, tier: str) -> NamedTensors:
        """Return an expert's prompt by its name, or the general one, as the last round left it."""
        prompts = NamedTensors.of(self.run.prompts(self.run.committed_rounds))
        return prompts.select(part_name(tier))

    def server_prompt(self, tier: str) -> Prompt:
        """Return the same, for the global model."""
        return self.prompt(self.exported(tier), depth=self.inputs.shape.num_layers)

    def prompt(self, values: NamedTensors, *, depth: int) -> Prompt:
        """Return a frozen prompt of these values, fp32 [*shape], for a model of some depth."""
        prompt = Prompt(self.inputs.prompt_spec.at_depth(depth))
        prompt.load(values.torch())
        return prompt.requires_grad_(False)


class LocalExperts:
    """Experts and the general model in this process; see `Experts`.

    Args:
        models: of the run.
    """

    def __init__(self, models: Models) -> None:
        self._models = models

    def answer(self, text: str, expert: str) -> Answer:
        """Return an expert's answer; raise ValueError if there is no such expert."""
        domain = self._models.domain(expert)
        prompt = self._models.server_prompt(expert)
        return _answer(f"expert {expert}", self._models.shared, prompt, text=text, domain=domain)

    def choose(self, tier: str, expert: str, examples: Sequence[Example]) -> list[Choice]:
        """Return what a tier chooses; see `Experts.choose`.

        Raises:
            ValueError: there is no such expert.
        """
        domain = self._models.domain(expert)
        if tier != GENERAL:
            self._models.domain(tier)
        prompt = self._models.server_prompt(tier)
        return _choices(self._models.shared, prompt, examples, domain=domain)


class Assistant:
    """A user's own model.

    Args:
        models: of the run.
        user: name.

    Raises:
        ValueError: the run has kept no personal prompts.
    """

    def __init__(self, models: Models, user: str) -> None:
        self.models = models
        self.inputs = models.inputs
        self.user = user
        self.client = self.inputs.config.federation.users.index(user)
        self.prompt = models.prompt(self._personal_tensors(), depth=models.inputs.depth)

    @cached_property
    def words(self) -> dict[str, DomainText]:
        """Text in whose words the user asks, by the names of its experts."""
        return self.inputs.words_of(self.client)

    def answer(self, text: str, domain: DomainText) -> Answer:
        """Return the personal model's answer.

        Args:
            text: the question, in the place of the domain's first column.
            domain: text in whose words it is asked.
        """
        return _answer("personal", self.models.personal, self.prompt, text=text, domain=domain)

    def choose(self, examples: Sequence[Example], domain: DomainText) -> list[Choice]:
        """Return what the personal model chooses for each question of a domain."""
        return _choices(self.models.personal, self.prompt, examples, domain=domain)

    def budget(self, num_questions: int = 20) -> Budget:
        """Measure what the personal model costs; call it before an expert is asked.

        Args:
            num_questions: of the user's own text, of which each is read by itself.
        """
        questions = self.inputs.own_text(self.client)[:num_questions]
        batch_tokens = self.inputs.config.evaluation.batch_tokens
        times = []
        for question in questions:
            start = time.perf_counter()
            loglikelihoods(self.models.personal, self.prompt, [question], batch_tokens=batch_tokens)
            num_tokens = sum(len(option.ids) - option.answer for option in question.options)
            num_tokens += question.options[0].answer
            times.append((time.perf_counter() - start) / num_tokens)
        weights = self.models.personal.weights.values()
        return Budget(
            threads=torch.get_num_threads(),
            model_bytes=sum(weight.numel() * weight.element_size() for weight in weights),
            prompt_bytes=4 * self.prompt.num_parameters(),
            resident_bytes=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            token_seconds=statistics.median(times),
        )

    def _personal_tensors(self) -> NamedTensors:
        """Read this user's own prompt, and no other user's."""
        folder = self.models.folder
        with _intact():
            kept_state = Checkpoints(folder).newest_client_state(self.client)
        if kept_state is None:
            raise ValueError(
                f"{folder}: found no personal prompt of user {self.user} in checkpoints/, "
                "expected the states of users; run with checkpoint.keep_client_states=true"
            )
        state = part_of_state(kept_state, "personal")
        if state:
            return NamedTensors.of(state)
        # Without steps of its own, a user has what its experts have.
        experts = self.inputs.config.tiers.experts
        names = [experts[index].name for index in self.inputs.members[self.client]]
        start = mean_prompt([self.models.exported(name) for name in names])
        return NamedTensors.pack(self.inputs.depth_map.down(start.torch()))


@contextmanager
def _intact() -> Iterator[None]:
    """Say what to do about a file of the run that is missing or damaged."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error}; copy the whole run folder again") from None


def _answer(
    tier: str, model: LanguageModel, prompt: Prompt, *, text: str, domain: DomainText
) -> Answer:
    """Answer a text: by a choice where all questions of the domain have the same, else freely."""
    example = domain.example_of(text)
    start = time.perf_counter()
    if domain.has_fixed_choices:
        [choice] = _choices(model, prompt, [example], domain=domain)
        seconds = time.perf_counter() - start
        [question] = domain.questions_of([example])
        num_tokens = question.options[choice.option].num_answers
        answer = example.choices[choice.option]
        return Answer(tier, answer, choice.confidence, seconds, seconds, num_tokens)
    [ids] = token_ids(domain.tokenizer, [example.context])
    tokens: list[int] = []
    logarithms: list[float] = []
    first = math.nan
    for token, probability in model.greedy_tokens(ids, prompt, MAX_TOKENS):
        if not tokens:
            first = time.perf_counter() - start
        tokens.append(token)
        logarithms.append(math.log(probability))
        if "\n" in domain.tokenizer.decode(tokens).strip(" "):
            break
    confidence = math.exp(float(np.mean(logarithms))) if logarithms else 0.0
    answer = domain.tokenizer.decode(tokens).strip()
    seconds = time.perf_counter() - start
    return Answer(tier, answer, confidence, first, seconds, len(tokens))


def _choices(
    model: LanguageModel, prompt: Prompt, examples: Sequence[Example], *, domain: DomainText
) -> list[Choice]:
    """Return the likeliest option of each question."""
    batch_tokens = domain.config.evaluation.batch_tokens
    questions = domain.questions_of(examples)
    scores = loglikelihoods(model, prompt, questions, batch_tokens=batch_tokens)
    assert scores is not None, "nothing tells it to stop"
    return [
        Choice(int(score.loglikelihood.argmax()), _probability(score.loglikelihood))
        for score in scores
    ]


def _probability(loglikelihood: np.ndarray) -> float:
    """Return the probability of the likeliest choice among all, of float64 [options]."""
    return float(np.exp(loglikelihood.max() - np.logaddexp.reduce(loglikelihood)))
