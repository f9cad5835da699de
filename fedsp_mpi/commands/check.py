"""Before training: what would stop a run, slow it down or change its bits, found by all ranks
together in seconds.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fedsp_mpi import comm
from fedsp_mpi.comm import Handout, diagnostics
from fedsp_mpi.config import Config
from fedsp_mpi.config.parsing import differences
from fedsp_mpi.log import Log, one_line
from fedsp_mpi.record import probe
from fedsp_mpi.run import devices as placement
from fedsp_mpi.run import execute
from fedsp_mpi.run.devices import DeviceInfo
from fedsp_mpi.run.devices import format_ranges as spans
from fedsp_mpi.run.environment import VERSIONS
from fedsp_mpi.tensors import NamedTensors, Schema

if TYPE_CHECKING:
    from fedsp_mpi.comm.solo import Solo
    from fedsp_mpi.comm.wire import Wire
    from fedsp_mpi.estimate.memory import Sizes

Mark = Literal["ok", "warn", "FAIL"]
_SKEW = 1.0  # seconds between two clocks above which their lines in logs and file times mislead
_CLOSE = 0.8  # of the free memory: above this a plan is tight, because it is rough


class CheckReport:
    """The findings, told as they come: `ok / warn / FAIL`, what was looked at, what was found."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self.failures: list[str] = []
        self.warnings = 0

    def add(self, mark: Mark, what: str, found: str) -> None:
        """Tell one finding; `warn`: a run works, but slower or less safely than it could; `FAIL`:
        it would not work.
        """
        self.failures += [f"{what}: {found}"] if mark == "FAIL" else []
        self.warnings += mark == "warn"
        self._log.say(f"{mark:<6}{what:<15}{found}")

    def verdict(self) -> comm.Refused | None:
        """The first failure, or None."""
        more = f" (and {len(self.failures) - 1} more)" if len(self.failures) > 1 else ""
        return comm.Refused(f"check: {self.failures[0]}{more}") if self.failures else None


def check(config: Config, log: Log, *, error: ValueError | None = None) -> None:
    """Look at everything that a run of this configuration needs; every rank calls this.

    Args:
        config: checked.
        log: gets the table; speaks on the server only.
        error: what is wrong with the configuration on this rank; `config` is the default one then.

    Raises comm.Refused on every rank if anything failed.
    """
    wire = execute.connect(config)
    table = CheckReport(log)
    ranks = wire.collect(_introduction(config, wire, error)) or []
    agreed = not ranks or _check_ranks(table, config, ranks, error)
    wire.agree(None if agreed else table.verdict())
    here = _Preparation(table, config, ranks) if wire.is_server else None
    try:
        given = wire.handout(here.handout() if here else None)
        looks = wire.collect(_look(given.meta, wire.topology.rank))
        if here and looks:
            here.hear(looks)
    finally:
        if here:
            here.tidy()
    _check_wire(table, wire, ranks, given.contract.up.num_values)
    if ranks:
        log.say(f"{len(table.failures)} failed, {table.warnings} to look at")
    wire.agree(table.verdict() if wire.is_server else None)
    wire.finish()


# What every rank says of itself.


def _introduction(config: Config, wire: Wire | Solo, error: ValueError | None) -> dict[str, Any]:
    here = wire.topology
    versions = {name: _version(name) for name in ("fedsp_mpi", *VERSIONS)}
    said = {
        "host": here.host,
        "place": f"local rank {here.local_rank} of {here.local_size}",
        "cores": sorted(os.sched_getaffinity(0)),
        "memory": diagnostics.free_memory(),
        "versions": {"python": platform.python_version(), **versions},
        **diagnostics.library(wire),
    }
    if error is not None:
        return said | {"mistake": one_line(error), "config": None, "devices": {}}
    devices = {role: d.to_json() for role, d in placement.devices(config, here).items()}
    return said | {"config": asdict(config), "devices": devices}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


# What the server makes of it.


def _check_ranks(
    table: CheckReport, config: Config, ranks: list[dict[str, Any]], error: ValueError | None
) -> bool:
    """Everything that the introductions tell. False if they do not agree on one configuration."""
    if error is None:
        _check_world(table, config, len(ranks))
    _same(table, "MPI", [f"{rank['library']}, thread level {rank['level']}" for rank in ranks])
    _check_versions(table, [rank["versions"] for rank in ranks])
    agreed = _check_configuration(table, ranks)
    for number, rank in enumerate(ranks):
        devices = [_name_of(role, device) for role, device in rank["devices"].items()]
        table.add(
            "ok",
            f"rank {number}",
            ", ".join([rank["host"], rank["place"], f"cores {spans(rank['cores'])}", *devices]),
        )
    _check_devices(table, ranks)
    _check_threads(table, ranks)
    return agreed


