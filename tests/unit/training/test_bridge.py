"""The default recipe: both ends of the model with a bridge, prompts that begin as words, losses
over choices.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from fedsp_mpi import config
from fedsp_mpi.config import ConfigError, DistillationConfig
from fedsp_mpi.data.tokens import Text
from fedsp_mpi.models import auxiliary
from fedsp_mpi.models.families import layers_of, set_layers, with_layers
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.models.prompts import DepthMap, Prompt, PromptSpec, key_values
from fedsp_mpi.run.inputs import ExperimentInputs
from fedsp_mpi.tensors import Batch, seal
from fedsp_mpi.training.bridge import BridgeEnd, BridgeFit, fit_bridge
from fedsp_mpi.training.distill import StoppedError
from fedsp_mpi.training.process_group import SINGLE_RANK
from helpers import tiny

pytestmark = pytest.mark.usefixtures("unsealed")


@pytest.fixture
def unsealed():
    yield
    seal.clear()


@pytest.fixture(params=tiny.CAUSAL_FAMILIES)
def folder(request, tmp_path) -> str:
    return tiny.model_folder(tmp_path / request.param, request.param)


def texts(count: int) -> list[Text]:
    """Random texts of 5 to 12 tokens, of which the last two are the answer."""
    random = np.random.default_rng(3)
    lengths = random.integers(5, 13, size=count)
    return [
        Text(random.integers(4, tiny.VOCABULARY, size=n).astype(np.int32), int(n) - 2)
        for n in lengths
    ]


def sides(folder: str, layers: int, last: int = 1) -> tuple[BridgeEnd, BridgeEnd]:
    """Return an auxiliary model of both ends and its global model, under the same prompts."""
    large = tiny.load(folder)
    settings = tiny.cell(layers, first_layers=layers - last)
    small = LanguageModel(auxiliary.unroll(auxiliary.cut(large, settings), layers))
    layers_kept = auxiliary.layers(settings, tiny.LAYERS)
    depths = DepthMap(PromptSpec.of(large.shape, "prefix", 3), layers, layers_kept)
    first = Prompt(depths.spec).initialise(1, 0.5)
    below = Prompt(depths.small)
    below.load(depths.down(first.tensors()))
    goal = layers_of(large.model)[tiny.LAYERS - last]
    return BridgeEnd(small, below, auxiliary.bridge_of(small)), BridgeEnd(large, first, goal)


# -- the bridge ------------------------------------------------------------------------------------


@pytest.mark.each_once
@pytest.mark.parametrize(("layers", "last"), [(2, 1), (3, 2)])
def test_a_bridge_that_is_not_fitted_changes_nothing(folder, layers, last):
    """The model is then the global one without the layers between."""
    small, large = sides(folder, layers, last)
    bare = copy.deepcopy(large.model.model)
    places = [i for i in range(tiny.LAYERS) if i < layers - last or i >= tiny.LAYERS - last]
    set_layers(bare, [layers_of(bare)[place] for place in places])
    with_layers(bare.config, places)
    expected = LanguageModel(auxiliary.unroll(bare, layers))
    batch = tiny.batch()
    assert torch.equal(
        small.model.hidden(batch, small.prompt), expected.hidden(batch, small.prompt)
    )
    assert small.model.num_parameters() == expected.num_parameters() + tiny.WIDTH * (tiny.WIDTH + 1)


def test_what_enters_a_layer(folder):
    """Under a prompt, and at the text's positions alone; no text runs through the layers behind."""
    model, batch = (
        tiny.load(folder),
        tiny.batch(),
    )  # several texts; an input prompt is read before them, as one row
    first, *_, last = layers_of(model.model)
    seen: list[torch.Tensor] = []
    last.register_forward_hook(
        lambda _, inputs, __: seen.append(inputs[0]) if inputs[0].shape[0] > 1 else None
    )
    for kind in ("prefix", "input"):
        prompt = Prompt(PromptSpec.of(model.shape, kind, 3)).initialise(1, 0.5)
        states = model.input_states_of(last, batch, prompt)
        assert not seen and states.shape == (*batch.input_ids.shape, tiny.WIDTH)
        model.hidden(batch, prompt)
        assert torch.equal(states, seen.pop()[:, -batch.input_ids.shape[1] :])
    assert not torch.equal(model.input_states_of(first, batch), model.input_states_of(last, batch))


def fitted(
    student: BridgeEnd, teacher: BridgeEnd, texts: Sequence[Text], stop: bool = False, **changes
) -> BridgeFit:
    """Fit the student's bridge on one rank."""
    return fit_bridge(
        student,
        teacher,
        texts,
        settings=DistillationConfig(**changes),
        seed=1,
        group=SINGLE_RANK,
        stop=lambda: stop,
    )


