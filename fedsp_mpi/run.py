"""A run from its start to its table: preparation, hand-out, rounds, scores, record."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsp_mpi import comm
from fedsp_mpi.comm import guard
from fedsp_mpi.config import Config, to_yaml
from fedsp_mpi.log import Log, duration

if TYPE_CHECKING:
    from fedsp_mpi.build import Materials, ServerParts
    from fedsp_mpi.comm.solo import Solo
    from fedsp_mpi.comm.wire import Wire
    from fedsp_mpi.federate import ClientSide, ServerSide
    from fedsp_mpi.models.backbone import LanguageModel
    from fedsp_mpi.record.run_record import RunRecord
    from fedsp_mpi.training.device import Compute

VERSIONS = ("torch", "transformers", "peft", "datasets", "deepspeed", "mpi4py", "h5py", "numpy", "tokenizers")


def execute(config: Config, name: str, log: Log) -> Path | None:
    """Run one experiment; every rank calls this. The server gets the run's folder, the others None.

    Heavy libraries are imported by the server at once and by the clients when the hand-out has come, so that ranks that
    only wait leave the processor to the distillation.

    Args:
        config: checked, the same on every rank.
        name: the configuration's name, for a run that has none.
        log: speaks on the server only.

    Raises comm.Refused on every rank for a mistake of the user, before anything was trained where that is possible.
    """
    begun = time.perf_counter()
    with guard.phase("start-up"):
        wire = connect(config)
        hosts = wire.introduce(_introduction(config))
    server = ServerRun(config, name, log, hosts, begun) if wire.is_server else None
    with guard.phase("checks"):
        wire.agree(server.refusal(wire) if server else None)
    try:
        _train(config, wire, server)
    except Exception as error:
        if server:
            server.record.finish("failed", _one_line(error))
        raise
    with guard.phase("end"):
        wire.finish()
    return server.folder if server else None


def connect(config: Config) -> Wire | Solo:
    """The wire between all ranks. Raises comm.Refused if the launcher's processes do not see each other."""
    try:
        return comm.connect(deadlines=comm.Deadlines(**asdict(config.deadlines)))
    except ValueError as error:
        raise comm.Refused(str(error)) from None


def _train(config: Config, wire: Wire | Solo, server: ServerRun | None) -> None:
    with guard.phase("distillation"):
        handout = server.prepare() if server else None
    with guard.phase("hand-out"):
        given = wire.handout(handout)
        del handout
    guard.report_into(Path(given.meta["folder"]))
    clients = _client_side(config, wire, given, server)
    here = server.side(given) if server else None
    del given
    from fedsp_mpi.federate import federate

    federate(wire, config.federation, here, clients)
    if here and server:
        with guard.phase("evaluation"):
            server.finish(here, wire)


def _client_side(config: Config, wire: Wire | Solo, given: comm.Handout, server: ServerRun | None) -> ClientSide | None:
    """The clients of this rank, if it has any, once all ranks have theirs. A mistake found on one is told to all."""
    start, clients, error = time.perf_counter(), None, None
    mine = given.meta["assignment"][wire.topology.rank]
    with guard.phase("client set-up"):
        if mine:
            from fedsp_mpi import build, federate
            from fedsp_mpi.training.device import Compute

            try:
                compute = Compute.of(config.client.compute, wire.topology.local_rank)
                materials = server.materials if server else build.Materials(config)
                clients = federate.ClientSide(build.client_side(materials, compute, given, mine), mine, compute)
            except ValueError as found:
                error = f"rank {wire.topology.rank} on {platform.node()}: {_one_line(found)}"
        ready = wire.introduce({"error": error, "seconds": time.perf_counter() - start})
        wire.agree(server.heard(ready or []) if server else None)
    return clients


