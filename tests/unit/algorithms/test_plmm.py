"""PLMM: what each tier learns from the others, what it keeps to itself, and how it is scored."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedsp_mpi import config
from fedsp_mpi.aggregation.fedavg import weighted_mean
from fedsp_mpi.algorithms import plmm
from fedsp_mpi.algorithms.plmm import Experts, GeneralServer, Teaching, part_name
from fedsp_mpi.algorithms.prompt_server import PromptServer
from fedsp_mpi.comm.inspection import ProtocolError
from fedsp_mpi.config import StageConfig
from fedsp_mpi.config.federation import FederationConfig
from fedsp_mpi.estimate import cost
from fedsp_mpi.federate import ClientFailedError
from fedsp_mpi.models.losses import answer_loss_of
from fedsp_mpi.models.prompts import DepthMap, Prompt, PromptSpec
from fedsp_mpi.record import Checkpoints, read
from fedsp_mpi.record.tables import TierRow
from fedsp_mpi.report import tiers_table
from fedsp_mpi.roles import read_tier_scores
from fedsp_mpi.run.tier_inputs import TierInputs
from fedsp_mpi.training.loop import NonFiniteError
from helpers.configs import refused
from helpers.paths import ROOT
from helpers.runs import here

OVERLAY = ROOT / "configs" / "methods" / "plmm.yaml"
# Three experts: a user of two, and an expert with a single user.
TIERS = {
    "experts": [
        {"name": "first", "users": ["ann", "ben"]},
        {"name": "second", "users": ["ben", "cem"]},
        {"name": "third", "users": ["dee"]},
    ]
}
SHORT = {
    "federation.rounds": 2,
    "client.tuning.steps": 3,
    "server.tuning.steps": 2,
    "data.limit.train": 120,
    "data.limit.validation": 16,
    "data.limit.test": 24,
    "prompt.num_tokens": 8,
    "tiers.questions": 6,
    "evaluation.zero_shot": False,
    "checkpoint.keep": 3,
}


def write(folder: Path, **more: object) -> Path:
    """Write the overlay over the embedded default, shortened, with the experts above."""
    data = {"extends": [str(config.EMBEDDED), str(OVERLAY)], "tiers": copy.deepcopy(TIERS)}
    for key, value in {**SHORT, **more}.items():
        section: dict = data
        *names, last = key.split(".")
        for name in names:
            section = section.setdefault(name, {})
        section[last] = value
    path = folder / "plmm.yaml"
    path.write_text(json.dumps(data))
    return path


def run(folder: Path, name: str, **more: object):
    """Run it in this process; return the record and what was printed."""
    folder.mkdir(exist_ok=True)
    arguments = [str(write(folder, **more)), "--set", f"run.folder={folder}", "--name", name]
    printed = here(["run", *arguments]).stdout
    return read(folder / name), printed


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run whose tiers judge every round, and what it printed."""
    return run(tmp_path_factory.mktemp("plmm"), "whole", **{"tiers.judge": "rounds"})


# -- merging ---------------------------------------------------------------------------------------

SPEC = PromptSpec("input", 2, 1, 1, 3)
STAGE = StageConfig(steps=0)


def experts(*values: float, merges_values: bool = True) -> Experts:
    """Experts whose prompts are filled with one number each."""
    depths = DepthMap(SPEC, 1)
    servers = {}
    for name, value in zip("abc", values):
        prompt = Prompt(SPEC)
        prompt.load({"prompt": torch.full((2, 3), value)})
        servers[name] = PromptServer(
            None, prompt, depths, batches=None, stage=STAGE, total_rounds=1, rule=weighted_mean
        )
    general = GeneralServer(
        None, Prompt(SPEC), depths, experts=[], teaching=Teaching(STAGE, 1.0, 1.0)
    )
    members = [(0,), (0, 1), (1,)]  # the third expert has no user in this round
    return Experts(servers, general, members, depths=depths, merges_values=merges_values)


class Sent:
    """Updates of users 0 to 2, each filled with one number."""

    def __init__(self, schema, *values: float, weights=(1.0, 3.0, 1.0)) -> None:
        self.schema = schema
        self.reports = [
            SimpleNamespace(client=id, weight=weight, metrics={})
            for id, weight in enumerate(weights)
        ]
        self._rows = np.repeat(np.array(values, dtype=np.float32)[:, None], 6, axis=1)

        self.num_read = 0  # most values of an update that were in memory at once

    def columns(self):
        for part in (slice(0, 4), slice(4, 6)):
            self.num_read = max(self.num_read, part.stop - part.start)
            yield part, self._rows[:, part].copy()

    def rows(self) -> np.ndarray:
        self.num_read = 6
        return self._rows.copy()


