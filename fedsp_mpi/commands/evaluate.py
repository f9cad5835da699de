"""The final test of a finished run once more, driven by lm-eval: with what was tuned, and without
it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from fedsp_mpi import __version__
from fedsp_mpi.comm import Topology
from fedsp_mpi.config import Config, ConfigError
from fedsp_mpi.config.parsing import parse
from fedsp_mpi.data import loading
from fedsp_mpi.data.examples import Example
from fedsp_mpi.files import fingerprint, ownership
from fedsp_mpi.log import Log, duration
from fedsp_mpi.models import backbone
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.models.prompts import Prompt, read_adapter
from fedsp_mpi.record import RecordError, Run, atomic, read
from fedsp_mpi.run.inputs import ExperimentInputs
from fedsp_mpi.training.device import Compute

if TYPE_CHECKING:
    from fedsp_mpi.evaluation.harness import Result

FILE = ownership.EVALUATION
ZERO_SHOT = "zero-shot"
MEASURES = ("acc", "acc_norm", "exact_match")
_SECTIONS = (
    "method",
    "model",
    "data",
    "prompt",
    "evaluation",
)  # of the configuration: what a test depends on


@dataclass(frozen=True)
class Options:
    """What is asked of an evaluation.

    Attributes:
        tasks: lm-eval's names; None is the run's own task.
        limit: the first so many questions of each task; None takes all.
        batch_tokens: positions a forward pass; None takes the run's own number.
        without_prompt: only the model as it was before anything was tuned.
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
        """Raise ValueError on the first that cannot be."""
        for name, value in (("--limit", self.limit), ("--batch-tokens", self.batch_tokens)):
            if value is not None and value < 1:
                raise ValueError(f"{name}: found {value}, expected at least 1")
        if self.tasks is not None and not all(self.tasks):
            raise ValueError(
                f"--tasks: found {','.join(self.tasks)!r}, expected names with a comma between them"
            )
        if self.include is not None and not self.include.is_dir():
            raise ValueError(
                f"--include: found no folder {self.include}, expected one with task "
                "files for lm-eval"
            )


@dataclass(frozen=True)
class EvalRow:
    """One task with one model.

    Attributes:
        method: "zero-shot", or what the run's tables call its method.
        recorded: what the run's own scorer found for this method on the run's own task: n, and
            those of `MEASURES` that it has; None where there is nothing of the kind.
        equal: whether all measures that both have are equal; None where the two did not answer the
            same questions.
    """

    task: str
    filter: str
    method: str
    n: int
    measures: dict[str, float]
    errors: dict[str, float]
    recorded: dict[str, float] | None = None
    equal: bool | None = None


@dataclass(frozen=True)
class Evaluation:
    """What came of it; `about` says with what it was made."""

    folder: Path
    about: dict[str, Any]
    lines: tuple[EvalRow, ...]


def evaluate(run_folder: str | Path, options: Options, log: Log) -> Evaluation:
    """Let lm-eval ask the global model with the tuned prompt and without, or the tuned model and
    the one it was.

    The run's own task asks the run's own test questions, from wherever the run had them; other
    tasks bring their data, from the local cache or the hub.

    Args:
        run_folder: the folder of a complete run, or its run.h5.
        log: told of the progress.

    Raises ValueError if lm-eval is not installed or too old, the run is not complete or its parts
    are not there, or a task cannot be had.
    """
    start = time.perf_counter()
    options.check()
    run = read(run_folder)
    folder, materials = run.file.parent, ExperimentInputs(_config(run, options))
    ownership.require_evaluation(folder / FILE)
    _require_tuned(run, materials.config, folder, options)
    if materials.is_cloze:
        family = materials.model_config.model_type
        raise ValueError(
            f"{folder}: found a run with a {family}, expected a causal model, which is what "
            "lm-eval asks"
        )
    library = _library()
    own, wanted = _wanted(materials, options, library)
    log.say(f"lm-eval {library.VERSION} loads {', '.join(wanted)}")
    tasks = library.load(wanted, options.include)
    compute = Compute.of(materials.config.server.compute, Topology.alone())
    compute.begin()
    lines = []
    for method, model, prompt in _models(materials, folder, compute, options.without_prompt):
        tokens = materials.config.evaluation.batch_tokens
        answers = library.Answers(model, prompt, materials.tokenizer, tokens, method, log)
        recorded = _recorded(run, method) if own in wanted else None
        found = library.measure(tasks, answers, options.limit)
        lines += [
            _line(result, method, recorded if result.task == own else None) for result in found
        ]
    seconds = time.perf_counter() - start
    log.say(f"evaluated in {duration(seconds)}")
    order = list(dict.fromkeys((line.task, line.filter) for line in lines))
    lines.sort(key=lambda line: order.index((line.task, line.filter)))
    return Evaluation(
        folder, _about(run, materials, options, compute, library.VERSION, seconds), tuple(lines)
    )


