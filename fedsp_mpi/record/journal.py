"""Write what a round brought, on the server's first rank: rows, prompts and the wire's manifest."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from fedsp_mpi.files.untrusted import JsonMapping
from fedsp_mpi.log import Log
from fedsp_mpi.record.checkpoint import Checkpoints
from fedsp_mpi.record.event_files import EventFiles
from fedsp_mpi.record.tables import ClientRow, RoundRow, SiloRow, TierRow, WireRow
from fedsp_mpi.record.writer import RunRecord
from fedsp_mpi.tensors import Failure, Report


class RoundReports(Protocol):
    """What a round brought: updates, failures, and why the rule rejected an update."""

    @property
    def reports(self) -> Sequence[Report]: ...

    @property
    def failures(self) -> Sequence[Failure]: ...

    @property
    def rejected(self) -> Mapping[int, str]: ...


@dataclass
class RoundJournal:
    """The record and the checkpoints of a run, as the rounds write them.

    Attributes:
        record: is written to.
        checkpoints: are written to.
        log: of the server.
        keep_prompts: whether every round's prompt is recorded.
        rank_of: the rank of every client.
        carried: the manifest of the run's earlier stretches.
        inputs: digest of all that the run reads.
        events: TensorBoard's files; None: they are not asked for.
        checkpoint_seconds: of each checkpoint so far.
    """

    record: RunRecord
    checkpoints: Checkpoints
    log: Log
    keep_prompts: bool
    rank_of: Mapping[int, int]
    carried: Sequence[WireRow] = ()
    inputs: str | None = None
    events: EventFiles | None = None
    checkpoint_seconds: list[float] = field(default_factory=list)

    def commit_round(
        self,
        row: RoundRow,
        results: RoundReports,
        prompts: Mapping[str, np.ndarray] | None,
        *,
        silos: Sequence[SiloRow] = (),
        tiers: Sequence[TierRow] = (),
        round_bytes: Mapping[str, Mapping[int, int]],
        entries: Sequence[JsonMapping],
    ) -> None:
        """Write one round; when this returns, the round is on disk.

        Args:
            row: the round's; of its bytes only those of the evaluation at silos.
            results: what the clients sent.
            prompts: fp32 arrays [*shape] by name; None if they are not kept.
            silos: what silos have scored.
            tiers: what users and the server have scored of all tiers.
            round_bytes: by direction ("down", "up") and client.
            entries: the wire's manifest so far.
        """
        rows: list[ClientRow] = []
        fields = {field.name for field in dataclasses.fields(ClientRow)}
        for report in results.reports:
            standard = {name: value for name, value in report.metrics.items() if name in fields}
            extra = {name: value for name, value in report.metrics.items() if name not in fields}
            reason = results.rejected.get(report.client)
            rows.append(
                ClientRow(
                    round=row.round,
                    client=report.client,
                    rank=self.rank_of[report.client],
                    status="ok" if reason is None else "rejected",
                    reason=reason or "",
                    samples=int(report.weight),
                    bytes_down=round_bytes["down"].get(report.client, 0),
                    bytes_up=round_bytes["up"].get(report.client, 0),
                    extra=extra,
                    **standard,
                )
            )
        for failure in results.failures:
            rows.append(
                ClientRow(
                    round=row.round,
                    client=failure.client,
                    rank=self.rank_of[failure.client],
                    status="failed",
                    reason=f"{failure.phase}: {failure.reason}",
                    bytes_down=round_bytes["down"].get(failure.client, 0),
                    bytes_up=round_bytes["up"].get(failure.client, 0),
                )
            )
        row = replace(
            row,
            bytes_down=row.bytes_down + sum(round_bytes["down"].values()),
            bytes_up=sum(round_bytes["up"].values()),
        )
        rows.sort(key=lambda client_row: client_row.client)
        manifest = manifest_rows(entries, self.carried)
        self.record.commit_round(row, rows, prompts, silos=silos, tiers=tiers, wire=manifest)
        if self.events is not None:
            self.events.write_round(self.record.run)


def manifest_rows(entries: Sequence[JsonMapping], carried: Sequence[WireRow] = ()) -> list[WireRow]:
    """Return the wire's manifest as rows of the record.

    Args:
        entries: of this process's wire.
        carried: rows of earlier stretches of the run, which are added up.
    """
    rows = {(row.direction, row.phase, row.name): row for row in carried}
    for entry in entries:
        row = WireRow(
            name=entry["name"],
            shape=tuple(entry["shape"] or ()),
            dtype=entry["dtype"],
            direction=entry["direction"],
            phase=entry["phase"],
            count=entry["messages"],
            bytes=entry["bytes"],
            bytes_crossed=entry["bytes_crossed"],
        )
        key = (row.direction, row.phase, row.name)
        earlier = rows.get(key)
        if earlier is not None:
            row = replace(
                row,
                count=earlier.count + row.count,
                bytes=earlier.bytes + row.bytes,
                bytes_crossed=earlier.bytes_crossed + row.bytes_crossed,
            )
        rows[key] = row
    return list(rows.values())
