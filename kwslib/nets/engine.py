"""A detector's training step in less time, and the same on every x86 processor with AVX2.

The same functions as torch's convolution, GRU, RNN and linear layers, with their gradients. Matrix products are
numpy's (OpenBLAS), for two reasons: thin ones, as of a convolution with two channels, take a fifth of the time, and
OpenBLAS can be told to use the kernels of one processor everywhere (``kwslib.arithmetic``), at no cost.

Shapes: B batch, C channels, F mel bins, T frames, P mel positions of the kernel, S steps, H hidden size, I inputs.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Function


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Matrix product of float32 tensors on the CPU, (M, K), (K, N) -> (M, N)."""
    out = a.new_empty(a.shape[0], b.shape[1]) if out is None else out
    np.matmul(a.numpy(), b.numpy(), out=out.numpy())
    return out


class _Linear(Function):
    """x W^T + b."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # (N, I), (O, I), (O,) -> (N, O)
        ctx.save_for_backward(x, weight)
        return product(x, weight.T).add_(bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        wanted = ctx.needs_input_grad[0]
        return product(grad, weight) if wanted else None, product(grad.T, x), grad.sum(0)


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """What a linear layer puts out, (..., I) -> (..., O)."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    return _Linear.apply(flat, layer.weight, layer.bias).view(*x.shape[:-1], -1)


class _Convolution(Function):
    """A kernel of some bins and frames over log-mels, as one thin product for each of its mel positions.

    The frames under the kernel at one step stand together, all bins of them; the bins at one position are then
    neighbours, and nothing has to be copied once for each position.
    """

    @staticmethod
    def forward(ctx, logmel: Tensor, weight: Tensor, bias: Tensor, stride: tuple[int, int]) -> Tensor:
        (channels, bins, frames), (up, along) = weight.shape, stride
        columns = logmel.unfold(2, frames, along).transpose(1, 2)  # (B, S, F, frames)
        b, s, f, _ = columns.shape
        columns, kernels = columns.reshape(b * s, f * frames), weight.reshape(channels, -1)
        places = [slice(i * frames, (i + bins) * frames) for i in range(0, f - bins + 1, up)]
        out = columns.new_empty(len(places), b * s, channels)
        for place, one in zip(places, out, strict=True):
            product(columns[:, place], kernels.T, one)
        ctx.save_for_backward(columns, weight)
        ctx.places = places
        return out.add_(bias).permute(1, 2, 0).reshape(b, s, -1)  # channel by channel, as ``nn.Flatten`` does

    @staticmethod
    def backward(ctx, grad: Tensor):
        columns, weight = ctx.saved_tensors
        b, s, _ = grad.shape
        grad = grad.reshape(b * s, len(weight), -1).permute(2, 1, 0).contiguous()  # (P, C, B * S)
        of_kernels = sum(product(one, columns[:, place]) for place, one in zip(ctx.places, grad, strict=True))
        return None, of_kernels.view_as(weight), grad.sum((0, 2)), None


def convolve(layer: nn.Conv2d, logmel: Tensor) -> Tensor:
    """The convolution over log-mel pictures, (B, F, T) -> (B, S, C * P)."""
    return _Convolution.apply(logmel, layer.weight[:, 0], layer.bias, layer.stride)


