"""Silos before the first round: who can see which, who plays which, and what each declares.

Nobody but the rank that plays a silo opens a file of it. What a rank says of silos at first comes
from names and sizes of files; what it declares then are numbers and digests, never text, token ids
or counts of labels.
"""

from __future__ import annotations

import glob
import math
import os
import platform
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fedsp_mpi import comm
from fedsp_mpi.comm import Topology
from fedsp_mpi.comm.inspection import ProtocolError, reading, require_fields
from fedsp_mpi.config import Config, ConfigError, SiloConfig
from fedsp_mpi.config.silos import WILDCARD
from fedsp_mpi.files.untrusted import JsonMapping, JsonObject, printable
from fedsp_mpi.log import Log, one_line
from fedsp_mpi.run.agreement import agreed
from fedsp_mpi.run.ranks import Assignment

if TYPE_CHECKING:
    from fedsp_mpi.comm.solo import Solo
    from fedsp_mpi.comm.wire import Wire
    from fedsp_mpi.run.silo_inputs import SiloInputs

_MAX_NAMED = 10  # silos that the log names
_MAX_HOSTS_NAMED = 4  # of a silo that differs
_MAX_REASON = 300  # characters of a silo's problem
# Of a Slurm task: its node's name in Slurm, which may differ from the host's.
_NODE_VARIABLE = "SLURMD_NODENAME"


@dataclass(frozen=True)
class OpenSilos:
    """Silos that are ready for the first round.

    Attributes:
        config: of the run, its silos found.
        inputs: of this rank, with the silos that it plays.
        assignment: the clients of each rank.
        declarations: of all silos, by client; on the server.
        mistake: why the model or the server's own text cannot be used; on the server.
    """

    config: Config
    inputs: SiloInputs
    assignment: Assignment
    declarations: Sequence[Declaration]
    mistake: str | None = None


@dataclass(frozen=True)
class View:
    """What a rank sees of the silos, without opening a file.

    Attributes:
        hosts: names that this rank's host goes by; the first one stands in messages.
        num_bytes: size of each silo that has a name, in the order of the configuration; None: it
            is not there, or stands for silos that are still to be found.
        matches: what matches each pattern, by its place in the configuration: path and size by
            name.
    """

    hosts: Sequence[str]
    num_bytes: Sequence[int | None]
    matches: Mapping[int, Mapping[str, tuple[str, int]]]

    @classmethod
    def of_this_rank(cls, silos: Sequence[SiloConfig]) -> View:
        """Look at the folders of the silos."""
        num_bytes = [None if silo.is_pattern else _size_of(silo.source) for silo in silos]
        matches = {
            index: _matches(silo.source) for index, silo in enumerate(silos) if silo.is_pattern
        }
        return cls(_host_names(), num_bytes, matches)

    def to_json(self) -> JsonObject:
        """Return this as it travels."""
        content = asdict(self)
        content["matches"] = {str(index): paths for index, paths in self.matches.items()}
        return content

    @classmethod
    def from_json(cls, values: JsonMapping, rank: int) -> View:
        """Read what a rank sent; raise ProtocolError, naming the rank, if it cannot be."""
        with reading(rank, "what it sees of the silos"):
            require_fields(values, rank, {"hosts": list, "num_bytes": list, "matches": dict})
            matches = {
                int(index): {
                    str(name): (str(path), int(size)) for name, (path, size) in paths.items()
                }
                for index, paths in values["matches"].items()
            }
            if not values["hosts"]:
                raise ValueError("a host without a name")
            sizes = [None if size is None else int(size) for size in values["num_bytes"]]
            return cls([str(host) for host in values["hosts"]], sizes, matches)


