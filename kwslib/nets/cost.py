"""What a model costs: multiply-accumulates, parameters, milliseconds (bytes: room ``quantize``).

One multiply and one add are 1 MAC. MACs are counted on a freshly built float model of the same
architecture, never on the object that is saved (thop leaves buffers in what it profiles) and
never on a quantized one (thop sees only its convolution). The front end is not counted.
"""

import statistics
import time
import warnings
from collections.abc import Callable, Hashable, Mapping

import pandas as pd
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kwslib.config import CELLS, SAMPLE_RATE, CRNNConfig, FeatureConfig
from kwslib.data.features import n_frames, one_thread
from kwslib.nets.engine import Depthwise
from kwslib.nets.rivals import Config, TimeNetConfig, build

REPORT_BATCH = 128  # the reports counted a batch of 128 clips

CONVENTION = (
    "1 multiply-add = 1 MAC, one 1-s clip of 101 frames, front end excluded; macs_per_clip as thop 0.1.1 counts "
    "(element-wise GRU work included, convolution bias not), macs_exact_per_clip matrix products only"
)


def clip_macs(config: Config) -> int:
    """MACs for one 1-s clip in thop's convention: 932,224 for the baseline.

    >>> clip_macs(CRNNConfig())
    932224
    """
    x = torch.zeros(1, config.n_mels, n_frames(FeatureConfig(n_mels=config.n_mels)))
    with warnings.catch_warnings():  # thop compares versions with the deprecated distutils
        warnings.simplefilter("ignore", DeprecationWarning)
        import thop
        from thop.vision.basic_hooks import count_convNd, zero_ops

        # At inference a normalisation layer is absorbed by the convolution before it.
        counts = {nn.BatchNorm1d: zero_ops, nn.BatchNorm2d: zero_ops, Depthwise: count_convNd}
        with torch.no_grad():
            macs, _ = thop.profile(build(config).eval(), (x,), custom_ops=counts, verbose=False)
    return int(macs)


def formula_macs(config: CRNNConfig) -> int:
    """MACs for one clip in thop's convention, by formula: no model is built.

    With n convolution steps and h hidden units: a GRU layer n (3 h (in + h) + 13 h), an RNN layer
    n (h (in + h) + 3 h), an LSTM layer n (4 h (in + h) + 16 h), attention n (h a + a) with inner size a, or n h, the
    classifier h times the classes. thop does not count the sums over time.

    >>> formula_macs(CRNNConfig())
    932224
    """
    n, h, inner = config.n_steps(n_frames(FeatureConfig())), config.hidden_size, config.attention_inner_size
    element_wise = {"gru": 13, "rnn": 3, "lstm": 16}[config.cell]
    recurrent = sum(products + element_wise * h for products in _recurrent_macs(config))
    attention = h * inner + inner if inner else h
    return n * (_conv_step_macs(config) + recurrent + attention) + h * config.num_classes


def _conv_step_macs(config: CRNNConfig) -> int:
    """Of one step of the convolution, over all its bins."""
    kernel, channels = config.kernel_size[0] * config.kernel_size[1], config.cnn_out_channels
    return config.conv_bins * (kernel + channels if config.separable else kernel * channels)


def _recurrent_macs(config: CRNNConfig) -> list[int]:
    """Of one step of each recurrent layer, matrix products alone."""
    h = config.hidden_size
    inputs = [config.gru_input_size] + [h] * (config.gru_num_layers - 1)
    return [CELLS[config.cell] * h * (size + h) for size in inputs]


def exact_clip_macs(config: Config) -> int:
    """MACs of the matrix products in one clip, by torch's FlopCounterMode (2 FLOPs = 1 MAC).

    >>> exact_clip_macs(CRNNConfig())
    913920
    """
    model = build(config).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, config.n_mels, n_frames(FeatureConfig(n_mels=config.n_mels))))
    unseen = 0
    if isinstance(config, CRNNConfig) and config.cell == "lstm":  # one fused operation that the counter does not know
        unseen = config.n_steps(n_frames(FeatureConfig())) * sum(_recurrent_macs(config))
    return counter.get_total_flops() // 2 + unseen


