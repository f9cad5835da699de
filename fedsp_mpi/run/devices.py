"""Which roles a rank plays, on which device and with how many threads."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedsp_mpi.comm import Topology
from fedsp_mpi.comm.inspection import require_fields
from fedsp_mpi.config import ComputeConfig, Config
from fedsp_mpi.files.untrusted import JsonMapping, JsonObject
from fedsp_mpi.log import one_line

_KIB = 1024


@dataclass(frozen=True)
class DeviceInfo:
    """The device of one role on one rank.

    Attributes:
        name: "cpu", or the GPU's number and model.
        threads: of the role's computation on the CPU.
        uuid: of a GPU.
        free: bytes of a GPU's memory that nobody uses.
        emulates: the dtype that the role asks a CPU for and that it has no units for.
        error: why the device cannot be used.
    """

    name: str
    threads: int
    uuid: str | None = None
    free: int | None = None
    emulates: str | None = None
    error: str | None = None

    def to_json(self) -> JsonObject:
        """Return what is known, by name."""
        values = {
            "name": self.name,
            "threads": self.threads,
            "emulates": self.emulates,
            "error": self.error,
            "uuid": self.uuid,
            "free": self.free,
        }
        return {key: value for key, value in values.items() if value is not None}

    @classmethod
    def from_json(cls, values: JsonMapping, rank: int) -> DeviceInfo:
        """Read what a rank sent; raise ProtocolError, naming the rank, if it cannot be."""
        optional = {"uuid": str, "free": int, "emulates": str, "error": str}
        kinds = {"name": str, "threads": int}
        kinds |= {key: kind for key, kind in optional.items() if key in values}
        require_fields(values, rank, kinds)
        return cls(**{key: values[key] for key in kinds})


def roles(rank: int, size: int, server_ranks: int) -> tuple[str, ...]:
    """Return a rank's roles: "server", "client", or both if there is one rank for all.

    Args:
        rank: the rank.
        size: number of ranks.
        server_ranks: how many of them, from rank 0 on, are the server.
    """
    if size == 1:
        return "server", "client"
    return ("server",) if rank < server_ranks else ("client",)


def devices(config: Config, topology: Topology) -> dict[str, DeviceInfo]:
    """Find the device of each role of this rank, by role."""
    computes = {"server": config.server.compute, "client": config.client.compute}
    return {
        role: _device(computes[role], topology)
        for role in roles(topology.rank, topology.size, config.topology.server_ranks)
    }


def shared_gpus(devices_by_rank: Sequence[Mapping[str, DeviceInfo]]) -> dict[str, list[int]]:
    """Return the ranks of each GPU that several ranks use, by its UUID.

    Args:
        devices_by_rank: the devices of each rank, by role.
    """
    ranks_of: dict[str, list[int]] = {}
    for rank, devices_of_rank in enumerate(devices_by_rank):
        for uuid in {device.uuid for device in devices_of_rank.values() if device.uuid}:
            ranks_of.setdefault(uuid, []).append(rank)
    return {uuid: ranks for uuid, ranks in ranks_of.items() if len(ranks) > 1}


def peak_memory() -> dict[str, int]:
    """Return the most memory that this process has had so far, in bytes.

    "host" counts libraries too; "device" is there if torch was loaded and sees a GPU.
    """
    peaks = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB}  # Linux: in KiB
    torch = sys.modules.get("torch")  # a rank that has not needed it has no device memory
    if torch is not None and torch.cuda.is_available():
        peaks["device"] = torch.cuda.max_memory_allocated()
    return peaks


def peaks_by_role(peaks: Sequence[Mapping[str, int]], server_ranks: int) -> JsonObject:
    """Return the highest peak of each role in bytes, and the peaks of all "ranks".

    A role's peak is that of its device, if it has one. One process that plays all roles counts as
    the "server".

    Args:
        peaks: what `peak_memory` gave on each rank.
        server_ranks: how many of them, from rank 0 on, are the server.
    """
    highest: dict[str, int] = {}
    for rank, peak in enumerate(peaks):
        role = "server" if rank < server_ranks else "clients"
        highest[role] = max(highest.get(role, 0), peak.get("device") or peak["host"])
    return {"ranks": [dict(peak) for peak in peaks]} | highest


def format_ranges(numbers: Sequence[int]) -> str:
    """Write [0, 1, 2, 5] as "0-2, 5"."""
    starts = [number for number in numbers if number - 1 not in numbers]
    ends = [number for number in numbers if number + 1 not in numbers]
    ranges = zip(starts, ends)
    return ", ".join(str(start) if start == end else f"{start}-{end}" for start, end in ranges)


def has_bf16(file: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether the CPU has units for bf16 matrices: AMX or AVX-512 on x86, BF16 on Arm."""
    if not file.exists():
        return False
    lines = file.read_text().splitlines()
    flags = {
        flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split()
    }
    return bool(flags & {"amx_bf16", "avx512_bf16", "bf16"})


def _device(settings: ComputeConfig, topology: Topology) -> DeviceInfo:
    """Find a role's device; torch is imported only where there may be another than the CPU."""
    threads = settings.threads or topology.cores
    is_emulated = settings.dtype == "bfloat16" and not has_bf16()
    cpu = DeviceInfo("cpu", threads, emulates=settings.dtype if is_emulated else None)
    may_be_gpu = settings.device == "cuda" or (
        settings.device == "auto" and any(Path("/dev").glob("nvidia[0-9]*"))
    )
    if not may_be_gpu and not settings.compile:
        return cpu
    import torch

    from fedsp_mpi.training.device import Compute

    try:
        device = Compute.of(settings, topology).device
    except ValueError as error:
        message = one_line(error)
        return DeviceInfo("cpu", threads, emulates=cpu.emulates, error=message)
    if device.type == "cpu":
        return cpu
    properties = torch.cuda.get_device_properties(device)
    free, _ = torch.cuda.mem_get_info(device)
    name = f"{device} {properties.name}"
    return DeviceInfo(name, threads, uuid=str(properties.uuid), free=free)
