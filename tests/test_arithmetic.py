"""The same bytes whatever vector units a processor has."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kwslib import arithmetic, paths

# What a processor without AVX-512 would choose, in libraries that nobody pins: glibc, numpy's own loops, MKL.
NARROW = {
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX512F,-AVX512VL,-AVX512BW,-AVX512DQ,-AVX512CD",
    "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}


def digests(home: Path, corpus: Path, **environment: str) -> dict:
    """A small study made by processes of its own: prepared, trained, distilled, tuned for few bits."""
    code = (
        f"import json, kills; kills.chain({str(corpus)!r}); from kwslib import paths; "
        "print(json.dumps(kills.stable(paths.home())))"
    )
    variables = {
        **os.environ,
        "KWS_HOME": str(home),
        "PYTHONPATH": f"{paths.ROOT}:{Path(__file__).parent}",
        **environment,
    }
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not arithmetic.is_pinned(), reason="this processor has no AVX2, or arithmetic is native")
def test_checkpoints_are_the_same_with_and_without_avx512(folder, tmp_path):
    wide = digests(tmp_path / "wide", folder)
    assert len(wide) > 10 and wide == digests(tmp_path / "narrow", folder, **NARROW)


def test_it_can_be_left_to_the_libraries(monkeypatch):
    for name in arithmetic.PINNED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KWS_ARITHMETIC", "native")
    assert not arithmetic.pin() and not arithmetic.is_pinned()
    monkeypatch.delenv("KWS_ARITHMETIC")
    assert arithmetic.pin() == arithmetic._has_avx2()


def test_a_processor_that_tells_nothing_is_not_pinned(monkeypatch):
    monkeypatch.setattr(arithmetic.Path, "read_text", lambda self: (_ for _ in ()).throw(OSError))
    assert not arithmetic._has_avx2()
