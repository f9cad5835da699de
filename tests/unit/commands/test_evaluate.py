"""`evaluate`: lm-eval, on local data and without a network, agrees with the run's own scorer."""

from __future__ import annotations

import json
import math
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fedsp_mpi import cli, config, evaluation
from fedsp_mpi.commands import evaluate, evaluation_results
from fedsp_mpi.commands.evaluate import Options
from fedsp_mpi.commands.evaluation_results import EvalRow
from fedsp_mpi.data.tasks import TASKS
from fedsp_mpi.data.tokens import Text
from fedsp_mpi.evaluation.scoring import score
from fedsp_mpi.log import Log
from fedsp_mpi.models import auxiliary, backbone
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.models.prompts import Prompt, PromptSpec, write_adapter
from fedsp_mpi.record import ResultRow, RunRecord, read
from fedsp_mpi.run.inputs import ExperimentInputs
from fedsp_mpi.tensors import Batch, NamedTensors, seal
from helpers import tiny
from helpers.paths import SHARED
from helpers.runs import short, short_run
from helpers.scores import by_hand

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'fedsp_mpi[evaluate]'")
KINDS = ("prefix", "input")


@pytest.fixture(autouse=True)
def alone(tmp_path_factory, monkeypatch) -> Iterator[None]:
    """Without a network, and with a cache of its own."""

    def refused(*_: object) -> None:
        raise AssertionError("found a call to the network, expected none")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(
        datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "cache"
    )
    monkeypatch.setattr(socket.socket, "connect", refused)
    yield
    seal.clear()


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def model(request, tmp_path_factory) -> str:
    return with_tokenizer(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> str:
    return with_tokenizer(tmp_path_factory.mktemp("gpt2"), "gpt2")


def with_tokenizer(folder: Path, family: str, **changes: Any) -> str:
    """The folder of a tiny model, with a tokenizer below it: beside qwen2's weights transformers
    would make up one.
    """
    tiny.tokenizer().save_pretrained(folder / "words")
    return tiny.model_folder(folder, family, **changes)


def finished(folder: Path, *settings: str) -> Path:
    """A complete run that has trained nothing: its prompt is random, its results are those of the
    package's scorer.
    """
    chosen = config.load(None, ["prompt.num_tokens=5", "server.compute.threads=1", *settings])
    record = RunRecord.create(folder, config=asdict(chosen), config_text="", environment={})
    materials = ExperimentInputs(chosen)
    prompt = Prompt(replace(materials.prompt_spec, projection=None)).initialise(1, 0.5)
    write_adapter(
        folder / "prompt",
        NamedTensors.pack(prompt.tensors()),
        prompt.spec,
        base=materials.model_name,
    )
    model = backbone.load_global(materials.model_name, device=tiny.CPU)
    for method, tuned in {"zero-shot": None, "fedsp": prompt}.items():
        result = score(
            model,
            tuned,
            materials.test,
            metric=materials.task.metric,
            batch_tokens=chosen.evaluation.batch_tokens,
        )
        assert result is not None
        record.write_results([ResultRow(method=method, split="test", **asdict(result))])
    record.finish()
    return folder


def of_model(
    model: str, source: str, kind: str = "prefix", task: str = "multiple_choice"
) -> list[str]:
    words = Path(model) / "words"
    return [
        f"model.name={model}",
        *([f"model.tokenizer={words}"] if words.is_dir() else []),
        f"data.source={source}",
        f"data.task={task}",
        f"prompt.kind={kind}",
        "prompt.projection=null",
    ]


def evaluated(folder: Path, **options: Any) -> list[EvalRow]:
    return list(evaluate.evaluate(folder, Options(**options), Log()).rows)


def require_equal(
    folder: Path, lines: list[EvalRow], methods: tuple[str, ...] = ("fedsp", "zero-shot")
) -> None:
    """Every line equals its row of the record, to the last bit but for the standard error."""
    rows = {row["method"]: row for row in read(folder).results}
    assert tuple(line.method for line in lines) == methods
    for line in lines:
        row = rows[line.method]
        assert line.equal is True and line.n == row["n"] and line.filter == "none"
        assert line.measures == {name: row[name] for name in line.measures} and line.measures
        main = "exact_match" if "exact_match" in line.measures else "acc"
        assert line.errors[main] == pytest.approx(row["stderr"], rel=1e-9)


# -- the run's own task ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_scores_equal_the_runs_own(model, kind, tmp_path):
    folder = finished(
        tmp_path / "run", *of_model(model, tiny.data_folder(tmp_path / "data", test=40), kind)
    )
    lines = evaluated(folder)
    require_equal(folder, lines)
    assert [set(line.measures) for line in lines] == [{"acc", "acc_norm"}] * 2
    assert lines[0].measures != lines[1].measures, "the prompt makes no difference"


def test_a_trained_run_of_the_embedded_default(tmp_path, capsys):
    folder = short(
        tmp_path, "data.limit.test=80", "server.tuning.steps=8", "run.label=ours"
    ).file.parent
    capsys.readouterr()
    assert cli.main(["evaluate", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert (
        err == "" and out.count(" yes\n") == 2 and f"written to {folder / 'evaluation.json'}" in out
    )
    run, written = read(folder), json.loads((folder / "evaluation.json").read_text())
    assert [line["method"] for line in written["results"]] == ["ours", "zero-shot"]
    for line in written["results"]:
        row = next(row for row in run.results if row["method"] == line["method"])
        assert (
            line["measures"] == {"acc": row["acc"], "acc_norm": row["acc_norm"]}
            and line["equal"] is True
        )
    assert written["limit"] is None and written["threads"] == 1 and "lm_eval" in written["versions"]


def _rows(task: str, random: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Rows in the columns of a task's own set, without end."""

    def words(low: int = 1, high: int = 4) -> str:
        return " ".join(random.choice(tiny.words(), random.integers(low, high)))

    make: dict[str, Callable[[], dict[str, Any]]] = {
        "arc_easy": lambda: {"question": words(), "choices": lettered(words), "answerKey": "B"},
        "openbookqa": lambda: {
            "question_stem": words(),
            "choices": lettered(words),
            "answerKey": "C",
        },
        "web_questions": lambda: {"question": words(), "answers": [words(1, 2), "w1", "w1 w2"]},
        "hellaswag": lambda: {
            "activity_label": words(),
            "ctx_a": words(),
            "ctx_b": words() + " [title] w3  w4",
            "endings": [f"[step] {words()}", words(), words(), words()],
            "label": str(random.integers(4)),
        },
        "piqa": lambda: {
            "goal": words(),
            "sol1": words(),
            "sol2": words(),
            "label": int(random.integers(2)),
        },
        "sciq": lambda: {
            "support": f" {words()}",
            "question": words(),
            **{
                name: words()
                for name in ("distractor1", "distractor2", "distractor3", "correct_answer")
            },
        },
        "race": lambda: {
            "article": words(),
            "question": words(),
            "options": [words(), words(), words(), words()],
            "answer": "D",
        },
        "sst2": lambda: {"sentence": words(), "label": int(random.integers(2))},
        "rte": lambda: {
            "sentence1": words(),
            "sentence2": words(),
            "label": int(random.integers(2)),
        },
        "ag_news": lambda: {"text": words(), "label": int(random.integers(4))},
        "question_answering": lambda: {"context": words(), "answers": [words(1, 2), words(1, 2)]},
    }
    while True:
        yield make[task]()


def lettered(words: Callable[[], str]) -> dict[str, list[str]]:
    return {"text": [words(), words(), words()], "label": ["A", "B", "C"]}


def task_folder(folder: Path, task: str, **splits: list[dict[str, Any]]) -> str:
    """A folder of random rows; `splits` are other rows for some splits."""
    rows = _rows(task, np.random.default_rng(4))
    folder.mkdir(parents=True)
    for split, count in {"train": 12, "validation": 6, "test": 14}.items():
        split_rows = splits.get(split) or [next(rows) for _ in range(count)]
        (folder / f"{split}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in split_rows)
        )
    return str(folder)


@pytest.mark.parametrize(
    "task",
    [
        *(
            "arc_easy",
            "openbookqa",
            "web_questions",
            "hellaswag",
            "piqa",
            "sciq",
            "race",
            "sst2",
            "rte",
        ),
        *("ag_news", "question_answering"),
    ],
)
def test_local_rows_of_every_task(gpt2, task, tmp_path):
    """lm-eval's own words for the tasks that it has."""
    folder = finished(
        tmp_path / "run", *of_model(gpt2, task_folder(tmp_path / "data", task), task=task)
    )
    lines = evaluated(folder)
    require_equal(folder, lines)
    assert {line.task for line in lines} == {TASKS[task].lm_eval_name} and lines[0].n == 14


def test_the_same_rows_are_asked_as_the_run_had(gpt2, tmp_path):
    """Without those that it left out, up to its limit, and of the split that has answers."""
    rows = _rows("web_questions", np.random.default_rng(7))
    test_rows = [next(rows) for _ in range(9)]
    test_rows[2]["answers"] = []
    source = task_folder(tmp_path / "web", "web_questions", test=test_rows)
    limited = ["data.limit.test=6"]
    folder = finished(tmp_path / "a", *of_model(gpt2, source, task="web_questions"), *limited)
    lines = evaluated(folder, tasks=("webqs",))
    require_equal(folder, lines)
    assert lines[0].n == 5
    rows = _rows("rte", np.random.default_rng(8))
    source = task_folder(
        tmp_path / "rte", "rte", test=[{**next(rows), "label": -1} for _ in range(9)]
    )
    folder = finished(tmp_path / "b", *of_model(gpt2, source, task="rte"))
    lines = evaluated(folder)
    require_equal(folder, lines)
    assert lines[0].n == 6


def test_race_as_lm_eval_has_it(gpt2, tmp_path):
    problem = {"question": "w1  _  .", "options": ["w2", "w3", "w4", "w5"], "answer": "B"}
    rows = [
        {"article": f"w{n} w9", "problems": str([problem, {**problem, "question": f"w{n}"}])}
        for n in range(9)
    ]
    source = task_folder(tmp_path / "data", "race", train=rows, validation=rows[:4], test=rows)
    folder = finished(tmp_path / "run", *of_model(gpt2, source, task="race"))
    lines = evaluated(folder)
    require_equal(folder, lines)
    assert set(lines[0].measures) == {"acc"}  # lm-eval has no other one


def test_a_limit_and_no_prompt(gpt2, tmp_path, capsys):
    folder = finished(
        tmp_path / "run", *of_model(gpt2, tiny.data_folder(tmp_path / "data", test=30))
    )
    [line] = evaluated(folder, limit=7, without_prompt=True)
    assert (line.method, line.n, line.equal) == ("zero-shot", 7, None) and line.recorded["n"] == 30
    assert cli.main(["evaluate", str(folder / "run.h5"), "--limit", "7", "--without-prompt"]) == 0
    out = capsys.readouterr().out
    assert (
        "the run scored 30 questions of multiple_choice, not 7: nothing is compared" in out
        and " yes" not in out
    )


def test_a_result_that_is_not_equal_is_called_so(gpt2, tmp_path):
    folder = finished(
        tmp_path / "run", *of_model(gpt2, tiny.data_folder(tmp_path / "data", test=30))
    )
    spec = PromptSpec.of(tiny.load(gpt2).shape, "prefix", 5)
    other_prompt = Prompt(spec).initialise(2, 3.0)
    write_adapter(folder / "prompt", NamedTensors.pack(other_prompt.tensors()), spec, base=gpt2)
    evaluation = evaluate.evaluate(folder, Options(), Log())
    assert [row.equal for row in evaluation.rows] == [False, True]
    assert "not equal: look for another" in evaluation_results.table(evaluation)


def test_a_tuned_model(gpt2, tmp_path):
    folder = finished(
        tmp_path / "run", *of_model(gpt2, tiny.data_folder(tmp_path / "data", test=30))
    )
    settings = read(folder).config | {"method": "finetune"}
    other_model = AutoModelForCausalLM.from_pretrained(
        with_tokenizer(tmp_path / "other", "gpt2", seed=5)
    )
    record = RunRecord.create(tmp_path / "tuned", config=settings, config_text="", environment={})
    auxiliary.write_model(tmp_path / "tuned" / "model", other_model, tiny.tokenizer())
    record.finish()
    before = evaluated(folder)
    tuned, plain = evaluated(tmp_path / "tuned")
    assert (tuned.method, plain.method) == ("finetune", "zero-shot") and plain.measures == before[
        1
    ].measures
    model = LanguageModel(other_model.eval())
    materials = ExperimentInputs(config.load(None, of_model(gpt2, str(tmp_path / "data"))))
    expected = score(model, None, materials.test, metric="multiple_choice", batch_tokens=4096)
    assert expected is not None and tuned.measures == {
        "acc": expected.acc,
        "acc_norm": expected.acc_norm,
    }
    assert tuned.measures != plain.measures


def test_adapters_of_other_settings_than_the_default_ones(tmp_path):
    settings = ("method=lora", "lora.rank=4", "lora.alpha=400", "lora.targets=[c_fc]")
    short_run(0, tmp_path, "a", *settings, "client.tuning.optimizer.learning_rate=0.01")
    require_equal(tmp_path / "a", evaluated(tmp_path / "a"), ("lora", "zero-shot"))


def test_a_trained_model(tmp_path):
    model, source = SHARED / "models" / "stories15m", SHARED / "data" / "arc_easy"
    if not model.is_dir() or not source.is_dir():
        pytest.skip("no local copy of stories15m and arc_easy in ../shared")
    settings = [*of_model(str(model), str(source), task="arc_easy"), "data.limit.test=12"]
    folder = finished(tmp_path / "run", *settings)
    require_equal(folder, evaluated(folder))


# -- lm-eval's other questions ---------------------------------------------------------------------


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [
        Instance(
            request_type="generate_until",
            doc={},
            arguments=request_arguments,
            idx=0,
            metadata=("t", place, 1),
        )
        for place, request_arguments in enumerate(arguments)
    ]


def answers(model: LanguageModel, prompt: Prompt | None, batch_tokens: int = 200) -> Any:
    from fedsp_mpi.evaluation.harness import PromptedLM

    return PromptedLM(
        model, prompt, tiny.tokenizer(), batch_tokens=batch_tokens, label="test", log=Log()
    )


def prompt_for(model: LanguageModel, kind: str | None) -> Prompt | None:
    return Prompt(PromptSpec.of(model.shape, kind, 5)).initialise(1, 0.5) if kind else None  # type: ignore[arg-type]


@torch.no_grad()
def greedy(
    model: LanguageModel, prompt: Prompt | None, context: str, most: int, stops: tuple[str, ...]
) -> str:
    """Greedy decoding in full passes without a cache."""
    tokenizer = tiny.tokenizer()
    ids, generated = tokenizer(context)["input_ids"] or [1], []
    while len(generated) < most:
        batch = Batch(*(torch.tensor([ids + generated]),) * 3)._replace(
            attention_mask=torch.ones(1, len(ids + generated), dtype=torch.long)
        )
        generated.append(int(model.head(model.hidden(batch, prompt)[:, -1]).argmax()))
        if generated[-1] == tokenizer.eos_token_id or any(
            stop in tokenizer.decode(generated) for stop in stops
        ):
            break
    text = tokenizer.decode(generated, skip_special_tokens=True)
    for stop in stops:
        text = text.split(stop)[0]
    return text


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_generation_is_greedy_and_ends_at_a_stop(model, kind):
    loaded = tiny.load(model)
    prompt, random = prompt_for(loaded, kind), np.random.default_rng(2)
    contexts = ["", *(" ".join(random.choice(tiny.words(), size)) for size in (3, 7, 3, 1, 7, 3))]
    expected = [greedy(loaded, prompt, context, 12, ()) for context in contexts]
    settings = {"until": [], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}
    assert (
        answers(loaded, prompt).generate_until(requests(*((c, settings) for c in contexts)))
        == expected
    )
    stop = expected[1].split()[5]
    expected = [greedy(loaded, prompt, context, 12, (stop,)) for context in contexts]
    generated = answers(loaded, prompt, 40).generate_until(
        requests(*((c, {**settings, "until": stop}) for c in contexts))
    )
    assert generated == expected and stop not in "".join(generated)


def test_generation_is_lm_evals(gpt2):
    from lm_eval.models.huggingface import HFLM

    plain, loaded = AutoModelForCausalLM.from_pretrained(gpt2), tiny.load(gpt2)
    reference = HFLM(pretrained=plain, tokenizer=tiny.tokenizer(), batch_size=3, backend="causal")
    settings = {"until": ["w5 "], "max_gen_toks": 20, "do_sample": False}
    questions = requests(*((f"w{n} w{n + 1}" + " w7" * (n % 3), settings) for n in range(9)))
    assert answers(loaded, None).generate_until(questions) == reference.generate_until(
        questions, disable_tqdm=True
    )


def test_a_long_context_leaves_room_for_what_is_generated(gpt2):
    loaded = tiny.load(gpt2)
    words = [f"w{n % 90}" for n in range(150)]
    for kind, room in ((None, tiny.POSITIONS), ("prefix", tiny.POSITIONS - 5)):
        prompt = prompt_for(loaded, kind)
        generated = answers(loaded, prompt).generate_until(
            requests((" ".join(words), {"max_gen_toks": 10}))
        )
        assert generated == [greedy(loaded, prompt, " ".join(words[10 - room :]), 10, ())]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"do_sample": True},
            "do_sample: found sampling at temperature 1.0 in a task's generation_kwargs",
        ),
        ({"temperature": 0.7}, "do_sample: found sampling at temperature 0.7"),
        (
            {"max_gen_toks": 64},
            "max_gen_toks: found 64 tokens to generate, expected fewer than the 64 positions",
        ),
        ({}, "max_gen_toks: found 256 tokens to generate"),
        ({"num_beams": 4, "max_gen_toks": 4}, "generation_kwargs: found num_beams in a task"),
    ],
)
def test_what_is_not_greedy_is_refused(gpt2, settings, message):
    with pytest.raises(ValueError, match="expected") as error:
        answers(tiny.load(gpt2), None).generate_until(requests(("w1", settings)))
    assert message in str(error.value)


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_whole_texts_are_summed_over_windows(model, kind):
    """Each token once, in windows of all positions; the last one is as full as the others."""
    loaded, random = tiny.load(model), np.random.default_rng(3)
    prompt, stock = prompt_for(loaded, kind), AutoModelForCausalLM.from_pretrained(model).eval()
    room = tiny.POSITIONS - (5 if kind else 0)
    sizes = (1, room - 1, room, room + 1, 2 * room + 3)
    texts = [" ".join(random.choice(tiny.words(), size)) for size in sizes]
    results = answers(loaded, prompt).loglikelihood_rolling(requests(*((text,) for text in texts)))
    for text, value in zip(texts, results, strict=True):
        ids, expected, done = [1, *tiny.tokenizer()(text)["input_ids"]], 0.0, 1
        while done < len(ids):
            end = min(done + room, len(ids))
            window = np.array(ids[max(0, end - room - 1) : end], dtype=np.int32)
            expected += by_hand(stock, prompt, Text(window, len(window) - (end - done)))[0]
            done = end
        assert value == pytest.approx(expected, abs=1e-3)


