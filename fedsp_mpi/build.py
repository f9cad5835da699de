"""Configuration to objects: where a name becomes a class, and where a mistake is found before it costs."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from fedsp_mpi.aggregation.average import weighted_mean
from fedsp_mpi.aggregation.sampling import participants
from fedsp_mpi.algorithms import fedsp
from fedsp_mpi.comm import Handout
from fedsp_mpi.config import Config, ConfigError, StageConfig
from fedsp_mpi.data import partition, tasks
from fedsp_mpi.data.tokens import Batches, Text, encode
from fedsp_mpi.evaluation.scoring import Question, questions
from fedsp_mpi.federate import ClientSide
from fedsp_mpi.log import Log, duration
from fedsp_mpi.models import auxiliary, backbone
from fedsp_mpi.models.backbone import LanguageModel
from fedsp_mpi.models.prompts import Prompt, PromptSpec
from fedsp_mpi.record.checkpoint import Checkpoint, Checkpoints, Piece, Shelf
from fedsp_mpi.tensors import Contract, NamedTensors
from fedsp_mpi.training.device import DTYPES, Compute
from fedsp_mpi.training.distill import distil

RESOURCES = Path(__file__).parent / "resources"


class Materials:
    """What a configuration says about model and data, read when it is first asked for.

    Nothing here loads weights. `check` asks for all of it, so that every mistake that can be found without weights is.
    """

    def __init__(self, config: Config) -> None:
        backbone.quiet()
        self.config = config
        name = config.model.name
        self.model_name = str(RESOURCES / "model") if name == "embedded" else str(name)
        source = config.data.source
        self.source = str(RESOURCES / "data") if source == "embedded" else source
        self._texts: dict[int, list[Text]] = {}

    @cached_property
    def model_config(self) -> Any:
        return backbone.read_config(self.model_name, self.config.model.revision)

    @cached_property
    def shape(self) -> backbone.Shape:
        return backbone.shape_of(self.model_config)

    @cached_property
    def tokenizer(self) -> Any:
        name = self.config.model.tokenizer
        return backbone.read_tokenizer(name or self.model_name, None if name else self.config.model.revision)

    @cached_property
    def task(self) -> tasks.Task:
        return tasks.find(self.config.data.task)

    @cached_property
    def splits(self) -> tasks.Splits:
        limit = {name: most for name, most in asdict(self.config.data.limit).items() if most is not None}
        return tasks.load(self.task, self.source, seed=self.config.run.seed, limit=limit)

    @cached_property
    def shards(self) -> list[np.ndarray]:
        """Rows of the training split by participant: the server's, then each client's."""
        return partition.iid(len(self.splits.train), self.config.federation.clients + 1, self.config.run.seed)

    @property
    def depth(self) -> int:
        """Layers of the auxiliary model, shared ones counted as often as they run."""
        return self.config.auxiliary.depth or self.shape.num_layers

    @property
    def prompt_spec(self) -> PromptSpec:
        """The prompts at the depth of the global model."""
        prompt = self.config.prompt
        return PromptSpec.of(self.shape, prompt.kind, prompt.num_tokens, prompt.projection)

    @property
    def max_length(self) -> int:
        """Most tokens of a training text: what is left of the positions, and one more, which is predicted, not read."""
        return min(self.config.data.max_length, self.shape.num_positions - self.config.prompt.num_tokens + 1)

    def shard(self, participant: int) -> list[Text]:
        """The tokenised training texts of the server (0) or of client `participant` - 1."""
        if participant not in self._texts:
            examples = [self.splits.train[i] for i in self.shards[participant]]
            self._texts[participant] = encode(self.tokenizer, examples, self.max_length)
        return self._texts[participant]

    @cached_property
    def validation(self) -> list[Text]:
        return encode(self.tokenizer, self.splits.validation, self.max_length)

    @cached_property
    def test(self) -> list[Question]:
        return questions(self.tokenizer, self.splits.test)

    def batches(self, participant: int, stage: StageConfig, owner: str) -> Batches:
        """The batches of one participant's stage; the order depends on the seed, `owner` and the client."""
        texts = self.shard(participant)
        return Batches(texts, stage.batch_size, stage.micro_batch, self.config.run.seed, owner, participant - 1)

    def first_prompt(self) -> Prompt:
        return Prompt(self.prompt_spec).initialise(self.config.run.seed, self.config.prompt.init_std)

    def check(self) -> None:
        """Raise ValueError on the first thing that cannot work, before any weight is loaded."""
        self._check_cell()
        self._check_positions()
        tasks.check_columns(self.task, self.source)
        _ = self.shards
        vocabulary = self.model_config.vocab_size
        if len(self.tokenizer) > vocabulary:
            raise ConfigError(
                f"model.tokenizer: found {len(self.tokenizer)} tokens, expected at most the model's {vocabulary}; "
                "name the tokenizer that belongs to the model"
            )
        _ = self.shard(0), self.validation

    def _check_cell(self) -> None:
        cell, layers = self.config.auxiliary, self.shape.num_layers
        if cell.start_layer + cell.layers_per_cell > layers:
            raise ConfigError(
                f"auxiliary: found start_layer {cell.start_layer} and layers_per_cell {cell.layers_per_cell}, expected "
                f"both together at most the {layers} layers of {self.model_name}"
            )
        if self.depth < cell.layers_per_cell:
            raise ConfigError(
                f"auxiliary.depth: found {self.depth}, expected at least layers_per_cell={cell.layers_per_cell}"
            )

    def _check_positions(self) -> None:
        tokens, positions = self.config.prompt.num_tokens, self.shape.num_positions
        if tokens > positions - 2:
            raise ConfigError(
                f"prompt.num_tokens: found {tokens}, expected at most {positions - 2}: {self.model_name} has "
                f"{positions} positions, and a text needs two at least"
            )


