"""How the server comes to its auxiliary model: by distillation, or from an earlier run that made
the same.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from fedsp_mpi.data.tokens import Batches
from fedsp_mpi.files import fingerprint, ownership
from fedsp_mpi.log import Log, duration
from fedsp_mpi.models import auxiliary
from fedsp_mpi.models.families import differs_by_layer, layers_of
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.models.prompts import Prompt
from fedsp_mpi.record import Checkpoints
from fedsp_mpi.run.inputs import ExperimentInputs
from fedsp_mpi.tensors import State
from fedsp_mpi.training.bridge import BridgeEnd, fit_bridge
from fedsp_mpi.training.device import Compute
from fedsp_mpi.training.distill import Progress, distil
from fedsp_mpi.training.process_group import ServerGroup

Stop = Callable[[], bool]


def auxiliary_model(
    materials: ExperimentInputs,
    model: LanguageModel,
    compute: Compute,
    team: ServerGroup,
    folder: Path,
    log: Log,
    stop: Stop,
    is_resumed: bool,
    digest: str | None = None,
) -> tuple[LanguageModel, dict[str, Any]]:
    """The clients' model, which is the aligned auxiliary model, and the story of its distillation,
    on rank 0.

    Where weights are what travels, or clients hold no model, it is the global model itself.

    A run that goes on takes its own; another one that of an earlier run if the recipe is the same.

    Args:
        materials: checked.
        model: the global model.
        compute: the server's.
        team: the server's ranks; the others call `help_to_distil` at the same time.
        folder: of the run; the auxiliary model is written into it, and looked for beside it.
        log: told what happens.
        stop: asked in each step of the distillation.
        is_resumed: the run goes on; its auxiliary model is in `folder` then. A missing or damaged
            one is made anew.
        digest: of the global model's weights, where it is known.

    Raises StoppedError if `stop` said so.
    """
    config = materials.config
    if config.tunes_weights or config.asks_server:
        return model, {"engine": "none", "steps": 0}
    recipe = _recipe(materials, model, compute, digest)
    target, place = folder / "auxiliary", Checkpoints(folder)
    is_mine = is_resumed or _has_recipe(target, recipe)
    small, source = _reloaded(target, compute, log) if is_mine else None, target
    if small is None and config.distillation.reuse:
        small, source = _reused(folder.parent, recipe, compute, log)
    distils = small is None
    start = place.read_distillation(recipe) if distils else None
    team.tell([distils, str(folder.resolve()) if start else None, recipe])
    if small is not None and source == target:
        notes = auxiliary.read_recipe(target)
        if notes["recipe"] != recipe:
            log.say(
                "auxiliary model: made with other versions or on another device; equal bits "
                "are not promised"
            )
        return small.beside(model), notes["distillation"]
    if small is not None:
        story = auxiliary.read_recipe(source)["distillation"] | {"reused_from": str(source)}
        log.say(
            f"auxiliary model: taken from {source}, distilled by the same recipe "
            "(distillation.reuse)"
        )
    else:
        keep = partial(_put_away, place, recipe)
        progress = Progress(start, keep, config.checkpoint.distillation_seconds)
        small, story = _distilled(materials, model, team, log, stop, progress)
    notes = {"depth": materials.depth, "recipe": recipe, "distillation": story}
    auxiliary.save(
        target,
        small,
        materials.layers_per_cell,
        tokenizer=materials.tokenizer,
        recipe=notes,
    )
    place.remove_distillation()
    return small.beside(model), story


def _put_away(place: Checkpoints, recipe: dict[str, Any], state: State) -> None:
    place.write_distillation(len(state["told/losses"]), state, recipe)


def help_to_distil(
    materials: ExperimentInputs, model: LanguageModel, team: ServerGroup, stop: Stop
) -> None:
    """The part of the server's other ranks in `auxiliary_model`.

    Raises StoppedError if `stop` said so on any rank.
    """
    if materials.config.tunes_weights or materials.config.asks_server:
        return
    distils, folder, recipe = team.tell()
    if distils:
        start = Checkpoints(Path(folder)).read_distillation(recipe) if folder else None
        assert bool(folder) == bool(start), f"{folder}: rank 0 reads there what this rank does not"
        _distilled(materials, model, team, Log(), stop, Progress(start))


def _distilled(
    materials: ExperimentInputs,
    model: LanguageModel,
    team: ServerGroup,
    log: Log,
    stop: Stop,
    progress: Progress,
) -> tuple[LanguageModel, dict[str, Any]]:
    config = materials.config
    cell = auxiliary.cut(model, config.auxiliary)
    small = LanguageModel(
        auxiliary.unroll(cell, materials.depth), model.dtype, dropout=config.auxiliary.dropout
    )
    stage, story = config.distillation.stage, {}
    seed, part = config.run.seed, (team.rank, team.size)
    if config.auxiliary.first_layers:
        story = _fitted_bridge(materials, model, small, team, log, stop)
    if not stage.steps:
        return small, {"engine": "none", "steps": 0} | story
    texts = materials.distillation_texts
    batches = Batches(texts, stage.batch_size, stage.micro_batch, seed, "distillation", part=part)
    done = distil(
        small,
        model,
        batches,
        settings=config.distillation,
        seed=seed,
        log=log,
        stop=stop,
        group=team,
        progress=progress,
    )
    log.say(
        f"distilled in {stage.steps} steps, {duration(done.trace.seconds)}, loss "
        f"{done.trace.first:.4f} -> "
        f"{done.trace.last:.4f}, by {done.engine} {done.engine_version}"
    )
    return small, story | {
        "engine": done.engine,
        "engine_version": done.engine_version,
        "zero_stage": done.zero_stage,
        "ranks": team.size,
        "steps": stage.steps,
        "samples": done.trace.samples,
        "seconds": done.trace.seconds,
        "seconds_median_step": median(done.step_seconds or (0.0,)),
        "seconds_to_first_step": done.first_step_at,
        "loss_first": done.trace.first,
        "loss_last": done.trace.last,
    }


def _fitted_bridge(
    materials: ExperimentInputs,
    model: LanguageModel,
    small: LanguageModel,
    team: ServerGroup,
    log: Log,
    stop: Stop,
) -> dict[str, Any]:
    """Fit the auxiliary model's bridge, and tell how well it fits."""
    settings, depths = materials.config.distillation, materials.depth_map
    first = materials.first_prompt(model).to(model.device)
    below = Prompt(depths.small).to(model.device)
    below.load(depths.down(first.tensors()))
    texts, seed = materials.questions, materials.config.run.seed
    bridge = auxiliary.bridge_of(small)
    goal = layers_of(model.model)[materials.layers[small.model.config.bridge_at]]
    fit = fit_bridge(
        BridgeEnd(small, below, bridge),
        BridgeEnd(model, first, goal),
        texts,
        settings=settings,
        seed=seed,
        group=team,
        stop=stop,
    )
    log.say(
        f"bridge fitted to {fit.texts} texts in {duration(fit.seconds)}; it leaves "
        f"{fit.unexplained_answers:.0%} of "
        f"the variance unexplained where answers are due, {fit.unexplained:.0%} over all tokens"
    )
    return {f"bridge_{key}": value for key, value in asdict(fit).items()}


