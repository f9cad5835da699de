"""Repeat the final test of a finished run with lm-eval: with what was tuned, and without it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch

from fedsp_mpi import __version__
from fedsp_mpi.comm import Topology
from fedsp_mpi.commands.evaluation_results import FILE, MEASURES, Evaluation, compare
from fedsp_mpi.config import Config, ConfigError
from fedsp_mpi.config.parsing import parse
from fedsp_mpi.data import loading
from fedsp_mpi.data.examples import Example
from fedsp_mpi.data.forms import Table
from fedsp_mpi.files import fingerprint, ownership
from fedsp_mpi.files.untrusted import JsonObject
from fedsp_mpi.log import Log, duration
from fedsp_mpi.models import backbone, lora
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.models.prompts import Prompt, read_adapter
from fedsp_mpi.record import Run, read
from fedsp_mpi.run.any_inputs import inputs_of
from fedsp_mpi.run.inputs import ExperimentInputs
from fedsp_mpi.training.device import Compute

ZERO_SHOT = "zero-shot"
# Sections of the configuration that a test depends on.
_SECTIONS = ("method", "model", "data", "prompt", "lora", "evaluation")


@dataclass(frozen=True)
class Options:
    """What an evaluation is to do.

    Attributes:
        tasks: lm-eval's names; None for the run's own task.
        limit: first questions of each task; None for all.
        batch_tokens: positions per forward pass; None for the run's own number.
        without_prompt: test only the model as it was before anything was tuned.
        device: "auto", "cpu" or "cuda".
        include: a folder with the user's own task files for lm-eval.
    """

    tasks: tuple[str, ...] | None = None
    limit: int | None = None
    batch_tokens: int | None = None
    without_prompt: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    include: Path | None = None

    def check(self) -> None:
        """Raise ValueError on the first option that is not valid."""
        for name, value in (("--limit", self.limit), ("--batch-tokens", self.batch_tokens)):
            if value is not None and value < 1:
                raise ValueError(f"{name}: found {value}, expected at least 1")
        if self.tasks is not None and not all(self.tasks):
            raise ValueError(
                f"--tasks: found {','.join(self.tasks)!r}, expected names with a comma between them"
            )
        if self.include is not None and not self.include.is_dir():
            raise ValueError(
                f"--include: found no folder {self.include}, expected one with task files for "
                "lm-eval"
            )


def evaluate(run_folder: str | Path, options: Options, log: Log) -> Evaluation:
    """Let lm-eval test what a run has tuned, and the model as it was before.

    The run's own task asks the run's own test questions, from wherever the run had them; other
    tasks bring their data, from the local cache or the hub.

    Args:
        run_folder: the folder of a complete run, or its run.h5.
        options: tasks and limits.
        log: gets the progress.

    Raises:
        ValueError: lm-eval is not installed or too old, the run is not complete or its parts are
            missing, or a task cannot be loaded.
    """
    start = time.perf_counter()
    options.check()
    run = read(run_folder)
    folder = run.file.parent
    config = _config(run, options)
    if config.method_facts.has_tiers:
        raise ValueError(
            f"{folder}: found a run with method={config.method}, whose domains have tasks of their "
            "own, expected one task for all; measure it by ask --evaluate"
        )
    if config.classifies and not options.without_prompt:
        raise ValueError(
            f"{folder}: found a run with method=head, whose answers are classes, expected one that "
            "answers in words, as lm-eval asks; report has its score, and --without-prompt tests "
            "the model as it was"
        )
    inputs = inputs_of(config)
    ownership.require_evaluation(folder / FILE)
    _require_tuned(run, inputs.config, folder, options=options)
    if inputs.is_cloze:
        raise ValueError(
            f"{folder}: found a run with a {inputs.model_config.model_type}, expected a causal "
            "model, the only kind that lm-eval tests"
        )
    harness = _import_harness()
    own_task = inputs.task.lm_eval_name
    _require_text(inputs, own_task, options)
    specs = _task_specs(inputs, own_task, options, harness=harness)
    log.say(f"lm-eval {harness.VERSION} loads {', '.join(specs)}")
    loaded = harness.load(specs, options.include)
    compute = Compute.of(inputs.config.server.compute, Topology.alone())
    compute.begin()
    rows = []
    for method, model, prompt in _models(
        inputs, folder, compute, without_prompt=options.without_prompt
    ):
        prompted_model = harness.PromptedLM(
            model,
            prompt,
            inputs.tokenizer,
            batch_tokens=inputs.config.evaluation.batch_tokens,
            label=method,
            log=log,
        )
        recorded = _recorded(run, method)
        for result in harness.measure(loaded, prompted_model, options.limit):
            is_own = result.task == own_task and own_task in specs
            rows.append(compare(result, method, recorded if is_own else None))
    seconds = time.perf_counter() - start
    log.say(f"evaluated in {duration(seconds)}")
    order = list(dict.fromkeys((row.task, row.filter) for row in rows))
    rows.sort(key=lambda row: order.index((row.task, row.filter)))
    provenance = _provenance(
        run, inputs, options, compute=compute, lm_eval_version=harness.VERSION, seconds=seconds
    )
    return Evaluation(folder, provenance, tuple(rows))


# -- the run ---------------------------------------------------------------------------------------


def _config(run: Run, options: Options) -> Config:
    """Return the part of a run's configuration that its test depends on.

    Other keys are left out, so that those of other versions of the package do no harm.

    Raises:
        ValueError: the part has keys that this version does not know.
    """
    recorded = run.config
    sections = {key: recorded[key] for key in _SECTIONS if key in recorded}
    silos = recorded.get("federation", {}).get("silos")
    if silos:
        names = [{"name": silo["name"], "source": silo["source"]} for silo in silos]
        sections["federation"] = {"silos": names}
        sections["server"] = {"data": recorded["server"]["data"]}
    sections["run"] = {
        key: value for key, value in recorded.get("run", {}).items() if key in ("seed", "label")
    }
    try:
        config: Config = parse(Config, sections, "")
    except ConfigError as error:
        raise ValueError(
            f"{run.file}: {error}; evaluate this run with the version of fedsp_mpi that made it"
        ) from None
    batch_tokens = options.batch_tokens or config.evaluation.batch_tokens
    compute = replace(
        config.server.compute,
        device=options.device,
        dtype=config.evaluation.dtype,
        threads=recorded.get("server", {}).get("compute", {}).get("threads"),
    )
    return replace(
        config,
        evaluation=replace(config.evaluation, batch_tokens=batch_tokens),
        server=replace(config.server, compute=compute),
    )


def _require_tuned(run: Run, config: Config, folder: Path, *, options: Options) -> None:
    """Raise ValueError if what was tuned is to be tested, and is not complete."""
    if options.without_prompt:
        return
    alternative = "give --without-prompt to test the model as it was"
    if run.status != "complete":
        raise ValueError(
            f"{folder}: found a run that is {run.status}, expected a complete one; go on with it "
            f"by run --resume, or {alternative}"
        )
    tuned = folder / config.tuned_folder
    if not tuned.is_dir():
        raise ValueError(
            f"{tuned}: found no such folder, expected what the run has tuned; copy it there, or "
            f"{alternative}"
        )
    try:
        fingerprint.require_digests(tuned)
    except ValueError as error:
        raise ValueError(f"{error}; copy the whole run folder again, or {alternative}") from None


def _require_text(inputs: ExperimentInputs, own_task: str, options: Options) -> None:
    """Raise ValueError if the run's own task is asked for, and the server owns no text.

    Args:
        inputs: of the run.
        own_task: lm-eval's name of the run's own task.
        options: with the tasks.
    """
    if not inputs.config.federation.silos or inputs.source is not None:
        return
    if set(options.tasks or (own_task,)) & {own_task, inputs.task.name}:
        raise ValueError(
            "server.data.source: found a run whose server owns no text, expected some to test "
            f"{inputs.task.name} on: what silos hold back is theirs; name tasks with data of "
            "their own by --tasks"
        )


def _models(
    inputs: ExperimentInputs, folder: Path, compute: Compute, *, without_prompt: bool
) -> Iterator[tuple[str, LanguageModel, Prompt | None]]:
    """Yield each method with its model and prompt; there is never more than one model in memory.

    Args:
        inputs: of the run.
        folder: of the run.
        compute: device and dtype.
        without_prompt: yield only the model as it was.
    """
    config = inputs.config
    method = config.run.label or config.method
    has_tuned_weights = config.trains_all_weights and not without_prompt
    model = backbone.load_global(
        str(folder / "model") if has_tuned_weights else inputs.model_name,
        device=compute.device,
        revision=None if has_tuned_weights else config.model.revision,
        dtype=compute.dtype,
    )
    if has_tuned_weights:
        yield method, model, None
        backbone.reload(
            model, inputs.model_name, revision=config.model.revision, dtype=compute.dtype
        )
    elif config.adapts and not without_prompt:
        adapters = lora.Lora(model, config.lora)
        adapters.load(lora.read(folder / config.tuned_folder))
        yield method, model, None
        adapters.clear()
    elif not without_prompt:
        yield method, model, _prompt(inputs, folder / "prompt").to(compute.device)
    yield ZERO_SHOT, model, None


def _prompt(inputs: ExperimentInputs, folder: Path) -> Prompt:
    """Read the prompt of a peft adapter.

    Raises:
        ValueError: it has another shape than this run's.
    """
    matrix = read_adapter(folder)
    spec = replace(inputs.prompt_spec, projection=None, encoder=None)
    if inputs.config.in_words:  # as many tokens as the instruction has
        spec = replace(spec, num_tokens=min(len(matrix), spec.num_tokens))
    if tuple(matrix.shape) != (spec.num_tokens, spec.row_width):
        raise ValueError(
            f"{folder}: found a prompt of shape {list(matrix.shape)}, expected "
            f"{[spec.num_tokens, spec.row_width]}, a {spec.kind} of {spec.num_tokens} tokens for "
            f"{inputs.model_name}; copy the whole run folder again"
        )
    prompt = Prompt(spec)
    prompt.load({"prompt": matrix.to(torch.float32)})
    return prompt


def _recorded(run: Run, method: str) -> dict[str, float] | None:
    """Return what the run's own scorer found for a method on the test split."""
    for row in run.results:
        if row["method"] == method and row["split"] == "test":
            measures = {name: float(row[name]) for name in MEASURES if not math.isnan(row[name])}
            return {"n": int(row["n"]), **measures} if measures else None
    return None


