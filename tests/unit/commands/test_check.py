"""`check`: what it finds before a run, on one process and on several, and that it leaves nothing
behind.
"""

from __future__ import annotations

import os
import re
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fedsp_mpi import config
from fedsp_mpi.comm import Refused
from fedsp_mpi.comm.diagnostics import free_memory
from fedsp_mpi.commands import check, check_ranks
from fedsp_mpi.commands.check_report import CheckReport
from fedsp_mpi.estimate import memory
from fedsp_mpi.log import Log
from fedsp_mpi.models import auxiliary, backbone
from fedsp_mpi.record import read
from fedsp_mpi.record.probe import Probe, look
from fedsp_mpi.run import devices as placement
from fedsp_mpi.run.inputs import RESOURCES, ExperimentInputs
from fedsp_mpi.tensors import seal
from helpers import tiny
from helpers.mpi import both_ends, run_mpi
from helpers.runs import FEDBPT, here

SEARCH = (
    *FEDBPT,
    "search.batch_tokens=10000000",
)  # more than a machine of this decade has memory for

LAUNCHERS = ("PMI_", "PMIX_", "OMPI_COMM_WORLD_", "SLURM_")
GIB = 2**30


@pytest.fixture(scope="module", autouse=True)
def no_launcher():
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
            patch.delenv(name)
        yield


def table(
    n: int, folder: Path, *settings: str, status: int = 0, program=("-m", "fedsp_mpi"), **env: str
) -> list[str]:
    """The lines of a check of the embedded default on n ranks; with status 2 the one line of stderr
    comes last.
    """
    chosen = [
        item
        for setting in (f"run.folder={folder / 'runs'}", *settings)
        for item in ("--set", setting)
    ]
    if n == 0 and program == ("-m", "fedsp_mpi") and not env:
        result = here(["check", *chosen], status)
    else:
        result = run_mpi(n, [*program, "check", *chosen], timeout=60, status=status, env=env)
    errors = result.stderr.strip().splitlines()
    assert len(errors) == (1 if status else 0), both_ends(result)
    assert not (folder / "runs").exists(), "the check left something behind"
    return result.stdout.splitlines() + errors


def alone(folder: Path, *settings: str) -> tuple[list[str], str]:
    """The lines of a check in this process, and what was refused."""
    lines: list[str] = []
    refused = ""
    try:
        check.check(
            config.load(None, [f"run.folder={folder / 'runs'}", *settings]), Log(lines.append)
        )
    except Refused as error:
        refused = str(error)
    assert not (folder / "runs").exists(), "the check left something behind"
    return lines, refused


def of(lines: list[str], what: str) -> list[str]:
    """The lines about one thing."""
    return [line for line in lines if line[6:].startswith(what)]


def with_fault(rank: int | str, fault: str, *arguments: str) -> tuple[str, str]:
    """A program that is `python -m fedsp_mpi`, but for a fault on one rank, or arguments of its own
    there.
    """
    code = f"""
        import sys
        from fedsp_mpi import cli
        from fedsp_mpi.comm import launcher_rank
        given = sys.argv[1:]
        if (launcher_rank() or 0) == {rank}:
            {fault}
            given += {list(arguments)}
        sys.exit(cli.main(given))
    """
    return "-c", textwrap.dedent(code)


# Whole checks.


def test_one_process_without_mpi(tmp_path):
    lines = table(0, tmp_path)
    assert {line.split()[0] for line in lines[:-1]} <= {"ok", "warn"} and lines[-1].startswith(
        "0 failed"
    )
    assert of(lines, "MPI") == ["ok    MPI            none, one process, thread level none"]
    for what in (
        "world",
        "versions",
        "configuration",
        "rank 0",
        "cores",
        "model, data",
        "memory",
        "disk",
        "run folder",
    ):
        assert len(of(lines, what)) == 1, (what, lines)


