"""Answer a user of a run with tiers: by its own prompt at once, by an expert where that is unsure.

The personal model is the auxiliary model with the user's prompt, as it is on the user's device; of
the states of all users only this user's is opened. The expert is the global model with the expert's
prompt. It is loaded when it is asked for the first time; here one process plays both.
"""

from __future__ import annotations

import math
import resource
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from fedsp_mpi.algorithms.plmm import mean_prompt, part_name
from fedsp_mpi.config import Config, load
from fedsp_mpi.config.parsing import nearest
from fedsp_mpi.config.tiers import GENERAL
from fedsp_mpi.data.tokens import Question, token_ids
from fedsp_mpi.evaluation.scoring import loglikelihoods
from fedsp_mpi.log import Log
from fedsp_mpi.models import auxiliary, backbone
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.models.prompts import Prompt
from fedsp_mpi.record import Checkpoints, Run, read
from fedsp_mpi.report.formatting import as_bytes, as_percent, markdown_table
from fedsp_mpi.run.any_inputs import inputs_of
from fedsp_mpi.run.tier_inputs import DomainInputs, TierInputs
from fedsp_mpi.tensors import NamedTensors, part_of_state

_HEAD = (
    "user",
    "n",
    "personal %",
    "expert %",
    "general %",
    "routed %",
    "with routing %",
    "gain",
)
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
    """

    tier: str
    text: str
    confidence: float
    first_token_seconds: float
    seconds: float
    num_tokens: int


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


@dataclass(frozen=True)
class Routing:
    """What routing brings one user on its held-out text.

    Attributes:
        user: its name.
        correct: bool [questions]: whether the personal model is right.
        expert_correct, general_correct: the same of the expert and the general model.
        confidence: of the personal model, fractions [questions].
    """

    user: str
    correct: np.ndarray
    expert_correct: np.ndarray
    general_correct: np.ndarray
    confidence: np.ndarray


class Models:
    """The models of a run: that of all users, and that of the experts.

    Args:
        run: complete, with `method: plmm`.
        config: of the run.

    Attributes:
        folder: of the run.
        inputs: of the run.
        personal: the auxiliary model.
    """

    def __init__(self, run: Run, config: Config) -> None:
        self.run = run
        self.folder = run.file.parent
        inputs = inputs_of(config)
        assert isinstance(inputs, TierInputs)
        self.inputs = inputs
        torch.set_num_threads(config.client.compute.threads or 1)
        self.personal = auxiliary.load(self.folder / "auxiliary")
        self.personal.train_weights(False)

    @cached_property
    def shared(self) -> LanguageModel:
        """The global model, which experts and the general prompt share."""
        return backbone.load_global(
            self.inputs.model_name,
            device=torch.device("cpu"),
            revision=self.inputs.config.model.revision,
        )

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


class Assistant:
    """A user's own model, and the experts behind it.

    Args:
        models: of the run.
        user: name.

    Raises:
        ValueError: the run has kept no personal prompts.
    """

    def __init__(self, models: Models, user: str) -> None:
        config = models.inputs.config
        self.models = models
        self.inputs = models.inputs
        self.user = user
        self.client = config.federation.users.index(user)
        self.batch_tokens = config.evaluation.batch_tokens
        self.prompt = models.prompt(self._personal_tensors(), depth=models.inputs.depth)

    @property
    def domains(self) -> list[DomainInputs]:
        """The domains that the user belongs to."""
        return [self.inputs.domains[expert] for expert in self.inputs.members[self.client]]

    def ask(self, text: str, domain: DomainInputs, threshold: float) -> list[Answer]:
        """Return the personal model's answer and, if it is unsure, the expert's behind it.

        Args:
            text: the question, in the place of the domain's first column.
            domain: whose task it is.
            threshold: of confidence.
        """
        answers = [
            self._answer("personal", self.models.personal, self.prompt, text=text, domain=domain)
        ]
        if answers[0].confidence < threshold:
            prompt = self.models.server_prompt(domain.name)
            tier = f"expert {domain.name}"
            answers.append(self._answer(tier, self.models.shared, prompt, text=text, domain=domain))
        return answers

    def budget(self, num_questions: int = 20) -> Budget:
        """Measure what the personal model costs; call it before an expert is asked.

        Args:
            num_questions: of the user's own text, of which each is read by itself.
        """
        questions = self.inputs.own_text(self.client)[:num_questions]
        times = []
        for question in questions:
            start = time.perf_counter()
            loglikelihoods(self.models.personal, self.prompt, [question], self.batch_tokens)
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

    def routing(self) -> Routing:
        """Answer the user's held-out questions with every tier."""
        correct: list[bool] = []
        expert_correct: list[bool] = []
        general_correct: list[bool] = []
        confidences: list[float] = []
        general = self.models.server_prompt(GENERAL)
        for index in self.inputs.members[self.client]:
            questions = self.inputs.own_text(self.client, index)
            if not questions:
                continue
            expert = self.models.server_prompt(self.inputs.domains[index].name)
            of_user = self._choices(self.models.personal, self.prompt, questions)
            of_expert = self._choices(self.models.shared, expert, questions)
            of_general = self._choices(self.models.shared, general, questions)
            correct += [is_right for is_right, _ in of_user]
            confidences += [confidence for _, confidence in of_user]
            expert_correct += [is_right for is_right, _ in of_expert]
            general_correct += [is_right for is_right, _ in of_general]
        return Routing(
            self.user,
            np.array(correct),
            np.array(expert_correct),
            np.array(general_correct),
            np.array(confidences),
        )

    def _choices(
        self, model: LanguageModel, prompt: Prompt, questions: Sequence[Question]
    ) -> list[tuple[bool, float]]:
        """Return of each question whether the likeliest choice is right, and its probability."""
        scores = loglikelihoods(model, prompt, questions, self.batch_tokens)
        assert scores is not None, "nothing tells it to stop"
        choices = []
        for question, option_scores in zip(questions, scores, strict=True):
            best = int(option_scores.loglikelihood.argmax())
            choices.append((best in question.gold, _probability(option_scores.loglikelihood)))
        return choices

    def _answer(
        self,
        tier: str,
        model: LanguageModel,
        prompt: Prompt,
        *,
        text: str,
        domain: DomainInputs,
    ) -> Answer:
        example = domain.example_of(text)
        start = time.perf_counter()
        if domain.has_fixed_choices:
            [question] = domain.questions_of([example])
            scores = loglikelihoods(model, prompt, [question], self.batch_tokens)
            assert scores is not None, "nothing tells it to stop"
            seconds = time.perf_counter() - start
            best = int(scores[0].loglikelihood.argmax())
            num_tokens = question.options[best].num_answers
            confidence = _probability(scores[0].loglikelihood)
            return Answer(tier, example.choices[best], confidence, seconds, seconds, num_tokens)
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

    def _personal_tensors(self) -> NamedTensors:
        """Read this user's own prompt, and no other user's."""
        folder = self.models.folder
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
        start = mean_prompt([self.models.exported(domain.name) for domain in self.domains])
        return NamedTensors.pack(self.inputs.depth_map.down(start.torch()))


