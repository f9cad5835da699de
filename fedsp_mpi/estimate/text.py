"""Write cost estimates as plain text and as Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence

from fedsp_mpi.comm.compression import num_bytes
from fedsp_mpi.comm.messages import HEADER_BYTES
from fedsp_mpi.config import Config
from fedsp_mpi.estimate import memory
from fedsp_mpi.estimate.cost import CostEstimate, MethodCost, SiloSizes
from fedsp_mpi.report import handed_out
from fedsp_mpi.report.formatting import (
    as_bytes,
    as_count,
    as_gib,
    markdown_table,
    scaled,
    table,
)

# How many times smaller than the global model the auxiliary one is, by FedSP's paper.
PAPER = {"gpt2-xl": 14.5, "openai-community/gpt2-xl": 14.5, "facebook/opt-1.3b": 8.5}
_MAX_SILOS = 8  # names that an estimate shows
_HEAD = (
    "method",
    "holds",
    "trains",
    "hand-out",
    "down",
    "up",
    "in all",
    "FLOPs a step",
    "a round",
)


def text(estimate: CostEstimate, tflops: float) -> str:
    """Write an estimate as plain text.

    Args:
        estimate: of one experiment.
        tflops: sustained speed of a GPU, in 10^12 FLOPs per second.
    """
    one_gpu = hours(estimate.flops, tflops)
    gpu_each = hours(estimate.critical, tflops)
    work = [
        f"{phase:<21} {scaled(flops, 'FLOP'):>11} {hours(flops, tflops):>12}"
        for phase, flops in estimate.phases.items()
    ]
    duration = [
        f"{one_gpu} on one GPU of {tflops:g} TFLOP/s sustained, all clients one after another;",
        f"{gpu_each} with such a GPU for each client of a round and one for the server",
        f"left out: padding, {_validation_left_out(estimate)}, optimizers, loading, waiting",
    ]
    judging = []
    if estimate.config.evaluation.at != "server":
        judging = ["down: what a round begins with, and its result, which every silo judges."]
    lines = [
        *_facts(estimate),
        "",
        *table(_HEAD, [_row(method) for method in estimate.methods]),
        "of a client: parameters; bytes once, per round, and of all clients and rounds; FLOPs,",
        "alignment / prompts where a round has both. All methods with the rounds, steps and",
        "batches of this configuration.",
        *judging,
        "",
        *_labelled("memory", _memory(estimate)),
        *_labelled("work", work),
        *_labelled("hours", duration),
    ]
    return "\n".join(lines)


def markdown(estimates: Sequence[CostEstimate], tflops: float) -> str:
    """Write estimates as two Markdown tables: each method's demands on a client, and whole runs.

    Args:
        estimates: an experiment each.
        tflops: sustained speed of a GPU, in 10^12 FLOPs per second.
    """
    method_head = ("configuration", *_HEAD)
    method_rows = [
        (estimate.label, *_row(method)) for estimate in estimates for method in estimate.methods
    ]
    phases = list(dict.fromkeys(phase for estimate in estimates for phase in estimate.phases))
    run_head = (
        "configuration",
        "global",
        "auxiliary",
        "ratio",
        "server's memory",
        "a client's",
        *phases,
        "hours, one GPU",
        "a GPU each",
    )
    run_rows = [_run_row(estimate, phases, tflops) for estimate in estimates]
    left_out = max((_validation_left_out(estimate) for estimate in estimates), key=len)
    return "\n\n".join(
        [
            markdown_table(method_head, method_rows, num_left=2),
            markdown_table(run_head, run_rows),
            f"Hours at {tflops:g} TFLOP/s sustained, without padding, {left_out}.",
        ]
    )


def _run_row(estimate: CostEstimate, phases: Sequence[str], tflops: float) -> tuple[str, ...]:
    """Return the cells of a whole run.

    Args:
        estimate: of the run.
        phases: columns of FLOPs.
        tflops: sustained speed of a GPU, in 10^12 FLOPs per second.
    """
    sizes = estimate.sizes
    server = estimate.server.device + estimate.server.host + memory.LIBRARIES
    client = estimate.client.device + estimate.client.host + memory.LIBRARIES
    return (
        estimate.label,
        f"{sizes.global_model:,}",
        f"{sizes.auxiliary:,}",
        f"{estimate.ratios['as held']:#.3g} x" if estimate.ratios else "",
        as_gib(server),
        as_gib(client),
        *(scaled(estimate.phases.get(phase, 0.0), "FLOP") for phase in phases),
        hours(estimate.flops, tflops),
        hours(estimate.critical, tflops),
    )


def _facts(estimate: CostEstimate) -> list[str]:
    """Return the lines about models, prompts, rounds and texts."""
    sizes = estimate.sizes
    config = estimate.config
    texts = estimate.texts
    federation = config.federation
    clients_per_round = federation.clients_per_round or federation.clients
    lines = [
        f"plan      {estimate.label}",
        (
            f"global    {config.model.name}: {sizes.global_model:,} parameters, "
            f"{sizes.num_layers} layers"
        ),
    ]
    if not config.tunes_weights:
        lines += _auxiliary(estimate)
    lines += [
        f"recipe    {config.recipe}",
        f"clients   get {handed_out.sentence(estimate.handed_out)}",
        f"wire      {_wire(estimate)} for a client and round, + {HEADER_BYTES} each",
        (
            f"rounds    {federation.rounds}, of {clients_per_round} of {federation.clients} "
            f"clients, steps in each: {_steps(estimate)}"
        ),
        (
            f"texts     {texts.tokens} tokens, {texts.answers} of them the answer; the longest "
            f"{texts.longest} ({config.data.task}: {texts.source})"
        ),
    ]
    if estimate.silos:
        lines += _labelled("silos", _silos(config, estimate.silos))
    return lines


def _silos(config: Config, sizes: SiloSizes) -> list[str]:
    """Return the lines about silos: their names, and what is assumed of their text."""
    silos = config.federation.silos
    names = [silo.name for silo in silos if not silo.is_pattern]
    patterns = [silo.source for silo in silos if silo.is_pattern]
    lines = []
    if names:
        shown = names[:_MAX_SILOS]
        if len(names) > _MAX_SILOS:
            shown.append(f"and {len(names) - _MAX_SILOS} more")
        lines.append(f"{len(names)}: {', '.join(shown)}")
    for pattern in patterns[:_MAX_SILOS]:
        lines.append(f"found nothing here that matches {pattern}")
    if patterns:
        lines.append(
            f"counted as {config.federation.clients} in all; set federation.clients to count others"
        )
    judges = config.evaluation.at != "server"
    if judges or config.searches:
        held_out = f", {sizes.held_out:,} to judge each round by" if judges else ""
        lines.append(f"of each {sizes.train:,} examples to train on{held_out}: assumed, after")
        lines.append(f"{sizes.source}; no silo is opened")
    return lines


def _validation_left_out(estimate: CostEstimate) -> str:
    """Return which validation is not among the FLOPs."""
    owner = "" if estimate.config.evaluation.at == "server" else "the server's "
    return f"{owner}validation and scoring"


def _steps(estimate: CostEstimate) -> str:
    """Return the steps of a client's round."""
    config = estimate.config
    client = config.client
    if config.in_words:
        return f"{config.instructions.candidates} instructions, without gradients"
    if config.searches:
        return f"{config.search.iterations} of {config.search.population} points, without gradients"
    if config.tunes_weights:
        steps = f"{client.tuning.steps} of the weights"
    else:
        steps = f"{client.tuning.steps} of prompts"
    if client.training == "joint":
        return f"{steps} and weights"
    has_alignment = client.training == "alternating" and client.alignment.steps
    if has_alignment and not config.tunes_weights:
        return f"{client.alignment.steps} of alignment and {steps}"
    return steps


