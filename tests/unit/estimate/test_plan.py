"""`plan`: its counts against the paper's models, a real run and torch's own counter."""

from __future__ import annotations

import resource
import socket
import subprocess
import sys
from functools import cache
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from fedsp_mpi import cli, config
from fedsp_mpi.commands.trials import trials_of
from fedsp_mpi.config import EMBEDDED, to_yaml
from fedsp_mpi.estimate import cost, memory
from fedsp_mpi.estimate import text as plan_text
from fedsp_mpi.models import architectures, backbone
from fedsp_mpi.models.prompts import Prompt, PromptSpec
from fedsp_mpi.record import read
from fedsp_mpi.tensors import Batch
from helpers import tiny
from helpers.mpi import run_mpi
from helpers.paths import ROOT
from helpers.runs import here, short_run

PAPER = ROOT / "configs" / "paper"
MODELS = {"gpt2xl": "openai-community/gpt2-xl", "opt": "facebook/opt-1.3b"}
TASKS = (
    "arc_easy",
    "arc_challenge",
    "openbookqa",
    "web_questions",
    "hellaswag",
    "piqa",
    "sciq",
    "race",
)
HEADER = 256
NOWHERE = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": "/nonexistent"}  # no hub and no cache


@cache
def paper_config(model: str, name: str, *settings: str) -> config.Config:
    """The configuration of a trial of one of the paper's sweeps."""
    trials = trials_of(PAPER / f"{model}.yaml", settings)
    [trial] = [trial for trial in trials if trial.name == f"{name}-1"]
    return trial.config


def planned(model: str, name: str, *settings: str, tokens: int | None = None) -> cost.CostEstimate:
    """The estimate of one of the paper's experiments, named TASK-METHOD."""
    return cost.plan(paper_config(model, name, *settings), name, tokens)


def embedded(*settings: str) -> cost.CostEstimate:
    """The estimate of the embedded default."""
    return cost.plan(config.load(None, list(settings)), "embedded")


# Counts.