def test_four_ranks(tmp_path):
    lines = table(4, tmp_path)
    assert {line.split()[0] for line in lines[:-1]} <= {"ok", "warn"}, lines
    assert "4 ranks: 1 server, 3 for 7 clients" in of(lines, "world")[0]
    assert re.search(r"thread level (single|funneled|serialized|multiple)$", of(lines, "MPI")[0])
    assert [len(of(lines, f"rank {rank}")) for rank in range(5)] == [1, 1, 1, 1, 0]
    assert (
        "local rank 3 of 4" in of(lines, "rank 3")[0] and "client on cpu" in of(lines, "rank 3")[0]
    )
    [speed] = of(lines, "speed")
    numbers = re.search(
        r"of 0\.05 MB and 3 client ranks: broadcast (\S+) ms, \S+ GB/s; gather (\S+) ms, ", speed
    )
    assert numbers and all(0 < float(ms) < 1000 for ms in numbers.groups()), speed
    [clocks] = of(lines, "clocks")
    assert clocks.startswith("ok") and "at most 0.0" in clocks


@pytest.fixture(scope="module")
def in_a_job(tmp_path_factory) -> tuple[Path, list[str]]:
    """A check on two ranks in a job of four tasks, and its run folder, which was there before."""
    folder = tmp_path_factory.mktemp("check")
    (folder / "there" / "a run").mkdir(parents=True)
    settings = ("prompt.num_tokens=100", "prompt.projection=64", f"run.folder={folder / 'there'}")
    return folder / "there", table(2, folder, *settings, SLURM_JOB_ID="7", SLURM_NTASKS="4")


def test_speed_is_measured_with_the_prompts_of_the_configuration(in_a_job):
    [speed] = of(in_a_job[1], "speed")
    # Embedding 100 x 128, Linear 128 -> 64, Linear 64 -> 3 layers x 2 x 128, fp32.
    assert f"prompts of {4 * (100 * 128 + 129 * 64 + 65 * 768) / 1e6:.2f} MB" in speed


def test_a_run_folder_that_is_there_stays(in_a_job):
    assert [path.name for path in in_a_job[0].iterdir()] == ["a run"]


@pytest.mark.parametrize("n", [0, 3])
def test_a_mistake_in_the_configuration(tmp_path, n):
    lines = table(n, tmp_path, "federation.round=3", status=2)
    assert "did you mean 'rounds'" in of(lines, "configuration")[0]
    assert lines[-1].startswith("fedsp_mpi: check: configuration: ") and "'rounds'" in lines[-1]


def test_another_configuration_on_one_rank(tmp_path):
    lines = table(3, tmp_path, status=2, program=with_fault(2, "pass", "--set", "run.seed=9"))
    assert "rank 2" in lines[-1] and "run.seed: was 1, is 9" in lines[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("topology.ranks=5", "found 3 ranks, expected topology.ranks=5"),
        ("federation.clients=1", "expected a client for each; start 2 processes or fewer"),
    ],
)
def test_a_number_of_ranks_that_would_stop_a_run(tmp_path, setting, words):
    lines = table(3, tmp_path, setting, status=2)
    [failed] = [line for line in lines if line.startswith("FAIL")]
    assert lines[-1] == f"fedsp_mpi: check: world: {failed[21:]}" and words in lines[-1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["topology.ranks=5"], "world: found 1 ranks, expected topology.ranks=5"),
        (["model.name=/nowhere"], "model, data: model.name: found '/nowhere'"),
        (["federation.clients=100", "data.limit.train=50"], "model, data: found 50 "),
        ([*SEARCH, "search.forward=server"], "memory: host "),
        (["run.folder=/proc/runs"], "run folder: /proc/runs/"),
    ],
)
def test_what_would_stop_a_run(tmp_path, settings, words):
    lines, refused = alone(tmp_path, *settings)
    [failed] = [line for line in lines if line.startswith("FAIL")]
    assert refused.startswith(f"check: {words}") and failed[21:] in refused, (lines, refused)
    assert lines[-1].startswith("1 failed")


def test_several_failures_are_counted(tmp_path):
    lines, refused = alone(tmp_path, "topology.ranks=5", "model.name=/nowhere")
    assert len([line for line in lines if line.startswith("FAIL")]) == 2 and lines[-1].startswith(
        "2 failed"
    )
    assert refused.startswith("check: world: ") and refused.endswith(" (and 1 more)")


def test_a_memory_plan_that_exceeds_what_is_free_names_both(tmp_path):
    _, refused = alone(tmp_path, *SEARCH)
    need, free = (
        float(number)
        for number in re.findall(r"about (\S+) GiB needed, (\S+) GiB free", refused)[0]
    )
    # 4 bytes for each of 128 units of ten million tokens, many times over.
    assert need > 1e7 * 128 * 4 * 10 / GIB and 0 < free < need


