"""A plan as text, and several as Markdown."""

from __future__ import annotations

from fedsp_mpi.comm.messages import HEADER_BYTES
from fedsp_mpi.estimate import memory
from fedsp_mpi.estimate.cost import FP32_BYTES, Method, Plan

# How many times smaller than the global one the auxiliary model is, as the paper says.
PAPER = {"gpt2-xl": 14.5, "openai-community/gpt2-xl": 14.5, "facebook/opt-1.3b": 8.5}
_HEAD = ("method", "holds", "trains", "hand-out", "down", "up", "in all", "FLOPs a step", "a round")


def text(plan: Plan, tflops: float) -> str:
    """One plan as plain text; hours are those of GPUs that sustain `tflops` * 10^12 FLOPs a second."""
    one, each = (hours(flops, tflops) for flops in (plan.flops, plan.critical))
    phases = [
        f"{phase:<21} {_scaled(flops, 'FLOP'):>11} {hours(flops, tflops):>12}"
        for phase, flops in plan.phases.items()
    ]
    whole = [
        f"{one} on one GPU of {tflops:g} TFLOP/s sustained, all clients one after another;",
        f"{each} with such a GPU for each client of a round and one for the server",
        "left out: padding, validation and scoring, optimizers, loading, waiting",
    ]
    lines = [
        *_facts(plan),
        "",
        *_aligned([_HEAD, *(_row(method) for method in plan.methods)]),
        (
            "of a client: parameters; bytes once, in a round, and of all clients and "
            "rounds; FLOPs, alignment / prompts"
        ),
        (
            "where a round has both. All methods with the rounds, steps and batches of "
            "this configuration."
        ),
        "",
        *_labelled("memory", _memory(plan)),
        *_labelled("work", phases),
        *_labelled("hours", whole),
    ]
    return "\n".join(lines)


def markdown(plans: list[Plan], tflops: float) -> str:
    """Plans as two Markdown tables: what each method asks of a client, and what each whole run
    costs.
    """
    methods = [(plan.label, *_row(method)) for plan in plans for method in plan.methods]
    sizes = ("global", "auxiliary", "ratio", "server's memory", "a client's")
    phases = list(dict.fromkeys(phase for plan in plans for phase in plan.phases))
    head = ("configuration", *sizes, *phases, "hours, one GPU", "a GPU each")
    runs = [
        (
            plan.label,
            *(f"{number:,}" for number in (plan.sizes.global_model, plan.sizes.auxiliary)),
            f"{plan.ratios['as held']:#.3g} x" if plan.ratios else "",
            *(
                _gib(need.device + need.host + memory.LIBRARIES)
                for need in (plan.server, plan.client)
            ),
            *(_scaled(plan.phases.get(phase, 0.0), "FLOP") for phase in phases),
            *(hours(flops, tflops) for flops in (plan.flops, plan.critical)),
        )
        for plan in plans
    ]
    tables = (
        _piped([("configuration", *_HEAD), *methods], num_left=2),
        _piped([head, *runs], num_left=1),
    )
    return "\n\n".join(
        [
            *tables,
            f"Hours at {tflops:g} TFLOP/s sustained, without padding, validation and scoring.",
        ]
    )


def _facts(plan: Plan) -> list[str]:
    """Models, prompts, rounds and texts."""
    sizes, config, texts = plan.sizes, plan.config, plan.texts
    federation, client = config.federation, config.client
    steps = f"{client.tuning.steps} of {'the weights' if config.tunes_weights else 'prompts'}"
    steps += " and weights" if client.training == "joint" else ""
    if client.training == "alternating" and client.alignment.steps and not config.tunes_weights:
        steps = f"{client.alignment.steps} of alignment and {steps}"
    if config.searches:
        steps = (
            f"{config.search.iterations} of {config.search.population} points, without gradients"
        )
    some = federation.clients_per_round or federation.clients
    return [
        f"plan      {plan.label}",
        (
            f"global    {config.model.name}: {sizes.global_model:,} parameters, "
            f"{sizes.num_layers} layers"
        ),
        *([] if config.tunes_weights else _auxiliary(plan)),
        f"wire      {_wire(plan)} for a client and round, + {HEADER_BYTES} each",
        (
            f"rounds    {federation.rounds}, of {some} of {federation.clients} clients, "
            f"steps in each: {steps}"
        ),
        f"texts     {texts.tokens} tokens, {texts.answers} of them the answer; the "
        f"longest {texts.longest} "
        f"({config.data.task}: {texts.source})",
    ]