def text(found: Evaluation) -> str:
    """A table: each task with each model, beside what the run's own scorer found."""
    about, lines = found.about, found.lines
    seen = dict.fromkeys(name for line in lines for name in line.measures)
    shown = [
        *(name for name in MEASURES if name in seen),
        *(name for name in seen if name not in MEASURES),
    ]
    known = [name for name in MEASURES if any(name in (line.recorded or {}) for line in lines)]
    labels = {
        name: f"{name.replace('_match', '')} %" if name in MEASURES else name
        for name in shown + known
    }
    head = ["task", "model", "n", *(labels[name] for name in shown), "std. error"]
    table = _aligned(
        [
            [*head, *(f"run's {labels[name]}" for name in known), "equal"],
            *(_row(line, shown, known) for line in lines),
        ]
    )
    made = f"lm-eval {about['versions']['lm_eval']}, {about['dtype']} on {about['device']}"
    parts = [
        f"run       {about['run']}: {about['model']}",
        f"made with {made}",
        "",
        *table,
        *_remarks(found),
    ]
    return "\n".join(parts)


def write(found: Evaluation) -> Path:
    """Write evaluation.json into the run's folder, whole or not at all; a file of before is
    replaced.

    Raises ValueError if it cannot be written.
    """
    path, lines = found.folder / FILE, [asdict(line) for line in found.lines]
    ownership.require_evaluation(path)
    text = (
        json.dumps({**found.about, "results": _finite(lines)}, indent=2, ensure_ascii=False) + "\n"
    )
    try:
        atomic.write(path, [text.encode()], "the run is as it was")
    except RecordError as error:
        raise ValueError(str(error)) from None
    return path


# -- the run ---------------------------------------------------------------------------------------


def _config(run: Run, options: Options) -> Config:
    """The part of a run's configuration that its test depends on; other keys of other versions do
    no harm.
    """
    found = run.config
    kept = {key: found[key] for key in _SECTIONS if key in found}
    kept["run"] = {
        key: value for key, value in found.get("run", {}).items() if key in ("seed", "label")
    }
    threads = found.get("server", {}).get("compute", {}).get("threads")
    try:
        config: Config = parse(Config, kept, "")
    except ConfigError as error:
        raise ValueError(
            f"{run.file}: {error}; evaluate this run with the version of fedsp_mpi that made it"
        ) from None
    scoring = replace(
        config.evaluation, batch_tokens=options.batch_tokens or config.evaluation.batch_tokens
    )
    compute = replace(
        config.server.compute, device=options.device, dtype=scoring.dtype, threads=threads
    )
    return replace(config, evaluation=scoring, server=replace(config.server, compute=compute))


