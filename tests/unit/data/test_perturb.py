"""Copies of a text with a share of its own words replaced, as the ratios of FedBPT want them."""

from __future__ import annotations

import numpy as np
import pytest

from fedsp_mpi import rng
from fedsp_mpi.data.perturb import perturbed
from fedsp_mpi.data.tokens import Text


def framed(lengths: list[int]) -> list[Text]:
    """Texts that begin with 1 50, end their contexts with 60 61, and have answers of two tokens."""
    random = np.random.default_rng(0)
    own = [random.integers(10, 40, length) for length in lengths]
    return [
        Text(np.array([1, 50, *ids, 60, 61, 5, 6], dtype=np.int32), len(ids) + 4) for ids in own
    ]


def test_a_share_of_a_text_s_own_words_is_replaced():
    texts, words = framed([200, 300, 250]), np.arange(4, 100)
    texts[0].ids[7] = 2  # a special token
    copies = perturbed(texts, 0.4, words, random=rng.generator(1, "perturbation", 2, 3))
    again = perturbed(texts, 0.4, words, random=rng.generator(1, "perturbation", 2, 3))
    other = perturbed(texts, 0.4, words, random=rng.generator(1, "perturbation", 3, 3))
    changed = []
    for text, copy, same, late in zip(texts, copies, again, other):
        assert (
            copy.answer == text.answer
            and copy.ids.dtype == text.ids.dtype
            and len(copy.ids) == len(text.ids)
        )
        assert np.array_equal(copy.ids[:2], text.ids[:2]) and np.array_equal(
            copy.ids[-4:], text.ids[-4:]
        )
        assert np.array_equal(copy.ids, same.ids) and not np.array_equal(copy.ids, late.ids)
        assert np.isin(copy.ids[2:-4], [2, *words]).all()
        changed.append((copy.ids != text.ids)[2:-4].mean())
    assert copies[0].ids[7] == 2 and np.mean(changed) == pytest.approx(0.4, abs=0.06)
    everything = perturbed(
        texts, 1.0, np.array([77]), random=rng.generator(1, "perturbation", 1, 1)
    )
    assert (everything[1].ids[2:-4] == texts[1].ids[2:-4]).all(), (
        "only words are replaced, and 77 is the only one"
    )


def test_around_a_gap_both_sides_are_a_text_s_own():
    texts = [
        Text(np.append(text.ids, [7, *text.ids[2:-4], 8]), len(text.ids) - 2, gap=3)
        for text in framed([90, 80])
    ]
    copies = perturbed(texts, 1.0, np.arange(10, 50), random=rng.generator(1, "perturbation", 1, 0))
    for text, copy in zip(texts, copies):
        assert (
            copy.gap == 3
            and copy.answer == text.answer
            and copy.ids[copy.answer] == text.ids[text.answer]
        )
        own = (text.ids >= 10) & (text.ids < 50)
        assert (copy.ids != text.ids)[own].mean() > 0.9 and (copy.ids == text.ids)[~own].all()


def test_of_one_text_all_of_the_context_may_be_replaced():
    [text] = framed([500])
    [copy] = perturbed(
        [text], 1.0, np.arange(4, 100), random=rng.generator(1, "perturbation", 1, 0)
    )
    assert (copy.ids != text.ids)[2:-2].mean() > 0.9 and np.array_equal(
        copy.ids[-2:], text.ids[-2:]
    )
    assert copy.ids[0] == 1, "which is no word"