def test_whole_texts_are_lm_evals(gpt2):
    from lm_eval.models.huggingface import HFLM

    reference = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(gpt2),
        tokenizer=tiny.tokenizer(),
        batch_size=2,
        backend="causal",
    )
    texts = requests(
        *(
            (" ".join(f"w{(n * k) % 90}" for k in range(size)),)
            for n, size in enumerate((5, 64, 65, 200))
        )
    )
    expected = reference.loglikelihood_rolling(texts, disable_tqdm=True)
    assert answers(tiny.load(gpt2), None).loglikelihood_rolling(texts) == pytest.approx(
        expected, abs=1e-3
    )


@pytest.mark.parametrize("kind", KINDS)
def test_options_with_a_prompt_are_lm_evals_with_stock_peft(model, kind, tmp_path):
    """lm-eval's own model class around peft's own model of the same prompt."""
    peft = pytest.importorskip("peft")
    from lm_eval.models.huggingface import HFLM

    loaded = tiny.load(model)
    prompt = prompt_for(loaded, kind)
    assert prompt is not None
    write_adapter(tmp_path, NamedTensors.pack(prompt.tensors()), prompt.spec, base=model)
    stock = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model), tmp_path
    ).eval()
    reference = HFLM(pretrained=stock, tokenizer=tiny.tokenizer(), batch_size=4, backend="causal")
    pairs = [
        (f"w{n} w{2 * n}", f" w{m} w3 w{n}"[: 3 + 3 * (m % 3)]) for n in range(6) for m in range(4)
    ]
    options = [*requests(*pairs), *requests(("", " w5"), ("", " w6 w7"))]
    expected = reference.loglikelihood(options, disable_tqdm=True)
    results = answers(loaded, prompt).loglikelihood(options)
    assert [value for value, _ in results] == pytest.approx(
        [value for value, _ in expected], abs=1e-4
    )
    assert [best for _, best in results] == [best for _, best in expected]


