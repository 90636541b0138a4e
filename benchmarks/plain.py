"""A VAE trained by hand in plain PyTorch: what each row of the tableau is timed against.

Burda et al.'s model with one stochastic layer, 784-200-200-50 and back, densities written as in a textbook, and one
call of ``backward``: the total derivative of the ELBO or of the importance-weighted bound.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainVAE(nn.Module):
    def __init__(self, pixels: int = 784, hidden: int = 200, latent: int = 50) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(pixels, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh())
        self.mean, self.log_std = nn.Linear(hidden, latent), nn.Linear(hidden, latent)
        self.decoder = nn.Sequential(
            nn.Linear(latent, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, pixels)
        )

    def loss(self, bound: str, x: Tensor, eps: Tensor) -> Tensor:
        hidden = self.encoder(x)
        mean, log_std = self.mean(hidden), self.log_std(hidden)
        std = log_std.exp()
        z = mean + std * eps
        logits = self.decoder(z)
        log_likelihood = -F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)
        log_prior = -0.5 * (z**2 + math.log(2 * math.pi)).sum(-1)
        log_q = -(0.5 * ((z - mean) / std) ** 2 + log_std + 0.5 * math.log(2 * math.pi)).sum(-1)
        log_w = log_likelihood + log_prior - log_q
        return -(log_w.mean(0) if bound == "elbo" else log_w.logsumexp(0) - math.log(len(log_w))).mean()


def step(model: PlainVAE, optimizer: torch.optim.Optimizer, bound: str, x: Tensor, eps: Tensor) -> None:
    optimizer.zero_grad()
    model.loss(bound, x, eps).backward()
    optimizer.step()