def expected_work(materials: Materials) -> list[float]:
    """What each client's round costs, relative to the others: steps are equal, texts are not equally long."""
    train = materials.splits.train
    lengths = [np.mean([len(train[i].context) + len(train[i].target) for i in s]) for s in materials.shards[1:]]
    return [float(length) for length in lengths]


@dataclass(frozen=True)
class ServerParts:
    """The server after its preparation.

    Attributes:
        server: FedSP's server.
        control: the same without clients, or None.
        sizes: parameter counts for the record.
        distillation: how the auxiliary model came to be, for the record.
    """

    server: fedsp.Server
    control: fedsp.Server | None
    sizes: dict[str, Any]
    distillation: dict[str, Any]


def global_model(materials: Materials, compute: Compute) -> LanguageModel:
    """Load the global model: frozen and sealed. Raises ValueError if its weights cannot be read."""
    settings = materials.config.model
    return backbone.load_global(
        materials.model_name,
        device=compute.device,
        revision=settings.revision,
        dtype=compute.dtype,
        checkpointing=settings.gradient_checkpointing,
    )


def server_parts(
    materials: Materials,
    model: LanguageModel,
    compute: Compute,
    folder: Path,
    meta: dict[str, Any],
    log: Log,
    stop: Callable[[], bool],
    resumed: Checkpoint | None = None,
) -> tuple[ServerParts, Handout]:
    """Make the auxiliary model, align it, and put together what everybody gets once.

    Args:
        materials: checked.
        model: the global model.
        compute: the server's.
        folder: of the run; the auxiliary model is written into it, and looked for beside it.
        meta: goes with the hand-out.
        log: told what happens.
        stop: asked in each step of the distillation.
        resumed: what the run goes on from; its auxiliary model is taken from `folder` then.

    Raises StoppedError if `stop` said so, ValueError if a resumed run has lost its auxiliary model.
    """
    config = materials.config
    small, distillation = _auxiliary(materials, model, compute, folder, log, stop, resumed)

    def server() -> fedsp.Server:
        return fedsp.Server(
            model,
            materials.first_prompt().to(compute.device),
            materials.depth,
            materials.batches(0, config.server.tuning, "server"),
            config.server.tuning,
            config.federation.rounds,
            weighted_mean,
        )

    first = server()
    prompts = first.broadcast()
    meta = meta | {
        "cell": auxiliary.cell_config(small.model.config, config.auxiliary.layers_per_cell).to_dict(),
        "depth": materials.depth,
        "folder": str(folder.resolve()),
        "done": resumed.round if resumed else 0,
        "states": {str(id): list(piece) for id, piece in resumed.clients.items()} if resumed else {},
    }
    tensors = NamedTensors.join({"auxiliary/": auxiliary.pack(small), "prompt/": prompts})
    sizes = {
        "global": model.num_parameters(),
        "auxiliary": small.num_parameters(),
        "prompt": materials.first_prompt().num_parameters(),
        "prompt_on_the_wire": prompts.schema.num_values,
    }
    control = server() if config.evaluation.server_only else None
    contract = Contract(prompts.schema, prompts.schema, fedsp.METRICS)
    return ServerParts(first, control, sizes, distillation), Handout(meta, tensors, contract)


