"""Check what the ranks say of themselves: number, versions, configuration, devices and cores."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence

from fedsp_mpi.commands.check_report import CheckReport
from fedsp_mpi.config import Config
from fedsp_mpi.config.parsing import differences
from fedsp_mpi.files.untrusted import JsonMapping
from fedsp_mpi.run import devices as placement
from fedsp_mpi.run.devices import DeviceInfo, format_ranges


def check_ranks(
    report: CheckReport,
    config: Config,
    ranks: Sequence[JsonMapping],
    *,
    error: ValueError | None,
) -> bool:
    """Check the introductions of all ranks.

    Args:
        report: gets the findings.
        config: the server's.
        ranks: the introductions, by rank.
        error: what is wrong with the server's configuration.

    Returns:
        False if the ranks do not agree on one valid configuration.
    """
    has_patterns = any(silo.is_pattern for silo in config.federation.silos)
    if error is None and not has_patterns:  # else the number of clients is still to be found
        check_world(report, config, len(ranks))
    libraries = [f"{rank['library']}, thread level {rank['level']}" for rank in ranks]
    _check_same(report, "MPI", libraries)
    _check_versions(report, [rank["versions"] for rank in ranks])
    ranks_agree = _check_configuration(report, ranks)
    for number, rank in enumerate(ranks):
        devices = [_device_text(role, device) for role, device in rank["devices"].items()]
        facts = [rank["host"], rank["place"], f"cores {format_ranges(rank['cores'])}", *devices]
        report.add("ok", f"rank {number}", ", ".join(facts))
    _check_devices(report, ranks)
    _check_threads(report, ranks)
    return ranks_agree


def check_world(report: CheckReport, config: Config, num_ranks: int) -> None:
    """Compare the number of ranks with the configuration's, the clients', and the launcher's.

    Args:
        report: gets what is found.
        config: says how many ranks and clients there are to be.
        num_ranks: of this job.
    """
    num_clients = config.federation.clients
    num_expected = config.topology.ranks
    num_servers = config.topology.server_ranks
    num_client_ranks = num_ranks - num_servers
    if num_ranks == 1:
        world = "1 process plays all ranks"
    else:
        world = (
            f"{num_ranks} ranks: {num_servers} server, {num_client_ranks} for {num_clients} clients"
        )
    slurm_tasks = os.environ.get("SLURM_NTASKS", "")
    has_idle_tasks = slurm_tasks.isdecimal() and int(slurm_tasks) > num_ranks
    if num_expected is not None and num_ranks != num_expected:
        report.add(
            "FAIL",
            "world",
            f"found {num_ranks} ranks, expected topology.ranks={num_expected}; start that many "
            "processes",
        )
    elif num_client_ranks > num_clients > 0:
        report.add(
            "FAIL",
            "world",
            f"found {world}, expected a client for each; start {num_clients + num_servers} "
            "processes or fewer",
        )
    elif num_servers > 1 and num_client_ranks < 1:
        report.add(
            "FAIL",
            "world",
            f"found {world}, expected at least one for clients; start {num_servers + 1} "
            "processes or more",
        )
    elif has_idle_tasks and num_ranks == 1:
        report.add(
            "warn",
            "world",
            f"{world}, in the shell of a Slurm job of {slurm_tasks} tasks; start all of them with "
            "srun or mpirun before python",
        )
    elif has_idle_tasks:
        report.add(
            "warn",
            "world",
            f"{world}; the Slurm job has {slurm_tasks} tasks, and the cores of the others will "
            "idle",
        )
    else:
        report.add("ok", "world", world)


def _check_same(report: CheckReport, subject: str, values: Sequence[str]) -> None:
    """Require one value on all ranks; else tell which ranks have which.

    Args:
        report: gets the finding.
        subject: its subject.
        values: by rank.
    """
    ranks_by_value: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks_by_value.setdefault(value, []).append(rank)
    if len(ranks_by_value) == 1:
        report.add("ok", subject, values[0])
        return
    groups = "; ".join(
        f"{value} on rank {format_ranges(ranks)}" for value, ranks in ranks_by_value.items()
    )
    report.add(
        "FAIL",
        subject,
        f"found {groups}; expected the same on all ranks: start them in one environment",
    )


def _check_versions(report: CheckReport, versions: Sequence[Mapping[str, str]]) -> None:
    """Require the same versions on all ranks, and none missing.

    Args:
        report: gets the findings.
        versions: by rank, then by the library's name.
    """
    server_versions = versions[0]
    differing = [
        name for name in server_versions if len({version[name] for version in versions}) > 1
    ]
    for name in differing:
        _check_same(report, "versions", [f"{name} {version[name]}" for version in versions])
    missing = [
        name
        for name, version in server_versions.items()
        if name not in differing and version == "not installed"
    ]
    if missing:
        report.add(
            "FAIL",
            "versions",
            f"found no {', '.join(missing)}, expected the requirements of setup.py; install them",
        )
    elif not differing:
        names = ("fedsp_mpi", "python", "torch")
        main_versions = ", ".join(f"{name} {server_versions[name]}" for name in names)
        num_more = len(server_versions) - len(names)
        report.add(
            "ok", "versions", f"{main_versions} and {num_more} more are the same on all ranks"
        )


def _check_configuration(report: CheckReport, ranks: Sequence[JsonMapping]) -> bool:
    """Require one valid configuration on all ranks. Return whether there is one."""
    for number, rank in enumerate(ranks):
        if "mistake" in rank:
            report.add("FAIL", "configuration", rank["mistake"])
            return False
        changed = differences(ranks[0]["config"], rank["config"])
        if changed:
            report.add(
                "FAIL",
                "configuration",
                f"rank {number} on {rank['host']} found another one than the server "
                f"({'; '.join(changed)}), expected the same on every rank; put the file where all "
                "hosts see it",
            )
            return False
    digest = hashlib.sha256(repr(ranks[0]["config"]).encode()).hexdigest()[:12]
    report.add("ok", "configuration", f"digest {digest} on all ranks")
    return True


def _device_text(role: str, device: JsonMapping) -> str:
    uuid = f" {_gpu_name(device['uuid'])}" if "uuid" in device else ""
    return f"{role} on {device['name']}{uuid}, threads {device['threads']}"


def _gpu_name(uuid: str) -> str:
    """Return a GPU's name as nvidia-smi writes it; some versions of torch leave out the prefix."""
    return f"GPU-{uuid.removeprefix('GPU-')}"


