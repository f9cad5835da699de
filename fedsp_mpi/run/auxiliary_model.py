"""The server's auxiliary model: distilled here, or taken from an earlier run of the same recipe."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

from fedsp_mpi.data.tokens import Batches
from fedsp_mpi.files import fingerprint, ownership
from fedsp_mpi.files.untrusted import JsonObject
from fedsp_mpi.log import Log, duration, one_line
from fedsp_mpi.models import auxiliary
from fedsp_mpi.models.families import differs_by_layer, layers_of
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.models.prompts import Prompt
from fedsp_mpi.record import Checkpoints, atomic
from fedsp_mpi.run.inputs import ExperimentInputs
from fedsp_mpi.tensors import State
from fedsp_mpi.training.bridge import BridgeEnd, fit_bridge
from fedsp_mpi.training.device import Compute
from fedsp_mpi.training.distill import DistillationResult, Progress, distil
from fedsp_mpi.training.process_group import ServerGroup

Stop = Callable[[], bool]
Recipe = JsonObject  # all that the weights depend on, as JSON; see `_recipe`
Account = JsonObject  # of a distillation, as JSON, for the record; see `_account`

_NOT_DISTILLED: Account = {"engine": "none", "steps": 0}


@dataclass(frozen=True)
class Notes:
    """What is written beside an auxiliary model's weights.

    Attributes:
        depth: layers that it runs.
        recipe: that it was made by.
        distillation: the account of it.
    """

    depth: int
    recipe: Recipe
    distillation: Account

    def to_json(self) -> JsonObject:
        """Return this as it is written."""
        return {"depth": self.depth, "recipe": self.recipe, "distillation": self.distillation}

    @classmethod
    def read(cls, folder: Path) -> Notes:
        """Read the notes in a folder; raise ValueError if there is no auxiliary model."""
        values = auxiliary.read_recipe(folder)
        return cls(values["depth"], values.get("recipe", {}), values.get("distillation", {}))


def auxiliary_model(
    inputs: ExperimentInputs,
    model: LanguageModel,
    compute: Compute,
    *,
    group: ServerGroup,
    folder: Path,
    log: Log,
    stop: Stop,
    is_resumed: bool,
    digest: str | None = None,
) -> tuple[LanguageModel, Account]:
    """Return the clients' model on rank 0: the auxiliary model, aligned with the global one.

    Where weights are what travels, or clients hold no model, it is the global model itself. A run
    that is resumed takes its own auxiliary model; another run takes that of an earlier run, if the
    recipe is the same.

    Args:
        inputs: of the experiment, checked.
        model: the global model.
        compute: the server's device.
        group: the server's ranks; the others call `help_to_distil` at the same time.
        folder: of the run; the auxiliary model is written into it, and looked for beside it.
        log: is told what happens.
        stop: asked in each step of the distillation.
        is_resumed: the auxiliary model is in `folder`. A missing or damaged one is made anew.
        digest: of the global model's weights, where it is known.

    Returns:
        The model, and an account of its distillation for the record.

    Raises:
        StoppedError: `stop` said so.
    """
    config = inputs.config
    if config.tunes_weights or config.asks_server:
        return model, dict(_NOT_DISTILLED)
    recipe = _recipe(inputs, model, compute, num_ranks=group.size, digest=digest)
    target = folder / "auxiliary"
    checkpoints = Checkpoints(folder)
    source = target
    small = None
    if is_resumed or _has_recipe(target, recipe):
        small = _reload(target, compute, log)
    if small is None and config.distillation.reuse:
        source, small = _reuse(folder.parent, recipe, compute, log=log)
    start = checkpoints.read_distillation(recipe) if small is None else None
    distils = small is None
    group.tell([distils, str(folder.resolve()) if start else None, recipe])
    if small is not None and source == target:
        notes = Notes.read(target)
        if notes.recipe != recipe:
            log.say(
                "auxiliary model: made with other versions or on another device; equal bits are "
                "not promised"
            )
        return small.beside(model), notes.distillation
    if small is not None:
        account = Notes.read(source).distillation | {"reused_from": str(source)}
        log.say(
            f"auxiliary model: taken from {source}, distilled by the same recipe "
            "(distillation.reuse)"
        )
    else:
        keep = partial(_keep_state, checkpoints, recipe)
        progress = Progress(start, keep, config.checkpoint.distillation_seconds)
        small, account = _distil(inputs, model, group=group, log=log, stop=stop, progress=progress)
    notes = Notes(inputs.depth, recipe, account)
    with atomic.saving(target, "the distillation goes on from its last state"):
        auxiliary.save(
            target,
            small,
            inputs.layers_per_cell,
            tokenizer=inputs.tokenizer,
            recipe=notes.to_json(),
        )
    checkpoints.remove_distillation()
    return small.beside(model), account


def help_to_distil(
    inputs: ExperimentInputs, model: LanguageModel, group: ServerGroup, *, stop: Stop
) -> None:
    """Do the part of the server's other ranks in `auxiliary_model`.

    Args:
        inputs: of the experiment, checked.
        model: the global model.
        group: the server's ranks.
        stop: asked in each step of the distillation.

    Raises:
        StoppedError: `stop` said so on any rank.
    """
    if inputs.config.tunes_weights or inputs.config.asks_server:
        return
    distils, folder, recipe = group.tell()
    if not distils:
        return
    start = Checkpoints(Path(folder)).read_distillation(recipe) if folder else None
    assert bool(folder) == bool(start), f"{folder}: rank 0 reads there what this rank does not"
    _distil(inputs, model, group=group, log=Log(), stop=stop, progress=Progress(start))


# -- distillation ----------------------------------------------------------------------------------


def _distil(
    inputs: ExperimentInputs,
    model: LanguageModel,
    *,
    group: ServerGroup,
    log: Log,
    stop: Stop,
    progress: Progress,
) -> tuple[LanguageModel, Account]:
    """Cut the auxiliary model out of the global one, and align it: its bridge, then its weights."""
    config = inputs.config
    cell = auxiliary.cut(model, config.auxiliary)
    unrolled = auxiliary.unroll(cell, inputs.depth)
    small = LanguageModel(unrolled, model.dtype, dropout=config.auxiliary.dropout)
    account: Account = {}
    if config.auxiliary.first_layers:
        account = _fit_bridge(inputs, model, small, group=group, log=log, stop=stop)
    stage = config.distillation.stage
    if not stage.steps:
        return small, _NOT_DISTILLED | account
    seed = config.run.seed
    batches = Batches(
        inputs.distillation_texts,
        stage.batch_size,
        stage.micro_batch,
        seed=seed,
        purpose="distillation",
        part=(group.rank, group.size),
        max_padding=None if stage.max_padding == "auto" else stage.max_padding,
    )
    distilled = distil(
        small,
        model,
        batches,
        settings=config.distillation,
        seed=seed,
        log=log,
        stop=stop,
        group=group,
        progress=progress,
    )
    trace = distilled.trace
    log.say(
        f"distilled in {stage.steps} steps, {duration(trace.seconds)}, loss {trace.first:.4f} -> "
        f"{trace.last:.4f}, by {distilled.engine} {distilled.engine_version}"
    )
    return small, account | _account(distilled, stage.steps, group.size)


def _account(distilled: DistillationResult, steps: int, num_ranks: int) -> Account:
    """Return the account of a distillation, for the record."""
    trace = distilled.trace
    return {
        "engine": distilled.engine,
        "engine_version": distilled.engine_version,
        "zero_stage": distilled.zero_stage,
        "ranks": num_ranks,
        "steps": steps,
        "samples": trace.samples,
        "seconds": trace.seconds,
        "seconds_median_step": median(distilled.step_seconds or (0.0,)),
        "seconds_to_first_step": distilled.first_step_at,
        "loss_first": trace.first,
        "loss_last": trace.last,
    }


def _fit_bridge(
    inputs: ExperimentInputs,
    model: LanguageModel,
    small: LanguageModel,
    *,
    group: ServerGroup,
    log: Log,
    stop: Stop,
) -> Account:
    """Fit the auxiliary model's bridge; return how well it fits."""
    depth_map = inputs.depth_map
    prompt = inputs.first_prompt(model).to(model.device)
    small_prompt = Prompt(depth_map.small).to(model.device)
    small_prompt.load(depth_map.down(prompt.tensors()))
    # The states that leave the bridge are to be those that enter the layer behind it.
    target_layer = layers_of(model.model)[inputs.layers[small.model.config.bridge_at]]
    fit = fit_bridge(
        BridgeEnd(small, small_prompt, auxiliary.bridge_of(small)),
        BridgeEnd(model, prompt, target_layer),
        inputs.server_questions,
        settings=inputs.config.distillation,
        seed=inputs.config.run.seed,
        group=group,
        stop=stop,
    )
    log.say(
        f"bridge fitted to {fit.texts} texts in {duration(fit.seconds)}; it leaves "
        f"{fit.unexplained_answers:.0%} of the variance unexplained where answers are due, "
        f"{fit.unexplained:.0%} over all tokens"
    )
    return {f"bridge_{name}": value for name, value in asdict(fit).items()}


