"""The arithmetic of trainings, pinned: the same kernels, and so the same bytes, on every x86 processor with AVX2.

Four libraries choose their kernels by the processor: torch's own, oneDNN (convolutions), MKL (matrix products, Fourier
transforms) and numpy's OpenBLAS (the products of ``nets.engine``). They look at these variables when they are first
imported, so they are set when ``kwslib`` is, and worker processes inherit them. ``KWS_ARITHMETIC=native`` leaves each
library to its own choice.
"""

import os
from pathlib import Path

PINNED = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_CBWR": "COMPATIBLE",  # the only setting that MKL knows on processors of every maker
    "OPENBLAS_CORETYPE": "Haswell",
    "OPENBLAS_NUM_THREADS": "1",  # trainings have a core each
}


def pin() -> bool:
    """Set the variables where they can be kept, and say whether they are."""
    if os.environ.get("KWS_ARITHMETIC") != "native" and _has_avx2():
        os.environ.update(PINNED)
    return is_pinned()


def is_pinned() -> bool:
    """Whether processes that start from now on compute in this way."""
    return all(os.environ.get(name) == value for name, value in PINNED.items())


def _has_avx2() -> bool:
    """What Linux says of the processor; elsewhere nobody is asked, and nothing is pinned."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return {"avx2", "fma"} <= set(flags)
