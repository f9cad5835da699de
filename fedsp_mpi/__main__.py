"""`python -m fedsp_mpi`."""

from fedsp_mpi.cli import main
from fedsp_mpi.comm import leave

leave(main())
