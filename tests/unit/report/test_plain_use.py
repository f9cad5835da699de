"""The lines that a summary prints use the run's prompt in plain transformers and peft.

They are executed as they are printed, and give the choices the scores that the run's own scoring
gives them.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fedsp_mpi import record, report
from fedsp_mpi.comm import Topology
from fedsp_mpi.commands import evaluate
from fedsp_mpi.evaluation.scoring import loglikelihoods
from fedsp_mpi.record import Run
from fedsp_mpi.report import plain_use
from fedsp_mpi.run.inputs import ExperimentInputs
from fedsp_mpi.training.device import Compute
from helpers import runs, tiny

FINETUNE = ("method=finetune", *runs.WHOLE_MODEL, "client.tuning.steps=2", "server.tuning.steps=0")
# Runs a file of lines per case, where this package cannot be imported; prints what they leave.
FRESH = """
import contextlib, io, json, sys
sys.modules["fedsp_mpi"] = None
results = {}
for file in sys.argv[1:]:
    left, out = {}, io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(open(file, encoding="utf-8").read(), left)
    results[file] = [left.get("scores"), out.getvalue()]
print(json.dumps(results))
"""


def several_tokens(folder: Path) -> list[str]:
    """A llama of two key/value heads, whose choices are one or two words."""
    tiny.model_folder(folder / "model", "llama")
    tiny.tokenizer().save_pretrained(folder / "model")
    tiny.data_folder(folder / "data")
    return [f"model.name={folder / 'model'}", f"data.source={folder / 'data'}"]


def open_answers(folder: Path) -> list[str]:
    """The same model, whose answers are generated."""
    settings = several_tokens(folder)
    rows = [
        {"question": f"w{n} w{n + 1}", "answers": [f"w{n + 2} w3"], "url": ""} for n in range(30)
    ]
    (folder / "data").joinpath("validation.jsonl").unlink()
    for split in ("train", "test"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "data" / f"{split}.jsonl").write_text(text)
    return [*settings, "data.task=web_questions", "data.limit.validation=8", "prompt.num_tokens=4"]


CASES = {
    "embedded prefix": lambda folder: [],
    "embedded input": lambda folder: ["prompt.kind=input"],
    "finetuned": lambda folder: list(FINETUNE),
    "several tokens": several_tokens,
    "bert": lambda folder: runs.gap_settings(folder, "bert"),
    "roberta": lambda folder: runs.gap_settings(folder, "roberta"),
    "t5": lambda folder: runs.gap_settings(folder, "t5"),
    "open answers": open_answers,
}


QUICK = ("embedded prefix", "bert")
MARKED = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """Does a short run of a case, once."""

    @cache
    def run(name: str) -> Run:
        folder = tmp_path_factory.mktemp(name.replace(" ", "_"))
        return runs.short(folder, *CASES[name](folder))

    return run


def code(run: Run) -> str:
    """What the summary prints below the line that announces it."""
    printed = report.summarize(run)
    return printed.partition("(Python):\n")[2]


def own_scores(run: Run, answer: str | None = None) -> tuple[dict[str, float], list[bool]]:
    """What the run's own scoring says of the choices of the printed question, or of one answer to
    it: log-likelihoods, and whether greedy decoding gives the choice.
    """
    question = run.sections["plain_use"]["question"]
    inputs = ExperimentInputs(evaluate._config(run, evaluate.Options()))
    compute = Compute.of(inputs.config.server.compute, Topology.alone())
    _, model, prompt = next(
        iter(evaluate._models(inputs, run.folder, compute, without_prompt=False))
    )
    choices = [choice.strip() for choice in question.get("choices", [answer])]
    words = question["text"].partition(question.get("gap", "\0"))[0].strip()
    example = next(e for e in inputs.splits.test if e.context.strip() == words)
    asked = inputs._to_questions([replace(example, choices=tuple(choices), gold=(0,))])
    [scores] = loglikelihoods(model, prompt, asked, batch_tokens=512) or []
    values = scores.loglikelihood.tolist()
    return dict(zip(question.get("choices", choices), values)), scores.greedy.tolist()


def executed(text: str) -> tuple[dict[str, float], str]:
    """What lines leave in `scores`, and what they print."""
    left: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(text, left)
    return left.get("scores", {}), out.getvalue()


@pytest.mark.parametrize("name", MARKED)
def test_the_printed_lines_score_as_the_run_does(finished, name):
    run = finished(name)
    text = code(run)
    scores, printed = executed(text)
    if name == "open answers":
        assert len(printed.split()) == run.sections["plain_use"]["question"]["num_tokens"] == 2
        assert own_scores(run, printed.strip())[1] == [True]
        return
    own, _ = own_scores(run)
    assert scores == pytest.approx(own, abs=2e-4) and len(own) >= 2
    assert printed.startswith(max(own, key=lambda choice: own[choice]))
    lines = text.strip().split("\n")
    assert len(lines) <= 18 and all(len(line) <= 100 for line in lines if "/" not in line)
    assert str(run.folder / ("model" if name == "finetuned" else "prompt")) in text
    assert ("for choice in" in text) == (name == "several tokens")


def test_a_record_cannot_put_code_into_the_lines(finished):
    """Texts of a record stand in quotes, whatever they hold."""
    run = record.read(finished("embedded prefix").folder)
    section = run.sections["plain_use"]
    evil = "'); raise SystemExit(3)\n#"
    section |= {"model": evil, "tokenizer": evil, "revision": evil, "dtype": evil}
    section["question"] |= {"text": evil * 9, "choices": [evil, "b"]}
    text = code(run)
    compile(text, "lines", "exec")
    assert not re.search("^ *raise", text, re.M) and text.count("raise SystemExit") > 9
    assert plain_use.lines(replace(run, status="running")) == []
    del section["tokenizer"]
    assert plain_use.lines(run) == []


@pytest.mark.slow
def test_a_fresh_interpreter_without_the_package_agrees(finished, tmp_path):
    files = {}
    for number, name in enumerate(CASES):
        files[name] = tmp_path / f"{number}.py"
        files[name].write_text(code(finished(name)), encoding="utf-8")
    command = [sys.executable, "-c", FRESH, *map(str, files.values())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    for name in CASES:
        scores, printed = results[str(files[name])]
        if name == "open answers":
            assert own_scores(finished(name), printed.strip())[1] == [True]
            continue
        own, _ = own_scores(finished(name))
        assert max(scores, key=scores.get) == max(own, key=lambda choice: own[choice]), name
        assert printed.startswith(max(scores, key=scores.get)), name
