"""Every size and setting that is not a recipe: frozen dataclasses, validated where they are made."""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from typing import ClassVar

SAMPLE_RATE = 16_000  # Hz, the only rate inside this package
CLIP_SAMPLES = 16_000  # a clip is one second

SPLITS = ("speaker", "random")


@dataclass(frozen=True)
class FeatureConfig:
    """Log-mel front end, as in the reports except for the framing.

    ``causal`` puts ``n_fft`` zeros before the clip and nothing after it, so a clip and a stream
    see the same numbers. ``centered`` reflects the clip at both ends, as in the reports.
    Both give 101 frames for one second.
    """

    n_mels: int = 40
    n_fft: int = 400
    hop_length: int = 160
    framing: str = "causal"

    def __post_init__(self):
        if self.framing not in ("causal", "centered"):
            raise ValueError(f"framing must be 'causal' or 'centered', not {self.framing!r}")

    @property
    def frames_per_clip(self) -> int:
        """Of one second: 101."""
        return CLIP_SAMPLES // self.hop_length + 1

    @property
    def span(self) -> int:
        """Samples of a frame and, where hops are longer, of what lies before it in its hop."""
        return max(self.n_fft, self.hop_length)

    @property
    def macs_per_second(self) -> int:
        """Multiply-accumulates of a second of stream.

        >>> FeatureConfig().macs_per_second, FeatureConfig(hop_length=1120).macs_per_second
        (1163500, 166214)
        """
        return round(self.macs_per_frame * SAMPLE_RATE / self.hop_length)

    @property
    def macs_per_frame(self) -> int:
        """Multiply-accumulates of one log-mel frame; a complex one is 4.

        The window; a real Fourier transform, as a complex one of half the size by mixed radix, n (p - 1) complex MACs
        for each prime factor p, and 2 more for each frequency to take both halves apart; the power; the mel filters,
        each over the frequencies inside it; one for each logarithm.

        >>> FeatureConfig().macs_per_frame
        11635
        """
        half, n_bins = self.n_fft // 2, self.n_fft // 2 + 1
        fourier = 4 * half * sum(p - 1 for p in _prime_factors(half)) + 8 * n_bins
        highest_mel, hz = 2595 * math.log10(1 + SAMPLE_RATE / 2 / 700), SAMPLE_RATE / self.n_fft
        mels = (highest_mel * i / (self.n_mels + 1) for i in range(self.n_mels + 2))
        edges = [round(700 * (10 ** (mel / 2595) - 1) / hz, 6) for mel in mels]  # in frequencies of the transform
        inside = sum(math.ceil(high) - 1 - math.floor(low) for low, high in zip(edges, edges[2:], strict=False))
        return self.n_fft + fourier + 2 * n_bins + inside + self.n_mels


def _prime_factors(n: int) -> list[int]:
    found, p = [], 2
    while n > 1:
        while n % p == 0:
            found, n = [*found, p], n // p
        p += 1
    return found


@dataclass(frozen=True)
class SynthesisConfig:
    """How the synthetic corpus speaks and how hard it is. Ranges are uniform.

    Attributes:
        rate_wpm, pitch, pitch_range: habits of a speaker, in eSpeak NG's units (words per minute; 0 to
            100); every utterance varies around them.
        vocal_tract: formants and pitch of a speaker are scaled by this factor, as a shorter or longer
            vocal tract would.
        carrier_share: share of the words spoken inside a phrase and cut out of it, so that their ends
            carry a bit of their neighbours.
        vocabulary: how many different words there are besides keyword and near-misses; the first thirty
            are those of Speech Commands.
        near_misses: how many of the words that sound most like the keyword are spoken.
        other_words: words per speaker, drawn from the vocabulary; ``judged_words`` of those who judge, in val and test.
        takes, judged_takes: how many times who teaches and who judges says the keyword, each time otherwise.
        subsets: of ten voices one after another, who teaches (``train``) and who judges.
        snr_db: signal-to-noise ratio; it decides most of the difficulty.
        room_share, rt60_s: share of reverberant clips and their reverberation time.
    """

    rate_wpm: tuple[float, float] = (100.0, 210.0)
    pitch: tuple[float, float] = (15.0, 85.0)
    pitch_range: tuple[float, float] = (10.0, 90.0)
    vocal_tract: tuple[float, float] = (0.9, 1.12)
    carrier_share: float = 0.0
    vocabulary: int = 200
    near_misses: int = 4
    other_words: int = 31
    judged_words: int = 36
    takes: int = 1
    judged_takes: int = 5
    subsets: tuple[str, ...] = ("train", "test", "train", "val", "train", "test", "train", "val", "train", "test")
    snr_db: tuple[float, float] = (20.0, 40.0)
    room_share: float = 0.5
    rt60_s: tuple[float, float] = (0.1, 0.6)


