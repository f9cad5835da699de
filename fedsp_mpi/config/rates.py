"""Learning rates of keys that a configuration leaves out: by what is tuned, not one for all.

The values and where they were measured: resources/recipes/rates.yaml. The paper's recipe has one
rate for everything, that of `OptimizerConfig`.
"""

from __future__ import annotations

from pathlib import Path

from fedsp_mpi.config.parsing import Section
from fedsp_mpi.config.yaml_reader import read_yaml

_PROMPTS = ("prefix", "input", "encoder", "projection")
FILE = Path(__file__).parent.parent / "resources" / "recipes" / "rates.yaml"


def rates(data: Section) -> Section:
    """Return the learning rates that suit what a configuration tunes, section by section.

    Args:
        data: the configuration over its recipe, not yet checked. What is misplaced in it counts as
            left out: it is refused later, with a message.

    Returns:
        Nothing for the paper's recipe and for a search, which has no learning rates.
    """
    kind = _kind(data)
    if kind is None:
        return {}
    rate = read_yaml(FILE)[kind]
    stage = {"optimizer": {"learning_rate": rate}}
    server: Section = {"tuning": stage}
    if kind in _PROMPTS and _translates(data):
        server["translation"] = stage
    return {"server": server, "client": {"tuning": stage}}


def _translates(data: Section) -> bool:
    """Return whether the server translates: else that stage keeps what earlier versions gave it."""
    server = data.get("server")
    translation = server.get("translation") if isinstance(server, dict) else None
    return isinstance(translation, dict) and translation.get("steps") not in (None, 0)


def _kind(data: Section) -> str | None:
    """Name what is tuned, as rates.yaml does; None where no rate of that file belongs."""
    if data.get("recipe") == "paper":
        return None
    method = data.get("method")
    if method == "lora":
        return "adapters"
    if method == "head":
        return "head"
    if method in ("finetune", "pretrain"):
        model = data.get("model")
        is_new = isinstance(model, dict) and model.get("weights") == "random"
        return "new_weights" if is_new else "weights"
    if method in ("fedbpt", "prompt_search"):
        return None
    prompt = data.get("prompt")
    if not isinstance(prompt, dict):
        return "prefix"
    if prompt.get("encoder") is not None:
        return "encoder"
    if prompt.get("projection") is not None:
        return "projection"
    return "input" if prompt.get("kind") == "input" else "prefix"
