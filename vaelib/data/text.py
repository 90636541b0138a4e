"""Text data as plain tensors: :class:`Vocabulary`, :class:`Sentences` and :class:`Text`, the readers of the files, and
the sentences that the toy of "Lagging Inference Networks" is made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from vaelib.data.files import File, fetch
from vaelib.errors import InputError, choose, whole_number
from vaelib.files import read_text

PAD, BEGIN, END = range(3)
MARKS = ("<pad>", "<s>", "</s>")
"""The words of these numbers: what fills a sentence up, what stands before it, and what stands after it."""

UNKNOWN = ("<unk>", "_UNK")
"""How data sets write a word that is not in their vocabulary."""

SENTENCES_AT_ONCE = 5000  # drawn by the generator of synthetic text


@dataclass(frozen=True)
class Vocabulary:
    """The words that tokens are numbers of; the first three are :data:`MARKS`.

    Introduced in book/05-inference-lag.ipynb.
    """

    words: tuple[str, ...]

    @classmethod
    def of(cls, sentences: Iterable[Sequence[str]], size: int | None = None) -> Vocabulary:
        """Return the words of ``sentences``, frequent ones first; with ``size``, so many of them and ``<unk>``."""
        counts = Counter(word for sentence in sentences for word in sentence)
        words = [word for word, _ in counts.most_common(size)]
        if size is not None and size < len(counts) and not set(UNKNOWN) & set(words):
            words.append(UNKNOWN[0])
        return cls((*MARKS, *words))

    @cached_property
    def index(self) -> dict[str, int]:
        """The number of each word."""
        return {word: number for number, word in enumerate(self.words)}

    @cached_property
    def unknown(self) -> int | None:
        """The number that stands for words not in the vocabulary; None if there is none."""
        return next((self.index[word] for word in UNKNOWN if word in self.index), None)

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, sentences: Sequence[Sequence[str]]) -> Tensor:
        """Return sentences, each a list of words, as tokens ``<s> words </s> <pad> ...``, ``[N, T]``.

        Raises
        ------
        InputError
            for a sentence without words, or an unknown word where the vocabulary has none for it.
        """
        tokens = []
        for i, sentence in enumerate(sentences):
            if not sentence:
                raise InputError(f"sentence {i + 1} has no words: give it one at least, or leave it out")
            numbers = [self.index.get(word, self.unknown) for word in sentence]
            if None in numbers:
                raise InputError(
                    f"sentence {i + 1} has the unknown token '{sentence[numbers.index(None)]}', which is not among the "
                    f"{len(self)} words of the vocabulary, and that has no '{UNKNOWN[0]}': use the data set that the "
                    "vocabulary was made from, or put known words in its place"
                )
            tokens.append(torch.tensor([BEGIN, *numbers, END]))
        return nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=PAD)

    def decode(self, tokens: Tensor) -> list[str]:
        """Return the sentences ``tokens`` ``[N, T]`` as text, without marks."""
        sentences = tokens.tolist()
        return [" ".join(self.words[token] for token in sentence if token >= len(MARKS)) for sentence in sentences]


@dataclass(frozen=True)
class Sentences:
    """The sentences of one split.

    Attributes
    ----------
    tokens : Tensor
        [N, T] int64, ``<s> words </s> <pad> ...``.
    vocabulary : Vocabulary
        What the numbers mean.
    """

    tokens: Tensor
    vocabulary: Vocabulary

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens of each sentence that are not padding, [N]."""
        return (self.tokens != PAD).sum(1)

    def batch(self, index: Tensor | slice, generator: torch.Generator | None = None) -> Tensor:
        """Return the sentences ``index``, padded to the longest of them; ``generator`` is not touched."""
        return self.tokens[index, : int(self.lengths[index].max())]

    @staticmethod
    def units(x: Tensor) -> int:
        """Count what is predicted in a batch ``[B, T]``: the words and the end of each sentence."""
        return int((x[:, 1:] != PAD).sum())

    def sample(self, most: int | None, seed: int = 0) -> Sentences:
        """Return a random subset of at most ``most`` sentences, for None all, in random order: the same for a seed."""
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:most]
        return replace(self, tokens=self.tokens[chosen.to(self.tokens.device)])

    def to(self, device: torch.device | str) -> Sentences:
        """Return the same split on ``device``."""
        return replace(self, tokens=self.tokens.to(device))


@dataclass(frozen=True)
class Text:
    """A data set of sentences: ``train``, ``valid`` and ``test``, in one vocabulary."""

    name: str
    note: str
    train: Sentences
    valid: Sentences
    test: Sentences

    @property
    def vocabulary(self) -> Vocabulary:
        """That of all three splits."""
        return self.train.vocabulary

    def to(self, device: torch.device | str) -> Text:
        """Return the same data on ``device``."""
        parts = {split: getattr(self, split).to(device) for split in ("train", "valid", "test")}
        return replace(self, **parts)


