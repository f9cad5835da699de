"""Models by their hub name: the cache needs no network, what it lacks is fetched, and offline is
one line.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from helpers import tiny
from helpers.paths import ROOT

NOWHERE = "http://127.0.0.1:9"
SHA, OTHER_SHA = "a" * 40, "b" * 40
ADVICE = "run `python -m fedsp_mpi fetch CONFIG` on a machine with network first"
PROGRAM = """
import json, sys, time
import torch
from fedsp_mpi.models import backbone

backbone.quiet()
start, found = time.perf_counter(), {}
for name in sys.argv[1:]:
    for what, read in (
        ("config", backbone.read_config),
        ("tokenizer", backbone.read_tokenizer),
        ("weights", lambda name: backbone.load_global(name, device=torch.device("cpu"))),
    ):
        try:
            read(name)
            found[f"{name} {what}"] = ""
        except ValueError as error:
            found[f"{name} {what}"] = str(error)
print(json.dumps({"found": found, "seconds": time.perf_counter() - start}))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A whole model of each family, below its name."""
    folder = tmp_path_factory.mktemp("models")
    alphabet = {
        token: number
        for number, token in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    }
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(alphabet, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    for family in tiny.FAMILIES:
        tiny.model_folder(folder / family, family)
        PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder / family)
    return folder


def cached(cache: Path, name: str, source: Path, *files: str) -> None:
    """Put files of a folder into a cache as org/name."""
    repository = cache / f"models--org--{name}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(SHA)
    (repository / "snapshots" / SHA).mkdir(parents=True)
    for file in files:
        shutil.copy(source / file, repository / "snapshots" / SHA)


def read(cache: Path, endpoint: str, *names: str) -> tuple[dict[str, str], float, str]:
    """Read models in a process of its own: what was wrong with each part, the seconds it took, the
    error stream.
    """
    free = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("HF_", "TRANSFORMERS_"))
    }
    places = {
        "HF_HOME": str(cache),
        "HF_HUB_CACHE": str(cache),
        "HF_ENDPOINT": endpoint,
        "NO_PROXY": "*",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *(f"org/{name}" for name in names)],
        cwd=ROOT,
        env=free | places | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    return told["found"], told["seconds"], done.stderr


def repository(folder: Path, path: str) -> tuple[Path, str]:
    """The folder that an address speaks of, and what is wanted of it."""
    parts = path.removeprefix("/api/models").strip("/").split("/")
    return folder / parts[1], "/".join(parts[2:])


@contextmanager
def hub(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """A hub that has the folders below `folder` as org/NAME: its address, and the files that were
    taken from it.
    """
    taken: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, with_body: bool) -> None:
            path = urlsplit(self.path).path
            source, rest = repository(folder, path)
            files = {file.name: file for file in source.glob("*") if file.is_file()}
            if not files:
                return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, with_body)
            if not path.startswith("/api/"):
                return self._file(files, rest.split("/")[-1], with_body)
            listed = [
                {"type": "file", "path": n, "size": f.stat().st_size, "oid": n}
                for n, f in files.items()
            ]
            about = {
                "id": f"org/{source.name}",
                "sha": OTHER_SHA,
                "siblings": [{"rfilename": name} for name in files],
            }
            return self._send(
                200,
                json.dumps(listed if rest.startswith("tree") else about).encode(),
                {},
                with_body,
            )

        def _file(self, files: dict[str, Path], name: str, with_body: bool) -> None:
            if name not in files:
                return self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, with_body)
            if with_body:
                taken.append(name)
            headers = {"X-Repo-Commit": OTHER_SHA, "ETag": f'"{name}"'}
            return self._send(200, files[name].read_bytes(), headers, with_body)

        def _send(self, status: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", taken
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_what_is_not_in_the_cache_of_an_offline_machine_is_one_line(models, tmp_path):
    for family in tiny.FAMILIES:
        cached(tmp_path, family, models / family, "config.json")
    found, seconds, stderr = read(tmp_path, NOWHERE, *tiny.FAMILIES, "absent")
    assert seconds < 60 and "Retry" not in stderr, (
        stderr
    )  # nobody waits for a network that is not there
    for family in tiny.FAMILIES:
        assert found[f"org/{family} config"] == ""
        for part, key in (("tokenizer", "model.tokenizer"), ("weights", "model.name")):
            message = found[f"org/{family} {part}"]
            assert (
                message.startswith(f"{key}: found 'org/{family}', ")
                and f"whose {part} the local cache" in message
            )
    assert "whose config.json the local cache" in found["org/absent config"]
    wrong = [message for message in found.values() if message]
    assert len(wrong) == 2 * len(tiny.FAMILIES) + 3
    for message in wrong:
        assert message.endswith(ADVICE) and "\n" not in message and "expected" in message


def test_a_cached_model_needs_no_network(models, tmp_path):
    for family in tiny.FAMILIES:
        cached(
            tmp_path, family, models / family, *(file.name for file in (models / family).iterdir())
        )
    parts = tmp_path / "parts"
    AutoModelForCausalLM.from_pretrained(models / "gpt2").save_pretrained(
        parts, max_shard_size="40KB"
    )
    shards = sorted(file.name for file in parts.glob("model-*.safetensors"))
    assert len(shards) > 1
    files = ["config.json", "model.safetensors.index.json"]
    cached(tmp_path, "sharded", parts, *files, *shards)
    cached(tmp_path, "torn", parts, *files, *shards[1:])
    found, seconds, stderr = read(tmp_path, NOWHERE, *tiny.FAMILIES, "sharded", "torn")
    assert seconds < 60 and "Retry" not in stderr, stderr
    wrong = {part for part, message in found.items() if message}
    assert wrong == {"org/sharded tokenizer", "org/torn tokenizer", "org/torn weights"}
    assert "whose weights the local cache does not hold" in found["org/torn weights"]


@pytest.mark.slow
def test_what_is_not_in_the_cache_is_fetched_once(models, tmp_path):
    served, cache = tmp_path / "served", tmp_path / "cache"
    shutil.copytree(models, served)
    for family in tiny.FAMILIES:
        (served / family / "pytorch_model.bin").write_bytes(b"the same weights again")
        (served / family / "tf_model.h5").write_bytes(b"and again")
    cached(cache, "gpt2", models / "gpt2", "config.json")
    cached(cache, "llama", models / "llama", "config.json")
    with hub(served) as (endpoint, taken):
        found, _, _ = read(cache, endpoint, *tiny.FAMILIES, "absent")
        assert {part for part, message in found.items() if message} == {
            f"org/absent {what}" for what in ("config", "tokenizer", "weights")
        }
        assert "fetch" not in found["org/absent config"] and "404" in found["org/absent config"]
        assert (
            taken.count("model.safetensors") == taken.count("tokenizer.json") == len(tiny.FAMILIES)
        )
        assert {"pytorch_model.bin", "tf_model.h5"}.isdisjoint(taken)
        before = len(taken)
        again, _, _ = read(cache, endpoint, *tiny.FAMILIES)
        assert len(taken) == before and not any(again.values())
    offline, _, stderr = read(cache, NOWHERE, *tiny.FAMILIES)
    assert not any(offline.values()) and "Retry" not in stderr, (offline, stderr)