@pytest.fixture(scope="module")
def with_faults(tmp_path_factory) -> list[str]:
    """A check on three ranks: two faults on rank 1, and two others on rank 2."""
    another_version = (
        "from importlib import metadata as m; was = m.version; "
        "m.version = lambda n: '0.0' if n == 'torch' else was(n)"
    )
    another_folder = (
        "from fedsp_mpi.record import probe; look = probe.look; "
        "probe.look = lambda f, r: look(f / 'not', r)"
    )
    no_input = (
        "from fedsp_mpi.commands.check_inputs import FolderView; look = FolderView.of; "
        "FolderView.of = lambda m, r: FolderView(look(m, r).folder, m['inputs'][:1])"
    )
    wrong_clock = "import time; now = time.time; time.time = lambda: now() - 5"
    faults = {1: f"{another_version}; {another_folder}", 2: f"{no_input}; {wrong_clock}"}
    fault = f"exec({faults}.get(launcher_rank(), ''), globals())"
    program = with_fault("launcher_rank()", fault)
    return table(3, tmp_path_factory.mktemp("check"), status=2, program=program)


def test_several_ranks_with_faults_are_counted(with_faults):
    assert "3 failed" in with_faults[-2] and with_faults[-1].endswith(" (and 2 more)")


def test_another_version_on_one_rank(with_faults):
    [versions] = of(with_faults, "versions")
    assert versions.startswith("FAIL") and "found torch 2" in versions
    assert "on rank 0, 2; torch 0.0 on rank 1" in versions


def test_a_folder_that_one_rank_does_not_share(with_faults):
    [folder] = of(with_faults, "run folder")
    assert folder.startswith("FAIL") and re.search(
        r"rank 1 on \S+ does not see .*; expected one folder that all hosts share$", folder
    )


def test_an_input_that_one_rank_does_not_see(with_faults):
    [inputs] = of(with_faults, "inputs")
    assert inputs.startswith("FAIL") and f"rank 2 does not see {RESOURCES / 'model'}" in inputs


def test_a_clock_that_is_wrong(with_faults):
    [clocks] = of(with_faults, "clocks")
    apart = re.search(r"at most (\S+) s apart \(rank 2, ", clocks)
    assert clocks.startswith("warn") and apart and abs(float(apart[1]) - 5) < 0.5


@pytest.mark.slow
def test_a_rank_whose_files_the_server_does_not_see(tmp_path):
    fault = "from fedsp_mpi.record import probe; probe.look = lambda f, r: {}"
    lines = table(3, tmp_path, status=2, program=with_fault(2, fault))
    assert "the server does not see what rank 2 on" in lines[-1]


@pytest.mark.slow
def test_a_report_of_a_rank_that_raises_is_one_and_nothing_stays(tmp_path):
    arguments = ["check", "--set", f"run.folder={tmp_path / 'runs'}"]
    fault = "from fedsp_mpi.comm import diagnostics; diagnostics.speed = None"
    result = run_mpi(3, [*with_fault(0, fault), *arguments], timeout=60, status=None)
    assert result.returncode not in (0, 2) and result.stderr.count("Traceback") == 1, both_ends(
        result
    )
    assert not (tmp_path / "runs").exists()


# Slurm.


def test_the_shell_of_a_job_is_told_that_it_is_one_process(tmp_path, monkeypatch):
    for name, value in {"JOB_ID": "7", "NTASKS": "4", "PROCID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    [world] = of(table(0, tmp_path), "world")
    assert (
        world.startswith("warn")
        and "the shell of a Slurm job of 4 tasks" in world
        and "srun or mpirun" in world
    )


def test_tasks_that_do_not_see_each_other_are_told_the_cause_and_the_cure(tmp_path):
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}
    [line] = table(0, tmp_path, status=2, **step)
    assert "world of 1 process, expected 4" in line and "--mpi=pmi2" in line
    assert re.search(r"mpi4py loads \((MPICH|Open MPI|Intel).* \d", line)


def test_fewer_ranks_than_the_job_has_tasks(in_a_job):
    [world] = of(in_a_job[1], "world")
    assert world.startswith("warn") and "the Slurm job has 4 tasks" in world


# Devices and threads, as introductions tell of them.


