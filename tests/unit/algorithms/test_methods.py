"""The methods of `configs/methods`: each lies over any base, has a name of its own, and is what it
says.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fedsp_mpi import config
from fedsp_mpi.config import EMBEDDED, Config
from fedsp_mpi.config.parsing import differences
from fedsp_mpi.config.tiers import ExpertConfig
from fedsp_mpi.estimate import cost
from fedsp_mpi.report import difference
from helpers.paths import ROOT
from helpers.runs import FEDPROMPT, short

METHODS = ROOT / "configs" / "methods"
NAMES = sorted(path.stem for path in METHODS.glob("*.yaml"))
BASES = [
    EMBEDDED,
    ROOT / "configs" / "smollm2" / "arc_easy.yaml",
    ROOT / "configs" / "paper" / "base_gpt2xl.yaml",
]
# Settings of a base that no method may inherit from it.
ODD = {
    "auxiliary": {"layers_per_cell": 2},
    "client": {"training": "joint"},
    "federation": {"clients": 5, "clients_per_round": 3, "min_clients": 2},
}
BRIDGED = {
    "recipe": "bridged",
    "data.loss_over": "auto",
    "auxiliary.layers_per_cell": None,
    "auxiliary.depth": 0.5,
    "auxiliary.first_layers": 1,
    "distillation.stage.steps": 0,
    "prompt.init": "text",
    "prompt.mapping": "same_layers",
    "client.alignment.steps": 0,
    "server.accept": "better",
    "search.rank_by": "improvement",
    "search.step_size_by": "clients",
    "search.parents": "all",
    "search.objective": "loss",
}
WHOLE = {
    "auxiliary.layers_per_cell": None,
    "distillation.stage.steps": 0,
    "client.alignment.steps": 0,
}
PAPER = WHOLE | {"data.server_share": 0, "prompt.kind": "input", "server.tuning.steps": 0}
SINGLE_RANK = {"federation.clients": 0, "evaluation.server_only": False}
SEARCH = WHOLE | {
    "method": "fedbpt",
    "data.loss_over": "auto",
    "prompt.kind": "input",
    "prompt.init": "text",
    "server.tuning.steps": 0,
}
PHRASES = tuple(
    yaml.safe_load((METHODS / "prompt_search.yaml").read_text())["instructions"]["pool"]
)
# What each method sets apart from the embedded default, which is FedSP as in the paper.
APART: dict[str, dict[str, object]] = {
    "fedsp": BRIDGED,
    "fedsp_paper": {},
    "fedsp_no_distillation": {"distillation.stage.steps": 0},
    "fedsp_no_sharing": {"auxiliary.depth": 1},
    "fedsp_joint": {"client.training": "joint"},
    "fedsp_prompts_only": {"client.alignment.steps": 0},
    "fedsp_no_server_tuning": {"server.tuning.steps": 0},
    "fedprompt": WHOLE,
    "fedprompt_single": WHOLE | {"auxiliary.layers_per_cell": 1, "auxiliary.depth": 1},
    "fedprompt_paper": PAPER,
    "p_tuning": PAPER | {"prompt.encoder": "lstm", "prompt.init": "random"},
    "aug_fedprompt": WHOLE
    | {
        "data.labels": 64,
        "data.label_spread": 0.01,
        "data.server_share": 0,
        "server.tuning.steps": 0,
        "augment.clients": 5,
    },
    "prefix_tuning": WHOLE | {"federation.clients": 1},
    "prefix_tuning_centralised": WHOLE | SINGLE_RANK,
    "fedbpt": SEARCH,
    "fedbpt_private": SEARCH | {"search.forward": "server"},
    "fedavg_bbt": SEARCH | {"search.rule": "average", "search.objective": "loss"},
    "prompt_search": WHOLE
    | {
        "method": "prompt_search",
        "data.loss_over": "auto",
        "prompt.kind": "input",
        "prompt.num_tokens": 32,
        "server.tuning.steps": 0,
        "instructions.pool": PHRASES,
    },
    "plmm": BRIDGED
    | {
        "method": "plmm",
        "server.accept": "always",
        "federation.clients": 3,
        "federation.users": ("ann", "ben", "cem"),
        "tiers.experts": (
            ExpertConfig(name="first", users=("ann", "ben")),
            ExpertConfig(name="second", users=("ben", "cem")),
        ),
        # As the base tunes users' and experts' prompts.
        "tiers.personal.tuning.steps": 40,
        "tiers.personal.tuning.optimizer.learning_rate": 0.15,
        "tiers.personal.proximal": 0.1,
        "tiers.upgrade.optimizer.learning_rate": 0.1,
        "tiers.consensus.optimizer.learning_rate": 0.1,
        "checkpoint.keep_client_states": True,
    },
    "head": {"method": "head"},
    "finetune": {"method": "finetune", "federation.client_state": "restarted"},
    "finetune_centralised": {"method": "finetune"} | SINGLE_RANK,
}


def over(folder: Path, name: str, *bases: Path) -> Config:
    """A method over bases, as a file of a user says it."""
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump({"extends": [*map(str, bases), str(METHODS / f"{name}.yaml")]}))
    return config.load(path)


def plain(settings: Config) -> dict:
    """A configuration without what its tables are called."""
    found = yaml.safe_load(config.to_yaml(settings))
    del found["run"]
    return found


def at(settings: Config, dotted: str) -> object:
    """The value of a dotted key."""
    value: object = settings
    for part in dotted.split("."):
        value = getattr(value, part)
    return value


def test_every_method_is_known_here():
    assert sorted(APART) == NAMES


@pytest.mark.parametrize("base", BASES, ids=lambda path: path.stem)
def test_each_loads_over_any_base_under_a_name_of_its_own(tmp_path, base):
    labels = {over(tmp_path, name, base).run.label for name in NAMES}
    assert len(labels) == len(NAMES) and None not in labels


@pytest.mark.parametrize("name", NAMES)
def test_each_differs_from_the_base_as_it_says(tmp_path, name):
    settings = over(tmp_path, name, EMBEDDED)
    changed = differences(plain(config.load(None)), plain(settings))
    told = {line.partition(":")[0] for line in changed}
    default = config.load(None)
    assert told == {key for key, value in APART[name].items() if value != at(default, key)}
    assert {key: at(settings, key) for key in APART[name]} == APART[name]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "fedsp_joint"])
def test_none_takes_from_a_base_what_would_make_it_another_method(tmp_path, name):
    """Clients that train their model, or hold a part of its layers, would be no FedPrompt."""
    odd = tmp_path / "odd.yaml"
    odd.write_text(yaml.safe_dump(ODD))
    settings = over(tmp_path, name, EMBEDDED, odd)
    assert settings.tunes_weights or settings.client.training == "alternating"
    assert "layers_per_cell" not in str(APART[name]) or settings.auxiliary.layers_per_cell in (
        None,
        1,
    )


@pytest.mark.parametrize(
    ("name", "row"), [("fedprompt", "FedPrompt"), ("fedprompt_single", "FedPrompt-single")]
)
def test_plan_knows_them(tmp_path, name, row):
    found = cost.plan(over(tmp_path, name, EMBEDDED), name)
    own, *others = found.methods
    [same] = [other for other in others if other.name == row]
    assert (own.holds, own.trains, own.total) == (same.holds, same.trains, same.total)
    assert (own.holds == found.sizes.global_model) == (name == "fedprompt")


def test_no_number_of_layers_is_all_of_them(tmp_path):
    """The embedded model has three."""
    said = short(tmp_path / "said", *FEDPROMPT)
    unsaid = short(tmp_path / "unsaid", "auxiliary.layers_per_cell=null", *FEDPROMPT[1:])
    assert difference(said, unsaid) == [] and said.sections["models"] == unsaid.sections["models"]
