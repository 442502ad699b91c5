"""Trains three low-bit networks with PyTorch, exports them as they are, builds them, and compares their classes with PyTorch's.

    pip install 'bnntvm[torch]' && python tutorials/train_torch.py

About two minutes on one core. The networks classify scikit-learn's handwritten digits and differ in their quantisers only:

* ``bnn``: signs of activations and weights (Courbariaux et al., Binarized Neural Networks, 2016),
* ``dorefa``: 2-bit activations and weights (Zhou et al., DoReFa-Net, 2016),
* ``ternary``: signs of activations, weights -a, 0 or +a (Li et al., Ternary Weight Networks, 2016).

Quantisers are written the usual way, ``x + (q(x) - x).detach()``, and the export is ``torch.onnx.export(..., dynamo=True)``: nothing is
prepared for bnntvm. Training leaves latent float weights, quantisers in the graph and straight-through residues behind; to see through
them is for the compiler, and the report says what it made of every layer.
"""

import argparse
import pathlib
import tempfile

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import bnntvm

BATCH, SEED = 64, 0


def straight_through(x, quantised):
    """The quantised value, with the gradient of ``x``."""
    return x + (quantised - x).detach()


def sign(x):
    """-1 or +1; the gradient is that of a clip to [-1, 1]."""
    return straight_through(x.clamp(-1, 1), torch.where(x >= 0, 1.0, -1.0))


def levels(x, count):
    """``x`` in [0, 1] rounded to one of ``count`` evenly spaced levels."""
    return straight_through(x, torch.round(x * (count - 1)) / (count - 1))


class Bnn:
    """One bit each."""

    activation = staticmethod(sign)
    weight = staticmethod(sign)


class DoReFa:
    """Two bits each: activations 0, 1/3, 2/3, 1; weights -1, -1/3, 1/3, 1."""

    @staticmethod
    def activation(x):
        return levels(x.clamp(0, 1), 4)

    @staticmethod
    def weight(w):
        t = torch.tanh(w)
        return 2 * levels(t / (2 * t.abs().max()) + 0.5, 4) - 1


class Ternary:
    """One bit for activations; weights are 0 up to 0.7 times their mean magnitude, and beyond it share one magnitude.

    The straight-through spelling is left out of the export: ``w + (a - w)`` is not always ``a`` in float32, so the file would hold weights
    that are ternary but for their last bits. (``build(..., weight_tolerance=1e-6)`` takes such weights where they are binary.)
    """

    activation = staticmethod(sign)

    @staticmethod
    def weight(w):
        large = (w.abs() > 0.7 * w.abs().mean()).float()
        scale = (w.abs() * large).sum() / large.sum()
        quantised = scale * torch.sign(w) * large
        return quantised if torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export() else straight_through(w, quantised)


class Block(nn.Module):
    """Quantised activation, 3x3 convolution with quantised weights, batch normalisation, shortcut."""

    def __init__(self, quantiser, channels, stride=1):
        super().__init__()
        self.quantiser, self.stride = quantiser, stride
        self.weight = nn.Parameter(torch.randn(channels, channels, 3, 3) * 0.1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        y = F.conv2d(self.quantiser.activation(x), self.quantiser.weight(self.weight), stride=self.stride, padding=1)
        return self.norm(y) + (F.avg_pool2d(x, 2) if self.stride == 2 else x)


class Net(nn.Module):
    """float32[N, 1, 8, 8] to float32[N, 10]: a float stem, three low-bit layers, a float classifier."""

    def __init__(self, quantiser, channels=64):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        self.blocks = nn.Sequential(Block(quantiser, channels), Block(quantiser, channels, 2), Block(quantiser, channels))
        self.head = nn.Linear(channels, 10)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


NETWORKS = {"bnn": Bnn, "dorefa": DoReFa, "ternary": Ternary}


def split():
    """Train images and labels, test images and labels: float32[N, 1, 8, 8] in [0, 1] and int64[N]. Every fifth digit is for testing."""
    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)[:, None]
    test = np.arange(len(images)) % 5 == 4
    return images[~test], digits.target[~test], images[test], digits.target[test]


def train(model, images, labels, epochs):
    """Adam with one cycle of the learning rate; latent weights stay in [-1, 1]."""
    generator = torch.Generator().manual_seed(SEED)
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=epochs * -(-len(images) // BATCH))
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(images), generator=generator).split(BATCH):
            loss = F.cross_entropy(model(images[chosen]), labels[chosen], label_smoothing=0.1)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            with torch.no_grad():
                for block in model.blocks:
                    block.weight.clamp_(-1, 1)
    return model.eval()


def export(model, path):
    """The ONNX file of today's exporter, with any number of images."""
    images = torch.zeros(2, 1, 8, 8)
    torch.onnx.export(
        model, (images,), path, dynamo=True, verbose=False, input_names=["image"], output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("N")},),
    )  # fmt: skip


def compare(name, model, path, images, labels):
    """Build the file, run both on the test images, and print what came out."""
    with torch.no_grad():
        expected = model(torch.from_numpy(images)).numpy()
    module = bnntvm.build(path)
    got = module(images)
    same, correct = int(np.sum(got.argmax(1) == expected.argmax(1))), float(np.mean(got.argmax(1) == labels))
    print(f"{name}: {correct:.1%} of the test digits right; same class as PyTorch: {same} of {len(labels)}")
    print(module.report)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--only", choices=NETWORKS, help="one network instead of all three")
    args = parser.parse_args()
    torch.set_num_threads(1)
    images, labels, test_images, test_labels = split()
    for name in [args.only] if args.only else NETWORKS:
        torch.manual_seed(SEED)
        model = train(Net(NETWORKS[name]), torch.from_numpy(images), torch.from_numpy(labels), args.epochs)
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / f"{name}.onnx"
            export(model, path)
            compare(name, model, path, test_images, test_labels)


if __name__ == "__main__":
    main()