def introduction(host: str = "a", cores=(0, 1), **devices: dict) -> dict:
    return {"host": host, "cores": list(cores), "memory": 8 * GIB, "devices": devices}


def gpu(uuid: str, free: int = 80 * GIB) -> dict:
    return {"name": "cuda:0 H", "threads": 1, "uuid": uuid, "free": free}


def lines_of(judge, *arguments) -> list[str]:
    lines: list[str] = []
    judge(CheckReport(Log(lines.append)), *arguments)
    return lines


def test_ranks_that_share_a_gpu_are_named():
    gpus = [gpu("x"), gpu("y"), gpu("x"), gpu("x")]
    lines = lines_of(check_ranks._check_devices, [introduction(client=device) for device in gpus])
    assert lines == ["warn  device         GPU-x is shared by ranks 0, 2-3"]
    rank = introduction(server=gpu("x"), client=gpu("x"))
    assert (
        lines_of(check_ranks._check_devices, [rank]) == []
    )  # one process plays both roles in turn


def test_a_cpu_without_units_for_bf16_is_named(tmp_path):
    slow = {"name": "cpu", "threads": 1, "emulates": "bfloat16"}
    lines = lines_of(
        check_ranks._check_devices, [introduction(client=slow), introduction(client=slow)]
    )
    assert lines == [
        "warn  device         client.compute.dtype=bfloat16 on rank 0-1, whose CPU has "
        "no units for it and is faster "
        "with float32"
    ]
    for flags, expected in (
        ("flags : fma avx512f avx512_vnni", False),
        ("flags : fma avx512_bf16", True),
        ("flags : amx_bf16 amx_tile", True),
        ("Features : asimd bf16", True),
        ("", False),
    ):
        (tmp_path / "cpuinfo").write_text(f"processor : 0\n{flags}\n")
        assert placement.has_bf16(tmp_path / "cpuinfo") is expected