def _recipe(
    materials: ExperimentInputs, model: LanguageModel, compute: Compute, digest: str | None
) -> dict[str, Any]:
    """All that the weights of the auxiliary model depend on. Equal recipes give equal weights."""
    config = materials.config
    size = {"depth": materials.depth, "layers_per_cell": materials.layers_per_cell}
    recipe = {
        "global_model": digest or fingerprint.of_weights(model.weights),
        "auxiliary": asdict(config.auxiliary) | size,
        "distillation": asdict(replace(config.distillation, reuse=True, text=None)),
        "texts": fingerprint.of_texts(materials.alignment_texts),
        "seed": config.run.seed,
        "device": compute.device.type,
        "dtype": config.server.compute.dtype,
        "threads": compute.threads,
        "server_ranks": config.topology.server_ranks,
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("torch", "transformers", "deepspeed")
        },
    }
    if config.auxiliary.first_layers:
        recipe["prompt"] = asdict(config.prompt)  # attached while the bridge is fitted
    if differs_by_layer(materials.model_config):
        recipe["layers"] = list(
            materials.layers
        )  # earlier versions made other weights of the same rest
    return json.loads(json.dumps(recipe))


def _reused(
    runs: Path, recipe: dict[str, Any], compute: Compute, log: Log
) -> tuple[LanguageModel | None, Path]:
    """The auxiliary model of an earlier run of this user by the same recipe, if it is whole, and
    its folder.
    """
    for path in sorted(runs.glob(f"*/auxiliary/{auxiliary.RECIPE}"), reverse=True):
        source = path.parent
        if not _has_recipe(source, recipe):
            continue
        if not ownership.is_by_this_user(source.parent, source, *source.iterdir()):
            log.say(f"auxiliary model: {source} belongs to another user and is not taken")
        elif not (source / ownership.MANIFEST).exists():
            log.say(
                f"auxiliary model: {source} has no digests, which earlier versions did not "
                "write, and is not taken"
            )
        elif (small := _reloaded(source, compute, log)) is not None:
            return small, source
    return None, runs


def _reloaded(source: Path, compute: Compute, log: Log) -> LanguageModel | None:
    """The auxiliary model in a folder; None, with a line that says why, if its bytes are not what
    was written.
    """
    try:
        auxiliary.read_recipe(source)
        if not fingerprint.require_listed(source):
            log.say(f"auxiliary model: {source} has no digests, so damage to it would not be seen")
        return auxiliary.load(source, compute.dtype)
    except ValueError as error:
        log.say(f"auxiliary model: {' '.join(str(error).split())}; it is not taken")
        return None


def _has_recipe(folder: Path, recipe: dict[str, Any]) -> bool:
    try:
        return auxiliary.read_recipe(folder).get("recipe") == recipe
    except ValueError:
        return False
