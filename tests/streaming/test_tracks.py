"""Long recordings from a specification, and what is counted on them, against plain loops and hand counts."""

import json

import numpy as np
import pytest
import soundfile
import torch

from kwslib.config import CELLS, CRNNConfig
from kwslib.data import corpora
from kwslib.data.features import LogMel
from kwslib.nets.crnn import CRNN
from kwslib.streaming import events, tracks
from kwslib.streaming.model import StreamingModel, carried_scores
from kwslib.streaming.tracks import SpecError, StreamSpec
from kwslib.training.quantize import Half, WeightInt


@pytest.fixture
def corpus(folder):
    return corpora.load(str(folder), "go")


def rendered(corpus, **spec):
    return list(tracks.render(corpus, range(len(corpus.clips)), "go", StreamSpec(**spec)))


def test_a_word_over_noise_has_the_ratio_that_was_asked_for():
    rng = np.random.default_rng(0)
    clip, noise = (1000 * np.sin(np.arange(16_000) / 3)).astype(np.int16), rng.normal(0, 500, 9_000).astype(np.int16)
    samples, keywords_s = tracks.over_noise(clip, noise, 10.0)
    alone, word = np.concatenate([samples[:32_000], samples[48_000:]]), samples[32_000:48_000]
    assert samples.shape == (64_000,) and keywords_s == [(2.0, 3.0)]
    wanted = np.mean((clip / 32768.0) ** 2) / 10  # speech all along the clip
    assert np.mean(alone**2) == pytest.approx(wanted, rel=0.1)
    repeated = samples[np.arange(32_000, 48_000) % 9000]
    np.testing.assert_allclose(word - clip / 32768.0, repeated, atol=1e-6)


def test_a_stream_is_the_same_every_time_and_as_long_as_asked(corpus):
    first, again = (rendered(corpus, minutes=6, seed=3) for _ in range(2))
    assert [len(t.samples) for t in first] == [300 * 16_000, 60 * 16_000]
    for a, b in zip(first, again, strict=True):
        assert np.array_equal(a.samples, b.samples) and a.keywords_s == b.keywords_s
    assert not np.array_equal(first[0].samples, rendered(corpus, minutes=6, seed=4)[0].samples)