def test_a_bridge_over_nothing_is_the_identity(folder):
    """The states are equal already, so all of their variance is explained."""
    small, large = sides(folder, tiny.LAYERS)
    fit = fitted(small, large, texts(40))
    assert (
        torch.allclose(small.part.weight, torch.eye(tiny.WIDTH), atol=1e-4)
        and small.part.bias.abs().max() < 1e-4
    )
    assert abs(fit.unexplained) < 1e-6 and abs(fit.unexplained_answers) < 1e-6 and fit.texts == 40


def test_the_bridge_is_the_ridge_regression(folder):
    """Against numpy, over single positions: answers weigh as much as all others together."""
    small, large = sides(folder, 2)
    examples = texts(32)
    ridge = 0.05
    inputs, goals, weights = [], [], []
    for text in examples:
        ids = torch.from_numpy(text.ids.astype(np.int64))[None, :-1]
        batch = Batch(ids, torch.ones_like(ids), torch.full_like(ids, -100))
        for side, states in ((small, inputs), (large, goals)):
            states.append(side.states(batch)[0].detach().double().numpy())
        weights += [False] * (text.answer - 1) + [True] * (len(text.ids) - text.answer)
    x, y, is_answer = np.concatenate(inputs), np.concatenate(goals), np.array(weights)
    unit = np.sqrt((y**2).mean(axis=1, keepdims=True))
    x, y = np.hstack([x, np.ones((len(x), 1))]) / unit, y / unit
    w = np.where(is_answer, (x[~is_answer, -1] ** 2).sum() / (x[is_answer, -1] ** 2).sum(), 1.0)
    gram = (x.T * w) @ x
    held = ridge * gram.diagonal()[:-1].mean() * np.diag([1.0] * tiny.WIDTH + [0.0])
    expected = np.linalg.solve(
        gram + held, (x.T * w) @ y + held @ np.eye(tiny.WIDTH + 1, tiny.WIDTH)
    )

    before = {name: weight.clone() for name, weight in small.model.weights.items()}
    fit = fitted(small, large, examples, bridge_ridge=ridge)
    assert np.allclose(small.part.weight.detach().numpy().T, expected[:-1], atol=1e-4)
    assert np.allclose(small.part.bias.detach().numpy(), expected[-1], atol=1e-4)
    moved = {
        name
        for name, weight in small.model.weights.items()
        if not torch.equal(weight, before[name])
    }
    assert {name.rpartition("bridge.")[2] for name in moved} == {"weight", "bias"} and len(
        moved
    ) == 2
    for rows, unexplained in ((slice(None), fit.unexplained), (is_answer, fit.unexplained_answers)):
        squared_error = ((y[rows] - x[rows] @ expected) ** 2).sum()
        mean = (x[rows, -1:] * y[rows]).sum(axis=0) / (x[rows, -1] ** 2).sum()
        assert unexplained == pytest.approx(
            squared_error / ((y[rows] - x[rows, -1:] * mean) ** 2).sum(), rel=1e-4
        )
    assert 0 < fit.unexplained < 1


def test_a_fit_that_is_told_to_stop(folder):
    small, large = sides(folder, 2)
    with pytest.raises(StoppedError):
        fitted(small, large, texts(40), stop=True)


def test_a_bridge_outlives_its_folder_and_travels(folder, tmp_path):
    small, large = sides(folder, 3, 2)
    fitted(small, large, texts(40))
    auxiliary.save(
        tmp_path / "auxiliary", small.model, 3, tokenizer=tiny.tokenizer(), recipe={"depth": 3}
    )
    built = auxiliary.build(small.model.model.config.to_dict(), 3, tiny.CPU, dtype=torch.float32)
    auxiliary.load_weights(built, auxiliary.pack(small.model).torch())
    batch = tiny.batch()
    expected = small.model.hidden(batch, small.prompt)
    for other in (auxiliary.load(tmp_path / "auxiliary"), built, copy.deepcopy(built)):
        assert torch.equal(other.hidden(batch, small.prompt), expected)
    twin = copy.deepcopy(built)
    auxiliary.bridge_of(built).bias.data += 1
    assert torch.equal(twin.hidden(batch, small.prompt), expected), "a copy has a bridge of its own"


@pytest.mark.parametrize(
    ("depth", "first", "num_layers", "expected"),
    [
        (0.5, 1, 30, [0, *range(16, 30)]),
        (0.5, 6, 30, [*range(6), *range(21, 30)]),
        (0.5, 1, 6, [0, 4, 5]),
        (0.5, 1, 2, [0, 1]),
        (0.1, 3, 8, [0, 1, 2, 7]),
        (3, 2, 4, [0, 1, 3]),
        (0.5, None, 4, [0, 1]),
        (None, 1, 3, [0, 1, 2]),
    ],
)
def test_both_ends(depth, first, num_layers, expected):
    settings = config.AuxiliaryConfig(layers_per_cell=None, depth=depth, first_layers=first)
    assert list(auxiliary.layers(settings, num_layers)) == expected


