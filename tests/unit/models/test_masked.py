"""Models that fill in a gap, BERT, RoBERTa and T5: texts, logits as transformers and peft have
them, scores, runs.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import peft
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers

from fedsp_mpi import config
from fedsp_mpi.config.parsing import ConfigError
from fedsp_mpi.data import cloze
from fedsp_mpi.data.tasks import Example
from fedsp_mpi.data.tokens import Batches, Text, by_length, collate
from fedsp_mpi.evaluation.scoring import answer_loss_mean, gap_questions, loglikelihoods, score
from fedsp_mpi.models.families import model_class
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.models.prompts import Prompt, PromptBatch, PromptSpec
from fedsp_mpi.run.inputs import ExperimentInputs
from helpers import tiny
from helpers.configs import refused
from helpers.runs import gap_settings, short

GAP = 4  # the id of the token that marks one


def example(context: str, gold: int = 0, after: str = "") -> Example:
    return Example(context, f" w{gold + 1}", ("w1", "w2"), (gold,), after)


EXAMPLES = [
    example("w5 w6 w7 w8 w9 is", 1, " w11"),
    example("w5 is"),
    example("w9 w8 w7 is", 1, " w10 w11 w12"),
]


def texts(family: str, examples: list[Example] | None = None, room: int = 60) -> list[Text]:
    return cloze.encode(tiny.gap_tokenizer(family), examples or EXAMPLES, room)


def prompt_for(model: LanguageModel, num_tokens: int = 5) -> Prompt:
    return Prompt(PromptSpec.of(model.shape, "input", num_tokens)).initialise(1, 0.5)


@pytest.fixture(params=tiny.GAP_FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def model(family, tmp_path) -> LanguageModel:
    return tiny.load(tiny.model_folder(tmp_path / "model", family))


# -- texts -----------------------------------------------------------------------------------------


def test_the_answer_stands_in_the_gap(family):
    [text] = texts(family, [example("w5 w6 is", 1, " w7")])
    middle = [9, 10, 0, 6, 11]  # "is" is unknown
    assert text.ids.tolist() == ([*middle, 2] if family == "t5" else [1, *middle, 2])
    assert (text.ids[text.answer], text.gap, text.num_answers) == (6, GAP, 1)


def test_the_models_name_for_a_gap():
    assert cloze.gap(tiny.gap_tokenizer("bert")) == ("<mask>", GAP)
    assert cloze.gap(tiny.gap_tokenizer("t5")) == ("<extra_id_0>", GAP)
    refused(lambda: cloze.gap(tiny.tokenizer()), "model.tokenizer", "without a mask token")


def test_a_batch_asks_only_at_the_gap():
    batch = collate(texts("bert"))
    assert batch.input_ids.tolist() == [
        [1, 9, 10, 11, 12, 13, 0, GAP, 15, 2],
        [1, 9, 0, GAP, 2, 0, 0, 0, 0, 0],
        [1, 13, 12, 11, 0, GAP, 14, 15, 16, 2],
    ]
    assert batch.attention_mask.tolist() == [[1] * 10, [1] * 5 + [0] * 5, [1] * 10]
    assert [[(i, t) for i, t in enumerate(row) if t != -100] for row in batch.targets.tolist()] == [
        [(7, 6)],
        [(3, 5)],
        [(5, 6)],
    ]
    assert [
        len(part.input_ids)
        for part in Batches(texts("bert"), 3, 2, seed=1, purpose="x", numbers=(0,)).step(0)
    ] == [
        2,
        1,
    ]


def test_a_long_text_loses_its_beginning_but_not_what_every_text_begins_with():
    [text] = texts("bert", [example("w5 w6 w7 w8 is", 0, " w9")], room=6)
    assert text.ids.tolist() == [1, 12, 0, 5, 13, 2] and text.answer == 3
    [text] = texts("t5", [example("w5 w6 w7 w8 is", 0, " w9")], room=5)
    assert text.ids.tolist() == [12, 0, 5, 13, 2] and text.answer == 2
    assert texts("bert", [example("w5 w6", 0, " w9")], room=4)[0].ids.tolist() == [1, 5, 13, 2]
    refused(
        lambda: texts("bert", [example("w5", 0, " w9")], room=3),
        "found 4 tokens from the answer on, expected at most 3",
    )


def test_a_text_that_holds_the_mark_itself_is_asked_where_the_template_says():
    [text] = texts("bert", [example("w5 <mask> w6 is", 1)])
    assert text.ids.tolist() == [1, 9, GAP, 10, 0, 6, 2] and text.answer == 5


@pytest.mark.parametrize("word", ["w1 w2", "nowhere", ""])
def test_words_must_be_one_token(word):
    refused(
        lambda: cloze.answer_token(tiny.gap_tokenizer("bert"), word),
        "data.verbaliser",
        "one token each",
    )


def test_choices_that_are_one_token_are_refused():
    lower = tiny.gap_tokenizer("bert")
    lower.backend_tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    with pytest.raises(
        ConfigError, match=r"data.verbaliser: found 'w1' and 'W1', which are one token"
    ):
        cloze.encode_options(lower, [Example("w3", " w1", ("w1", "W1"), (0,))], 60)


def test_a_head_of_its_own_under_a_configuration_that_ties_it_is_refused(tmp_path):
    """T5 1.1 and Flan-T5: copies would have the head in the place of the embeddings."""
    folder = tiny.model_folder(tmp_path / "t5", "t5")
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder)
    model.lm_head.weight = torch.nn.Parameter(model.shared.weight.detach() + 1)
    state = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if "embed_tokens" not in name
    }
    safetensors.torch.save_file(
        state, Path(folder) / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(ValueError, match=r"model.name: found .* with an output head of its own"):
        tiny.load(folder)


def test_a_real_tokenizers_pieces_are_named():
    """A byte-level tokenizer takes the blank as part of the word, as RoBERTa's does."""
    embedded = transformers.AutoTokenizer.from_pretrained(config.EMBEDDED.parent / "model")
    message = refused(lambda: cloze.answer_token(embedded, "unheard-of-word"), "data.verbaliser")
    assert message.count("', '") >= 1


