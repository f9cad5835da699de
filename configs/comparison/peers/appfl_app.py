"""The work by APPFL over MPI: mpirun -n 3 python appfl_app.py WORK

Rank 0 is the server, the others share the clients.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from appfl.agent import ServerAgent
from appfl.algorithm.aggregator import FedAvgAggregator
from appfl.comm.mpi import MPIClientCommunicator, MPIServerCommunicator
from appfl.config import ServerAgentConfig
from mpi4py import MPI
from omegaconf import DictConfig, OmegaConf
from work import Work


class ValidatingAggregator(FedAvgAggregator):
    """APPFL's mean, which is validated after every round."""

    def __init__(self, aggregator_configs: DictConfig, logger: logging.Logger) -> None:
        super().__init__(None, aggregator_configs, logger)
        self._work = Work(aggregator_configs.work)
        self.global_state = {"prompt": torch.from_numpy(self._work.prompt())}
        self._round = 0

    def aggregate(self, local_models: dict, **settings: object) -> dict:
        """Return the mean, and print its loss."""
        merged = super().aggregate(local_models, **settings)
        self._round += 1
        self._work.load(merged["prompt"])
        print(f"round {self._round} loss {self._work.validation_loss():.6f}", flush=True)
        return merged


def serve(comm: MPI.Comm, folder: str) -> None:
    """Play the server until all clients have ended."""
    settings = json.loads((Path(folder) / "settings.json").read_text(encoding="utf-8"))
    server = {
        "num_clients": settings["clients"],
        "num_global_epochs": settings["rounds"],
        "scheduler": "SyncScheduler",
        "scheduler_kwargs": {"num_clients": settings["clients"], "optimize_memory": False},
        "aggregator": "ValidatingAggregator",
        "aggregator_path": str(Path(__file__).resolve()),
        "aggregator_kwargs": {
            "client_weights_mode": "equal",
            "work": folder,
            "optimize_memory": False,
        },
        "optimize_memory": False,  # its default takes several times as long
        "logging_output_dirname": os.environ.get("TMPDIR", "/tmp"),
    }
    config = ServerAgentConfig(client_configs=OmegaConf.create(), server_configs=DictConfig(server))
    agent = ServerAgent(config)
    quiet = logging.getLogger("quiet")
    quiet.setLevel(logging.ERROR)
    MPIServerCommunicator(comm, agent, logger=quiet).serve()


def train(comm: MPI.Comm, folder: str) -> None:
    """Play this rank's share of the clients in all rounds."""
    work = Work(folder)
    num_ranks = comm.Get_size() - 1
    clients = list(range(comm.Get_rank() - 1, work.settings["clients"], num_ranks))
    server = MPIClientCommunicator(comm, server_rank=0, client_ids=clients, optimize_memory=False)
    prompt = server.get_global_model()["prompt"]
    for round in range(1, work.settings["rounds"] + 1):
        updates = {}
        for client in clients:
            work.load(prompt)
            work.train(client, round)
            updates[client] = {"prompt": torch.from_numpy(work.prompt())}
        merged, _ = server.update_global_model(updates)
        prompt = merged["prompt"]
    server.invoke_custom_action(action="close_connection")


if __name__ == "__main__":
    if MPI.COMM_WORLD.Get_rank() == 0:
        serve(MPI.COMM_WORLD, sys.argv[1])
    else:
        train(MPI.COMM_WORLD, sys.argv[1])