CELLS = {"gru": 3, "rnn": 1, "lstm": 4}  # gates of each


@dataclass(frozen=True)
class CRNNConfig:
    """Sizes of a convolutional recurrent net with attention; names and defaults as in the reports.

    Attributes:
        kernel_size, stride: (mel bins, frames).
        attention_size: inner size of the additive attention; ``None`` means ``hidden_size``, smaller is
            report B's bottleneck, ``0`` is report A2's single linear layer.
        cell: recurrent layer, ``gru``, ``rnn`` (tanh; report E) or ``lstm``.
        separable: one kernel over the log-mels, then a mix into channels, instead of a kernel for
            each channel (report E4).

    Raises:
        ValueError: an unknown cell, or a kernel that does not fit the mel bins.
    """

    cnn_out_channels: int = 8
    kernel_size: tuple[int, int] = (5, 20)
    stride: tuple[int, int] = (2, 8)
    hidden_size: int = 64
    gru_num_layers: int = 2
    attention_size: int | None = None
    n_mels: int = 40
    num_classes: int = 2
    cell: str = "gru"
    separable: bool = False
    every: ClassVar[int] = 1  # it reads every log-mel frame; a TimeNet may read fewer

    def __post_init__(self):
        if self.cell not in CELLS:
            raise ValueError(f"unknown cell {self.cell!r}: choose one of {', '.join(CELLS)}")
        if not 0 < self.kernel_size[0] <= self.n_mels:
            raise ValueError(f"a kernel of {self.kernel_size[0]} bins does not fit {self.n_mels} mel bins")

    @property
    def attention_inner_size(self) -> int:
        """Inner size of the attention, 0 when it is a single linear layer."""
        return self.hidden_size if self.attention_size is None else self.attention_size

    @property
    def conv_bins(self) -> int:
        """Mel positions that the convolution visits."""
        return (self.n_mels - self.kernel_size[0]) // self.stride[0] + 1

    @property
    def gru_input_size(self) -> int:
        return self.cnn_out_channels * self.conv_bins

    def n_steps(self, n_frames: int) -> int:
        """Convolution steps for ``n_frames`` log-mel frames: 101 frames give 11 by default."""
        return max(0, (n_frames - self.kernel_size[1]) // self.stride[1] + 1)


@dataclass(frozen=True)
class Profile:
    """Sizes of a run, never other code paths."""

    name: str
    synthetic_speakers: int  # speakers of the synthetic corpus
    seeds: int  # runs per experiment
    epochs_percent: int  # of what a recipe asks for
    views: int  # augmented copies of each training clip
    bootstrap: int  # resamples behind an interval
    trials: int  # of the sweep in 03
    stream_percent: int  # of the hours that a stream's specification asks for

    def epochs(self, recipe: int) -> int:
        """Epochs of a training whose recipe asks for so many."""
        return max(1, round(recipe * self.epochs_percent / 100))


# From the quickest to the longest.
PROFILES = {p.name: p for p in (
    Profile("smoke", synthetic_speakers=48, seeds=1, epochs_percent=5, views=1, bootstrap=200, trials=2,
            stream_percent=2),
    Profile("standard", synthetic_speakers=432, seeds=3, epochs_percent=100, views=8, bootstrap=1000, trials=16,
            stream_percent=100),
    Profile("full", synthetic_speakers=432, seeds=10, epochs_percent=200, views=16, bootstrap=2000, trials=100,
            stream_percent=100),
)}  # fmt: skip


def profile(name: str) -> Profile:
    """The profile of that name, or a sentence that lists the ones there are."""
    if name not in PROFILES:
        raise ValueError(f"unknown profile {name!r}: choose one of {', '.join(PROFILES)}")
    return PROFILES[name]


def describe(value: object) -> object:
    """A recipe as plain JSON values: dataclasses become dicts that name their class.

    Where a class lives does not matter. What was renamed says under which name it is known to published records
    (``recorded_as``), and a size that they did not have yet which value they were made with (``unless``).

    >>> describe(FeatureConfig(n_mels=20))["n_mels"]
    20
    """
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        fields = [f for f in fields if "unless" not in f.metadata or f.metadata["unless"] != getattr(value, f.name)]
        known = {f.metadata.get("recorded_as", f.name): describe(getattr(value, f.name)) for f in fields}
        return {"class": getattr(value, "recorded_as", type(value).__name__), **known}
    if isinstance(value, list | tuple):
        return [describe(item) for item in value]
    if isinstance(value, dict):
        return {key: describe(item) for key, item in value.items()}
    return value


def identity(*parts: object) -> str:
    """Sixteen hex digits that change whenever any part of a recipe changes.

    >>> identity(CRNNConfig()) == identity(CRNNConfig())
    True
    >>> identity(CRNNConfig()) == identity(CRNNConfig(hidden_size=32))
    False
    """
    text = json.dumps(describe(parts), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
