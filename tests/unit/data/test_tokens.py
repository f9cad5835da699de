"""Answers and what a tokenizer makes of them: rows that do not fit, choices that are alike, marks
that it adds.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from transformers import PreTrainedTokenizerFast

from fedsp_mpi import config
from fedsp_mpi.comm.messages import TEXT_BYTES
from fedsp_mpi.data import answers, cloze, fit
from fedsp_mpi.data.examples import Example
from fedsp_mpi.data.tasks import Splits
from fedsp_mpi.data.tokens import Batches, collate, encode, encode_pairs, pieces
from fedsp_mpi.evaluation.scoring import questions
from fedsp_mpi.log import Log
from fedsp_mpi.models.losses import answer_loss
from fedsp_mpi.record import read
from fedsp_mpi.run import execute
from fedsp_mpi.run.inputs import ExperimentInputs
from fedsp_mpi.tensors import Batch
from helpers import tiny
from helpers.configs import refused
from helpers.runs import SHORT, short


def write(folder: Path, **splits: list[dict[str, Any]]) -> str:
    """A data folder of these rows."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def of_model(
    folder: Path, tokenizer: PreTrainedTokenizerFast, source: str, *more: str
) -> ExperimentInputs:
    """What a run of a tiny GPT-2 with this tokenizer reads."""
    tiny.model_folder(folder / "model", "gpt2")
    tokenizer.save_pretrained(folder / "model")
    names = (f"model.name={folder / 'model'}", f"data.source={source}", "data.task=multiple_choice")
    return ExperimentInputs(
        config.load(
            None, [*SHORT, *names, "auxiliary.layers_per_cell=1", "prompt.num_tokens=4", *more]
        )
    )


def row(context: str, choices: tuple[str, ...] = ("w1", "w2"), label: int = 0) -> dict[str, Any]:
    return {"context": context, "choices": list(choices), "label": label}


def rows(count: int, ending: str = "", **more: Any) -> list[dict[str, Any]]:
    return [
        row(f"w{9 + place} w{place + 3}{ending}", label=place % 2, **more) for place in range(count)
    ]


def appending(mark: str = "</s>") -> PreTrainedTokenizerFast:
    """The tiny tokenizer, which puts <s> before every text and `mark` behind it."""
    tokenizer = tiny.tokenizer()
    ends = [("<s>", 1), (mark, tokenizer.convert_tokens_to_ids(mark))]
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"<s> $A {mark}", special_tokens=ends
    )
    return tokenizer


def joining() -> PreTrainedTokenizerFast:
    """Characters, and ": p" and "pos" as tokens: the first one reaches over the join of "x:" and "
    pos".
    """
    merges = [(":", " "), (": ", "p"), ("p", "o"), ("po", "s")]
    known = ["<unk>", "<s>", "</s>", "<pad>", *"xyneg:ops ", ": ", ": p", "po", "pos"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {token: place for place, token in enumerate(known)}, merges, unk_token="<unk>"
        )
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


# -- rows that do not fit --------------------------------------------------------------------------

ROOM = fit.AnswerLimit.of(64, 4, False)  # 60 tokens


def long(tokens: int) -> str:
    return " ".join(["w5"] * tokens)


def test_a_row_whose_answer_does_not_fit_is_left_out_and_named():
    examples = [
        Example("w1", f" {long(size)}", ("w1",), (0,), row=f"row {size} of train")
        for size in (2, 61, 60, 80)
    ]
    splits = Splits(tuple(examples), tuple(examples[:2]), tuple(examples), ())
    kept, notes = fit.drop_too_long(splits, ROOM, tiny.tokenizer)
    assert [example.row for example in kept.train] == ["row 2 of train", "row 60 of train"]
    assert [example.row for example in kept.validation] == [
        "row 2 of train"
    ] and kept.test == splits.test
    assert notes[0] == (
        "train: 2 rows left out of 4, whose answer is longer than the 60 tokens that "
        "fit (the model has 64 positions, "
        "the prompt takes 4): row 61 of train (61 tokens), row 80 of train (80 "
        "tokens); shorten them, or take a "
        "shorter prompt or a model with more positions, to keep them"
    )
    assert [len(text.ids) for text in encode(tiny.tokenizer(), kept.train, 61)] == [
        3,
        61,
    ]  # and they do fit
    lower = ROOM.at_most(20)
    assert (lower.tokens, lower.reason, lower.advice) == (
        19,
        "data.max_length=20",
        "raise it to keep them",
    )
    assert ROOM.at_most(1024) is ROOM  # to raise what is no limit would not help
    few = Splits(tuple(examples[1:2]), tuple(examples), tuple(examples), ())
    refused(
        lambda: fit.drop_too_long(few, ROOM, tiny.tokenizer),
        "found no row of train",
        "row 61 of train (61 tokens)",
    )


