"""The scores at the end of a run, by all ranks of the server."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import asdict

from fedsp_mpi.evaluation.scoring import answer_loss_mean, score
from fedsp_mpi.log import Log, duration
from fedsp_mpi.record.tables import TRIGGERED, ResultRow
from fedsp_mpi.roles import Best, ServerRole
from fedsp_mpi.run import build
from fedsp_mpi.run.inputs import ExperimentInputs


def candidates(here: ServerRole, name: str, zero_shot: bool) -> dict[str, Best | None]:
    """What can be scored: what had the lowest validation loss, by method; None is the global model
    as it was.
    """
    none: dict[str, Best | None] = {"zero-shot": None} if zero_shot else {}
    control = {"server-only": here.control_best} if here.control_best else {}
    return {**none, **control, name: here.best}


def score_all(
    here: ServerRole,
    materials: ExperimentInputs,
    log: Log,
    stop: Callable[[], bool],
    there: Collection[str] = (),
    write: Callable[[list[ResultRow]], None] = lambda rows: None,
) -> bool:
    """Score what has no result yet. Every rank of the server calls this.

    Args:
        stop: asked between two batches.
        there: methods that have a result; rank 0's counts.
        write: gets the rows of each method as soon as all of them are known.

    Returns:
        False if told to stop before the last score.
    """
    config = materials.config
    every = candidates(here, config.run.label or config.method, config.evaluation.zero_shot)
    build.scoring_model(materials, here.server.model)
    for method in here.group.tell([method for method in every if method not in there]):
        rows = _score(here, materials, log, stop, method, every[method])
        if rows is None:
            return False
        write(rows)
    return True


def _score(
    here: ServerRole,
    materials: ExperimentInputs,
    log: Log,
    stop: Callable[[], bool],
    method: str,
    best: Best | None,
) -> list[ResultRow] | None:
    """The test, and where an attack is studied its success, of what a method has tuned."""
    model, tokens = here.server.model, materials.config.evaluation.batch_tokens
    prompt = here.server.prompt if best else None
    if best is not None:
        here.server.restore(best.exported)
        here.group.lead(here.server.parameters())
    loss = answer_loss_mean(model, prompt, here.validation, tokens, here.group)
    rows: list[ResultRow] = []
    for split, asked in {"test": materials.test, TRIGGERED: materials.triggered_test}.items():
        if not asked:
            continue
        num_options = sum(len(question.options) for question in asked)
        progress = log.progress(f"scoring {method}", num_options // here.group.size)
        found = score(
            model,
            prompt,
            asked,
            materials.task.metric,
            tokens,
            on_done=progress.step,
            stop=stop,
            group=here.group,
        )
        if found is None:
            return None
        log.say(f"scored {method}: {found.n} questions in {duration(found.seconds)}")
        own = {"loss": loss} if split == "test" else {"acc_norm": math.nan}
        rows.append(
            ResultRow(**asdict(found) | {"method": method, "split": split} | own | _round(best))
        )
    return rows


def _round(best: Best | None) -> dict[str, int]:
    return {"round": best.round if best else 0}
