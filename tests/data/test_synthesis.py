import hashlib
import subprocess
import sys

import numpy as np
import pytest

from kwslib.config import SynthesisConfig, profile
from kwslib.data import corpora, synthesis
from kwslib.data.synthesis import Vocabulary
from kwslib.processes import in_fresh_process


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


CONFIG = SynthesisConfig(carrier_share=0.5, near_misses=1, other_words=1, judged_words=1, judged_takes=1)
WORDS = Vocabulary("sheila", ["shield"], ["go"])


def make(n_speakers: int) -> tuple[list[synthesis.Utterance], np.ndarray, dict]:
    voices = synthesis.speakers(n_speakers)
    parts = synthesis.plan(voices, WORDS, CONFIG)
    said = [utterance for part in parts for utterance in part]
    waveforms = np.zeros((len(said), 16_000), np.int16)
    noise = synthesis.make_corpus(parts, voices, CONFIG, waveforms)
    return said, waveforms, noise


@pytest.mark.slow
def test_the_same_plan_gives_the_same_bytes_and_a_smaller_one_its_beginning():
    said, waveforms, noise = make(20)
    again, same, same_noise = make(20)
    assert said == again and digest(waveforms) == digest(same)
    assert {k: digest(v) for k, v in noise.items()} == {k: digest(v) for k, v in same_noise.items()}
    fewer, beginning, _ = make(9)
    row = {u: i for i, u in enumerate(said)}
    assert all((beginning[i] == waveforms[row[u]]).all() for i, u in enumerate(fewer))


@pytest.mark.slow
def test_clips_are_loud_enough_different_and_one_second():
    _, waveforms, noise = make(9)
    assert waveforms.shape == (27, 16_000)
    assert (np.abs(waveforms.astype(int)).max(1) > 3000).all()
    assert len({digest(w) for w in waveforms}) == len(waveforms)
    assert all(len(n) == 60 * 16_000 for n in noise.values())


def test_a_program_that_wants_a_corpus_is_not_run_again_by_its_workers(tmp_path):
    """A script without a guard, as an explorer writes it."""
    (tmp_path / "script.py").write_text(
        "print('running')\nfrom kwslib.data import synthesis\nprint(len(synthesis.vocabulary('sheila').near_misses))\n"
    )
    done = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True)
    assert done.stdout.split() == ["running", "4"], done.stderr


def test_a_word_cut_from_a_phrase_is_that_word():
    """Between its neighbours it sounds like the word alone: closer to it than to another word."""

    def spectrum(samples):
        power = np.abs(np.fft.rfft(samples, 32_000)) ** 2
        bands = np.log(power[:16_000].reshape(64, -1).mean(1))
        return bands - bands.mean()

    cut, alone, other = in_fresh_process(three_ways)
    assert 0.2 < len(cut) / 16_000 < 0.8 and 0.5 < len(cut) / len(alone) < 1.5
    near, far = (np.linalg.norm(spectrum(cut) - spectrum(word)) for word in (alone, other))
    assert near < far


def three_ways() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    espeak, sound = synthesis.Espeak(), (150, 50, 50)
    espeak.voice("en-us")
    return (
        espeak.say_within("the {} now", "sheila", 0.0, *sound),
        espeak.say("sheila", *sound),
        espeak.say("go", *sound),
    )


def test_a_shorter_vocal_tract_is_higher_and_quicker():
    low, high = in_fresh_process(two_tracts)
    assert len(high) / len(low) == pytest.approx(1 / 1.1, abs=0.02)
    hertz = np.fft.rfftfreq(32_000, 1 / 16_000)
    middle = [
        (hertz * power).sum() / power.sum() for power in (np.abs(np.fft.rfft(x, 32_000)) ** 2 for x in (low, high))
    ]
    assert middle[1] / middle[0] == pytest.approx(1.1, abs=0.04)


def two_tracts() -> tuple[np.ndarray, np.ndarray]:
    espeak = synthesis.Espeak()
    espeak.voice("en-us")
    return espeak.say("sheila", 150, 50, 50), espeak.say("sheila", 150, 50, 50, 1.1)


def test_noise_has_the_colour_of_its_name():
    noise = in_fresh_process(synthesis.noise_recordings, "test", 5)
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
    words = synthesis.vocabulary("sheila")
    assert {"leela", "shield"} <= set(words.near_misses) and len(words.near_misses) == 4
    said = [words.keyword, *words.near_misses, *words.others]
    assert len(said) == len(set(said)) and set(synthesis.WORDS) <= set(said)
    assert set(synthesis.vocabulary("computer").others) >= set(synthesis.WORDS)


