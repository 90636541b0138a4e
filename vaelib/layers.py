"""What flows and models are both built from: linear layers with the papers' initial weights, and tanh layers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn


def linear(inputs: int, outputs: int, generator: torch.Generator | None = None) -> nn.Linear:
    """Return a linear layer with Glorot-uniform weights and zero biases."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs)
    nn.init.xavier_uniform_(layer.weight, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


def tanh_layers(sizes: Sequence[int], generator: torch.Generator | None = None) -> nn.Sequential:
    """Return tanh layers of the given sizes, the input's first."""
    return nn.Sequential(*(part for a, b in pairwise(sizes) for part in (linear(a, b, generator), nn.Tanh())))