class _GRU(Function):
    """One layer of a GRU; gates in torch's order: reset, update, new.

    What a step needs is cut out of whole arrays before the loop: cutting would take longer than computing.
    """

    @staticmethod
    def forward(ctx, x, w_ih, w_hh, b_ih, b_hh) -> Tensor:  # (S, B, I) -> (S, B, H)
        s, b, _ = x.shape
        h = w_hh.shape[1]
        flat, from_hidden = x.reshape(s * b, -1).contiguous(), x.new_empty(b, 3 * h)
        bias = b_ih + torch.cat([b_hh[: 2 * h], torch.zeros(h)])  # the new gate's own is multiplied by the reset gate
        from_input = product(flat, w_ih.T).add_(bias).view(s, b, 3 * h)
        hidden = x.new_zeros(s + 1, b, h)
        gates, new, inner = x.new_empty(s, b, 2 * h), x.new_empty(s, b, h), x.new_empty(s, b, h)
        weight, both, third, last = w_hh.T.numpy(), from_hidden[:, : 2 * h], from_hidden[:, 2 * h :], b_hh[2 * h :]
        of_steps = (
            from_input[..., : 2 * h],
            from_input[..., 2 * h :],
            gates,
            gates[..., :h],
            gates[..., h:],
            new,
            inner,
        )
        states, out = hidden.unbind(0), from_hidden.numpy()
        steps = zip(*(part.unbind(0) for part in of_steps), hidden.numpy(), states, states[1:], strict=False)
        for to_gates, to_new, gate, reset, update, fresh, within, before, state, following in steps:
            np.matmul(before, weight, out=out)
            torch.add(to_gates, both, out=gate).sigmoid_()
            torch.add(third, last, out=within)
            torch.addcmul(to_new, reset, within, out=fresh).tanh_()
            torch.lerp(fresh, state, update, out=following)
        ctx.save_for_backward(flat, w_ih, w_hh, hidden, gates, new, inner)
        return hidden[1:]

    @staticmethod
    def backward(ctx, grad: Tensor):
        flat, w_ih, w_hh, hidden, gates, new, inner = ctx.saved_tensors
        s, b, h = new.shape
        reset, update, before = gates[..., :h], gates[..., h:], hidden[:-1]
        kept = 1 - update
        to_new, to_update = kept * (1 - new * new), (before - new) * update * kept
        to_reset = inner * reset * (1 - reset)
        of_input, of_hidden = grad.new_empty(s, b, 3 * h), grad.new_empty(s, b, 3 * h)
        arriving, weight = grad[s - 1], w_hh.numpy()
        earlier = torch.cat([torch.zeros(1, b, h), grad[:-1]])
        of_steps = (to_new, to_reset, to_update, reset, update, of_input[..., 2 * h :], of_hidden[..., :h],
                    of_hidden[..., h : 2 * h], of_hidden[..., 2 * h :], earlier)  # fmt: skip
        steps = zip(*(reversed(part.unbind(0)) for part in of_steps), of_hidden.numpy()[::-1], strict=True)
        for into_new, into_reset, into_update, r, z, fresh, own_r, own_z, own_n, above, own in steps:
            torch.mul(arriving, into_new, out=fresh)
            torch.mul(fresh, into_reset, out=own_r)
            torch.mul(arriving, into_update, out=own_z)
            torch.mul(fresh, r, out=own_n)
            arriving = torch.from_numpy(own @ weight).addcmul_(arriving, z).add_(above)
        of_input[..., : 2 * h] = of_hidden[..., : 2 * h]
        return _layer_gradients(ctx, flat, w_ih, before, of_input, of_hidden)


class _RNN(Function):
    """One layer of an RNN with tanh."""

    @staticmethod
    def forward(ctx, x, w_ih, w_hh, b_ih, b_hh) -> Tensor:  # (S, B, I) -> (S, B, H)
        s, b, _ = x.shape
        flat, h = x.reshape(s * b, -1).contiguous(), w_hh.shape[1]
        from_input = product(flat, w_ih.T).add_(b_ih).add_(b_hh).view(s, b, h)
        hidden, weight, from_hidden = x.new_zeros(s + 1, b, h), w_hh.T.numpy(), x.new_empty(b, h)
        out = from_hidden.numpy()
        for given, before, following in zip(from_input.unbind(0), hidden.numpy(), hidden[1:].unbind(0), strict=False):
            np.matmul(before, weight, out=out)
            torch.add(from_hidden, given, out=following).tanh_()
        ctx.save_for_backward(flat, w_ih, w_hh, hidden)
        return hidden[1:]

    @staticmethod
    def backward(ctx, grad: Tensor):
        flat, w_ih, w_hh, hidden = ctx.saved_tensors
        own, slope, arriving = torch.empty_like(hidden[1:]), 1 - hidden[1:] * hidden[1:], grad[-1]
        earlier, weight = torch.cat([torch.zeros_like(grad[:1]), grad[:-1]]), w_hh.numpy()
        steps = zip(*(reversed(part.unbind(0)) for part in (slope, own, earlier)), own.numpy()[::-1], strict=True)
        for into, out, above, its_numbers in steps:
            torch.mul(arriving, into, out=out)
            arriving = torch.from_numpy(its_numbers @ weight).add_(above)
        return _layer_gradients(ctx, flat, w_ih, hidden[:-1], own, own)


