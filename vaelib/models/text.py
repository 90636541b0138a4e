r"""The LSTM variational autoencoder for sentences (Bowman et al. 2016), as "Lagging Inference Networks" trains it.

A batch of sentences is a matrix of tokens ``[B, T]``, int64: rows ``<s> words </s> <pad> ...``, as
:class:`vaelib.data.Sentences` gives them. Sentences may be of any length; what stands behind ``</s>`` does not count.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaelib.data.text import BEGIN, END, PAD
from vaelib.errors import InputError
from vaelib.models.joints import Joint
from vaelib.models.vae import VAE
from vaelib.posteriors import DiagonalGaussian


class LSTMEncoder(nn.Module):
    r"""The encoder: an LSTM reads the sentence; mean and log-variance are linear in its last hidden state.

    Introduced in book/05-inference-lag.ipynb.

    Parameters
    ----------
    vocabulary, embedding, hidden, latent
        the number of words, and the widths of their embeddings, of the LSTM, and of z. Without latent, z is empty.
    """

    def __init__(
        self, vocabulary: int, embedding: int, hidden: int, latent: int, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.latent = latent
        if latent:
            self.embed = bare(nn.Embedding, vocabulary, embedding)
            self.lstm = bare(nn.LSTM, embedding, hidden, batch_first=True)
            self.head = bare(nn.Linear, hidden, 2 * latent, bias=False)
        as_published(self, generator)

    def forward(self, x: Tensor) -> DiagonalGaussian:
        """Return q(z given x) for the sentences ``x`` ``[B, T]``."""
        if not self.latent:
            empty = x.new_empty((len(x), 0), dtype=torch.get_default_dtype())
            return DiagonalGaussian(empty, empty)
        lengths = check_tokens(x, self.embed.num_embeddings)
        states, _ = self.lstm(self.embed(x[:, : int(lengths.max())]))
        last = states[torch.arange(len(x), device=x.device), lengths - 1]
        mean, log_variance = self.head(last).chunk(2, -1)
        return DiagonalGaussian(mean, 0.5 * log_variance)


class LSTMDecoder(nn.Module):
    r"""The decoder: an LSTM that reads each word's embedding beside z and predicts the next word.

    :math:`c_0 = W z` and :math:`h_0 = \tanh(W z)`. With ``latent=0`` it is a language model, and its bound exact.
    Introduced in book/05-inference-lag.ipynb.

    Parameters
    ----------
    vocabulary, embedding, hidden, latent
        as for :class:`LSTMEncoder`.
    dropout
        the share of the embeddings, and of the outputs, that training leaves out.
    skip
        whether z also reaches the softmax of every word directly (Dieng et al. 2019).
    """

    def __init__(
        self,
        vocabulary: int,
        embedding: int,
        hidden: int,
        latent: int,
        dropout: float = 0.0,
        skip: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.embed = bare(nn.Embedding, vocabulary, embedding)
        self.lstm = bare(nn.LSTM, embedding + latent, hidden, batch_first=True)
        self.lift = bare(nn.Linear, latent, hidden, bias=False) if latent else None
        self.readout = bare(nn.Linear, hidden, vocabulary, bias=False)
        self.skip = bare(nn.Linear, latent, vocabulary, bias=False) if skip else None
        self.dropout = nn.Dropout(dropout)
        as_published(self, generator)

    def logits(self, words: Tensor, z: Tensor) -> Tensor:
        """Return those of the word after each of ``words`` ``[B, T]``, for ``z`` ``[K, B, D]``: ``[K, B, T, V]``."""
        (k, batch, _), length = z.shape, words.shape[1]
        embedded = self.dropout(self.embed(words)).expand(k, -1, -1, -1)
        inputs = torch.cat([embedded, z.unsqueeze(2).expand(-1, -1, length, -1)], -1).flatten(0, 1)
        start = None
        if self.lift is not None:
            c = self.lift(z).reshape(1, k * batch, -1)
            start = (c.tanh(), c)
        states, _ = self.lstm(inputs, start)
        logits = self.readout(self.dropout(states).unflatten(0, (k, batch)))
        return logits if self.skip is None else logits + self.skip(z).unsqueeze(2)

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        r"""Return :math:`\sum_t \log p(x_t \mid x_{<t}, z)` over the words and ``</s>``, ``[K, B]``.

        The softmax is taken for all draws, sentences and steps at once.
        """
        lengths = check_tokens(x, self.embed.num_embeddings)
        x = x[:, : int(lengths.max())]
        logits = self.logits(x[:, :-1], z)
        targets = x[:, 1:].expand(logits.shape[:-1])
        nll = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), ignore_index=PAD, reduction="none")
        return -nll.view(targets.shape).sum(-1)

    @torch.no_grad()
    def sample(self, z: Tensor, generator: torch.Generator | None = None, longest: int = 50) -> Tensor:
        """Write a sentence for each ``z`` ``[B, D]``, word by word, at most ``longest`` of them: ``[B, T]``.

        Raises
        ------
        InputError
            in training mode with dropout, which would make every word that of another model.
        """
        if self.training and self.dropout.p:
            raise InputError("an LSTM writes without dropout: call model.eval() first")
        x = torch.full((len(z), 1), BEGIN, device=z.device)
        over = torch.zeros(len(z), dtype=torch.bool, device=z.device)
        while x.shape[1] <= longest and not over.all():
            logits = self.logits(x, z.unsqueeze(0))[0, :, -1]
            logits[:, [PAD, BEGIN]] = -torch.inf
            word = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            x = torch.cat([x, word.masked_fill(over.unsqueeze(1), PAD)], 1)
            over |= word.squeeze(1) == END
        return x


class TextJoint(Joint):
    r"""The joint density :math:`\log p(z) + \log p(x \mid z)` of sentences; ``decode`` is an :class:`LSTMDecoder`.

    Introduced in book/05-inference-lag.ipynb.
    """

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """Return log p(x given z) for sentences ``x`` ``[B, T]`` and ``z`` ``[K, B, D]``: ``[K, B]``."""
        return self.decode.log_prob(x, z)

    def generate(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Write a sentence for each ``z`` ``[K, B, D]``, as tokens ``[K, B, T]``."""
        return self.decode.sample(z.flatten(0, 1), generator).unflatten(0, z.shape[:2])


