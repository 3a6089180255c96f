"""Steps after training that train again: plainly, on pieces of stream, or for weights of few bits.

Each is called with the model and ``tune(model, training, **what is special)``, which trains it in place with the
losses, teacher and augmentation of its experiment.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from kwslib.data.pieces import PieceConfig
from kwslib.training.loop import Training
from kwslib.training.quantize import WeightInt, round_inputs


@dataclass(frozen=True)
class Tune:
    """Train on and change nothing else: the control of steps that also tune.

    Attributes:
        training: with the experiment's losses, teacher and augmentation.
    """

    training: Training

    def __call__(self, model: nn.Module, tune: Callable) -> nn.Module:
        tune(model, self.training)
        return model.eval()


@dataclass(frozen=True)
class StreamTune:
    """Tune on pieces of stream, through which the state is carried.

    Each second counts by its highest score on the way (max pooling over time, Sun et al. 2017, arXiv:1705.02411),
    so other words must stay low at every step, also where one ends and the next begins; a keyword has
    to be heard once. Just after a keyword, for as long as attention still sees it, nothing is asked.

    Attributes:
        training: with the experiment's losses, teacher and augmentation; its last epoch is kept, for the best clip
            model is not the best on a stream.
        pieces: what they are made of.
        bits: quantization-aware, for a ``WeightInt`` of so many bits that follows; 0 for float32.
        mel_warp: each piece is heard with the mel axis stretched or squeezed by up to this share, differently every
            time, by the teacher, too: more speakers than there are.
    """

    training: Training
    pieces: PieceConfig = field(default=PieceConfig(), metadata={"recorded_as": "sequences"})
    bits: int = 0
    mel_warp: float = 0.0

    def __call__(self, model: nn.Module, tune: Callable) -> nn.Module:
        tune(model, self.training, pieces=self.pieces, mel_warp=self.mel_warp, weight_bits=self.bits, keep="last")
        return model.eval()


@dataclass(frozen=True)
class QAT:
    """Quantization-aware tuning, then ``WeightInt``: the weights learn to live on the grid of so many bits.

    Attributes:
        bits, activations: as in ``WeightInt``.
        training: with the experiment's losses, teacher and augmentation.
    """

    bits: int = 8
    training: Training = Training(epochs=10, learning_rate=3e-3)
    activations: bool = False

    def __call__(self, model: nn.Module, tune: Callable) -> nn.Module:
        last = WeightInt(self.bits, self.activations)
        if self.activations:
            round_inputs(model)
        tune(model, self.training, weight_bits=self.bits)
        return last(model)
