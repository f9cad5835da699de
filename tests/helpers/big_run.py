"""An artificially large record, with names that a page must escape."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedsp_mpi.record import ClientRow, ResultRow, RoundRow, Run, WireRow
from fedsp_mpi.record.tables import SiloRow, table

SCRIPT = '<script>document.title = "owned"</script>'
NUM_ROUNDS = 100
NUM_CLIENTS = 10


def big_run(name: str = "big", silo: str = "north") -> Run:
    """Make 100 rounds of 10 silos in memory; their losses fall, and one of them fails at times.

    Args:
        name: of the run.
        silo: of the first silo.
    """
    noise = np.random.default_rng(1)
    rounds = []
    clients = []
    silos = []
    for number in range(1, NUM_ROUNDS + 1):
        level = 0.4 + 2 / number**0.5
        rounds.append(
            RoundRow(
                round=number,
                seconds_clients=3 + noise.random(),
                seconds_server=0.5,
                seconds_total=4 + noise.random(),
                bytes_down=983_040,
                bytes_up=983_040,
                num_clients=NUM_CLIENTS,
                num_failed=int(number % 9 == 0),
                server_loss_last=level + 0.05 + 0.1 * noise.random(),
                validation_merged=level + 0.2 + 0.05 * noise.random(),
                validation_loss=level + 0.1,
                control_validation_loss=level + 0.4,
                is_best=True,
            )
        )
        for client in range(NUM_CLIENTS):
            has_failed = number % 9 == 0 and client == 3
            clients.append(
                ClientRow(
                    round=number,
                    client=client,
                    rank=1 + client % 2,
                    status="failed" if has_failed else "ok",
                    reason=f"out of memory {SCRIPT}" if has_failed else "",
                    samples=128,
                    loss_prompt_last=level + 0.3 * noise.random() + 0.03 * client,
                    seconds_prompt=1.5,
                    bytes_down=98_304,
                    bytes_up=98_304,
                )
            )
            loss = level + 0.4 * noise.random()
            silos.append(SiloRow(round=number, silo=client, n=40, loss=loss, acc=0.5 + 0.2 / loss))
    results = [
        ResultRow(method=method, split="test", n=400, acc=acc, stderr=0.024, loss=2 - acc)
        for method, acc in {"zero-shot": 0.5, "server-only": 0.6, f"fedsp {SCRIPT}": 0.7}.items()
    ]
    wire = [
        WireRow(
            name="prompt",
            shape=(24, 1024),
            dtype="float32",
            direction=direction,
            count=NUM_ROUNDS * NUM_CLIENTS,
            bytes=98_304 * NUM_ROUNDS * NUM_CLIENTS,
            phase="rounds",
            bytes_crossed=98_304 * NUM_ROUNDS * NUM_CLIENTS,
        )
        for direction in ("down", "up")
    ]
    host = {"host": "node01", "pid": 4711, "device": "cuda:0", "cores": 8}
    return Run(
        file=Path("runs") / name / "run.h5",
        name=name,
        config={
            "method": "fedsp",
            "recipe": "bridged",
            "run": {"seed": 1, "label": f"FedSP {SCRIPT}"},
            "model": {"name": "some/model"},
            "data": {"task": "classification"},
        },
        config_text="".join(f"section_{i}:\n  key: {SCRIPT}\n" for i in range(100)),
        environment={
            "hosts": [host] * 3,
            "machine": "x86_64, 24 cores",
            "versions": {"torch": "2.13.0", "python": "3.11"},
            "commit": "0123456789ab",
        },
        sections={
            "silos": {"names": [silo, *(f"site {i}" for i in range(1, NUM_CLIENTS))]},
            "models": {"global": 134_000_000, "auxiliary": 60_000_000},
            "data": {"task": "classification", "train": 1280, "notes": [f"a note {SCRIPT}"]},
        },
        status="complete",
        created="2026-11-01T10:00:00+00:00",
        updated="2026-11-01T12:00:00+00:00",
        committed_rounds=NUM_ROUNDS,
        rounds=table(RoundRow, rounds),
        clients=table(ClientRow, clients),
        silos=table(SiloRow, silos),
        results=table(ResultRow, results),
        wire=table(WireRow, wire),
    )