def test_words_come_as_often_as_asked_and_never_overlap(corpus):
    (track,) = rendered(corpus, minutes=5, words_per_minute=12, keyword_share=1.0)
    starts = np.array([start for start, _ in track.keywords_s])
    number = (starts // 5).astype(int)  # one in each five seconds, but for those that would follow directly
    assert len(set(number)) == len(starts) >= 50
    assert all(5 * i <= start <= 5 * i + 4 for i, start in zip(number, starts, strict=True))
    assert np.diff(starts).min() >= 2
    (dense,) = rendered(corpus, minutes=1, words_per_minute=60, keyword_share=1.0)
    assert [start for start, _ in dense.keywords_s] == list(range(0, 60, 2))


def test_keywords_at_times_of_their_own(corpus):
    (track,) = rendered(corpus, minutes=1, keyword_times_s=(10.5, 40.0), words_per_minute=30)
    assert [start for start, _ in track.keywords_s] == [10.5, 40.0]
    (only,) = rendered(corpus, minutes=1, keyword_times_s=(10.5,), words_per_minute=0, noise=())
    assert np.flatnonzero(only.samples).min() >= 10.5 * 16_000
    assert np.flatnonzero(only.samples).max() < 11.5 * 16_000


def test_noise_has_its_level_and_speech_its_ratio(corpus):
    (noise,) = rendered(corpus, minutes=2, words_per_minute=0, noise=("pink", "white", "brown"), noise_db=-40.0)
    for part in np.split(noise.samples, 4):  # of half a minute each, one kind
        assert 20 * np.log10(np.sqrt(np.square(part).mean())) == pytest.approx(-40, abs=0.1)
    spec = {"minutes": 1, "words_per_minute": 0, "keyword_times_s": (20.0,), "noise_db": -40.0}
    (clean,) = rendered(corpus, **spec, noise=(), snr_db=(20.0, 20.0))
    word = clean.samples[20 * 16_000 : 21 * 16_000].reshape(-1, 160).astype(float)
    power = np.square(word).mean(1)
    assert 10 * np.log10(power[power > power.max() / 100].mean()) == pytest.approx(-20, abs=0.1)  # 20 dB over -40


def test_brown_noise_falls_faster_than_pink_and_pink_than_white(corpus):
    slopes = {}
    for kind in ("white", "pink", "brown"):
        (track,) = rendered(corpus, minutes=0.5, words_per_minute=0, noise=(kind,))
        spectrum = np.square(np.abs(np.fft.rfft(track.samples)))
        low, high = (spectrum[np.arange(len(spectrum)) // 30 // 100 == band].mean() for band in (5, 50))  # 500, 5000 Hz
        slopes[kind] = 10 * np.log10(low / high)
    assert slopes["white"] == pytest.approx(0, abs=1)
    assert slopes["pink"] == pytest.approx(10, abs=1) and slopes["brown"] == pytest.approx(20, abs=1)


def test_a_keyword_ends_with_its_speech_and_none_follows_another(corpus):
    (track,) = rendered(corpus, minutes=2, words_per_minute=60, keyword_share=1.0, noise=())
    starts = [start for start, _ in track.keywords_s]
    assert starts == list(range(0, 120, 2))  # the others were to be keywords, too
    for start, end in track.keywords_s:
        clip = track.samples[round(start * 16_000) : round(start * 16_000) + 16_000]
        power = np.square(clip.astype(float)).reshape(-1, 320).mean(1)
        assert end - start == pytest.approx(0.02 * (1 + np.flatnonzero(power >= power.max() / 100).max()))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("convert", [lambda m: m, Half(), WeightInt(4)], ids=["float32", "float16", "int4"])
def test_prepared_tracks_score_as_step_by_step(corpus, cell, convert):
    torch.manual_seed(0)
    model = convert(CRNN(CRNNConfig(2, hidden_size=6, cell=cell)).eval())
    spec = StreamSpec(minutes=5.1, words_per_minute=30, seed=1)
    rows = range(len(corpus.clips))
    prepared = tracks.prepare(corpus, rows, "go", spec)
    assert prepared.seconds == pytest.approx([300, 6])
    rendered = list(tracks.render(corpus, rows, "go", spec))
    for _ in range(2):  # computed, then read
        scored = events.score_tracks(model, tracks.prepare(corpus, rows, "go", spec))
        for said, track in zip(scored, rendered, strict=True):
            assert said.keywords_s == track.keywords_s
            last = track.samples[: 20 * 16_000]
            times, scores = carried_scores(StreamingModel(model), last)
            np.testing.assert_allclose(said.times_s[: len(times)], times)
            np.testing.assert_allclose(
                said.scores[: len(scores)], scores, atol=5e-3 if convert.__class__ is Half else 1e-4
            )


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ("[]", "must be an object"),
        ("{", "is no specification"),
        ('{"hours": 2}', "must be an object with some of .*minutes"),
        ('{"minutes": -1}', "minutes must be from 0.05"),
        ('{"minutes": "many"}', "finite numbers"),
        ('{"minutes": NaN}', "finite numbers"),
        ('{"words_per_minute": 61}', "from 0 to 60"),
        ('{"keyword_share": 2}', "from 0 to 1"),
        ('{"snr_db": [30, 10]}', "from low to high"),
        ('{"noise": ["loud"]}', "unknown noise loud"),
        ('{"keyword_times_s": [299.5]}', "in a track of 300 s"),
        ('{"snr_db": 5}', "spec.json|range"),
        ('{"fa_per_h": -1}', "fa_per_h must be a number from 0"),
        ('{"fa_per_h": 1, "least_found": 95}', "least_found is a share above 0, up to 1"),
        ('{"least_found": 0.9}', "beside a fa_per_h"),
    ],
)
def test_bad_specifications_get_one_sentence(tmp_path, described, message):
    (tmp_path / "spec.json").write_text(described)
    with pytest.raises(SpecError, match=message):
        tracks.read_spec(tmp_path / "spec.json")


def test_a_specification_comes_back_from_its_file(tmp_path):
    (tmp_path / "spec.json").write_text(json.dumps({"minutes": 2, "snr_db": [0, 10], "noise": ["pink"]}))
    assert tracks.read_spec(tmp_path / "spec.json") == StreamSpec(
        minutes=2, snr_db=(0, 10), noise=("pink",), name="spec"
    )


def test_words_that_are_not_there_are_named(corpus):
    others = np.flatnonzero(~corpus.is_keyword("go"))
    with pytest.raises(SpecError, match="needs clips of 'go'"):
        next(tracks.render(corpus, others, "go", StreamSpec()))
    with pytest.raises(SpecError, match="needs clips of them"):
        next(tracks.render(corpus, np.flatnonzero(corpus.is_keyword("go")), "go", StreamSpec()))


def test_an_excerpt_has_the_first_keyword_in_its_middle():
    samples = np.arange(20 * 16_000, dtype=np.float32)
    part = tracks.Track(samples, [(12.0, 13.0), (16.8, 17.6), (19.0, 20.0)]).excerpt(10.0)
    assert part.seconds == 10 and part.samples[0] == 7.5 * 16_000
    assert part.keywords_s == [(4.5, 5.5)]  # the second one is cut off
    assert tracks.Track(samples, [(19.0, 20.0)]).excerpt(10.0).keywords_s == [(9.0, 10.0)]
    assert tracks.Track(samples[:16_000], []).excerpt(10.0).seconds == 1


def test_of_long_recordings_one_half_decides_and_the_other_is_counted(tmp_path):
    rng, sounds = np.random.default_rng(0), {}
    for name, seconds in (("a/one.wav", 4), ("b/two.flac", 301), ("c/three.wav", 5)):
        (tmp_path / name).parent.mkdir()
        sounds[name] = (rng.standard_normal(seconds * 16_000) * 0.1).clip(-1, 1).astype(np.float32)
        soundfile.write(tmp_path / name, sounds[name], 16_000)
    spec = tracks.recordings(tmp_path)
    val, test = (tracks.prepare(None, [], "go", spec, part) for part in ("val", "test"))
    assert val.seconds == [4.0] and test.seconds == [300.0, 5.0]  # the rest of 301 s is too little to be heard
    assert val.keywords_s == [[]] and test.keywords_s == [[], []]
    for logmels, samples in ((val.logmels[0], sounds["a/one.wav"]), (test.logmels[1], sounds["c/three.wav"])):
        np.testing.assert_allclose(logmels, LogMel()(torch.from_numpy(samples)[None])[0], atol=0.02)  # 16 bits
    (tmp_path / "a" / "one.wav").write_bytes(b"nothing")
    assert tracks.recordings(tmp_path) != spec
    with pytest.raises(SpecError, match="none of 1 recordings"):
        tracks.prepare(None, [], "go", spec, "val")
    only = tracks.recordings(tmp_path / "c")  # of a single one, each half
    val, test = (tracks.prepare(None, [], "go", only, part) for part in ("val", "test"))
    assert val.seconds == test.seconds == [2.5] and not np.array_equal(val.logmels[0], test.logmels[0])
    with pytest.raises(SpecError, match="no recordings in"):
        tracks.recordings(tmp_path / "nowhere")