def _layer_gradients(ctx, flat, w_ih, before, of_input, of_hidden) -> tuple[Tensor | None, ...]:
    """Of a recurrent layer's input and weights, from those of its gates."""
    s, b, size = of_input.shape
    of_input, of_hidden = of_input.view(s * b, size), of_hidden.view(s * b, size)
    of_x = product(of_input, w_ih).view(s, b, -1) if ctx.needs_input_grad[0] else None
    of_w_hh = product(of_hidden.T, before.reshape(s * b, -1))
    return of_x, product(of_input.T, flat), of_w_hh, of_input.sum(0), of_hidden.sum(0)


class _OverTime(Function):
    """A convolution over time of every channel for itself; torch's gradient of it takes ten times as long as itself."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:  # (B, C, T), (C, 1, k)
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return nn.functional.conv1d(x, weight, None, stride, padding, groups=len(weight))

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x, weight), stride, padding = ctx.saved_tensors, ctx.stride, ctx.padding
        kernel, n = weight.shape[2], grad.shape[2]
        padded = nn.functional.pad(x, (padding, padding))
        phases = [padded[:, :, i::stride].contiguous() for i in range(stride)]  # what meets one tap stands together
        taps = (phases[j % stride][:, :, j // stride : j // stride + n] for j in range(kernel))
        of_weight = torch.stack([(grad * tap).sum((0, 2)) for tap in taps], dim=1).unsqueeze(1)
        if not ctx.needs_input_grad[0]:
            return None, of_weight, None, None
        rest = x.shape[2] - ((n - 1) * stride - 2 * padding + kernel)
        of_x = nn.functional.conv_transpose1d(grad, weight, None, stride, padding, rest, len(weight))
        return of_x, of_weight, None, None


class Depthwise(nn.Conv1d):
    """``nn.Conv1d`` of one kernel for each channel, without bias; its training step is that of the engine."""

    def __init__(self, channels: int, kernel: int, stride: int, padding: int):
        super().__init__(channels, channels, kernel, stride, padding, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        trains = torch.is_grad_enabled() and x.dtype == torch.float32 and x.device.type == "cpu"
        if trains and not torch.is_autocast_enabled("cpu") and not torch.jit.is_tracing():
            return _OverTime.apply(x, self.weight, self.stride[0], self.padding[0])
        return super().forward(x)


LAYERS = {nn.GRU: _GRU, nn.RNN: _RNN}


def recur(layers: nn.RNNBase, steps: Tensor) -> Tensor:
    """What recurrent layers put out that begin with nothing, (B, S, I) -> (B, S, H)."""
    x, one = steps.transpose(0, 1), LAYERS[type(layers)]
    for i in range(layers.num_layers):
        if i:
            x = nn.functional.dropout(x, layers.dropout, layers.training)
        weights = (getattr(layers, f"{name}_l{i}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        x = one.apply(x, *weights)
    return x.transpose(0, 1)


def takes(model: nn.Module, x: Tensor) -> bool:
    """Whether this is for the engine: float32 on a CPU, layers that it knows, nobody who looks into them."""
    plain = x.device.type == "cpu" and x.dtype == torch.float32 == next(model.parameters()).dtype
    watched = torch.is_autocast_enabled("cpu") or torch.jit.is_tracing() or hasattr(model, "activation_bits")
    return plain and not watched and type(model.gru) in LAYERS and type(model.classifier) is nn.Linear