@pytest.mark.parametrize(
    ("model", "large", "small", "wire", "shown"),
    [
        (
            "gpt2xl",
            1_557_611_200,
            112_793_600,
            24_576_000,
            ("13.8 x fewer", "14.5 x with an untied head"),
        ),
        (
            "opt",
            1_315_758_080,
            157_517_824,
            15_728_640,
            ("8.35 x fewer", "8.55 x without position embeddings"),
        ),
    ],
)
def test_the_paper_s_models_have_their_known_sizes(model, large, small, wire, shown):
    estimate = planned(model, "arc_easy-fedsp")
    assert (estimate.sizes.global_model, estimate.sizes.auxiliary) == (large, small)
    assert estimate.sizes.prompt == estimate.sizes.wire == wire // 4
    fedsp, unshared, fedprompt, single, alone, tuned = estimate.methods
    assert fedsp.down == fedsp.up == fedprompt.up == alone.up == wire + HEADER
    assert unshared.up == single.up == wire // {"gpt2xl": 48, "opt": 24}[model] + HEADER
    assert (fedsp.holds, unshared.holds, single.holds) == (small, small, small)
    assert (fedprompt.holds, alone.holds, tuned.holds, tuned.trains) == (large, large, large, large)
    assert (fedsp.trains, fedprompt.trains) == (small + wire // 4, wire // 4)
    assert (fedsp.handout, tuned.handout, tuned.down) == (4 * small + wire, 0, 4 * large + HEADER)
    rounds = estimate.config.federation.rounds
    assert fedsp.total == 10 * (4 * small + wire) + rounds * 10 * 2 * (wire + HEADER)
    assert alone.total == 4 * large + wire + rounds * 2 * (wire + HEADER)
    text = plan_text.text(estimate, 40)
    paper_ratio = plan_text.PAPER[estimate.config.model.name]
    for piece in (f"{large:,}", f"{small:,}", f"{wire:,} bytes", f"paper says {paper_ratio} x"):
        assert piece in text
    assert all(piece in text for piece in shown)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gpt2", 124_439_808),
        ("openai-community/gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("facebook/opt-125m", 125_239_296),
        ("facebook/opt-350m", 331_196_416),
        ("facebook/opt-2.7b", 2_651_596_800),
        ("facebook/opt-6.7b", 6_658_473_984),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008),
        ("HuggingFaceTB/SmolLM2-360M", 361_821_120),
        ("HuggingFaceTB/SmolLM2-1.7B", 1_711_376_384),
        ("meta-llama/Llama-3.2-1B", 1_235_814_400),
        ("Qwen/Qwen2.5-0.5B", 494_032_768),
        ("Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304),
        ("Qwen/Qwen2.5-7B", 7_615_616_512),
        ("Qwen/Qwen3-0.6B", 596_049_920),
        ("Qwen/Qwen3-1.7B", 1_720_574_976),
        ("Qwen/Qwen3-8B", 8_190_735_360),
        ("mistralai/Mistral-7B-v0.1", 7_241_732_096),
        ("microsoft/Phi-3-mini-4k-instruct", 3_821_079_552),
        ("allenai/OLMo-2-0425-1B", 1_484_916_736),
        ("microsoft/phi-4", 14_659_507_200),
        ("microsoft/phi-1_5", 1_418_270_720),
        ("microsoft/phi-2", 2_779_683_840),
        ("google/gemma-2-2b", 2_614_341_888),
        ("google/gemma-2-9b-it", 9_241_705_984),
        ("google/gemma-3-270m", 268_098_176),
        ("google/gemma-3-1b-it", 999_885_952),
        ("HuggingFaceTB/SmolLM3-3B", 3_075_098_624),
        ("EleutherAI/pythia-160m", 162_322_944),
        ("EleutherAI/pythia-410m", 405_334_016),
        ("EleutherAI/pythia-1.4b", 1_414_647_808),
        ("EleutherAI/pythia-6.9b", 6_857_302_016),
    ],
)
def test_known_architectures_have_the_published_number_of_parameters(name, parameters):
    architecture = architectures.config_of(name)
    assert (
        memory.meta_model(architecture, architecture.num_hidden_layers).num_parameters()
        == parameters
    )


def test_a_folder_goes_before_a_known_name(tmp_path, monkeypatch):
    tiny.model_folder(tmp_path / "gpt2", "gpt2")
    monkeypatch.chdir(tmp_path)
    assert architectures.config_of("gpt2").num_hidden_layers == tiny.LAYERS


@pytest.mark.parametrize("family", tiny.CAUSAL_FAMILIES)
@pytest.mark.parametrize("prompt_tokens", [0, 5])
def test_flops_are_those_that_torch_counts(family, prompt_tokens):
    """Forward and with the weights' gradients to the last one; with the prompts' alone, 3 % are
    allowed. More than half of the positions are answers, so the last layer runs at all of them.
    """
    stock = transformers.AutoModelForCausalLM.from_config(
        tiny.config(family), attn_implementation="eager"
    )
    model = backbone.LanguageModel(stock)
    spec = PromptSpec.of(model.shape, "prefix", 5)
    prompt = Prompt(spec).initialise(1, 0.1) if prompt_tokens else None
    targets = torch.full((3, 12), -100)
    targets[:, -7:] = 5
    batch = Batch(
        torch.randint(4, tiny.VOCABULARY, (3, 12)), torch.ones(3, 12, dtype=torch.long), targets
    )
    expected = 3 * architectures.forward(model, 12, seen=12 + prompt_tokens, answers=7)
    for trained, factor in (("nothing", 1), ("weights", 3), ("prompts", 2)):
        if trained == "prompts" and prompt is None:
            continue
        model.train_weights(trained == "weights")
        if prompt is not None:
            prompt.requires_grad_(trained == "prompts")
        with FlopCounterMode(display=False) as counter:
            logits, answer_targets = model.answer_logits(batch, prompt)
            if factor > 1:
                torch.nn.functional.cross_entropy(logits, answer_targets).backward()
        allowed = 0.03 if trained == "prompts" else 0
        # Their first MLP is beside the attention.
        is_parallel = family in ("gpt_neox", "phi")
        spared = 0.05 if trained == "prompts" and is_parallel else 0
        flops = factor * expected
        assert (1 - spared) * flops <= counter.get_total_flops() <= (1 + allowed) * flops, trained