def _require_tuned(run: Run, config: Config, folder: Path, options: Options) -> None:
    """Raise ValueError if what was tuned is wanted and not there."""
    if options.without_prompt:
        return
    instead = "give --without-prompt to test the model as it was"
    if run.status != "complete":
        raise ValueError(
            f"{folder}: found a run that is {run.status}, expected a complete one; go on "
            "with it by run --resume, or "
            f"{instead}"
        )
    if not (tuned := folder / ("model" if config.tunes_weights else "prompt")).is_dir():
        raise ValueError(
            f"{tuned}: found no such folder, expected what the run has tuned; copy it "
            f"there, or {instead}"
        )
    try:
        fingerprint.require_listed(tuned)
    except ValueError as error:
        raise ValueError(f"{error}; copy the whole run folder again, or {instead}") from None


def _models(
    materials: ExperimentInputs, folder: Path, compute: Compute, without_prompt: bool
) -> Iterator[tuple[str, LanguageModel, Prompt | None]]:
    """Each method with its model and prompt; there is never more than one model in memory."""
    config, name = materials.config, materials.model_name
    method = config.run.label or config.method
    weights = config.tunes_weights and not without_prompt
    model = backbone.load_global(
        str(folder / "model") if weights else name,
        device=compute.device,
        revision=None if weights else config.model.revision,
        dtype=compute.dtype,
    )
    if weights:
        yield method, model, None
        backbone.reread(model, name, revision=config.model.revision, dtype=compute.dtype)
    elif not without_prompt:
        yield method, model, _prompt(materials, folder / "prompt").to(compute.device)
    yield ZERO_SHOT, model, None


def _prompt(materials: ExperimentInputs, folder: Path) -> Prompt:
    """The prompt in a peft adapter. Raises ValueError if it is not one of this run."""
    matrix, spec = (
        read_adapter(folder),
        replace(materials.prompt_spec, projection=None, encoder=None),
    )
    if tuple(matrix.shape) != (spec.num_tokens, spec.row_width):
        raise ValueError(
            f"{folder}: found a prompt of shape {list(matrix.shape)}, expected "
            f"{[spec.num_tokens, spec.row_width]}, "
            f"a {spec.kind} of {spec.num_tokens} tokens for {materials.model_name}; copy "
            "the whole run folder again"
        )
    prompt = Prompt(spec)
    prompt.load({"prompt": matrix.to(torch.float32)})
    return prompt


def _recorded(run: Run, method: str) -> dict[str, float] | None:
    """What the run's own scorer found for a method on the test split."""
    for row in run.results:
        if (row["method"], row["split"]) == (method, "test"):
            known = {name: float(row[name]) for name in MEASURES if not math.isnan(row[name])}
            return {"n": int(row["n"]), **known} if known else None
    return None


# -- tasks -----------------------------------------------------------------------------------------


def _library() -> Any:
    """The adapter, and lm-eval with it."""
    try:
        from fedsp_mpi.evaluation import harness
    except (
        ImportError,
        AttributeError,
    ) as error:  # the latter where an old lm-eval meets a new transformers
        raise ValueError(
            f"evaluate: found no lm-eval that will do ({error}), expected 0.4.12 or later; "
            "pip install 'fedsp_mpi[evaluate]'"
        ) from None
    return harness


def _wanted(
    materials: ExperimentInputs, options: Options, library: Any
) -> tuple[str, dict[str, dict[str, Any] | None]]:
    """The run's own task by lm-eval's name, and all that are asked for, by name, with the own one's
    description.
    """
    ours = materials.task.name
    own = materials.task.lm_eval_name
    names = [own if name == ours else name for name in options.tasks or (ours,)]
    return own, {
        name: _own_task(materials, own, library) if name == own else None for name in names
    }


def _own_task(materials: ExperimentInputs, name: str, library: Any) -> dict[str, Any]:
    """The run's task over its own test rows: in lm-eval's words where it has the task and the rows
    have its columns.
    """
    table, examples = _scored_rows(materials)
    lm_eval = materials.task.lm_eval
    has_columns = lm_eval is not None and set(lm_eval.columns) <= set(table.column_names)
    if has_columns and not materials.is_reworded:
        return library.inherited(name, table)
    metric, rows = materials.task.metric, []
    for example in examples:
        gold: Any = list(example.gold) if metric == "exact_match" else example.gold[0]
        rows.append({"context": example.context, "choices": list(example.choices), "gold": gold})
    return library.standalone(name, metric, type(table).from_list(rows))