def client_side(materials: Materials, compute: Compute, given: Handout, ids: Sequence[int]) -> ClientSide:
    """The clients of one process, from what the server handed out and their own text."""
    plan, seed = materials.config.federation, materials.config.run.seed
    client = _clients(materials, compute, given, ids)
    states = {int(id): Piece(*piece) for id, piece in given.meta["states"].items()}
    mine = {id: piece for id, piece in states.items() if id in set(ids)}
    shelf = Shelf(client, Checkpoints(Path(given.meta["folder"])), materials.config.client.resident, mine)
    sizes = [len(shard) for shard in materials.shards[1:]]
    chosen = partial(participants, plan.sampling, plan.clients_per_round, sizes, seed)
    return ClientSide(client, ids, compute, shelf, chosen)


def _clients(materials: Materials, compute: Compute, given: Handout, ids: Sequence[int]) -> fedsp.Client:
    config = materials.config
    compute.begin()
    model = auxiliary.build(
        given.meta["cell"],
        given.meta["depth"],
        compute.device,
        compute.dtype,
        config.auxiliary.dropout,
        config.model.gradient_checkpointing,
    )
    stages = config.client
    return fedsp.Client(
        model,
        given.tensors.select("auxiliary/"),
        Prompt(materials.prompt_spec.at_depth(given.meta["depth"])).to(compute.device),
        {id: _shard(materials, id) for id in ids},
        stages.alignment,
        stages.prompt,
        config.federation.rounds,
        config.run.seed,
        config.federation.client_state == "kept",
        config.federation.client_seconds,
    )


def _shard(materials: Materials, id: int) -> fedsp.Shard | fedsp.ShardError:
    stages = materials.config.client
    try:
        alignment = materials.batches(id + 1, stages.alignment, "alignment")
        return fedsp.Shard(alignment, materials.batches(id + 1, stages.prompt, "prompt"))
    except ValueError as error:  # one owner's text is not a reason to stop the others
        return fedsp.ShardError(f"its text cannot be used: {error}")


def scoring_model(materials: Materials, model: LanguageModel) -> LanguageModel:
    """The global model in the type that it is scored in, its weights read in that type."""
    dtype = DTYPES[materials.config.evaluation.dtype]
    if model.dtype != dtype:
        backbone.reread(model, materials.model_name, revision=materials.config.model.revision, dtype=dtype)
    return model


