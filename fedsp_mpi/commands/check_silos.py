"""Check silos: which host sees which, who would play which, and what each declares of itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedsp_mpi.comm import Refused
from fedsp_mpi.commands.check_report import CheckReport, Status
from fedsp_mpi.config import Config

if TYPE_CHECKING:
    from fedsp_mpi.comm.solo import Solo
    from fedsp_mpi.comm.wire import Wire
    from fedsp_mpi.run.silos import Declaration, OpenSilos, Placement

_MAX_LINES = 10  # silos, ranks or hosts that get a line of their own
_MAX_NAMES = 5  # names of silos in a line


def check_silos(
    report: CheckReport,
    config: Config,
    name: str,
    *,
    wire: Wire | Solo,
) -> OpenSilos | None:
    """Place and open the silos as a run does; every rank calls this.

    Args:
        report: gets the findings, on the server.
        config: checked.
        name: of the configuration, for a run that has none.
        wire: between all ranks.

    Returns:
        The silos, each with its declaration, also those that cannot be used; None if they cannot be
        placed.
    """
    from fedsp_mpi.run.silos import declare_silos, place_silos

    try:
        placement = place_silos(config, name, wire)
    except Refused as error:
        report.add("FAIL", "silos", str(error))
        return None
    silos = declare_silos(placement, wire)
    if wire.is_server:
        _report_hosts(report, placement)
        _report_placement(report, placement)
        _report_declarations(report, silos, placement.hosts)
    return silos


def _report_hosts(report: CheckReport, placement: Placement) -> None:
    """Report how many of the silos' folders each host sees; a hub set is no folder of any host."""
    seen_by_host: dict[str, set[int]] = {}
    for rank, sizes in placement.num_bytes.items():
        clients = {client for client, size in enumerate(sizes) if size is not None}
        seen_by_host.setdefault(placement.hosts[rank], set()).update(clients)
    folders = set().union(*seen_by_host.values())
    if not folders:
        return
    for host, clients in list(seen_by_host.items())[:_MAX_LINES]:
        finding = f"{host} sees {len(clients)} of {len(folders)} folders"
        if clients < folders:
            finding += f", not {_names(placement.config, sorted(folders - clients))}"
        report.add("ok", "silos", finding)
    if len(seen_by_host) > _MAX_LINES:
        fewest = min(len(clients) for clients in seen_by_host.values())
        num_more = len(seen_by_host) - _MAX_LINES
        report.add("ok", "silos", f"{num_more} more hosts; each of all sees at least {fewest}")


def _report_placement(report: CheckReport, placement: Placement) -> None:
    """Report which rank plays which silos in a run."""
    client_ranks = sorted(placement.num_bytes)
    for rank in client_ranks[:_MAX_LINES]:
        ids = placement.assignment[rank]
        where = f"rank {rank} on {placement.hosts[rank]}"
        if ids:
            finding = f"{where} plays {len(ids)}: {_names(placement.config, ids)}"
            report.add("ok", "placement", finding)
        else:
            report.add(
                "warn",
                "placement",
                f"{where} plays no silo, and will idle; start fewer ranks there",
            )
    if len(client_ranks) > _MAX_LINES:
        counts = [len(placement.assignment[rank]) for rank in client_ranks[_MAX_LINES:]]
        finding = f"{len(counts)} more ranks play {min(counts)} to {max(counts)} each"
        report.add("ok" if min(counts) else "warn", "placement", finding)


def _report_declarations(report: CheckReport, silos: OpenSilos, hosts: Sequence[str]) -> None:
    """Report what silos declare: sizes of those that can be used, the problems of the others.

    Args:
        report: gets the findings.
        silos: opened.
        hosts: by rank.
    """
    federation = silos.config.federation
    rank_of = {client: rank for rank, ids in enumerate(silos.assignment) for client in ids}
    usable = [item for item in silos.declarations if item.error is None]
    errors = [item.error for item in silos.declarations if item.error is not None]
    for item in usable[:_MAX_LINES]:
        rank = rank_of[item.client]
        name = federation.silos[item.client].name
        report.add("ok", "silo", f"{name} on {hosts[rank]}, rank {rank}: {_sizes(item)}")
    if len(usable) > _MAX_LINES:
        sizes = [item.size for item in usable[_MAX_LINES:] if item.size is not None]
        total = f", with {sum(sizes):,} examples" if sizes else ""
        report.add("ok", "silo", f"{len(usable) - _MAX_LINES} more can be used{total}")
    status: Status = "FAIL" if federation.on_failure == "stop" else "warn"
    for error in errors[:_MAX_LINES]:
        report.add(status, "silo", error.removeprefix("silo "))
    if len(errors) > _MAX_LINES:
        report.add(status, "silo", f"{len(errors) - _MAX_LINES} more cannot be used")
    _report_quorum(report, silos, len(usable))


def _report_quorum(report: CheckReport, silos: OpenSilos, num_usable: int) -> None:
    """Report with how many of the silos a run goes on, if it does.

    Args:
        report: gets the finding.
        silos: opened.
        num_usable: how many of them can be used.
    """
    federation = silos.config.federation
    finding = f"{num_usable} of {len(silos.declarations)} can be used"
    if num_usable < federation.min_clients:
        report.add(
            "FAIL",
            "silos",
            f"found that {finding}, expected at least federation.min_clients="
            f"{federation.min_clients}",
        )
    elif num_usable < len(silos.declarations):
        consequence = (
            "ends before its first round"
            if federation.on_failure == "stop"
            else "leaves the others out"
        )
        report.add(
            "ok",
            "silos",
            f"{finding}; federation.on_failure={federation.on_failure}: a run {consequence}",
        )
    else:
        report.add("ok", "silos", finding)


def _sizes(item: Declaration) -> str:
    """Return what a silo discloses of its sizes."""
    if item.size is None:
        return "sizes are not disclosed"
    held_out = f", {item.num_held_out:,} held out" if item.num_held_out else ""
    return f"{item.size:,} examples{held_out}, the longest {item.longest} tokens"


def _names(config: Config, clients: Sequence[int]) -> str:
    """Return the names of the first of some silos, and how many more there are."""
    names = [config.federation.silos[client].name for client in clients[:_MAX_NAMES]]
    if len(clients) > _MAX_NAMES:
        names.append(f"{len(clients) - _MAX_NAMES} more")
    return ", ".join(names)
