"""The methods: what must be known of each before torch is loaded, a row each.

What a method does is in its file in algorithms/, whose `METHOD` builds its server and its clients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from fedsp_mpi.config.parsing import parse


@dataclass(frozen=True)
class MethodFacts:
    """What configuration, checks and estimates need to know of a method.

    Attributes:
        module: absolute name of the module that defines `METHOD`, an `algorithms.base.Method`.
        title: name in tables.
        tunes_weights: the model's own weights are tuned and travel; there is no prompt, and clients
            hold the whole model.
        adapts: of the weights, low-rank adapters beside them are tuned and travel; clients get the
            weights once.
        classifies: of the weights, a classification head in the place of the model's own is tuned
            and travels; clients get the weights once.
        searches: prompts are searched for without gradients: clients run forward passes alone, and
            the server merges but does not tune.
        in_words: of those, prompts are instructions in words, of which clients send scores alone.
        reads_plain_text: texts are documents, of which every token is predicted; otherwise they
            are questions with answers.
        augments: clients train by gradients on examples, and can be given pseudo-labelled ones.
        has_tiers: clients are the users of experts, and keep prompts of their own (`tiers`).
        distils_prompts: the server may learn from the auxiliary model what a merged prompt means.
        required: values that keys must have with this method, by key, and why.
    """

    module: str
    title: str
    tunes_weights: bool = False
    adapts: bool = False
    classifies: bool = False
    searches: bool = False
    in_words: bool = False
    reads_plain_text: bool = False
    augments: bool = False
    distils_prompts: bool = False
    has_tiers: bool = False
    required: Mapping[str, tuple[object, str]] = field(default_factory=dict)


_OWN_PROJECTION = "the search has a projection of its own (search.dimension)"
_OWN_STEP = "the server searches among what its clients found, and does not tune"
_NO_CHANGE = "clip and noise are for prompts and weights, of which the update is a change"
_SEARCH_REQUIRES: dict[str, tuple[object, str]] = {
    "server.tuning.steps": (0, _OWN_STEP),
    "prompt.projection": (None, _OWN_PROJECTION),
    "prompt.encoder": (None, _OWN_PROJECTION),
    "federation.rule": ("mean", "what merges is search.rule"),
    "federation.outer.optimizer": ("fedavg", "what merges is search.rule"),
    "federation.outer.learning_rate": (None, "what merges is search.rule"),
    "federation.compression.format": ("none", "a search's statistics travel, which are no change"),
    "client.privacy.clip": (None, _NO_CHANGE),
    "client.proximal": (0, "a search takes no gradients"),
}
_IN_WORDS = "an instruction is what its tokens are embedded as"
_NO_MEAN = "the server averages scores, from which nothing moves"
_WORDS_REQUIRE: dict[str, tuple[object, str]] = {
    "server.tuning.steps": (0, "the server keeps the best instructions, and does not tune them"),
    "prompt.kind": ("input", _IN_WORDS),
    "prompt.projection": (None, _IN_WORDS),
    "prompt.encoder": (None, _IN_WORDS),
    "search.forward": ("clients", "clients score instructions themselves"),
    "federation.client_seconds": (None, "a client scores all instructions of a round"),
    "federation.outer.optimizer": ("fedavg", _NO_MEAN),
    "federation.outer.learning_rate": (None, _NO_MEAN),
    "federation.compression.format": ("none", "ids of tokens must arrive as they are"),
    "client.privacy.clip": (None, _NO_CHANGE),
    "client.proximal": (0, "a search takes no gradients"),
}
_ONE_UP = "a user sends one prompt, and gets those of all experts"
_TIERS_REQUIRE: dict[str, tuple[object, str]] = {
    "client.training": ("alternating", "users tune prompts alone"),
    "client.alignment.steps": (0, "users tune prompts alone"),
    "client.privacy.clip": (None, _ONE_UP),
    "federation.client_seconds": (None, "users tune two prompts"),
    "federation.client_state": ("kept", "a user's own prompt lives on from round to round"),
    "federation.compression.format": ("none", _ONE_UP),
    "server.accept": ("always", "the general model has learned from what an expert has tuned"),
    "attack.target": (None, "domains have different answers"),
}
_FEDBPT = MethodFacts(
    "fedsp_mpi.algorithms.fedbpt", "FedBPT", searches=True, required=_SEARCH_REQUIRES
)
METHODS: dict[str, MethodFacts] = {
    "fedsp": MethodFacts(
        "fedsp_mpi.algorithms.fedsp", "FedSP", augments=True, distils_prompts=True
    ),
    "finetune": MethodFacts(
        "fedsp_mpi.algorithms.finetune", "fine-tuning", tunes_weights=True, augments=True
    ),
    "lora": MethodFacts(
        "fedsp_mpi.algorithms.lora", "LoRA", tunes_weights=True, adapts=True, augments=True
    ),
    "head": MethodFacts(
        "fedsp_mpi.algorithms.head",
        "classification head",
        tunes_weights=True,
        classifies=True,
        augments=True,
    ),
    "pretrain": MethodFacts(
        "fedsp_mpi.algorithms.pretrain", "pre-training", tunes_weights=True, reads_plain_text=True
    ),
    "fedbpt": _FEDBPT,
    "prompt_search": MethodFacts(
        "fedsp_mpi.algorithms.prompt_search",
        "prompt search",
        searches=True,
        in_words=True,
        required=_WORDS_REQUIRE,
    ),
    "plmm": MethodFacts(
        "fedsp_mpi.algorithms.plmm", "PLMM", has_tiers=True, required=_TIERS_REQUIRE
    ),
}
# method=fedbpt with search.rule=average
FEDAVG_BBT = replace(_FEDBPT, module="fedsp_mpi.algorithms.fedavg_bbt", title="FedAvg-BBT")


def register(name: str, facts: MethodFacts) -> None:
    """Add a method of one's own, so that a configuration can name it.

    Args:
        name: value of the key `method`.
        facts: of the method.

    Raises:
        ValueError: there is a method of that name.
    """
    if name in METHODS:
        raise ValueError(f"method {name}: found another one of that name, expected a new name")
    METHODS[name] = facts


def require_method(name: str) -> None:
    """Raise ConfigError, with the nearest name, unless there is such a method."""
    parse(Literal[tuple(METHODS)], name, "method")  # type: ignore[valid-type]
