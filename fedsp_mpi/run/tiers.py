"""How personal, expert and general prompts are scored: at users on their text, at the server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fedsp_mpi.algorithms.base import Client, Server
from fedsp_mpi.algorithms.plmm import Experts, TierName, Users
from fedsp_mpi.config.tiers import GENERAL
from fedsp_mpi.data.tokens import Question
from fedsp_mpi.evaluation.scoring import answer_loss_mean, loglikelihoods
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.models.prompts import Prompt
from fedsp_mpi.record.tables import TierRow
from fedsp_mpi.roles import TierScore
from fedsp_mpi.run.inputs import ExperimentInputs
from fedsp_mpi.run.silos import disclosed
from fedsp_mpi.run.tier_inputs import TierInputs
from fedsp_mpi.tensors import NamedTensors

_SCORED_BY_USERS: tuple[tuple[TierName, str], ...] = (
    ("personal", "own"),
    ("personal", "domain"),
    ("personal", "other"),
    ("expert", "own"),
    ("general", "own"),
)


@dataclass(frozen=True)
class Judgement:
    """A prompt's score on some text: number of questions, nats per token, fraction."""

    n: int
    loss: float
    acc: float


def judge(
    model: LanguageModel,
    prompt: Prompt,
    questions: Sequence[Question],
    *,
    batch_tokens: int,
) -> Judgement:
    """Score a prompt, in one pass over each question's options.

    The loss is that of the right answer's tokens over the whole vocabulary.

    Args:
        model: frozen.
        prompt: at its depth.
        questions: one at least, of multiple choice.
        batch_tokens: most tokens of a forward pass.
    """
    scores = loglikelihoods(model, prompt, questions, batch_tokens=batch_tokens)
    assert scores is not None, "nothing tells it to stop"
    nats = 0.0
    num_tokens = 0
    num_right = 0
    for question, option_scores in zip(questions, scores, strict=True):
        answer = question.gold[0]
        nats -= float(option_scores.loglikelihood[answer])
        num_tokens += question.options[answer].num_answers
        num_right += int(option_scores.loglikelihood.argmax()) in question.gold
    return Judgement(len(questions), nats / num_tokens, num_right / len(questions))


def validation_of(inputs: ExperimentInputs) -> Callable[[Server], float] | None:
    """Return what computes the experts' mean loss, in nats per token, each on its own validation
    text, on the rank of the server that plays it; None without tiers.
    """
    if not isinstance(inputs, TierInputs):
        return None
    domains = inputs.domains
    batch_tokens = inputs.config.evaluation.batch_tokens

    def mean_loss(server: Server) -> float:
        assert isinstance(server, Experts)
        group = server.group
        own_losses = [
            answer_loss_mean(
                server.model,
                server.prompts[domain.name],
                domain.validation,
                batch_tokens=batch_tokens,
            )
            if group.is_mine(index)
            else 0.0
            for index, domain in enumerate(domains)
        ]
        return float(np.mean(group.totals(own_losses)))

    return mean_loss


def user_scorer(
    inputs: ExperimentInputs, client: Client
) -> Callable[[int, NamedTensors], Sequence[TierScore]] | None:
    """Return what scores all tiers on the text of one user, and its own prompt on other text.

    All of it on the users' model: a user holds no other. None without tiers.
    """
    if not isinstance(inputs, TierInputs):
        return None
    assert isinstance(client, Users)
    batch_tokens = inputs.config.evaluation.batch_tokens

    def score_tiers_of(id: int, tensors: NamedTensors) -> list[TierScore]:
        texts = inputs.texts_of(id)
        scores: list[TierScore] = []
        for tier, kind in _SCORED_BY_USERS:
            text = texts.get(kind)
            if not text:
                continue
            client.show(id, tensors, tier)
            result = judge(client.model, client.prompt, text, batch_tokens=batch_tokens)
            n = _disclosed(inputs, result.n) if kind == "own" else result.n
            scores.append(TierScore(id, tier, kind, n=n, loss=result.loss, acc=result.acc))
        return scores

    return score_tiers_of


def _disclosed(inputs: TierInputs, num_questions: int) -> int:
    """Return what a user's rank says of the number of questions that its user holds back."""
    federation = inputs.config.federation
    if not federation.silos:
        return num_questions
    return disclosed(num_questions, federation.disclose) or 0


def server_scorer(
    inputs: ExperimentInputs, server: Server
) -> Callable[[int], Sequence[TierRow]] | None:
    """Return what scores experts and the general prompt on the domains, on the global model.

    None without tiers.
    """
    if not isinstance(inputs, TierInputs):
        return None
    assert isinstance(server, Experts)
    batch_tokens = inputs.config.evaluation.batch_tokens

    def score_tiers(round: int) -> list[TierRow]:
        rows: list[TierRow] = []
        for index, domain in enumerate(inputs.domains):
            texts = {"domain": inputs.domain_text([index]), "other": inputs.other_text([index])}
            prompts = {"expert": server.prompts[domain.name], "general": server.prompts[GENERAL]}
            for kind, text in texts.items():
                if not text:
                    continue
                for tier, prompt in prompts.items():
                    result = judge(server.model, prompt, text, batch_tokens=batch_tokens)
                    rows.append(
                        TierRow(
                            round=round,
                            name=domain.name,
                            model=tier,
                            text=kind,
                            at="server",
                            n=result.n,
                            loss=result.loss,
                            acc=result.acc,
                        )
                    )
        return rows

    return score_tiers
