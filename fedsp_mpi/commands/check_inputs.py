"""Check what a run reads and writes: model and data, memory and disk, the folders of all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedsp_mpi.comm import Handout, diagnostics
from fedsp_mpi.commands.check_report import CheckReport, Status
from fedsp_mpi.config import Config
from fedsp_mpi.files.untrusted import JsonMapping, JsonObject
from fedsp_mpi.log import one_line
from fedsp_mpi.record import probe
from fedsp_mpi.report.formatting import as_gib
from fedsp_mpi.run.devices import format_ranges
from fedsp_mpi.tensors import NamedTensors, Schema

if TYPE_CHECKING:
    from fedsp_mpi.estimate.memory import ModelSizes
    from fedsp_mpi.run.silos import OpenSilos

# Share of the free memory above which an estimate is tight, because it is rough.
_TIGHT = 0.8


@dataclass(frozen=True)
class FolderView:
    """What a rank sees of the folders that the server named.

    Attributes:
        folder: what is wrong with the run folder, by "reading", "writing" and "locking".
        missing: folders of the run's inputs that are not there.
    """

    folder: dict[str, str]
    missing: list[str]

    @classmethod
    def of(cls, meta: JsonMapping, rank: int) -> FolderView:
        """Look at the folders that the hand-out's `meta` names, on this rank."""
        folder = probe.look(Path(meta["probe"]), rank) if meta["probe"] else {}
        return cls(folder, [path for path in meta["inputs"] if not Path(path).is_dir()])

    @classmethod
    def from_json(cls, values: JsonMapping) -> FolderView:
        """Read what `to_json` wrote."""
        return cls(values["folder"], values["missing"])

    def to_json(self) -> JsonObject:
        """Return plain values for the wire."""
        return asdict(self)