@pytest.mark.parametrize(("merges_values", "num_read"), [(True, 4), (False, 6)])
def test_each_expert_merges_its_users_and_of_a_shared_one_what_it_changed(merges_values, num_read):
    tier = experts(1.0, 5.0, 9.0, merges_values=merges_values)
    sent = tier.broadcast()
    assert {name.rpartition("/")[0] for name in sent} == {
        "expert/a",
        "expert/b",
        "expert/c",
        "general",
    }
    schema = sent.select(part_name("a")).schema
    # The shared user began at the mean, 3, and went up by 1: 2 for a, 6 for b, each three times.
    updates = Sent(schema, 3.0, 4.0, 6.0)
    merged = tier.aggregate(updates)
    assert updates.num_read == num_read
    parts = {name: merged.select(part_name(name))["prompt"] for name in "abc"}
    assert np.allclose(parts["a"], (3 + 3 * 2) / 4) and np.allclose(parts["b"], (3 * 6 + 6) / 4)
    assert np.array_equal(parts["c"], sent.select(part_name("c"))["prompt"])
    tier.load_aggregate(merged)
    assert {name: tier.prompts[name].prompt[0, 0].item() for name in "abc"} == {
        "a": 2.25,
        "b": 6.0,
        "c": 9.0,
    }


# -- a whole run -----------------------------------------------------------------------------------


def test_only_prompts_and_the_auxiliary_model_travel(whole):
    """Names of all bytes: nothing of the global model, no text; a user sends one prompt."""
    record, _ = whole
    names = {(row["direction"], row["name"]) for row in record.wire}
    down = {name for direction, name in names if direction == "down" and "(" not in name}
    up = {name for direction, name in names if direction == "up" and "(" not in name}
    tiers = ("expert/first", "expert/second", "expert/third", "general")
    assert down == {f"{tier}/prompt" for tier in tiers} and up == {"prompt"}
    handed_out = {name for direction, name in names if direction == "handout" and "(" not in name}
    assert handed_out and all(re.match(r"(auxiliary|prompt)/", name) for name in handed_out), (
        handed_out
    )
    models = record.sections["models"]
    of_auxiliary = [row for row in record.wire if row["name"].startswith("auxiliary/")]
    num_values = sum(int(np.prod(json.loads(row["shape"]))) for row in of_auxiliary)
    assert num_values == models["auxiliary"] < models["global"]


def test_every_tier_is_scored_on_every_text(whole):
    record, _ = whole
    tiers = record.tiers
    assert sorted(set(tiers["round"].tolist())) == [0, 1, 2]
    found = {
        (row["at"], row["model"], row["text"], row["name"]) for row in tiers[tiers["round"] == 2]
    }
    users = ("ann", "ben", "cem", "dee")
    device = [("personal", kind) for kind in ("own", "domain", "other")]
    device += [("expert", "own"), ("general", "own")]
    server = [(model, kind) for model in ("expert", "general") for kind in ("domain", "other")]
    assert found == {("device", *pair, user) for pair in device for user in users} | {
        ("server", *pair, name) for pair in server for name in ("first", "second", "third")
    }
    assert np.isfinite(tiers["loss"]).all() and (tiers["n"] > 0).all()
    first = tiers[tiers["round"] == 0]
    own = {row["model"]: row["loss"] for row in first if row["name"] == "ann"}
    assert own["personal"] != own["expert"] or record.committed_rounds
    table = tiers_table([record])
    assert "| PLMM | after | personal |" in table and "personal < general, own" in table
    again = dataclasses.replace(record, file=record.file.parent.parent / "again" / "run.h5")
    with pytest.raises(ValueError, match=r"found two runs of PLMM .* seed 1 .*, expected one"):
        tiers_table([record, again])
    stopped = dataclasses.replace(again, status="stopped")
    note = f"Not complete: {record.name} (stopped)."
    assert tiers_table([record, stopped]) == f"{table}\n\n{note}"
    with pytest.raises(ValueError, match=r"found no complete run among .* expected at least one"):
        tiers_table([stopped])


def test_before_the_first_round_all_prompts_are_the_same(whole):
    record, _ = whole
    for user in ("ann", "ben"):
        is_own = (record.tiers["round"] == 0) & (record.tiers["text"] == "own")
        losses = record.tiers["loss"][is_own & (record.tiers["name"] == user)]
        assert len(losses) == 3 and len(set(losses.tolist())) == 1