def test_a_context_is_run_once_for_all_its_options(gpt2, monkeypatch):
    loaded, sizes = tiny.load(gpt2), []
    run = loaded.continue_from
    monkeypatch.setattr(
        loaded,
        "continue_from",
        lambda ids, *rest, **more: (sizes.append(tuple(ids.shape)), run(ids, *rest, **more))[1],
    )
    options = [
        request
        for place in range(2)
        for request in requests(*[("w1 w2 w3", f" w{n}") for n in range(4)])
    ]
    for place, request in enumerate(options):
        request.doc_id = place // 4
    answers(loaded, None, 1000).loglikelihood(options)
    assert sizes == [(2, 3)]
    with pytest.raises(ValueError, match="found an option without a token in question"):
        answers(loaded, None).loglikelihood(requests(("w1", "")))


# -- tasks of the user's own -----------------------------------------------------------------------

OWN = {
    "said": {
        "output_type": "generate_until",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{choices[label]}}",
        "generation_kwargs": {"until": ["w4"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
        "filter_list": [
            {"name": "whole", "filter": [{"function": "take_first"}]},
            {
                "name": "first",
                "filter": [
                    {"function": "regex", "regex_pattern": "(w\\d+)"},
                    {"function": "take_first"},
                ],
            },
        ],
    },
    "told": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{context}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "shown": {
        "output_type": "multiple_choice",
        "num_fewshot": 2,
        "fewshot_split": "train",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    },
}


def test_files_of_the_users_own(gpt2, tmp_path, capsys):
    source = tiny.data_folder(tmp_path / "data", test=12)
    folder = finished(tmp_path / "run", *of_model(gpt2, source))
    files = {split: f"{source}/{split}.jsonl" for split in ("train", "test")}
    (tmp_path / "tasks").mkdir()
    for name, task in OWN.items():
        where = {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": files},
            "test_split": "test",
        }
        (tmp_path / "tasks" / f"{name}.yaml").write_text(
            json.dumps({"task": name, **where, **task})
        )
    arguments = [
        "--tasks",
        "said, told,multiple_choice,shown",
        "--include",
        str(tmp_path / "tasks"),
    ]
    assert cli.main(["evaluate", str(folder), *arguments]) == 0
    out, err = capsys.readouterr()
    assert (
        err == ""
        and out.count(" yes\n") == 2
        and "word_perplexity" in out
        and "said (first)" in out
    )
    results = json.loads((folder / "evaluation.json").read_text())["results"]
    lines = {(line["task"], line["filter"], line["method"]): line for line in results}
    assert len(lines) == len(results) == 2 * 5
    assert (
        lines["told", "none", "fedsp"]["measures"]["word_perplexity"] > 1
        and lines["told", "none", "fedsp"]["n"] == 12
    )
    assert (
        lines["said", "whole", "fedsp"]["recorded"] is None
        and lines["shown", "none", "zero-shot"]["equal"] is None
    )


# -- mistakes --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ready(tmp_path_factory, gpt2) -> Path:
    folder = tmp_path_factory.mktemp("ready")
    return finished(folder / "run", *of_model(gpt2, tiny.data_folder(folder / "data")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--tasks", "arc_easy,,x"),
            "--tasks: found 'arc_easy,,x', expected names with a comma between them",
        ),
        (("--limit", "0"), "--limit: found 0, expected at least 1"),
        (("--batch-tokens", "-2"), "--batch-tokens: found -2, expected at least 1"),
        (("--include", "/nowhere"), "--include: found no folder /nowhere"),
        (("--device", "cuda"), "compute.device: found no CUDA device"),
        (
            ("--tasks", "sst2"),
            "sst2: found ConnectionError while lm-eval loaded the task",
        ),  # its data are on the hub
    ],
)
def test_a_mistake_is_one_line(ready, arguments, message, capsys):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert cli.main(["evaluate", str(ready), *arguments]) == 2
    out, err = capsys.readouterr()
    assert (
        err.count("\n") == 1
        and err.startswith("fedsp_mpi: ")
        and message in err
        and "Traceback" not in out
    )


