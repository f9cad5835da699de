"""The lines that a run says at its start: ranks, clients, model, data, privacy."""

from __future__ import annotations

from collections.abc import Sequence

from fedsp_mpi.comm import Topology
from fedsp_mpi.config import Config
from fedsp_mpi.log import Log
from fedsp_mpi.run import devices, environment
from fedsp_mpi.run.inputs import ExperimentInputs
from fedsp_mpi.run.opening import privacy_section
from fedsp_mpi.run.ranks import Assignment, RankInfo

_MAX_SILOS_SHOWN = 8


def say_ranks(
    log: Log,
    config: Config,
    *,
    ranks: Sequence[RankInfo],
    assignment: Assignment,
    topology: Topology,
) -> None:
    """Say where the ranks are and how the clients are spread over them.

    Args:
        log: gets the lines.
        config: of the run.
        ranks: all of them.
        assignment: the clients of each rank.
        topology: of rank 0.
    """
    size = len(ranks)
    servers = config.topology.server_ranks
    if size == 1:
        kind = "one process plays all"
    else:
        kind = f"{servers} server, {size - servers} client ranks"
    names_by_host: dict[str, set[str]] = {}
    for rank in ranks:
        names = {device.name for device in rank.devices.values()}
        names_by_host.setdefault(rank.host, set()).update(names)
    hosts = [f"{host} ({', '.join(sorted(names))})" for host, names in names_by_host.items()]
    log.say(f"ranks     {size} ({kind}) on {', '.join(hosts)}")
    for uuid, sharing in devices.shared_gpus([rank.devices for rank in ranks]).items():
        log.say(f"          {uuid} is shared by ranks {devices.format_ranges(sharing)}")
    if topology.is_crowded:
        log.say(
            f"          {topology.local_size} ranks share {topology.host_cores} cores: "
            f"`-n {max(2, topology.host_cores)}` does the same with less work"
        )
    most = max(len(ids) for ids in assignment)
    log.say(
        f"clients   {config.federation.clients}, at most {most} on a rank; "
        f"threads: {environment.threads(ranks)}"
    )
    if config.tiers.experts and servers > 1:
        experts = [expert.name for expert in config.tiers.experts]
        dealt_out = [f"{', '.join(experts[rank::servers])} on {rank}" for rank in range(servers)]
        log.say(f"experts   {'; '.join(dealt_out)}")


def say_inputs(log: Log, inputs: ExperimentInputs, *, is_embedded: bool) -> None:
    """Say which model and data are used, and what is promised to clients.

    Args:
        log: gets the lines.
        inputs: of the experiment.
        is_embedded: the configuration is the embedded default, with changes.
    """
    config = inputs.config
    model = inputs.model_config
    splits = inputs.splits
    server_size, *client_sizes = inputs.shard_sizes
    log.say(f"recipe    {config.recipe}{_settings_note(config, is_embedded)}")
    log.say(f"model     {config.model.name}: {model.model_type}, {model.num_hidden_layers} layers")
    if inputs.origin is not None:
        log.say(f"          starts from {inputs.origin['runs'][0]['folder']}")
    mean_size = sum(client_sizes) // max(1, len(client_sizes))
    scored = f"{len(splits.validation)} validation, {len(splits.test)} test"
    if config.federation.silos:
        owner = "the experts'" if config.tiers.experts else f"{config.data.task}: the server's"
        log.say(f"data      {owner} {server_size} train, {scored}")
    elif config.tiers.experts:
        log.say(
            f"data      {len(splits.train)} train ({server_size} the experts', about {mean_size} "
            f"each user's), {scored}"
        )
    else:
        log.say(
            f"data      {config.data.task}: {len(splits.train)} train ({server_size} the "
            f"server's, about {mean_size} each client's), {scored}"
        )
    for expert in config.tiers.experts:
        task = expert.task or config.data.task
        log.say(f"          {expert.name} ({task}): {', '.join(expert.users)}")
    if config.federation.silos:
        log.say(f"silos     {_silos_line(config, client_sizes)}")
    for note in inputs.notes:
        log.say(f"          {note}")
    privacy = privacy_section(config)
    if privacy:
        log.say(
            f"privacy   an update's epsilon is {privacy['epsilon']:g}, of all rounds "
            f"{privacy['epsilon_all']:g}"
        )
    if config.asks_server:
        log.say(
            "privacy   clients hold no model: their text goes to the server (search.forward=server)"
        )


def _silos_line(config: Config, sizes: Sequence[int]) -> str:
    """Return the names and sizes of the first silos, as they have declared them."""
    silos = config.federation.silos
    is_said = config.federation.disclose != "nothing"
    shown = [
        f"{silo.name} {size}" if is_said else silo.name
        for silo, size in zip(silos[:_MAX_SILOS_SHOWN], sizes)
    ]
    if len(silos) > _MAX_SILOS_SHOWN:
        shown.append(f"and {len(silos) - _MAX_SILOS_SHOWN} more")
    return f"{len(silos)}: {', '.join(shown)}"


def _settings_note(config: Config, is_embedded: bool) -> str:
    """Warn of settings that were made for another model than the one that is tuned."""
    if not is_embedded or config.model.name == "embedded":
        return ""
    return (
        ", with the settings of the embedded default, which suit its tiny model; for others begin "
        "from configs/smollm2/arc_easy.yaml"
    )