def _check_world(table: CheckReport, config: Config, size: int) -> None:
    """The number of ranks against the launcher's, the configuration's, and that of the clients."""
    tasks = os.environ.get("SLURM_NTASKS", "")
    clients, wanted, servers = (
        config.federation.clients,
        config.topology.ranks,
        config.topology.server_ranks,
    )
    rest = size - servers
    found = (
        f"{size} ranks: {servers} server, {rest} for {clients} clients"
        if size > 1
        else "1 process plays all ranks"
    )
    idle = tasks.isdecimal() and int(tasks) > size
    mark: Mark = "warn" if idle else "ok"
    if wanted is not None and size != wanted:
        mark, found = (
            "FAIL",
            f"found {size} ranks, expected topology.ranks={wanted}; start that many processes",
        )
    elif rest > clients > 0:
        mark, found = (
            "FAIL",
            (
                f"found {found}, expected a client for each; start {clients + servers} "
                "processes or fewer"
            ),
        )
    elif servers > 1 and rest < 1:
        mark, found = (
            "FAIL",
            (
                f"found {found}, expected one for clients at least; start {servers + 1} "
                "processes or more"
            ),
        )
    elif idle and size == 1:
        found += f", in the shell of a Slurm job of {tasks} tasks; start all of them with srun or mpirun before python"
    elif idle:
        found += f"; the Slurm job has {tasks} tasks, and cores for those will idle"
    table.add(mark, "world", found)


def _same(table: CheckReport, what: str, values: Sequence[str]) -> None:
    """One line if all ranks say the same, else who says what."""
    groups: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        groups.setdefault(value, []).append(rank)
    if len(groups) == 1:
        table.add("ok", what, values[0])
        return
    said = "; ".join(f"{value} on rank {spans(ranks)}" for value, ranks in groups.items())
    table.add(
        "FAIL", what, f"found {said}; expected the same on all ranks: start them in one environment"
    )


def _check_versions(table: CheckReport, versions: list[dict[str, str]]) -> None:
    wrong = [name for name in versions[0] if len({some[name] for some in versions}) > 1]
    for name in wrong:
        _same(table, "versions", [f"{name} {some[name]}" for some in versions])
    if absent := [
        name for name in versions[0] if name not in wrong and versions[0][name] == "not installed"
    ]:
        table.add(
            "FAIL",
            "versions",
            f"found no {', '.join(absent)}, expected what setup.py asks for; install it",
        )
    elif not wrong:
        shown = ", ".join(
            f"{name} {versions[0][name]}" for name in ("fedsp_mpi", "python", "torch")
        )
        table.add(
            "ok", "versions", f"{shown} and {len(versions[0]) - 3} more are the same on all ranks"
        )


def _name_of(role: str, device: dict[str, Any]) -> str:
    uuid = f" GPU-{device['uuid'].removeprefix('GPU-')}" if "uuid" in device else ""
    return f"{role} on {device['name']}{uuid}, threads {device['threads']}"


def _check_devices(table: CheckReport, ranks: list[dict[str, Any]]) -> None:
    """Devices that are not there, GPUs that several ranks share, and CPUs that have no units for a
    type.
    """
    slow: dict[str, list[int]] = {}
    for number, rank in enumerate(ranks):
        for role, device in rank["devices"].items():
            if "error" in device:
                table.add("FAIL", "device", f"rank {number} on {rank['host']}: {device['error']}")
            if "emulates" in device:
                slow.setdefault(f"{role}.compute.dtype={device['emulates']}", []).append(number)
    for setting, some in slow.items():
        found = (
            f"{setting} on rank {spans(some)}, whose CPU has no units for it and is faster "
            "with float32"
        )
        table.add("warn", "device", found)
    devices = [
        {role: DeviceInfo.from_json(device, number) for role, device in rank["devices"].items()}
        for number, rank in enumerate(ranks)
    ]
    for uuid, some in placement.shared_gpus(devices).items():
        servers = [number for number in some if "server" in ranks[number]["devices"]]
        found = f"GPU-{uuid.removeprefix('GPU-')} is shared by ranks {spans(some)}"
        if len(servers) > 1:
            table.add(
                "FAIL", "device", f"found that {found}, expected one for each rank of the server"
            )
        else:
            table.add("warn", "device", found)