def _wire(estimate: CostEstimate) -> str:
    """Return the bytes that go down and up, without headers; without clients, what would."""
    method = estimate.methods[0]
    if estimate.config.searches:
        return f"{method.down - HEADER_BYTES:,} bytes down and {method.up - HEADER_BYTES:,} up"
    size = num_bytes(estimate.sizes.wire, estimate.config.federation.compression)
    seals = f", and {method.up - method.down:,} up that seal it"
    is_sealed = estimate.config.wire.encryption
    return f"{size:,} bytes down and up{seals if is_sealed else ''}"


def _auxiliary(estimate: CostEstimate) -> list[str]:
    """Return the lines about the clients' model, and what they exchange."""
    sizes = estimate.sizes
    config = estimate.config
    if config.asks_server:
        lines = ["auxiliary none: clients hold no model, and send their text to the server"]
    else:
        num_layers = config.auxiliary.layers_per_cell or sizes.depth
        bridge = ", and a bridge" if config.auxiliary.first_layers else ""
        lines = [
            (
                f"auxiliary {sizes.auxiliary:,} parameters, {num_layers} of the layers, run "
                f"{sizes.depth} deep{bridge}: {estimate.ratios['as held']:#.3g} x fewer"
            ),
            *_labelled("", _ratios(estimate)),
        ]
    if config.in_words:
        travel = f"instructions of at most {config.prompt.num_tokens} tokens"
    elif config.searches:
        travel = f"searched for in {config.search.dimension:,} dimensions"
    else:
        travel = f"{sizes.wire:,} on the wire"
    lines.append(f"prompts   {sizes.prompt:,} values at the global model's depth, {travel}")
    return lines