def test_an_unknown_name_with_the_nearest(ready, tmp_path, monkeypatch, capsys):
    from fedsp_mpi.evaluation import harness

    monkeypatch.setattr(
        harness, "TaskManager", partial(harness.TaskManager, include_defaults=False)
    )  # spares ten seconds
    (tmp_path / "mine.yaml").write_text("task: my_questions")
    assert (
        cli.main(["evaluate", str(ready), "--tasks", "my_question", "--include", str(tmp_path)])
        == 2
    )
    error = capsys.readouterr().err
    assert (
        "--tasks: found 'my_question', which lm-eval" in error
        and "did you mean 'my_questions'?" in error
    )


@pytest.mark.slow
def test_a_name_that_only_all_of_lm_eval_has(ready, capsys):
    assert cli.main(["evaluate", str(ready), "--tasks", "copa"]) == 2
    assert "copa: found ConnectionError while lm-eval loaded the task" in capsys.readouterr().err
    assert cli.main(["evaluate", str(ready), "--tasks", "arc_eazy"]) == 2
    assert "did you mean 'arc_easy'?" in capsys.readouterr().err


def test_a_run_that_is_not_complete(gpt2, tmp_path, capsys):
    chosen = config.load(None, of_model(gpt2, tiny.data_folder(tmp_path / "data")))
    record = RunRecord.create(
        tmp_path / "run", config=asdict(chosen), config_text="", environment={}
    )
    assert cli.main(["evaluate", str(tmp_path / "run")]) == 2
    assert "found a run that is running, expected a complete one" in capsys.readouterr().err
    assert [line.method for line in evaluated(tmp_path / "run", without_prompt=True, limit=3)] == [
        "zero-shot"
    ]
    record.finish()
    assert cli.main(["evaluate", str(tmp_path / "run")]) == 2
    assert "found no such folder, expected what the run has tuned" in capsys.readouterr().err
    spec = PromptSpec.of(tiny.load(gpt2).shape, "prefix", 3)
    write_adapter(
        tmp_path / "run" / "prompt", NamedTensors.pack(Prompt(spec).tensors()), spec, base=gpt2
    )
    assert cli.main(["evaluate", str(tmp_path / "run")]) == 2
    assert "found a prompt of shape [3, 256], expected [16, 256]" in capsys.readouterr().err