def _auxiliary(
    materials: Materials,
    model: LanguageModel,
    compute: Compute,
    folder: Path,
    log: Log,
    stop: Callable[[], bool],
    resumed: Checkpoint | None,
) -> tuple[LanguageModel, dict[str, Any]]:
    """The aligned auxiliary model and the story of its distillation.

    A run that goes on takes its own; another one that of an earlier run if the recipe is the same.
    """
    config = materials.config
    texts = materials.shard(0)
    recipe = _recipe(materials, model, compute, texts)
    target = folder / "auxiliary"
    own = target if resumed or _has_recipe(target, recipe) else None
    if own is not None:
        small, notes = auxiliary.load(own, compute.dtype), auxiliary.read_recipe(own)
        if notes["recipe"] != recipe:
            log.say("auxiliary model: made with other versions or on another device; equal bits are not promised")
        return small, notes["distillation"]
    found = _find_auxiliary(folder.parent, recipe) if config.distillation.reuse else None
    if found is not None:
        small = auxiliary.load(found, compute.dtype)
        story = auxiliary.read_recipe(found)["distillation"] | {"reused_from": str(found)}
        log.say(f"auxiliary model: taken from {found}, distilled by the same recipe (distillation.reuse)")
    else:
        small, story = _distilled(materials, model, texts, log, stop)
    notes = {"depth": materials.depth, "recipe": recipe, "distillation": story}
    auxiliary.save(target, small, config.auxiliary.layers_per_cell, materials.tokenizer, notes)
    return small, story


def _distilled(
    materials: Materials, model: LanguageModel, texts: list[Text], log: Log, stop: Callable[[], bool]
) -> tuple[LanguageModel, dict[str, Any]]:
    config = materials.config
    cell = auxiliary.cut(model, config.auxiliary.start_layer, config.auxiliary.layers_per_cell)
    small = LanguageModel(auxiliary.unroll(cell, materials.depth), model.dtype, config.auxiliary.dropout)
    stage = config.distillation.stage
    if not stage.steps:
        return small, {"engine": "none", "steps": 0}
    batches = Batches(texts, stage.batch_size, stage.micro_batch, config.run.seed, "distillation")
    done = distil(small, model, batches, config.distillation, config.run.seed, log, stop)
    log.say(
        f"distilled in {stage.steps} steps, {duration(done.trace.seconds)}, loss {done.trace.first:.4f} -> "
        f"{done.trace.last:.4f}, by {done.engine} {done.engine_version}"
    )
    return small, {
        "engine": done.engine,
        "engine_version": done.engine_version,
        "zero_stage": done.zero_stage,
        "steps": stage.steps,
        "samples": done.trace.samples,
        "seconds": done.trace.seconds,
        "seconds_median_step": median(done.step_seconds),
        "seconds_to_first_step": done.first_step_at,
        "loss_first": done.trace.first,
        "loss_last": done.trace.last,
    }


def _recipe(materials: Materials, model: LanguageModel, compute: Compute, texts: list[Text]) -> dict[str, Any]:
    """All that the weights of the auxiliary model depend on. Equal recipes give equal weights."""
    config = materials.config
    digest = hashlib.sha256()
    for text in texts:
        digest.update(len(text.ids).to_bytes(4, "little") + text.ids.tobytes())
    recipe = {
        "global_model": auxiliary.fingerprint(model),
        "auxiliary": asdict(config.auxiliary) | {"depth": materials.depth},
        "distillation": asdict(replace(config.distillation, reuse=True)),
        "texts": digest.hexdigest()[:16],
        "seed": config.run.seed,
        "device": compute.device.type,
        "dtype": config.server.compute.dtype,
        "threads": compute.threads,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "deepspeed")},
    }
    return json.loads(json.dumps(recipe))


def _find_auxiliary(runs: Path, recipe: dict[str, Any]) -> Path | None:
    found = (path.parent for path in sorted(runs.glob(f"*/auxiliary/{auxiliary.RECIPE}"), reverse=True))
    return next((folder for folder in found if _has_recipe(folder, recipe)), None)


def _has_recipe(folder: Path, recipe: dict[str, Any]) -> bool:
    try:
        return auxiliary.read_recipe(folder).get("recipe") == recipe
    except ValueError:
        return False
