"""Measure a training step of the LSTM and the PixelCNN VAE beside the same models as He et al. (2019) published them.

Theirs, in our own words: for text a module for sentences of one length, and one that packs sentences of many lengths,
with the softmax of all steps at once (and, for comparison, a softmax a step); for images the mask multiplied into a
square kernel's weights at each pass, z's maps stacked on the image, a sigmoid and logarithms; for both the KL in closed
form, joint clipping, and an optimiser for each network. A step is forward, backward, clipping and SGD (text) or Adam
(images), float32, one thread. Each way must first give our loss and gradient at the same weights, data and noise, in
float64. Times are the process's own CPU time, in turns, round after round; a ratio is taken within each round.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rounds import clock, parser, provenance, ratios, take_turns, write
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from vaelib import collapse, models, posteriors
from vaelib.data.text import BEGIN, END, PAD
from vaelib.models.pixelcnn import CausalConvolution
from vaelib.models.text import lstm_vae
from vaelib.training import gradient

OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
COLUMNS = (
    "model,data,way,sizes,batch,threads,rounds,ms_median,ms_q1,ms_q3,ratio_to_published,ratio_q1,ratio_q3,"
    "machine,python,torch,date,code"
).split(",")
TOLERANCE = 1e-7
CLIP = 5.0


# --- as published: losses [B] of a batch x for noise eps [1, B, D]; the layers are copies of ours


def draw(mean: Tensor, log_variance: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """Return z, ``[B, D]``, and the KL, ``[B]``."""
    kl = 0.5 * (mean.pow(2) + log_variance.exp() - log_variance - 1).sum(1)
    return mean + eps[0] * log_variance.mul(0.5).exp(), kl


class OneLength(nn.Module):
    """The text model for batches in which all sentences are equally long."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = copy.deepcopy(ours.encoder), copy.deepcopy(ours.joint.decode)
        del self.decoder.dropout
        rate = ours.joint.decode.dropout.p
        self.drop_in, self.drop_out = nn.Dropout(rate), nn.Dropout(rate)

    def forward(self, x: Tensor, eps: Tensor) -> Tensor:
        _, (state, _) = self.encoder.lstm(self.encoder.embed(x))
        z, kl = draw(*self.encoder.head(state).squeeze(0).chunk(2, -1), eps)
        source, target = x[:, :-1], x[:, 1:].contiguous()
        inputs = self.drop_in(self.decoder.embed(source))
        inputs = torch.cat([inputs, z.unsqueeze(1).expand(len(x), source.shape[1], -1)], -1)
        c = self.decoder.lift(z).unsqueeze(0)
        states, _ = self.decoder.lstm(inputs, (c.tanh(), c))
        logits = self.decoder.readout(self.drop_out(states))
        loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), target.view(-1), reduction="none")
        return loss.view(len(x), -1).sum(1) + kl

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters()]


class Packed(OneLength):
    """The text model for sentences of many lengths, the longest first, packed for both LSTMs."""

    def forward(self, x: Tensor, eps: Tensor) -> Tensor:
        lengths = (x != PAD).sum(1)
        packed = pack_padded_sequence(self.encoder.embed(x), lengths.tolist(), batch_first=True)
        _, (state, _) = self.encoder.lstm(packed)
        z, kl = draw(*self.encoder.head(state).squeeze(0).chunk(2, -1), eps)
        source, target = x[:, :-1], x[:, 1:].contiguous()
        inputs = self.drop_in(self.decoder.embed(source))
        inputs = torch.cat([inputs, z.unsqueeze(1).expand(len(x), source.shape[1], -1)], -1)
        c = self.decoder.lift(z).unsqueeze(0)
        packed = pack_padded_sequence(inputs, (lengths - 1).tolist(), batch_first=True)
        states, _ = pad_packed_sequence(self.decoder.lstm(packed, (c.tanh(), c))[0], batch_first=True)
        return self.reconstruction(self.drop_out(states), target) + kl

    def reconstruction(self, states: Tensor, target: Tensor) -> Tensor:
        logits = self.decoder.readout(states)
        mask = torch.ones(logits.shape[-1], dtype=logits.dtype)
        mask[PAD] = 0
        loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), target.view(-1), weight=mask, reduction="none")
        return loss.view(len(target), -1).sum(1)


class SoftmaxAStep(Packed):
    """The same with a softmax for each step of the sentence, in a loop."""

    def reconstruction(self, states: Tensor, target: Tensor) -> Tensor:
        losses = []
        for state, word in zip(states.unbind(1), target.unbind(1), strict=True):
            losses.append(F.cross_entropy(self.decoder.readout(state), word, ignore_index=PAD, reduction="none"))
        return torch.stack(losses).sum(0)


