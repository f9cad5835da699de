"""The device that a role computes on, its type of numbers and its threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fedsp_mpi.comm import Topology
from fedsp_mpi.config import ComputeConfig, StageConfig
from fedsp_mpi.log import one_line
from fedsp_mpi.tensors import ClientError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


_MAX_PADDING_ON_CPU = 0.15


def device_type(settings: ComputeConfig) -> str:
    """Return the type of the device that a role computes on: "cpu" or "cuda"."""
    has_gpu = settings.device != "cpu" and torch.cuda.is_available()
    return "cuda" if has_gpu else "cpu"


def max_padding(stage: StageConfig, device_type: str) -> float | None:
    """Return the largest fraction of padding in a stage's batches; None: any.

    Args:
        stage: whose `max_padding` may be "auto".
        device_type: of the device that it runs on.
    """
    if stage.max_padding != "auto":
        return stage.max_padding
    return _MAX_PADDING_ON_CPU if device_type == "cpu" else None


class OutOfMemoryError(ClientError):
    """The work of a client did not fit into memory."""


@contextmanager
def oom_as_client_error() -> Iterator[None]:
    """Turn errors of torch and Python about memory into OutOfMemoryError, and free CUDA's cache."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # torch has no class of its own for the CPU's allocator.
        is_cpu_allocator = "can't allocate memory" in str(error)
        if not is_cpu_allocator and not isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        raise OutOfMemoryError(f"out of memory: {one_line(error, first_line=True)}") from None


@dataclass(frozen=True)
class Compute:
    """The device, type and threads of a role.

    Attributes:
        device: torch device.
        dtype: type of its forward and backward passes.
        threads: CPU threads inside one operation; equal numbers give equal bits.
        matmul_precision: of float32 matrix products, as `torch.set_float32_matmul_precision` takes.
        compiles: whether parts of models are compiled.
    """

    device: torch.device
    dtype: torch.dtype
    threads: int
    matmul_precision: str = "highest"
    compiles: bool = False

    @classmethod
    def of(cls, settings: ComputeConfig, topology: Topology) -> Compute:
        """Resolve device and threads by the rank's place on its host.

        Args:
            settings: of the role.
            topology: of this rank; ranks of a host take its GPUs in turn.

        Raises:
            ValueError: CUDA is asked for, and the host has no such device; or compilation, and it
                has no compiler.
        """
        num_devices = torch.cuda.device_count() if settings.device != "cpu" else 0
        if settings.device == "cuda" and not num_devices:
            raise ValueError(
                "compute.device: found no CUDA device on this host, expected one; "
                "set it to auto or cpu"
            )
        device = torch.device("cpu")
        if num_devices:
            device = torch.device("cuda", topology.local_rank % num_devices)
        if settings.compile:
            _require_compiler(device)
        return cls(
            device,
            DTYPES[settings.dtype],
            settings.threads or topology.cores,
            settings.matmul_precision,
            settings.compile,
        )

    def begin(self) -> None:
        """Set threads, precision and device of this process, which may play both roles in turn."""
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        torch.set_float32_matmul_precision(self.matmul_precision)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)


def _require_compiler(device: torch.device) -> None:
    """Compile a sum for a device; raise ValueError if that cannot be done on this host.

    From now on, torch compiles in this process alone: a pool of others would outlive a rank.
    """
    from torch._inductor import config

    config.compile_threads = 1
    try:
        torch.compile(torch.add)(torch.zeros(2, device=device), 1)
    except (RuntimeError, OSError) as error:
        expected = "Triton" if device.type == "cuda" else "a C++ compiler, such as g++"
        raise ValueError(
            f"compute.compile: found no compiler that works on this host "
            f"({one_line(error, first_line=True)}), expected {expected}; install it, or set "
            "compute.compile to false"
        ) from None
