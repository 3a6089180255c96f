import numpy as np
import pytest
import torch

from kwslib.config import FeatureConfig
from kwslib.data import corpora, features


def by_hand(samples: np.ndarray, n_fft=400, hop=160, n_mels=40) -> np.ndarray:
    """Log-mels with numpy alone: periodic Hann window, power spectrum, HTK triangles, natural log."""
    padded = np.concatenate([np.zeros(n_fft), samples])
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
    n = (len(padded) - n_fft) // hop + 1
    frames = np.stack([padded[i * hop : i * hop + n_fft] * window for i in range(n)])
    power = np.abs(np.fft.rfft(frames)) ** 2
    mel_edges = np.linspace(0, 2595 * np.log10(1 + 8000 / 700), n_mels + 2)
    edges = 700 * (10 ** (mel_edges / 2595) - 1)
    hz = np.linspace(0, 8000, n_fft // 2 + 1)
    rising = (hz[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - hz[:, None]) / (edges[2:] - edges[1:-1])
    bank = np.maximum(0, np.minimum(rising, falling))
    return np.log(np.clip(power @ bank, 1e-9, 1e9)).T


def test_log_mels_equal_numpy():
    samples = np.random.default_rng(0).normal(size=16_000) * 0.1
    ours = features.LogMel()(torch.from_numpy(samples).float()[None])[0].numpy()
    assert ours.shape == (40, 101)
    np.testing.assert_allclose(ours[:, 3:], by_hand(samples)[:, 3:], atol=2e-3)  # float32 against float64
    assert (ours[:, 0] == np.float32(features.SILENCE)).all()  # the first frame holds padding only


def test_both_framings_give_101_frames_and_differ():
    samples = torch.randn(2, 16_000)
    causal, centered = (features.LogMel(FeatureConfig(framing=f))(samples) for f in ("causal", "centered"))
    assert causal.shape == centered.shape == (2, 40, 101)
    # the centred frame i covers what the causal frame i + 1.25 covers: never the same samples
    assert (causal[:, :, 50] - centered[:, :, 50]).abs().max() > 0.1
    with pytest.raises(ValueError, match="framing must be"):
        FeatureConfig(framing="reflect")


def test_causal_frames_do_not_know_the_future():
    front_end = features.LogMel()
    for seed in range(20):  # some samples round alike by luck
        samples = torch.randn(1, 16_000, generator=torch.Generator().manual_seed(seed))
        whole, half = (features.prepared(part, front_end) for part in (samples, samples[:, :8_000]))
        assert torch.equal(whole[:, :, : half.shape[2]], half)
        whole, half = front_end(samples), front_end(samples[:, :8_000])  # MKL rounds by the number of rows
        torch.testing.assert_close(whole[:, :, : half.shape[2]], half, atol=1e-5, rtol=0)


def test_a_clip_is_prepared_alike_wherever_it_stands_in_a_batch():
    front_end, samples = features.LogMel(), torch.randn(131, 16_000)
    together = features.prepared(samples, front_end)
    for i in (0, 7, 64, 130):
        assert torch.equal(features.prepared(samples[i : i + 1], front_end), together[i : i + 1])


def test_log_mels_of_a_corpus_are_computed_once(folder, monkeypatch):
    corpus = corpora.load(str(folder), "go")
    first = features.logmels(corpus)
    assert first.shape == (72, 40, 101) and first.dtype == np.float32
    direct = features.LogMel()(features.from_int16(corpus.waveforms[5:6]))[0].numpy()
    np.testing.assert_allclose(first[5], direct, atol=1e-5)
    monkeypatch.setattr(features, "LogMel", lambda config: pytest.fail("computed again"))
    assert (features.logmels(corpus) == first).all()


@pytest.mark.parametrize("framing", ["causal", "centered"])
def test_what_trainings_read_is_what_the_front_end_gives(framing):
    front_end = features.LogMel(FeatureConfig(framing=framing))
    samples = torch.randn(3, 16_000, generator=torch.Generator().manual_seed(0)) * 0.1
    samples[1, 5_000:] = 0  # digital silence
    torch.testing.assert_close(features.prepared(samples, front_end), front_end(samples), atol=1e-4, rtol=0)


@pytest.mark.parametrize("config", [FeatureConfig(), FeatureConfig(n_mels=20, n_fft=320, hop_length=320)])
def test_a_frame_costs_what_plain_loops_multiply_and_add(config):
    rng, macs = np.random.default_rng(0), 0
    samples = rng.normal(0, 0.1, config.n_fft)

    def transform(x):  # complex, by mixed radix
        nonlocal macs
        n = len(x)
        if n == 1:
            return x
        p = next(p for p in range(2, n + 1) if n % p == 0)
        parts, out = [transform(x[i::p]) for i in range(p)], []
        for k in range(n):
            value = parts[0][k % (n // p)]
            for i in range(1, p):
                value += np.exp(-2j * np.pi * i * k / n) * parts[i][k % (n // p)]
                macs += 4
            out.append(value)
        return out

    windowed = [samples[i] * (0.5 - 0.5 * np.cos(2 * np.pi * i / config.n_fft)) for i in range(config.n_fft)]
    macs += config.n_fft
    half = config.n_fft // 2
    z = transform([windowed[2 * i] + 1j * windowed[2 * i + 1] for i in range(half)])
    power = []
    for k in range(half + 1):
        mine, other = z[k % half], np.conj(z[-k % half])
        even, odd = (mine + other) / 2, (mine - other) / 2j
        value = even + np.exp(-2j * np.pi * k / config.n_fft) * odd
        macs += 2 * 4  # apart, and together again
        power.append(value.real**2 + value.imag**2)
        macs += 2
    filters = features.LogMel(config).mel.mel_scale.fb.double().numpy()
    logs = []
    for mel in range(config.n_mels):
        total = 0.0
        for k in np.flatnonzero(filters[:, mel]):
            total += power[k] * filters[k, mel]
            macs += 1
        logs.append(np.log(np.clip(total, 1e-9, 1e9)))
        macs += 1
    mine = features.LogMel(config).frames(torch.from_numpy(samples).float()[None])[0, :, 0]
    np.testing.assert_allclose(mine, logs, rtol=1e-3, atol=1e-3)
    assert config.macs_per_frame == macs and config.frames_per_clip == 16_000 // config.hop_length + 1