# -- logits ----------------------------------------------------------------------------------------


def plain_logits(model: LanguageModel, text: Text, prompt: Prompt | None) -> torch.Tensor:
    """What transformers itself says at the gap of one text, without padding, by the model's own
    forward pass.
    """
    ids = torch.tensor(text.ids.astype(np.int64))[None]
    ids[0, text.answer] = text.gap
    soft = model.model.get_input_embeddings()(ids)
    before = 0
    if prompt is not None:
        soft, before = torch.cat([prompt.matrix()[None], soft], dim=1), prompt.spec.num_tokens
    if model.kind == "masked":
        return model.model(inputs_embeds=soft).logits[0, before + text.answer]
    return model.model(inputs_embeds=soft, decoder_input_ids=torch.tensor([[3, GAP]])).logits[0, -1]


@pytest.mark.parametrize("with_prompt", [False, True])
@torch.no_grad()
def test_logits_are_those_of_transformers(model, family, with_prompt):
    prompt = prompt_for(model) if with_prompt else None
    batch_texts = texts(family)
    logits, targets = model.answer_logits(collate(batch_texts), prompt)
    assert logits.shape == (3, tiny.VOCABULARY) and targets.tolist() == [6, 5, 6]
    for row, text in zip(logits, batch_texts):
        assert (row - plain_logits(model, text, prompt)).abs().max() < 1e-5
    model.candidates = torch.tensor([5, 6])
    few, places = model.answer_logits(collate(batch_texts), prompt)
    assert torch.equal(few, logits[:, 5:7]) and places.tolist() == [1, 0, 1]


@torch.no_grad()
def test_texts_of_a_batch_have_prompts_of_their_own(model, family):
    values = torch.stack([prompt_for(model).matrix() * scale for scale in (1, -2)])
    prompts = PromptBatch(prompt_for(model).spec, values, torch.tensor([1, 0, 1]))
    batch_texts = texts(family)
    logits, _ = model.answer_logits(collate(batch_texts), prompts)
    for row, text, owner in zip(logits, batch_texts, prompts.prompt_index):
        alone = prompt_for(model)
        alone.load({"prompt": values[owner]})
        assert (row - plain_logits(model, text, alone)).abs().max() < 1e-5


@torch.no_grad()
def test_it_reads_what_stands_behind_the_gap(model, family):
    ninth, twelfth = texts(family, [example("w5 is", 0, " w9"), example("w5 is", 0, " w12")])
    first, _ = model.answer_logits(collate([ninth]))
    second, _ = model.answer_logits(collate([twelfth]))
    assert (first - second).abs().max() > 1e-3