def _wire(plan: Plan) -> str:
    """What goes down and up, headers apart; without clients what would."""
    if not plan.config.searches:
        return f"{FP32_BYTES * plan.sizes.wire:,} bytes down and up"
    down, up = (size - HEADER_BYTES for size in (plan.methods[0].down, plan.methods[0].up))
    return f"{down:,} bytes down and {up:,} up"


def _auxiliary(plan: Plan) -> list[str]:
    """The clients' model, and what they exchange."""
    sizes, config = plan.sizes, plan.config
    cell = (
        f"{config.auxiliary.layers_per_cell or sizes.depth} of the layers, run {sizes.depth} deep"
    )
    cell += ", and a bridge" if config.auxiliary.first_layers else ""
    ways = [f"{ratio:#.3g} x {way}" for way, ratio in plan.ratios.items() if way != "as held"]
    paper = PAPER.get(str(config.model.name)) if config.auxiliary.layers_per_cell == 1 else None
    search = config.search.dimension if config.searches else None
    travel = f"searched for in {search:,} dimensions" if search else f"{sizes.wire:,} on the wire"
    lines = [f"counted otherwise: {', '.join(ways)}"] if ways else []
    lines += [f"FedSP's paper says {paper} x, and does not say how it counts"] if paper else []
    held = f"{sizes.auxiliary:,} parameters, {cell}: {plan.ratios['as held']:#.3g} x fewer"
    if config.asks_server:
        held, lines = "none: clients hold no model, and send their text to the server", []
    return [
        f"auxiliary {held}",
        *_labelled("", lines),
        f"prompts   {sizes.prompt:,} values at the global model's depth, {travel}",
    ]


def _memory(plan: Plan) -> list[str]:
    libraries = _gib(memory.LIBRARIES)
    return [
        (
            f"server's rank: {_gib(plan.server.device)} on its device; on its host "
            f"{libraries} of libraries"
        ),
        f"client's rank: {_gib(plan.client.device)} on its device; on its host {libraries}, and "
        f"{_gib(plan.client.host)} for one client",
    ]


def _row(method: Method) -> tuple[str, ...]:
    counts = (_scaled(number).replace("G", "B") for number in (method.holds, method.trains))
    sizes = (_scaled(size, "B") for size in (method.handout, method.down, method.up, method.total))
    steps = " / ".join(_scaled(step) for step in method.steps)
    return (method.name, *counts, *sizes, steps, _scaled(method.round))


def _labelled(label: str, lines: list[str]) -> list[str]:
    return [f"{label if i == 0 else '':<9} {line}" for i, line in enumerate(lines)]


def _aligned(lines: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines)]
    padded = ([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines)
    return ["  ".join(cells) for cells in padded]


def _piped(lines: list[tuple[str, ...]], num_left: int) -> str:
    rule = ("---",) * num_left + ("---:",) * (len(lines[0]) - num_left)
    return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:]))


def _scaled(number: float, unit: str = "") -> str:
    """Three digits and a decimal prefix: 24.6 MB."""
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if number < 999.5:
            return f"{number:.3g} {prefix}{unit}".rstrip()
        number /= 1000
    return f"{number:,.0f} Z{unit}"


def hours(flops: float, tflops: float) -> str:
    """How long that takes at `tflops` * 10^12 FLOPs a second, as text: 6.26 h."""
    found = flops / (tflops * 1e12) / 3600
    return (
        "0 h"
        if not found
        else "< 0.01 h"
        if found < 0.01
        else f"{found:.2f} h"
        if found < 10
        else f"{found:,.0f} h"
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