def test_evaluations_are_in_the_manifest_and_in_the_rounds(whole):
    record, _ = whole
    down = [row for row in record.wire if row["direction"] == "down"]
    assert sum(int(row["bytes"]) for row in down) == record.rounds["bytes_down"].sum()


def test_experts_and_the_general_model_are_scored_at_the_end(whole):
    record, _ = whole
    results = {(row["method"], row["split"]): row for row in record.results}
    splits = [("PLMM", "test"), ("PLMM", "test, general model"), ("server-only", "test")]
    assert [int(results[key]["n"]) for key in splits] == [3 * 24] * 3
    assert len({float(results[key]["loss"]) for key in splits}) == 3
    assert (record.file.parent / "prompt" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("proximal", "is_equal"), [(0.0, True), pytest.param(1.0, False, marks=pytest.mark.slow)]
)
def test_without_lambda_a_personal_prompt_learns_of_nobody(tmp_path, proximal, is_equal):
    """Plain local tuning: whatever the experts do, its losses are the same."""
    records = [
        run(
            tmp_path / str(steps),
            "run",
            **{
                "tiers.personal.proximal": proximal,
                "server.tuning.steps": steps,
                "tiers.experts": [{"name": "only", "users": ["ann", "ben"]}],
                "tiers.judge": "never",
                "evaluation.server_only": False,
            },
        )[0]
        for steps in (0, 3)
    ]
    personal = [record.clients["loss_personal_last"].tolist() for record in records]
    shared = [record.clients["loss_prompt_last"].tolist() for record in records]
    assert shared[0] != shared[1] and (personal[0] == personal[1]) is is_equal


def test_after_a_failed_round_a_personal_prompt_goes_on_without_its_moments(tmp_path, monkeypatch):
    """The second personal step of user 0 in round 2 is NaN, and with it all moments."""
    num_calls = 0

    def loss(*arguments):
        nonlocal num_calls
        num_calls += 1
        is_faulty = num_calls == 4 * 3 + 2  # 4 users take 3 steps in round 1
        return answer_loss_of(*arguments) * (math.nan if is_faulty else 1.0)

    monkeypatch.setattr(plmm, "answer_loss_of", loss)
    more = {"federation.rounds": 3, "tiers.judge": "never", "evaluation.server_only": False}
    record, _ = run(tmp_path, "run", **more)
    of_user = record.clients[record.clients["client"] == 0]
    assert of_user["status"].tolist() == ["ok", "failed", "ok"]
    checkpoints = Checkpoints(record.file.parent)
    states = [checkpoints.read_client(0, checkpoints._client_files(n)[0]) for n in (1, 2, 3)]
    prompts = [state["personal/prompt"] for state in states]
    has_moments = [any(name.startswith("engine/0/") for name in state) for state in states]
    assert has_moments == [True, False, True]
    assert np.array_equal(prompts[0], prompts[1]) and not np.array_equal(prompts[1], prompts[2])


# -- text ------------------------------------------------------------------------------------------


def test_nobody_owns_what_another_one_trains_on_or_holds_back(tmp_path):
    inputs = TierInputs(config.load(write(tmp_path)))
    trained = [set(rows.tolist()) for rows in inputs.shards]
    held_back = [set(rows.tolist()) for _, rows in inputs._owned_rows[1]]
    owned = [*trained, *held_back]
    assert all(owned) and sum(map(len, owned)) == len(set().union(*owned))
    # The three experts share one source: their examples differ, too.
    domains = [domain.splits.train for domain in inputs.domains]
    assert sum(map(len, domains)) == len(set().union(*domains)) == 120
    ben = [len(inputs.own_examples(1, expert)) for expert in (0, 1, 2)]
    assert ben[0] and ben[1] and not ben[2]
    assert sum(ben) == len(inputs.own_text(1))


