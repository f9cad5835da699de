"""`fetch`, what a run says where nothing was fetched, and who reads first on a host."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import datasets
import pytest

from fedsp_mpi import config
from fedsp_mpi.commands.fetch import fetch as fetch_all
from fedsp_mpi.log import Log
from fedsp_mpi.record import read
from fedsp_mpi.run.inputs import RESOURCES
from fedsp_mpi.run.ranks import load_waves
from helpers.mpi import both_ends, run_mpi
from helpers.paths import PROGRAMS

NO_HUB = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}
SHORT = (
    "federation.rounds=1",
    "federation.clients=3",
    "distillation.stage.steps=2",
    "client.alignment.steps=1",
    "client.tuning.steps=1",
    "server.tuning.steps=1",
    "data.limit.train=64",
    "data.limit.validation=16",
    "data.limit.test=16",
    "evaluation.server_only=false",
)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def short(folder: Path, *more: str) -> list[str]:
    return [
        item for setting in (*SHORT, f"run.folder={folder}", *more) for item in ("--set", setting)
    ]


def configuration(folder: Path, **sections: dict) -> Path:
    """A configuration of a model and a data set that the hub has."""
    content = {
        "model": {"name": "some/model"},
        "data": {"task": "multiple_choice", "source": "some/world"},
    }
    path = folder / "tiny.yaml"
    path.write_text(json.dumps({"prompt": {"num_tokens": 16}} | content | sections))
    return path


def cached_model(home: Path, name: str = "some/model") -> Path:
    """The embedded model, laid out as the hub's cache has it."""
    top = home / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = top / "snapshots" / COMMIT
    shutil.copytree(RESOURCES / "model", snapshot)
    (top / "refs").mkdir()
    (top / "refs" / "main").write_text(COMMIT)
    return snapshot


def cached_data(home: Path, name: str = "some/world") -> Path:
    """The embedded world, laid out as `datasets` leaves a hub set in its cache."""
    builder = datasets.load_dataset_builder(str(RESOURCES / "data"), cache_dir=str(home / "made"))
    builder.download_and_prepare()
    target = home / "datasets" / name.replace("/", "___") / "default" / "0.0.0" / COMMIT
    target.mkdir(parents=True)
    for file in Path(builder.cache_dir).iterdir():
        shutil.copy(
            file, target / file.name.replace(f"{builder.dataset_name}-", f"{name.split('/')[1]}-")
        )
    return target


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """An empty HF_HOME, and no hub."""
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for name, value in NO_HUB.items():
        monkeypatch.setenv(name, value)
    return tmp_path / "home"


def fetch(*arguments: str | Path, status: int = 0) -> str:
    """What `fetch` says: its lines, or the one line of its mistake."""
    result = run_mpi(0, ["-m", "fedsp_mpi", "fetch", *arguments], timeout=60, status=status)
    if status:
        assert len(result.stderr.strip().splitlines()) == 1 and not result.stdout, both_ends(result)
    return result.stderr.strip() if status else result.stdout


def test_nothing_named_is_nothing_to_do():
    assert fetch().startswith("nothing to fetch")


def test_local_folders_are_looked_at(tmp_path, home):
    path = configuration(tmp_path, model={"name": "embedded"}, data={"source": "embedded"})
    *lines, advice = fetch(path).splitlines()
    assert "HF_HUB_OFFLINE=1" in advice
    assert [line.split(":")[0] for line in lines] == [
        "model embedded",
        "data multiple_choice",
        "weights",
    ]
    size = (RESOURCES / "model" / "model.safetensors").stat().st_size
    assert f"here, 1 files, {size / 1e6:.1f} MB in {RESOURCES / 'model'}" in lines[2]
    assert not (home / "hub").exists()