def _probability(loglikelihood: np.ndarray) -> float:
    """Return the probability of the likeliest choice among all, of float64 [options]."""
    return float(np.exp(loglikelihood.max() - np.logaddexp.reduce(loglikelihood)))


# -- the verb --------------------------------------------------------------------------------------


def open_run(folder: str | Path) -> tuple[Run, Config]:
    """Read a complete run with tiers, and its configuration.

    Raises:
        ValueError: it is another run, it is not complete, or prompts were not kept.
    """
    run = read(folder)
    place = run.file.parent
    config = load(place / "config.yaml")
    if not config.method_facts.has_tiers:
        raise ValueError(f"{place}: found method={config.method}, expected a run with method=plmm")
    if run.status != "complete":
        raise ValueError(
            f"{place}: found a run that is {run.status}, expected a complete one; go on with it by "
            "run --resume"
        )
    if run.committed_rounds not in run.prompt_rounds:
        raise ValueError(
            f"{place}: found no prompts of experts in the record, expected those of its last "
            "round; run with record.prompts=true"
        )
    return run, config


def require_user(config: Config, name: str | None) -> str:
    """Return a user's name; raise ValueError if there is no such user, or none is named."""
    users = config.federation.users
    if name in users:
        return str(name)
    near = nearest(name, users) if name else None
    hint = f"; did you mean {near!r}?" if near else ""
    found_name = repr(name) if name else "none"
    raise ValueError(f"--user: found {found_name}, expected one of {', '.join(users)}{hint}")


