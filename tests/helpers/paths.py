"""Where the repository is, and what may lie beside it."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
ROOT = TESTS.parent
SHARED = ROOT.parent / "shared"  # models and data sets; tests that need them are skipped without
PROGRAMS = TESTS / "helpers" / "mpi_programs"