def _keep_state(checkpoints: Checkpoints, recipe: Recipe, state: State) -> None:
    """Write the state of a distillation, from which the next job continues."""
    checkpoints.write_distillation(len(state["told/losses"]), state, recipe)


# -- reuse -----------------------------------------------------------------------------------------


def _recipe(
    inputs: ExperimentInputs,
    model: LanguageModel,
    compute: Compute,
    *,
    num_ranks: int,
    digest: str | None,
) -> Recipe:
    """Return all that the auxiliary model's weights depend on. Equal recipes give equal weights.

    Args:
        inputs: of the experiment.
        model: the global model.
        compute: the server's device.
        num_ranks: that distil together.
        digest: of the global model's weights, where it is known.
    """
    config = inputs.config
    size = {"depth": inputs.depth, "layers_per_cell": inputs.layers_per_cell}
    libraries = ("torch", "transformers", "deepspeed")
    recipe: Recipe = {
        "global_model": digest or fingerprint.of_weights(model.weights),
        "auxiliary": asdict(config.auxiliary) | size,
        "distillation": asdict(replace(config.distillation, reuse=True, text=None)),
        "texts": fingerprint.of_texts(inputs.alignment_texts),
        "seed": config.run.seed,
        "device": compute.device.type,
        "dtype": config.server.compute.dtype,
        "threads": compute.threads,
        "server_ranks": num_ranks,
        "versions": {name: importlib.metadata.version(name) for name in libraries},
    }
    if config.auxiliary.first_layers:
        recipe["prompt"] = asdict(config.prompt)  # attached while the bridge is fitted
    if differs_by_layer(inputs.model_config):
        # Earlier versions made other weights by what is otherwise the same recipe.
        recipe["layers"] = list(inputs.layers)
    if "gelu_new" in vars(inputs.model_config).values():
        recipe["gelu"] = "one kernel"  # in the same way
    if config.distillation.stage.max_padding in (None, "auto"):
        del recipe["distillation"]["stage"]["max_padding"]  # which earlier versions did not have
    return json.loads(json.dumps(recipe))


