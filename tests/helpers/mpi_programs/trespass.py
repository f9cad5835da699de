"""The command line, where one rank reads what is not its own.

python trespass.py RANK FOLDER ARGUMENTS...: rank RANK reads one file of FOLDER before it begins.
"""

import sys
from pathlib import Path

from fedsp_mpi import cli
from fedsp_mpi.comm import launcher_rank

if launcher_rank() == int(sys.argv[1]):
    next(Path(sys.argv[2]).iterdir()).read_bytes()
sys.exit(cli.main(sys.argv[3:]))