class ServerRun:
    """What the server does before the first round and after the last."""

    def __init__(self, config: Config, name: str, log: Log, hosts: list[dict[str, Any]] | None, begun: float) -> None:
        self.config, self.log, self.hosts, self._begun = config, log, hosts or [], begun
        self.folder = _folder(config, name)
        self.materials: Materials
        self.record: RunRecord
        self._parts: ServerParts
        self._model: LanguageModel
        self._compute: Compute
        self._assignment: list[tuple[int, ...]]

    def refusal(self, wire: Wire | Solo) -> str | None:
        """Find every mistake that can be found without training, and open the record. The text of the first, or None.

        The weights are read last, when everything else is known to be right.
        """
        try:
            self._check_ranks(wire)
            from fedsp_mpi import build
            from fedsp_mpi.training.device import Compute

            self.materials = build.Materials(self.config)
            self.materials.check()
            self._compute = Compute.of(self.config.server.compute, wire.topology.local_rank)
            self._assignment = self._place(wire, build.expected_work(self.materials))
            self._open_record()
            self._summary(wire)
            self._compute.begin()
            self._model = build.global_model(self.materials, self._compute)
        except (ValueError, OSError) as error:
            self._discard_record()
            return _one_line(error)
        guard.report_into(self.folder)
        return None

    def prepare(self) -> comm.Handout:
        """Distil the auxiliary model, describe all models in the record, and give what goes to the clients."""
        from fedsp_mpi import build

        self._parts, handout = build.server_parts(
            self.materials, self._model, self._compute, self.folder, self._assignment, self.log
        )
        self.record.describe(models=self._parts.sizes, distillation=self._parts.distillation)
        self.log.say(
            "parameters: global model {global:,}, auxiliary model {auxiliary:,}, prompts {prompt:,} "
            "({prompt_on_the_wire:,} travel)".format(**self._parts.sizes)
        )
        return handout

    def heard(self, ready: list[dict[str, Any]]) -> str | None:
        """Take note that the client ranks are ready. The first mistake that one of them found, or None."""
        seconds = max(answer["seconds"] for answer in ready)
        self.record.describe(timing={"seconds_client_setup": seconds})
        self.log.say(f"clients are ready after {duration(seconds)}")
        return next((answer["error"] for answer in ready if answer["error"]), None)

    def side(self, given: comm.Handout) -> ServerSide:
        """The server's side of the rounds."""
        from fedsp_mpi.federate import ServerSide

        ranks = {client: rank for rank, ids in enumerate(given.meta["assignment"]) for client in ids}
        settings = self.config.evaluation
        return ServerSide(
            self._parts.server,
            self._parts.control,
            self._compute,
            self.materials.validation,
            settings.batch_tokens,
            self.record,
            self.config.record.prompts,
            ranks,
            self.log,
        )

    def finish(self, here: ServerSide, wire: Wire | Solo) -> None:
        """Score, write the adapter and the results, close the record."""
        from fedsp_mpi.federate import manifest
        from fedsp_mpi.models.prompts import write_adapter

        self._compute.begin()
        write_adapter(self.folder / "prompt", here.best.prompts, self.materials.prompt_spec, self.materials.model_name)
        self.record.write_results(self._scores(here))
        self.record.write_wire(manifest(wire))
        self.record.describe(timing={"seconds": time.perf_counter() - self._begun})
        self.record.finish()

    def _scores(self, here: ServerSide) -> list[Any]:
        from fedsp_mpi import build

        wanted: list[tuple[str, Any]] = [("zero-shot", None)] if self.config.evaluation.zero_shot else []
        wanted += [("server-only", here.control_best)] if here.control_best else []
        wanted += [("fedsp", here.best)]
        build.scoring_model(self.materials, here.server.model)
        return [self._score(here, method, best) for method, best in wanted]

    def _score(self, here: ServerSide, method: str, best: Any) -> Any:
        from fedsp_mpi.evaluation.scoring import answer_loss_mean, score
        from fedsp_mpi.record.rows import ResultRow

        settings, asked = self.config.evaluation, self.materials.test
        model, prompt = here.server.model, here.server.prompt if best else None
        if prompt is not None:
            prompt.load(best.prompts.torch())
        loss = best.loss if best else answer_loss_mean(model, None, here.validation, settings.batch_tokens)
        progress = self.log.progress(f"scoring {method}", sum(len(question.options) for question in asked))
        found = score(model, prompt, asked, self.materials.task.metric, settings.batch_tokens, progress.step)
        self.log.say(f"scored {method}: {found.n} questions in {duration(found.seconds)}")
        return ResultRow(method=method, split="test", round=best.round if best else 0, loss=loss, **asdict(found))

    def _check_ranks(self, wire: Wire | Solo) -> None:
        wanted = self.config.topology.ranks
        found = wire.topology.size
        if wanted is not None and found != wanted:
            raise ValueError(f"topology.ranks: found {found} ranks, expected {wanted}; start that many processes")
        self._place(wire, [1.0] * self.config.federation.clients)

    @staticmethod
    def _place(wire: Wire | Solo, work: list[float]) -> list[tuple[int, ...]]:
        """Clients of every rank; the server has none, unless it is alone."""
        if wire.topology.size == 1:
            return [tuple(range(len(work)))]
        return [(), *comm.spread(work, wire.topology.size - 1)]

    def _open_record(self) -> None:
        from fedsp_mpi.record.run_record import RunRecord

        self.record = RunRecord.create(
            self.folder,
            config=asdict(self.config),
            config_text=to_yaml(self.config),
            environment=_environment(self.hosts),
            if_exists=self.config.run.if_exists,
        )
        for part in ("auxiliary", "prompt"):
            shutil.rmtree(self.folder / part, ignore_errors=True)
        splits, shards = self.materials.splits, self.materials.shards
        self.record.describe(
            data={
                "task": self.config.data.task,
                "train": len(splits.train),
                "validation": len(splits.validation),
                "test": len(splits.test),
                "server_shard": len(shards[0]),
                "client_shards": [len(shard) for shard in shards[1:]],
                "notes": list(splits.notes),
            },
            topology={"assignment": [list(ids) for ids in self._assignment]},
        )

    def _discard_record(self) -> None:
        """Give the run's name back after a refusal, so that the next try is not refused for this one."""
        if hasattr(self, "record"):
            for name in ("run.h5", "config.yaml"):
                (self.folder / name).unlink(missing_ok=True)
            with suppress(OSError):
                self.folder.rmdir()

    def _summary(self, wire: Wire | Solo) -> None:
        say, config = self.log.say, self.config
        by_host: dict[str, list[str]] = {}
        for host in self.hosts:
            by_host.setdefault(host["host"], []).append(host["device"])
        where = ", ".join(f"{host} ({len(devices)} x {devices[-1]})" for host, devices in by_host.items())
        size = wire.topology.size
        kind = "one process plays all" if size == 1 else f"1 server, {size - 1} client ranks"
        say(f"ranks     {size} ({kind}) on {where}")
        most = max(len(ids) for ids in self._assignment)
        threads = f"threads: server {config.server.compute.threads}, client {config.client.compute.threads}"
        say(f"clients   {config.federation.clients}, at most {most} on a rank; {threads}")
        model, splits, shards = self.materials.model_config, self.materials.splits, self.materials.shards
        say(f"model     {config.model.name}: {model.model_type}, {model.num_hidden_layers} layers")
        train = f"{len(splits.train)} train in {len(shards)} shards of about {len(shards[0])}"
        say(f"data      {config.data.task}: {train}, {len(splits.validation)} validation, {len(splits.test)} test")
        for note in splits.notes:
            say(f"          {note}")
        say(f"folder    {self.folder}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _folder(config: Config, name: str) -> Path:
    folder = Path(config.run.folder).expanduser()
    if config.run.name != "auto":
        return folder / config.run.name
    stamped = folder / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    return stamped if not stamped.exists() else stamped.with_name(f"{stamped.name}-{os.getpid()}")


def _introduction(config: Config) -> dict[str, Any]:
    """What a rank says of itself at the start. torch is imported for it only where there is a GPU to name."""
    device = "cpu"
    wanted = {config.server.compute.device, config.client.compute.device}
    if wanted != {"cpu"} and any(Path("/dev").glob("nvidia[0-9]*")):
        import torch

        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    cores = len(os.sched_getaffinity(0))
    return {"host": platform.node(), "pid": os.getpid(), "device": device, "cores": cores}


def _environment(hosts: list[dict[str, Any]]) -> dict[str, Any]:
    versions = {"fedsp_mpi": importlib.metadata.version("fedsp_mpi"), "python": platform.python_version()}
    return {
        "versions": versions | {name: importlib.metadata.version(name) for name in VERSIONS},
        "commit": _commit(),
        "hosts": hosts,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "job": {key: value for key, value in os.environ.items() if key in ("SLURM_JOB_ID", "SLURM_JOB_NAME")},
    }


def _commit() -> str:
    """The commit that the package runs from, with + if it was changed since; empty outside a checkout."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip()