@pytest.mark.parametrize(("depth", "first"), [(1, 1), (2, 2), (3, 4), (None, 4)])
def test_first_layers_without_last_ones(depth, first):
    settings = config.AuxiliaryConfig(layers_per_cell=None, depth=depth, first_layers=first)
    with pytest.raises(
        ConfigError,
        match=rf"auxiliary.first_layers: found {first} where .* expected fewer, and last",
    ):
        auxiliary.require_cell(settings, 4, "m")


# -- prompts ---------------------------------------------------------------------------------------


@pytest.mark.each_once
@pytest.mark.parametrize("kind", ["prefix", "input"])
def test_a_prompt_of_words_is_those_words_before_the_text(folder, kind, tmp_path):
    tiny.tokenizer().save_pretrained(tmp_path / "words")
    settings = [
        f"model.name={folder}",
        f"model.tokenizer={tmp_path / 'words'}",
        f"prompt.kind={kind}",
    ]
    settings += ["prompt.num_tokens=4", "prompt.init=text"]
    materials = ExperimentInputs(config.load(None, [*settings, "prompt.init_text=w3 w5 w4"]))
    model, batch = tiny.load(folder), tiny.batch()
    prompt = materials.first_prompt(model)
    words = torch.tensor(materials.tokenizer("w3 w5 w4 w3")["input_ids"]).expand(
        len(batch.input_ids), -1
    )
    word_mask = torch.ones_like(words)
    longer = Batch(
        torch.cat([words, batch.input_ids], 1),
        torch.cat([word_mask, batch.attention_mask], 1),
        torch.cat([word_mask, batch.targets], 1),
    )
    assert torch.allclose(model.hidden(batch, prompt), model.hidden(longer)[:, 4:], atol=1e-5)


def test_a_short_text_is_said_over_and_over(tmp_path):
    folder = tiny.model_folder(tmp_path / "m", "llama")
    tiny.tokenizer().save_pretrained(folder)
    settings = [
        f"model.name={folder}",
        "prompt.kind=input",
        "prompt.num_tokens=5",
        "prompt.init=text",
    ]
    model = tiny.load(folder)
    rows = (
        ExperimentInputs(config.load(None, [*settings, "prompt.init_text=w3 w5"]))
        .first_prompt(model)
        .prompt
    )
    assert (
        torch.equal(rows[0], rows[2])
        and torch.equal(rows[1], rows[3])
        and torch.equal(rows[0], rows[4])
    )


@pytest.mark.parametrize("projection", [None, 5])
@pytest.mark.parametrize("taken", [(0, 1), (1, 2), (0, 3)])
def test_prompts_of_the_same_layers(projection, taken):
    spec = PromptSpec("prefix", 3, 4, 2, 6, projection)
    depths, unmapped = DepthMap(spec, 2, taken), [i for i in range(4) if i not in taken]
    global_prompt = Prompt(spec).initialise(1, 0.5)
    below = Prompt(depths.small)
    below.load(depths.down(global_prompt.tensors()))
    assert torch.equal(key_values(below), key_values(global_prompt)[list(taken)])

    learned = Prompt(depths.small).initialise(2, 0.5)
    above, values_before = Prompt(spec), key_values(global_prompt).clone()
    above.load(depths.up(learned.tensors(), global_prompt.tensors()))
    assert torch.equal(key_values(global_prompt), values_before), (
        "what the server has is not touched"
    )
    assert torch.equal(key_values(above)[list(taken)], key_values(learned))
    if projection is None:
        assert torch.equal(key_values(above)[unmapped], values_before[unmapped])


def test_an_input_prompt_has_no_layers():
    depths = DepthMap(PromptSpec("input", 3, 1, 1, 6), 2, (0, 3))
    global_prompt, learned = (
        Prompt(depths.spec).initialise(seed, 0.5).tensors() for seed in (1, 2)
    )
    assert torch.equal(depths.down(global_prompt)["prompt"], global_prompt["prompt"])
    assert torch.equal(depths.up(learned, global_prompt)["prompt"], learned["prompt"])


# -- losses over choices ---------------------------------------------------------------------------


def test_losses_over_choices(tmp_path):
    """An answer's cross entropy among the tokens of the choices alone."""
    path = tiny.model_folder(tmp_path / "m", "gpt2")
    model, batch = tiny.load(path), tiny.batch()
    targets = batch.targets[batch.targets != -100]
    candidates = targets.unique()
    narrow = tiny.load(path, candidates=candidates)
    logits, _ = model.answer_logits(batch)
    narrow_logits, places = narrow.answer_logits(batch)
    assert torch.equal(candidates[places], targets) and torch.equal(
        narrow_logits, logits[:, candidates]
    )
    assert 1 < len(candidates) < tiny.VOCABULARY