@dataclass(frozen=True)
class Declaration:
    """What a rank declares of a silo that it plays.

    Attributes:
        client: the silo's place among the silos.
        size: number of training examples, as `federation.disclose` has it; None: not said.
        num_held_out: number of examples that it holds back, likewise.
        longest: number of tokens of the longest text, likewise.
        reading: digest of tokenizer, template and verbaliser.
        choices: digest of the choices; None where examples have none in common.
        error: why the silo cannot be used; None if it can.
    """

    client: int
    size: int | None = None
    num_held_out: int | None = None
    longest: int | None = None
    reading: str = ""
    choices: str | None = None
    error: str | None = None

    @classmethod
    def from_json(cls, values: JsonMapping, rank: int) -> Declaration:
        """Read what a rank sent; raise ProtocolError, naming the rank, if it cannot be."""
        number = (int, type(None))
        text = (str, type(None))
        require_fields(values, rank, {"client": int, "reading": str, "choices": text})
        require_fields(values, rank, {"size": number, "num_held_out": number, "error": text})
        require_fields(values, rank, {"longest": number})
        declaration = cls(**{name: values[name] for name in cls.__dataclass_fields__})
        sizes = (declaration.size, declaration.num_held_out, declaration.longest)
        if any(size is not None and size < 0 for size in sizes):
            raise ProtocolError(f"rank {rank}: found a silo of negative size, which cannot be")
        if declaration.error is None:
            return declaration
        return replace(declaration, error=printable(declaration.error)[: 2 * _MAX_REASON])


@dataclass(frozen=True)
class Placement:
    """Which rank plays which silo.

    Attributes:
        config: of the run, its silos found.
        assignment: the clients of each rank.
        problems: why silos cannot be placed, by client; their rank says so of them.
        num_bytes: size of each silo as each client rank sees it, by rank, then by client; None: it
            does not. On the server.
        hosts: of all ranks, as `host` of a silo names them. On the server.
    """

    config: Config
    assignment: Assignment
    problems: Mapping[int, str]
    num_bytes: Mapping[int, Sequence[int | None]]
    hosts: Sequence[str]


def open_silos(config: Config, name: str, wire: Wire | Solo, *, log: Log) -> OpenSilos:
    """Find the silos, place them on ranks, open them, and hear what they declare.

    Collective.

    Args:
        config: of the run.
        name: of the configuration, for a run that has none.
        wire: between all ranks.
        log: is told of silos that cannot be used.

    Raises:
        comm.Refused: on every rank, if silos cannot be placed, or too few of them can be used.
    """
    silos = declare_silos(place_silos(config, name, wire), wire)
    inputs = silos.inputs
    declarations = silos.declarations
    with agreed(wire) as agreement:
        if wire.is_server:
            if silos.mistake is not None:
                raise comm.Refused(silos.mistake)
            _require_enough(declarations, silos.config, log)
            inputs.sizes = [declaration.size or 0 for declaration in declarations]
            agreement.note = {
                item.client: item.error for item in declarations if item.error is not None
            }
    ids = silos.assignment[wire.topology.rank]
    for client, reason in agreement.note.items():
        if int(client) in ids:
            inputs.refuse_silo(int(client), reason)
    return silos


def place_silos(config: Config, name: str, wire: Wire | Solo) -> Placement:
    """Find the silos, and choose a rank for each, without opening a file of theirs.

    Collective.

    Args:
        config: of the run.
        name: of the configuration, for a run that has none.
        wire: between all ranks.

    Raises:
        comm.Refused: on every rank, if silos cannot be placed.
    """
    messages = wire.collect(_view(config, wire.topology), "silos")
    views: list[View] = []
    with agreed(wire) as agreement:
        if messages is not None:
            views = [View.from_json(message, rank) for rank, message in enumerate(messages)]
            agreement.note = _place_all(config, name, views, topology=wire.topology)
    placed_silos, assignment, problems = agreement.note
    first = _first_client_rank(config, wire.topology)
    num_bytes = {
        rank: [_seen_size(views[rank], index, match) for index, match, _ in placed_silos]
        for rank in range(first, len(views))
    }
    return Placement(
        config=with_silos(config, _read_silos(config, placed_silos)),
        assignment=[tuple(ids) for ids in assignment],
        problems={int(client): text for client, text in problems.items()},
        num_bytes=num_bytes,
        hosts=[view.hosts[0] for view in views],
    )