class ServerChecks:
    """The server's part of the check: model and data, memory and disk, the run folder.

    Args:
        report: gets the findings.
        config: checked.
        ranks: the introductions of all ranks.
        silos: those of the clients, opened; None: there are none, or they cannot be placed.
    """

    def __init__(
        self,
        report: CheckReport,
        config: Config,
        ranks: Sequence[JsonMapping],
        *,
        silos: OpenSilos | None = None,
    ) -> None:
        from fedsp_mpi.run.any_inputs import inputs_of

        self._report = report
        self._config = config
        self._ranks = ranks
        self._silos = silos
        self._inputs = silos.inputs if silos else inputs_of(config)
        self._probe: probe.Probe | None = None
        # Folders that every rank reads, and the status where one is not seen.
        self._folders: dict[str, Status] = {}

    def check_inputs(self) -> Handout:
        """Check what only the server sees.

        Returns:
            A hand-out that tells the other ranks which folders to look at, and the size of what
            travels in a run.
        """
        sizes = self._check_model_and_data()
        if sizes:
            self._check_memory(sizes)
        self._check_disk(sizes)
        if sizes:
            self._folders = self._input_folders()
        meta = {
            "probe": str(self._probe.folder) if self._probe else None,
            "inputs": list(self._folders),
        }
        no_tensors = NamedTensors(Schema(), np.empty(0, dtype=np.float32))
        return Handout(meta, no_tensors, diagnostics.contract(sizes.wire if sizes else 1))

    def _check_model_and_data(self) -> ModelSizes | None:
        """Check model and data as a run does, but load no weights.

        Returns:
            The model's sizes; None if they are not known.
        """
        from fedsp_mpi.estimate.memory import ModelSizes
        from fedsp_mpi.record import event_files
        from fedsp_mpi.run import build

        inputs = self._inputs
        max_length = 0
        try:
            if inputs.config.record.tensorboard:
                event_files.require_library()
            inputs.check()
            build.method_of(inputs)
            max_length = self._longest()
            model = inputs.model_config
            splits = inputs.splits
            self._report.add(
                "ok",
                "model, data",
                f"{self._config.model.name}: {model.model_type}, {model.num_hidden_layers} "
                f"layers; {self._config.data.task}: {self._sizes_of_splits()}",
            )
            for note in splits.notes:
                self._report.add("ok", "rows", note)
            for warning in inputs.warnings:
                self._report.add("warn", "rows", warning)
        except (ValueError, OSError) as error:
            self._report.add("FAIL", "model, data", one_line(error))
        try:
            return ModelSizes.of(inputs, max_length or inputs.max_length)
        except (ValueError, OSError):
            return None

    def _sizes_of_splits(self) -> str:
        """Return the numbers of examples; where clients have silos, of the server's own."""
        splits = self._inputs.splits
        sizes = (
            f"{len(splits.train)} train, {len(splits.validation)} validation, "
            f"{len(splits.test)} test"
        )
        if not self._config.federation.silos:
            return sizes
        if not any((splits.train, splits.validation, splits.test)):
            return "the server owns no text"
        owner = "the experts'" if self._config.tiers.experts else "the server's"
        return f"{owner} {sizes}"

    def _longest(self) -> int:
        """Return the number of tokens of the longest text; 0 if it is not known."""
        inputs = self._inputs
        lengths = [len(text.ids) for text in (*inputs.shard(0), *inputs.validation)]
        declarations = self._silos.declarations if self._silos else ()
        for item in declarations:
            if item.error is None and item.longest is None:
                return 0
            lengths.append(item.longest or 0)
        return max(lengths, default=0)

    def _check_memory(self, sizes: ModelSizes) -> None:
        """Compare the memory that a run needs on each host and GPU with what is free there."""
        from fedsp_mpi.estimate import memory

        assignment = self._silos.assignment if self._silos else None
        for budget in memory.plan(self._config, sizes, self._ranks, assignment=assignment):
            finding = (
                f"{budget.place}: about {as_gib(budget.needed)} needed, {as_gib(budget.free)} free"
            )
            if budget.needed > budget.free:
                advice = "take more hosts, fewer ranks on each, or smaller micro-batches"
                self._report.add("FAIL", "memory", f"{finding}; {advice}")
            elif budget.needed > _TIGHT * budget.free:
                self._report.add("warn", "memory", finding)
            else:
                self._report.add("ok", "memory", finding)

    def _check_disk(self, sizes: ModelSizes | None) -> None:
        """Begin the probe of the run folder, and compare the size of a run with what is free."""
        from fedsp_mpi.estimate import memory

        try:
            self._probe = probe.Probe(Path(self._config.run.folder))
        except OSError as error:
            self._report.add("FAIL", "run folder", one_line(error))
            return
        free = self._probe.free
        needed = memory.disk(self._config, sizes) if sizes else 0
        parent = self._probe.folder.parent
        finding = f"{parent}: about {as_gib(needed)} needed, {as_gib(free)} free"
        if needed > free:
            advice = "free some space, choose another run.folder, or lower checkpoint.keep"
            self._report.add("FAIL", "disk", f"{finding}; {advice}")
        else:
            self._report.add("ok", "disk", finding)

    def _input_folders(self) -> dict[str, Status]:
        """Return the folders that every rank reads, and the status where one is not seen."""
        from fedsp_mpi.models import hub

        inputs = self._inputs
        model = self._config.model
        # Where the hub's cache is not shared, ranks may reach the hub, or have a cache elsewhere.
        cache = hub.locate(inputs.model_name, model.revision, "config.json")
        folders: dict[str, Status] = {str(cache.absolute()): "warn"}
        for name in (inputs.model_name, model.tokenizer, *inputs.shared_sources):
            if name:
                path = Path(name).expanduser()
                if path.is_dir():
                    folders[str(path.absolute())] = "FAIL"
        return folders

    def check_views(self, views: Sequence[FolderView]) -> None:
        """Check what every rank sees of the folders, by rank."""
        for path, status in self._folders.items():
            blind = [number for number, view in enumerate(views) if path in view.missing]
            if blind:
                self._report.add(
                    status,
                    "inputs",
                    f"rank {format_ranges(blind)} does not see {path}, expected it on every host",
                )
        if not self._probe:
            return
        problems = [
            problem
            for number, view in enumerate(views)
            for problem in self._folder_problems(number, view)
        ]
        for problem in problems:
            self._report.add("FAIL", "run folder", problem)
        if not problems:
            parent = self._probe.folder.parent
            self._report.add(
                "ok", "run folder", f"{parent}: all ranks write and see files, renames work"
            )
        for problem in {view.folder["locking"] for view in views if "locking" in view.folder}:
            self._report.add(
                "warn",
                "run folder",
                f"{problem}: only a note in the folder keeps two jobs from one run",
            )

    def clean_up(self) -> None:
        """Remove what the check wrote into the run folder."""
        if self._probe:
            self._probe.remove()

    def _folder_problems(self, number: int, view: FolderView) -> list[str]:
        """Return what keeps a rank from sharing the run folder; locks are not among it."""
        assert self._probe is not None
        rank = f"rank {number} on {self._ranks[number]['host']}"
        problems = [
            f"{rank} {problem}" for kind, problem in view.folder.items() if kind != "locking"
        ]
        if not problems and not self._probe.heard_from(number):
            parent = self._probe.folder.parent
            problems = [f"the server does not see what {rank} wrote into {parent}"]
        return [f"{problem}; expected one folder that all hosts share" for problem in problems]