# -- tasks -----------------------------------------------------------------------------------------


def _import_harness() -> ModuleType:
    """Import the adapter, and lm-eval with it.

    Raises:
        ValueError: lm-eval is not installed, or not usable.
    """
    try:
        from fedsp_mpi.evaluation import harness
    # AttributeError where an old lm-eval meets a new transformers.
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"evaluate: found no usable lm-eval ({error}), expected 0.4.12 or later; "
            "pip install 'fedsp_mpi[evaluate]'"
        ) from None
    return harness


def _task_specs(
    inputs: ExperimentInputs, own_task: str, options: Options, *, harness: ModuleType
) -> dict[str, JsonObject | None]:
    """Return the tasks to load by lm-eval's name; only the run's own has a configuration.

    Args:
        inputs: of the run.
        own_task: lm-eval's name of the run's own task.
        options: with the tasks, which may be named by our names too.
        harness: the adapter.
    """
    specs: dict[str, JsonObject | None] = {}
    for name in options.tasks or (own_task,):
        if name in (own_task, inputs.task.name):
            specs[own_task] = _own_task_spec(inputs, own_task, harness)
        else:
            specs[name] = None
    return specs


def _own_task_spec(inputs: ExperimentInputs, name: str, harness: ModuleType) -> JsonObject:
    """Return the run's task over its own test rows.

    In lm-eval's words where it has the task, and the rows have its columns.

    Args:
        inputs: of the run.
        name: lm-eval's.
        harness: the adapter.
    """
    rows, examples = _scored_rows(inputs)
    lm_eval_task = inputs.task.lm_eval
    has_columns = lm_eval_task is not None and set(lm_eval_task.columns) <= set(rows.column_names)
    if has_columns and not inputs.is_reworded:
        return harness.inherited(name, rows)
    metric = inputs.task.metric
    documents = []
    for example in examples:
        gold: int | list[int] = list(example.gold) if metric == "exact_match" else example.gold[0]
        documents.append(
            {"context": example.context, "choices": list(example.choices), "gold": gold}
        )
    return harness.standalone(name, metric, type(rows).from_list(documents))