def _check_devices(report: CheckReport, ranks: Sequence[JsonMapping]) -> None:
    """Report missing devices, shared GPUs, and CPUs that emulate the type they are to use."""
    emulating_ranks: dict[str, list[int]] = {}
    for number, rank in enumerate(ranks):
        for role, device in rank["devices"].items():
            if "error" in device:
                report.add("FAIL", "device", f"rank {number} on {rank['host']}: {device['error']}")
            if "emulates" in device:
                setting = f"{role}.compute.dtype={device['emulates']}"
                emulating_ranks.setdefault(setting, []).append(number)
    for setting, numbers in emulating_ranks.items():
        report.add(
            "warn",
            "device",
            f"{setting} on rank {format_ranges(numbers)}, whose CPU has no units for it "
            "and is faster "
            "with float32",
        )
    devices = [
        {role: DeviceInfo.from_json(device, number) for role, device in rank["devices"].items()}
        for number, rank in enumerate(ranks)
    ]
    for uuid, numbers in placement.shared_gpus(devices).items():
        shared = f"{_gpu_name(uuid)} is shared by ranks {format_ranges(numbers)}"
        num_servers = sum("server" in ranks[number]["devices"] for number in numbers)
        if num_servers > 1:
            report.add(
                "FAIL", "device", f"found that {shared}, expected one for each rank of the server"
            )
        else:
            report.add("warn", "device", shared)


def _check_threads(report: CheckReport, ranks: Sequence[JsonMapping]) -> None:
    """Compare the threads of each rank, and of each host's ranks, with the cores they may use."""
    ranks_by_host: dict[str, list[int]] = {}
    for number, rank in enumerate(ranks):
        ranks_by_host.setdefault(rank["host"], []).append(number)
    for host, numbers in ranks_by_host.items():
        num_threads = {number: _num_threads(ranks[number]) for number in numbers}
        cores = {core for number in numbers for core in ranks[number]["cores"]}
        crowded = [
            number for number in numbers if num_threads[number] > len(ranks[number]["cores"])
        ]
        total = sum(num_threads.values())
        finding = f"{host}: {total} threads in all, {len(cores)} cores"
        if total > len(cores):
            report.add(
                "warn",
                "cores",
                f"{finding}; ranks will wait for each other: take fewer ranks, or fewer threads",
            )
        elif crowded:
            report.add(
                "warn",
                "cores",
                f"{finding}, but rank {format_ranges(crowded)} is bound to fewer than its threads",
            )
        else:
            report.add("ok", "cores", finding)


def _num_threads(rank: JsonMapping) -> int:
    """Return the threads that a rank uses at a time: one process plays its roles in turn."""
    return max((device["threads"] for device in rank["devices"].values()), default=0)