def _check_threads(table: CheckReport, ranks: list[dict[str, Any]]) -> None:
    """Threads that the configuration asks for against the cores that each rank, and each host's
    ranks, may use.
    """
    hosts: dict[str, list[int]] = {}
    for number, rank in enumerate(ranks):
        hosts.setdefault(rank["host"], []).append(number)
    for host, some in hosts.items():
        # One process plays its roles in turn.
        threads = [
            max((d["threads"] for d in ranks[n]["devices"].values()), default=0) for n in some
        ]
        cores = {core for number in some for core in ranks[number]["cores"]}
        crowded = [
            number for number, count in zip(some, threads) if count > len(ranks[number]["cores"])
        ]
        found = f"{host}: {sum(threads)} threads in all, {len(cores)} cores"
        trouble = (
            f", but rank {spans(crowded)} is bound to fewer than its threads" if crowded else ""
        )
        if sum(threads) > len(cores):
            trouble = "; ranks will wait for each other: take fewer ranks, or fewer threads"
        table.add("warn" if trouble else "ok", "cores", found + trouble)


def _check_configuration(table: CheckReport, ranks: list[dict[str, Any]]) -> bool:
    for number, rank in enumerate(ranks):
        if "mistake" in rank:
            table.add("FAIL", "configuration", rank["mistake"])
            return False
        if changed := differences(ranks[0]["config"], rank["config"]):
            table.add(
                "FAIL",
                "configuration",
                f"rank {number} on {rank['host']} found another one than the server "
                f"({'; '.join(changed)}), expected "
                "the same on every rank; put the file where all hosts see it",
            )
            return False
    digest = hashlib.sha256(repr(ranks[0]["config"]).encode()).hexdigest()[:12]
    table.add("ok", "configuration", f"digest {digest} on all ranks")
    return True