def ask(
    folder: str | Path,
    user: str | None,
    text: str,
    *,
    expert: str | None,
    threshold: float,
) -> list[str]:
    """Answer a user's question; return what to show, in a line each.

    Args:
        folder: of a complete run with tiers.
        user: name.
        text: the question.
        expert: whose domain it is of; None: the user's first one.
        threshold: of the personal model's confidence, below which the expert is asked.

    Raises:
        ValueError: there is no such run, user or expert of the user.
    """
    run, config = open_run(folder)
    assistant = Assistant(Models(run, config), require_user(config, user))
    by_name = {domain.name: domain for domain in assistant.domains}
    if expert is not None and expert not in by_name:
        raise ValueError(
            f"--expert: found {expert!r}, expected one of {assistant.user}'s: {', '.join(by_name)}"
        )
    domain = by_name[expert] if expert is not None else assistant.domains[0]
    answers = assistant.ask(text, domain, threshold)
    lines = []
    for answer in answers:
        lines.append(
            f"{answer.tier}: {answer.text}  (confidence {answer.confidence:.2f}, first token after "
            f"{1000 * answer.first_token_seconds:.0f} ms, {answer.num_tokens} tokens in "
            f"{1000 * answer.seconds:.0f} ms)"
        )
    if len(answers) > 1:
        lines.insert(1, f"below the threshold of {threshold:g}: asks expert {domain.name}")
    return [*lines, f"answered by {answers[-1].tier}"]


def evaluate(folder: str | Path, user: str | None, *, threshold: float, log: Log) -> list[str]:
    """Measure routing on users' held-out text; return a Markdown table and what it says.

    Args:
        folder: of a complete run with tiers.
        user: name; None: all users, as only the owner of all of them can.
        threshold: of the personal model's confidence, below which the expert is asked.
        log: is told of each user.

    Raises:
        ValueError: there is no such run or user.
    """
    run, config = open_run(folder)
    users = config.federation.users if user is None else (require_user(config, user),)
    models = Models(run, config)
    budget = Assistant(models, users[0]).budget()
    routings: list[Routing] = []
    for name in users:
        routings.append(Assistant(models, name).routing())
        log.say(f"{name}: {len(routings[-1].correct)} questions")
    body = [_routing_row(routing, threshold) for routing in routings]
    if len(routings) > 1:
        body.append(_routing_row(_all(routings), threshold))
    return [
        markdown_table(_HEAD, body),
        f"Accuracy on held-out text; below a confidence of {threshold:g} the expert answers. gain: "
        "points of routing over the personal model, ± standard error over questions.",
        f"personal model: {as_bytes(budget.model_bytes)} of weights and "
        f"{as_bytes(budget.prompt_bytes)} of prompt, {as_bytes(budget.resident_bytes)} resident "
        f"with all libraries, {1000 * budget.token_seconds:.2f} ms a token on "
        f"{budget.threads} core" + ("s" if budget.threads > 1 else ""),
    ]


def _all(routings: Sequence[Routing]) -> Routing:
    return Routing(
        "all",
        np.concatenate([routing.correct for routing in routings]),
        np.concatenate([routing.expert_correct for routing in routings]),
        np.concatenate([routing.general_correct for routing in routings]),
        np.concatenate([routing.confidence for routing in routings]),
    )


def _routing_row(routing: Routing, threshold: float) -> list[str]:
    """Return one user's cells of the table."""
    is_routed = routing.confidence < threshold
    answered = np.where(is_routed, routing.expert_correct, routing.correct)
    gains = 100 * (answered.astype(float) - routing.correct.astype(float))
    error = float(gains.std(ddof=1)) / math.sqrt(len(gains)) if len(gains) > 1 else math.nan
    shares = (
        routing.correct,
        routing.expert_correct,
        routing.general_correct,
        is_routed,
        answered,
    )
    cells = [as_percent(float(share.mean())) for share in shares]
    gain = f"{gains.mean():+.2f}" + ("" if math.isnan(error) else f" ± {error:.2f}")
    return [routing.user, str(len(gains)), *cells, gain]
