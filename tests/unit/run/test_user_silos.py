"""Users of experts with silos: what a configuration may say, and what their ranks say and read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedsp_mpi import config
from fedsp_mpi.estimate import cost
from fedsp_mpi.record import read
from fedsp_mpi.report import tiers_table
from fedsp_mpi.run.silos import found_here
from fedsp_mpi.run.user_silos import UserSiloInputs
from helpers.configs import refused
from helpers.runs import FEDPROMPT, SHORT, here

EXPERTS = (
    {"name": "hall", "users": ["zoe", "ann"], "source": "hall"},
    {"name": "yard", "users": ["ann", "ben"], "source": "yard"},
)
NAMES = ("zoe", "ann", "ben")  # by client id


def content(**more: object) -> dict:
    """What a file says of two experts with three users; dotted keys take the place of others."""
    data: dict = {
        "recipe": "paper",
        "method": "plmm",
        "model": {"name": "embedded"},
        "data": {"task": "classification"},
        "server": {"accept": "always"},
        "federation": {"silos": {"source": "/data/{silo}", "names": ["ann", "ben", "zoe"]}},
        "client": {"alignment": {"steps": 0}},
        "tiers": {"experts": [dict(expert) for expert in EXPERTS]},
    }
    for key, value in more.items():
        *names, last = key.split(".")
        section = data
        for name in names:
            section = section[int(name)] if isinstance(section, list) else section[name]
        section[last] = value
    return data


def test_silos_come_in_the_order_of_their_users():
    settings = config.checked(content())
    assert [silo.name for silo in settings.federation.silos] == list(NAMES)
    assert [silo.source for silo in settings.federation.silos] == [f"/data/{n}" for n in NAMES]
    assert settings.federation.users == NAMES and settings.federation.clients == 3
    listed = [{"source": f"/data/{name}.csv"} for name in ("ben", "zoe", "ann")]
    settings = config.checked(content(**{"federation.silos": listed}))
    assert [silo.source for silo in settings.federation.silos] == [f"/data/{n}.csv" for n in NAMES]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            {"federation.silos": {"source": "/data/{silo}", "names": ["ann", "ben"]}},
            ("federation.silos: found none named 'zoe'", "for each user of tiers.experts"),
        ),
        (
            {"federation.silos": {"source": "/data/{silo}", "names": [*NAMES, "eve"]}},
            ("federation.silos: found 'eve'", "zoe, ann, ben"),
        ),
        (
            {"data.source": "/data/all"},
            ("data.source: found '/data/all'", "tiers.experts[].source"),
        ),
        ({"server.data": {"source": "/data/x"}}, ("server.data.source: found", "tiers.experts")),
        ({"tiers.experts.1.source": None}, ("tiers.experts[1].source: found none",)),
        ({"tiers.experts.0.partition": "labels"}, ("tiers.experts[0].partition: found labels",)),
        (
            {"tiers.experts.0.public_test": "/data/open"},
            ("tiers.experts[1].public_test: found null beside '/data/open' of hall",),
        ),
        (
            {"tiers.experts.0.public_test": "yard"},
            ("tiers.experts[0].public_test: found 'yard', which is the source of an expert",),
        ),
        ({"evaluation": {"at": "both"}}, ("evaluation.at: found both with tiers.experts",)),
        (
            {"tiers.experts.1.classes": ["good", "bad"]},
            ("one silo of user ann, whose experts hall and yard differ in classes",),
        ),
        (
            {"tiers.experts.1.columns": {"text": "note"}},
            ("one silo of user ann, whose experts hall and yard differ in columns",),
        ),
    ],
)
def test_silos_that_do_not_fit_users_and_experts_are_refused(more, words):
    refused(lambda: config.checked(content(**more)), *words)


def test_public_text_is_of_users_with_silos():
    more = {"federation": {}, "tiers.experts.1.public_test": "/data/open"}
    refused(
        lambda: config.checked(content(**more)),
        "tiers.experts[1].public_test: found '/data/open' without federation.silos",
    )


def test_a_silo_with_columns_of_its_own_suits_experts_whose_columns_differ():
    silos = [{"source": f"/data/{name}", "columns": {"text": "t"}} for name in NAMES]
    more = {"federation.silos": silos, "tiers.experts.1.columns": {"text": "note"}}
    assert config.checked(content(**more)).federation.silos[1].columns == {"text": "t"}
    more |= {"federation.silos": {"source": "/data/*", "columns": {"text": "t"}}}
    [pattern] = config.checked(content(**more)).federation.silos
    assert pattern.is_pattern


# -- folders ---------------------------------------------------------------------------------------


def write(path: Path, labels: tuple[str, ...], num_rows: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"text": f"the gardener {path.parent.name} {row}", "label": labels[row % len(labels)]}
        for row in range(num_rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Experts and users, all of whose rows are green or purple."""
    folder = tmp_path_factory.mktemp("owners")
    for expert in ("hall", "yard"):
        for split in ("train", "validation", "test"):
            write(folder / expert / f"{split}.jsonl", ("green", "purple"))
    for user in NAMES:
        write(folder / "users" / user / "train.jsonl", ("green", "purple"), num_rows=130)
    write(folder / "open" / "questions.jsonl", ("green", "purple"))
    return folder


