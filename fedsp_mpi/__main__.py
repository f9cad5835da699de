"""`python -m fedsp_mpi`."""

import sys

from fedsp_mpi.cli import main

sys.exit(main())