class _Preparation:
    """The server's own part of the check: model and data, the plans of memory and disk, the run
    folder.
    """

    def __init__(self, table: CheckReport, config: Config, ranks: list[dict[str, Any]]) -> None:
        from fedsp_mpi.run.inputs import ExperimentInputs

        self._table, self._config, self._ranks = table, config, ranks
        self._materials = ExperimentInputs(config)
        self._probe: probe.Probe | None = None
        self._folders: dict[str, Mark] = {}

    def handout(self) -> Handout:
        """Look at all that only the server sees; what the others are to look for, and to send."""
        from fedsp_mpi.estimate import memory

        sizes = self._check_inputs()
        for place in memory.plan(self._config, sizes, self._ranks) if sizes else []:
            self._judge(*place)
        self._check_folder(sizes)
        self._folders = self._inputs() if sizes else {}
        meta = {
            "probe": str(self._probe.folder) if self._probe else None,
            "inputs": list(self._folders),
        }
        nothing = NamedTensors(Schema(), np.empty(0, dtype=np.float32))
        return Handout(meta, nothing, diagnostics.contract(sizes.wire if sizes else 1))

    def _check_inputs(self) -> Sizes | None:
        """Model and data as a run checks them, without weights.

        None if the model's sizes are not known.
        """
        from fedsp_mpi.estimate.memory import Sizes

        materials, length = self._materials, 0
        try:
            materials.check()
            length = max(len(text.ids) for text in (*materials.shard(0), *materials.validation))
            model, splits = materials.model_config, materials.splits
            sizes = (
                f"{len(splits.train)} train, {len(splits.validation)} validation, "
                f"{len(splits.test)} test"
            )
            found = (
                f"{self._config.model.name}: {model.model_type}, {model.num_hidden_layers} layers"
            )
            self._table.add("ok", "model, data", f"{found}; {self._config.data.task}: {sizes}")
            for note in materials.warnings:
                self._table.add("warn", "rows", note)
        except (ValueError, OSError) as error:
            self._table.add("FAIL", "model, data", one_line(error))
        try:
            return Sizes.of(materials, length or materials.max_length)
        except (ValueError, OSError):
            return None

    def _inputs(self) -> dict[str, Mark]:
        """The folders that every rank reads, and how bad it is where one is not seen."""
        from fedsp_mpi.models import hub

        materials, model = self._materials, self._config.model
        named = [
            Path(name).expanduser()
            for name in (materials.model_name, model.tokenizer, materials.source)
            if name
        ]
        # Where the hub's cache is not shared, ranks may reach the hub, or have a cache elsewhere.
        cache = hub.locate(materials.model_name, model.revision, "config.json")
        folders: dict[str, Mark] = {str(cache.absolute()): "warn"}
        return folders | {str(path.absolute()): "FAIL" for path in named if path.is_dir()}

    def _judge(self, where: str, need: int, free: int) -> None:
        found = f"{where}: about {_gib(need)} needed, {_gib(free)} free"
        if need > free:
            found += "; take more hosts, fewer ranks on each, or smaller micro-batches"
        mark: Mark = "FAIL" if need > free else "warn" if need > _CLOSE * free else "ok"
        self._table.add(mark, "memory", found)

    def _check_folder(self, sizes: Sizes | None) -> None:
        from fedsp_mpi.estimate import memory

        try:
            self._probe = probe.Probe(Path(self._config.run.folder))
        except OSError as error:
            self._table.add("FAIL", "run folder", one_line(error))
            return
        free = self._probe.free
        need = memory.disk(self._config, sizes) if sizes else 0
        found = f"{self._probe.folder.parent}: about {_gib(need)} needed, {_gib(free)} free"
        room = (
            ""
            if need <= free
            else "; make room, choose another run.folder, or lower checkpoint.keep"
        )
        self._table.add("FAIL" if room else "ok", "disk", found + room)

    def hear(self, looks: list[dict[str, Any]]) -> None:
        """Judge what every rank saw of the folders."""
        for path, mark in self._folders.items():
            if blind := [number for number, look in enumerate(looks) if path in look["missing"]]:
                self._table.add(
                    mark,
                    "inputs",
                    f"rank {spans(blind)} does not see {path}, expected it on every host",
                )
        if not self._probe:
            return
        wrong = [
            text
            for number, look in enumerate(looks)
            for text in self._wrong(number, look["folder"])
        ]
        locking = {
            text for look in looks for kind, text in look["folder"].items() if kind == "locking"
        }
        for text in wrong:
            self._table.add("FAIL", "run folder", text)
        if not wrong:
            fine = f"{self._probe.folder.parent}: all ranks write and see files, renames work"
            self._table.add("ok", "run folder", fine)
        for text in locking:
            self._table.add(
                "warn", "run folder", f"{text}: a note alone keeps two jobs from one run"
            )

    def tidy(self) -> None:
        """Leave nothing behind in the run folder."""
        if self._probe:
            self._probe.remove()

    def _wrong(self, number: int, look: dict[str, str]) -> list[str]:
        who = f"rank {number} on {self._ranks[number]['host']}"
        wrong = [f"{who} {text}" for kind, text in look.items() if kind != "locking"]
        if not wrong and self._probe and not self._probe.heard_from(number):
            wrong = [f"the server does not see what {who} wrote into {self._probe.folder.parent}"]
        return [f"{text}; expected one folder that all hosts share" for text in wrong]


def _look(meta: dict[str, Any], rank: int) -> dict[str, Any]:
    """What a rank sees of the folders that the server named."""
    folder = probe.look(Path(meta["probe"]), rank) if meta["probe"] else {}
    return {
        "folder": folder,
        "missing": [path for path in meta["inputs"] if not Path(path).is_dir()],
    }


def _check_wire(
    table: CheckReport, wire: Wire | Solo, ranks: list[dict[str, Any]], num_values: int
) -> None:
    """Speed at the size of the prompts, and clocks."""
    times, ahead = diagnostics.speed(wire), diagnostics.clocks(wire)
    if not times:
        return
    size, others = 4 * num_values, len(ranks) - 1

    def said(kind: str) -> str:
        seconds = times[f"{kind}_seconds"]
        return f"{kind} {1e3 * seconds:.1f} ms, {others * size / seconds / 1e9:.2f} GB/s"

    table.add(
        "ok",
        "speed",
        f"prompts of {size / 1e6:.2f} MB and {others} client ranks: "
        f"{said('broadcast')}; {said('gather')}",
    )
    worst = max(range(len(ahead)), key=lambda number: abs(ahead[number][0]))
    skew, error = ahead[worst]
    found = f"at most {abs(skew):.3f} s apart (rank {worst}, measured to {error:.3f} s)"
    wrong = (
        "; times in logs and files mislead: have the hosts set by NTP"
        if abs(skew) - error > _SKEW
        else ""
    )
    table.add("warn" if wrong else "ok", "clocks", found + wrong)


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
