"""Spoken words from eSpeak NG, in rooms and noise: the default corpus, made on the spot.

eSpeak NG comes inside the wheel ``espeakng-loader`` (GPL-3.0; called, not copied) and is driven through ctypes. Its
output depends on what the same process said before, so every part of the corpus is spoken by a fresh process in a
fixed order: the bytes are the same every time, and the first speakers of a part sound the same however many follow.
"""

import ctypes
import hashlib
import json
import os
import re
import unicodedata
from concurrent.futures import as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from scipy import signal
from tqdm.auto import tqdm

from kwslib import paths
from kwslib.config import CLIP_SAMPLES, SAMPLE_RATE, SynthesisConfig, identity
from kwslib.processes import fresh_processes, in_fresh_process

VERSION = 5  # raise it when the same plan would sound different
N_PARTS = 8  # fixed: it decides which utterances share a process
ENGLISH = json.loads((Path(__file__).parent / "english.json").read_bytes())
WORDS = tuple(ENGLISH["words"].split())  # the 30 of Speech Commands v0.01 (Warden 2018, arXiv:1804.03209)
NEIGHBOURS = tuple(ENGLISH["neighbours"].split())  # ordinary words, among which near-misses of a keyword are looked for
ACCENTS = ("en-us", "en", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029", "en-us-nyc")
SPEAKABLE = re.compile("[a-z0-9æœßøłđ '’-]\\W*")  # by English voices; anything with a mark on it, too
BABBLE_VOICES = 6  # kept for the noise: no test speaker may be heard in training, not even in a babble
COLOURS = {"white": 0.0, "pink": 0.5, "brown": 1.0}  # amplitude falls with this power of the frequency
NOT_HUMAN = re.compile("whisper|[Rr]obo|Demonic|Storm|Tweaky|croak")
# What a word is cut out of, so that its ends sound of its neighbours.
CARRIERS = ("say {} again", "the {} now", "and {} too", "my {} is here", "one {} more", "so {} please", "a {} or two")


@dataclass(frozen=True)
class Utterance:
    """One clip to be spoken: who says what, for the how-manieth time (from 0)."""

    speaker: str
    word: str
    take: int = 0

    @property
    def clip(self) -> str:
        """In the manner of Speech Commands: ``word/voice_accent.wav``, the second time ``word/voice_accent_1.wav``."""
        return f"{self.word}/{self.speaker}{f'_{self.take}' if self.take else ''}.wav"

    def rng(self, purpose: str) -> np.random.Generator:
        """Random numbers of this clip alone, whatever else is in the corpus."""
        return _rng(purpose, self.clip)


def _rng(*names: str) -> np.random.Generator:
    return np.random.default_rng(np.frombuffer(hashlib.sha256("/".join(names).encode()).digest()[:16], np.uint32))


class _Event(ctypes.Structure):
    """espeak_EVENT of speak_lib.h: where in the audio a word of the text begins."""

    _fields_ = [("type", ctypes.c_int), ("unique_identifier", ctypes.c_uint), ("text_position", ctypes.c_int),
                ("length", ctypes.c_int), ("audio_position_ms", ctypes.c_int), ("sample", ctypes.c_int),
                ("user_data", ctypes.c_void_p), ("id", ctypes.c_char * 8)]  # fmt: skip


class Espeak:
    """The synthesizer of this process. It keeps state between utterances: mind the order."""

    SYNCHRONOUS, UTF8 = 2, 1
    RATE, PITCH, RANGE = 1, 3, 4
    WORD_EVENT = 1

    def __init__(self):
        import espeakng_loader

        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        data = os.path.dirname(espeakng_loader.get_data_path()).encode()
        self.sample_rate = self._library.espeak_Initialize(self.SYNCHRONOUS, 0, data, 0)
        if self.sample_rate <= 0:
            raise RuntimeError("eSpeak NG did not start: reinstall the package espeakng-loader")
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # else the clock: some voices contain noise
        self._library.espeak_TextToPhonemes.restype = ctypes.c_char_p
        self._heard: list[np.ndarray] = []
        self._words: dict[int, int] = {}  # position in the text, from 0 -> sample where the word begins
        arguments = ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
        self._callback = ctypes.CFUNCTYPE(ctypes.c_int, *arguments)(self._hear)  # kept alive: C holds a pointer to it
        self._library.espeak_SetSynthCallback(self._callback)

    def _hear(self, samples, count, events) -> int:
        if samples and count > 0:
            self._heard.append(np.ctypeslib.as_array(samples, (count,)).copy())
        i = 0
        while events[i].type:  # a zero ends the list
            if events[i].type == self.WORD_EVENT:
                self._words[events[i].text_position - 1] = events[i].sample
            i += 1
        return 0

    def voice(self, name: str) -> None:
        if self._library.espeak_SetVoiceByName(name.encode()) != 0:
            raise RuntimeError(f"eSpeak NG has no voice {name!r}")

    def say(self, text: str, rate: int, pitch: int, pitch_range: int, vocal_tract: float = 1.0) -> np.ndarray:
        """Speech as float32 in [-1, 1] at 16 kHz, silence at both ends removed.

        A vocal tract of 1.1 raises formants and pitch by 10 % and is as much quicker.
        """
        return _without_silence(self._speech(text, rate, pitch, pitch_range, vocal_tract)[0])

    def say_within(self, carrier: str, word: str, margin_s: float, *voice) -> np.ndarray:
        """A word cut out of a phrase, with ``margin_s`` of its neighbours; arguments of ``say`` follow.

        ``carrier`` holds ``{}`` where the word goes.
        """
        before = carrier.index("{}")
        speech, starts = self._speech(carrier.format(word), *voice)
        begin = starts.get(before)
        after = [start for position, start in starts.items() if position > before + len(word) - 1]
        if begin is None or not after:  # eSpeak NG ran the word and its neighbour into one
            return self.say(word, *voice)
        margin = int(margin_s * SAMPLE_RATE)
        cut = speech[max(begin - margin, 0) : min(after) + margin].copy()
        fade = np.linspace(0, 1, 80, dtype=np.float32)  # 5 ms against a click
        cut[:80] *= fade
        cut[-80:] *= fade[::-1]
        return _without_silence(cut)

    def _speech(self, text: str, rate, pitch, pitch_range, vocal_tract=1.0) -> tuple[np.ndarray, dict[int, int]]:
        """Samples at 16 kHz, and for each word its position in the text and where it begins."""
        for parameter, value in ((self.RATE, rate), (self.PITCH, pitch), (self.RANGE, pitch_range)):
            self._library.espeak_SetParameter(parameter, int(value), 0)
        self._heard.clear()
        self._words.clear()
        encoded = text.encode()
        self._library.espeak_Synth(encoded, len(encoded) + 1, 0, 1, 0, self.UTF8, None, None)
        samples = np.concatenate(self._heard).astype(np.float32) / 32768
        up, down = SAMPLE_RATE // 50, round(self.sample_rate * vocal_tract / 50)
        starts = {position: start * up // down for position, start in self._words.items()}
        return signal.resample_poly(samples, up, down).astype(np.float32), starts

    def phonemes(self, text: str) -> str:
        """International phonetic letters of a word, without stress marks."""
        self.voice("en-us")
        ipa = self._library.espeak_TextToPhonemes(ctypes.byref(ctypes.c_char_p(text.encode())), self.UTF8, 2).decode()
        return "".join(letter for letter in ipa if letter not in "ˈˌ ")


def _without_silence(samples: np.ndarray) -> np.ndarray:
    loud = np.flatnonzero(np.abs(samples) > 0.02 * np.abs(samples).max())
    return samples[loud[0] : loud[-1] + 1] if len(loud) else samples[:0]


def edit_distance(a: str, b: str) -> int:
    """Insertions, deletions and substitutions that turn one string into the other.

    >>> edit_distance("kitten", "sitting")
    3
    """
    row = list(range(len(b) + 1))
    for i, letter_a in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, letter_b in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (letter_a != letter_b))
    return row[-1]


def sounds_of(*words: str) -> dict[str, str]:
    """The phonetic letters of each word."""
    espeak = Espeak()
    return {word: espeak.phonemes(word) for word in words}


@dataclass(frozen=True)
class Vocabulary:
    """What the synthetic speakers say: the keyword, its near-misses, and a pool of other words."""

    keyword: str
    near_misses: list[str]
    others: list[str]


def clean(keyword: str) -> str:
    """As the voices know it: lower case, and é is one letter."""
    return paths.composed(keyword.strip().lower())


def check_spelling(keyword: str) -> None:
    """Refuse what English voices would spell out: of another script, every letter is "letter" and a number to them.

    Raises:
        ValueError: it is none that they can say.
    """
    if keyword != clean(keyword):
        raise ValueError(f"synthetic words are lower case without blanks around them: {keyword!r} is not")
    foreign = [sign for sign in keyword if not SPEAKABLE.fullmatch(unicodedata.normalize("NFD", sign))]
    if foreign:
        raise ValueError(
            f"the synthetic voices speak English and cannot speak the keyword {keyword!r}, because of {foreign[0]!r}: "
            "give a word in Latin letters, or record people and give the folder of the recordings as CORPUS"
        )


def vocabulary(keyword: str, config: SynthesisConfig = SynthesisConfig()) -> Vocabulary:
    """What the synthetic speakers say when this is the keyword: see ``Vocabulary``.

    Raises:
        ValueError: eSpeak NG has no sounds for the keyword, or needs longer for it than a clip lasts.
    """
    check_spelling(keyword)
    return in_fresh_process(_vocabulary, keyword, config)


def _vocabulary(keyword: str, config: SynthesisConfig) -> Vocabulary:
    """The words for a keyword. Near-misses sound most like it (by phonemes) without sounding the same."""
    espeak = Espeak()
    sound = espeak.phonemes(keyword)
    if not sound or "lɛɾɚ" in sound and "letter" not in keyword:  # what it does not know is "letter" and a number
        raise ValueError(f"eSpeak NG cannot speak the keyword {keyword!r}: give a word in letters")
    spoken = {word: espeak.phonemes(word) for word in dict.fromkeys((*WORDS, *NEIGHBOURS))}
    sounds = {word: ipa for word, ipa in spoken.items() if word != keyword and ipa != sound}  # no homophones
    distance = {word: edit_distance(sound, ipa) / max(len(ipa), 3) for word, ipa in sounds.items()}
    seconds = len(espeak.say(keyword, 175, 50, 50)) / SAMPLE_RATE  # its own rate, words per minute
    if seconds > CLIP_SAMPLES / SAMPLE_RATE:
        raise ValueError(f"{keyword!r} takes {seconds:.1f} s to say, a clip lasts one: give a shorter keyword")
    core = [word for word in sounds if word in WORDS]
    ranked = sorted(set(sounds) - set(core), key=lambda word: (distance[word], word))
    near, far = ranked[: config.near_misses], sorted(ranked[config.near_misses :], key=identity)
    return Vocabulary(keyword, near, sorted([*core, *far][: config.vocabulary]))


def voice_variants() -> list[str]:
    """eSpeak NG's voice variants without whispers, robots and effects, in a fixed shuffled order."""
    import espeakng_loader

    every = sorted(os.listdir(os.path.join(espeakng_loader.get_data_path(), "voices", "!v")))
    names = [name for name in every if not NOT_HUMAN.search(name)]
    return [names[i] for i in _rng("variants").permutation(len(names))]


def speakers(count: int) -> dict[str, str]:
    """``voice_accent`` -> the name eSpeak NG knows it by, for ``count`` pairs of voice variant and accent.

    The voice is the speaker: a split by speaker keeps its accents together. Every voice is used once before any is
    used with another accent.
    """
    variants = voice_variants()[:-BABBLE_VOICES]
    if count > (limit := len(variants) * len(ACCENTS)):
        raise ValueError(f"eSpeak NG has {limit} pairs of voice and accent, not {count}")
    pairs = [(ACCENTS[(i + i // len(variants)) % len(ACCENTS)], variants[i % len(variants)]) for i in range(count)]
    return {f"{re.sub('[^A-Za-z0-9]', '-', variant)}_{accent}": f"{accent}+{variant}" for accent, variant in pairs}


def is_voice(speaker: str) -> bool:
    """Whether this is a speaker of the synthetic corpus."""
    return speaker.partition("_")[0] in _order_of_voices()


def subset_of(speaker: str, config: SynthesisConfig = SynthesisConfig()) -> str:
    """``train``, ``val`` or ``test``: by default half of the voices teach, 3 of 10 test, with whatever accent."""
    return config.subsets[_order_of_voices()[speaker.partition("_")[0]] % len(config.subsets)]


@cache
def _order_of_voices() -> dict[str, int]:
    return {re.sub("[^A-Za-z0-9]", "-", variant): i for i, variant in enumerate(voice_variants())}


def plan(voices: dict[str, str], words: Vocabulary, config: SynthesisConfig) -> list[list[Utterance]]:
    """What each part of the corpus says, in order: keyword, near-misses, and other words by lot.

    Those who judge say the keyword several times: of 73 test clips, one decided what was better.
    """
    parts: list[list[Utterance]] = [[] for _ in range(N_PARTS)]
    for index, speaker in enumerate(voices):
        judges = subset_of(speaker, config) != "train"
        takes, n_others = (config.judged_takes, config.judged_words) if judges else (config.takes, config.other_words)
        others = _rng("others", speaker).choice(words.others, n_others, replace=False).tolist()
        said = [Utterance(speaker, words.keyword, take) for take in range(takes)]
        parts[index % N_PARTS] += said + [Utterance(speaker, word) for word in (*words.near_misses, *others)]
    return parts


def speak(espeak: Espeak, voice: str, utterance: Utterance, config: SynthesisConfig) -> np.ndarray:
    """One word as this speaker says it: habits of the speaker, mood of the moment."""
    habit, mood = _rng("habit", utterance.speaker), utterance.rng("mood")
    rate = habit.uniform(*config.rate_wpm) * mood.uniform(0.85, 1.2)
    pitch = np.clip(habit.uniform(*config.pitch) + mood.uniform(-10, 10), 0, 100)
    pitch_range = np.clip(habit.uniform(*config.pitch_range) + mood.uniform(-15, 15), 0, 100)
    sound = (rate, pitch, pitch_range, habit.uniform(*config.vocal_tract))
    espeak.voice(voice)
    if mood.random() < config.carrier_share:
        return espeak.say_within(mood.choice(CARRIERS), utterance.word, mood.uniform(0, 0.04), *sound)
    said = espeak.say(utterance.word, *sound)
    if len(said) > CLIP_SAMPLES:  # who says a phrase that slowly says it quicker
        said = espeak.say(utterance.word, rate * len(said) / (0.95 * CLIP_SAMPLES), *sound[1:])
    return said


def in_a_room(speech: np.ndarray, rt60_s: float, rng: np.random.Generator) -> np.ndarray:
    """Add the reverberation of a small room: decaying noise after the direct sound."""
    n = int(rt60_s * SAMPLE_RATE)
    tail = rng.standard_normal(n) * 10 ** (-3 * np.arange(n) / n) * rng.uniform(0.01, 0.08)
    tail[0] = 1.0
    return signal.oaconvolve(speech, tail)[: len(speech) + n // 3].astype(np.float32)


def place(speech: np.ndarray, noise: np.ndarray, rng: np.random.Generator, config: SynthesisConfig) -> np.ndarray:
    """A one-second clip: the word somewhere in it, tilted, over noise, at some level. int16."""
    if rng.random() < config.room_share:
        speech = in_a_room(speech, rng.uniform(*config.rt60_s), rng)
    speech = signal.lfilter([1, rng.uniform(-0.6, 0.6)], [1], speech[:CLIP_SAMPLES])
    start = rng.integers(0, CLIP_SAMPLES - len(speech) + 1)
    clip = np.pad(speech, (start, CLIP_SAMPLES - len(speech) - start))
    kind = noise[rng.integers(len(noise))]
    background = kind[(begin := rng.integers(0, len(kind) - CLIP_SAMPLES)) : begin + CLIP_SAMPLES] / 32768
    level = np.sqrt(np.mean(speech**2) / max(np.mean(background**2), 1e-12))
    clip += background * level * 10 ** (-rng.uniform(*config.snr_db) / 20)
    clip *= 10 ** (-rng.uniform(1, 20) / 20) / np.abs(clip).max()
    return np.round(clip * 32767).astype(np.int16)


def coloured_noise(rng: np.random.Generator, n: int, exponent: float, lowest_hz: float = 20.0) -> np.ndarray:
    """Noise whose amplitude falls with this power of the frequency, from ``lowest_hz`` on, of any level, (n,)."""
    spectrum = np.fft.rfft(rng.standard_normal(n))
    frequency_hz = np.fft.rfftfreq(n, 1 / SAMPLE_RATE)
    return np.fft.irfft(spectrum / np.maximum(frequency_hz, lowest_hz) ** exponent, n)


def noise_recordings(purpose: str, seconds: int = 60) -> dict[str, np.ndarray]:
    """Recordings of white, pink and brown noise, mains hum and two babbles, as int16.

    Another ``purpose`` gives others: those inside the clips are not those that augmentation uses. Speaks, so call it
    in a process of its own.
    """
    rng, n = _rng("noise", purpose), seconds * SAMPLE_RATE
    recordings = {name: coloured_noise(rng, n, exponent) for name, exponent in COLOURS.items()}
    t = np.arange(n) / SAMPLE_RATE
    overtones = (rng.uniform(0.1, 1) / k * np.sin(2 * np.pi * 50 * k * t + rng.uniform(0, 7)) for k in range(1, 12))
    recordings["hum"] = sum(overtones) + 0.02 * rng.standard_normal(n)
    voices = [f"{accent}+{voice}" for voice in voice_variants()[-BABBLE_VOICES:] for accent in ACCENTS]
    espeak = Espeak()
    for name, talkers in (("babble-few", 3), ("babble-many", 8)):
        recordings[name] = sum(_talker(espeak, voices, rng, n) for _ in range(talkers))
    return {k: np.round(x / np.abs(x).max() * 0.9 * 32767).astype(np.int16) for k, x in recordings.items()}


def _talker(espeak: Espeak, voices: list[str], rng: np.random.Generator, n: int) -> np.ndarray:
    """Endless chatter in one voice, ``n`` samples long."""
    espeak.voice(voices[rng.integers(len(voices))])
    rate, pitch = rng.integers(150, 230), rng.integers(25, 75)
    spoken, length = [], 0
    while length < n:
        spoken.append(espeak.say(" ".join(rng.choice(NEIGHBOURS, 12)), rate, pitch, 50))
        length += len(spoken[-1])
    return np.concatenate(spoken)[:n]


def talked(turns: list[tuple[str, tuple, list[tuple[str, float]]]], turn_s: int) -> np.ndarray:
    """Turns of talk, equally loud, int16 (turns, samples): of each a voice, how it speaks, sentences and pauses."""
    espeak, n, out = Espeak(), turn_s * SAMPLE_RATE, np.zeros((len(turns), turn_s * SAMPLE_RATE), np.int16)
    for row, (voice, sound, sentences) in zip(out, turns, strict=True):
        espeak.voice(voice)
        pieces: list[np.ndarray] = []
        for text, pause_s in sentences:
            if sum(map(len, pieces)) < n:
                pieces += [espeak.say(text, *sound), np.zeros(int(pause_s * SAMPLE_RATE))]
        whole = np.concatenate(pieces)[:n]
        row[:] = np.round(whole * 0.5 / np.abs(whole).max() * 32767)
    return out


def _speak_part(part: list[Utterance], voices: dict[str, str], noise: np.ndarray, config: SynthesisConfig):
    espeak = Espeak()
    clips = [place(speak(espeak, voices[u.speaker], u, config), noise, u.rng("place"), config) for u in part]
    return np.array(clips, np.int16).reshape(-1, CLIP_SAMPLES)


def make_corpus(parts: list, voices: dict, config: SynthesisConfig, waveforms: np.ndarray) -> dict[str, np.ndarray]:
    """Speak the whole corpus, one fresh process for each part, as many at a time as there are cores.

    ``parts`` as ``plan`` gives them, ``voices`` as ``speakers``; ``waveforms``, int16 (clips, samples), is filled in
    the order of the parts, in memory or in a file. Returned are the recordings of background noise by name.
    """
    with fresh_processes() as pool:
        mixed_in, background = pool.map(noise_recordings, ("clips", "background"))
        noise = np.stack(list(mixed_in.values()))
        starts = np.cumsum([0, *map(len, parts)])
        tasks = {pool.submit(_speak_part, part, voices, noise, config): i for i, part in enumerate(parts)}
        with tqdm(total=starts[-1], desc="synthesizing clips", unit="clip") as bar:
            for done in as_completed(tasks):
                i = tasks[done]
                waveforms[starts[i] : starts[i + 1]] = done.result()
                bar.update(len(parts[i]))
    return background