def declare_silos(placement: Placement, wire: Wire | Solo) -> OpenSilos:
    """Open the silos that this rank plays, and have the server hear what is declared of all.

    Collective. Nothing is refused here: silos that cannot be used are among the declarations.

    Args:
        placement: of the silos.
        wire: between all ranks.
    """
    from fedsp_mpi.run.any_inputs import silo_inputs_of

    config = placement.config
    ids = placement.assignment[wire.topology.rank]
    inputs = silo_inputs_of(config)
    inputs.problems = {client: text for client, text in placement.problems.items() if client in ids}
    mistake = None
    if wire.is_server:
        try:
            inputs.check()
        except (ValueError, OSError) as error:
            mistake = one_line(error)
    own_silos = [asdict(_declare(inputs, client)) for client in ids]
    messages = wire.collect({"silos": own_silos}, "declaration")
    declarations: list[Declaration] = []
    if messages is not None:
        declarations = _read_declarations(messages, placement.assignment, config)
        if mistake is None:
            declarations = _with_disagreements(declarations, inputs)
    return OpenSilos(config, inputs, placement.assignment, declarations, mistake)


def with_silos(config: Config, silos: Sequence[SiloConfig]) -> Config:
    """Return the configuration with these silos as its clients."""
    federation = replace(config.federation, silos=tuple(silos), clients=len(silos))
    return replace(config, federation=federation)


# -- finding and placing ---------------------------------------------------------------------------


def _view(config: Config, topology: Topology) -> JsonObject:
    """Return what this rank sees of the silos; ranks of the server do not look."""
    is_server = topology.rank < _first_client_rank(config, topology)
    silos = () if is_server else config.federation.silos
    return View.of_this_rank(silos).to_json()


def _first_client_rank(config: Config, topology: Topology) -> int:
    return 0 if topology.solo else config.topology.server_ranks


def _host_names() -> list[str]:
    """Return the names that this rank's host goes by: in Slurm, in full, and without a domain."""
    full_names = [os.environ.get(_NODE_VARIABLE, ""), platform.node() or "localhost"]
    names = [name for full in full_names for name in (full, full.partition(".")[0]) if name]
    return list(dict.fromkeys(names))


def _size_of(source: str) -> int | None:
    """Return the bytes of a folder's files without opening one; None if there is no such folder."""
    path = Path(source).expanduser()
    if path.is_file():
        return path.stat().st_size
    if not path.is_dir():
        return None
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with suppress(OSError):  # a link to nowhere: it is found out when it is opened
                total += Path(folder, name).stat().st_size
    return total


def _matches(pattern: str) -> dict[str, tuple[str, int]]:
    """Return path and size of what matches a pattern, by name: what * stands for."""
    expanded = str(Path(pattern).expanduser().absolute())
    star = re.escape("*")
    expression = re.compile(re.escape(expanded).replace(star, "([^/]+)"))
    paths = {}
    for path in sorted(glob.glob(expanded)):  # noqa: PTH207, absolute patterns
        match = expression.fullmatch(path)
        size = _size_of(path)
        if match is not None and size is not None:
            paths["-".join(match.groups())] = (path, size)
    return paths


def _place_all(
    config: Config, name: str, views: Sequence[View], *, topology: Topology
) -> tuple[list[tuple[int, str, str]], list[list[int]], dict[int, str]]:
    """Find the silos in what the ranks see, and assign them to ranks.

    Args:
        config: of the run.
        name: of the configuration, for a run that has none.
        views: what each rank sees, by rank.
        topology: of the server.

    Returns:
        The silos, each as its place in the configuration, name and source; the ids of each rank;
        and why silos cannot be placed, by id.

    Raises:
        comm.Refused: there is none, or the configuration cannot work with those that there are.
    """
    first = _first_client_rank(config, topology)
    try:
        placed = _find(config, name, views[first:])
        complete = with_silos(config, _read_silos(config, placed))
        complete.check()
        assignment, problems = _assign(complete, placed, views, first=first)
    except ValueError as error:
        raise comm.Refused(one_line(error)) from None
    return placed, assignment, problems


