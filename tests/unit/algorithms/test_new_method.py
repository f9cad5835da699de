"""A method of one's own: a file like this one and `register`, and nothing else in the package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedsp_mpi import cli, config
from fedsp_mpi.algorithms.base import ClientContext, HandedOut, Method, ServerContext
from fedsp_mpi.algorithms.client_state import StatelessClients
from fedsp_mpi.algorithms.prompt_server import PromptServer
from fedsp_mpi.config.methods import METHODS, MethodFacts, register
from fedsp_mpi.estimate import cost
from fedsp_mpi.record import read
from fedsp_mpi.report import summarize
from fedsp_mpi.tensors import NamedTensors, Update


class ShrinkingClient:
    """Clients that halve the prompt, and report how large it was."""

    model = None
    prompt = None

    def __init__(self) -> None:
        self.states = StatelessClients()

    def local_update(self, client: int, round: int, broadcast: NamedTensors) -> Update:
        halved = NamedTensors(broadcast.schema, broadcast.flat / 2)
        norm = float(np.linalg.norm(broadcast.flat))
        return Update(client, 1.0, halved, {"seconds_prompt": 0.0, "prompt_norm": norm})


class Shrink(Method):
    """Prompts travel; nobody trains."""

    metrics = ("seconds_prompt", "prompt_norm")

    def build_server(self, context: ServerContext) -> PromptServer:
        settings = context.inputs.config
        return PromptServer(
            context.model,
            context.inputs.first_prompt(context.model),
            context.inputs.depth_map,
            batches=None,
            stage=settings.server.tuning,
            total_rounds=settings.federation.rounds,
            rule=context.rule,
        )

    def hand_out(self, inputs, server, client_model) -> HandedOut:
        prompt = server.broadcast()
        no_tensors = NamedTensors.pack({})
        return HandedOut(inputs.model_config, no_tensors, down=prompt.schema, up=prompt.schema)

    def build_client(self, context: ClientContext) -> ShrinkingClient:
        return ShrinkingClient()


METHOD = Shrink()
SETTINGS = (
    *("method=shrink", "server.tuning.steps=0", "evaluation.server_only=false"),
    *("federation.rounds=2", "federation.clients=3", "auxiliary.layers_per_cell=null"),
)


@pytest.fixture
def shrink():
    register("shrink", MethodFacts(__name__, "Shrink"))
    yield
    del METHODS["shrink"]


def test_a_new_method_runs_is_recorded_and_planned(shrink, tmp_path: Path, capsys):
    settings = [*SETTINGS[:-1], f"run.folder={tmp_path}"]
    options = [word for setting in settings for word in ("--set", setting)]
    assert cli.main(["run", "--name", "toy", *options]) == 0
    run = read(tmp_path / "toy")
    first, second = (run.clients[run.clients["round"] == r]["prompt_norm"] for r in (1, 2))
    assert len(set(first.tolist())) == 1 and np.allclose(second, first / 2)
    assert run.status == "complete" and "shrink" in summarize(run)
    assert [str(row["method"]) for row in run.results] == ["chance", "zero-shot", "shrink"]
    assert cost.plan(config.load(None, settings), "toy", 20).methods


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("samples", "a metric 'samples', which is a column that the server writes, expected none"),
        ("reason", "a metric 'reason', which is a column that the server writes, expected none of"),
        ("prompt_norm", "two metrics 'prompt_norm', expected each name once; give one of them"),
        ("attack_success", "two metrics 'attack_success', expected each name once"),
    ],
)
@pytest.mark.parametrize("verb", ["run", "check"])
def test_a_metric_is_not_named_like_another_column(
    shrink, tmp_path, monkeypatch, capsys, *, verb, name, reason
):
    """Refused before the weights are read, not when the first round is written."""
    monkeypatch.setattr(Shrink, "metrics", (*Shrink.metrics, name))
    settings = [*SETTINGS[:-1], f"run.folder={tmp_path}"]
    options = [word for setting in settings for word in ("--set", setting)]
    assert cli.main([verb, *options]) == 2
    output = "".join(capsys.readouterr())
    assert f"method shrink: found {reason}" in output and "Traceback" not in output
    assert list(tmp_path.rglob("run.h5")) == []


def test_the_name_of_a_method_is_taken_once_and_known():
    with pytest.raises(ValueError, match="method fedsp: found another one of that name"):
        register("fedsp", METHODS["fedsp"])
    known = (
        "expected one of fedsp, finetune, lora, head, pretrain, fedbpt, prompt_search, plmm; did"
    )
    with pytest.raises(config.ConfigError, match=known):
        config.load(None, ["method=fedps"])