def settings(folder: Path, *more: str, users: str = "users", public: str = "") -> list[str]:
    """The settings of a run on the folders, as words of a command line."""
    experts = [
        {**expert, "source": str(folder / str(expert["source"]))}
        | ({"public_test": str(folder / public)} if public else {})
        for expert in EXPERTS
    ]
    every = (
        *(item for item in SHORT if not item.startswith(("data.", "federation.clients"))),
        *FEDPROMPT,
        "method=plmm",
        "data.task=classification",
        "data.source=null",
        f"federation.silos={{source: '{folder / users}/*'}}",
        f"tiers.experts={json.dumps(experts)}",
        "tiers.questions=6",
        "evaluation.server_only=false",
        "evaluation.zero_shot=false",
        f"run.folder={folder}",
        *more,
    )
    return [word for item in every for word in ("--set", item)]


def test_without_public_text_users_score_their_own_alone_and_the_table_says_why(folder):
    here(["run", "--name", "own", *settings(folder, "federation.disclose=nothing")])
    run = read(folder / "own")
    by_users = run.tiers[run.tiers["at"] == "device"]
    assert {row["text"] for row in by_users} == {"own"} and {*by_users["n"].tolist()} == {0}
    assert {row["name"] for row in by_users} == set(NAMES)
    assert {row["text"] for row in run.tiers[run.tiers["at"] == "server"]} == {"domain", "other"}
    table = tiers_table([run])
    [after] = [line for line in table.splitlines() if line.startswith("| plmm | after | personal")]
    assert after.endswith("| - | - | - | - |")
    assert "Personal prompts are not scored on text of domains" in table
    here(["run", "--name", "public", *settings(folder, "data.loss_over=choices", public="open")])
    run = read(folder / "public")
    scored = [(row["text"], row["n"]) for row in run.tiers if row["name"] == "ann"]
    # Of two experts: three questions of each; there is no other domain.
    assert set(scored) == {("own", 6), ("domain", 6)}
    assert "Personal prompts are not" not in tiers_table([run])
    assert run.sections["inputs"]["public test text"]


def test_check_names_what_a_user_has_otherwise_than_its_experts(folder):
    write(folder / "wrong" / "zoe" / "train.jsonl", ("green", "blue"))
    write(folder / "wrong" / "ben" / "train.jsonl", ("green", "purple"))
    printed = here(["check", *settings(folder, users="wrong")]).stdout
    lines = [line for line in printed.splitlines() if not line.startswith("ok")]
    assert any(
        "zoe: found other choices in its rows than the rows of expert hall" in x for x in lines
    )
    assert any("ann on " in line and "found no folder" in line for line in lines), lines
    assert "ok    silo           ben" in printed
    write(folder / "strange" / "eve" / "train.jsonl", ("green", "purple"))
    printed = here(["check", *settings(folder, users="strange")], status=2).stdout
    assert "federation.silos: found eve, expected the names of users of tiers.experts" in printed


def test_public_text_with_other_choices_is_refused(folder):
    write(folder / "odd" / "test.jsonl", ("green", "grey"))
    printed = here(["check", *settings(folder, public="odd")], status=2).stdout
    assert "tiers.experts, hall: public_test: found other choices" in printed


def test_an_expert_needs_rows_to_tune_on(folder):
    write(folder / "poor" / "validation.jsonl", ("green", "purple"))
    experts = [{**expert, "source": str(folder / "poor")} for expert in EXPERTS]
    words = settings(folder, f"tiers.experts={json.dumps(experts)}")
    printed = here(["check", *words], status=2).stdout
    assert "tiers.experts, hall: found no rows of train" in printed
    assert "or set server.tuning.steps=0" in printed


def test_a_rank_of_the_server_reads_the_text_of_its_experts_alone(folder):
    """The other expert's folder is not even there; rank 0 tells what losses run over."""

    def inputs_with(*hidden: str) -> UserSiloInputs:
        experts = [
            {**expert, "source": str(folder / ("nowhere" if expert["name"] in hidden else name))}
            for expert in EXPERTS
            for name in [str(expert["source"])]
        ]
        words = settings(folder, "data.loss_over=choices", f"tiers.experts={json.dumps(experts)}")
        return UserSiloInputs(found_here(config.load(None, words[1::2])))

    everything = inputs_with()
    everything.check()
    assert everything.candidates is not None and len(everything.splits.train) == 2 * 8
    candidates = everything.candidates.tolist()
    part = inputs_with("hall")
    part.read_only_experts([1], candidates)
    part.check()
    assert part.splits.train == everything.domains[1].splits.train
    assert [domain.name for domain in part.domains] == ["hall", "yard"]
    assert part.domains[1].candidates.tolist() == candidates
    assert len(part.validation) == len(part.domains[1].validation) == 8
    with pytest.raises(ValueError, match=r"found no folder .*nowhere"):
        inputs_with("hall").check()


def test_plan_opens_nothing_and_finds_the_users_of_a_pattern(folder):
    overrides = settings(folder)[1::2]
    complete = found_here(config.load(None, overrides))
    assert [silo.name for silo in complete.federation.silos] == list(NAMES)
    assert complete.federation.clients == 3
    estimate = cost.plan(config.load(None, overrides), "plan")
    assert estimate.methods[0].name == "PLMM (as configured)" and estimate.silos is not None