def _read_silos(config: Config, placed: Sequence[tuple[int, str, str]]) -> list[SiloConfig]:
    """Return the silos that were found, as the configuration has them."""
    silos = config.federation.silos
    return [replace(silos[index], name=name, source=source) for index, name, source in placed]


def _find(config: Config, name: str, views: Sequence[View]) -> list[tuple[int, str, str]]:
    """Return the silos in the order of the configuration, those of a pattern by name.

    A run that is resumed has the silos that it was begun with, one with experts those of its users.

    Raises:
        ConfigError: nothing matches, or a silo is new to the run, or no user's.
    """
    placed: list[tuple[int, str, str]] = []
    recorded = _recorded_names(config, name)
    for index, silo in enumerate(config.federation.silos):
        if not silo.is_pattern:
            placed.append((index, silo.name, silo.source))
            continue
        paths: dict[str, str] = {}
        for view in views:
            paths |= {match: path for match, (path, _) in view.matches.get(index, {}).items()}
        if not paths and not recorded:
            hosts = sorted({view.hosts[0] for view in views if view.hosts})
            raise ConfigError(
                f"federation.silos[{index}].source: found nothing that matches {silo.source} on "
                f"{', '.join(hosts[:_MAX_NAMED])}, expected a folder for each silo"
            )
        placed += [(index, match, paths[match]) for match in sorted(paths)]
    return _of_users(config, _as_recorded(config, placed, recorded))


def found_here(config: Config) -> Config:
    """Return the configuration with the silos that its patterns match on this host.

    A pattern that matches nothing stays. No file is opened.

    Raises:
        ConfigError: the configuration cannot work with those silos.
    """
    placed: list[tuple[int, str, str]] = []
    for index, silo in enumerate(config.federation.silos):
        paths = _matches(silo.source) if silo.is_pattern else {}
        placed += [(index, name, path) for name, (path, _) in paths.items()]
        if not paths:
            placed.append((index, silo.name, silo.source))
    silos = _read_silos(config, placed)
    if silos == list(config.federation.silos):
        return config
    complete = with_silos(config, _read_silos(config, _of_users(config, placed)))
    if not any(silo.is_pattern for silo in complete.federation.silos):
        complete.check()
    return complete


def _as_recorded(
    config: Config, placed: Sequence[tuple[int, str, str]], recorded: Sequence[str]
) -> list[tuple[int, str, str]]:
    """Return the silos of the run that is resumed, also those that are not there any more."""
    if not recorded:
        return list(placed)
    new = [name for _, name, _ in placed if name not in recorded]
    if new:
        raise ConfigError(
            f"federation.silos: found {', '.join(new[:_MAX_NAMED])}, which the run was begun "
            "without, expected the same silos; move them away, or choose another run.name"
        )
    return _named(config, placed, recorded)


def _of_users(config: Config, placed: Sequence[tuple[int, str, str]]) -> list[tuple[int, str, str]]:
    """Return the silos of all users of experts, in their order; without experts those given."""
    users = config.tiers.users
    if not users:
        return list(placed)
    strangers = [name for _, name, _ in placed if name not in (*users, WILDCARD)]
    if strangers:
        raise ConfigError(
            f"federation.silos: found {', '.join(strangers[:_MAX_NAMED])}, expected the names of "
            "users of tiers.experts; name them among an expert's users, or move them away"
        )
    return _named(config, placed, users)


def _named(
    config: Config, placed: Sequence[tuple[int, str, str]], names: Sequence[str]
) -> list[tuple[int, str, str]]:
    """Return the silos of these names; one that is not there lies where the pattern has it."""
    by_name = {name: (index, name, source) for index, name, source in placed}
    pattern = next(
        (index for index, silo in enumerate(config.federation.silos) if silo.is_pattern), 0
    )
    source = config.federation.silos[pattern].source
    return [by_name.get(name, (pattern, name, source.replace(WILDCARD, name))) for name in names]


