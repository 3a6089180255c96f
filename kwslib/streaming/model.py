"""The same model on endless audio: an explicit state, exact for any chunking, bounded buffers.

The state holds what the clip model would still need of the past: samples of the next frame,
frames under each convolution's kernel, the GRU's state, and the last outputs that attention may
see. Nothing is computed twice and nothing is guessed at a chunk's edge.

Shapes: B streams, N samples, F mel bins, T frames, H hidden size, L layers, W window in steps.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from kwslib.config import CLIP_SAMPLES, SAMPLE_RATE, FeatureConfig
from kwslib.data.features import LogMel, n_frames
from kwslib.nets.crnn import keyword_score, windowed_logits
from kwslib.nets.rivals import read_by
from kwslib.training.quantize import INT8

FIRST_S = 0.95  # what comes earlier is no score yet: a stream that just began has not heard a word, but fewer steps


class State(NamedTuple):
    """All a stream remembers. Values are never changed in place: one model serves many streams."""

    samples: Tensor  # (B, < n_fft + hop) not yet under a complete frame
    caches: tuple[Tensor, ...]  # of each convolution over time: (B, F, < kernel + stride) not yet under a complete one
    hidden: Tensor  # (L, B, H) of the GRU
    outputs: Tensor  # (B, <= W, H) last GRU outputs
    energies: Tensor  # (B, <= W) their attention energies

    @property
    def n_bytes(self) -> int:
        samples, caches, *rest = self
        return sum(t.numel() * t.element_size() for t in (samples, *caches, *rest))


class StreamingModel(nn.Module):
    """Front end, convolutions, recurrent layers and windowed attention, advancing one convolution step at a time.

    Shapes:
        step(samples, state): (B, N) -> scores (B, steps), state; the scores are logit differences,
        one for each step the samples completed, possibly none.

    Args:
        model: a clip model of any precision, trained with causal framing.
        max_window_length: steps that attention may look back on; one second's worth by default.
        framing: of the model's front end, from its sidecar.

    Raises:
        ValueError: the framing is not causal, the convolution skips frames (stride > kernel), or
            the window is empty.
    """

    def __init__(self, model: nn.Module, max_window_length: int | None = None, framing: str = "causal"):
        super().__init__()
        config = model.config
        if not hasattr(model, "columns"):
            raise ValueError(f"{type(model).__name__} reads whole clips: only a CRNN or a TimeNet runs on a stream")
        if config.stride[1] >= config.kernel_size[1] + config.every:
            raise ValueError("a stream needs a time stride that is not larger than the kernel")
        if framing != "causal":
            raise ValueError(f"a stream needs a model trained with causal framing, this one has {framing!r}")
        self.model = model.eval()
        self.front_end = LogMel(read_by(config))
        self.window = config.n_steps(n_frames(FeatureConfig())) if max_window_length is None else max_window_length
        if self.window < 1:
            raise ValueError(f"max_window_length must be at least 1 step, not {self.window}")
        self.dtype = next(model.parameters()).dtype
        # Dynamic int8 scales its input anew in each call: how sound is cut must not matter.
        self.one_by_one = any(isinstance(layer, INT8) for layer in model.modules())

    def initial_state(self, batch: int = 1) -> State:
        """A stream that has heard nothing; resetting a stream means taking this again."""
        config = self.model.config
        return State(
            samples=torch.zeros(batch, self.front_end.config.span),  # causal framing: silence before the start
            caches=self.model.initial_caches(batch),
            hidden=self.model.initial_state(batch),
            outputs=torch.zeros(batch, 0, config.hidden_size, dtype=self.dtype),
            energies=torch.zeros(batch, 0, dtype=self.dtype),
        )

    @torch.no_grad()
    def step(self, samples: Tensor, state: State) -> tuple[Tensor, State]:
        audio, new_frames = self._take_frames(torch.cat([state.samples, samples], dim=1))
        columns, caches = self.model.columns(new_frames, state.caches)
        rest = state.hidden, state.outputs, state.energies
        if columns.shape[1] > 1 and not self.one_by_one:
            scores, *rest = self._advance_through(columns, *rest)
            return scores, State(audio, caches, *rest)
        scores = [torch.zeros(len(samples), 0)]
        for i in range(columns.shape[1]):
            score, *rest = self.advance(columns[:, i : i + 1], *rest)
            scores.append(score[:, None])
        return torch.cat(scores, dim=1), State(audio, caches, *rest)

    def advance(
        self, column: Tensor, hidden: Tensor, outputs: Tensor, energies: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One step from a convolution column (B, 1, C * bins) on: score (B,) and the new parts of the state."""
        output, hidden = self.model.recur(column, hidden)
        outputs = torch.cat([outputs, output], dim=1)[:, -self.window :]
        energies = torch.cat([energies, self.model.energies(output)], dim=1)[:, -self.window :]
        context = (energies.softmax(-1).unsqueeze(-1) * outputs).sum(1)
        return keyword_score(self.model.classifier(context)), hidden, outputs, energies

    def _advance_through(
        self, columns: Tensor, hidden: Tensor, outputs: Tensor, energies: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Many steps (B, S, C * bins) at once, equal to ``advance`` to rounding and far quicker: scores (B, S)."""
        output, hidden = self.model.recur(columns, hidden)
        outputs = torch.cat([outputs, output], dim=1)
        energies = torch.cat([energies, self.model.energies(output)], dim=1)
        window, first = min(self.window, outputs.shape[1]), outputs.shape[1] - output.shape[1] + 1
        missing, unseen = max(0, window - first), max(0, first - window)  # before the first step's window; behind it
        logits = windowed_logits(self.model, outputs[:, unseen:], energies[:, unseen:], window, missing)
        scores = keyword_score(logits.flatten(0, 1)).view(output.shape[:2])
        return scores, hidden, outputs[:, -self.window :].clone(), energies[:, -self.window :].clone()

    def _take_frames(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        """Split audio into what must be kept and the log-mel frames that are complete."""
        n_fft, hop, span = (getattr(self.front_end.config, of) for of in ("n_fft", "hop_length", "span"))
        new = max(0, (audio.shape[1] - span) // hop + 1)
        if new == 0:
            return audio, torch.zeros(len(audio), self.model.config.n_mels, 0)
        return audio[:, new * hop :].clone(), self.front_end.frames(audio[:, span - n_fft :])

    def step_times_s(self, first: int, n_steps: int) -> np.ndarray:
        """When each step's last sample arrived, in seconds since the stream began."""
        config, hop = self.model.config, FeatureConfig().hop_length
        last_frame = (np.arange(n_steps) + first) * config.stride[1] + config.kernel_size[1] - 1
        return last_frame * hop / SAMPLE_RATE


def score_chunks(streaming: StreamingModel, chunks: Iterable[np.ndarray]) -> Iterator[tuple[float, float]]:
    """Score a stream of float32 chunks with carried state.

    Yields:
        (time in seconds, logit difference) of every step from ``FIRST_S`` on, as soon as it is complete.
    """
    state, done = streaming.initial_state(), 0
    for chunk in chunks:
        new, state = streaming.step(torch.as_tensor(chunk, dtype=torch.float32)[None], state)
        times = streaming.step_times_s(done, new.shape[1])
        done += new.shape[1]
        yield from ((t, score) for t, score in zip(times.tolist(), new[0].tolist(), strict=True) if t >= FIRST_S)


def carried_scores(streaming: StreamingModel, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Times and scores of a whole track with carried state, fed a second at a time."""
    chunks = np.split(samples, range(CLIP_SAMPLES, len(samples), CLIP_SAMPLES))
    pairs = np.array(list(score_chunks(streaming, chunks))).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


@torch.no_grad()
def reset_scores(
    model: nn.Module, samples: np.ndarray, window_s: float = 1.0, step_s: float = 0.1, naive: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Times and scores of the clip model run afresh on a sliding window.

    Every window is a clip of its own: zeros before it, state cleared. A score belongs to the end
    of its window; the first windows of a track reach back into silence.

    Args:
        naive: hand the recurrent state from window to window although they overlap, so that most sound is heard
            several times. A common mistake, here to be looked at.
    """
    window, hop = round(window_s * SAMPLE_RATE), round(step_s * SAMPLE_RATE)
    front_end = LogMel(FeatureConfig(n_mels=model.config.n_mels))
    padded = np.concatenate([np.zeros(window, np.float32), samples])
    ends = np.arange(hop, len(samples) + 1, hop)
    dtype = next(model.parameters()).dtype
    values, state, at_once = [], model.initial_state(1) if naive else None, 1 if naive else 64
    for start in range(0, len(ends), at_once):
        clips = np.stack([padded[end : end + window] for end in ends[start : start + at_once]]).astype(np.float32)
        logmels = front_end(torch.from_numpy(clips)).to(dtype)
        if naive:
            hidden, state = model.recur(model.steps(logmels), state)
            logits = model.classifier(model.attention(hidden)[0])
        else:
            logits = model(logmels)
        values.append(keyword_score(logits).numpy())
    return ends / SAMPLE_RATE, np.concatenate(values) if values else np.zeros(0)


def probability(score: float | np.ndarray) -> np.ndarray:
    """Logit difference -> probability of the keyword, in double precision so that it hardly saturates.

    >>> float(probability(0.0))
    0.5
    """
    return 1 / (1 + np.exp(-np.asarray(score, np.float64)))
