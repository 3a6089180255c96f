"""A detector in whole numbers: against plain loops, against its float twin, and the same bits in numpy and torch."""

import hashlib
import re

import numpy as np
import pytest
import torch

from kwslib import paths
from kwslib.data.features import SILENCE, LogMel
from kwslib.nets.integer import LEVELS_PER_UNIT, IntegerNet
from kwslib.nets.rivals import TimeNetConfig, build, folded
from kwslib.streaming.model import StreamingModel
from kwslib.training.quantize import WeightInt

SIZES = {
    "every frame": TimeNetConfig((8, 12, 16), (8, 7, 5), (5, 2, 1)),
    "a frame every 70 ms": TimeNetConfig((8, 12, 16), (4, 4, 3), (1, 1, 1), hop_ms=70),
    "one block": TimeNetConfig((5,), (6,), (3,), hop_ms=20),
}


def sound(seconds: float, streams: int = 1, seed: int = 0) -> np.ndarray:
    """Noise of many levels, silence and the loudest there is, int16."""
    rng = np.random.default_rng(seed)
    n = round(seconds * 16_000)
    levels = np.repeat(10 ** rng.uniform(1, 4.3, (streams, n // 1600 + 1)), 1600, axis=1)[:, :n]
    levels[:, n // 3 : n // 3 + 2000] = 0
    return (rng.normal(size=(streams, n)) * levels).clip(-32768, 32767).astype(np.int16)


@torch.no_grad()
def twins(config: TimeNetConfig, bits: int = 8) -> tuple[IntegerNet, StreamingModel]:
    """A net that has seen sound, and the same in whole numbers."""
    torch.manual_seed(1)
    net, heard = build(config).train(), sound(1, 32)
    logmels = LogMel()(torch.from_numpy(heard).float() / 32768)
    for _ in range(20):
        net(logmels)
    rounded = WeightInt(bits)(folded(net.eval()))
    return IntegerNet(rounded, bits, heard), StreamingModel(rounded)


@pytest.mark.parametrize("config", SIZES.values(), ids=SIZES)
def test_numpy_and_torch_give_the_same_bits_however_sound_is_cut(config):
    whole, _ = twins(config, 4)
    samples = sound(10, 2, seed=3)
    scores = whole.scores(samples)
    assert np.array_equal(whole.scores(torch.from_numpy(samples)).numpy(), scores) and scores.shape[1] > 90
    pieces = np.split(samples.astype(np.int64), sorted(np.random.default_rng(0).integers(0, 160_000, 60)), axis=1)
    state, found = whole.initial_state(pieces[0]), []
    for piece in pieces:
        new, state = whole.step(piece, state)
        found.append(new)
        assert sum(part.size for part in state) < 2 * (1600 + 40 * 20 + 16 * 30)  # it does not grow
    assert np.array_equal(np.concatenate(found, axis=1), scores)


@pytest.mark.parametrize("config", SIZES.values(), ids=SIZES)
@torch.no_grad()
def test_it_says_what_its_float_twin_says(config):
    whole, streaming = twins(config)
    samples = sound(20, seed=4)
    exact, _ = streaming.step(torch.from_numpy(samples).float() / 32768, streaming.initial_state())
    exact = exact[:, streaming.window - 1 :].numpy()  # the steps that have heard a second
    ours = whole.scores(samples) / 4096
    assert ours.shape == exact.shape
    assert np.abs(ours - exact).max() < 0.05 * exact.std() and np.corrcoef(ours[0], exact[0])[0, 1] > 0.999


def test_its_log_mels_are_those_of_the_front_end_to_a_level():
    whole, _ = twins(SIZES["every frame"])
    rng = np.random.default_rng(0)
    loud = np.sign(np.sin(np.arange(16_000) / 7)) * 32767  # as loud as it can be
    samples = np.stack([rng.normal(0, 30, 16_000), rng.normal(0, 3000, 16_000), loud]).astype(np.int16)
    levels = whole._levels(np.concatenate([np.zeros((3, 400), np.int64), samples.astype(np.int64)], axis=1))
    real = LogMel()(torch.from_numpy(samples).float() / 32768).numpy()
    off = np.abs(levels / LEVELS_PER_UNIT + SILENCE - real)[:, :, 3:]  # the first frames hear hardly anything
    assert off[1:].max() < 1.5 / LEVELS_PER_UNIT and np.quantile(off[0], 0.99) < 2 / LEVELS_PER_UNIT
    assert (whole._levels(np.zeros((1, 2000), np.int64)) == 0).all()


def test_a_score_by_plain_loops_of_whole_numbers():
    whole, _ = twins(SIZES["a frame every 70 ms"], 4)
    samples = sound(1, seed=5)
    padded = np.concatenate([np.zeros((1, whole.span), np.int64), samples.astype(np.int64)], axis=1)
    x = [[int(level) for level in row] for row in whole._levels(padded)[0]]
    for (taps, squeeze), (mix, rectify), stride in zip(whole.over_time, whole.mixes, whole.strides, strict=True):
        n = (len(x[0]) - len(taps[0])) // stride + 1
        inner = []
        for c, row in enumerate(x):
            sums = [sum(int(w) * row[s * stride + k] for k, w in enumerate(taps[c])) for s in range(n)]
            inner.append(
                [
                    max(-32767, min(32767, (v * int(squeeze.multiplier[c]) + int(squeeze.offset[c])) >> squeeze.shift))
                    for v in sums
                ]
            )
        x = []
        for o, row in enumerate(mix):
            sums = [sum(int(w) * inner[c][s] for c, w in enumerate(row)) for s in range(n)]
            x.append(
                [
                    max(0, min(32767, (v * int(rectify.multiplier[o]) + int(rectify.offset[o])) >> rectify.shift))
                    for v in sums
                ]
            )
    assert len(x[0]) == whole.window_steps
    total = sum(int(m) * sum(row) for m, row in zip(whole.head.multiplier, x, strict=True))
    assert whole.scores(samples).tolist() == [[(total + int(whole.head.offset[0])) >> whole.head.shift]]


def test_the_bits_are_the_same_on_every_machine():
    """Of a net whose weights are a formula, since torch's random numbers may change: this digest was made elsewhere."""
    net = build(SIZES["a frame every 70 ms"]).eval()
    with torch.no_grad():
        for i, weight in enumerate(net.parameters()):
            values = (torch.arange(weight.numel()) * (7 + 2 * i)) % 15 - 7
            weight.copy_((values / 8).view(weight.shape) if weight.dim() > 1 else 1 + values.abs() / 16)
        net.norm.running_mean.fill_(-8.0), net.norm.running_var.fill_(9.0)
    ramp = (np.arange(16_000 * 4) ** 2 * 31 % 60_001 - 30_000).astype(np.int16).reshape(4, -1)
    scores = IntegerNet(net, 4, ramp).scores(ramp.reshape(1, -1))
    assert len(np.unique(scores)) > 20
    assert hashlib.sha256(scores.astype("<i8").tobytes()).hexdigest()[:16] == "c44adb04973fa118"


def test_the_lines_of_the_page_on_detectors_run(monkeypatch, capsys):
    monkeypatch.chdir(paths.ROOT)
    page = (paths.ROOT / "docs" / "detector.md").read_text()
    code = re.search(r"```python\n(from pathlib import Path\n.*?)```", page, re.DOTALL)[1]
    exec(compile(code, "detector.md", "exec"), {})
    printed = capsys.readouterr().out
    assert len(re.findall(r"-?\d+\.\d*", printed)) > 100  # a score every 70 ms, after the first second
