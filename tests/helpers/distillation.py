"""A distillation of a tiny model, which tests repeat by several engines and on several ranks."""

from __future__ import annotations

from fedsp_mpi.config import DistillationConfig
from fedsp_mpi.config.training import OptimizerConfig, StageConfig
from fedsp_mpi.data.tokens import Batches
from fedsp_mpi.files.fingerprint import of_weights
from fedsp_mpi.log import Log
from fedsp_mpi.models import auxiliary
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.training.distill import Progress, distil
from fedsp_mpi.training.process_group import SINGLE_RANK
from helpers import tiny


def distilled(
    path: str,
    micro=None,
    steps: int = 12,
    dropout: bool = False,
    clip=None,
    team=SINGLE_RANK,
    stop_at: int = 0,
    progress: Progress | None = None,
    **changes,
):
    teacher = tiny.load(path)
    student = LanguageModel(
        auxiliary.unroll(auxiliary.cut(teacher, tiny.cell(1)), 4), dropout=dropout
    )
    stage = StageConfig(
        steps=steps,
        batch_size=8,
        micro_batch=micro,
        optimizer=OptimizerConfig(learning_rate=1e-2, clip=clip),
    )
    settings = DistillationConfig(**{"stage": stage, "engine": "torch"} | changes)
    before = of_weights(teacher.weights)
    batches = Batches(
        tiny.texts(range(4, 24)),
        8,
        micro,
        seed=1,
        purpose="distillation",
        part=(team.rank, team.size),
    )
    asked = iter(range(1, steps + 1))
    done = distil(
        student,
        teacher,
        batches,
        settings=settings,
        seed=1,
        log=Log(),
        stop=lambda: next(asked) == stop_at,
        group=team,
        progress=progress or Progress(),
    )
    assert of_weights(teacher.weights) == before
    return done, student