def _recorded_names(config: Config, name: str) -> list[str]:
    """Return the names of the silos of the run that is resumed, if silos are found by pattern."""
    is_found = any(silo.is_pattern for silo in config.federation.silos)
    if config.run.resume == "never" or not is_found:
        return []
    from fedsp_mpi.record import read
    from fedsp_mpi.run.folder import RunFolder

    folder = RunFolder(config, name).path
    if not (folder / "run.h5").exists():
        return []
    silos = read(folder).config.get("federation", {}).get("silos", [])
    return [str(silo["name"]) for silo in silos]


def _assign(
    config: Config, placed: Sequence[tuple[int, str, str]], views: Sequence[View], *, first: int
) -> tuple[list[list[int]], dict[int, str]]:
    """Assign silos to client ranks that can open them, each to the one with the least work.

    Args:
        config: of the run, its silos found.
        placed: the silos as `_find` returns them.
        views: of all ranks.
        first: the first client rank.

    Returns:
        The ids of each rank, ascending; and why silos cannot be placed, by id. Those are assigned
        too: their rank says so in every round.
    """
    client_ranks = list(range(first, len(views)))
    problems: dict[int, str] = {}
    allowed: dict[int, list[int]] = {}
    work: dict[int, float] = {}
    for client, (index, name, _) in enumerate(placed):
        silo = config.federation.silos[client]
        sizes = {rank: _seen_size(views[rank], index, name) for rank in client_ranks}
        on_host = [rank for rank in client_ranks if silo.host in (None, *views[rank].hosts)]
        if not on_host:
            hosts = sorted({views[rank].hosts[0] for rank in client_ranks})
            problems[client] = (
                f"found no client rank on its host {silo.host}, expected one of "
                f"{', '.join(hosts[:_MAX_NAMED])}; correct host, or start a rank there"
            )
        # An empty folder may be the place where the disk of another host would be mounted.
        seeing = [rank for rank in on_host if sizes[rank]]
        if len({sizes[rank] for rank in seeing}) > 1:
            problems[client] = _ambiguity({views[rank].hosts[0]: sizes[rank] for rank in seeing})
        seeing = seeing or [rank for rank in on_host if sizes[rank] is not None]
        allowed[client] = seeing or on_host or client_ranks
        most_bytes = max((size for size in sizes.values() if size is not None), default=0)
        # Training steps are equally many; a search runs over all texts.
        work[client] = float(most_bytes) if config.searches else 1.0
    ids: list[list[int]] = [[] for _ in views]
    load = dict.fromkeys(client_ranks, 0.0)
    order = sorted(work, key=lambda client: (len(allowed[client]), -work[client], client))
    for client in order:
        rank = min(allowed[client], key=lambda rank: (load[rank], len(ids[rank]), rank))
        ids[rank].append(client)
        load[rank] += work[client]
    return [sorted(clients) for clients in ids], problems


def _ambiguity(sizes: Mapping[str, int | None]) -> str:
    """Return what is wrong with a silo whose folder is another one on each host.

    Args:
        sizes: bytes of its files, by host.
    """
    places = [f"{size} bytes on {host}" for host, size in sorted(sizes.items())]
    return (
        f"found other files on each host ({', '.join(places[:_MAX_HOSTS_NAMED])}), expected one "
        "folder; name its host, or a silo for each of them"
    )


def _seen_size(view: View, index: int, name: str) -> int | None:
    """Return the bytes of a silo as a rank sees it; None if it does not see it."""
    if index in view.matches:
        match = view.matches[index].get(name)
        return None if match is None else match[1]
    return view.num_bytes[index]


# -- declaring -------------------------------------------------------------------------------------


def _declare(inputs: SiloInputs, client: int) -> Declaration:
    """Open a silo of this rank, and return what is declared of it."""
    config = inputs.config
    try:
        if client in inputs.problems:
            raise ValueError(inputs.problems[client])
        text = inputs.open_silo(client)
    except (ValueError, OSError) as error:
        reason = one_line(error)[:_MAX_REASON]
        inputs.refuse_silo(client, reason)
        return Declaration(client, error=f"on {_host_names()[0]}: {reason}")
    disclose = config.federation.disclose
    return Declaration(
        client,
        size=disclosed(text.num_texts, disclose),
        num_held_out=disclosed(text.num_held_out, disclose),
        longest=disclosed(text.longest, disclose),
        reading=text.reading_digest,
        choices=text.choices(),
    )