@torch.no_grad()
def test_the_whole_head_is_used_and_ids_and_embeddings_are_one(model, family):
    """RoBERTa's positions begin behind its padding token; with embeddings given they must be the
    same.
    """
    [text] = texts(family, EXAMPLES[:1])
    ids = collate([text]).input_ids
    more = {"decoder_input_ids": torch.tensor([[3, GAP]])} if family == "t5" else {}
    logits = model.model(input_ids=ids, **more).logits[0, -1 if more else text.answer]
    assert (logits - model.answer_logits(collate([text]))[0][0]).abs().max() < 1e-5


def test_only_the_prompt_gets_a_gradient(model, family):
    prompt = prompt_for(model)
    logits, targets = model.answer_logits(collate(texts(family)), prompt)
    torch.nn.functional.cross_entropy(logits, targets).backward()
    assert prompt.prompt.grad is not None and (prompt.prompt.grad.abs().sum(dim=1) > 0).all()
    assert all(weight.grad is None for weight in model.weights.values())


def test_the_room_of_a_prompt(model, family):
    assert model.shape.num_positions == tiny.POSITIONS and model.shape.hidden_size == tiny.WIDTH
    long = [example(" ".join(["w5"] * 80) + " is")]
    texts_of = texts(family, long, tiny.POSITIONS - 5)
    assert len(texts_of[0].ids) == tiny.POSITIONS - 5
    assert torch.isfinite(model.answer_logits(collate(texts_of), prompt_for(model))[0]).all()


# -- scores ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_scores_are_those_of_a_loop(model, family):
    random = np.random.default_rng(0)
    asked_examples = [
        example(
            " ".join(f"w{i}" for i in random.integers(5, 90, random.integers(1, 9))),
            int(random.integers(2)),
            " w11",
        )
        for _ in range(17)
    ]
    prompt, tokenizer = prompt_for(model), tiny.gap_tokenizer(family)
    questions = gap_questions(tokenizer, asked_examples, 50)
    likelihoods = loglikelihoods(model, prompt, questions, batch_tokens=40)
    right, losses = [], []
    for row, likelihood in zip(asked_examples, likelihoods):
        [text] = cloze.encode(tokenizer, [row], 50)
        logs = plain_logits(model, text, prompt).double().log_softmax(-1)
        assert likelihood.loglikelihood == pytest.approx([logs[5].item(), logs[6].item()], abs=1e-4)
        assert likelihood.greedy.tolist() == [int(logs.argmax()) == 5, int(logs.argmax()) == 6]
        right.append(int(logs[6] > logs[5]) == row.gold[0])
        losses.append(-logs[5 + row.gold[0]].item())
    result = score(model, prompt, questions, metric="multiple_choice", batch_tokens=40)
    assert (
        result.acc == pytest.approx(np.mean(right))
        and result.n == 17
        and math.isnan(result.exact_match)
    )
    every = cloze.encode(tokenizer, asked_examples, 50)
    assert answer_loss_mean(model, prompt, every, batch_tokens=40) == pytest.approx(
        np.mean(losses), rel=1e-5
    )
    assert len(list(by_length(every, 40))) > 2
    assert (
        score(
            model, prompt, questions, metric="multiple_choice", batch_tokens=40, stop=lambda: True
        )
        is None
    )


# -- runs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.GAP_FAMILIES)
def test_a_run_learns_and_peft_answers_with_its_prompt(tmp_path, family):
    overrides = (
        'data.template="{context} w9 {mask} w8"',
        "client.tuning.optimizer.learning_rate=0.3",
        "client.tuning.steps=20",
    )
    run = short(
        tmp_path / "runs",
        *gap_settings(tmp_path, family, *overrides),
        "prompt.init=text",
        "prompt.init_text=w3 w4",
    )
    assert run.status == "complete" and [str(m) for m in run.results["method"]] == [
        "chance",
        "majority",
        "zero-shot",
        "server-only",
        "fedsp",
    ]
    first = run.clients["loss_prompt_first"][:3].mean()
    assert run.clients["loss_prompt_last"][-3:].mean() < first
    assert run.results["loss"][-1] < run.results["loss"][-3]
    best = int(run.results["round"][-1])
    _compare_with_peft(
        run.file.parent / "prompt", tmp_path / "model", family, run.prompts(best)["prompt"]
    )


