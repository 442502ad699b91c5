"""Bi-Real-18 in PyTorch, as its authors wrote it: what a float framework makes of a binary network."""

from __future__ import annotations

import torch
from torch import nn


class BinaryConv(nn.Module):
    """Sign of the input, weights +-1 times a factor for each filter, 3x3."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        weights = torch.randn(outputs, inputs, 3, 3)
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv.weight.data = torch.sign(weights) * weights.abs().mean((1, 2, 3), keepdim=True)

    def forward(self, x):
        return self.conv(torch.sign(x))


class Block(nn.Module):
    """A binary convolution with a shortcut around it."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv, self.norm = BinaryConv(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.short = nn.Identity() if stride == 1 else nn.Sequential(
            nn.AvgPool2d(2, 2), nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        )  # fmt: skip

    def forward(self, x):
        return self.norm(self.conv(x)) + self.short(x)


class BiReal18(nn.Module):
    """224 x 224 images to 1000 classes."""

    def __init__(self):
        super().__init__()
        layers = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.MaxPool2d(3, 2, 1)]
        inputs = 64
        for outputs in (64, 128, 256, 512):
            for number in range(4):
                layers.append(Block(inputs, outputs, 2 if number == 0 and outputs > 64 else 1))
                inputs = outputs
        self.body, self.head = nn.Sequential(*layers), nn.Linear(512, 1000)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))
