"""Run folders as text, tables and pictures: one run, several side by side, and what differs."""

from fedsp_mpi.report.comparison import compare, comparison_table, read_all
from fedsp_mpi.report.diff import difference
from fedsp_mpi.report.experiments import markdown
from fedsp_mpi.report.export import as_json, write_csv, write_json
from fedsp_mpi.report.facts import PERPLEXITY, main_result, origin_weights
from fedsp_mpi.report.gain import gain_table
from fedsp_mpi.report.html import write_page
from fedsp_mpi.report.phases import phases_table
from fedsp_mpi.report.plot import (
    can_draw,
    draw_bars,
    draw_curves,
    draw_labels,
    draw_phases,
    draw_shards,
    draw_silos,
)
from fedsp_mpi.report.summary import summarize
from fedsp_mpi.report.tiers import tiers_table

__all__ = [
    "PERPLEXITY",
    "as_json",
    "can_draw",
    "compare",
    "comparison_table",
    "difference",
    "draw_bars",
    "draw_curves",
    "draw_labels",
    "draw_phases",
    "draw_shards",
    "draw_silos",
    "gain_table",
    "main_result",
    "markdown",
    "origin_weights",
    "phases_table",
    "read_all",
    "summarize",
    "tiers_table",
    "write_csv",
    "write_json",
    "write_page",
]
