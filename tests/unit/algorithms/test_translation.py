"""What the messengers mean, told to the global model: questions about plain text, answered by the
auxiliary model.
"""

from __future__ import annotations

import gzip
import itertools

import numpy as np
import pytest
import torch

from fedsp_mpi import config
from fedsp_mpi.algorithms.prompt_distillation import PromptDistiller
from fedsp_mpi.algorithms.prompt_server import PromptServer
from fedsp_mpi.config import StageConfig
from fedsp_mpi.config.training import OptimizerConfig
from fedsp_mpi.data import pseudo_questions
from fedsp_mpi.data.tasks import Example
from fedsp_mpi.data.tokens import Batches
from fedsp_mpi.models import auxiliary
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.models.losses import logits_loss
from fedsp_mpi.models.prompts import DepthMap, Prompt, PromptSpec
from fedsp_mpi.report import difference
from fedsp_mpi.run.inputs import ExperimentInputs
from fedsp_mpi.tensors import NamedTensors, seal
from helpers import tiny
from helpers.runs import short

STAGE = StageConfig(steps=40, batch_size=8, optimizer=OptimizerConfig(learning_rate=0.05))
ENDS = (
    "auxiliary.layers_per_cell=null",
    "auxiliary.depth=2",
    "auxiliary.first_layers=1",
    "prompt.mapping=same_layers",
)
TRANSLATED = (*ENDS, "server.translation.steps=3")


@pytest.fixture(autouse=True)
def unsealed():
    yield
    seal.clear()


# -- questions about plain text --------------------------------------------------------------------


def example(context: str, target: str = " yes") -> Example:
    return Example(context, target, ("yes", "no"), (0,))


def test_the_words_of_a_task_go_around_plain_text():
    examples = [
        example(f"Text: {text}\nGood or bad?\nAnswer:", f" {n}")
        for n, text in enumerate(("I see.", "You eat."))
    ]
    assert pseudo_questions.common_affixes([one.context for one in examples]) == (
        "Text: ",
        ".\nGood or bad?\nAnswer:",
    )
    asked = list(pseudo_questions.questions(["a b", "c", "e f g"], examples))
    assert asked == [
        (f"Text: {text}.\nGood or bad?\nAnswer:", f" {n}")
        for text, n in (("a b", 0), ("c", 1), ("e f", 0))
    ]


def test_plain_text_is_as_long_as_that_of_the_task():
    examples = [example(f"{text}\nAnswer:") for text in ("one", "one two three", "")]
    asked = [context for context, _ in pseudo_questions.questions(["a  b c d"] * 3, examples)]
    assert asked == ["a\nAnswer:", "a b c\nAnswer:", "a\nAnswer:"]


@pytest.mark.parametrize(
    ("contexts", "wanted"),
    [
        (["ab", "abab"], ("ab", "")),
        (["x", "y"], ("", "")),
        (["aXb", "aYb", "ab"], ("a", "b")),
        (["b ?", " ?"], ("", " ?")),
    ],
)
def test_a_frame_never_takes_a_character_twice(contexts, wanted):
    assert pseudo_questions.common_affixes(contexts) == wanted


def test_one_text_does_not_tell_its_frame():
    with pytest.raises(
        ValueError, match=r"distillation.text: found 1 different texts .* expected two at least"
    ):
        pseudo_questions.common_affixes(["a", "a"])


def test_headings_are_no_paragraphs():
    lines = [
        "A heading\n",
        "One two three four five. Six.\n",
        "  \n",
        " six seven eight nine ten\n",
    ]
    assert pseudo_questions.paragraphs(lines) == [
        "One two three four five. Six.",
        "six seven eight nine ten",
    ]


# -- the translator --------------------------------------------------------------------------------


@pytest.fixture(params=tiny.FAMILIES)
def pair(request, tmp_path) -> tuple[LanguageModel, LanguageModel, DepthMap]:
    """A global model, its first layers, and how prompts go between them."""
    whole = tiny.load(tiny.model_folder(tmp_path / request.param, request.param))
    small = LanguageModel(auxiliary.unroll(auxiliary.cut(whole, tiny.cell(2)), 2))
    return whole, small, DepthMap(PromptSpec.of(whole.shape, "prefix", 3), 2, (0, 1))


def server_of(
    pair, stage: StageConfig = STAGE, rounds: int = 1
) -> tuple[PromptServer, PromptDistiller]:
    whole, small, depths = pair
    prompt = Prompt(depths.spec).initialise(1, 0.5)
    messengers = Prompt(depths.small)
    messengers.load(depths.down(prompt.tensors()))
    batches = Batches(
        tiny.texts([5, 6, 7, 8] * 4), stage.batch_size, None, seed=1, purpose="translation"
    )
    translator = PromptDistiller(small, messengers, batches, stage=stage)
    none = StageConfig(steps=0)
    server = PromptServer(
        whole,
        prompt,
        depths,
        batches=None,
        stage=none,
        total_rounds=rounds,
        rule=lambda updates: updates,
        distiller=translator,
    )
    return server, translator


def apart(pair, server: PromptServer, messengers: Prompt) -> float:
    """KL divergence of the global model's answers from the auxiliary one's, a token."""
    whole, small, _ = pair
    batch = tiny.batch()
    with torch.no_grad():
        (answered, _), (taught, _) = (
            whole.answer_logits(batch, server.prompt),
            small.answer_logits(batch, messengers),
        )
    return float(logits_loss(answered, taught, 1.0)) / len(taught)