def test_no_row_is_tokenised_whose_bytes_fit():
    examples = (Example("w1", " w2", ("w2",), (0,)),) * 3
    kept, notes = fit.drop_too_long(
        Splits(examples, examples, examples, ()), ROOM, lambda: pytest.fail("not needed")
    )
    assert (kept.train, notes) == (examples, ())


def test_letters_that_a_tokenizer_takes_apart_are_not_overlooked():
    """One character, three bytes, eighteen letters under NFKC."""
    lower = tiny.tokenizer()
    lower.backend_tokenizer.normalizer = tokenizers.normalizers.NFKC()
    lower.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    examples = (
        Example(
            "w1", " \N{ARABIC LIGATURE SALLALLAHOU ALAYHE WASALLAM}" * 3, ("a",), (0,), row="row 0"
        ),
    )
    whole = Splits((Example("w1", " w2", ("w2",), (0,)), *examples), examples[:0], examples, ())
    with pytest.raises(config.ConfigError, match="found no row of validation"):
        fit.drop_too_long(
            Splits(whole.train, examples, examples, ()),
            fit.AnswerLimit.of(24, 4, False),
            lambda: lower,
        )


def test_a_run_leaves_long_rows_out_and_check_finds_them(tmp_path, capsys):
    """Of the server and a client, of train and validation; a test question keeps its place."""
    from fedsp_mpi import cli

    long_row = row("w4", (long(70), "w2"))
    varied = [row(f"w{place} w4", (f"w{place}", "w2 w3")) for place in range(24)]
    source = write(
        tmp_path / "data",
        train=[*varied[:5], long_row, *varied[5:]],
        validation=[*varied[:3], long_row],
        test=[*varied[:2], long_row, row("w4", ("nowhere", "unknown"))],
    )
    materials = of_model(tmp_path, tiny.tokenizer(), source)
    found = short(
        tmp_path / "runs",
        *(
            f"{name}={value}"
            for name, value in {"model.name": materials.model_name, "data.source": source}.items()
        ),
        *("data.task=multiple_choice", "auxiliary.layers_per_cell=1", "prompt.num_tokens=4"),
    )
    notes = found.sections["data"]["notes"]
    assert [note.split(" (")[0] for note in notes] == [
        "train: 1 row left out of 25, whose answer is longer than the 60 tokens that fit",
        "validation: 1 row left out of 4, whose answer is longer than the 60 tokens that fit",
        "test: 1 of 4 texts is longer than the 61 tokens that fit",
        "test: 1 question with an option that is longer than the 60 tokens that fit",
        "test: 1 question with options that are the same tokens to this tokenizer, of "
        "which the first counts: row 3 of "
        "test",
    ]
    assert all(
        f"row {number} of {split} (70 tokens)" in note
        for number, split, note in zip(
            (5, 3, 2), ("train", "validation", "test"), [*notes[:2], notes[3]]
        )
    )
    assert found.sections["data"]["train"] == 24 and not found.rounds["num_failed"].any()
    assert sorted(np.concatenate(materials.shards).tolist()) == list(range(24))
    capsys.readouterr()
    settings = [
        item
        for text in (*SHORT, f"model.name={materials.model_name}", f"data.source={source}")
        for item in ("--set", text)
    ]
    settings += [
        "--set",
        "data.task=multiple_choice",
        "--set",
        "auxiliary.layers_per_cell=1",
        "--set",
        "prompt.num_tokens=4",
    ]
    assert cli.main(["check", *settings, "--set", f"run.folder={tmp_path / 'runs'}"]) in (0, None)
    warned = [
        line
        for line in capsys.readouterr().out.splitlines()
        if line.split()[:2] == ["warn", "rows"]
    ]
    assert [line.split(maxsplit=2)[2] for line in warned] == list(notes)