class MaskedConv2d(nn.Conv2d):
    """A square kernel whose weights for the first ``masked`` inputs, below and right, are zeroed before each pass."""

    def __init__(self, ours: CausalConvolution, others: Tensor | None = None) -> None:
        weight = ours.weight.detach() * ours.seen
        masked, size = weight.shape[1], weight.shape[-1]
        weight = F.pad(weight, (0, 0, 0, size - weight.shape[2]))
        mask = F.pad(ours.seen, (0, 0, 0, size - len(ours.seen))).expand_as(weight)
        if others is not None:
            weight, mask = torch.cat([weight, others.detach()], 1), torch.cat([mask, torch.ones_like(others)], 1)
        super().__init__(weight.shape[1], weight.shape[0], size, padding=size // 2, bias=False)
        self.weight = nn.Parameter(weight)
        self.masked, self.rows = masked, ours.reach + 1
        self.register_buffer("mask", mask.clone())

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data.mul_(self.mask)
        return super().forward(x)

    def gradients(self) -> list[Tensor]:
        """Return the gradient in the shape of our weights: the image's upper rows, and the rest."""
        gradient = self.weight.grad * self.mask
        image = gradient[:, : self.masked, : self.rows]
        return [image] if self.masked == self.in_channels else [gradient[:, self.masked :], image]


class Images(nn.Module):
    """The image model: masks by multiplying weights, z's maps stacked on the image, logarithms of probabilities."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        self.encoder, decoder = copy.deepcopy(ours.encoder), copy.deepcopy(ours.joint.decode)
        self.side, self.maps = decoder.side, decoder.latent.in_channels
        for block in (*decoder.blocks, *decoder.skips):
            block.body[3] = MaskedConv2d(block.body[3])
        self.weight, self.bias = decoder.weight, decoder.bias
        self.lowest = MaskedConv2d(decoder.pixels, decoder.latent.weight)
        self.first, self.blocks, self.skips, self.last = decoder.first, decoder.blocks, decoder.skips, decoder.last

    def forward(self, x: Tensor, eps: Tensor) -> Tensor:
        image = x.view(-1, 1, self.side, self.side)
        z, kl = draw(*self.encoder.network(image).chunk(2, -1), eps)
        maps = F.linear(z, self.weight, self.bias).view(-1, self.maps, self.side, self.side)
        waiting = [self.first(self.lowest(torch.cat([image, maps], 1)))]
        here, skips = waiting[0], iter(self.skips)
        for block in self.blocks:
            if len(waiting) == 3:
                here = here + next(skips)(waiting.pop(0))
            here = block(here)
            waiting.append(here)
        p = self.last(here + next(skips)(waiting.pop(0))).sigmoid().view(len(x), -1)
        log_p = (p + 1e-12).log() * x + (1 - p + 1e-12).log() * (1 - x)
        return kl - log_p.sum(1)

    def gradients(self) -> list[Tensor]:
        """Return the gradients in the order of our parameters: those of the encoder, then of the decoder."""
        rest = []
        for module in (self.first, self.blocks, self.skips, self.last):
            for part in module.modules():
                own = list(part.parameters(recurse=False))
                rest += part.gradients() if isinstance(part, MaskedConv2d) else [p.grad for p in own]
        encoder = [p.grad for p in self.encoder.parameters()]
        return [*encoder, self.weight.grad, self.bias.grad, *self.lowest.gradients(), *rest]


# --- what is measured


def sentences(lengths: Tensor, vocabulary: int) -> Tensor:
    """Return random sentences of so many words, the longest first, ``[B, T]``."""
    lengths = lengths.sort(descending=True).values
    x = torch.randint(END + 1, vocabulary, (len(lengths), int(lengths.max()) + 2), generator=generator())
    place = torch.arange(x.shape[1])
    x[:, 0] = BEGIN
    x[place == lengths.unsqueeze(1) + 1] = END
    return x.masked_fill(place > lengths.unsqueeze(1) + 1, PAD)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


Case = tuple[str, str, Callable[[], nn.Module], Tensor, dict[str, type[nn.Module]], str, dict[str, int | float]]


def cases(a: argparse.Namespace) -> list[Case]:
    """Return model, data, our model's builder, a batch, the published ways, the optimiser and the sizes."""
    text = {"latent": a.latent, "embedding": a.embedding, "hidden": a.hidden, "dropout": 0.5}
    image = {"latent": a.latent, "maps": a.maps, "layers": a.layers}
    equal = torch.full((a.text_batch,), a.words)
    many = torch.randint(a.words // 2, a.words * 3 // 2 + 1, (a.text_batch,), generator=generator())
    images = torch.bernoulli(torch.full((a.image_batch, a.side**2), 0.2), generator=generator())

    def lstm() -> nn.Module:
        return lstm_vae(a.vocabulary, generator(), **text)

    def pixelcnn() -> nn.Module:
        return models.build("pixelcnn", a.side**2, generator=generator(), **image)

    texts, pictures = text | {"vocabulary": a.vocabulary, "words": a.words}, image | {"side": a.side}
    packed = {"published": Packed, "a softmax a step": SoftmaxAStep}
    return [
        ("lstm", "one length", lstm, sentences(equal, a.vocabulary), {"published": OneLength}, "sgd", texts),
        ("lstm", "many lengths", lstm, sentences(many, a.vocabulary), packed, "sgd", texts),
        ("pixelcnn", "images", pixelcnn, images, {"published": Images}, "adam", pictures),
    ]


def disagreement(ours: nn.Module, theirs: nn.Module, x: Tensor) -> float:
    """Return the largest relative difference of losses, or of a layer's gradient in norm, without dropout."""
    for model in (ours, theirs):
        model.train()
        for part in model.modules():
            if isinstance(part, nn.Dropout):
                part.eval()
    eps = ours.encoder(x).noise(1, generator())
    loss = -gradient(ours, collapse.elbo_kl(), x, eps)
    published = theirs(x, eps)
    published.mean().backward()
    pairs = [(published, loss), *zip(theirs.gradients(), [p.grad for p in parameters(ours)], strict=True)]
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


def parameters(ours: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of the encoder, then those of the decoder."""
    return [*ours.encoder.parameters(), *ours.joint.parameters()]


def our_step(model: nn.Module, x: Tensor, optimizer: str) -> Callable[[], None]:
    optimizer, noise = OPTIMIZERS[optimizer](model.parameters(), 1e-3), generator()
    spec = model.encoder(x).noise_like(1)

    def step() -> None:
        gradient(model, collapse.elbo_kl(), x, posteriors.draw(spec, noise), CLIP)
        optimizer.step()

    return step


def their_step(model: nn.Module, x: Tensor, optimizer: str, latent: int) -> Callable[[], None]:
    encoder = list(model.encoder.parameters())
    known = set(map(id, encoder))
    decoder = [p for p in model.parameters() if id(p) not in known]
    optimizers = [OPTIMIZERS[optimizer](part, 1e-3) for part in (encoder, decoder)]
    noise = generator()

    def step() -> None:
        for each in optimizers:
            each.zero_grad()
        loss = model(x, torch.randn((1, len(x), latent), generator=noise)).mean(dim=-1)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for each in optimizers:
            each.step()

    return step


def measure(case: Case, a: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of the CSV for one model and kind of data."""
    model, data, build, x, ways, optimizer, sizes = case
    steps = {"vaelib": our_step(build().train(), x, optimizer)}
    for name, way in ways.items():
        ours, exact = build().double(), x.double() if x.is_floating_point() else x
        if not (found := disagreement(ours, way(ours), exact)) <= TOLERANCE:
            raise SystemExit(f"{model}, {data}, {name}: loss or gradient is not ours, it differs by {found:.1e}")
        steps[name] = their_step(way(build()).train(), x, optimizer, a.latent)
    times = take_turns(steps, a.rounds, clock(threads=1), f"{model}, {data}")
    records = []
    for name, mine in times.items():
        record = {"model": model, "data": data, "way": name, "batch": len(x), "threads": 1, "rounds": a.rounds}
        record["sizes"] = " ".join(f"{size}={value}" for size, value in sizes.items())
        record |= quartiles("ms_{}", [1e3 * seconds for seconds in mine])
        record |= quartiles("ratio_{}", ratios(mine, times["published"]))
        record["ratio_to_published"] = record.pop("ratio_median")
        records.append(record | provenance())
    return records


def quartiles(name: str, values: list[float]) -> dict[str, str]:
    """Return the median and the quartiles."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {name.format(key): f"{value:.4f}" for key, value in (("median", median), ("q1", q1), ("q3", q3))}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    options = parser(__doc__, "benchmark-lagging", rounds=15)
    for name, default, what in (
        ("latent", 32, "dimension of z"),
        ("vocabulary", 5000, "words of the text"),
        ("embedding", 256, "width of the embeddings"),
        ("hidden", 256, "width of the LSTMs"),
        ("words", 20, "words of a sentence, on average"),
        ("text-batch", 32, "sentences a step"),
        ("side", 28, "pixels of an image's side"),
        ("maps", 64, "maps of the PixelCNN"),
        ("layers", 13, "layers of the PixelCNN"),
        ("image-batch", 20, "images a step"),
    ):
        options.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default: %(default)s)")
    arguments = options.parse_args(argv)
    if arguments.rounds < 2:
        options.error("--rounds must be at least 2, for quartiles")
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    records = [record for case in cases(arguments) for record in measure(case, arguments)]
    write(arguments.output, records, COLUMNS)
    print(f"{'model':10}{'data':14}{'way':18}{'ms a step (quartiles)':30}x published (quartiles)")
    for r in records:
        middle, low, high = (float(r[f"ms_{key}"]) for key in ("median", "q1", "q3"))
        ratio, below, above = (float(r[key]) for key in ("ratio_to_published", "ratio_q1", "ratio_q3"))
        span = f"{middle:.1f} ({low:.1f} to {high:.1f})"
        print(f"{r['model']:10}{r['data']:14}{r['way']:18}{span:30}{ratio:.2f} ({below:.2f} to {above:.2f})")
    print(f"\nWritten: {os.path.relpath(arguments.output)}")


if __name__ == "__main__":
    main()
