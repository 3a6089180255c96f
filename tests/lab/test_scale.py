"""A corpus of the size of Speech Commands: 65,000 clips. Needs 4 GB of disk and some minutes, so only when asked for.

KWS_SCALE=1 make test ARGS="tests/test_scale.py -s"
"""

import os
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import soundfile

from kwslib import paths
from kwslib.config import SAMPLE_RATE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("KWS_SCALE"), reason="4 GB and some minutes: set KWS_SCALE=1"),
]
WORDS, SPEAKERS = 30, 2167  # 65,010 clips

LOAD = """
import sys, time
from kwslib import splits
from kwslib.study import open_study
began = time.perf_counter()
study = open_study(sys.argv[1], "word07", "speaker", "smoke")
study.corpus, study.split, splits.leaks(study.corpus, study.split)
print(len(study.corpus.clips), time.perf_counter() - began)
"""
TRAIN = """
import sys
from kwslib.config import CRNNConfig
from kwslib.experiments import Experiment, run
from kwslib.study import open_study
from kwslib.train import Training
study = open_study(sys.argv[1], "word07", "speaker", "standard", seeds=2)  # 8 views: 2.5 GB of them
run(study, [Experiment("baseline", student=CRNNConfig(), training=Training(epochs=1))])
"""


def peak_gb(process: subprocess.Popen) -> float:
    """Largest memory of a process and its children together.

    Without the pages of memory-mapped files: the system takes those back when it needs the room.
    """
    peak = 0.0
    parent = psutil.Process(process.pid)
    while process.poll() is None:
        used = 0
        try:
            for one in [parent, *parent.children(recursive=True)]:
                memory = one.memory_info()
                used += memory.rss - memory.shared
        except psutil.Error:
            continue  # one of them has just ended
        peak = max(peak, used / 1e9)
        time.sleep(0.2)
    return peak


def test_65000_clips_load_in_5_seconds_and_train_within_6_gb(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for word in range(WORDS):
        (tmp_path / "big" / f"word{word:02d}").mkdir(parents=True)
        for speaker in range(SPEAKERS):
            samples = rng.uniform(-0.3, 0.3, 1600)
            soundfile.write(tmp_path / "big" / f"word{word:02d}" / f"s{speaker:04d}_0.wav", samples, SAMPLE_RATE)
    took = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", LOAD, tmp_path / "big"], cwd=paths.ROOT, capture_output=True, text=True, check=True
        )
        clips, seconds = done.stdout.split()
        took.append(float(seconds))
    assert int(clips) == WORDS * SPEAKERS
    with subprocess.Popen([sys.executable, "-c", TRAIN, tmp_path / "big"], cwd=paths.ROOT) as process:
        peak = peak_gb(process)
    assert process.returncode == 0
    with capsys.disabled():
        print(f"\n{clips} clips: first time {took[0]:.0f} s, then {took[1]:.1f} s, training peaks at {peak:.1f} GB")
    assert took[1] < 5 and peak < 6