def disclosed(number: int, disclose: str) -> int | None:
    """Return a number as `federation.disclose` has it: as it is, rounded to two digits, or None."""
    if disclose == "nothing":
        return None
    if disclose == "exact" or number < 100:
        return number
    digits = int(math.log10(number))
    return round(number, 1 - digits)


def _read_declarations(
    messages: Sequence[JsonMapping], assignment: Sequence[Sequence[int]], config: Config
) -> list[Declaration]:
    """Return the declarations by client, of exactly the silos that were assigned.

    Raises:
        ProtocolError: a rank declares a silo that it does not play, or leaves one out.
    """
    declarations: dict[int, Declaration] = {}
    for rank, message in enumerate(messages):
        with reading(rank, "what its silos declare"):
            require_fields(message, rank, {"silos": list})
            items = [Declaration.from_json(values, rank) for values in message["silos"]]
        if sorted(item.client for item in items) != sorted(assignment[rank]):
            raise ProtocolError(
                f"rank {rank}: found declarations of other silos than it plays, expected one for "
                "each of those"
            )
        for item in items:
            name = config.federation.client_name(item.client)
            error = None if item.error is None else f"{name} {item.error}"
            declarations[item.client] = replace(item, error=error)
    return [declarations[client] for client in sorted(declarations)]


def _with_disagreements(
    declarations: Sequence[Declaration], inputs: SiloInputs
) -> list[Declaration]:
    """Return the declarations, with an error where a silo reads or answers otherwise than others.

    The server's own text decides; where it owns none, what most silos have.
    """
    usable = [item.choices for item in declarations if item.error is None]
    most_silos = {"most silos": max(usable, key=Counter(usable).__getitem__, default=None)}
    key = "tiers.experts[].classes" if inputs.config.tiers.experts else "data.classes"
    checked = []
    for item in declarations:
        silo = inputs.config.federation.silos[item.client]
        error = item.error
        if error is None and item.reading != inputs.reading_digest_of(item.client):
            error = (
                f"silo {silo.name}: found another tokenizer on its host than on the server's, "
                "expected the same files; copy model.tokenizer or model.name there"
            )
        has_own_words = bool(silo.verbaliser)
        references = inputs.choices_by_owner(item.client) or most_silos
        for owner, choices in references.items():
            if error is None and choices and not has_own_words and item.choices != choices:
                error = (
                    f"silo {silo.name}: found other choices in its rows than {owner} have, "
                    f"expected the same labels; correct them, or name all classes in {key}"
                )
        checked.append(replace(item, error=error))
    return checked


def _require_enough(declarations: Sequence[Declaration], config: Config, log: Log) -> None:
    """Name the silos that cannot be used; refuse the run if it should not go on without them.

    Raises:
        comm.Refused: `federation.on_failure` says stop, or fewer than `min_clients` are left.
    """
    errors = [item.error for item in declarations if item.error is not None]
    if not errors:
        return
    if config.federation.on_failure == "stop":
        ending = f" (and {len(errors) - 1} more silos)" if len(errors) > 1 else ""
        raise comm.Refused(f"{errors[0]}{ending}; federation.on_failure=drop goes on without it")
    for error in errors[:_MAX_NAMED]:
        log.say(f"left out: {error}")
    if len(errors) > _MAX_NAMED:
        log.say(f"left out: {len(errors) - _MAX_NAMED} more silos")
    num_usable = len(declarations) - len(errors)
    if num_usable < config.federation.min_clients:
        raise comm.Refused(
            f"federation.silos: found {num_usable} of {len(declarations)} silos usable, expected "
            f"at least federation.min_clients={config.federation.min_clients}; {errors[0]}"
        )