def test_the_global_model_comes_to_answer_like_the_auxiliary_one(pair):
    server, translator = server_of(pair)
    _, small, depths = pair
    learned = NamedTensors.pack(Prompt(depths.small).initialise(5, 0.5).tensors())
    server.load_aggregate(learned)
    before = {name: weight.clone() for name, weight in small.weights.items()}
    start = apart(pair, server, translator.client_prompt)
    server.server_update(1)
    assert apart(pair, server, translator.client_prompt) < 0.7 * start
    assert all(torch.equal(weight, before[name]) for name, weight in small.weights.items())


def test_what_goes_down_is_what_was_merged(pair):
    server, _ = server_of(pair)
    _, _, depths = pair
    first = server.broadcast()
    assert np.array_equal(first["prompt"], depths.down(server.prompt.tensors())["prompt"])
    learned = NamedTensors.pack(Prompt(depths.small).initialise(5, 0.5).tensors())
    server.load_aggregate(learned)
    server.server_update(1)
    assert np.array_equal(server.broadcast()["prompt"], learned["prompt"])


def test_a_server_goes_on_with_its_translator(pair):
    """After a round, a fresh server with its state makes the same of the next."""
    stage = StageConfig(steps=3, batch_size=8, optimizer=STAGE.optimizer)
    _, _, depths = pair
    learned = [
        NamedTensors.pack(Prompt(depths.small).initialise(seed, 0.5).tensors()) for seed in (5, 6)
    ]
    whole, _ = server_of(pair, stage, 2)
    for round, merged in enumerate(learned, 1):
        whole.load_aggregate(merged)
        whole.server_update(round)
    begun, _ = server_of(pair, stage, 2)
    begun.load_aggregate(learned[0])
    begun.server_update(1)
    state = {name: value.copy() for name, value in begun.state().items()}
    again, _ = server_of(pair, stage, 2)
    again.load_state(state)
    assert np.array_equal(again.broadcast()["prompt"], learned[0]["prompt"])
    again.load_aggregate(learned[1])
    again.server_update(2)
    assert np.array_equal(again.export()["prompt"], whole.export()["prompt"])


# -- in a run --------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path) -> str:
    path = tmp_path / "text.txt.gz"
    path.write_bytes(gzip.compress(b"the cat sat on the mat. the dog sat on the big cat.\n" * 200))
    return str(path)


def test_a_server_without_text_of_its_own_learns_from_its_clients(tmp_path, text):
    alone = ("data.server_share=0", "server.tuning.steps=0", f"distillation.text={text}")
    translated = short(tmp_path / "translated", *TRANSLATED, *alone)
    averaged = short(tmp_path / "averaged", *ENDS, *alone)
    assert difference(translated, averaged) != []
    assert (translated.rounds["validation_loss"] != translated.rounds["validation_merged"]).all()
    assert (averaged.rounds["validation_loss"] == averaged.rounds["validation_merged"]).all()


def test_the_server_asks_about_plain_text_from_all_over(tmp_path):
    """As many questions as are needed, in an order that follows from the seed; clients are asked
    nothing.
    """
    path = tmp_path / "text.txt"
    orders = itertools.permutations(["the", "cat", "sat", "on", "big", "dog"])
    path.write_text(
        "".join(" ".join(words) + "\n" for words in itertools.islice(orders, 0, None, 30))
    )
    settings = [f"distillation.text={path}", "distillation.bridge_texts=8", *ENDS]
    settings.append("distillation.stage.steps=0")

    def asked(seed: int, *more: str) -> list[str]:
        materials = ExperimentInputs(config.load(None, [*settings, f"run.seed={seed}", *more]))
        assert materials.alignment_texts == materials.server_questions
        return [materials.tokenizer.decode(text.ids) for text in materials.server_questions]

    first = asked(1)
    assert len(first) == 8 and first == asked(1) != asked(2) and len(set(first)) == 8
    assert len(asked(1, "server.translation.steps=10", "server.translation.batch_size=5")) == 24


def test_rounding_stays_where_nobody_trains(tmp_path, text):
    """Both sides compute in bf16; what is handed out, and lies beside the run, are the global
    model's own weights.
    """
    half = (
        "server.compute.dtype=bfloat16",
        "client.compute.dtype=bfloat16",
        f"distillation.text={text}",
    )
    found = short(
        tmp_path, *TRANSLATED, *half, "client.alignment.steps=0", "distillation.stage.steps=0"
    )
    kept = auxiliary.load(found.file.parent / "auxiliary")
    whole = tiny.load(ExperimentInputs(config.load(None, [])).model_name, dtype=torch.bfloat16)
    for name, weight in auxiliary.cut(
        whole, tiny.cell(2, depth=2, first_layers=1)
    ).named_parameters():
        assert ".bridge." in name or torch.equal(weight, kept.weights[name])
    assert {row["dtype"] for row in found.wire} == {"float32", "uint8"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["topology.server_ranks=2", "server.tuning.batch_size=4"],
            "server.translation.steps: found 3 with topology.server_ranks=2",
        ),
        (
            [
                "data.server_share=0",
                "server.tuning.steps=0",
                "distillation.stage.steps=0",
                "auxiliary.first_layers=null",
            ],
            (
                "distillation.text: found none with data.server_share=0, expected a file of "
                "plain text to ask about"
            ),
        ),
    ],
)
def test_mistakes(settings, message):
    with pytest.raises(config.ConfigError) as caught:
        config.load(None, ["server.translation.steps=3", *settings])
    assert message in str(caught.value)
