"""Which files of clients' states stay on disk, as clients train and are checkpointed."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from fedsp_mpi.record import Checkpoints
from fedsp_mpi.record.checkpoint import client_file
from fedsp_mpi.record.client_cache import ClientStateCache
from fedsp_mpi.tensors import State

CLIENTS = range(9)


class Holder:
    """Keeps the states that are in memory, as a method does."""

    def __init__(self) -> None:
        self.states: dict[int, State] = {}

    def has_state(self, client: int) -> bool:
        return client in self.states

    def client_state(self, client: int) -> State:
        return self.states[client]

    def load_client_state(self, client: int, state: State) -> None:
        self.states[client] = state

    def forget(self, client: int) -> None:
        self.states.pop(client, None)


@pytest.mark.parametrize("every", [1, 3])
def test_files_stay_as_long_as_a_checkpoint_that_is_kept_refers_to_them(
    every: int, tmp_path: Path
) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.folder.mkdir()
    holder = Holder()
    cache = ClientStateCache(holder, checkpoints, max_in_memory=2, files={})
    dice = random.Random(7)
    trained: dict[int, int] = {}  # client -> the last round in which it trained
    manifests: dict[int, set[str]] = {}  # round -> the clients' files that it refers to
    for round in range(1, 31):
        ids = sorted(dice.sample(CLIENTS, 3))
        cache.start_round(ids)
        kept = set().union(*manifests.values())
        on_disk = {path.name for path in checkpoints.folder.glob("client-*")}
        assert kept <= on_disk
        others = [name.removesuffix(".safetensors").split("-")[1] for name in on_disk - kept]
        assert len(set(others)) == len(others)  # besides, at most the newest file of each client

        for client in ids:
            cache.load(client)
            before = holder.states.pop(client, {"round": np.array(0)})
            assert before["round"] == trained.get(client, 0)
            holder.states[client] = {"round": np.array(round)}
            trained[client] = round
            cache.store(client, round)
        if round % every == 0:
            files = cache.save()
            assert {client: file.round for client, file in files.items()} == trained
            checkpoints.commit(round, {"round": np.array(round)}, files, keep=2)
            manifests[round] = {client_file(*pair) for pair in trained.items()}
            for old in sorted(manifests)[:-2]:
                del manifests[old]
    assert checkpoints.newest()[0] is not None