def test_a_record_of_another_version(ready, tmp_path, capsys):
    settings = read(ready).config
    for name, changed in {
        "old": {"topology": {"unheard": 1}},
        "new": {"evaluation": {"unheard": 1}},
    }.items():
        record = RunRecord.create(
            tmp_path / name, config=settings | changed, config_text="", environment={}
        )
        record.finish()
    assert math.isfinite(
        evaluated(tmp_path / "old", without_prompt=True, limit=2)[0].measures["acc"]
    )
    assert cli.main(["evaluate", str(tmp_path / "new"), "--without-prompt"]) == 2
    assert "evaluation.unheard: found an unknown key" in capsys.readouterr().err


def test_a_result_that_cannot_be_written_is_shown_all_the_same(ready, capsys):
    (ready / "evaluation.json.part").mkdir()
    try:
        assert cli.main(["evaluate", str(ready), "--limit", "2", "--without-prompt"]) == 2
    finally:
        (ready / "evaluation.json.part").rmdir()
    out, err = capsys.readouterr()
    assert (
        "zero-shot" in out
        and "cannot be written" in err
        and not (ready / "evaluation.json").exists()
    )


def test_data_that_are_not_here_are_to_be_fetched(ready, tmp_path, capsys):
    settings = read(ready).config
    settings = settings | {"data": settings["data"] | {"task": "sst2", "source": None}}
    RunRecord.create(tmp_path / "run", config=settings, config_text="", environment={}).finish()
    assert cli.main(["evaluate", str(tmp_path / "run"), "--without-prompt"]) == 2
    assert (
        f"`python -m fedsp_mpi fetch {tmp_path / 'run' / 'config.yaml'}`" in capsys.readouterr().err
    )


