"""The shipped sound is what its recipe says, and the shipped detector hears in it what README says."""

import json
import re
import subprocess
import sys

import numpy as np
import sample

from kwslib import audio, paths
from kwslib.cli import main

SOUND = paths.ROOT / "docs" / "sample.flac"


def test_the_command_of_the_readme_prints_what_stands_there(capsys):
    assert main(["stream", "--wav", str(SOUND)]) == 0
    printed = capsys.readouterr().out.splitlines()
    shown = re.findall(r"^ +\d+\.\d\d s  happy detected, .*$", (paths.ROOT / "README.md").read_text(), re.MULTILINE)
    assert [line.split(",")[0] for line in printed] == [line.split(",")[0] for line in shown] and len(shown) == 2
    for line, same in zip(printed, shown, strict=True):
        assert abs(float(line.split(",")[1]) - float(same.split(",")[1])) < 1e-3


def test_the_recipe_makes_it_again_and_each_keyword_is_found(tmp_path, capsys):
    """In a process that has not spoken yet, as eSpeak NG needs it."""
    done = subprocess.run([sys.executable, sample.__file__, tmp_path], capture_output=True, text=True, cwd=paths.ROOT)
    assert done.returncode == 0, done.stderr
    made, shipped = audio.read(tmp_path / "sample.flac"), audio.read(SOUND)
    assert len(made) == len(shipped) and np.abs(made - shipped).max() < 3 / 32768
    assert SOUND.stat().st_size < 250_000 and "<svg" in (tmp_path / "detection.svg").read_text()
    assert main(["stream", "--wav", str(SOUND), "--events", "--json"]) == 0
    events_s = [json.loads(line)["t_s"] for line in capsys.readouterr().out.splitlines()]
    keywords_s = json.loads(done.stdout)
    assert len(events_s) == len(keywords_s) == 2
    assert all(start < t_s < end + 0.5 for t_s, (start, end) in zip(events_s, keywords_s, strict=True))