def _reuse(
    runs: Path, recipe: Recipe, compute: Compute, *, log: Log
) -> tuple[Path, LanguageModel | None]:
    """Find an undamaged auxiliary model that an earlier run of this user made by the same recipe.

    Returns:
        Its folder and the model; `runs` and None if there is none.
    """
    for path in sorted(runs.glob(f"*/auxiliary/{auxiliary.RECIPE}"), reverse=True):
        source = path.parent
        if not _has_recipe(source, recipe):
            continue
        if not ownership.is_by_this_user(source.parent, source, *source.iterdir()):
            log.say(f"auxiliary model: {source} belongs to another user and is not taken")
            continue
        if not (source / ownership.MANIFEST).exists():
            log.say(
                f"auxiliary model: {source} has no digests, which earlier versions did not write, "
                "and is not taken"
            )
            continue
        small = _reload(source, compute, log)
        if small is not None:
            return source, small
    return runs, None


def _reload(source: Path, compute: Compute, log: Log) -> LanguageModel | None:
    """Load the auxiliary model in a folder; return None, and say why, if it is damaged."""
    try:
        auxiliary.read_recipe(source)
        if not fingerprint.require_digests(source):
            log.say(f"auxiliary model: {source} has no digests, so damage to it would not be seen")
        return auxiliary.load(source, compute.dtype)
    except ValueError as error:
        log.say(f"auxiliary model: {one_line(error)}; it is not taken")
        return None


def _has_recipe(folder: Path, recipe: Recipe) -> bool:
    try:
        return Notes.read(folder).recipe == recipe
    except ValueError:
        return False
