"""The run folder: what a run did, written so that no kill can spoil it, and read back as plain data."""

from fedsp_mpi.record.checkpoint import Checkpoint, Checkpoints
from fedsp_mpi.record.compare import difference
from fedsp_mpi.record.comparison import compare, comparison_table, main_result, read_all
from fedsp_mpi.record.files import RecordError
from fedsp_mpi.record.gain import gain_table
from fedsp_mpi.record.layout import Run, read, resume_command
from fedsp_mpi.record.plot import draw_bars, draw_curves
from fedsp_mpi.record.report import markdown, summary
from fedsp_mpi.record.rows import ClientRow, ResultRow, RoundRow, WireRow
from fedsp_mpi.record.run_record import RunRecord

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
    "compare",
    "comparison_table",
    "difference",
    "draw_bars",
    "draw_curves",
    "gain_table",
    "main_result",
    "markdown",
    "read",
    "read_all",
    "resume_command",
    "summary",
]
