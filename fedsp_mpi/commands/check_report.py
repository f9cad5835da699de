"""Collect and print the findings of `check`."""

from __future__ import annotations

from typing import Literal

from fedsp_mpi.comm import Refused
from fedsp_mpi.log import Log

# "warn": a run works, but slower or less safely than it could; "FAIL": it would not work.
Status = Literal["ok", "warn", "FAIL"]


class CheckReport:
    """The findings of a check, each printed as it comes: status, subject, finding.

    Attributes:
        failures: "subject: finding" of each failure.
        num_warnings: findings with status "warn".
    """

    def __init__(self, log: Log) -> None:
        self._log = log
        self.failures: list[str] = []
        self.num_warnings = 0

    def add(self, status: Status, subject: str, finding: str) -> None:
        """Print a finding and count it.

        Args:
            status: what it means for a run.
            subject: what was checked.
            finding: what was found, and what to do.
        """
        if status == "FAIL":
            self.failures.append(f"{subject}: {finding}")
        elif status == "warn":
            self.num_warnings += 1
        self._log.say(f"{status:<6}{subject:<15}{finding}")

    def verdict(self) -> Refused | None:
        """Return the error of the first failure, None if nothing failed."""
        if not self.failures:
            return None
        num_more = len(self.failures) - 1
        ending = f" (and {num_more} more)" if num_more else ""
        return Refused(f"check: {self.failures[0]}{ending}")
