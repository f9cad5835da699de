"""Run folders as text, tables and pictures: one run, several side by side, and what differs."""

from fedsp_mpi.report.comparison import compare, comparison_table, read_all
from fedsp_mpi.report.diff import difference
from fedsp_mpi.report.experiments import markdown
from fedsp_mpi.report.facts import main_result
from fedsp_mpi.report.gain import gain_table
from fedsp_mpi.report.plot import can_draw, draw_bars, draw_curves, draw_shards, draw_silos
from fedsp_mpi.report.summary import summarize

__all__ = [
    "can_draw",
    "compare",
    "comparison_table",
    "difference",
    "draw_bars",
    "draw_curves",
    "draw_shards",
    "draw_silos",
    "gain_table",
    "main_result",
    "markdown",
    "read_all",
    "summarize",
]