def questions(folder, choices: list[list[str]]) -> str:
    """A data set of one's own, whose examples have these choices."""
    folder.mkdir()
    rows = [
        {"context": f"w{i}", "choices": options, "label": i % len(options)}
        for i, options in enumerate(choices)
    ]
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_the_candidates_are_the_tokens_of_the_choices(tmp_path):
    source = questions(tmp_path / "fixed", [["grey", "miller"]] * 12)
    inputs = ExperimentInputs(config.load(None, [f"data.source={source}", "data.loss_over=auto"]))
    tokens = {token for word in (" grey", " miller") for token in inputs.tokenizer.encode(word)}
    assert (
        len(tokens) == 2
        and set(inputs.candidates.tolist()) == tokens
        and inputs.candidates.tolist() == sorted(tokens)
    )
    assert ExperimentInputs(config.load(None, [f"data.source={source}"])).candidates is None


def test_choices_that_differ(tmp_path):
    source = questions(tmp_path / "free", [["w7", "w5"], ["w1", "w2"]] * 6)
    assert (
        ExperimentInputs(
            config.load(None, [f"data.source={source}", "data.loss_over=auto"])
        ).candidates
        is None
    )
    with pytest.raises(
        ConfigError, match=r"data.loss_over: found choices .* 2 different sets of choices"
    ):
        ExperimentInputs(
            config.load(None, [f"data.source={source}", "data.loss_over=choices"])
        ).check()


# -- recipes ---------------------------------------------------------------------------------------


def test_a_recipe_says_what_is_not_given(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model: {name: embedded}\ndata: {source: embedded}\nprompt: {init: random}\n")
    plain = config.load(path)
    assert (
        plain.recipe == "bridged"
        and plain.auxiliary.first_layers == 1
        and plain.auxiliary.depth == 0.5
    )
    assert plain.prompt.init == "random" and plain.prompt.mapping == "same_layers"
    for settings in (["recipe=paper"], ["recipe=bridged", "recipe=paper"]):
        paper = config.load(path, settings)
        assert (
            paper.recipe == "paper"
            and paper.auxiliary.first_layers is None
            and paper.auxiliary.layers_per_cell == 1
        )
    path.write_text(config.to_yaml(paper))
    assert config.load(path) == paper
    with pytest.raises(
        ConfigError, match=r"recipe: found 'papre', expected one of .*did you mean 'paper'"
    ):
        config.load(path, ["recipe=papre"])


def test_the_papers_recipe_is_what_keys_default_to():
    """So that a record that is older than a key counts as what it was."""
    paper = config.load(None, ["recipe=paper"])
    assert paper.auxiliary == config.AuxiliaryConfig()
    assert (paper.prompt.init, paper.prompt.mapping) == (
        config.PromptConfig().init,
        config.PromptConfig().mapping,
    )
    assert paper.data.loss_over == config.DataConfig().loss_over


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["auxiliary.depth=1.5"],
            "auxiliary.depth: found 1.5, expected a whole number of layers, or a fraction",
        ),
        (["auxiliary.depth=0"], "auxiliary.depth: found 0"),
        (["auxiliary.first_layers=2.5"], "auxiliary.first_layers: found 2.5"),
        (
            ["recipe=bridged", "distillation.stage.steps=0", "auxiliary.first_layers=0"],
            "auxiliary.first_layers: found 0, expected at least 1",
        ),
        (
            ["auxiliary.first_layers=1"],
            "auxiliary.first_layers: found 1 with layers_per_cell=1, which shares layers",
        ),
        (
            ["distillation.bridge_texts=0"],
            "distillation.bridge_texts: found 0, expected at least 1",
        ),
        (["distillation.bridge_ridge=0"], "distillation.bridge_ridge: found 0"),
        (
            ["prompt.init=text", "prompt.projection=4"],
            "prompt.init: found text with prompt.projection",
        ),
        (["prompt.init_text=' '"], "prompt.init_text: found no words"),
        (
            ["prompt.mapping=same_layers"],
            "prompt.mapping: found same_layers with an auxiliary model that runs its",
        ),
        (
            [
                "recipe=bridged",
                "distillation.stage.steps=0",
                "data.server_share=0",
                "server.tuning.steps=0",
            ],
            "distillation.text: found none with data.server_share=0",
        ),
    ],
)
def test_mistakes(settings, message):
    with pytest.raises(ConfigError) as caught:
        config.load(None, settings)
    assert message in str(caught.value)


def test_a_depth_is_a_number_of_layers_or_a_fraction():
    depths = [
        auxiliary.depth(config.AuxiliaryConfig(depth=depth), 30)
        for depth in (None, 12, 0.5, 0.4, 0.001)
    ]
    assert depths == [30, 12, 15, 12, 1]