@pytest.fixture
def unloaded(monkeypatch) -> None:
    """As if the adapter had not been imported yet."""
    import fedsp_mpi.evaluation.harness  # noqa: F401

    monkeypatch.delitem(sys.modules, "fedsp_mpi.evaluation.harness")
    monkeypatch.delattr(evaluation, "harness")


def test_without_lm_eval(ready, unloaded, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert cli.main(["evaluate", str(ready)]) == 2
    assert "found no usable lm-eval" in (error := capsys.readouterr().err)
    assert "pip install 'fedsp_mpi[evaluate]'" in error and error.count("\n") == 1


def test_an_lm_eval_that_is_too_old(ready, unloaded, monkeypatch, capsys):
    from lm_eval.tasks import TaskManager

    monkeypatch.delattr(TaskManager, "load")
    assert cli.main(["evaluate", str(ready)]) == 2
    assert "whose TaskManager has no load), expected 0.4.12 or later" in capsys.readouterr().err


def test_under_mpirun(ready, monkeypatch, capsys):
    monkeypatch.setattr(cli, "launcher_size", lambda: 4)
    assert cli.main(["evaluate", str(ready)]) == 2
    assert (
        "evaluate: found 4 processes, expected one; start it without mpirun"
        in capsys.readouterr().err
    )