def lstm_vae(
    vocabulary: int,
    generator: torch.Generator | None = None,
    *,
    latent: int = 32,
    embedding: int = 512,
    hidden: int = 1024,
    dropout: float = 0.5,
    skip: bool = False,
) -> nn.Module:
    """Build the LSTM variational autoencoder; the sizes are those for Yahoo and Yelp.

    Those of the paper's toy are ``latent=1, embedding=50, hidden=50, dropout=0.0``. With ``latent=0`` it is the
    language model without z, which everything takes that takes the autoencoder: its KL is 0 and its bound exact.
    Introduced in book/05-inference-lag.ipynb.

    Parameters
    ----------
    vocabulary
        the number of words, marks included: ``len(text.vocabulary)``.
    skip
        whether z also reaches every word's softmax directly.
    generator
        draws the initial weights.

    Raises
    ------
    InputError
        for a size that cannot be meant.
    """
    sizes = {"vocabulary": vocabulary, "embedding": embedding, "hidden": hidden, "latent": latent}
    for name, value in sizes.items():
        if value < (0 if name == "latent" else 1):
            raise InputError(f"{name} of the LSTM must be at least {0 if name == 'latent' else 1}, but is {value}")
    if not 0 <= dropout < 1:
        raise InputError(f"dropout must be at least 0 and less than 1, but is {dropout}")
    encoder = LSTMEncoder(**sizes, generator=generator)
    return VAE(TextJoint(LSTMDecoder(**sizes, dropout=dropout, skip=skip, generator=generator)), encoder, binary=False)


def bare(kind: type[nn.Module], *sizes: int, **options: bool) -> nn.Module:
    """Return a layer whose weights are not drawn yet, so that nothing touches torch's global generator."""
    return kind(*sizes, device="meta", **options).to_empty(device="cpu")


@torch.no_grad()
def as_published(module: nn.Module, generator: torch.Generator | None) -> None:
    """Draw the weights from U(-0.01, 0.01), those of embeddings from U(-0.1, 0.1) (He et al. 2019)."""
    for name, parameter in module.named_parameters():
        bound = 0.1 if name.startswith("embed") else 0.01
        parameter.uniform_(-bound, bound, generator=generator)


def check_tokens(x: Tensor, vocabulary: int) -> Tensor:
    """Return the length of each sentence, ``[B]``, marks included.

    Raises
    ------
    InputError
        for an empty sentence, or a token that the model has no word for.
    """
    lengths = (x != PAD).sum(1)
    if x.numel() == 0 or int(lengths.min()) < 2:
        raise InputError(
            "a sentence is empty: a row of tokens is <s>, words, </s>, <pad> ..., as data.Vocabulary.encode makes it"
        )
    if int(x.max()) >= vocabulary:
        raise InputError(
            f"the sentences have the unknown token {int(x.max())}, but the model was built for a vocabulary of "
            f"{vocabulary} words: build it with the len() of the vocabulary that the sentences were encoded in"
        )
    return lengths
