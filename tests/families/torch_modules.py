"""The quantisers of published low-bit networks as people write them in PyTorch, two layers of each behind one another."""

import torch
from torch import nn
from torch.nn import functional as F


def ste(x, q):
    """x + (q - x).detach()"""
    return x + (q - x).detach()


class SignFunction(torch.autograd.Function):
    """BinaryNet (Courbariaux et al. 2016): sign with a clipped straight-through gradient."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.sign(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (x.abs() <= 1).float()


class QuantFunction(torch.autograd.Function):
    """Rounding with a straight-through gradient."""

    @staticmethod
    def forward(ctx, x):
        return torch.round(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


# ---- activations


def binarynet(x):
    return SignFunction.apply(F.hardtanh(x))


def bireal(x):
    """Bi-Real net (Liu et al. 2018): sign with the gradient of a piecewise polynomial."""
    out_forward = torch.sign(x)
    mask1, mask2, mask3 = x < -1, x < 0, x < 1
    out1 = (-1) * mask1.type(torch.float32) + (x * x + 2 * x) * (1 - mask1.type(torch.float32))
    out2 = out1 * mask2.type(torch.float32) + (-x * x + 2 * x) * (1 - mask2.type(torch.float32))
    out3 = out2 * mask3.type(torch.float32) + 1 * (1 - mask3.type(torch.float32))
    return out_forward.detach() - out3.detach() + out3


def irnet(x):
    """IR-Net (Qin et al. 2020): k * tanh(t * x) as the gradient's function."""
    soft = torch.tanh(2.0 * x)
    return torch.sign(x).detach() - soft.detach() + soft


def where_sign(x):
    return torch.where(x >= 0, torch.ones_like(x), -torch.ones_like(x))


def dorefa_activation(x, bits=2):
    n = 2**bits - 1
    y = torch.clamp(x, 0, 1)
    return ste(y, torch.round(y * n) / n)


def dorefa_scaled(x, bits=2):
    """With the clip at 1 spelled by minimum and maximum, and the scale outside."""
    n = float(2**bits - 1)
    return QuantFunction.apply(torch.minimum(torch.maximum(x, torch.tensor(0.0)), torch.tensor(1.0)) * n) / n


def pact(x, alpha=2.5, bits=2):
    y = 0.5 * (torch.abs(x) - torch.abs(x - alpha) + alpha)
    scale = (2**bits - 1) / alpha
    return torch.round(y * scale) / scale


def pact_ste(x, alpha=2.5, bits=2):
    y = torch.relu(x) - torch.relu(x - alpha)
    scale = (2**bits - 1) / alpha
    return ste(y, torch.round(y * scale) / scale)


def pact_where(x, alpha=2.5, bits=2):
    y = torch.where(x < 0, torch.zeros_like(x), torch.where(x < alpha, x, torch.full_like(x, alpha)))
    scale = (2**bits - 1) / alpha
    return QuantFunction.apply(y * scale) / scale


def lsq(x, s=0.37, low=0, high=3):
    v = torch.clamp(x / s, low, high)
    return ste(v, torch.round(v)) * s


def lsq_signed(x):
    return lsq(x, 0.41, -2, 1)


def lsq_plus(x, s=0.31, beta=-0.62):
    """LSQ+ (Bhalgat et al. 2020): with an offset."""
    return torch.round(torch.clamp((x - beta) / s, 0, 3)) * s + beta


def round_then_clamp(x, s=0.5):
    return torch.clamp(torch.round(x / s), -2, 1) * s


def pact_four_bits(x, alpha=6.0):
    """15 steps of 0.4: neighbouring levels differ by 0.4 only roughly in float32."""
    scale = 15 / alpha
    return torch.round(torch.minimum(torch.relu(x), torch.tensor(alpha)) * scale) / scale


def power_of_two_log(x):
    """Exponents rounded (Lin et al. 2016; Miyashita et al. 2016)."""
    return torch.sign(x) * torch.pow(2.0, torch.round(torch.log2(x.abs().clamp(min=0.125, max=1.0))))


def ternary_of_mean(x):
    """TBN (Wan et al. 2018): the threshold is made of the tensor itself."""
    delta = 0.4 * x.abs().mean()
    return (x > delta).float() - (x < -delta).float()


def two_signs(x):
    """FracBNN (Zhang et al. 2021): the second bit compares with a threshold that the first one turns."""
    first = torch.where(x >= 0, 1.0, -1.0)
    second = torch.where(x - 0.7 * first >= 0, 1.0, -1.0)
    return (2 * first + second) / 3


def unsigned_ternary(x):
    return (x > 0.5).float() + (x > 1.5).float()


def ternary_activation(x, delta=0.4):
    return (x > delta).float() - (x < -delta).float()


def power_of_two(x):
    """Levels 0, 1/4, 1/2, 1 by comparisons."""
    zero = torch.zeros_like(x)
    return torch.where(x > 0.75, 1.0, torch.where(x > 0.375, 0.5, torch.where(x > 0.125, 0.25, zero)))


