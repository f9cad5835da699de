"""The schedule, the engines and the loop against formulas; distillation against a loop over tokens;
failing clients.
"""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch import nn

from fedsp_mpi import federate
from fedsp_mpi.algorithms import fedsp
from fedsp_mpi.algorithms.prompt_server import PromptServer
from fedsp_mpi.comm import RoundBroadcast, Topology
from fedsp_mpi.config import ComputeConfig, DistillationConfig, StageConfig
from fedsp_mpi.config.training import OptimizerConfig
from fedsp_mpi.data.tokens import Batches, Text, collate
from fedsp_mpi.files.fingerprint import of_weights
from fedsp_mpi.models import auxiliary
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.models.losses import answer_loss, answer_loss_of, hidden_loss, logits_loss
from fedsp_mpi.models.prompts import DepthMap, Prompt, PromptSpec
from fedsp_mpi.record import Checkpoints
from fedsp_mpi.record.client_cache import ClientStateCache
from fedsp_mpi.roles import HostedClients
from fedsp_mpi.tensors import Failure, NamedTensors, State, seal
from fedsp_mpi.training.device import Compute
from fedsp_mpi.training.distill import Progress, StoppedError, distillation_loss
from fedsp_mpi.training.engine import TorchEngine, learning_rate
from fedsp_mpi.training.loop import NonFiniteError, Trace, num_answer_tokens, num_text_tokens, train
from helpers import tiny
from helpers.distillation import distilled
from helpers.paths import ROOT, TESTS

PLAIN = OptimizerConfig(learning_rate=0.1, weight_decay=0.0, warmup=0.0)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> str:
    return tiny.model_folder(tmp_path_factory.mktemp("gpt2"), "gpt2")


@pytest.fixture(autouse=True)
def unsealed():
    yield
    seal.clear()


