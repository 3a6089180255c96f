import hashlib

import numpy as np
import pytest

from kwslib import corpora, synthesis


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def make(n_speakers: int, words: list[str]) -> tuple[list[synthesis.Utterance], np.ndarray, dict]:
    store = []
    uttered, noise = synthesis.make_corpus(
        n_speakers, words, lambda n: store.append(np.zeros((n, 16_000), np.int16)) or store[0]
    )
    return uttered, store[0], noise


@pytest.mark.slow
def test_the_same_plan_gives_the_same_bytes_and_a_smaller_one_its_beginning():
    words = ["sheila", "go", "tequila"]
    uttered, waveforms, noise = make(20, words)
    again, same, same_noise = make(20, words)
    assert uttered == again and digest(waveforms) == digest(same)
    assert {k: digest(v) for k, v in noise.items()} == {k: digest(v) for k, v in same_noise.items()}
    fewer, beginning, _ = make(9, words)
    row = {u: i for i, u in enumerate(uttered)}
    assert all((beginning[i] == waveforms[row[u]]).all() for i, u in enumerate(fewer))


@pytest.mark.slow
def test_clips_are_loud_enough_different_and_one_second():
    _, waveforms, noise = make(9, ["sheila", "go"])
    assert waveforms.shape == (36, 16_000)
    assert (np.abs(waveforms.astype(int)).max(1) > 3000).all()
    assert len({digest(w) for w in waveforms}) == len(waveforms)
    assert all(len(n) == 60 * 16_000 for n in noise.values())


def test_noise_has_the_colour_of_its_name():
    noise = synthesis.in_fresh_process(synthesis.noise_recordings, "test", 5)
    slopes = {}
    for name in ("white", "pink", "brown"):
        power = np.abs(np.fft.rfft(noise[name].astype(float))) ** 2
        hz = np.fft.rfftfreq(len(noise[name]), 1 / 16_000)
        band = (hz > 100) & (hz < 5000)
        slopes[name] = np.polyfit(np.log10(hz[band]), 10 * np.log10(power[band]), 1)[0]
    assert slopes["white"] == pytest.approx(0, abs=0.7)  # dB per decade
    assert slopes["pink"] == pytest.approx(-10, abs=0.7)
    assert slopes["brown"] == pytest.approx(-20, abs=0.7)


def test_near_misses_sound_like_the_keyword_and_are_not_it():
    words = corpora.words_of("sheila")
    assert len(words) == len(set(words)) == 36
    assert {"leela", "shield"} <= set(words)
    assert "she" not in synthesis.WORDS
    assert set(corpora.words_of("computer")) >= {"computer", *synthesis.WORDS}


def test_a_keyword_that_cannot_be_spoken_is_refused():
    with pytest.raises(ValueError, match="cannot speak the keyword '...'"):
        corpora.words_of("...")


def test_speakers_are_pairs_of_accent_and_voice():
    voices = synthesis.speakers(180)
    assert len(voices) == 180 == len(set(voices.values()))
    assert list(voices)[:24] == list(synthesis.speakers(24))
    assert not any("_" in name or "/" in name for name in voices)
    with pytest.raises(ValueError, match="were asked for"):
        synthesis.speakers(10_000)
