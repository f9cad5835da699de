"""Which roles a rank plays, on which device and with how many threads, as it says at the start."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsp_mpi.comm import Topology
from fedsp_mpi.config import ComputeConfig, Config
from fedsp_mpi.log import one_line


def roles(rank: int, size: int, server_ranks: int) -> tuple[str, ...]:
    """ "server", "client", or both, if there is one rank for all."""
    if size == 1:
        return "server", "client"
    return ("server",) if rank < server_ranks else ("client",)


def devices(config: Config, here: Topology) -> dict[str, dict[str, Any]]:
    """For each role of this rank its device's "name" and "threads"; of a GPU "uuid" and "free"
    bytes too.

    In place of what is not there: an "error". "emulates": the type that the role asks a CPU for and
    that it has no units for, if there is one.
    """
    computes = {"server": config.server.compute, "client": config.client.compute}
    return {
        role: _device(computes[role], here)
        for role in roles(here.rank, here.size, config.topology.server_ranks)
    }


def shared_gpus(ranks: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    """GPUs that more than one rank uses: the ranks by UUID.

    Args:
        ranks: what each rank said of its "devices".
    """
    users: dict[str, list[int]] = {}
    for number, rank in enumerate(ranks):
        for uuid in {device["uuid"] for device in rank["devices"].values() if "uuid" in device}:
            users.setdefault(uuid, []).append(number)
    return {uuid: some for uuid, some in users.items() if len(some) > 1}


def peak() -> dict[str, Any]:
    """The most memory that this process has had so far, in bytes: on its "host", libraries too, and
    on its "device".
    """
    found = {
        "host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    }  # Linux counts it in KiB
    torch = sys.modules.get("torch")  # a rank that has not needed it has no device memory
    if torch is not None and torch.cuda.is_available():
        found["device"] = torch.cuda.max_memory_allocated()
    return found


def peaks(ranks: Sequence[Mapping[str, Any]], server_ranks: int) -> dict[str, Any]:
    """The `peak` of each role, of the rank where it is highest, and of all "ranks".

    A role's is that of its device, if it has one; one process that plays all has the "server"'s
    only.
    """
    found: dict[str, Any] = {"ranks": [dict(rank) for rank in ranks]}
    for number, rank in enumerate(ranks):
        role = "server" if number < server_ranks else "clients"
        found[role] = max(found.get(role, 0), rank.get("device") or rank["host"])
    return found


def spans(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    begins = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(begins, ends))


def has_bf16(file: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU multiplies bf16 matrices in units of its own: AMX or AVX-512 on x86, BF16 on
    Arm.
    """
    lines = file.read_text().splitlines() if file.exists() else []
    flags = {
        flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split()
    }
    return bool(flags & {"amx_bf16", "avx512_bf16", "bf16"})


def _device(settings: ComputeConfig, here: Topology) -> dict[str, Any]:
    """torch is imported only where there may be another device than the CPU."""
    said: dict[str, Any] = {"name": "cpu", "threads": settings.threads or here.cores}
    if settings.dtype == "bfloat16" and not has_bf16():
        said["emulates"] = settings.dtype
    if settings.device == "cpu" or (
        settings.device == "auto" and not any(Path("/dev").glob("nvidia[0-9]*"))
    ):
        return said
    import torch

    from fedsp_mpi.training.device import Compute

    try:
        device = Compute.of(settings, here).device
    except ValueError as error:
        return said | {"error": one_line(error)}
    if device.type == "cpu":
        return said
    said.pop("emulates", None)
    known, (free, _) = torch.cuda.get_device_properties(device), torch.cuda.mem_get_info(device)
    return said | {"name": f"{device} {known.name}", "uuid": str(known.uuid), "free": free}