@pytest.mark.slow
def test_a_device_that_is_not_there(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    lines = table(2, tmp_path, "client.compute.device=cuda", status=2)
    assert "device: rank 1 on" in lines[-1] and "found no CUDA device" in lines[-1]


@pytest.mark.slow
def test_a_compiler_that_is_not_there(tmp_path):
    lines = table(2, tmp_path, "client.compute.compile=true", status=2, CXX="/no/compiler")
    assert "device: rank 1 on" in lines[-1]
    assert "found no compiler that works on this host" in lines[-1]
    assert "expected a C++ compiler, such as g++" in lines[-1]


def test_more_threads_than_cores():
    def cpu(threads: int) -> dict:
        return {"name": "cpu", "threads": threads}

    fits = [
        introduction(cores=range(4), server=cpu(2)),
        introduction(cores=range(4), client=cpu(2)),
    ]
    assert lines_of(check_ranks._check_threads, fits)[0].startswith(
        "ok    cores          a: 4 threads in all, 4 cores"
    )
    [full] = lines_of(
        check_ranks._check_threads, [*fits, introduction(cores=range(4), client=cpu(1))]
    )
    assert full.startswith("warn  cores          a: 5 threads in all, 4 cores")
    bound = [introduction(cores=[0, 1, 2], server=cpu(1)), introduction(cores=[3], client=cpu(2))]
    assert "rank 1 is bound to fewer" in lines_of(check_ranks._check_threads, bound)[0]
    apart = [introduction("a", [0], server=cpu(1)), introduction("b", [0], client=cpu(1))]
    assert [line[:5] for line in lines_of(check_ranks._check_threads, apart)] == ["ok   ", "ok   "]
    one_process = [introduction(cores=[0, 1], server=cpu(2), client=cpu(2))]
    assert lines_of(check_ranks._check_threads, one_process)[0].startswith("ok")  # in turn


def test_versions_that_differ_and_those_that_are_missing():
    versions = {"fedsp_mpi": "1", "python": "3", "torch": "2", "h5py": "4"}
    assert lines_of(check_ranks._check_versions, [versions, versions])[0].startswith("ok")
    lines = lines_of(check_ranks._check_versions, [versions, versions | {"h5py": "5"}])
    assert (
        len(lines) == 1
        and "found h5py 4 on rank 0; h5py 5 on rank 1; expected the same" in lines[0]
    )
    lines = lines_of(check_ranks._check_versions, [versions | {"h5py": "not installed"}] * 2)
    assert len(lines) == 1 and lines[0].startswith("FAIL") and "found no h5py" in lines[0]


# The plan of memory and disk.


@pytest.mark.each_once
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("projection", [None, 8])
def test_sizes_are_those_of_the_real_models(tmp_path, family, projection):
    folder = tiny.model_folder(tmp_path / family, family)
    tiny.tokenizer().save_pretrained(folder)
    settings = [
        f"model.name={folder}",
        "auxiliary.layers_per_cell=2",
        "auxiliary.depth=3",
        "prompt.num_tokens=5",
    ]
    settings += [f"prompt.projection={projection}"] if projection else []
    materials = ExperimentInputs(config.load(None, settings))
    sizes = memory.ModelSizes.of(materials, 10)
    model = tiny.load(folder)
    cell = auxiliary.unroll(auxiliary.cut(model, tiny.cell(2)), 3)
    assert sizes.global_model == model.num_parameters()
    assert sizes.auxiliary == backbone.LanguageModel(cell).num_parameters() < sizes.global_model
    assert sizes.prompt == materials.first_prompt(model).num_parameters()
    assert (sizes.num_layers, sizes.depth, sizes.width, sizes.length) == (
        tiny.LAYERS,
        3,
        tiny.WIDTH,
        15,
    )
    if not projection:
        assert sizes.wire * tiny.LAYERS == sizes.prompt * 3
    seal.clear()


SIZES = memory.ModelSizes(1000, 100, 30, 20, num_layers=4, depth=4, width=8, length=16)


def test_the_plan_counts_weights_optimizers_and_resting_clients():
    still = [
        "distillation.stage.steps=0",
        "server.tuning.steps=0",
        "client.alignment.steps=0",
        "client.tuning.steps=1",
    ]
    settings = config.load(
        None, [*still, "client.tuning.batch_size=1", "server.compute.dtype=bfloat16"]
    )
    other_bytes = (
        16 * 20 + 16 * 8 * 32 * 4 * 4
    )  # of what is trained: itself, gradient, two moments; activations
    assert memory.client(settings, SIZES, 1) == memory.MemoryNeed(
        4 * 100 + other_bytes, 4 * 100 + 12 * 20
    )
    joint = config.load(None, [*still, "client.tuning.batch_size=1", "client.training=joint"])
    assert memory.client(joint, SIZES, 1) == memory.MemoryNeed(
        16 * 100 + other_bytes, 4 * 100 + 12 * 120
    )
    assert memory.client(joint, SIZES, 20) == memory.MemoryNeed(
        16 * 100 + other_bytes, 4 * 100 + 8 * 12 * 120
    )  # resident
    restarted = config.load(
        None, [*still, "client.tuning.batch_size=1", "federation.client_state=restarted"]
    )
    assert memory.client(restarted, SIZES, 20).host == 4 * 100
    assert memory.server(settings, SIZES).device == 2 * 1000 + 2 * 1000  # scored in fp32
    assert memory.server(restarted, SIZES).device == 4 * 1000 + 16 * 2 * 30


def test_the_plan_is_summed_by_host_and_by_gpu():
    settings = config.load(None, ["federation.clients=4"])
    server, client = memory.server(settings, SIZES), memory.client(settings, SIZES, 2)
    ranks = [
        introduction("a", server=gpu("x", 5 * GIB)),
        introduction("a", client=gpu("x", 4 * GIB)),
        introduction("b", client={"name": "cpu", "threads": 1}) | {"memory": 2 * GIB},
    ]
    assert memory.plan(settings, SIZES, ranks) == [
        memory.MemoryBudget("host a", 2 * memory.LIBRARIES + server.host + client.host, 8 * GIB),
        memory.MemoryBudget("GPU x", server.device + client.device, 4 * GIB),
        memory.MemoryBudget("host b", memory.LIBRARIES + client.host + client.device, 2 * GIB),
    ]


@pytest.mark.slow
def test_the_plan_is_near_what_a_run_takes(tmp_path):
    """A model that weighs more than the libraries' spread: 30 million parameters, of which the cell
    has 24.
    """
    folder = tiny.model_folder(
        tmp_path / "model", "llama", hidden_size=512, intermediate_size=512, vocab_size=40000
    )
    tiny.tokenizer().save_pretrained(folder)
    data = tiny.data_folder(tmp_path / "data")
    short = (
        "federation.rounds=2",
        "federation.clients=2",
        "distillation.stage.steps=2",
        "client.alignment.steps=2",
    )
    more = (
        "client.tuning.steps=2",
        "server.tuning.steps=2",
        "data.limit.test=4",
        "evaluation.server_only=false",
    )
    devices = ("server.compute.device=cpu", "client.compute.device=cpu")
    where = (f"model.name={folder}", f"data.source={data}", f"run.folder={tmp_path / 'runs'}")
    settings = [*where, *devices, *short, *more]
    arguments = [item for setting in settings for item in ("--set", setting)]
    run_mpi(3, ["-m", "fedsp_mpi", "run", "--name", "n", *arguments], timeout=200)
    peaks = [rank["host"] for rank in read(tmp_path / "runs" / "n").sections["memory"]["ranks"]]
    chosen = config.load(None, settings)
    sizes = memory.ModelSizes.of(ExperimentInputs(chosen), 10)
    needs = [
        memory.server(chosen, sizes),
        memory.client(chosen, sizes, 1),
        memory.client(chosen, sizes, 1),
    ]
    planned = sum(memory.LIBRARIES + need.device + need.host for need in needs)
    assert planned / 1.5 < sum(peaks) < planned * 1.33, (peaks, planned)


# What is free.


def test_free_memory_is_the_host_s_where_no_group_limits_it(tmp_path):
    (tmp_path / "cgroup").write_text("0::/\n")
    lines = Path("/proc/meminfo").read_text()
    free, total = free_memory(tmp_path / "cgroup", tmp_path), re.search(r"MemTotal: +(\d+)", lines)
    assert total and 0 < free < int(total[1]) << 10


@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_is_a_job_s_where_it_has_less(tmp_path, version):
    root = tmp_path / "sys"
    job = root / ("slurm/job_7" if version == 2 else "memory/slurm/job_7")
    (job / "step_0").mkdir(parents=True)
    names = (
        ("memory.max", "memory.current")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    )
    for folder, limit in ((job, "1000000"), (job / "step_0", "max")):
        (folder / names[0]).write_text(limit + "\n")
        (folder / names[1]).write_text("400000\n")
        (folder / "memory.stat").write_text(
            "anon 5\ninactive_file 100000\ntotal_inactive_file 100000\n"
        )
    prefix = "0::" if version == 2 else "4:memory:"
    (tmp_path / "cgroup").write_text(f"9:cpu:/\n{prefix}/slurm/job_7/step_0\n")
    assert free_memory(tmp_path / "cgroup", root) == 700000


# The run folder's probe.


def test_probe_finds_nothing_wrong_and_leaves_nothing(tmp_path):
    probe = Probe(tmp_path / "new" / "runs")
    assert [look(probe.folder, rank) for rank in range(3)] == [{}] * 3
    assert all(probe.heard_from(rank) for rank in range(3)) and probe.free > 0
    probe.remove()
    probe.remove()
    assert list(tmp_path.iterdir()) == []


def test_probe_tells_what_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr("fedsp_mpi.record.probe._PATIENCE", 0.1)
    probe = Probe(tmp_path)
    assert "does not see" in look(tmp_path / "elsewhere", 1)["reading"]
    assert not probe.heard_from(1)
    (probe.folder / "2").mkdir()
    assert "cannot write" in look(probe.folder, 2)["writing"]
    probe._lock.close()
    assert "is not seen" in look(probe.folder, 3)["locking"]
    probe.remove()


def test_clients_do_not_import_torch_for_the_check(tmp_path):
    """What each rank says of itself must be quick where many share a core."""
    place = SimpleNamespace(rank=1, size=2, host="a", local_rank=1, local_size=2)
    code = f"""
        import sys
        from types import SimpleNamespace
        from fedsp_mpi import config
        from fedsp_mpi.comm import diagnostics
        from fedsp_mpi.commands import check
        diagnostics.library = lambda wire: {{}}
        wire = SimpleNamespace(topology=SimpleNamespace(**{vars(place)}))
        introduction = check._introduction(config.load(None, []), wire, None)
        print(sorted(introduction), "torch" in sys.modules)
    """
    if any(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("there may be a GPU to name")
    assert run_mpi(0, ["-c", textwrap.dedent(code)]).stdout.strip().endswith("False"), sys.version