@pytest.mark.slow
def test_a_silo_s_hub_set_lies_in_a_cache_of_its_own(tmp_path, home, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # or `datasets` asks the hub again and again
    cached_data(home)
    cache = tmp_path / "silos"
    cache.mkdir()
    (home / "datasets").rename(cache / "north")
    path = configuration(
        tmp_path,
        model={"name": "embedded"},
        data={"task": "multiple_choice"},
        federation={
            "silos": [{"name": "north", "source": "some/world"}],
            "silo_cache": str(cache),
        },
        server={"data": {"source": str(RESOURCES / "data")}},
    )
    [line] = [line for line in fetch(path).splitlines() if line.startswith("silo north: ")]
    assert " 3 files, " in line and f" in {cache / 'north'}" in line


@pytest.mark.parametrize("damage", ["cut", "empty", "missing", "shard"])
def test_damaged_weights_of_a_folder_are_found(tmp_path, monkeypatch, damage):
    model = tmp_path / "model"
    shutil.copytree(RESOURCES / "model", model)
    weights = model / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "empty":
        weights.write_bytes(b"")
    else:
        weights.unlink()
    if damage == "shard":
        index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    settings = config.load(None, [f"model.name={model}"])
    with pytest.raises(ValueError) as error:
        fetch_all(settings, Log())
    line = str(error.value)
    words = {
        "cut": "damaged weights",
        "empty": "no bytes",
        "missing": "no weights",
        "shard": "nothing",
    }[damage]
    assert "\n" not in line and f"found {words}" in line and str(model) in line, line


@pytest.mark.slow
def test_what_the_cache_holds_is_not_asked_for_again_and_a_run_needs_no_network(tmp_path, home):
    snapshot, prepared = cached_model(home), cached_data(home)
    path = configuration(tmp_path)
    output = run_mpi(
        0, ["-m", "fedsp_mpi", "fetch", path], timeout=60, env={"HF_HUB_OFFLINE": "1"}
    ).stdout
    assert output.count(": here, ") == 3, output
    assert str(snapshot) in output and str(prepared) in output, output
    offline = {"HF_HUB_OFFLINE": "1"}
    run_mpi(
        2,
        ["-m", "fedsp_mpi", "run", path, "--name", "n", *short(tmp_path / "runs")],
        timeout=120,
        env=offline,
    )
    assert read(tmp_path / "runs" / "n").status == "complete"


@pytest.mark.each_once
@pytest.mark.parametrize("missing", ["model", "weights", "data"])
@pytest.mark.parametrize("n", [0, 2])
def test_a_run_on_a_node_without_network_names_the_command_that_fetches(tmp_path, home, missing, n):
    if missing != "model":
        snapshot = cached_model(home)
    if missing == "weights":
        (snapshot / "model.safetensors").unlink()
    if missing != "data":
        cached_data(home)
    path = configuration(tmp_path)
    begin = time.monotonic()
    settings = [*short(tmp_path / "runs", "model.revision=main"), "--name", "n"]
    env = {"HF_HUB_OFFLINE": "1"} if missing == "weights" else {}
    result = run_mpi(n, ["-m", "fedsp_mpi", "run", path, *settings], timeout=60, status=2, env=env)
    assert time.monotonic() - begin < 30
    line = result.stderr.strip()
    expected = (
        f"run `python -m fedsp_mpi fetch {path} --set data.limit.train=64 --set "
        "data.limit.validation=16"
    )
    assert (
        "\n" not in line and expected in line and "--set model.revision=main` on a machine" in line
    ), both_ends(result)
    assert "distil" not in result.stdout and not (tmp_path / "runs" / "n").exists()


def test_fetch_on_a_node_without_network_says_so(tmp_path, home):
    begin = time.monotonic()
    line = fetch(configuration(tmp_path), status=2)
    assert time.monotonic() - begin < 30
    assert "model.name: found 'some/model'" in line and "Connection refused" in line


def test_one_process_fetches():
    result = run_mpi(2, ["-m", "fedsp_mpi", "fetch"], timeout=60, status=2)
    assert result.stderr.count("found 2 processes, expected one") == 1, both_ends(result)


def test_a_mistake_in_any_configuration_is_found_before_anything_is_fetched(tmp_path, home):
    good = configuration(tmp_path, model={"name": "embedded"}, data={"source": "embedded"})
    (tmp_path / "bad.yaml").write_text("modell: {}")
    assert "did you mean 'model'" in fetch(good, tmp_path / "bad.yaml", status=2)


@pytest.mark.slow
def test_first_a_rank_of_each_host_then_the_others(tmp_path):
    (tmp_path / "times").mkdir()
    program = [PROGRAMS / "turns.py", tmp_path / "times", "run", "--name", "turns"]
    run_mpi(4, [*program, *short(tmp_path / "runs", "federation.clients=3")], timeout=120)
    times = {
        int(path.name): [float(t) for t in path.read_text().split()]
        for path in (tmp_path / "times").iterdir()
    }
    assert sorted(times) == [0, 1, 2, 3]
    for first, second in ((0, 1), (2, 3)):
        assert times[first][1] < times[second][0], times


def test_ranks_take_turns_only_where_a_host_has_several_that_did_not_read_yet():
    assert load_waves(["a"]) == [{0}]
    assert load_waves(["a"] * 4) == [{0, 1, 2, 3}]
    assert load_waves(["a", "a", "b", "c"]) == [{0, 1, 2, 3}]
    assert load_waves(["a", "b", "a", "b", "c", "b", "c"]) == [{0, 1, 2, 4}, {3, 5, 6}]
