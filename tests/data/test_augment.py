from dataclasses import replace

import numpy as np
import pytest
import torch

from kwslib.config import FeatureConfig
from kwslib.data import augment, corpora
from kwslib.data.augment import Augmentation
from kwslib.data.features import SILENCE


def word(start: int, end: int, level: float = 0.2) -> torch.Tensor:
    """A second of silence with a noise burst in it, (1, 16000)."""
    samples = torch.zeros(1, 16_000)
    samples[0, start:end] = level * torch.randn(end - start)
    return samples


def test_snr_is_that_of_the_speech_and_not_of_the_silence_around_it():
    noise = torch.randn(3, 16_000) * 0.7
    wanted = torch.tensor([20.0, 5.0, -3.0])
    samples = torch.cat([word(0, 16_000), word(3_200, 9_600), word(6_400, 8_000, level=0.9)])
    added = augment.at_snr(samples, noise, wanted) - samples
    bursts = [samples[0], samples[1, 3_200:9_600], samples[2, 6_400:8_000]]
    for burst, noise_there, snr_db in zip(bursts, added, wanted, strict=True):
        measured = 10 * torch.log10(burst.square().mean() / noise_there.square().mean())
        assert measured.item() == pytest.approx(snr_db.item(), abs=0.05)


def test_a_word_before_ends_where_the_gap_begins_and_is_equally_loud():
    samples, before = word(8_000, 12_000, level=0.1), word(1_600, 6_400, level=0.5)
    out = augment.after_a_word(samples, before, torch.tensor([1_600]))
    assert torch.equal(out[0, 6_400:], samples[0, 6_400:])
    heard = out[0, 1_600:6_400]
    torch.testing.assert_close(heard, before[0, 1_600:6_400] * heard.norm() / before.norm())
    assert heard.square().mean().sqrt().item() == pytest.approx(0.1, rel=0.05)
    assert not out[0, :1_600].any()


def test_a_room_decays_by_60_db_in_its_reverberation_time():
    click = torch.zeros(64, 16_000)
    click[:, 100] = 1.0
    rt60_s = torch.full((64,), 0.3)
    out = augment.in_a_room(click, rt60_s, torch.Generator().manual_seed(0))
    assert torch.allclose(out[:, 100], torch.ones(64), atol=1e-4) and out[:, :100].abs().max() < 1e-4
    level_db = 10 * torch.log10(out[:, 101:4_901].square().mean(0).unfold(0, 480, 480).mean(1))
    slope_db_per_s = (level_db[-1] - level_db[0]) / ((len(level_db) - 1) * 480 / 16_000)
    assert slope_db_per_s.item() == pytest.approx(-60 / 0.3, rel=0.05)


def test_tilt_is_in_db_per_octave():
    t = torch.arange(16_000) / 16_000
    tones = torch.stack([torch.sin(2 * torch.pi * hz * t) for hz in (500, 1000, 4000)])
    out = augment.tilted(tones, torch.full((3,), 3.0))
    gain_db = 20 * torch.log10(out.norm(dim=1) / tones.norm(dim=1))
    torch.testing.assert_close(gain_db, torch.tensor([-3.0, 0.0, 6.0]), atol=0.01, rtol=0)


OFF = Augmentation(shift_ms=0, speed=(1, 1), context_share=0, room_share=0, tilt_db=0, gain_db=(0, 0), noise_share=0)


def varied(samples, config, noise=None):
    noise = noise or {"n": np.full(17_000, 3000, np.int16)}
    return augment.vary(samples.clone(), samples.flip(0), noise, config, torch.Generator().manual_seed(0))


def test_with_everything_off_a_clip_stays_as_it_is():
    clips = torch.cat([word(2_000, 9_000) for _ in range(8)])
    torch.testing.assert_close(varied(clips, OFF), clips, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("field", "share"), [("context_share", 0.3), ("room_share", 0.6), ("noise_share", 0.5)])
def test_a_share_is_the_part_of_the_clips_that_change(field, share):
    clips = torch.cat([word(6_000, 12_000) for _ in range(400)])
    changed = ((varied(clips, replace(OFF, **{field: share})) - clips).abs() > 1e-5).any(1)
    assert changed.float().mean().item() == pytest.approx(share, abs=0.07)


def test_gain_covers_its_range():
    clips = torch.cat([word(6_000, 12_000, level=0.05) for _ in range(400)])
    ratio = varied(clips, replace(OFF, gain_db=(-18, 6))).norm(dim=1) / clips.norm(dim=1)
    gain_db = 20 * torch.log10(ratio)
    assert -18 <= gain_db.min() < -17 and 5 < gain_db.max() <= 6


def test_silence_stays_finite():
    clips = torch.zeros(50, 16_000)
    assert torch.isfinite(varied(clips, Augmentation())).all()


def test_speed_raises_the_pitch():
    t = torch.arange(16_000) / 16_000
    tone = torch.sin(2 * torch.pi * 500 * t)[None]
    faster = augment.shift(tone, torch.tensor([0]), torch.tensor([1.1]))[0]
    peak_hz = torch.fft.rfft(faster[2_000:14_000]).abs().argmax().item() * 16_000 / 12_000
    assert peak_hz == pytest.approx(550, abs=2)
    assert not faster[:600].any() and not faster[-600:].any()  # 10 % shorter: silence at both ends


def test_the_reports_do_one_of_four_things_to_a_clip():
    clip = torch.nn.functional.pad(torch.full((4000, 320), 0.5), (0, 16_000 - 320))
    out = varied(clip, augment.REPORTS)[:, :320]
    untouched, quiet = (out == 0.5).all(1), (out == 0.125).all(1)
    constant = (out == out[:, :1]).all(1)
    background = constant & ~untouched & ~quiet
    for share in (untouched, quiet, background, ~constant):
        assert share.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert (out[~constant] - 0.5).std().item() == pytest.approx(0.01, rel=0.05)
    assert (out[background] - 0.5).mean().item() == pytest.approx(0.05, rel=0.01)  # 20 dB below


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
    rows, others = np.arange(0, 70, 7), np.arange(30, 60)

    def bank(views, config):
        return augment.bank(corpus, rows, others, views, config, FeatureConfig())

    first = bank(2, Augmentation())
    assert first.shape == (2, 10, 40, 101) and first.dtype == np.float16
    assert bank(2, Augmentation(time_mask=0)).filename == first.filename
    kept = np.array(first)
    next(corpus.folder.glob("bank-*")).unlink()
    assert (bank(2, Augmentation()) == kept).all()
    assert (bank(3, Augmentation())[:2] == kept).all()  # more views leave the first as they are


def test_the_mel_axis_is_stretched_by_a_share_of_its_own_for_each_example():
    g = torch.Generator().manual_seed(0)
    bins = torch.arange(40.0)[None, :, None].expand(200, 40, 3)  # each bin holds its own number
    warped = augment.warp_mels(bins, 0.2, g)
    factors = warped[:, 20, 0] / 20
    assert 0.8 <= factors.min() < 0.85 and 1.15 < factors.max() <= 1.2
    expected = (torch.arange(40.0) * factors[:, None]).clamp(max=39)
    torch.testing.assert_close(warped, expected[..., None].expand(-1, -1, 3))
    torch.testing.assert_close(augment.warp_mels(bins, 0.0, g), bins)