@dataclass(frozen=True)
class TextSet:
    """An entry of the registry: all that is known of one set of texts; attributes as in :class:`vaelib.data.ImageSet`.

    Attributes
    ----------
    read : callable
        ``read(paths, seed, **sizes)`` returns the words of each sentence, split by split, and the vocabulary.
    sizes : mapping
        What :func:`vaelib.data.load` may be asked for besides, and the defaults.
    """

    name: str
    description: str
    splits: str
    read: Callable[..., tuple[dict[str, list[list[str]]], Vocabulary]]
    sizes: Mapping[str, int | None]
    licence: str
    citation: str
    files: Mapping[str, tuple[File, ...]] = field(default_factory=dict)
    note: str = ""

    def load(self, binarisation: str | None = None, seed: int = 0, valid: int = 0, **sizes: int | None) -> Text:
        """Read the files and return the splits; see :func:`vaelib.data.load`."""
        if binarisation is not None or valid:
            raise InputError(
                f"{self.name} is text, with validation sentences of its own: leave binarisation and valid out"
            )
        for name, value in sizes.items():
            choose(f"size of data set '{self.name}'", name, self.sizes)
            if value is not None or self.sizes[name] is not None:
                whole_number(f"{name} of data set '{self.name}'", value, least=1)
        paths = {part: fetch(self.name, files) for part, files in self.files.items()}
        sentences, vocabulary = self.read(paths, seed, **{**self.sizes, **sizes})
        parts = {split: Sentences(vocabulary.encode(part), vocabulary) for split, part in sentences.items()}
        return Text(self.name, self.note, **parts)


REAL_TEXT_SIZES = {"sentences": None, "vocabulary": None, "longest": None}


def read_documents(
    paths: Mapping[str, Path],
    seed: int,
    sentences: int | None,
    vocabulary: int | None,
    longest: int | None,
    labelled: bool = False,
) -> tuple[dict[str, list[list[str]]], Vocabulary]:
    """Files with a document a line, its words parted by spaces; ``labelled``: after a label and a tab, left out here.

    The vocabulary is that of the training documents. ``sentences`` takes so many of these, ``vocabulary`` keeps so
    many words, and ``longest`` leaves longer documents out, of all splits.
    """
    documents = {
        split: [words for words in lines(path, labelled) if longest is None or len(words) <= longest]
        for split, path in paths.items()
    }
    documents["train"] = list(islice(documents["train"], sentences))
    for split, found in documents.items():
        if not found:
            raise InputError(f"no document of '{paths[split]}' has at most longest={longest} words: raise longest")
    return documents, Vocabulary.of(documents["train"], vocabulary)


def lines(path: Path, labelled: bool = False) -> list[list[str]]:
    """Return the words of each line of a text file, without the label before the first tab if lines are ``labelled``.

    Lines end at line feeds alone (or carriage return and line feed), and words at white space of any kind. A byte order
    mark and blank lines at the end are left out.

    Raises
    ------
    InputError
        for a line without words or without its label, or a file that is no text.
    """
    text, documents = read_text(path) or "", []
    for number, line in enumerate(text.rstrip().split("\n"), start=1):
        label, tab, document = line.partition("\t") if labelled else ("", "\t", line)
        if not tab:
            raise InputError(f"line {number} of '{path}' has no label and tab before its words: put them there")
        if not (words := document.split()):
            raise InputError(
                f"line {number} of '{path}' is an empty sentence, and a document has a word at least: "
                "delete the line, or fetch the file again"
            )
        documents.append(words)
    return documents


def synthetic(
    paths: Mapping[str, Path], seed: int, sentences: int, vocabulary: int, length: int, hidden: int
) -> tuple[dict[str, list[list[str]]], Vocabulary]:
    r"""Sentences from an LSTM with a two-dimensional latent variable, as in the toy of He et al. (2019).

    :math:`z` is from the equal mixture of four unit Gaussians at :math:`(\pm 2, \pm 2)`. The first word is uniform;
    from there on an LSTM with :math:`h_0 = \tanh(W z)`, :math:`c_0 = W z` reads each word's embedding beside z, and
    the next word's logits are :math:`A h_t + B z`. All weights are from U(-1, 1), those of B from U(-5, 5). Of the
    sentences, a tenth is for validation and a tenth for testing (the paper's split is not known).
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int, scale: float = 1.0) -> Tensor:
        return (2 * torch.rand(shape, generator=generator) - 1) * scale

    cell = nn.utils.skip_init(nn.LSTMCell, hidden + 2, hidden)
    for parameter in cell.parameters():
        parameter.data = uniform(*parameter.shape)
    embedding, lift = uniform(vocabulary, hidden), uniform(2, hidden)
    from_hidden, from_z = uniform(hidden, vocabulary), uniform(2, vocabulary, scale=5.0)

    @torch.no_grad()
    def draw(count: int) -> Tensor:
        corner = torch.randint(2, (count, 2), generator=generator) * 4.0 - 2.0
        z = corner + torch.randn((count, 2), generator=generator)
        c = z @ lift
        h = c.tanh()
        tokens = [torch.randint(vocabulary, (count,), generator=generator)]
        while len(tokens) < length:
            h, c = cell(torch.cat([embedding[tokens[-1]], z], 1), (h, c))
            cdf = (h @ from_hidden + z @ from_z).softmax(1).cumsum(1)
            u = torch.rand((count, 1), generator=generator) * cdf[:, -1:]  # 5 times as fast as torch.multinomial
            tokens.append(torch.searchsorted(cdf, u, right=True).squeeze(1).clamp_max(vocabulary - 1))
        return torch.stack(tokens, 1)

    sizes = [min(SENTENCES_AT_ONCE, sentences - start) for start in range(0, sentences, SENTENCES_AT_ONCE)]
    names = [str(number) for number in range(vocabulary)]
    drawn = [[names[token] for token in sentence] for size in sizes for sentence in draw(size).tolist()]
    tenth = sentences // 10
    if not tenth:
        raise InputError(
            f"synthetic-text needs 10 sentences at least, to part them in three, but was asked for {sentences}"
        )
    parts = {"train": drawn[: -2 * tenth], "valid": drawn[-2 * tenth : -tenth], "test": drawn[-tenth:]}
    return parts, Vocabulary((*MARKS, *names))