@pytest.mark.parametrize("rows", [1, 8])
def test_an_input_prompt_is_counted_as_often_as_it_is_read(tmp_path, rows):
    """By a plan, and by torch: the soft tokens do not see the text, and the last layer runs at the
    answers' positions, which is a little less than the plan says.
    """
    name = tiny.model_folder(tmp_path, "llama")
    settings = [
        f"model.name={name}",
        "prompt.kind=input",
        "prompt.num_tokens=20",
        "server.tuning.batch_size=8",
        "server.tuning.steps=1",
    ]
    settings += [
        f"server.tuning.micro_batch={rows}",
        "federation.rounds=1",
        "data.loss_over=vocabulary",
    ]
    server_tuning = cost.plan(config.load(None, settings), "embedded", tokens=12).phases[
        "server tuning"
    ]
    model = tiny.load(name)
    model.model.set_attn_implementation("eager")  # torch does not count the fused one
    prompt = Prompt(PromptSpec.of(model.shape, "input", 20)).initialise(1, 0.1)
    targets = torch.full((rows, 12), -100)
    targets[:, -4:] = 5
    batch = Batch(
        torch.randint(4, tiny.VOCABULARY, (rows, 12)),
        torch.ones(rows, 12, dtype=torch.long),
        targets,
    )
    with FlopCounterMode(display=False) as counter:
        torch.nn.functional.cross_entropy(*model.answer_logits(batch, prompt)).backward()
    assert server_tuning == pytest.approx(8 // rows * counter.get_total_flops(), rel=0.15)


def test_phases_add_up_from_steps():
    estimate = planned("gpt2xl", "arc_easy-fedsp", tokens=100)
    model = memory.meta_model(
        architectures.config_of("gpt2-xl"), 48
    )  # the auxiliary model computes as much
    once = 16 * architectures.forward(model, 100, seen=140, answers=4)
    bare = 16 * architectures.forward(model, 100, seen=100, answers=0)
    assert estimate.phases == pytest.approx(
        {
            "distillation": 5000 * 4 * bare,
            "client alignment": 50 * 10 * 10 * 3 * once,
            "client prompt tuning": 50 * 10 * 10 * 2 * once,
            "server tuning": 50 * 10 * 2 * once,
            "server-only control": 50 * 10 * 2 * once,
        }
    )
    assert estimate.methods[0].steps == pytest.approx((3 * once, 2 * once))
    assert estimate.methods[0].round == pytest.approx(50 * once)
    assert estimate.critical == pytest.approx(5000 * 4 * bare + 50 * (50 + 20) * once)
    assert f"{estimate.flops / 20e12 / 3600:.2f} h on one GPU of 20 TFLOP/s" in plan_text.text(
        estimate, 20
    )


def test_a_projection_and_joint_training_and_plain_text_cost_more():
    plain, projected = embedded(), embedded("prompt.projection=512")
    assert (
        projected.methods[0].steps > plain.methods[0].steps
        and projected.sizes.wire > plain.sizes.wire
    )
    joint = embedded("client.training=joint")
    assert (
        joint.phases["client alignment"] == 0 and joint.methods[0].trains == plain.methods[0].trains
    )
    assert joint.methods[0].steps == pytest.approx(plain.methods[0].steps[:1])
    longer = embedded("distillation.text=x.txt", "distillation.text_length=128")
    assert longer.phases["distillation"] > 2 * plain.phases["distillation"]


# The paper's experiments.


# GPU hours of each experiment at 40 TFLOP/s, in the order of TASKS.
HOURS = {
    ("gpt2xl", "fedsp"): "0.50 0.56 0.68 0.28 6.26 0.47 1.73 6.45",
    ("gpt2xl", "fedprompt"): "0.26 0.29 0.13 0.14 0.62 0.25 0.88 3.29",
    ("gpt2xl", "fedprompt_single"): "0.02 0.03 0.01 0.01 0.06 0.03 0.08 0.30",
    ("gpt2xl", "prefix_tuning"): "0.64 0.72 0.32 0.36 1.56 0.62 2.20 8.23",
    ("gpt2xl", "prefix_tuning_centralised"): "0.21 0.24 0.11 0.12 0.52 0.21 0.73 2.74",
    ("gpt2xl", "finetune"): "0.18 0.20 0.35 0.10 3.42 0.17 0.60 2.26",
    ("gpt2xl", "finetune_centralised"): "0.01 <0.01 0.01 0.01 0.58 0.09 0.24 6.76",
    ("opt", "fedsp"): "0.27 1.26 0.56 0.23 5.07 0.62 1.40 5.24",
    ("opt", "fedprompt"): "0.21 0.24 0.11 0.12 0.52 0.21 0.72 2.67",
    ("opt", "fedprompt_single"): "0.02 0.03 0.01 0.01 0.06 0.03 0.07 0.27",
    ("opt", "prefix_tuning"): "0.53 0.59 0.26 0.30 1.29 0.51 1.80 6.68",
    ("opt", "prefix_tuning_centralised"): "0.18 0.20 0.09 0.10 0.43 0.17 0.60 2.23",
    ("opt", "finetune"): "0.06 0.65 0.29 0.08 2.83 0.28 0.49 1.83",
    ("opt", "finetune_centralised"): "0.01 <0.01 0.01 0.01 0.48 0.08 0.20 5.49",
}


@pytest.mark.parametrize("model", list(MODELS))
def test_every_experiment_of_the_paper_takes_its_known_hours(model, monkeypatch):
    cached: dict[tuple[str, int], Any] = {}

    def meta_model(settings: Any, depth: int) -> Any:
        key = (settings.to_json_string(), depth)
        if key not in cached:
            cached[key] = memory.meta_model(settings, depth)
        return cached[key]

    monkeypatch.setattr(cost, "meta_model", meta_model)
    hours: dict[str, dict[str, str]] = {}
    for trial in trials_of(PAPER / f"{model}.yaml"):
        estimate = cost.plan(trial.config, trial.name)
        assert trial.config.data.task == trial.task and trial.config.model.name == MODELS[model]
        assert estimate.texts.source != "assumed"
        text = plan_text.hours(estimate.flops, 40).removesuffix(" h").replace(" ", "")
        hours.setdefault(trial.method, {})[trial.task] = text
    for method, by_task in hours.items():
        assert tuple(by_task) == TASKS
        assert " ".join(by_task.values()) == HOURS[model, method], method
    assert set(hours) == {method for name, method in HOURS if name == model}


@pytest.mark.parametrize(
    ("method", "row"),
    [("fedprompt", "FedPrompt"), ("fedprompt_single", "FedPrompt-single"), ("prefix_tuning", None)],
)
@pytest.mark.parametrize("model", ["gpt2xl", "opt"])
def test_the_baselines_are_configurations_of_the_same_system(model, method, row):
    estimate = planned(model, f"arc_easy-{method}")
    configured, *other_methods = estimate.methods
    [same] = [other for other in other_methods if other.name == (row or "prefix-tuning, 1 client")]
    assert configured == cost.MethodCost("as configured", *list(vars(same).values())[1:])
    assert (
        estimate.phases["distillation"]
        == estimate.phases["client alignment"]
        == 0
        < estimate.phases["server tuning"]
    )


def test_a_table_of_different_methods_has_a_column_for_each_phase():
    plans = [planned("opt", f"arc_easy-{method}") for method in ("fedsp", "finetune")]
    rows = [
        line
        for line in plan_text.markdown(plans, 40).split("\n\n")[1].splitlines()
        if line.startswith("|")
    ]
    assert len(rows) == 4 and len({row.count("|") for row in rows}) == 1
    assert "client alignment" in rows[0] and "client fine-tuning" in rows[0] and "0 FLOP" in rows[3]


# A real run.


# The default recipe: layers of the global model as they are, with a bridge.
BRIDGED = (
    "recipe=bridged",
    "distillation.stage.steps=0",
    "auxiliary.layers_per_cell=null",
    "auxiliary.depth=2",
    "auxiliary.first_layers=1",
    "prompt.mapping=same_layers",
)
ADAPTERS = ("method=lora", "distillation.stage.steps=0")


INT8_ADAPTERS = (*ADAPTERS, "federation.compression.format=int8")


def test_int8_plans_a_quarter_of_the_bytes():
    settings = ("method=finetune", "federation.rounds=4", "federation.clients=3")
    plans = [
        embedded(*settings, f"federation.compression.format={format}").methods[0]
        for format in ("none", "bf16", "int8")
    ]
    exact, halves, quarters = (method.down - HEADER for method in plans)
    assert halves == exact / 2 and 3.9 < exact / quarters < 4
    assert [method.handout for method in plans] == [0, exact, exact]
    for method in plans:
        assert method.total == 4 * 3 * (method.down + method.up) + 3 * method.handout


@pytest.mark.parametrize(
    ("settings", "num_layers_copied"),
    [
        ((), 0),
        ((*BRIDGED, "wire.encryption=true"), 2),
        (ADAPTERS, 3),
        ((*INT8_ADAPTERS, "wire.encryption=true"), 3),
    ],
)
def test_the_plan_is_what_a_run_records(tmp_path, settings, num_layers_copied):
    short_run(0, tmp_path, "short", *settings)
    run = read(tmp_path / "short")
    estimate = cost.plan(config.load(tmp_path / "short" / "config.yaml"), "short")
    fedsp = estimate.methods[0]
    assert estimate.handed_out["layers_copied"] == num_layers_copied
    assert run.sections["models"] == {
        "global": estimate.sizes.global_model,
        "auxiliary": estimate.sizes.auxiliary,
        "prompt": 0 if "method=lora" in settings else estimate.sizes.prompt,
        "prompt_on_the_wire": estimate.sizes.wire,
        **estimate.handed_out,
    }
    assert set(run.clients["bytes_down"]) == {fedsp.down} and set(run.clients["bytes_up"]) == {
        fedsp.up
    }
    wire = [row for row in run.wire if row["direction"] in ("down", "up")]
    assert sum(row["bytes"] for row in wire) == 2 * 3 * (fedsp.down + fedsp.up)
    handout_rows = [
        row for row in run.wire if row["direction"] == "handout" and not row["name"].startswith("(")
    ]
    assert sum(row["bytes"] for row in handout_rows) == fedsp.handout  # to one process


# The command.


def test_the_command_needs_no_network_and_little_time(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    arguments = ["plan", PAPER / "base_gpt2xl.yaml", "--set", "data.task=arc_easy"]
    result = run_mpi(0, ["-m", "fedsp_mpi", *arguments], timeout=60, env=NOWHERE)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (
        after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 20
    )  # of a core; others may use it too
    assert "1,557,611,200" in result.stdout and "24,576,000" in result.stdout and not result.stderr
    assert all(len(line) <= 110 and line.isascii() for line in result.stdout.splitlines())


def test_an_unknown_model_is_one_line(monkeypatch):
    def no_network(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    result = here(["plan", "--set", "model.name=gpt2-x1"], status=2)
    [line] = result.stderr.splitlines()
    assert (
        "model.name: found 'gpt2-x1'" in line
        and "expected" in line
        and "'gpt2-xl'" in line
        and not result.stdout
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "1"], "--tokens: found 1, expected at least 2"),
        (["--tflops", "0"], "--tflops: found 0, expected a number above 0"),
        (
            ["--set", "auxiliary.layers_per_cell=4"],
            "expected both together at most the 3 layers of embedded",
        ),
        (
            ["--set", "auxiliary.layers_per_cell=3", "--set", "auxiliary.depth=2"],
            "expected at least layers_per_cell=3",
        ),
        (["--set", "prompt.num_tokens=5000"], "and a text needs two at least"),
        (["no.yaml"], "no.yaml: found no readable file"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    assert cli.main(["plan", *arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


def test_markdown_has_a_row_for_each_method_and_each_configuration(tmp_path, capsys):
    path = tmp_path / "race.yaml"
    path.write_text(to_yaml(paper_config("opt", "race-fedprompt")))
    file = str(path)
    assert cli.main(["plan", file, file, "--markdown", "--tokens", "50"]) == 0
    tables = capsys.readouterr().out.strip().split("\n\n")
    lines = [table.splitlines() for table in tables]
    assert [len(rows) for rows in lines] == [2 + 2 * 5, 2 + 2, 1]
    assert all(len({row.count("|") for row in rows}) == 1 for rows in lines[:2])
    assert "1,315,758,080" in tables[1]


def test_tokens_are_cut_to_what_a_run_would_read():
    assert planned("gpt2xl", "arc_easy-fedsp", tokens=5000).texts.tokens == 1024 - 40 + 1
    assert planned("opt", "race-fedsp", "data.max_length=200").texts == cost.TextLengths(
        200, 8, 200, "estimated"
    )


def test_a_reader_may_stop_before_the_end():
    command = [
        "bash",
        "-c",
        'set -o pipefail; "$0" -m fedsp_mpi plan | (read -r line; echo "$line")',
        sys.executable,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("plan ")


# -- few labels ------------------------------------------------------------------------------------

FEW = (
    "auxiliary.layers_per_cell=null",
    "auxiliary.depth=null",
    "distillation.stage.steps=0",
    "client.alignment.steps=0",
    "data.server_share=0",
    "server.tuning.steps=0",
    "data.limit.train=70",
    "data.labels=7",
    "augment.clients=2",
)


def labelling(*settings: str) -> float:
    return embedded(*FEW, *settings).phases.get("client labelling", 0.0)


def test_labelling_costs_a_pass_over_the_other_texts_of_those_who_label():
    """Of seven clients two label nine of their ten texts in each of six rounds."""
    flops = labelling()
    assert labelling("augment.clients=4") == pytest.approx(2 * flops)
    assert labelling("augment.clients=9") == pytest.approx(3.5 * flops), "there are seven"
    assert labelling("augment.start_round=4") == pytest.approx(flops / 2)
    assert labelling("augment.second_template=x {mask}") == pytest.approx(2 * flops)
    assert labelling("data.limit.train=140") == pytest.approx(flops * 19 / 9)
    assert "client labelling" not in embedded(*FEW, "augment.clients=0").phases
    alone, together = (embedded(*FEW, f"augment.clients={n}") for n in (1, 7))
    assert together.critical == pytest.approx(alone.critical), "clients label at the same time"


def test_a_labelled_text_is_read_once_for_all_classes():
    """Of 21 tokens the last four are an answer, of which there are two, behind eight of prompt."""
    model = memory.meta_model(architectures.config_of(str(EMBEDDED.parent / "model")), 3)
    estimate = cost.plan(config.load(None, [*FEW, "prompt.num_tokens=8"]), "embedded", tokens=21)
    text = architectures.forward(model, 25, seen=33, answers=8)
    assert estimate.phases["client labelling"] == pytest.approx(6 * 2 * 9 * text)
