"""Model folders that bring code, quantised weights or pickles: refused at once, by every verb, and
nothing is run.
"""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsp_mpi import cli
from fedsp_mpi.models import auxiliary, backbone
from fedsp_mpi.run.inputs import RESOURCES
from fedsp_mpi.tensors import seal
from helpers import tiny
from helpers.runs import SHORT

EVIL = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"
MODEL = {
    "auto_map": {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilForCausalLM"}
}
TOKENIZER = {"auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", None]}}


@pytest.fixture(autouse=True)
def unsealed():
    yield
    seal.clear()


@pytest.fixture
def folder(tmp_path) -> Path:
    """The embedded model with a file of code beside it, which leaves a trace when it is run."""
    shutil.copytree(RESOURCES / "model", tmp_path / "model")
    (tmp_path / "model" / "evil.py").write_text(EVIL)
    return tmp_path / "model"


def change(folder: Path, file: str, **more: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def ends(capsys, monkeypatch, folder: Path, verb: str, *more: str) -> str:
    """Return the one line with which a verb refuses a model folder, nothing asked or run."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    settings = (*SHORT, f"model.name={folder}", f"run.folder={folder.parent / 'runs'}", *more)
    status = cli.main([verb, *(item for text in settings for item in ("--set", text))])
    said = capsys.readouterr()
    lines = said.err.strip().splitlines()
    assert status == 2 and len(lines) == 1 and "Traceback" not in said.out, (status, said)
    assert not (folder / "ran").exists()
    return lines[0]


@pytest.mark.parametrize("verb", ["run", "check", "plan", "fetch"])
def test_code_of_a_models_own_is_refused_at_once_by_every_verb(folder, verb, capsys, monkeypatch):
    change(folder, "config.json", **MODEL)
    line = ends(capsys, monkeypatch, folder, verb)
    assert (
        "config.json asks to run code of its own (evil.EvilConfig)" in line and "expected" in line
    )
    change(folder, "config.json", model_type="evil")  # of no family that transformers has
    assert "code of its own" in ends(capsys, monkeypatch, folder, verb)


@pytest.mark.parametrize("verb", ["run", "fetch"])
def test_code_of_a_tokenizers_own_is_refused_wherever_it_lies(folder, verb, capsys, monkeypatch):
    change(folder, "tokenizer_config.json", **TOKENIZER)
    assert "tokenizer_config.json asks to run code of its own" in ends(
        capsys, monkeypatch, folder, verb
    )
    shutil.copytree(folder, folder.with_name("other"))
    shutil.copy(RESOURCES / "model" / "tokenizer_config.json", folder)
    line = ends(capsys, monkeypatch, folder, verb, f"model.tokenizer={folder.with_name('other')}")
    assert "model.tokenizer" in line and "evil.EvilTokenizer" in line


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_attention_from_the_hub_is_code_too(folder, key):
    change(folder, "config.json", **{key: "someone/kernel"})
    with pytest.raises(ValueError, match=r"asks to run code of its own \(someone/kernel\)"):
        backbone.read_config(str(folder))
    change(folder, "config.json", **{key: "sdpa"})
    backbone.read_config(str(folder))


def test_a_class_that_transformers_has_itself_is_read_by_its_own_code(tmp_path):
    """As in Phi-3's repository; what is written later names no code any more."""
    folder = Path(tiny.model_folder(tmp_path / "model", "phi3"))
    names = {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    }
    change(folder, "config.json", auto_map=names)
    (folder / "modeling_phi3.py").write_text(EVIL)
    (folder / "configuration_phi3.py").write_text(EVIL)
    model = tiny.load(str(folder))
    small = backbone.LanguageModel(auxiliary.unroll(auxiliary.cut(model, tiny.cell(1)), 4))
    auxiliary.save(
        tmp_path / "auxiliary", small, 1, tokenizer=tiny.tokenizer(), recipe={"depth": 4}
    )
    assert (
        type(model.model).__module__.startswith("transformers.") and not (folder / "ran").exists()
    )
    assert "auto_map" not in json.loads((tmp_path / "auxiliary" / "config.json").read_text())
    change(tmp_path / "auxiliary", "config.json", **MODEL)
    with pytest.raises(ValueError, match="code of its own"):
        auxiliary.load(tmp_path / "auxiliary")


@pytest.mark.parametrize(
    "quantised",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "compressed-tensors"},
    ],
    ids=lambda settings: settings["quant_method"],
)
def test_quantised_weights_are_refused_with_advice_that_helps(folder, quantised):
    change(folder, "config.json", quantization_config=quantised)
    with pytest.raises(
        ValueError, match="name the unquantised model that it was made from"
    ) as told:
        backbone.read_config(str(folder))
    assert f"quantised ({quantised['quant_method']}), expected" in str(
        told.value
    ) and "\n" not in str(told.value)


def test_an_adapter_beside_a_configuration_is_refused(folder):
    """transformers would load the model that the adapter names in the place of the one that lies
    there.
    """
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "someone/else"})
    )
    with pytest.raises(ValueError, match=r"adapter_config.json, .* expected a whole model; merge"):
        backbone.read_config(str(folder))


def test_a_pickle_that_runs_code_is_not_opened(tmp_path):
    folder = Path(tiny.model_folder(tmp_path / "model", "gpt2"))
    state = tiny.load(str(folder)).model.state_dict()

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (folder / "ran",)

    (folder / "model.safetensors").unlink()
    torch.save({**state, "evil": Evil()}, folder / "pytorch_model.bin", pickle_module=pickle)
    with pytest.raises(
        ValueError, match=r"model.name: found .* pickled with more than numbers in them"
    ) as told:
        tiny.load(str(folder))
    assert "\n" not in str(told.value) and not (folder / "ran").exists()
    torch.save(state, folder / "pytorch_model.bin")
    assert tiny.load(str(folder)).num_parameters() > 0


def test_a_script_in_a_data_folder_is_not_run(tmp_path):
    from fedsp_mpi.data import loading

    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "data.py").write_text(EVIL)
    with pytest.raises(ValueError, match="found no data file"):
        loading.load("sst2", str(tmp_path / "data"), seed=0)
    assert not (tmp_path / "data" / "ran").exists()
