"""The zero-shot row of a finished run against lm-eval on the whole test split: takes as long as
scoring it.

FEDSP_RUN=runs/arc_easy pytest tests/unit/evaluation/test_lm_eval_run.py
"""

import os
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedsp_mpi.record import read
from helpers.scores import lm_eval_results

OTHER_NAMES = {"web_questions": "webqs"}


@pytest.mark.skipif(
    "FEDSP_RUN" not in os.environ, reason="FEDSP_RUN does not name the folder of a finished run"
)
def test_zero_shot_of_a_run_equals_lm_evals(monkeypatch):
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    run = read(Path(os.environ["FEDSP_RUN"]))
    ours = next(row for row in run.results if row["method"] == "zero-shot")
    task, source, name = (
        run.config["data"]["task"],
        run.config["data"]["source"],
        run.config["model"]["name"],
    )
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[
        run.config["evaluation"]["dtype"]
    ]
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    data = datasets.load_dataset(source)
    tokenizer = AutoTokenizer.from_pretrained(name)
    theirs, samples = lm_eval_results(
        model, tokenizer, OTHER_NAMES.get(task, task), data, None, monkeypatch
    )
    print({key: value for key, value in theirs.items() if key.startswith(("acc", "exact_match"))})
    assert len(samples) == ours["n"]
    for measure in ("acc", "acc_norm", "exact_match"):
        if f"{measure},none" in theirs:
            assert ours[measure] == theirs[f"{measure},none"], measure
