"""Answer a user of a run with tiers: by its own prompt at once, by an expert where that is unsure.

One process plays user and expert; or two do, which seal what they say to each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fedsp_mpi import comm
from fedsp_mpi.comm.solo import Solo
from fedsp_mpi.commands.ask_models import Answer, Assistant, Experts, LocalExperts, Models
from fedsp_mpi.config import Config
from fedsp_mpi.config.parsing import nearest
from fedsp_mpi.config.tiers import GENERAL
from fedsp_mpi.log import Log
from fedsp_mpi.report.formatting import as_bytes, as_percent, markdown_table

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
    folder: str,
    user: str | None,
    text: str,
    *,
    expert: str | None,
    threshold: float,
) -> list[str]:
    """Answer a user's question; return what to show, in a line each.

    Collective, of one process or two; with two, the lines are the user's, on rank 1.

    Args:
        folder: of a complete run with tiers.
        user: name.
        text: the question.
        expert: whose domain it is of; None: the user's first one.
        threshold: of the personal model's confidence, below which the expert is asked.

    Raises:
        ValueError: there is no such run, user or expert of the user.
    """

    if not text.strip():
        raise ValueError("TEXT: found no words, expected a question; put it in quotes")

    def answer(models: Models, experts: Experts) -> list[str]:
        assistant = Assistant(models, require_user(models.inputs.config, user))
        words = assistant.words
        if expert is not None and expert not in words:
            raise ValueError(
                f"--expert: found {expert!r}, expected one of {assistant.user}'s: "
                f"{', '.join(words)}"
            )
        name = expert if expert is not None else next(iter(words))
        answers = [assistant.answer(text, words[name])]
        lines = [_answer_line(answers[0])]
        if answers[0].confidence < threshold:
            answers.append(experts.answer(text, name))
            lines.append(f"below the threshold of {threshold:g}: asks expert {name}")
            lines.append(_answer_line(answers[1]))
        return [*lines, f"answered by {answers[-1].tier}"]

    return _answered(folder, answer)


def evaluate(folder: str, user: str | None, *, threshold: float, log: Log) -> list[str]:
    """Measure routing on users' held-out text; return a Markdown table and what it says.

    Collective, of one process or two; with two, the lines are the user's, on rank 1.

    Args:
        folder: of a complete run with tiers.
        user: name; None: all users, as only the owner of all of them can.
        threshold: of the personal model's confidence, below which the expert is asked.
        log: is told of each user.

    Raises:
        ValueError: there is no such run or user.
    """

    def measure(models: Models, experts: Experts) -> list[str]:
        config = models.inputs.config
        is_alone = isinstance(experts, LocalExperts)
        names = config.federation.users
        users = names if is_alone and user is None else (require_user(config, user),)
        budget = Assistant(models, users[0]).budget()
        routings: list[Routing] = []
        for name in users:
            routings.append(routing(Assistant(models, name), experts))
            log.say(f"{name}: {len(routings[-1].correct)} questions")
        body = [_routing_row(item, threshold) for item in routings]
        if len(routings) > 1:
            body.append(_routing_row(_all(routings), threshold))
        return [
            markdown_table(_HEAD, body),
            f"Accuracy on held-out text; below a confidence of {threshold:g} the expert answers. "
            "gain: points of routing over the personal model, ± standard error over questions.",
            f"personal model: {as_bytes(budget.model_bytes)} of weights and "
            f"{as_bytes(budget.prompt_bytes)} of prompt, {as_bytes(budget.resident_bytes)} "
            f"resident with all libraries, {1000 * budget.token_seconds:.2f} ms a token on "
            f"{budget.threads} core" + ("s" if budget.threads > 1 else ""),
        ]

    return _answered(folder, measure)


def routing(assistant: Assistant, experts: Experts) -> Routing:
    """Answer a user's held-out questions with every tier."""
    correct: list[bool] = []
    expert_correct: list[bool] = []
    general_correct: list[bool] = []
    confidences: list[float] = []
    inputs = assistant.inputs
    members = inputs.members[assistant.client]
    for index, (name, words) in zip(members, assistant.words.items(), strict=True):
        examples = inputs.own_examples(assistant.client, index)
        if not examples:
            continue
        of_user = assistant.choose(examples, words)
        of_expert = experts.choose(name, name, examples)
        of_general = experts.choose(GENERAL, name, examples)
        gold = [example.gold for example in examples]
        correct += [choice.option in right for choice, right in zip(of_user, gold)]
        confidences += [choice.confidence for choice in of_user]
        expert_correct += [choice.option in right for choice, right in zip(of_expert, gold)]
        general_correct += [choice.option in right for choice, right in zip(of_general, gold)]
    return Routing(
        assistant.user,
        np.array(correct),
        np.array(expert_correct),
        np.array(general_correct),
        np.array(confidences),
    )


def _answered(folder: str, work: Callable[[Models, Experts], list[str]]) -> list[str]:
    """Do a user's work with the experts of this process, or of rank 0 where there are two."""
    num_processes = comm.launcher_size() or 1
    if num_processes > 2:
        raise ValueError(
            f"ask: found {num_processes} processes, expected one, or two: the expert's and the "
            "user's; start it with mpirun -n 2"
        )
    wire = comm.connect()
    if isinstance(wire, Solo):
        models = Models.of(folder)
        return work(models, LocalExperts(models))
    from fedsp_mpi.commands import ask_remote

    return ask_remote.answered(wire, folder, work)


def _answer_line(answer: Answer) -> str:
    way = answer.way_seconds
    return (
        f"{answer.tier}: {answer.text}  (confidence {answer.confidence:.2f}, first token after "
        f"{1000 * answer.first_token_seconds:.0f} ms, {answer.num_tokens} tokens in "
        f"{1000 * answer.seconds:.0f} ms"
        + ("" if way is None else f", {1000 * way:.0f} ms there and back, sealed")
        + ")"
    )


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