@torch.no_grad()
def _compare_with_peft(adapter: Path, folder: Path, family: str, matrix: np.ndarray) -> None:
    large = model_class(transformers.AutoConfig.from_pretrained(folder)).from_pretrained(
        folder, dtype=torch.float32
    )
    theirs = peft.PeftModel.from_pretrained(large, adapter).eval()
    ours = tiny.load(str(folder))
    prompt = Prompt(PromptSpec.of(ours.shape, "input", 4))
    prompt.load({"prompt": torch.from_numpy(matrix)})
    [text] = texts(family, EXAMPLES[:1])
    batch = collate([text])
    more = {"decoder_input_ids": torch.tensor([[3, GAP]])} if family == "t5" else {}
    output = theirs(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **more).logits
    logits = output[0, -1 if more else 4 + text.answer]
    assert (logits - ours.answer_logits(batch, prompt)[0][0]).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_fine_tuning(tmp_path, family):
    more = (
        "method=finetune",
        "client.tuning.optimizer.learning_rate=3e-3",
        "federation.rounds=1",
        "client.tuning.steps=6",
    )
    run = short(tmp_path / "runs", *gap_settings(tmp_path, family, *more))
    kind = model_class(transformers.AutoConfig.from_pretrained(tmp_path / "model"))
    tuned = kind.from_pretrained(run.file.parent / "model")
    before = kind.from_pretrained(tmp_path / "model")
    assert any(
        (w - before.get_parameter(name)).abs().max() > 0 for name, w in tuned.named_parameters()
    )
    assert run.clients["loss_model_last"].mean() < run.clients["loss_model_first"].mean()


def test_a_backdoor_in_a_masked_model(tmp_path):
    more = (
        "attack.target=1",
        "attack.clients=[0]",
        "attack.trigger=w20",
        "evaluation.server_only=false",
    )
    run = short(tmp_path / "runs", *gap_settings(tmp_path, "bert", *more, "federation.rounds=1"))
    assert [str(row["split"]) for row in run.results] == [
        *["test labels"] * 2,
        *["test", "test+trigger"] * 2,
    ]
    assert np.isfinite(run.clients["attack_success"]).tolist() == [True, False, False]


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("prompt.kind=prefix",), ("prompt.kind", "found prefix with a bert", "expected input")),
        (
            ("auxiliary.depth=2",),
            ("auxiliary", "a part of the model", "configs/methods/fedprompt.yaml"),
        ),
        (("distillation.stage.steps=3",), ("auxiliary", "steps that align it")),
        (("server.translation.steps=3",), ("auxiliary", "steps that align it")),
        (("data.verbaliser=[w1, nowhere]",), ("data.verbaliser", "'nowhere'", "one token each")),
        (("data.max_length=2",), ("data.max_length", "from the answer on")),
    ],
)
def test_what_such_a_model_cannot_do_is_said_before_weights_are_loaded(tmp_path, more, words):
    overrides = gap_settings(tmp_path, "bert", *more)
    (tmp_path / "model" / "model.safetensors").unlink()
    refused(lambda: ExperimentInputs(config.load(None, overrides)).check(), *words)


def test_free_answers_are_refused(tmp_path):
    overrides = gap_settings(tmp_path, "t5", "data.task=question_answering")
    refused(
        lambda: ExperimentInputs(config.load(None, overrides)).check(),
        "data.task",
        "found question_answering with a t5",
    )


def test_the_default_recipe_says_what_to_do(tmp_path):
    overrides = [
        *gap_settings(tmp_path, "roberta")[:3],
        "recipe=bridged",
        "auxiliary.depth=0.5",
        "auxiliary.first_layers=1",
    ]
    refused(
        lambda: ExperimentInputs(config.load(None, overrides)).check(),
        "with a roberta",
        "configs/methods/fedprompt.yaml",
    )


def test_lm_eval_does_not_ask_it(tmp_path):
    from fedsp_mpi.commands.evaluate import Options, evaluate
    from fedsp_mpi.log import Log

    more = ("federation.rounds=1", "evaluation.server_only=false", "evaluation.zero_shot=false")
    run = short(tmp_path / "runs", *gap_settings(tmp_path, "bert", *more))
    with pytest.raises(ValueError, match="found a run with a bert, expected a causal model"):
        evaluate(run.file.parent, Options(), Log())
    assert (
        json.loads((run.file.parent / "prompt" / "adapter_config.json").read_text())["task_type"]
        == "FEATURE_EXTRACTION"
    )