ACTIVATIONS = {
    f.__name__: f
    for f in (
        binarynet, bireal, irnet, where_sign, dorefa_activation, dorefa_scaled, pact, pact_ste, pact_where, lsq, lsq_signed, lsq_plus,
        round_then_clamp, pact_four_bits, power_of_two_log, ternary_of_mean, two_signs, unsigned_ternary, ternary_activation, power_of_two,
    )
}  # fmt: skip


# ---- weights


def sign_weight(w):
    return torch.sign(w)


def xnor_weight(w):
    """XNOR-Net (Rastegari et al. 2016): sign times the mean magnitude of the filter."""
    alpha = w.abs().mean((1, 2, 3), keepdim=True)
    return torch.sign(w) * alpha


def irnet_weight(w):
    """IR-Net: standardised, then sign times a power of two."""
    centred = w - w.mean((1, 2, 3), keepdim=True)
    normal = centred / centred.std((1, 2, 3), keepdim=True)
    scale = torch.pow(2.0, torch.round(torch.log2(normal.abs().mean((1, 2, 3), keepdim=True))))
    return torch.sign(normal) * scale


def dorefa_weight(w, bits=2):
    n = 2**bits - 1
    t = torch.tanh(w)
    t = t / (2 * t.abs().max()) + 0.5
    return 2 * (torch.round(t * n) / n) - 1


def twn_weight(w):
    """Ternary Weight Networks (Li et al. 2016)."""
    delta = 0.7 * w.abs().mean((1, 2, 3), keepdim=True)
    mask = (w.abs() > delta).float()
    alpha = (w.abs() * mask).sum((1, 2, 3), keepdim=True) / mask.sum((1, 2, 3), keepdim=True)
    return alpha * torch.sign(w) * mask


def ttq_weight(w, positive=0.6, negative=0.35):
    """Trained Ternary Quantization (Zhu et al. 2017): a scale for each sign."""
    delta = 0.05 * w.abs().max()
    return positive * (w > delta).float() - negative * (w < -delta).float()


def lsq_weight(w, s=0.06):
    return torch.round(torch.clamp(w / s, -2, 1)) * s


def lsq_weight4(w, s=0.02):
    return torch.round(torch.clamp(w / s, -8, 7)) * s


def abc_weight(w, bases=3):
    """ABC-Net (Lin et al. 2017): sum of bases sign(w - mean + u * std)."""
    mean, std = w.mean(), w.std()
    us = [-1 + 2 * i / (bases - 1) for i in range(bases)]
    return sum(a * torch.sign(w - mean + u * std) for a, u in zip((0.31, 0.27, 0.12), us))


def bitnet_weight(w):
    """BitNet b1.58 (Ma et al. 2024): round(w / mean|w|) in -1, 0, 1."""
    scale = w.abs().mean().clamp(min=1e-5)
    return (w / scale).round().clamp(-1, 1) * scale


WEIGHTS = {
    f.__name__: f
    for f in (
        sign_weight, xnor_weight, irnet_weight, dorefa_weight, twn_weight, ttq_weight, lsq_weight, lsq_weight4, abc_weight, bitnet_weight,
    )
}  # fmt: skip


class QuantConv(nn.Module):
    """A convolution of quantised activations with quantised weights."""

    def __init__(self, activation, weight, channels, outputs):
        super().__init__()
        self.activation, self.quantise = activation, weight
        self.weight = nn.Parameter(torch.randn(outputs, channels, 3, 3) * 0.1)

    def forward(self, x):
        return F.conv2d(self.activation(x), self.quantise(self.weight), padding=1)


class Chain(nn.Module):
    """Two quantised layers with batch normalisation between them; RPReLU and RSign of ReActNet (Liu et al. 2020) if ``react``."""

    def __init__(self, activation, weight, channels=24, react=False):
        super().__init__()
        self.first, self.second = QuantConv(activation, weight, channels, 40), QuantConv(activation, weight, 40, 8)
        self.norm = nn.BatchNorm2d(40)
        for tensor, low, high in ((self.norm.weight, 0.5, 1.5), (self.norm.bias, -0.5, 0.5), (self.norm.running_mean, -1, 1)):
            nn.init.uniform_(tensor, low, high)
        nn.init.uniform_(self.norm.running_var, 0.5, 20)
        self.react = react
        self.shift = nn.Parameter(torch.randn(3, 40) * 0.1)
        self.slope = nn.PReLU(40)

    def forward(self, x):
        y = self.norm(self.first(x))
        if self.react:
            y = self.slope(y + self.shift[0].view(1, -1, 1, 1).expand_as(y)) + self.shift[1].view(1, -1, 1, 1).expand_as(y)
            y = y + self.shift[2].view(1, -1, 1, 1)
        return self.second(y)
