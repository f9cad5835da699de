"""The run folder: what a run did, written so that no kill can spoil it, and read as plain data."""

from fedsp_mpi.record.atomic import RecordError
from fedsp_mpi.record.checkpoint import Checkpoint, Checkpoints
from fedsp_mpi.record.going_on import newest_environment, resume_command
from fedsp_mpi.record.hdf5 import Run, read
from fedsp_mpi.record.tables import ClientRow, ResultRow, RoundRow, WireRow
from fedsp_mpi.record.writer import RunRecord

__all__ = [
    "Checkpoint",
    "Checkpoints",
    "ClientRow",
    "RecordError",
    "ResultRow",
    "RoundRow",
    "Run",
    "RunRecord",
    "WireRow",
    "newest_environment",
    "read",
    "resume_command",
]
