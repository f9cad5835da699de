"""Every rank leaves with a status: python leaves.py STATUS; rank 1 with 0 where STATUS is odd."""

import sys

from mpi4py import MPI

from fedsp_mpi.comm import leave

MPI.COMM_WORLD.Barrier()
print("the last line", MPI.COMM_WORLD.rank)
status = int(sys.argv[1])
leave(0 if MPI.COMM_WORLD.rank == 1 and status % 2 else status)
