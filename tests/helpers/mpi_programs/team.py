"""Distil with every engine on all ranks together, and compare with one rank: team.py MODEL PAIRS.

PAIRS is JSON: of each micro-batch, DeepSpeed's stages with it, [[null, [0, 2]], ...]. The last line
of the output is JSON: by "ENGINE ZERO MICRO" the largest difference of a step's loss, of a weight,
and of a weight between two ranks.
"""

import json
import sys

import numpy as np
import torch
from mpi4py import MPI

from fedsp_mpi.comm import leave
from fedsp_mpi.training.process_group import Rendezvous, ServerGroup
from helpers.distillation import distilled

world = MPI.COMM_WORLD
torch.set_num_threads(1)
meeting = Rendezvous.open(world.size, one_host=True) if world.rank == 0 else None
port = world.bcast(meeting.port if meeting else None)
cpu = torch.device("cpu")
team = ServerGroup.join(
    meeting or Rendezvous("localhost", port, world.size), world.rank, cpu, seconds=60.0
)
assert team.tell({"said": [1, "ü"]} if world.rank == 0 else None) == {"said": [1, "ü"]}
last = world.size - 1
assert team.tell({"of": [team.rank, 0.1]}, last) == {"of": [last, 0.1]}
sent = {"step": np.array(team.rank), "moments/0": np.full((2, 3), -0.0, np.float32) - team.rank}
received = team.tell_arrays(sent, last)
assert [*received] == [*sent] and received["step"].shape == () and received["step"] == last
assert received["moments/0"].dtype == np.float32 and received["moments/0"].shape == (2, 3)
assert received["moments/0"].tobytes() == np.full((2, 3), -0.0 - last, np.float32).tobytes()
assert team.tell_arrays({}, last) == {}
led = torch.full((2,), float(team.rank))
team.lead([led], last)
assert led.tolist() == [last, last]


def flat(student) -> torch.Tensor:
    """Return all parameters as one vector [num_values]."""
    return torch.cat([parameter.detach().flatten() for parameter in student.model.parameters()])


differences = {}
for micro, stages in json.loads(sys.argv[2]):
    alone, student = distilled(sys.argv[1], micro, steps=5, logits_weight=0.5, clip=0.05)
    expected = flat(student)
    for engine, zero in [("torch", 0), *(("deepspeed", stage) for stage in stages)]:
        done, student = distilled(
            sys.argv[1],
            micro,
            steps=5,
            engine=engine,
            zero_stage=zero,
            logits_weight=0.5,
            clip=0.05,
            team=team,
        )
        losses = max(abs(a - b) for a, b in zip(done.trace.losses, alone.trace.losses, strict=True))
        weights = flat(student)
        leader = weights.clone()
        team.lead([leader])
        apart = torch.stack([(weights - expected).abs().max(), (weights - leader).abs().max()])
        team.sum([apart])
        differences[f"{engine} {zero} {micro}"] = [losses, *apart.tolist()]
team.leave()
if world.rank == 0:
    print(json.dumps(differences), flush=True)
# As a run ends: DeepSpeed keeps gloo's threads, which abort a process whose interpreter is taken
# down under them.
leave(0)
