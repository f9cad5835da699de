"""The work by Flower (its simulation, over Ray): python flower_app.py WORK PROCESSES

PROCESSES clients train at a time, each with one core.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

WORK, PROCESSES = sys.argv[1], int(sys.argv[2])


def client_app() -> ClientApp:
    """Return the clients, whose process loads the model once."""
    app = ClientApp()
    loaded: list = []

    @app.train()
    def train(message: Message, context: Context) -> Message:
        from work import Work

        if not loaded:
            loaded.append(Work(WORK))
        work = loaded[0]
        client = int(context.node_config["partition-id"])
        work.load(message.content["arrays"].to_numpy_ndarrays()[0])
        loss = work.train(client, int(message.content["config"]["server-round"]))
        metrics = {"num-examples": work.num_examples[client], "loss": loss}
        arrays = ArrayRecord(numpy_ndarrays=[work.prompt()])
        content = RecordDict({"arrays": arrays, "metrics": MetricRecord(metrics)})
        return Message(content=content, reply_to=message)

    return app


def server_app() -> ServerApp:
    """Return the server, which averages, and validates the mean."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        from work import Work

        work = Work(WORK)

        def evaluate(round: int, arrays: ArrayRecord) -> MetricRecord:
            work.load(arrays.to_numpy_ndarrays()[0])
            loss = work.validation_loss() if round else float("nan")
            print(f"round {round} loss {loss:.6f}", flush=True)
            return MetricRecord({"loss": loss})

        clients = work.settings["clients"]
        strategy = FedAvg(
            fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients
        )
        first = ArrayRecord(numpy_ndarrays=[np.ascontiguousarray(work.prompt())])
        strategy.start(grid, first, num_rounds=work.settings["rounds"], evaluate_fn=evaluate)

    return app


if __name__ == "__main__":
    logging.getLogger("flwr").setLevel(logging.ERROR)
    settings = json.loads((Path(WORK) / "settings.json").read_text(encoding="utf-8"))
    resources = {"num_cpus": 1.0, "num_gpus": 0.0}
    run_simulation(
        server_app=server_app(),
        client_app=client_app(),
        num_supernodes=settings["clients"],
        backend_config={
            "client_resources": resources,
            "init_args": {"num_cpus": PROCESSES, "include_dashboard": False},
        },
    )
