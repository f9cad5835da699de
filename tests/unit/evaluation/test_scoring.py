"""Scores against every option's own full sequence, and against lm-eval's own model class."""

import math

import datasets
import numpy as np
import pytest
import tokenizers
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from fedsp_mpi.data import loading
from fedsp_mpi.data.tasks import Example
from fedsp_mpi.data.tokens import Question, Text, by_length, collate, encode, encode_pairs, truncate
from fedsp_mpi.evaluation import scoring
from fedsp_mpi.evaluation.scoring import answer_loss_mean, questions, score
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.models.prompts import Prompt, PromptSpec
from fedsp_mpi.tensors import seal
from helpers import tiny
from helpers.paths import SHARED
from helpers.scores import by_hand, lm_eval_results


@pytest.fixture(autouse=True)
def unsealed(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(
        datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "cache"
    )
    yield
    seal.clear()


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def folder(request, tmp_path_factory) -> str:
    return tiny.model_folder(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> str:
    return tiny.model_folder(tmp_path_factory.mktemp("gpt2"), "gpt2")


def merging() -> PreTrainedTokenizerFast:
    """A tokenizer without word borders: "b c" and "ab" are tokens too, so texts may merge where
    they meet.
    """
    alphabet = [*"abcdefgh :?", "ab", " c", "b c", "de"]
    vocabulary = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocabulary, [("a", "b"), (" ", "c"), ("b", " c"), ("d", "e")], unk_token="<unk>"
        )
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def some_questions(count: int = 12, longest: int = 9, seed: int = 0) -> list[Question]:
    """Options of different lengths over one context, now and then over contexts of their own."""
    random, drawn = np.random.default_rng(seed), []
    for _ in range(count):
        context = random.integers(4, tiny.VOCABULARY, random.integers(1, longest + 1))
        options = []
        for number in range(3):
            option_context = (
                np.append(context, 7) if number == 2 and random.random() < 0.3 else context
            )
            option = random.integers(4, tiny.VOCABULARY, random.integers(1, 5))
            options.append(
                Text(np.concatenate([option_context, option]).astype(np.int32), len(option_context))
            )
        drawn.append(
            Question(
                tuple(options),
                tuple(random.integers(1, 20, 3).tolist()),
                (int(random.integers(3)),),
            )
        )
    return drawn


def all_found(
    model: LanguageModel,
    prompt: Prompt | None,
    asked_questions: list[Question],
    monkeypatch,
    batch_tokens: int = 100,
):
    """What `score` finds for every option, with the score itself."""
    recorded, judge = [], scoring._is_correct
    monkeypatch.setattr(
        scoring,
        "_is_correct",
        lambda question, scores: (recorded.append(scores), judge(question, scores))[1],
    )
    result = score(
        model, prompt, asked_questions, metric="multiple_choice", batch_tokens=batch_tokens
    )
    return result, [list(zip(scores.loglikelihood, scores.greedy)) for scores in recorded]


def prompt_for(
    model: LanguageModel, kind: str | None, projection: int | None = None
) -> Prompt | None:
    return kind and Prompt(PromptSpec.of(model.shape, kind, 5, projection=projection)).initialise(
        1, 0.5
    )


# -- against every option on its own ---------------------------------------------------------------


@pytest.mark.parametrize("kind", [None, "prefix", "input"])
def test_every_option_scores_as_its_own_full_sequence(folder, kind, monkeypatch):
    model, asked_questions = tiny.load(folder), some_questions()
    prompt, stock = prompt_for(model, kind), AutoModelForCausalLM.from_pretrained(folder).eval()
    result, scores = all_found(model, prompt, asked_questions, monkeypatch)
    right = []
    for question, options in zip(asked_questions, scores, strict=True):
        expected = [by_hand(stock, prompt, text) for text in question.options]
        assert [value for value, _ in options] == pytest.approx(
            [value for value, _ in expected], abs=1e-4
        )
        assert [greedy for _, greedy in options] == [greedy for _, greedy in expected]
        values = [value for value, _ in expected]
        by_size = [value / size for value, size in zip(values, question.lengths)]
        right.append(
            [
                max(range(3), key=criterion.__getitem__) in question.gold
                for criterion in (values, by_size)
            ]
        )
    acc, norm = np.mean(right, axis=0)
    assert (result.n, result.acc, result.acc_norm) == (
        len(asked_questions),
        acc,
        norm,
    ) and math.isnan(result.exact_match)
    assert result.stderr == pytest.approx(
        np.std([r[0] for r in right], ddof=1) / math.sqrt(len(asked_questions))
    )


@pytest.mark.each_once
@pytest.mark.parametrize("kind", [None, "prefix", "input"])
def test_contexts_longer_than_the_positions_lose_their_beginning(folder, kind, monkeypatch):
    model, random = tiny.load(folder), np.random.default_rng(3)
    asked_questions = []
    for size in (
        tiny.POSITIONS - 6,
        tiny.POSITIONS - 5,
        tiny.POSITIONS - 4,
        tiny.POSITIONS,
        tiny.POSITIONS + 30,
    ):
        context = random.integers(4, tiny.VOCABULARY, size)
        ends = [random.integers(4, tiny.VOCABULARY, length) for length in (1, 3, 6)]
        asked_questions.append(
            Question(
                tuple(Text(np.concatenate([context, end]).astype(np.int32), size) for end in ends),
                (1, 2, 3),
                (0,),
            )
        )
    prompt = prompt_for(model, kind)
    _, scores = all_found(model, prompt, asked_questions, monkeypatch)
    for question, options in zip(asked_questions, scores, strict=True):
        expected = [by_hand(folder, prompt, text)[0] for text in question.options]
        assert [value for value, _ in options] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_how_options_are_batched_is_of_no_consequence(gpt2, batch_tokens, monkeypatch):
    model, asked_questions, done = tiny.load(gpt2), some_questions(), []
    prompt = prompt_for(model, "prefix", 7)
    result, scores = all_found(model, prompt, asked_questions, monkeypatch)
    monkeypatch.undo()
    other_result, other_scores = all_found(
        model, prompt, asked_questions, monkeypatch, batch_tokens
    )
    assert np.allclose(
        [[v for v, _ in f] for f in scores], [[v for v, _ in f] for f in other_scores], atol=1e-4
    )
    assert (other_result.acc, other_result.acc_norm) == (result.acc, result.acc_norm)
    score(
        model,
        prompt,
        asked_questions,
        metric="multiple_choice",
        batch_tokens=batch_tokens,
        on_done=done.append,
    )
    assert sum(done) == 3 * len(asked_questions) and len(done) > 1


def test_a_context_is_run_once_for_all_its_options(gpt2, monkeypatch):
    model, sizes = tiny.load(gpt2), []
    run = model.continue_from
    monkeypatch.setattr(
        model,
        "continue_from",
        lambda ids, *rest, **more: (sizes.append(tuple(ids.shape)), run(ids, *rest, **more))[1],
    )
    ids = np.arange(4, 12, dtype=np.int32)
    asked_questions = [
        Question(
            tuple(Text(np.append(ids, end).astype(np.int32), 8) for end in (20, 21, 22)),
            (1, 1, 1),
            (0,),
        )
    ] * 2
    score(model, None, asked_questions, metric="multiple_choice", batch_tokens=1000)
    assert sizes == [(2, 8)]


@pytest.mark.each_once
@pytest.mark.parametrize("kind", [None, "prefix", "input"])
@pytest.mark.parametrize("batch_tokens", [1, 30, 60, 200])
def test_a_forward_pass_runs_no_more_positions_than_asked(gpt2, kind, batch_tokens, monkeypatch):
    """Padding counts, and what an input prompt adds; more only where one context and its options
    are longer.
    """
    model, groups = tiny.load(gpt2), []
    prompt, run = prompt_for(model, kind), model.continue_from
    before = 5 if kind == "input" else 0

    def watched(ids, prompt, rows, *, endings):
        first, further = run(ids, prompt, rows, endings=endings)
        longest = 1 if further is None else 1 + further.shape[1]
        groups.append((len(ids), ids.numel() + len(ids) * before + len(rows) * longest))
        return first, further

    monkeypatch.setattr(model, "continue_from", watched)
    random, asked_questions = np.random.default_rng(5), []
    for number in range(20):  # one long option among short ones costs all of its group
        context = random.integers(4, tiny.VOCABULARY, (3, 7)[number % 2])
        ends = [
            random.integers(4, tiny.VOCABULARY, size)
            for size in (1, 2, 12 if number % 5 == 0 else 3)
        ]
        options = tuple(
            Text(np.concatenate([context, end]).astype(np.int32), len(context)) for end in ends
        )
        asked_questions.append(Question(options, (1, 2, 3), (0,)))
    score(model, prompt, asked_questions, metric="multiple_choice", batch_tokens=batch_tokens)
    assert sum(stems for stems, _ in groups) == len(asked_questions)
    assert all(stems == 1 or cost <= batch_tokens for stems, cost in groups)
    assert batch_tokens < 60 or any(stems > 1 for stems, _ in groups)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", [None, "input"])
def test_checkpointing_changes_no_score(family, kind, tmp_path, monkeypatch):
    """transformers drops the cache while it checkpoints, which is in training mode only."""
    path, asked_questions = tiny.model_folder(tmp_path, family), some_questions()
    plain, lean = tiny.load(path), tiny.load(path, checkpointing=True)
    assert lean.model.training
    prompt = prompt_for(plain, kind)
    result, scores = all_found(plain, prompt, asked_questions, monkeypatch)
    monkeypatch.undo()
    other_result, other_scores = all_found(lean, prompt, asked_questions, monkeypatch)
    assert other_scores == scores and (
        other_result.acc,
        other_result.acc_norm,
        other_result.stderr,
    ) == (
        result.acc,
        result.acc_norm,
        result.stderr,
    )
    assert lean.model.training and not plain.model.training  # as they were
    texts = tiny.texts([3, 9, 5])
    assert answer_loss_mean(lean, prompt, texts, batch_tokens=20) == answer_loss_mean(
        plain, prompt, texts, batch_tokens=20
    )
    monkeypatch.setattr(lean, "continue_from", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        score(lean, prompt, asked_questions, metric="multiple_choice", batch_tokens=100)
    assert lean.model.training


def test_a_large_vocabulary_costs_no_precision(tmp_path, monkeypatch):
    """Sums over tens of thousands of tokens in fp32, as exact as lm-eval's."""
    model, asked_questions = (
        tiny.load(tiny.model_folder(tmp_path, "gpt2", vocab_size=32_000)),
        some_questions(4),
    )
    model.model.transformer.ln_f.weight.data *= 6  # as sure of some tokens as a trained model is
    _, scores = all_found(model, None, asked_questions, monkeypatch)
    for question, options in zip(asked_questions, scores, strict=True):
        expected = [by_hand(model.model, None, text)[0] for text in question.options]
        assert [value for value, _ in options] == pytest.approx(expected, rel=0, abs=5e-5)


def rigged(monkeypatch, *results: tuple[list[float], list[int]]) -> None:
    """Let scoring find these log-likelihoods and greedy marks."""

    def fill(model, prompt, group, *, scores):
        for place, (values, greedy) in zip(scores, results):
            place.loglikelihood[:], place.greedy[:] = values, greedy

    monkeypatch.setattr(scoring, "_score_group", fill)


def asked_of(*gold: tuple[int, ...], lengths: tuple[int, ...] = (1, 1, 1)) -> list[Question]:
    text = Text(np.array([4, 5], dtype=np.int32), 1)
    return [Question((text,) * len(lengths), lengths, indices) for indices in gold]


def test_scores_by_hand(gpt2, monkeypatch):
    """acc by the sum, acc_norm by the sum over characters, exact match by a right greedy answer."""
    model, lengths = tiny.load(gpt2), (2, 10, 5)
    rigged(
        monkeypatch,
        ([-4, -5, -9], [0, 1, 0]),
        ([-4, -5, -9], [1, 0, 0]),
        ([-8, -30, -6], [0, 0, 0]),
    )
    asked_questions = asked_of((0,), (1,), (0, 2), lengths=lengths)
    result = score(model, None, asked_questions, metric="multiple_choice", batch_tokens=100)
    assert (result.acc, result.acc_norm) == (2 / 3, 2 / 3)  # best: 0, 0, 2; per character: 1, 1, 2
    assert math.isnan(result.exact_match) and result.stderr == pytest.approx(
        np.std([1, 0, 1], ddof=1) / math.sqrt(3)
    )
    result = score(model, None, asked_questions, metric="exact_match", batch_tokens=100)
    assert (
        result.exact_match == 0
        and math.isnan(result.acc)
        and math.isnan(result.acc_norm)
        and result.stderr == 0
    )
    result = score(
        model,
        None,
        asked_of((1, 2), (0,), (1,), lengths=lengths),
        metric="exact_match",
        batch_tokens=100,
    )
    assert result.exact_match == 2 / 3 and result.n == 3 and result.seconds >= 0
    assert math.isnan(
        score(model, None, asked_questions[:1], metric="multiple_choice", batch_tokens=100).stderr
    )


def test_of_equal_options_the_first_is_taken(gpt2, monkeypatch):
    rigged(monkeypatch, ([-4, -4, -9], [0, 0, 0]), ([-4, -4, -9], [0, 0, 0]))
    assert (
        score(
            tiny.load(gpt2), None, asked_of((0,), (1,)), metric="multiple_choice", batch_tokens=100
        ).acc
        == 0.5
    )


# -- texts to tokens -------------------------------------------------------------------------------


def test_an_empty_context_becomes_the_beginning_of_text(gpt2, monkeypatch):
    tokenizer = tiny.tokenizer()
    asked_questions = questions(
        tokenizer, [Example("", " w1", ("w1", "w2 w3"), (0,)), Example("  ", " w1", ("w1",), (0,))]
    )
    texts = [*asked_questions[0].options, *asked_questions[1].options]
    assert [(text.ids.tolist(), text.answer) for text in texts] == [
        ([1, 5], 1),
        ([1, 6, 7], 1),
        ([1, 5], 1),
    ]
    model = tiny.load(gpt2)
    _, scores = all_found(model, None, asked_questions, monkeypatch)
    expected = [
        [by_hand(gpt2, None, text)[0] for text in question.options] for question in asked_questions
    ]
    assert [[v for v, _ in f] for f in scores] == [
        pytest.approx(values, abs=1e-4) for values in expected
    ]


def test_without_a_beginning_of_text_its_end_is_taken():
    tokenizer = tiny.tokenizer()
    tokenizer.bos_token = None
    assert encode_pairs(tokenizer, [("", " w1")])[0].ids.tolist() == [2, 5]


def test_a_beginning_of_text_that_the_tokenizer_adds_itself_comes_once():
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    texts = encode_pairs(tokenizer, [("w0 w1", " w2"), ("", " w2"), ("", "<s> w2")])
    assert [(t.ids.tolist(), t.answer) for t in texts] == [
        ([1, 4, 5, 6], 3),
        ([1, 6], 1),
        ([1, 6], 1),
    ]


def test_a_token_that_reaches_over_the_border(gpt2, monkeypatch):
    """The whole is tokenised at once and cut where the context alone would end, as lm-eval does."""
    tokenizer = merging()
    ids = {
        token: tokenizer.convert_tokens_to_ids(token)
        for token in ("d", "b c", "b", " c", "ab", " ", "e", "de")
    }
    assert tokenizer.tokenize("db c") == ["d", "b c"] and tokenizer.tokenize("db") == ["d", "b"]
    [merged, apart, blank] = encode_pairs(tokenizer, [("db", " ce"), ("ab", " c"), ("b ", "c")])
    assert (merged.ids.tolist(), merged.answer) == ([ids["d"], ids["b c"], ids["e"]], 2)
    assert (apart.ids.tolist(), apart.answer) == ([ids["ab"], ids[" c"]], 1)
    assert (blank.ids.tolist(), blank.answer) == (
        [ids["b"], ids[" c"]],
        1,
    )  # or nothing of the answer would be left
    asked_questions = questions(tokenizer, [Example("db", " ce", ("ce", "de"), (0,))])
    starts = [tuple(text.ids[: text.answer].tolist()) for text in asked_questions[0].options]
    assert starts[0] != starts[1]  # one question, two contexts
    model = tiny.load(gpt2)
    _, [scores] = all_found(model, None, asked_questions, monkeypatch)
    assert [v for v, _ in scores] == pytest.approx(
        [by_hand(gpt2, None, t)[0] for t in asked_questions[0].options], abs=1e-4
    )


def test_questions_keep_lengths_in_characters_and_the_right_answers():
    [question] = questions(tiny.tokenizer(), [Example("w0 ", " w1", ("w1", "w2  w3"), (1,))])
    assert (question.lengths, question.gold) == ((2, 6), (1,))
    assert [(t.ids.tolist(), t.answer) for t in question.options] == [([4, 5], 1), ([4, 6, 7], 1)]


def test_truncation_never_cuts_the_answer_off():
    text = Text(np.arange(10, dtype=np.int32), 7)
    assert truncate(text, 10) is text
    assert [
        (t.ids.tolist(), t.answer)
        for t in (truncate(text, 5), truncate(text, 3), truncate(text, 2))
    ] == [
        ([5, 6, 7, 8, 9], 2),
        ([7, 8, 9], 1),
        ([8, 9], 1),
    ]
    [short] = encode(tiny.tokenizer(), [Example("w0 w1 w2", " w3", ("w3",), (0,))], 3)
    assert (short.ids.tolist(), short.answer) == ([5, 6, 7], 2)
    for most in (2, 1):
        with pytest.raises(
            ValueError,
            match=rf"found an answer of 2 tokens, expected at most {most - 1}, which fit",
        ):
            encode(tiny.tokenizer(), [Example("w0", " w1 w2", ("w1 w2",), (0,))], most)


def test_collated_targets_stand_one_place_before_their_tokens():
    batch = collate(
        [Text(np.array([5, 6, 7, 8], dtype=np.int32), 2), Text(np.array([9, 4], dtype=np.int32), 1)]
    )
    assert batch.input_ids.tolist() == [[5, 6, 7], [9, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.targets.tolist() == [[-100, 7, 8], [4, -100, -100]]
    assert all(tensor.dtype == torch.int64 for tensor in batch[:3])


def test_groups_by_length_hold_every_text_once_and_no_more_than_asked():
    texts = tiny.texts([3, 9, 5, 9, 2, 30, 4])
    groups = list(by_length(texts, 12))
    assert sorted(i for group in groups for i in group) == list(range(7))
    assert all(
        len(group) == 1 or len(group) * max(len(texts[i].ids) for i in group) <= 12
        for group in groups
    )
    assert groups[0] == [5]


@pytest.mark.parametrize("kind", [None, "prefix", "input"])
def test_the_validation_loss_is_the_mean_over_all_answer_tokens(gpt2, kind):
    model, texts = tiny.load(gpt2), tiny.texts([3, 9, 5, 12, 4])
    prompt = prompt_for(model, kind)
    total = -sum(by_hand(gpt2, prompt, text)[0] for text in texts)
    tokens = sum(len(text.ids) - text.answer for text in texts)
    for batch_tokens in (1, 20, 1000):
        assert answer_loss_mean(model, prompt, texts, batch_tokens=batch_tokens) == pytest.approx(
            total / tokens, rel=1e-5
        )


# -- against lm-eval -------------------------------------------------------------------------------


def compare(
    path: str, tokenizer, examples: list[Example], metric: str, lm_eval_output, monkeypatch
) -> None:
    results, samples = lm_eval_output
    asked_questions = questions(tokenizer, examples)
    monkeypatch.undo()
    recorded, judge = [], scoring._is_correct
    monkeypatch.setattr(
        scoring,
        "_is_correct",
        lambda question, scores: (recorded.append(scores), judge(question, scores))[1],
    )
    result = score(tiny.load(path), None, asked_questions, metric=metric, batch_tokens=2048)
    assert len(samples) == result.n == len(examples)
    for options, sample in zip(recorded, samples, strict=True):
        assert options.loglikelihood.tolist() == pytest.approx(
            [value for value, _ in sample], abs=1e-4
        )
        assert options.greedy.tolist() == [greedy for _, greedy in sample]
    names = ("exact_match",) if metric == "exact_match" else ("acc", "acc_norm")
    for name in names:
        assert getattr(result, name) == results[f"{name},none"], name
    assert result.stderr == pytest.approx(results[f"{names[0]}_stderr,none"], rel=1e-9)


def test_tiny_scores_equal_lm_evals(gpt2, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    source = tiny.data_folder(tmp_path / "data", test=30)
    table = datasets.load_dataset("json", data_files={"test": f"{source}/test.jsonl"})
    config = {
        "task": "tiny_choices",
        "dataset_path": "none",
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": metric} for metric in ("acc", "acc_norm")],
    }
    examples = list(loading.load("multiple_choice", source, seed=0).test)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(gpt2), tiny.tokenizer()
    lm_eval_output = lm_eval_results(
        model, tokenizer, "tiny_choices", table, 30, monkeypatch, config
    )
    compare(gpt2, tokenizer, examples, "multiple_choice", lm_eval_output, monkeypatch)


@pytest.mark.parametrize(
    ("name", "other", "metric", "number"),
    [
        pytest.param("arc_easy", "arc_easy", "multiple_choice", 60, marks=pytest.mark.slow),
        ("web_questions", "webqs", "exact_match", 40),
    ],
)
def test_scores_of_a_trained_model_equal_lm_evals(name, other, metric, number, monkeypatch):
    pytest.importorskip("lm_eval")
    path, source = SHARED / "models" / "stories15m", SHARED / "data" / name
    if not path.is_dir() or not source.is_dir():
        pytest.skip(f"no local copy of stories15m and {name} in ../shared")
    examples = list(loading.load(name, str(source), seed=0, limit={"test": number}).test)
    data = datasets.load_dataset(str(source))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    lm_eval_output = lm_eval_results(model, tokenizer, other, data, number, monkeypatch)
    compare(str(path), tokenizer, examples, metric, lm_eval_output, monkeypatch)