def test_losses_run_over_the_choices_of_all_domains_if_each_has_its_own(tmp_path):
    def inputs(*classes: tuple[str, ...], **overrides: object) -> TierInputs:
        experts = []
        for number, names in enumerate(classes):
            folder = tmp_path / f"{len(classes)}-{number}"
            folder.mkdir(exist_ok=True)
            lines = [json.dumps({"text": f"a {n}", "label": names[n % 2]}) for n in range(20)]
            for split in ("train", "validation", "test"):
                (folder / f"{split}.jsonl").write_text("\n".join(lines))
            source = {"task": "classification", "source": str(folder), "classes": list(names)}
            experts.append({"name": f"e{number}", "users": [f"u{number}"], **source})
        return TierInputs(config.load(write(tmp_path, **{"tiers.experts": experts}, **overrides)))

    both = inputs(("dog", "cat"), ("red", "dog"), **{"data.loss_over": "auto"})
    of_each = [domain.own_candidates().tolist() for domain in both.domains]
    assert both.candidates.tolist() == sorted({*of_each[0], *of_each[1]})
    assert len(both.candidates) < len(of_each[0]) + len(of_each[1])  # they share a dog
    assert all(domain.candidates is both.candidates for domain in both.domains)
    assert inputs(("dog", "cat"), **{"data.loss_over": "vocabulary"}).candidates is None
    # The embedded questions have choices of their own.
    own = TierInputs(config.load(write(tmp_path, **{"data.loss_over": "auto"})))
    assert own.candidates is None
    own = TierInputs(config.load(write(tmp_path, **{"data.loss_over": "choices"})))
    with pytest.raises(config.ConfigError, match=r"first: data\.loss_over: found choices"):
        _ = own.candidates


# -- asking ----------------------------------------------------------------------------------------


def test_a_user_is_answered_by_its_own_model_or_by_the_expert(whole):
    folder = str(whole[0].file.parent)
    question = ["ask", folder, "--user", "ben", "Where is the dog?"]
    sure = here([*question, "--threshold", "0"]).stdout
    assert sure.startswith("personal: ") and "first token after" in sure
    assert sure.splitlines()[-1] == "answered by personal"
    unsure = here([*question, "--threshold", "1", "--expert", "second"]).stdout
    assert unsure.splitlines()[0].partition(" ms")[0].split("(")[0] == sure.split("(")[0]
    assert "asks expert second" in unsure
    assert unsure.splitlines()[-1] == "answered by expert second"


def test_a_damaged_personal_model_does_not_answer(whole, tmp_path):
    run = shutil.copytree(whole[0].file.parent, tmp_path / "run")
    weights = run / "auxiliary" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(content)
    result = here(["ask", run, "--user", "ben", "Where is the dog?"], status=2)
    assert str(weights) in result.stderr and len(result.stderr.splitlines()) == 1


def test_routing_is_measured_on_what_users_hold_back(whole):
    folder = str(whole[0].file.parent)
    lines = here(["ask", folder, "--evaluate", "--threshold", "1"]).stdout.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]
    cells = {row[0]: row[1:] for row in rows[2:]}
    assert set(cells) == {"ann", "ben", "cem", "dee", "all"}
    assert all(row[4] == "100.00" and row[5] == row[2] for row in cells.values())
    none = here(["ask", folder, "--evaluate", "--threshold", "0", "--user", "ann"]).stdout
    row = next(line for line in none.splitlines() if "| ann" in line).split("|")
    assert row[6].strip() == "0.00" and row[7].strip() == row[3].strip()
    assert "ms a token on 1 core" in none


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--user", "anna", "Why?"], "--user: found 'anna', expected one of ann, ben, cem, dee"),
        (["Why?"], "--user: found none"),
        (["--user", "ann", "--expert", "second", "Why?"], "--expert: found 'second', expected one"),
        (["--user", "ann"], "TEXT"),
        (["--user", "ann", " "], "TEXT: found no words, expected a question"),
    ],
)
def test_what_cannot_be_asked_is_said_in_one_line(whole, arguments, words):
    result = here(["ask", str(whole[0].file.parent), *arguments], status=2)
    assert words in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["evaluate", "{run}"], "ask --evaluate"),
        (["split", "{file}", "--to", "{folder}/split"], "tiers.experts: found 3"),
        (["bench", "local", "{file}"], "tiers.experts: found 3"),
    ],
    ids=["evaluate", "split", "bench"],
)
def test_what_has_one_task_for_all_refuses_tiers(whole, tmp_path, arguments, words):
    places = {"run": whole[0].file.parent, "file": write(tmp_path), "folder": tmp_path}
    result = here([word.format(**places) for word in arguments], status=2)
    assert words in result.stderr and len(result.stderr.splitlines()) == 1


def test_plan_counts_the_prompts_that_go_down(whole, tmp_path):
    """One message up, those of three experts and the general model down."""
    own, *_ = cost.plan(config.load(write(tmp_path)), "tiers", 20).methods
    record, _ = whole
    assert own.name == "PLMM (as configured)"
    assert set(record.clients["bytes_up"].tolist()) == {own.up}
    assert set(record.clients["bytes_down"].tolist()) == {own.down}


