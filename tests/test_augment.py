import numpy as np
import pytest
import torch

from kwslib import augment, corpora
from kwslib.augment import Augmentation
from kwslib.config import FeatureConfig
from kwslib.features import SILENCE


def test_snr_is_what_was_asked_for():
    samples, noise = torch.randn(3, 16_000) * 0.2, torch.randn(3, 16_000) * 0.7
    wanted = torch.tensor([20.0, 5.0, -3.0])
    added = augment.at_snr(samples, noise, wanted) - samples
    measured = 10 * torch.log10(samples.square().mean(1) / added.square().mean(1))
    torch.testing.assert_close(measured, wanted, atol=1e-3, rtol=0)


def test_speed_raises_the_pitch():
    t = torch.arange(16_000) / 16_000
    tone = torch.sin(2 * torch.pi * 500 * t)[None]
    faster = augment.shift(tone, torch.tensor([0]), torch.tensor([1.1]))[0]
    peak_hz = torch.fft.rfft(faster[2_000:14_000]).abs().argmax().item() * 16_000 / 12_000
    assert peak_hz == pytest.approx(550, abs=2)
    assert not faster[:600].any() and not faster[-600:].any()  # 10 % shorter: silence at both ends


def test_one_of_four_things_happens_to_a_clip():
    clip = torch.full((4000, 16), 0.5)
    config = Augmentation(shift_ms=0, speed=(1.0, 1.0))
    noise = {"n": np.full(17_000, 3000, np.int16)}
    clip = torch.nn.functional.pad(clip, (0, 16_000 - 16))
    out = augment.vary(clip, noise, config, torch.Generator().manual_seed(0))[:, :16]
    untouched, quiet = (out == 0.5).all(1), (out == 0.125).all(1)
    constant = (out == out[:, :1]).all(1)
    background = constant & ~untouched & ~quiet
    for share in (untouched, quiet, background, ~constant):
        assert share.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert (out[~constant] - 0.5).std().item() == pytest.approx(0.01, rel=0.05)


def test_masks_have_the_widths_of_spec_augment():
    config = Augmentation(frequency_mask=15, time_mask=35)
    out = augment.spec_augment(torch.zeros(5000, 40, 101), config, torch.Generator().manual_seed(0))
    masked = out == SILENCE
    bands, stretches = masked.all(2).sum(1), masked.all(1).sum(1)
    assert bands.max() == 14 and stretches.max() == 34  # uniform below 15 and 35, rounded down
    assert bands.float().mean().item() == pytest.approx(7, abs=0.3)
    assert stretches.float().mean().item() == pytest.approx(17, abs=0.6)
    assert (masked == (masked.all(2)[:, :, None] | masked.all(1)[:, None, :])).all()  # a cross, nothing else


def test_the_bank_is_the_same_every_time_and_shared_by_all_masks(folder):
    corpus = corpora.load(str(folder), "go")
    rows = np.arange(0, 70, 7)
    bank = augment.bank(corpus, rows, 2, Augmentation(), FeatureConfig())
    assert bank.shape == (2, 10, 40, 101) and bank.dtype == np.float16
    other = augment.bank(corpus, rows, 2, Augmentation(time_mask=0), FeatureConfig())
    assert other.filename == bank.filename
    first = np.array(bank)
    next(corpus.folder.glob("bank-*")).unlink()
    assert (augment.bank(corpus, rows, 2, Augmentation(), FeatureConfig()) == first).all()
