"""Which device a role computes on, in which type, with how many threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fedsp_mpi.comm import Topology
from fedsp_mpi.config import ComputeConfig
from fedsp_mpi.log import one_line
from fedsp_mpi.tensors import ClientError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class OutOfMemoryError(ClientError):
    """A client's work did not fit into memory."""


@contextmanager
def oom_as_client_error() -> Iterator[None]:
    """Turn what torch and Python raise when memory ends into OutOfMemoryError; give back what the
    allocator holds.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # torch has no class of its own for the CPU's allocator
        if not isinstance(
            error, (MemoryError, torch.OutOfMemoryError)
        ) and "can't allocate memory" not in str(error):
            raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        raise OutOfMemoryError(f"out of memory: {one_line(error, first_line=True)}") from None


@dataclass(frozen=True)
class Compute:
    """What a role computes with.

    Attributes:
        device: torch device.
        dtype: type of its forward and backward passes.
        threads: CPU threads inside one operation; equal numbers give equal bits.
    """

    device: torch.device
    dtype: torch.dtype
    threads: int

    @classmethod
    def of(cls, settings: ComputeConfig, here: Topology) -> Compute:
        """Resolve device and threads by the rank's place on its host.

        Raises ValueError where CUDA is asked for but absent.
        """
        num_devices = torch.cuda.device_count() if settings.device != "cpu" else 0
        if settings.device == "cuda" and not num_devices:
            raise ValueError(
                "compute.device: found no CUDA device on this host, expected one; set it "
                "to auto or cpu"
            )
        device = (
            torch.device("cuda", here.local_rank % num_devices)
            if num_devices
            else torch.device("cpu")
        )
        return cls(device, DTYPES[settings.dtype], settings.threads or here.cores)

    def begin(self) -> None:
        """Set this process up for the role's work; one process may play both roles in turn."""
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