def test_what_sounds_like_the_keyword_is_no_negative():
    """Nor is the voice of a speaker heard in the babble behind another."""
    others = synthesis.vocabulary("know")
    assert "no" not in (*others.near_misses, *others.others) and "now" in (*others.near_misses, *others.others)
    babble = set(synthesis.voice_variants()[-synthesis.BABBLE_VOICES :])
    assert not babble & {voice.partition("+")[2] for voice in synthesis.speakers(600).values()}


def test_a_keyword_that_cannot_be_spoken_is_refused():
    with pytest.raises(ValueError, match="cannot speak the keyword '...'"):
        synthesis.vocabulary("...")


@pytest.mark.parametrize("keyword", ["你好", "привет", "مرحبا", "ａ", "a+b", "hello, world", "²"])
def test_a_keyword_that_english_voices_would_spell_is_refused_before_anything_is_made(home, keyword):
    with pytest.raises(ValueError, match="voices speak English .* Latin letters, or record people"):
        corpora.load("synthetic", keyword)
    assert not home.exists()


def test_letters_with_marks_are_spoken_where_the_voices_know_them():
    assert corpora.clean_keyword("synthetic", "Cafe\u0301") == "café"
    assert synthesis.vocabulary("café").keyword == "café"
    with pytest.raises(ValueError, match="cannot speak the keyword 'việt'"):
        synthesis.vocabulary("việt")


def test_a_keyword_longer_than_a_clip_is_refused():
    with pytest.raises(ValueError, match="takes 1.3 s to say, a clip lasts one"):
        synthesis.vocabulary("turn off the lights please")


def test_those_who_judge_say_enough_and_never_teach():
    words = Vocabulary("sheila", ["shield", "shell", "sheep", "she"], [f"word{i}" for i in range(200)])
    voices = synthesis.speakers(profile("standard").synthetic_speakers)
    said = [u for part in synthesis.plan(voices, words, SynthesisConfig()) for u in part]
    assert len({u.clip for u in said}) == len(said)
    who = {subset: [u for u in said if synthesis.subset_of(u.speaker) == subset] for subset in ("train", "val", "test")}
    names = [{u.speaker.partition("_")[0] for u in utterances} for utterances in who.values()]
    assert not names[0] & names[1] and not names[0] & names[2] and not names[1] & names[2]
    assert len(names[2]) >= 24
    keywords = {subset: sum(u.word == "sheila" for u in utterances) for subset, utterances in who.items()}
    assert keywords["test"] >= 600 and len(who["test"]) - keywords["test"] >= 5000
    assert keywords["val"] >= 400 and keywords["train"] == len({u.speaker for u in who["train"]})


def test_speakers_are_pairs_of_accent_and_voice():
    voices = synthesis.speakers(180)
    assert len(voices) == 180 == len(set(voices.values()))
    assert list(voices)[:24] == list(synthesis.speakers(24))
    assert all(name.count("_") == 1 and "/" not in name for name in voices)
    assert {corpora.speaker_of(f"go/{name}.wav") for name in voices} >= {"f1", "klatt", "Andrea"}
    assert not any("whisper" in name or "robo" in name.lower() for name in synthesis.speakers(600))
    with pytest.raises(ValueError, match="656 pairs of voice and accent, not 10000"):
        synthesis.speakers(10_000)


def test_who_teaches_can_say_the_keyword_several_times_and_more_voices_can_teach():
    most = SynthesisConfig(takes=3, near_misses=1, other_words=1, judged_words=1, subsets=("train",) * 9 + ("val",))
    voices = synthesis.speakers(80)
    said = [u for part in synthesis.plan(voices, WORDS, most) for u in part if u.word == "sheila"]
    for speaker in voices:
        takes = [u.take for u in said if u.speaker == speaker]
        assert takes == list(range(3 if synthesis.subset_of(speaker, most) == "train" else most.judged_takes))
    assert sum(synthesis.subset_of(speaker, most) == "train" for speaker in voices) > 70
    assert all(map(synthesis.is_voice, voices)) and not synthesis.is_voice("0a7c2a8d")


def slow_phrase() -> tuple[int, int]:
    espeak, voices = synthesis.Espeak(), synthesis.speakers(1)
    (speaker, voice), slow = *voices.items(), SynthesisConfig(rate_wpm=(80.0, 80.0))
    espeak.voice(voice)
    return len(espeak.say("hey computer", 80, 50, 50)), len(
        synthesis.speak(espeak, voice, synthesis.Utterance(speaker, "hey computer"), slow)
    )


def test_a_phrase_that_takes_longer_than_a_clip_is_said_quicker():
    slowly, said = in_fresh_process(slow_phrase)
    assert slowly > 16_000 > said > 12_000


def test_words_that_sound_the_same_have_the_same_letters():
    sounds = in_fresh_process(synthesis.sounds_of, "right", "write", "rite", "left")
    assert sounds["right"] == sounds["write"] == sounds["rite"] != sounds["left"]