def _scored_rows(materials: ExperimentInputs) -> tuple[Any, list[Example]]:
    """The rows of a run's test split, in its order, as a data set, and their examples, without
    those left out.
    """
    config = materials.config
    data = config.data
    return loading.scored_rows(
        materials.task,
        materials.source,
        seed=config.run.seed,
        limit=data.limit.test,
        columns=data.columns,
    )


# -- results ---------------------------------------------------------------------------------------


def _line(result: Result, method: str, recorded: dict[str, float] | None) -> EvalRow:
    equal = None
    if recorded and recorded["n"] == result.n and result.filter == "none":
        both = [name for name in MEASURES if name in recorded and name in result.measures]
        equal = all(recorded[name] == result.measures[name] for name in both) if both else None
    return EvalRow(
        result.task,
        result.filter,
        method,
        result.n,
        result.measures,
        result.errors,
        recorded,
        equal,
    )


def _row(line: EvalRow, shown: Sequence[str], known: Sequence[str]) -> list[str]:
    name = line.task if line.filter == "none" else f"{line.task} ({line.filter})"
    main = next(
        (measure for measure in ("exact_match", "acc", *shown) if measure in line.measures), ""
    )
    recorded = line.recorded or {}
    return [
        name,
        line.method,
        str(line.n or ""),
        *(_cell(measure, line.measures.get(measure)) for measure in shown),
        _cell(main, line.errors.get(main)),
        *(_cell(measure, recorded.get(measure)) for measure in known),
        {True: "yes", False: "no", None: ""}[line.equal],
    ]


def _cell(name: str, value: float | None) -> str:
    """A measure: the package's own in percent, others as lm-eval gives them."""
    if value is None or math.isnan(value):
        return ""
    return f"{100 * value:.2f}" if name in MEASURES else f"{value:.4f}"


def _aligned(lines: list[list[str]]) -> list[str]:
    """Columns, the first two to the left; one without a single entry is left out."""
    shown = [column for column in zip(*lines) if any(column[1:])]
    padded = []
    for place, column in enumerate(shown):
        width = max(map(len, column))
        cells = [
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for cell in (column[0], "-" * width, *column[1:])
        ]
        padded.append(cells)
    return ["  ".join(cells).rstrip() for cells in zip(*padded)]


def _remarks(found: Evaluation) -> list[str]:
    """What the table cannot say."""
    if any(line.equal is False for line in found.lines):
        return [
            "not equal: look for another device, number of threads or version in the run's record"
        ]
    for line in found.lines:
        if line.recorded and line.recorded["n"] != line.n:
            return [
                (
                    f"the run scored {line.recorded['n']} questions of {line.task}, not {line.n}: "
                    "nothing is compared"
                )
            ]
    return []


def _about(
    run: Run,
    materials: ExperimentInputs,
    options: Options,
    compute: Compute,
    version: str,
    seconds: float,
) -> dict[str, Any]:
    """With what an evaluation was made."""
    config = materials.config
    return {
        "run": run.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"fedsp_mpi": __version__, "lm_eval": version, "torch": torch.__version__},
        "model": config.model.name,
        "own_task": {"name": config.data.task, "source": config.data.source},
        "limit": options.limit,
        "batch_tokens": config.evaluation.batch_tokens,
        "dtype": config.evaluation.dtype,
        "device": str(compute.device),
        "threads": compute.threads,
        "seconds": round(seconds, 2),
    }


def _finite(value: Any) -> Any:
    """The same for JSON, which has no nan and no infinity."""
    if isinstance(value, Mapping):
        return {key: _finite(below) for key, below in value.items()}
    if isinstance(value, list):
        return [_finite(below) for below in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
