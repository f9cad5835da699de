"""Usage: bench.py OUT VALUES REPEATS"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fedsp_mpi.comm import guard

with guard("bench"):
    from fedsp_mpi.comm.benchmark import measure, measure_waiting

    figures = {
        **measure(int(sys.argv[2]), int(sys.argv[3])),
        **measure_waiting(0.2, int(sys.argv[3])),
    }
    if figures:
        Path(sys.argv[1]).write_text(json.dumps(figures))
