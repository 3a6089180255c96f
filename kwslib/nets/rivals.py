"""The nets that compete with the CRNN at equal cost, and how any net is built from its sizes.

An honest question to every trick that shrinks a model is whether another small net would have done.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor, nn

from kwslib.config import SAMPLE_RATE, CRNNConfig, FeatureConfig
from kwslib.nets.crnn import CRNN, Outputs
from kwslib.nets.engine import Depthwise

HOP_MS = 1000 * FeatureConfig().hop_length // SAMPLE_RATE  # from each log-mel frame to the next


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
class TimeNetConfig:
    """Sizes of a separable net that also runs on a stream: nothing is padded, and the mean is over the last second.

    Attributes:
        channels, kernels, strides: of each block, as of ``SeparableConfig``, but in frames that are read.
        hop_ms: from one log-mel frame that is read to the next. What lies between is not computed on a stream, where
            log-mels of every 10 ms cost ten times what a small net does.

    Raises:
        ValueError: no blocks, sizes that do not belong together, a stride that skips frames, or a hop that is not of
            whole frames.
    """

    channels: tuple[int, ...] = (24, 20, 32)
    kernels: tuple[int, ...] = (9, 11, 13)
    strides: tuple[int, ...] = (2, 2, 2)
    n_mels: int = 40
    num_classes: int = 2
    hop_ms: int = field(default=10, metadata={"unless": 10})

    def __post_init__(self):
        sizes = list(zip(self.channels, self.kernels, self.strides, strict=False))
        if not sizes or {len(self.channels), len(self.kernels), len(self.strides)} != {len(sizes)}:
            raise ValueError(f"channels, kernels and strides must be as many, and some, not {self}")
        if any(channels < 1 or not 1 <= stride <= kernel for channels, kernel, stride in sizes):
            raise ValueError(f"a block needs channels, and a stride from 1 to its kernel, not {self}")
        if self.hop_ms < HOP_MS or self.hop_ms % HOP_MS:
            raise ValueError(f"hop_ms must be a multiple of {HOP_MS}, not {self.hop_ms}")

    @property
    def every(self) -> int:
        """Of the log-mel frames, one in so many is read."""
        return self.hop_ms // HOP_MS

    @property
    def stride(self) -> tuple[int, int]:
        """(mel bins, frames) from step to step of the last block, those between included that are not read."""
        return self.n_mels, prod(self.strides) * self.every

    @property
    def kernel_size(self) -> tuple[int, int]:
        """(mel bins, frames) from the first to the last that one step of the last block reads."""
        seen, apart = 1, self.every
        for kernel, stride in zip(self.kernels, self.strides, strict=True):
            seen, apart = seen + (kernel - 1) * apart, apart * stride
        return self.n_mels, seen

    @property
    def hidden_size(self) -> int:
        return self.channels[-1]

    def n_steps(self, n_frames: int) -> int:
        """Steps of the last block for so many log-mel frames: 101 frames give 4 by default."""
        return max(0, (n_frames - self.kernel_size[1]) // self.stride[1] + 1)


@dataclass(frozen=True)
class FoldedTimeNetConfig(TimeNetConfig):
    """Sizes of a ``FoldedTimeNet``: those of the net that was folded."""


@dataclass(frozen=True)
class BCResNetConfig:
    """Sizes of a broadcasted residual net; a ``base_channels`` of 8 is BC-ResNet-1."""

    base_channels: int = 8
    n_mels: int = 40
    num_classes: int = 2


def _separable_blocks(config: "SeparableConfig | TimeNetConfig", padded: bool) -> list[list[nn.Module]]:
    blocks, size = [], config.n_mels
    for channels, kernel, stride in zip(config.channels, config.kernels, config.strides, strict=True):
        over_time = Depthwise(size, kernel, stride, kernel // 2 if padded else 0)
        blocks.append([over_time, nn.Conv1d(size, channels, 1, bias=False), nn.BatchNorm1d(channels), nn.ReLU()])
        size = channels
    return blocks


class _Net(nn.Module):
    """A net that puts out logits and nothing else that a loss may look at."""

    def outputs(self, logmel: Tensor) -> Outputs:
        return Outputs(self(logmel))


class SeparableNet(_Net):
    """Blocks of depthwise and pointwise convolution over time, mean over time, linear classifier.

    In the manner of MatchboxNet (Majumdar, Ginsburg 2020, arXiv:2004.08531) and SparkNet, without residuals.

    forward(logmel): (B, F, T) -> logits (B, K)
    """

    def __init__(self, config: SeparableConfig = SeparableConfig()):
        super().__init__()
        self.config = config
        layers: list[nn.Module] = [nn.BatchNorm1d(config.n_mels, affine=False)]
        for block in _separable_blocks(config, padded=True):
            layers += block
        self.blocks = nn.Sequential(*layers)
        self.classifier = nn.Linear(config.channels[-1], config.num_classes)

    def forward(self, logmel: Tensor) -> Tensor:
        return self.classifier(self.blocks(logmel).mean(-1))


class TimeNet(_Net):
    """The blocks of ``SeparableNet`` without padding, each with a cache of its own on a stream.

    It has the methods through which a stream runs a CRNN, and no recurrent layer: its state is empty. Whatever
    it heard more than a second ago is forgotten.

    Shapes:
        forward(logmel): (B, F, T) -> logits (B, K)
        steps(logmel):   (B, F, T) -> (B, S, C)

    Raises:
        ValueError: fewer frames than one step needs.
    """

    def __init__(self, config: TimeNetConfig = TimeNetConfig()):
        super().__init__()
        self.config = config
        self.norm = nn.BatchNorm1d(config.n_mels, affine=False)
        self.blocks = nn.ModuleList(nn.Sequential(*block) for block in _separable_blocks(config, padded=False))
        self.classifier = nn.Linear(config.hidden_size, config.num_classes)

    def steps(self, logmel: Tensor) -> Tensor:
        if logmel.shape[2] < self.config.kernel_size[1]:
            raise ValueError(f"expected at least {self.config.kernel_size[1]} frames, got {logmel.shape[2]}")
        x = self.norm(logmel[:, :, :: self.config.every])
        for block in self.blocks:
            x = block(x)
        return x.transpose(1, 2)

    def initial_caches(self, batch: int) -> tuple[Tensor, ...]:
        """What each block keeps of a stream that has not begun, (B, C, 0)."""
        sizes, dtype = (self.config.n_mels, *self.config.channels[:-1]), self.blocks[0][0].weight.dtype
        return tuple(torch.zeros(batch, size, 0, dtype=dtype) for size in sizes)

    def columns(self, frames: Tensor, caches: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The steps that new frames (B, F, T) of a stream complete, (B, S, C), and what each block must keep.

        All of them are read: a stream computes no others.
        """
        x, kept = self.norm(frames.to(self.blocks[0][0].weight.dtype)), []
        for block, cache in zip(self.blocks, caches, strict=True):
            (kernel,), (stride,) = block[0].kernel_size, block[0].stride
            x = torch.cat([cache, x], dim=2)
            n_steps = max(0, (x.shape[2] - kernel) // stride + 1)
            kept.append(x[:, :, n_steps * stride :].clone())
            x = block(x) if n_steps else x.new_zeros(len(x), block[1].out_channels, 0)
        return x.transpose(1, 2), tuple(kept)

    def initial_state(self, batch: int) -> Tensor:
        """Of no recurrent layers, (0, B, C)."""
        return torch.zeros(0, batch, self.config.hidden_size, dtype=self.blocks[0][0].weight.dtype)

    def recur(self, steps: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Nothing recurs."""
        return steps, state

    def convolved(self, logmel: Tensor) -> Tensor:
        return self.steps(logmel)

    def hidden(self, steps: Tensor) -> Tensor:
        return steps

    def energies(self, hidden: Tensor) -> Tensor:
        """No step counts more than another."""
        return torch.zeros_like(hidden[..., 0])

    def classify(self, context: Tensor) -> Tensor:
        return self.classifier(context)

    def read(self, steps: Tensor) -> Outputs:
        return Outputs(self.classifier(steps.mean(1)))

    def forward(self, logmel: Tensor) -> Tensor:
        return self.classifier(self.steps(logmel).mean(1))


class FoldedTimeNet(TimeNet):
    """A ``TimeNet`` without normalization layers: its convolutions have absorbed them, see ``folded``.

    Each block has one bias per channel instead of four numbers, and the input none instead of 80.
    """

    def __init__(self, config: FoldedTimeNetConfig = FoldedTimeNetConfig()):
        super().__init__(config)
        self.norm = nn.Identity()
        for i, (over_time, mix, _, rectify) in enumerate(self.blocks):
            self.blocks[i] = nn.Sequential(over_time, nn.Conv1d(mix.in_channels, mix.out_channels, 1), rectify)


@torch.no_grad()
def folded(model: TimeNet) -> FoldedTimeNet:
    """The same function in fewer numbers: normalization with fixed statistics is a scale and a shift.

    The input's scale goes into the convolution over time and its shift, after both convolutions, into the bias of the
    first block: nothing lies between them. Exact to rounding; rows of weights keep their ratios, and so their grid.
    """
    net = FoldedTimeNet(FoldedTimeNetConfig(**vars(model.config))).eval()
    mean, std = model.norm.running_mean, (model.norm.running_var + model.norm.eps).sqrt()
    for (over_time, mix, norm, _), (lean_over_time, lean_mix, _) in zip(model.blocks, net.blocks, strict=True):
        gain = norm.weight / (norm.running_var + norm.eps).sqrt()
        lean_over_time.weight.copy_(over_time.weight / std[:, None, None])
        lean_mix.weight.copy_(mix.weight * gain[:, None, None])
        shift = -mix.weight[:, :, 0] @ (over_time.weight.sum((1, 2)) * mean / std)
        lean_mix.bias.copy_(norm.bias + gain * (shift - norm.running_mean))
        mean, std = torch.zeros(len(gain)), torch.ones(len(gain))  # of the blocks' inputs: as they are
    net.classifier.load_state_dict(model.classifier.state_dict())
    return net


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


class BCResNet(_Net):
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


class Ensemble(nn.Module):
    """Several models that teach as one: the means of their logits and of their attention weights.

    outputs(logmel): (B, F, T) -> logits (B, K), attention (B, S); nothing else, layers have no mean.
    """

    def __init__(self, members: Sequence[nn.Module]):
        super().__init__()
        self.members = nn.ModuleList(members)

    def outputs(self, logmel: Tensor) -> Outputs:
        each = [member.outputs(logmel) for member in self.members]
        mean = Outputs(torch.stack([out.logits for out in each]).mean(0))
        if any(out.attention is None for out in each):
            return mean
        return mean._replace(attention=torch.stack([out.attention for out in each]).mean(0))


Config = CRNNConfig | SeparableConfig | TimeNetConfig | FoldedTimeNetConfig | BCResNetConfig
NETS = {
    CRNNConfig: CRNN,
    SeparableConfig: SeparableNet,
    TimeNetConfig: TimeNet,
    FoldedTimeNetConfig: FoldedTimeNet,
    BCResNetConfig: BCResNet,
}


def build(config: Config) -> nn.Module:
    """An untrained net of these sizes.

    >>> sum(p.numel() for p in build(CRNNConfig()).parameters())
    70443
    """
    return NETS[type(config)](config)


def read_by(config: CRNNConfig | TimeNetConfig) -> FeatureConfig:
    """The log-mels that a net of these sizes reads on a stream: frames that it does not read are not computed."""
    return FeatureConfig(n_mels=config.n_mels, hop_length=config.every * FeatureConfig().hop_length)


def config_of(described: dict) -> Config:
    """The sizes that ``kwslib.config.describe`` wrote down.

    Raises:
        KeyError: it names no net of this project.
        TypeError: it names sizes that the net does not have.
    """
    kinds = {kind.__name__: kind for kind in NETS}
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in described.items() if k != "class"}
    return kinds[described["class"]](**fields)