def step_macs(config: CRNNConfig | TimeNetConfig) -> int:
    """MACs of one streaming step: a convolution column, the recurrent layers, one energy, the weighted sum, logits.

    The sum over the attention window is counted at one second of steps. Of a TimeNet: what each block adds
    between two steps of the last one, the mean, logits.
    """
    if isinstance(config, TimeNetConfig):
        macs, size, positions = config.hidden_size * config.num_classes, config.n_mels, config.stride[1] // config.every
        for channels, kernel, stride in zip(config.channels, config.kernels, config.strides, strict=True):
            positions //= stride
            macs, size = macs + positions * size * (kernel + channels), channels
        return macs + config.n_steps(n_frames(FeatureConfig())) * config.hidden_size
    h, inner = config.hidden_size, config.attention_inner_size
    attention = (h * inner + inner if inner else h) + config.n_steps(n_frames(FeatureConfig())) * h
    return _conv_step_macs(config) + sum(_recurrent_macs(config)) + attention + h * config.num_classes


def steps_per_second(config: CRNNConfig | TimeNetConfig) -> float:
    """How often a streaming model advances: 12.5 times a second by default."""
    return SAMPLE_RATE / FeatureConfig().hop_length / config.stride[1]


def latencies_ms(calls: Mapping[Hashable, Callable], rounds: int = 40, in_a_row: int = 5) -> pd.DataFrame:
    """Median and quartiles of the wall time of each call on one thread, in milliseconds.

    The calls take turns, a few times each: a busy moment of the machine then hits all of them, not one.

    Returns:
        One row per call: ``median, q25, q75``.
    """
    times: dict[Hashable, list[float]] = {name: [] for name in calls}
    with one_thread(), torch.no_grad():
        for turn in range(rounds + 1):  # the first one warms up
            for name, call in calls.items():
                for _ in range(in_a_row):
                    began = time.perf_counter()
                    call()
                    if turn:
                        times[name].append(1000 * (time.perf_counter() - began))
    quartiles = pd.DataFrame({name: statistics.quantiles(each, n=4) for name, each in times.items()})
    return quartiles.T.set_axis(["q25", "median", "q75"], axis=1)[["median", "q25", "q75"]]


def latency_ms(call: Callable) -> float:
    """Median wall time of ``call()`` on one thread, in milliseconds."""
    return float(latencies_ms({"": call}, rounds=20)["median"].iloc[0])


def cost(config: Config) -> dict:
    """The cost part of a record that depends on the architecture alone; of a stream only where the net has one."""
    macs = clip_macs(config)
    of_any_net = {
        "params": sum(p.numel() for p in build(config).parameters()),
        "macs_per_clip": macs,
        "macs_exact_per_clip": exact_clip_macs(config),
        "thop_macs_batch128": macs * REPORT_BATCH,
        "macs_convention": CONVENTION,
    }
    if not isinstance(config, CRNNConfig | TimeNetConfig):
        return of_any_net
    steps = config.n_steps(n_frames(FeatureConfig()))
    if isinstance(config, CRNNConfig):  # the older thop of the reports counted the additions of the convolution's bias
        bias_macs = config.conv_bins * steps * (config.cnn_out_channels + config.separable)
        of_any_net["thop_macs_batch128_with_bias"] = (macs + bias_macs) * REPORT_BATCH
    macs_per_second = round(step_macs(config) * steps_per_second(config))
    return of_any_net | {"macs_per_second": macs_per_second, "steps_per_clip": steps}


def step_latency_ms(streaming: nn.Module) -> float:
    """Latency of one streaming step, front end included: of a hop of samples that completes one."""
    config = streaming.model.config
    hop = config.stride[1] * FeatureConfig().hop_length
    _, state = streaming.step(torch.zeros(1, 2 * SAMPLE_RATE), streaming.initial_state())
    return latency_ms(lambda: streaming.step(torch.zeros(1, hop), state))


def clip_latency_ms(model: nn.Module, n_mels: int = 40) -> float:
    """Latency of one clip through the model, front end excluded."""
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    x = torch.zeros(1, n_mels, n_frames(FeatureConfig()), dtype=dtype)
    return latency_ms(lambda: model(x))
