"""The scores at the end of a run, by all ranks of the server."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict

from fedsp_mpi.algorithms.finetune import WeightServer
from fedsp_mpi.algorithms.plmm import Experts
from fedsp_mpi.data.tokens import Question
from fedsp_mpi.evaluation.baselines import baseline_rows
from fedsp_mpi.evaluation.scoring import Score, answer_loss_mean, perplexity, pooled, score
from fedsp_mpi.log import Log, duration
from fedsp_mpi.models.prompts import Prompt
from fedsp_mpi.record.tables import CHANCE, OF_GENERAL, TRIGGERED, ResultRow
from fedsp_mpi.roles import Best, ServerRole
from fedsp_mpi.run import build
from fedsp_mpi.run.inputs import ExperimentInputs
from fedsp_mpi.run.tier_inputs import TierInputs


def score_all(
    role: ServerRole,
    inputs: ExperimentInputs,
    log: Log,
    *,
    stop: Callable[[], bool],
    scored: Collection[str] = (),
    write: Callable[[list[ResultRow]], None] | None = None,
) -> bool:
    """Score what has no result yet. Every rank of the server calls this.

    Args:
        role: this rank's part of the server.
        inputs: of the experiment.
        log: is told what was scored.
        stop: asked between two batches.
        scored: methods that have a result; rank 0's count.
        write: gets first the rows that need no model, then those of each method as soon as all of
            them are known; rank 0 has one.

    Returns:
        False if told to stop before the last score.
    """
    candidates = _candidates(role, inputs)
    dtype = role.server.model.dtype
    build.scoring_model(inputs, role.server.model)
    is_validated = role.server.prompt is not None and role.server.model.dtype == dtype
    if isinstance(role.server, WeightServer):
        role.server.tuned.attach()
    if write is not None and CHANCE not in scored:
        baselines = baseline_rows(inputs.splits.test, inputs.server_examples, inputs.task.metric)
        if baselines:
            write(baselines)
    missing = [method for method in candidates if method not in scored]
    for method in role.group.tell(missing):
        best = candidates[method]
        loss = best.loss if best and best.round and is_validated and role.validation else None
        rows = _score(role, inputs, log, stop=stop, method=method, best=best, loss=loss)
        if rows is None:
            return False
        if write is not None:
            write(rows)
    return True


def _candidates(role: ServerRole, inputs: ExperimentInputs) -> dict[str, Best | None]:
    """Return what had the lowest validation loss, by method; None is the model as it was."""
    config = inputs.config
    candidates: dict[str, Best | None] = {}
    if config.evaluation.zero_shot and not config.classifies:  # an untrained head knows nothing
        candidates["zero-shot"] = None
    if role.control_best:
        candidates["server-only"] = role.control_best
    candidates[config.run.label or config.method] = role.best
    return candidates


def _score(
    role: ServerRole,
    inputs: ExperimentInputs,
    log: Log,
    *,
    stop: Callable[[], bool],
    method: str,
    best: Best | None,
    loss: float | None,
) -> list[ResultRow] | None:
    """Score what a method has tuned on the test, and where an attack is studied on its success.

    Args:
        role: this rank's part of the server.
        inputs: of the experiment.
        log: is told what was scored.
        stop: asked between two batches.
        method: its name.
        best: what it has tuned; None: the model as it was.
        loss: on the validation texts, in nats a token; None if it is still to be computed.

    Returns:
        A row for each; None if told to stop.
    """
    model = role.server.model
    group = role.group
    batch_tokens = inputs.config.evaluation.batch_tokens
    prompt = None
    by_domain: Mapping[str, Prompt] = {}
    if best is not None:
        role.server.restore(best.exported)
        group.lead(role.server.parameters())
        prompt = role.server.prompt
        if isinstance(role.server, Experts):
            by_domain = role.server.prompts
    if loss is None and by_domain:
        loss = role.validation_loss(role.server)
    elif loss is None:
        loss = answer_loss_mean(
            model, prompt, role.validation, batch_tokens=batch_tokens, group=group
        )
    round_of_best = best.round if best else 0
    if inputs.is_plain_text:
        start = time.perf_counter()
        blocks = inputs.test_blocks
        test_loss = answer_loss_mean(model, prompt, blocks, batch_tokens=batch_tokens, group=group)
        row = ResultRow(
            method=method,
            split="test",
            round=round_of_best,
            n=sum(block.num_answers for block in blocks),
            perplexity=perplexity(test_loss),
            loss=loss,
            seconds=time.perf_counter() - start,
        )
        log.say(f"scored {method}: {row.n} tokens in {duration(row.seconds)}")
        return [row]
    rows: list[ResultRow] = []
    splits = {"test": inputs.test, TRIGGERED: inputs.triggered_test}
    if by_domain and best is role.best:
        splits[OF_GENERAL] = inputs.test
    for split, questions in splits.items():
        if not questions:
            continue
        num_options = sum(len(question.options) for question in questions)
        progress = log.progress(f"scoring {method}", num_options // group.size)
        parts: list[tuple[Prompt | None, Sequence[Question]]] = [(prompt, questions)]
        if by_domain and split == "test" and isinstance(inputs, TierInputs):
            parts = [(by_domain[domain.name], domain.test) for domain in inputs.domains]
        results: list[Score] = []
        for part_prompt, part in parts:
            result = score(
                model,
                part_prompt,
                part,
                metric=inputs.task.metric,
                batch_tokens=batch_tokens,
                on_done=progress.step,
                stop=stop,
                group=group,
            )
            if result is None:
                return None
            results.append(result)
        result = pooled(results)
        log.say(f"scored {method}: {result.n} questions in {duration(result.seconds)}")
        values = asdict(result)
        if split == "test":
            values["loss"] = loss
        elif split == TRIGGERED:
            values["acc_norm"] = math.nan  # of an attack, its success rate is all that counts
        rows.append(ResultRow(**values, method=method, split=split, round=round_of_best))
    return rows