def _ratios(estimate: CostEstimate) -> list[str]:
    """Return the lines about other ways to count how much smaller the auxiliary model is."""
    config = estimate.config
    lines = []
    counted = [
        f"{ratio:#.3g} x {way}" for way, ratio in estimate.ratios.items() if way != "as held"
    ]
    if counted:
        lines.append(f"counted otherwise: {', '.join(counted)}")
    paper = PAPER.get(str(config.model.name))
    if paper and config.auxiliary.layers_per_cell == 1:
        lines.append(f"FedSP's paper says {paper} x, and does not say how it counts")
    return lines


def _memory(estimate: CostEstimate) -> list[str]:
    libraries = as_gib(memory.LIBRARIES)
    server = estimate.server
    client = estimate.client
    return [
        (
            f"server's rank: {as_gib(server.device)} on its device; on its host {libraries} of "
            "libraries"
        ),
        (
            f"client's rank: {as_gib(client.device)} on its device; on its host {libraries}, and "
            f"{as_gib(client.host)} for one client"
        ),
    ]


def _row(method: MethodCost) -> tuple[str, ...]:
    """Return the cells of a method, in the columns of `_HEAD`."""
    return (
        method.name,
        as_count(method.holds),
        as_count(method.trains),
        as_bytes(method.handout),
        as_bytes(method.down + method.judged),
        as_bytes(method.up),
        as_bytes(method.total),
        " / ".join(scaled(step) for step in method.steps),
        scaled(method.round),
    )


def _labelled(label: str, lines: Sequence[str]) -> list[str]:
    """Indent lines by a column of labels, in which the first line has one."""
    return [f"{label if index == 0 else '':<9} {line}" for index, line in enumerate(lines)]


def hours(flops: float, tflops: float) -> str:
    """Write how long FLOPs take at `tflops` * 10^12 FLOPs per second: 6.26 h."""
    number = flops / (tflops * 1e12) / 3600
    if number == 0:
        return "0 h"
    if number < 0.01:
        return "< 0.01 h"
    if number < 10:
        return f"{number:.2f} h"
    return f"{number:,.0f} h"