def test_what_must_fit_of_a_text_with_a_gap_is_all_from_the_gap_on():
    tokenizer = tiny.gap_tokenizer("bert")
    examples = [
        Example(long(9), " w1", ("w1", "w2"), (0,), f" {long(size)}", row=f"row {size} of test")
        for size in (2, 8, 7)
    ]
    room = fit.AnswerLimit.of(14, 4, True)  # <s>, the gap, seven words and </s>
    kept, notes = fit.drop_too_long(
        Splits(tuple(examples), tuple(examples), (), ()), room, lambda: tokenizer
    )
    assert kept.train == kept.validation == (examples[0], examples[2])
    assert (
        "train: 1 row left out of 3, whose text from the answer on is longer than the 10 tokens"
        in notes[0]
    )
    assert "row 8 of test (11 tokens)" in notes[0]
    assert [len(text.ids) for text in cloze.encode(tokenizer, kept.train, 10)] == [10, 10]
    refused(
        lambda: cloze.encode_options(tokenizer, examples, 10),
        "row 8 of test: found 11 tokens from the answer on",
    )


def test_a_client_that_is_lost_in_every_round_is_named_at_the_end_with_its_whole_reason(tmp_path):
    """Its one row has an answer that this tokenizer makes nothing of, which only the client itself
    finds out.
    """
    gone = tiny.tokenizer()
    gone.backend_tokenizer.normalizer = tokenizers.normalizers.Replace("w95", "")
    data = [row(f"w{place} w4", (f"w{place}", "w2 w3")) for place in range(24)]
    source = write(tmp_path / "data", train=data, validation=data[:4], test=data[:4])
    materials = of_model(tmp_path, gone, source)
    place = int(materials.shards[2][0])
    data[place]["choices"] = ["w95", "w1"]
    write(tmp_path / "data", train=data)
    names = (
        f"model.name={materials.model_name}",
        f"data.source={source}",
        "data.task=multiple_choice",
    )
    lines: list[str] = []
    settings = [
        *SHORT,
        *names,
        "auxiliary.layers_per_cell=1",
        "prompt.num_tokens=4",
        f"run.folder={tmp_path / 'runs'}",
    ]
    folder = execute.execute(config.load(None, settings), "lost", Log(lines.append))
    assert folder is not None
    found = read(folder)
    reason = (
        f"local training: its text cannot be used: row {place} of train: found an "
        "answer without a token, expected at "
        "least one; correct the row, or name the tokenizer that belongs to the model "
        "in model.tokenizer"
    )
    failed = found.clients[found.clients["status"] == "failed"]
    assert set(failed["client"].tolist()) == {1} and set(failed["reason"].tolist()) == {reason}
    assert len(failed) == len(found.rounds) and found.status == "complete"
    assert lines[-2].startswith("of 3 clients, 1 took part in vain: in no round was their update")
    assert lines[-1] == f"  client 1: {reason}"
    [entry] = [row for row in found.wire if row["name"] in (b"(reason)", "(reason)")]
    assert entry["bytes"] == entry["count"] * (len(reason) - 1 - TEXT_BYTES) and entry[
        "count"
    ] == len(failed)


# -- choices that are alike ------------------------------------------------------------------------


def test_choices_in_a_gap_are_told_apart_by_the_same_check():
    tokenizer = tiny.gap_tokenizer("bert")
    answers.require_distinct_choices(
        tokenizer, ("w1", "w2"), answers.tokens(tokenizer, [], ("w1", "w2"))
    )
    same = answers.tokens(tokenizer, [], ("w1", "w2", "w1"))
    refused(
        lambda: answers.require_distinct_choices(tokenizer, ("w1", "w2", "w1"), same),
        "'w1' and 'w1'",
        "(w1)",
    )


@pytest.mark.parametrize("over", ["auto", "vocabulary"])
def test_choices_that_are_the_same_tokens_are_refused_before_weights_are_read(tmp_path, over):
    for choices, names in ((("nowhere", "unknown"), "<unk>"), (("w1", "w1"), "w1")):
        data = [row(f"w{place} w4", choices, place % 2) for place in range(24)]
        source = write(tmp_path / "data", train=data, validation=data[:4], test=data[:4])
        materials = of_model(tmp_path, tiny.tokenizer(), source, f"data.loss_over={over}")
        (tmp_path / "model" / "model.safetensors").unlink()
        words = (
            "data.verbaliser",
            f"{choices[0]!r} and {choices[1]!r}",
            f"the same to this tokenizer ({names})",
        )
        refused(materials.check, *words)


# -- candidates ------------------------------------------------------------------------------------


