"""The nets that compete with the CRNN at equal cost, and how any net is built from its sizes.

An honest question to every trick that shrinks a model is whether another small net would have done.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kwslib.config import CRNNConfig
from kwslib.models import CRNN, Outputs


@dataclass(frozen=True)
class SeparableConfig:
    """Sizes of a net of time-channel separable convolutions; mel bins are its input channels.

    Attributes:
        channels, kernels, strides: of each block; kernels and strides in frames.
    """

    channels: tuple[int, ...] = (20, 20, 32)
    kernels: tuple[int, ...] = (9, 11, 13)
    strides: tuple[int, ...] = (2, 2, 2)
    n_mels: int = 40
    num_classes: int = 2


@dataclass(frozen=True)
class BCResNetConfig:
    """Sizes of a broadcasted residual net; a ``base_channels`` of 8 is BC-ResNet-1."""

    base_channels: int = 8
    n_mels: int = 40
    num_classes: int = 2


def _only(logits: Tensor) -> Outputs:
    """Outputs of a net that has no attention and no recurrent layers."""
    return Outputs(logits, None, None, None, None)


class SeparableNet(nn.Module):
    """Blocks of depthwise and pointwise convolution over time, mean over time, linear classifier.

    In the manner of MatchboxNet (Majumdar, Ginsburg 2020, arXiv:2004.08531) and SparkNet, without residuals.

    forward(logmel): (B, F, T) -> logits (B, K)
    """

    def __init__(self, config: SeparableConfig = SeparableConfig()):
        super().__init__()
        self.config = config
        layers: list[nn.Module] = [nn.BatchNorm1d(config.n_mels, affine=False)]
        size = config.n_mels
        for channels, kernel, stride in zip(config.channels, config.kernels, config.strides, strict=True):
            layers += [
                nn.Conv1d(size, size, kernel, stride, kernel // 2, groups=size, bias=False),
                nn.Conv1d(size, channels, 1, bias=False),
                nn.BatchNorm1d(channels),
                nn.ReLU(),
            ]
            size = channels
        self.blocks = nn.Sequential(*layers)
        self.classifier = nn.Linear(size, config.num_classes)

    def forward(self, logmel: Tensor) -> Tensor:
        return self.classifier(self.blocks(logmel).mean(-1))

    def outputs(self, logmel: Tensor) -> Outputs:
        return _only(self(logmel))


class _SubSpectralNorm(nn.Module):
    """Batch normalisation of every band of frequencies for itself. (B, C, F, T) -> same"""

    def __init__(self, channels: int, bands: int = 5):
        super().__init__()
        self.bands = bands
        self.norm = nn.BatchNorm2d(channels * bands)

    def forward(self, x: Tensor) -> Tensor:
        b, c, f, t = x.shape
        return self.norm(x.view(b, c * self.bands, f // self.bands, t)).view(b, c, f, t)


class _BroadcastedBlock(nn.Module):
    """Convolve over frequency; convolve the mean over frequency along time; add it back to every frequency."""

    def __init__(self, size: int, channels: int, stride: int, dilation: int):
        super().__init__()
        self.widens = size != channels
        entrance = [nn.Conv2d(size, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        self.over_frequency = nn.Sequential(
            *(entrance if self.widens else []),
            nn.Conv2d(channels, channels, (3, 1), (stride, 1), (1, 0), groups=channels, bias=False),
            _SubSpectralNorm(channels),
        )
        self.over_time = nn.Sequential(
            nn.Conv2d(
                channels, channels, (1, 3), padding=(0, dilation), dilation=(1, dilation), groups=channels, bias=False
            ),
            nn.BatchNorm2d(channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.Dropout2d(0.1),
        )

    def forward(self, x: Tensor) -> Tensor:
        wide = self.over_frequency(x)
        out = wide + self.over_time(wide.mean(2, keepdim=True))
        return torch.relu(out if self.widens else out + x)


class BCResNet(nn.Module):
    """Broadcasted residual net, Kim et al. 2021, arXiv:2106.04140, table 1.

    forward(logmel): (B, 40, T) -> logits (B, K)
    """

    def __init__(self, config: BCResNetConfig = BCResNetConfig()):
        super().__init__()
        self.config = config
        base = config.base_channels
        size = 2 * base
        layers: list[nn.Module] = [nn.BatchNorm2d(1, affine=False)]  # padding with zeros is then no loud edge
        layers += [nn.Conv2d(1, size, 5, (2, 1), 2, bias=False), nn.BatchNorm2d(size), nn.ReLU()]
        for stage, (width, blocks) in enumerate(((1, 2), (1.5, 2), (2, 4), (2.5, 4))):
            for i in range(blocks):
                stride = 2 if stage in (1, 2) and i == 0 else 1
                layers.append(_BroadcastedBlock(size, int(width * base), stride, dilation=2**stage))
                size = int(width * base)
        layers += [
            nn.Conv2d(size, size, 5, padding=(0, 2), groups=size, bias=False),
            nn.Conv2d(size, 4 * base, 1, bias=False),
            nn.BatchNorm2d(4 * base),
            nn.ReLU(),
        ]
        self.blocks = nn.Sequential(*layers)
        self.classifier = nn.Linear(4 * base, config.num_classes)

    def forward(self, logmel: Tensor) -> Tensor:
        return self.classifier(self.blocks(logmel.unsqueeze(1)).mean((2, 3)))

    def outputs(self, logmel: Tensor) -> Outputs:
        return _only(self(logmel))


class Ensemble(nn.Module):
    """Several models that teach as one: the means of their logits and of their attention weights.

    outputs(logmel): (B, F, T) -> logits (B, K), attention (B, S); nothing else, layers have no mean.
    """

    def __init__(self, members: Sequence[nn.Module]):
        super().__init__()
        self.members = nn.ModuleList(members)

    def outputs(self, logmel: Tensor) -> Outputs:
        each = [member.outputs(logmel) for member in self.members]
        mean = _only(torch.stack([out.logits for out in each]).mean(0))
        if any(out.attention is None for out in each):
            return mean
        return mean._replace(attention=torch.stack([out.attention for out in each]).mean(0))


Config = CRNNConfig | SeparableConfig | BCResNetConfig
NETS = {CRNNConfig: CRNN, SeparableConfig: SeparableNet, BCResNetConfig: BCResNet}


def build(config: Config) -> nn.Module:
    """An untrained net of these sizes.

    >>> sum(p.numel() for p in build(CRNNConfig()).parameters())
    70443
    """
    return NETS[type(config)](config)


def config_of(described: dict) -> Config:
    """The sizes that ``kwslib.config.describe`` wrote down.

    Raises:
        KeyError: it names no net of this project.
        TypeError: it names sizes that the net does not have.
    """
    kinds = {kind.__name__: kind for kind in NETS}
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in described.items() if k != "class"}
    return kinds[described["class"]](**fields)
