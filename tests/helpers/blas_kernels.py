"""The OpenBLAS kernels that this processor can run: what `OPENBLAS_CORETYPE` may be set to in a
test's subprocess.
"""

from __future__ import annotations

from pathlib import Path

_NEEDS = {"Prescott": "pni", "Sandybridge": "avx", "Haswell": "avx2", "SkylakeX": "avx512f"}


def available() -> list[str]:
    """Kernel names, those of the oldest processors first; empty where the processor's features
    cannot be read.
    """
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return []
    flags = {
        flag for line in text.splitlines() if line.startswith("flags") for flag in line.split()
    }
    return [kernel for kernel, flag in _NEEDS.items() if flag in flags]