def _scored_rows(inputs: ExperimentInputs) -> tuple[Table, list[Example]]:
    """Return the rows of a run's test split as a data set, and their examples.

    They are in the run's order, without the rows that it left out.
    """
    config = inputs.config
    data = config.data
    has_silos = bool(config.federation.silos)
    server_columns = config.server.data.columns if has_silos else {}
    return loading.scored_rows(
        inputs.task,
        inputs.source,
        seed=config.run.seed,
        limit=data.limit.test,
        columns=server_columns or data.columns,
        owner="server" if has_silos else "all",
    )


def _provenance(
    run: Run,
    inputs: ExperimentInputs,
    options: Options,
    *,
    compute: Compute,
    lm_eval_version: str,
    seconds: float,
) -> JsonObject:
    """Return model, versions and settings of an evaluation, as JSON.

    Args:
        run: that is tested.
        inputs: of the run.
        options: of the evaluation.
        compute: device and threads.
        lm_eval_version: of the library.
        seconds: wall time.
    """
    config = inputs.config
    source = config.server.data.source if config.federation.silos else config.data.source
    return {
        "run": run.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "fedsp_mpi": __version__,
            "lm_eval": lm_eval_version,
            "torch": torch.__version__,
        },
        "model": config.model.name,
        "own_task": {"name": config.data.task, "source": source},
        "limit": options.limit,
        "batch_tokens": config.evaluation.batch_tokens,
        "dtype": config.evaluation.dtype,
        "device": str(compute.device),
        "threads": compute.threads,
        "seconds": round(seconds, 2),
    }