def lines() -> PreTrainedTokenizerFast:
    """Words with the blank before them, and the line's end, as tokens."""
    known = {
        token: place
        for place, token in enumerate(
            ["<unk>", "<s>", "</s>", "w4", "w9", "\n", " w1", " w2", "w1", "w2", " "]
        )
    }
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="<unk>"))
    split = tokenizers.Regex(r"\n| ?w\d+| ")
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(split, "removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def test_candidates_are_those_of_every_way_in_which_contexts_end(tmp_path):
    """The first context ends in a word; the last row alone in a line's end, and its answers begin
    with that.
    """
    data = [*rows(23), row("w4\n", label=1)]
    source = write(
        tmp_path / "data", train=data, validation=rows(4, "\n"), test=[row(""), row("w9 ", label=1)]
    )
    materials = of_model(tmp_path, lines(), source, "data.loss_over=auto")
    names = materials.tokenizer.convert_ids_to_tokens(materials.candidates.tolist())
    assert names == ["\n", " w1", " w2", " "]
    for texts in (materials.shard(0), materials.shard(1), materials.validation):
        targets = collate(texts).targets
        targets = targets[targets != -100]
        assert torch.equal(
            materials.candidates[torch.searchsorted(materials.candidates, targets)], targets
        )
    materials.check()
    texts = encode_pairs(materials.tokenizer, [("w4", " w4")])
    refused(
        lambda: answers.require_candidates(
            texts, [Example("", "", (), (), row="row 7 of train")], np.array([5, 6])
        ),
        "row 7 of train",
        "data.loss_over=vocabulary",
    )


def test_a_context_stands_for_all_that_end_like_it():
    contexts = ["a b:", "c b:", "c b: ", "b:", "c d:", "", " ", "x"]
    assert answers.distinct_endings(contexts) == ["a b:", "c b: ", "c d:", "", " ", "x"]


# -- tokens that a tokenizer adds ------------------------------------------------------------------


def test_an_ending_that_the_tokenizer_appends_is_neither_taught_nor_scored(tmp_path):
    plain, marking = tiny.tokenizer(), appending()
    plain.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    example = Example("w0 w1", " w2", ("w2", "w3 w4"), (0,))
    pairs = [("w0 w1", " w2"), ("", " w2"), ("w0", " w1 w2")]
    for one, other in (
        (encode_pairs(plain, pairs), encode_pairs(marking, pairs)),
        (encode(plain, [example], 60), encode(marking, [example], 60)),
        (questions(plain, [example])[0].options, questions(marking, [example])[0].options),
        (pieces(plain, ["w0 w1", "w2 w3"], 3), pieces(marking, ["w0 w1", "w2 w3"], 3)),
    ):
        assert [text.ids.tolist() for text in one] == [text.ids.tolist() for text in other]
    model = tiny.load(tiny.model_folder(tmp_path / "model", "gpt2"))
    losses = [
        answer_loss(*model.answer_logits(collate(encode(t, [example], 60)))).item()
        for t in (plain, marking)
    ]
    assert losses[0] == losses[1] > 0.1
    source = write(tmp_path / "data", train=rows(24), validation=rows(4), test=rows(4))
    init = ("prompt.init=text", "prompt.init_text=w1 w2")
    first = [
        of_model(tmp_path, t, source, *init).first_prompt(model).matrix() for t in (plain, marking)
    ]
    assert torch.equal(*first)


def test_lm_eval_is_asked_without_an_appended_ending(tmp_path):
    lm_eval = pytest.importorskip("fedsp_mpi.evaluation.harness")
    instance = pytest.importorskip("lm_eval.api.instance")
    model = tiny.load(tiny.model_folder(tmp_path, "gpt2"))

    def asked(tokenizer: PreTrainedTokenizerFast) -> list[Any]:
        library = lm_eval.PromptedLM(
            model, None, tokenizer, batch_tokens=200, label="test", log=Log()
        )

        def request(*arguments: Any) -> list[Any]:
            return [
                instance.Instance(
                    request_type="x", doc={}, arguments=arguments, idx=0, metadata=("t", 0, 1)
                )
            ]

        settings = {"max_gen_toks": 3, "until": []}
        return [
            library.loglikelihood_rolling(request("w1 w2")),
            library.generate_until(request("w1 w2", settings)),
        ]

    plain = tiny.tokenizer()
    marking = tiny.tokenizer()
    marking.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    assert asked(plain) == asked(marking)


# -- tokens over the join --------------------------------------------------------------------------


def test_an_answer_within_the_contexts_last_token_is_tokenised_by_itself(tmp_path):
    tokenizer = joining()
    assert tokenizer.tokenize("x: p") == ["x", ": p"] and tokenizer.tokenize("x:") == ["x", ":"]
    texts = encode_pairs(tokenizer, [("x:", " p"), ("x:", " n"), ("x", " p")])
    shown = [tokenizer.convert_ids_to_tokens(text.ids.tolist()) for text in texts]
    assert shown == [["x", ":", " ", "p"], ["x", ": ", "n"], ["x", " ", "p"]]
    assert [text.answer for text in texts] == [
        2,
        2,
        1,
    ]  # the second as lm-eval has it: a token of its own is left
    [question] = questions(tokenizer, [Example("x:", " p", ("p", "pos"), (0,))])
    assert all(option.num_answers >= 1 for option in question.options)


def test_an_option_without_a_token_is_refused_by_its_row():
    silent = tiny.tokenizer()
    example = Example("w0", " w1", ("w1", " "), (0,), row="row 3 of test")
    refused(lambda: questions(silent, [example]), "row 3 of test", "an answer without a token")


# -- a tokenizer without a beginning and an end ----------------------------------------------------


def test_an_empty_context_without_a_token_in_its_place_is_refused(tmp_path):
    bare = tiny.tokenizer()
    bare.bos_token = bare.eos_token = None
    data = rows(24)
    source = write(
        tmp_path / "data", train=data, validation=data[:4], test=[*data[:3], row(" \n", label=1)]
    )
    materials = of_model(tmp_path, bare, source)
    (tmp_path / "model" / "model.safetensors").unlink()
    refused(
        materials.check,
        "model.tokenizer",
        "neither a beginning-of-text nor an end-of-text token",
        "row 3 of test",
    )
    write(tmp_path / "data", test=data[:4])
    of_model(tmp_path, bare, source).check()


# --- batches that are cut by length ---


@pytest.mark.parametrize("max_padding", [0.0, 0.15, 0.5])
@pytest.mark.parametrize("micro_batch", [None, 5])
def test_a_limit_of_padding_is_kept_with_the_fewest_passes(max_padding, micro_batch):
    lengths = np.random.default_rng(3).integers(4, 60, 80)
    texts = tiny.texts(lengths.tolist())
    batches = Batches(
        texts,
        16,
        micro_batch,
        seed=1,
        purpose="client prompt",
        numbers=(0,),
        max_padding=max_padding,
    )
    whole = Batches(texts, 16, None, seed=1, purpose="client prompt", numbers=(0,))
    for index in range(10):
        cut = batches.step(index)
        rows = [row for batch in cut for row in _texts_of(batch)]
        assert sorted(rows) == sorted(_texts_of(whole.step(index)[0]))
        sizes = [len(batch.input_ids) for batch in cut]
        assert max(sizes) <= (micro_batch or 16)
        num_tokens = sum(batch.attention_mask.numel() for batch in cut)
        num_texts = sum(int(batch.attention_mask.sum()) for batch in cut)
        assert num_tokens - num_texts <= max_padding * num_tokens + 1e-6
        ends = sorted((len(row[0]) for row in rows), reverse=True)
        fewest = _fewest_groups(ends, micro_batch or 16, max_padding)
        assert len(cut) == fewest


def _texts_of(batch: Batch) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return each row's tokens and targets without padding."""
    lengths = batch.attention_mask.sum(dim=1).tolist()
    return [
        (tuple(ids[:length].tolist()), tuple(targets[:length].tolist()))
        for ids, targets, length in zip(batch.input_ids, batch.targets, lengths)
    ]


def _fewest_groups(lengths: list[int], most: int, max_padding: float) -> int:
    """Try all numbers of groups, by a recursion over the last one."""

    @cache
    def tokens(end: int, groups: int) -> float:
        if groups == 0:
            return 0 if end == 0 else math.inf
        begins = range(max(0, end - most), end)
        options = [tokens(b, groups - 1) + lengths[b] * (end - b) for b in begins]
        return min(options, default=math.inf)

    limit = sum(lengths) / (1 - max_padding) + 1e-6
    return next(n for n in range(1, len(lengths) + 1) if tokens(len(lengths), n) <= limit)


def test_parts_of_a_batch_are_cut_each_by_itself():
    texts = tiny.texts(list(range(4, 36)))
    parts = [
        Batches(
            texts, 32, None, seed=1, purpose="server", numbers=(0,), part=(rank, 2), max_padding=0.1
        ).step(0)
        for rank in range(2)
    ]
    rows = [row for part in parts for batch in part for row in _texts_of(batch)]
    assert sorted(rows) == sorted(
        _texts_of(Batches(texts, 32, None, seed=1, purpose="server", numbers=(0,)).step(0)[0])
    )