# -- schedule --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("warmup", "total", "rates"),
    [
        (0.2, 10, [1 / 2, 2 / 2, 8 / 8, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        (0.0, 4, [4 / 4, 3 / 4, 2 / 4, 1 / 4]),
        (1.0, 4, [1 / 4, 2 / 4, 3 / 4, 4 / 4]),
        (0.1, 4, [4 / 4, 3 / 4, 2 / 4, 1 / 4]),  # round(0.4) = 0 steps of warm-up
        (0.5, 1, [1.0]),
    ],
)
def test_the_rate_climbs_to_the_full_one_and_falls_to_nothing(warmup, total, rates):
    settings = OptimizerConfig(learning_rate=3.0, warmup=warmup)
    actual = [learning_rate(settings, step, total) for step in range(total)]
    assert actual == pytest.approx([3.0 * rate for rate in rates]) and min(actual) > 0


def test_past_the_end_the_last_rate_stays():
    settings = OptimizerConfig(learning_rate=1.0, warmup=0.2)
    assert [learning_rate(settings, step, 10) for step in (9, 10, 50)] == [1 / 8] * 3


def test_the_engine_steps_by_the_schedule():
    """The steps of Adam under a constant gradient are as long as the rate."""
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    settings = replace(PLAIN, warmup=0.5)
    engine, places = TorchEngine([weight], settings, 6), []
    for _ in range(8):
        engine.backward(2 * weight.sum())
        engine.step()
        places.append(weight.item())
    rates = [learning_rate(settings, step, 6) for step in range(8)]
    assert np.allclose(places, -np.cumsum(rates), rtol=1e-6) and engine.steps_done == 8


@pytest.mark.parametrize("clip", [None, 0.5, 100.0])
def test_the_engine_is_adamw_with_clipping(clip):
    """Loshchilov and Hutter (2019), algorithm 2, in numpy; the gradient is cut to the norm over all
    parameters.
    """
    settings = OptimizerConfig(0.1, 0.2, 0.8, 0.9, 1e-3, 0.0, clip)
    start = {"a": np.array([1.0, -2.0]), "b": np.array([[0.5]])}
    pull = {"a": np.array([0.3, 2.0]), "b": np.array([[-1.5]])}
    moving = {name: nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    engine = TorchEngine(moving.values(), settings, 4)
    first, second, x = ({n: v * k for n, v in start.items()} for k in (0, 0, 1))
    for t in range(1, 5):
        engine.backward(
            sum((t * torch.tensor(pull[name]) * p.square()).sum() for name, p in moving.items())
        )
        engine.step()
        g = {name: 2 * t * pull[name] * x[name] for name in x}
        norm = math.sqrt(sum((value**2).sum() for value in g.values()))
        for name, value in g.items():
            value = value * min(1.0, clip / norm) if clip else value
            rate = learning_rate(settings, t - 1, 4)
            first[name] = 0.8 * first[name] + 0.2 * value
            second[name] = 0.9 * second[name] + 0.1 * value**2
            change = first[name] / (1 - 0.8**t) / (np.sqrt(second[name] / (1 - 0.9**t)) + 1e-3)
            x[name] = x[name] - rate * (change + 0.2 * x[name])
    for name, parameter in moving.items():
        assert np.allclose(parameter.detach(), x[name], rtol=1e-5)


def test_a_gradient_that_was_not_used_can_be_dropped():
    weight = nn.Parameter(torch.ones(2))
    engine = TorchEngine([weight], PLAIN, 4)
    engine.backward(weight.sum())
    engine.zero_grad()
    engine.step()
    assert weight.tolist() == [1, 1]


# -- the loop --------------------------------------------------------------------------------------


def tuned(
    path: str, micro: int | None, weights: bool, steps: int = 3
) -> tuple[Trace, NamedTensors]:
    """Losses of some steps on texts of different lengths, and what they left."""
    model = tiny.load(path)
    prompt = Prompt(PromptSpec.of(model.shape, "prefix", 5)).initialise(1, 0.5)
    small = LanguageModel(auxiliary.unroll(auxiliary.cut(model, tiny.cell(2)), 4))
    small.train_weights(weights)
    prompt.requires_grad_(not weights)
    moving = small.model.parameters() if weights else prompt.parameters()
    engine = TorchEngine(moving, OptimizerConfig(learning_rate=0.01, epsilon=1e-3, clip=1.0), 10)
    batches = Batches(tiny.texts(range(4, 17)), 6, micro, seed=1, purpose="test")
    loss = partial(answer_loss_of, small, prompt)
    trace = train(engine, batches, loss, first_step=0, num_steps=steps, device=tiny.CPU)
    return trace, auxiliary.pack(small) if weights else NamedTensors.pack(prompt.tensors())


@pytest.mark.parametrize("weights", [False, True])
def test_a_step_does_not_depend_on_how_the_batch_is_cut(gpt2, weights):
    uncut, uncut_result = tuned(gpt2, None, weights)
    for micro in (1, 2, 4, 6):
        trace, result = tuned(gpt2, micro, weights)
        assert trace.losses == pytest.approx(uncut.losses, rel=1e-6)
        assert np.abs(result.flat - uncut_result.flat).max() < 1e-6 * max(
            1, np.abs(uncut_result.flat).max()
        )
    assert (
        uncut.samples == 18
        and len(uncut.losses) == 3
        and uncut.first == uncut.losses[0] != uncut.last
    )


def test_micro_batches_hold_texts_of_similar_length():
    batches, uncut = (
        Batches(tiny.texts(range(4, 17)), 6, micro, seed=1, purpose="test") for micro in (2, None)
    )
    lengths = [int(text.sum()) for batch in batches.step(1) for text in batch.attention_mask]
    [together] = uncut.step(1)
    assert lengths == sorted(together.attention_mask.sum(1).tolist(), reverse=True)
    assert [len(batch.input_ids) for batch in batches.step(1)] == [2, 2, 2]


def test_a_steps_loss_is_the_mean_over_the_answers_tokens(gpt2):
    """One text at a time, one token at a time."""
    trace, _ = tuned(gpt2, 4, False, steps=1)
    model, texts = tiny.load(gpt2), tiny.texts(range(4, 17))
    prompt = Prompt(PromptSpec.of(model.shape, "prefix", 5)).initialise(1, 0.5)
    small = LanguageModel(auxiliary.unroll(auxiliary.cut(model, tiny.cell(2)), 4))
    small.train_weights(False)
    chosen, losses = Batches(texts, 6, None, seed=1, purpose="test").step(0), []
    for row in range(6):
        text = next(
            t
            for t in texts
            if t.ids[:-1].tolist() == chosen[0].input_ids[row, : len(t.ids) - 1].tolist()
        )
        logits = small.head(small.hidden(collate([text]), prompt))[0].log_softmax(-1)
        losses += [-logits[i - 1, text.ids[i]].item() for i in range(text.answer, len(text.ids))]
    assert trace.losses[0] == pytest.approx(np.mean(losses), rel=1e-5)


class EvalRow:
    """Batches of nothing, each by its step; the loss is a number of that step times the one weight,
    0 by nature.
    """

    batch_size = 4

    def __init__(self, *losses: float) -> None:
        self.losses, self.asked = losses, []
        self.weight = nn.Parameter(torch.zeros(1))

    def step(self, index):
        self.asked.append(index)
        return [
            tiny.Batch(
                torch.full((1, 1), index), torch.ones(1, 1), torch.ones(1, 1, dtype=torch.int64)
            )
        ]

    def loss(self, batch):
        return 0 * self.weight.sum() + self.losses[int(batch.input_ids)]


def test_training_takes_the_batches_it_is_told_to():
    line, seen = EvalRow(5.0, 4.0, 3.0, 2.0), []
    engine = TorchEngine([line.weight], PLAIN, 4)
    first = train(engine, line, line.loss, first_step=2, num_steps=1, device=tiny.CPU)
    later = train(
        engine,
        line,
        line.loss,
        first_step=0,
        num_steps=3,
        device=tiny.CPU,
        on_step=lambda loss: seen.append(loss.item()),
    )
    assert (first.losses, later.losses, line.asked) == ((3.0,), (5.0, 4.0, 3.0), [2, 0, 1, 2])
    assert seen == [5.0, 4.0, 3.0] and (later.first, later.last, later.samples) == (5.0, 3.0, 12)
    assert engine.steps_done == 4
    nothing = train(engine, line, line.loss, first_step=0, num_steps=0, device=tiny.CPU)
    assert nothing.losses == () and nothing.samples == 0 and math.isnan(nothing.last)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_told_with_its_first_step(value):
    line = EvalRow(1.0, value, math.nan)
    with pytest.raises(
        NonFiniteError, match=rf"the loss of step 2 of 3 is {value}, expected a finite number"
    ):
        engine = TorchEngine([line.weight], PLAIN, 3)
        train(engine, line, line.loss, first_step=0, num_steps=3, device=tiny.CPU)


# -- state -----------------------------------------------------------------------------------------


def stored(state: State) -> State:
    """As it comes back from a file."""
    loaded = safetensors.numpy.load(safetensors.numpy.save(state))
    return {name: value.copy() for name, value in loaded.items()}


def test_an_engine_goes_on_from_its_state_with_equal_bits():
    def pull(weight: nn.Parameter, engine: TorchEngine, steps: int) -> list[float]:
        for _ in range(steps):
            engine.backward((weight.square() * torch.arange(1.0, 5.0)).sum())
            engine.step()
        return weight.tolist()

    settings = OptimizerConfig(learning_rate=0.1, warmup=0.3)
    weight = nn.Parameter(torch.tensor([1.0, -2.0, 3.0, 0.5]))
    engine = TorchEngine([weight], settings, 9)
    pull(weight, engine, 4)
    state, other = stored(engine.state()), nn.Parameter(weight.detach().clone())
    expected = pull(weight, engine, 5)
    again = TorchEngine([other], settings, 9)
    assert pull(nn.Parameter(other.detach().clone()), again, 0) != expected
    again.load_state(state)
    assert again.steps_done == 4 and pull(other, again, 5) == expected


# -- distillation ----------------------------------------------------------------------------------


def test_hidden_loss_against_a_loop():
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    mask, expected = torch.tensor([[1, 1, 1], [1, 0, 0]]), 0.0
    for i, j in mask.nonzero().tolist():
        expected += ((student[i, j] - teacher[i, j]) ** 2).mean().item()
    assert hidden_loss(student, teacher, mask).item() == pytest.approx(expected, rel=1e-6)
    student[1, 2] = math.nan  # what stands on padding is of no consequence
    student.requires_grad_(True)
    loss = hidden_loss(student, teacher, mask)
    loss.backward()
    assert (
        loss.item() == pytest.approx(expected, rel=1e-6)
        and not student.grad[1, 1:].nan_to_num(1.0)[0].any()
    )


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_logits_loss_against_a_loop(temperature):
    """T^2 times the sum over positions of sum_v p_v log(p_v / q_v), p of the teacher."""
    student, teacher, expected = torch.randn(3, 5), torch.randn(3, 5), 0.0
    for s, t in zip(student.double(), teacher.double()):
        q, p = ((x / temperature).exp() / (x / temperature).exp().sum() for x in (s, t))
        expected += temperature**2 * sum(p[v] * math.log(p[v] / q[v]) for v in range(5)).item()
    assert logits_loss(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-5)
    assert logits_loss(teacher, teacher, temperature).item() == pytest.approx(0, abs=1e-6)


SETTINGS = [
    DistillationConfig(hidden_weight=2.0, logits_weight=0.0),
    DistillationConfig(hidden_weight=0.0, logits_weight=3.0, temperature=2.0),
    DistillationConfig(hidden_weight=2.0, logits_weight=3.0, temperature=0.5),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=["hidden", "logits", "both"])
def test_padding_has_no_part_in_the_distillation_loss(gpt2, settings):
    """Texts side by side cost what they cost alone, by the formulas above; the teacher gets no
    gradient.
    """
    teacher = tiny.load(gpt2)
    student = LanguageModel(auxiliary.unroll(auxiliary.cut(teacher, tiny.cell(1)), 4))
    student.train_weights(True)
    student.model.eval()
    texts, expected = tiny.texts([12, 3, 7]), 0.0
    for text in texts:
        alone = collate([text])
        h, g = student.hidden(alone), teacher.hidden(alone)
        expected += settings.hidden_weight * hidden_loss(h, g, alone.attention_mask).item()
        logits = (model.head(x)[0] for model, x in ((student, h), (teacher, g)))
        expected += settings.logits_weight * logits_loss(*logits, settings.temperature).item()
    loss = distillation_loss(student, teacher, collate(texts), settings=settings)
    assert loss.item() == pytest.approx(expected, rel=1e-5) and expected > 1
    loss.backward()
    assert student.model.get_input_embeddings().weight.grad.any()
    assert all(p.grad is None for p in teacher.model.parameters())


def test_distillation_aligns_the_student(gpt2):
    done, student = distilled(gpt2)
    assert (done.engine, done.engine_version, done.zero_stage) == ("torch", torch.__version__, 0)
    assert (
        done.trace.last < 0.7 * done.trace.first
        and done.trace.samples == 96
        and len(done.step_seconds) == 12
    )
    assert (
        not any(p.requires_grad for p in student.model.parameters()) and not student.model.training
    )
    again, other = distilled(gpt2)
    assert again.trace.losses == done.trace.losses and of_weights(other.weights) == of_weights(
        student.weights
    )
    batch = Batches(tiny.texts(range(4, 24)), 8, None, seed=1, purpose="distillation").step(0)[0]
    teacher = tiny.load(gpt2)
    fresh = LanguageModel(auxiliary.unroll(auxiliary.cut(teacher, tiny.cell(1)), 4))
    fresh.train_weights(False)
    first = distillation_loss(
        fresh, teacher, batch, settings=DistillationConfig()
    ).item() / num_text_tokens(batch)
    assert done.trace.first == pytest.approx(first, rel=1e-5)


def test_dropout_while_distilling_depends_on_the_seed_only(gpt2):
    runs = []
    for state, dropout in [(0, True), (1, True), (1, False)]:
        torch.manual_seed(state)
        runs.append(distilled(gpt2, steps=3, dropout=dropout)[0].trace.losses)
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("logits_weight", [0.0, 1.0])
def test_a_head_of_its_own_is_trained_only_where_the_loss_reaches_it(tmp_path, logits_weight):
    """A head without a gradient is not moved by weight decay alone either."""
    path = tiny.model_folder(tmp_path, "llama")
    _, student = distilled(path, steps=3, logits_weight=logits_weight)
    before, after = (
        model.model.get_output_embeddings().weight for model in (tiny.load(path), student)
    )
    assert torch.equal(before, after) is (logits_weight == 0)
    assert not torch.equal(
        *(m.model.get_input_embeddings().weight for m in (tiny.load(path), student))
    )


# What DeepSpeed does is looked at in a process of its own that can start no compiler.
DEEPSPEED = """
import json, sys
import torch
from helpers.distillation import distilled
from fedsp_mpi.models import auxiliary

path, results = sys.argv[1], {}
for case in json.loads(sys.argv[2]):
    engine, zero, micro = case
    try:
        stage = dict(engine=engine, zero_stage=zero, logits_weight=0.5, clip=0.05)
        done, student = distilled(path, micro, steps=5, **stage)
        results[str(case)] = dict(
            losses=done.trace.losses,
            flat=auxiliary.pack(student).flat.tolist(),
            engine=[done.engine, done.engine_version, done.zero_stage],
            group=torch.distributed.is_initialized(),
        )
    except Exception as error:
        results[str(case)] = dict(error=type(error).__name__ + ": " + str(error))
print(json.dumps(results))
"""
PLAIN_TORCH = [("torch", 0, None), ("torch", 0, 4)]
PAIRS = [(0, None), (1, 4), (2, None), (3, 4)]  # DeepSpeed's stage and the micro-batch
OTHER_PAIRS = [(0, 4), (1, None), (2, 4), (3, None)]


@pytest.fixture(scope="module")
def engines(gpt2, tmp_path_factory) -> dict:
    """Return losses and weights of the same distillation by every engine."""
    return distilled_by_engines(gpt2, PAIRS, tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def engines_of_other_pairs(gpt2, tmp_path_factory) -> dict:
    return distilled_by_engines(gpt2, OTHER_PAIRS, tmp_path_factory.mktemp("home"))


def distilled_by_engines(gpt2: str, pairs: list[tuple[int, int | None]], home: Path) -> dict:
    """Distil by plain torch and by DeepSpeed, one after the other in one process."""
    cases = [*PLAIN_TORCH, *(("deepspeed", zero, micro) for zero, micro in pairs)]
    (home / "bin").mkdir()
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name in ("LD_LIBRARY_PATH", "LANG", "TMPDIR")
    }
    places = {
        "HOME": str(home),
        "PATH": str(home / "bin"),
        "TORCH_EXTENSIONS_DIR": str(home / "extensions"),
    }
    environment = inherited | places | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{TESTS}"}
    command = [sys.executable, "-c", DEEPSPEED, gpt2, json.dumps(cases)]
    done = subprocess.run(
        command, cwd=home, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    built = [
        path.name
        for path in home.rglob("*")
        if path.suffix in (".so", ".o", ".ninja", ".cpp", ".cu")
    ]
    return json.loads(done.stdout.splitlines()[-1]) | {"built": built}


@pytest.mark.parametrize(("zero", "micro"), PAIRS)
def test_deepspeed_gives_the_losses_and_weights_of_plain_torch(engines, zero, micro):
    require_losses_and_weights_of_plain_torch(engines, zero, micro)


@pytest.mark.slow
@pytest.mark.parametrize(("zero", "micro"), OTHER_PAIRS)
def test_other_pairs_of_stage_and_micro_batch(engines_of_other_pairs, zero, micro):
    require_losses_and_weights_of_plain_torch(engines_of_other_pairs, zero, micro)


def require_losses_and_weights_of_plain_torch(engines: dict, zero: int, micro: int | None) -> None:
    expected, actual = engines[str(["torch", 0, micro])], engines[str(["deepspeed", zero, micro])]
    assert "error" not in actual, actual["error"]
    assert actual["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert np.abs(np.array(actual["flat"]) - np.array(expected["flat"])).max() < 1e-4
    assert actual["engine"][0] == "deepspeed" and actual["engine"][2] == zero
    assert actual["group"] is False  # nothing of it outlives the distillation


def test_deepspeed_needs_no_compiler_on_a_cpu(engines):
    assert "error" not in engines[str(["deepspeed", 0, None])] and engines["built"] == []


# -- clients that fail -----------------------------------------------------------------------------


def client(
    path: str, ids=(0, 1), keep: bool = True, prompt_rate: float = 0.01, steps: int = 2
) -> fedsp.Client:
    large = tiny.load(path)
    cell = auxiliary.unroll(auxiliary.cut(large, tiny.cell(1)), 4)
    weights_sent = auxiliary.pack(LanguageModel(cell))
    model = auxiliary.build(
        auxiliary.cell_config(cell.config, tiny.cell(1)).to_dict(), 4, tiny.CPU, dtype=torch.float32
    )
    alignment = StageConfig(
        steps=steps, batch_size=4, optimizer=OptimizerConfig(learning_rate=0.001)
    )
    tuning = replace(alignment, optimizer=OptimizerConfig(learning_rate=prompt_rate))
    texts = {id: tiny.texts(range(4, 16), seed=id) for id in ids}
    shards = {
        id: fedsp.Shard(
            Batches(client_texts, 4, None, seed=1, purpose="alignment", numbers=(id,)),
            Batches(client_texts, 4, None, seed=1, purpose="prompt", numbers=(id,)),
        )
        for id, client_texts in texts.items()
    }
    prompt = Prompt(PromptSpec.of(model.shape, "prefix", 5))
    training = fedsp.LocalTraining(
        alignment, tuning, joint=False, total_rounds=6, keep_state=keep, seed=1
    )

    def make_shard(id: int, other_texts: list[Text]) -> fedsp.Shard:
        batches = Batches(other_texts, 4, None, seed=1, purpose="prompt", numbers=(id,))
        return fedsp.Shard(batches, batches)

    return fedsp.Client(
        model, weights_sent, prompt, shards=shards, make_shard=make_shard, training=training
    )


def downs(model: fedsp.Client, count: int) -> list[NamedTensors]:
    """Broadcasts of some rounds, each different."""
    spec = model.prompt.spec
    return [
        NamedTensors.pack(Prompt(spec).initialise(seed, 0.5).tensors()) for seed in range(count)
    ]


def broken(down: NamedTensors) -> NamedTensors:
    copy = down.copy()
    copy.flat[3] = math.nan
    return copy


def same(one, other) -> bool:
    values = [
        [number for name, number in u.metrics.items() if "loss" in name] for u in (one, other)
    ]
    return (
        (one.tensors.flat == other.tensors.flat).all()
        and values[0] == values[1]
        and one.weight == other.weight
    )


def test_a_client_whose_loss_is_not_finite_begins_anew_from_the_handout(gpt2):
    failing, sound, fresh = (client(gpt2) for _ in range(3))
    first, second, third = downs(failing, 3)
    assert same(failing.local_update(0, 1, first), sound.local_update(0, 1, first))
    assert same(failing.local_update(1, 1, first), sound.local_update(1, 1, first))
    with pytest.raises(NonFiniteError, match="the loss of step 1 of 2 is nan"):
        failing.local_update(0, 2, broken(second))
    assert not failing.states.has_state(0) and failing.states.has_state(1)
    assert same(
        failing.local_update(1, 2, second), sound.local_update(1, 2, second)
    )  # the other one is not touched
    sound.local_update(0, 2, second)
    anew = failing.local_update(0, 3, third)
    assert same(anew, fresh.local_update(0, 3, third)) and not same(
        anew, sound.local_update(0, 3, third)
    )
    assert same(failing.local_update(1, 3, third), sound.local_update(1, 3, third))


def test_its_update_is_refused_and_the_others_go_on(gpt2, tmp_path):
    playing = client(gpt2, ids=(0, 1, 2))
    playing.local_update(0, 1, downs(playing, 1)[0])
    local = playing.local_update

    class Breaks:
        def local_update(self, client, round, down):
            return local(client, round, broken(down) if client == 1 else down)

    breaks, everybody = Breaks(), (0, 1, 2)
    compute = Compute.of(ComputeConfig(device="cpu"), Topology.alone())
    shelf = ClientStateCache(playing.states, Checkpoints(tmp_path), max_in_memory=3, files={})
    side = HostedClients(breaks, everybody, compute, shelf, lambda round: everybody)
    down = downs(playing, 2)[1]
    results = list(federate.train_clients(side, RoundBroadcast(2, tensors=down)))
    assert [type(result) for result in results] == [fedsp.Update, Failure, fedsp.Update]
    assert results[1] == Failure(
        1,
        2,
        "local training",
        "the loss of step 1 of 2 is nan, expected a finite number (lower the learning rate)",
    )
    assert results[0].tensors.is_finite() and results[2].tensors.is_finite()
    assert results[0].weight == 8.0


def test_two_roles_of_a_process_compute_in_turn_with_their_own_precision():
    alone = Topology.alone()
    fast = Compute.of(ComputeConfig(device="cpu", matmul_precision="high"), alone)
    exact = Compute.of(ComputeConfig(device="cpu"), alone)
    for compute, expected in ((fast, "high"), (exact, "highest"), (fast, "high")):
        compute.begin()
        assert torch.get_float32_matmul_precision() == expected
    exact.begin()


def test_a_prompt_that_is_not_finite_is_refused_even_if_its_losses_are(gpt2):
    playing = client(gpt2, prompt_rate=1e39, steps=1)
    with pytest.raises(NonFiniteError, match="the tuned prompt holds numbers that are not finite"):
        playing.local_update(0, 1, downs(playing, 1)[0])
    assert not playing.states.has_state(0)


def test_a_client_goes_on_from_its_state_with_equal_bits(gpt2):
    first_client, second_client = client(gpt2), client(gpt2)
    first, second = downs(first_client, 2)
    first_client.local_update(0, 1, first)
    second_client.local_update(1, 5, second)  # has something else in its hands
    second_client.states.load_client_state(0, stored(first_client.states.client_state(0)))
    assert same(first_client.local_update(0, 2, second), second_client.local_update(0, 2, second))
    assert not first_client.states.has_state(7)


def test_what_is_kept_between_rounds_matters_and_can_be_left(gpt2):
    keeping, restarted, fresh = client(gpt2), client(gpt2, keep=False), client(gpt2, keep=False)
    first, second = downs(keeping, 2)
    for trained in (keeping, restarted):
        trained.local_update(0, 1, first)
    assert not restarted.states.has_state(0)
    expected = fresh.local_update(0, 2, second)
    assert same(restarted.local_update(0, 2, second), expected) and not same(
        keeping.local_update(0, 2, second), expected
    )


def test_a_server_goes_on_from_its_state_with_equal_bits(gpt2):
    def server() -> PromptServer:
        model = tiny.load(gpt2)
        prompt = Prompt(PromptSpec.of(model.shape, "prefix", 5)).initialise(1, 0.5)
        stage = StageConfig(steps=2, batch_size=4, optimizer=OptimizerConfig(learning_rate=0.01))
        batches = Batches(tiny.texts(range(4, 16)), 4, None, seed=1, purpose="server")
        return PromptServer(
            model,
            prompt,
            DepthMap(prompt.spec, 2),
            batches=batches,
            stage=stage,
            total_rounds=4,
            rule=lambda updates: updates,
        )

    first, resumed = server(), server()
    first.server_update(1)
    resumed.load_state(stored(first.state()))
    assert first.server_update(2).losses == resumed.server_update(2).losses
    assert (first.export().flat == resumed.export().flat).all()
    down = first.broadcast()
    assert down.schema == (("prompt", (5, 2 * 2 * 32)),)  # two layers, each a key and a value of 32
    first.load_aggregate(down)
    assert (first.broadcast().flat == down.flat).all()


def test_answer_loss_is_a_sum_over_answer_tokens():
    logits, targets = torch.randn(4, 7), torch.tensor([0, 6, 3, 3])
    expected = -sum(logits.log_softmax(-1)[i, t] for i, t in enumerate(targets))
    assert torch.allclose(answer_loss(logits, targets), expected)
    batch = tiny.batch((5, 3))
    assert (num_answer_tokens(batch), num_text_tokens(batch)) == (3 + 1, 4 + 2)


@pytest.mark.parametrize("dropout", [False, True])
def test_a_distillation_goes_on_with_equal_bits(gpt2, dropout):
    uninterrupted, student = distilled(gpt2, dropout=dropout, steps=6)
    states: list[State] = []
    with pytest.raises(
        StoppedError,
        match="told to stop after 4 of 6 steps of the distillation; they are kept",
    ):
        distilled(
            gpt2,
            dropout=dropout,
            steps=6,
            stop_at=4,
            progress=Progress(keep=lambda s: states.append(stored(s))),
        )
    resumed, resumed_student = distilled(
        gpt2, dropout=dropout, steps=6, progress=Progress(states[0])
    )
    assert resumed.trace.losses == uninterrupted.trace.losses and len(resumed.step_seconds) == 2
    assert of_weights(resumed_student.weights) == of_weights(student.weights)
    assert resumed.trace.samples == uninterrupted.trace.samples == 48
    with pytest.raises(StoppedError):
        distilled(
            gpt2, steps=2, stop_at=2, progress=Progress(keep=lambda s: states.append(stored(s)))
        )
    done, _ = distilled(gpt2, steps=2, progress=Progress(states[1]))
    assert len(done.trace.losses) == 2 and done.step_seconds == ()
