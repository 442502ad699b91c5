"""Trains the binary network that ``demo.py`` compiles, on scikit-learn's handwritten digits, and exports it to ONNX.

    pip install 'bnntvm[torch]' && python tutorials/train_digits.py

Takes a few minutes on one core and writes ``tutorials/data/digits_bnn.onnx``. The network is a small Bi-Real net: a float stem, then 3x3
convolutions whose inputs and weights are -1 or +1, each with batch normalisation and a float shortcut around it.
"""

import pathlib

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

HERE = pathlib.Path(__file__).parent
EPOCHS, BATCH, SEED = 60, 64, 0


def split():
    """Train images and labels, test images and labels: float32[N, 1, 8, 8] in [0, 1] and int64[N]. Every fifth digit is for testing."""
    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)[:, None]
    test = np.arange(len(images)) % 5 == 4
    return images[~test], digits.target[~test], images[test], digits.target[test]


class _Sign(torch.autograd.Function):
    """-1 or +1, with the straight-through gradient: that of a clip to [-1, 1]."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.where(x >= 0, 1.0, -1.0)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (x.abs() <= 1)


def binarise(x):
    """Sign for training; for the export the plain expression, which becomes ``Where(GreaterOrEqual(x, 0), 1, -1)``."""
    return torch.where(x >= 0, 1.0, -1.0) if torch.onnx.is_in_onnx_export() else _Sign.apply(x)


class BinaryBlock(nn.Module):
    """Sign, 3x3 convolution with weights in {-1, +1}, batch normalisation, shortcut, PReLU."""

    def __init__(self, channels, stride=1):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, channels, 3, 3) * 0.1)
        self.norm = nn.BatchNorm2d(channels)
        self.act = nn.PReLU(channels)
        self.stride = stride

    def forward(self, x):
        y = self.norm(F.conv2d(binarise(x), binarise(self.weight), stride=self.stride, padding=1))
        return self.act(y + (F.avg_pool2d(x, 2) if self.stride == 2 else x))


class DigitsNet(nn.Module):
    """float32[N, 1, 8, 8] to float32[N, 10]: a float stem of 64 channels, three binary layers, a float classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64))
        self.blocks = nn.Sequential(BinaryBlock(64), BinaryBlock(64, stride=2), BinaryBlock(64))
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def augment(images, generator):
    """Images shifted by up to one pixel in each direction."""
    dy, dx = (int(torch.randint(-1, 2, (), generator=generator)) for _ in range(2))
    return torch.roll(F.pad(images, (1, 1, 1, 1)), (dy, dx), (2, 3))[..., 1:-1, 1:-1]


def train(model, images, labels):
    generator = torch.Generator().manual_seed(SEED)
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=EPOCHS * (-(-len(images) // BATCH)))
    for epoch in range(EPOCHS):
        model.train()
        total = 0.0
        for chosen in torch.randperm(len(images), generator=generator).split(BATCH):
            loss = F.cross_entropy(model(augment(images[chosen], generator)), labels[chosen], label_smoothing=0.1)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            with torch.no_grad():
                for block in model.blocks:
                    block.weight.clamp_(-1, 1)
            total += loss.item() * len(chosen)
        print(f"epoch {epoch + 1:2d} of {EPOCHS}: loss {total / len(images):.4f}", flush=True)


def export(model, path):
    """Write the ONNX file, with the weights as the -1 and +1 that training arrived at."""
    model.eval()
    with torch.no_grad():
        for block in model.blocks:
            block.weight.copy_(binarise(block.weight))
    path.parent.mkdir(exist_ok=True)
    names = dict(input_names=["image"], output_names=["logits"])
    torch.onnx.export(
        model,
        (torch.zeros(1, 1, 8, 8),),
        path,
        dynamo=False,
        opset_version=17,
        dynamic_axes={"image": {0: "N"}, "logits": {0: "N"}},
        **names,
    )


def main():
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    train_images, train_labels, test_images, test_labels = map(torch.from_numpy, split())
    model = DigitsNet()
    train(model, train_images, train_labels)
    model.eval()
    with torch.no_grad():
        correct = (model(test_images).argmax(1) == test_labels).float().mean().item()
    path = HERE / "data" / "digits_bnn.onnx"
    export(model, path)
    print(f"test accuracy {correct:.2%}; wrote {path}, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
