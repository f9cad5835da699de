"""From the command line to a model's forward pass: at most ten calls in seven files (design.md, law
1).
"""

from __future__ import annotations

import traceback
from pathlib import Path

import torch

import fedsp_mpi
from fedsp_mpi import cli

PACKAGE = Path(fedsp_mpi.__file__).parent
SETTINGS = (
    *("federation.rounds=1", "federation.clients=1", "data.limit.test=4"),
    *("distillation.stage.steps=0", "evaluation.server_only=false"),
)


def test_ten_calls_lead_to_a_client_s_forward_pass(tmp_path):
    walks: list[list[tuple[str, str]]] = []

    def look(module: torch.nn.Module, inputs: object) -> None:
        if type(module).__name__ != "GPT2Model":
            return
        calls = [
            (Path(frame.filename).relative_to(PACKAGE).as_posix(), frame.name)
            for frame in traceback.extract_stack()
            if Path(frame.filename).is_relative_to(PACKAGE)
        ]
        if ("federate.py", "train_clients") in calls:
            walks.append(calls)

    options = [word for setting in SETTINGS for word in ("--set", setting)]
    hook = torch.nn.modules.module.register_module_forward_pre_hook(look)
    try:
        assert cli.main(["run", *options, "--set", f"run.folder={tmp_path}"]) == 0
    finally:
        hook.remove()
    assert walks and walks[0][0] == ("cli.py", "main")
    for calls in walks:
        assert len(calls) <= 10, calls  # the tenth calls the model
        assert len({file for file, _ in calls}) <= 7, calls