# -- configuration ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"tiers.experts": []}, ("tiers.experts", "found none")),
        ({"tiers.experts": [{"name": "a"}]}, ("tiers.experts[0].users", "found none")),
        ({"tiers.experts": [{"users": ["u"]}]}, ("tiers.experts[0].name",)),
        ({"tiers.experts": [{"name": "general", "users": ["u"]}]}, ("another tier is called",)),
        ({"tiers.experts": [{"name": "a", "users": ["u", "u"]}]}, ("'u' twice",)),
        ({"method": "fedsp"}, ("tiers.experts: found 3 with method=fedsp",)),
        (
            {"federation.silos": [{"source": "/data/ann"}]},
            ("data.source: found 'embedded'", "each expert tiers.experts[].source"),
        ),
        ({"client.privacy": {"clip": 1.0, "noise_scale": 0.1}}, ("client.privacy.clip",)),
        ({"federation.compression.format": "int8"}, ("one prompt, and gets those of all",)),
        (
            {"topology.server_ranks": 4},
            ("topology.server_ranks: found 4 with 3 experts", "expected at most 3"),
        ),
        (
            {"data.server_share": 0, "server.tuning.steps": 0, "distillation.text": "x"},
            ("tiers.upgrade.steps", "found 2"),
        ),
    ],
)
def test_tiers_that_cannot_be_are_refused(tmp_path, more, words):
    refused(lambda: config.load(write(tmp_path, **more)), *words)


def test_experts_are_not_batches_and_may_be_dealt_out_again(tmp_path):
    """Any number of the server's ranks has the same bits: sizes of batches do not matter."""
    three = {"topology.server_ranks": 3, "server.tuning.batch_size": 4}
    before, now = (
        dataclasses.asdict(config.load(write(tmp_path, **{**three, **overrides})))
        for overrides in ({}, {"topology.server_ranks": 2, "topology.ranks": 4})
    )
    assert config.changed_keys(before, now) == []
    of_fedsp = [{**settings, "method": "fedsp"} for settings in (before, now)]
    assert config.changed_keys(*of_fedsp) == ["topology.server_ranks: was 3, is 2"]


def test_users_are_the_clients_by_name(tmp_path):
    settings = config.load(write(tmp_path, **{"federation.clients": 9}))  # as a base may say
    assert settings.federation.users == ("ann", "ben", "cem", "dee")
    assert settings.federation.clients == 4 and settings.federation.client_name(1) == "user ben"
    assert settings.tiers.experts_of("ben") == (0, 1)
    assert settings.tiers.personal.tuning == settings.client.tuning
    assert settings.tiers.upgrade.steps == 2
    assert settings.tiers.upgrade.optimizer == settings.server.tuning.optimizer
    again = tmp_path / "again.yaml"
    again.write_text(config.to_yaml(settings))
    assert config.load(again) == settings


def test_an_expert_that_fails_is_called_by_its_name(tmp_path):
    more = {
        "server.tuning.steps": 4,
        "server.tuning.optimizer": {"learning_rate": 1e6, "clip": 1e9},
    }
    with pytest.raises(NonFiniteError, match=r"^expert first: the loss of step"):
        run(tmp_path, "control", **more)
    with pytest.raises(ClientFailedError) as error:
        run(tmp_path, "failed", **more, **{"evaluation.server_only": False})
    reasons = [f"expert {name} in local training: the loss" for name in ("first", "third")]
    assert all(reason in str(error.value) for reason in reasons)
    assert "client" not in str(error.value) and "on_failure" not in str(error.value)


# -- what ranks send -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [{"client": 1}, {"model": "expert9"}, {"loss": -1.0}, {"acc": 1.5}, {"n": "many"}],
)
def test_scores_that_cannot_be_name_the_rank(change):
    score = {"client": 0, "model": "personal", "text": "own", "n": 5, "loss": 1.0, "acc": 0.5}
    good = [{"tiers": [score]}, {"tiers": []}]
    [row] = read_tier_scores(good, {0: 0, 1: 1}, 3, users=["ann", "ben"])
    assert row == TierRow(
        round=3, name="ann", model="personal", text="own", at="device", n=5, loss=1.0, acc=0.5
    )
    bad = [{"tiers": [{**score, **change}]}, {"tiers": []}]
    with pytest.raises(ProtocolError, match="rank 0"):
        read_tier_scores(bad, {0: 0, 1: 1}, 3, users=["ann", "ben"])
    with pytest.raises(ProtocolError, match="already"):
        read_tier_scores([{"tiers": [score, score]}, {"tiers": []}], {0: 0}, 3, users=["ann"])


def test_the_inner_rounds_clients_have_ids_of_their_own():
    assert FederationConfig(users=("ann",)).client_name(1) == "client 1"
