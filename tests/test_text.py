"""Text: vocabulary, the files, the synthetic sentences, and the LSTM variational autoencoder."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from vaelib import data, evaluation, objectives
from vaelib.data.files import File
from vaelib.data.text import BEGIN, END, PAD, Vocabulary, lines
from vaelib.errors import InputError
from vaelib.estimators import ESTIMATORS
from vaelib.models.text import lstm_vae

WORDS = [["to", "be", "or", "not", "to", "be"], ["be"], ["not", "to", "be"]]


@pytest.fixture
def sentences():
    vocabulary = Vocabulary.of(WORDS)
    return data.Sentences(vocabulary.encode(WORDS), vocabulary)


@pytest.fixture
def model():
    return perturbed(
        lstm_vae(7, torch.Generator().manual_seed(0), latent=2, embedding=5, hidden=6, dropout=0.0).double()
    )


def perturbed(model):
    """Weights large enough for every part to matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


# -------------------------------------------------------------------------------- the data


def test_words_and_tokens_are_each_others_inverse(sentences):
    vocabulary = sentences.vocabulary
    assert vocabulary.words == (
        "<pad>",
        "<s>",
        "</s>",
        "be",
        "to",
        "not",
        "or",
    )  # frequent ones first, then as they come
    assert vocabulary.decode(sentences.tokens) == [" ".join(words) for words in WORDS]
    assert sentences.tokens[1].tolist() == [BEGIN, 3, END, PAD, PAD, PAD, PAD, PAD]
    assert sentences.lengths.tolist() == [8, 3, 5] and sentences.units(sentences.tokens) == 7 + 2 + 4
    assert torch.equal(sentences.batch(torch.tensor([2, 1])), sentences.tokens[[2, 1], :5])
    assert torch.equal(sentences.batch(slice(1, 3)), sentences.tokens[1:3, :5])


def test_unknown_and_missing_words_get_a_sentence():
    vocabulary = Vocabulary.of(WORDS)
    with pytest.raises(InputError, match="sentence 2 has the unknown token 'question', which is not among the 7 words"):
        vocabulary.encode([["be"], ["to", "question"]])
    with pytest.raises(InputError, match="sentence 3 has no words"):
        vocabulary.encode([["be"], ["to"], []])
    for mark in ("<unk>", "_UNK"):
        known = Vocabulary.of([*WORDS, [mark]])
        assert known.encode([["question"]])[0, 1] == known.index[mark]
    small = Vocabulary.of(WORDS, size=2)
    assert small.words[3:] == ("be", "to", "<unk>") and small.decode(small.encode(WORDS)) == [
        "to be <unk> <unk> to be", "be", "<unk> to be",
    ]  # fmt: skip


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A data set in the paper's format, where VAELIB_DATA is."""

    def write(of: str = "ptb", **parts: str | bytes):
        for split, text in parts.items():
            (tmp_path / f"{split}.txt").write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
        toy = replace(data.TEXTS[of], name="toy", files={split: (File(f"{split}.txt"),) for split in parts})
        monkeypatch.setitem(data.TEXTS, "toy", toy)

    monkeypatch.setenv("VAELIB_DATA", str(tmp_path))
    return write


def test_there_are_labels_where_the_format_says_so_and_nowhere_else(files):
    files(of="yelp", train="1\tto be or\tnot\n2\tbe\n1\tnot\n", valid="0\tbe to\n", test="0\tnot be\n")
    text = data.load("toy")
    assert text.vocabulary.decode(text.train.tokens) == ["to be or not", "be", "not"]
    assert text.valid.vocabulary is text.vocabulary and text.vocabulary.decode(text.test.tokens) == ["not be"]
    files(train="to be\tor not\nbe\nnot\n", valid="be\tto\n", test="not be\n")
    text = data.load("toy")
    assert text.vocabulary.decode(text.train.tokens) == ["to be or not", "be", "not"]
    assert text.vocabulary.decode(text.valid.tokens) == ["be to"]
    files(of="yelp", train="1\tto be\nnot\n", valid="0\tto\n", test="0\tnot\n")
    with pytest.raises(InputError, match="line 2 of .*train.txt' has no label and tab"):
        data.load("toy")


LINES = {  # bytes, and the documents in them: one a line, as `wc -l` counts them
    "U+2028": ("good food\u2028but slow\nbad\n", ["good food but slow", "bad"]),
    "U+2029": ("good food\u2029but slow\nbad\n", ["good food but slow", "bad"]),
    "U+0085": ("good food\u0085but slow\nbad\n", ["good food but slow", "bad"]),
    "form feed": ("one\x0ctwo three\nfour\n", ["one two three", "four"]),
    "vertical tab": ("one\x0btwo three\nfour\n", ["one two three", "four"]),
    "file separator": ("one\x1ctwo three\nfour\n", ["one two three", "four"]),
    "tab": ("hello\tworld again\nbye\n", ["hello world again", "bye"]),
    "byte order mark": ("\ufeffone two\nthree\n", ["one two", "three"]),
    "Windows": ("one two\r\nthree\r\n", ["one two", "three"]),
    "no end": ("one two\nthree", ["one two", "three"]),
    "blank end": ("one two\nthree\n\n", ["one two", "three"]),
    "blank ends": ("one two\r\nthree\r\n\r\n \n\n", ["one two", "three"]),
}


@pytest.mark.parametrize("kind", LINES)
def test_lines_end_at_line_feeds_alone(kind, tmp_path):
    text, right = LINES[kind]
    (tmp_path / "mine.txt").write_bytes(text.encode())
    assert [" ".join(words) for words in lines(tmp_path / "mine.txt")] == right
    labelled = "\n".join(f"7\t{line}" if line.strip() else line for line in text.lstrip("\ufeff").split("\n"))
    (tmp_path / "mine.txt").write_bytes(labelled.encode())
    assert [" ".join(words) for words in lines(tmp_path / "mine.txt", labelled=True)] == right


def test_sizes_of_real_text(files):
    files(train="to be or not\nbe <unk>\nnot be\n", valid="be\n", test="not\nto be or not\n")
    text = data.load("toy", longest=3)
    assert text.vocabulary.decode(text.train.tokens) == ["be <unk>", "not be"] and len(text.test) == 1
    assert len(data.load("toy", sentences=2).train) == 2
    text = data.load("toy", vocabulary=2)
    assert len(text.vocabulary) == 3 + 3 and text.vocabulary.decode(text.valid.tokens) == ["be"]
    for sizes, message in (
        ({"longest": 0}, "longest of data set 'toy' must be a whole number of at least 1, but is 0"),
        ({"longst": 3}, "no size of data set 'toy' is called 'longst', did you mean 'longest'"),
        ({"valid": 3}, "validation sentences of its own"),
        ({"binarisation": "fixed"}, "toy is text"),
    ):
        with pytest.raises(InputError, match=message):
            data.load("toy", **sizes)
    for sizes in ({"vocabulary": None}, {"sentences": "10"}):
        with pytest.raises(InputError, match="of data set 'synthetic-text' must be a whole number of at least 1"):
            data.load("synthetic-text", **sizes)
    files(train="be\n", valid="to be\n", test="be\n")
    with pytest.raises(InputError, match="unknown token 'to'"):
        data.load("toy")
    with pytest.raises(InputError, match="no document of .*valid.txt' has at most longest=1 words"):
        data.load("toy", longest=1)


def test_damaged_text_gets_a_sentence(files, tmp_path):
    files(train="to be\n\nnot\n", valid="be\n", test="be\n")
    with pytest.raises(InputError, match="line 2 of .*train.txt' is an empty sentence"):
        data.load("toy")
    for content in (
        b"\xff\xfe\x00",
        "to be\n".encode("utf-16"),
        "to be\n".encode("utf-16-le"),
        "\u00fc\n".encode("latin-1"),
    ):
        (tmp_path / "train.txt").write_bytes(content)
        with pytest.raises(InputError, match="is not text in UTF-8"):
            data.load("toy")
    for empty in (b"", b"\n", b" \r\n\n"):
        (tmp_path / "train.txt").write_bytes(empty)
        with pytest.raises(InputError, match="line 1 of .*train.txt' is an empty sentence"):
            data.load("toy")


def test_registry_of_texts():
    for entry in data.TEXTS.values():
        assert all((entry.description, entry.splits, entry.licence, entry.citation))
        for parts in entry.files.values():
            assert all(
                file.digest.partition(":")[0] in ("sha256", "git") and len(file.addresses) != 1 for file in parts
            )
    where = {line.name: line.where for line in data.describe()}
    assert where["synthetic-text"] == "built in" and data.fetch("synthetic-text") is None
    with pytest.raises(InputError, match="'digits' has images, whose sizes are fixed: leave vocabulary out"):
        data.load("digits", vocabulary=3)


def test_what_cannot_be_downloaded_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("VAELIB_DATA", str(tmp_path))
    monkeypatch.setattr("vaelib.data.files.cache", lambda: tmp_path / "cache")
    monkeypatch.setattr("vaelib.data.files.PAUSE", 0)
    where = {line.name: line.where for line in data.describe()}
    assert where["yahoo"] == "to be put in place by hand: yahoo/train.txt"  # the others have addresses
    assert where["ptb"] == "to be downloaded, 6.0 MB"
    with pytest.raises(InputError, match=r"no whole copy of 'yahoo/train.txt' .*it has no address"):
        data.load("yahoo")


PTB = Path(os.environ.get("VAELIB_DATA") or "/nowhere") / "ptb"


@pytest.mark.skipif(not PTB.is_dir(), reason="VAELIB_DATA names no folder with ptb")
def test_penn_treebank():
    text = data.load("ptb")
    assert [len(text.train), len(text.valid), len(text.test)] == [42_068, 3_370, 3_761]
    assert len(text.vocabulary) == 3 + 9_999 and text.train.tokens.shape[1] == 2 + 82
    assert text.train.units(text.train.tokens) == 929_589  # with one end mark a sentence


def test_synthetic_text_follows_its_recipe():
    text = data.load("synthetic-text", sentences=2000, vocabulary=20, seed=3)
    assert [len(part) for part in (text.train, text.valid, text.test)] == [1600, 200, 200]
    assert text.train.tokens.shape == (1600, 12) and len(text.vocabulary) == 23
    again = data.load("synthetic-text", sentences=2000, vocabulary=20, seed=3)
    assert torch.equal(text.test.tokens, again.test.tokens)
    other = data.load("synthetic-text", sentences=2000, vocabulary=20, seed=4)
    assert not torch.equal(text.test.tokens, other.test.tokens)
    first = torch.bincount(text.train.tokens[:, 1] - 3, minlength=20) / 1600
    later = torch.bincount((text.train.tokens[:, 2:-1] - 3).flatten(), minlength=20) / 14_400
    error = math.sqrt(0.05 * 0.95 / 1600)
    assert (first - 0.05).abs().max() < 4.5 * error  # uniform; 20 words, so wrong once in 7,000 seeds
    assert (later - 0.05).abs().max() > 4.5 * error  # and the others are not
    with pytest.raises(InputError, match="10 sentences at least"):
        data.load("synthetic-text", sentences=9)


def synthetic_by_hand(count, vocabulary, length, hidden, seed):
    """The recipe in NumPy, the LSTM written out: words from 0, ``[count, length]``."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(shape, generator=generator).double().numpy()

    shapes = (4 * hidden, hidden + 2), (4 * hidden, hidden), (4 * hidden,), (4 * hidden,)
    w_x, w_h, b_x, b_h = (2 * rand(*shape) - 1 for shape in shapes)
    embedding, lift = 2 * rand(vocabulary, hidden) - 1, 2 * rand(2, hidden) - 1
    a, b = 2 * rand(hidden, vocabulary) - 1, 10 * rand(2, vocabulary) - 5
    corner = 4 * torch.randint(2, (count, 2), generator=generator).numpy() - 2  # (+-2, +-2)
    z = corner + torch.randn((count, 2), generator=generator).numpy()
    c = z @ lift
    h = np.tanh(c)
    words = [torch.randint(vocabulary, (count,), generator=generator).numpy()]
    for _ in range(length - 1):
        gates = np.concatenate([embedding[words[-1]], z], 1) @ w_x.T + b_x + h @ w_h.T + b_h
        i, f, new, o = np.split(gates, 4, 1)
        c = c / (1 + np.exp(-f)) + np.tanh(new) / (1 + np.exp(-i))
        h = np.tanh(c) / (1 + np.exp(-o))
        p = np.exp(h @ a + z @ b)
        cdf = p.cumsum(1) / p.sum(1, keepdims=True)
        words.append((cdf < rand(count, 1)).sum(1).clip(max=vocabulary - 1))
    return np.stack(words, 1)


def test_synthetic_text_is_what_its_lstm_says():
    text = data.load("synthetic-text", sentences=200, vocabulary=20, length=6, hidden=8, seed=3)
    tokens = torch.cat([part.tokens for part in (text.train, text.valid, text.test)])
    theirs = synthetic_by_hand(200, 20, 6, 8, 3)
    assert (tokens[:, 1:-1].numpy() - 3 != theirs).mean() < 0.005  # but for rounding at a border


# -------------------------------------------------------------------------------- the model


def test_a_batch_says_what_its_sentences_say_alone(model, sentences):
    """Padding changes nothing, in encoder and decoder, whatever the company of a sentence and however wide the rows."""
    x, generator = sentences.tokens, torch.Generator().manual_seed(2)
    z = torch.randn(3, len(x), 2, generator=generator, dtype=torch.float64)
    posterior, log_p = model.encoder(x), model.joint(x, z)
    for i, length in enumerate(sentences.lengths):
        alone = x[i : i + 1, :length]
        torch.testing.assert_close(model.encoder(alone).mean[0], posterior.mean[i])
        torch.testing.assert_close(model.encoder(alone).log_std[0], posterior.log_std[i])
        torch.testing.assert_close(model.joint(alone, z[:, i : i + 1])[:, 0], log_p[:, i])
    wider = nn.functional.pad(x, (0, 4), value=PAD)
    torch.testing.assert_close(model.joint(wider, z), log_p)
    torch.testing.assert_close(model.encoder(wider).mean, posterior.mean)


def test_the_last_word_counts(model, sentences):
    """The negative control of the one above: a change of a real token, the last one too, changes everything."""
    x, z = sentences.tokens, torch.ones(1, 3, 2, dtype=torch.float64)
    other = x.clone()
    other[torch.arange(3), sentences.lengths - 2] = 6
    assert ((model.encoder(other).mean - model.encoder(x).mean).abs().max(1).values > 1e-3).all()
    assert ((model.joint(other, z) - model.joint(x, z)).abs() > 1e-3).all()


def test_log_prob_is_the_loop_over_words(model, sentences):
    """The equations of the decoder, word by word with an LSTMCell: h0 = tanh(Wz), c0 = Wz, input [embedding; z]."""
    x, z = sentences.tokens, torch.tensor([[0.5, -1.0], [1.0, 2.0], [0.0, 0.3]], dtype=torch.float64)
    decode = model.joint.decode
    cell = nn.LSTMCell(7, 6).double()
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in decode.lstm.state_dict().items()})
    for i, length in enumerate(sentences.lengths):
        c = z[i] @ decode.lift.weight.T
        h, total = c.tanh(), 0.0
        for word, following in zip(x[i, : length - 1], x[i, 1:length]):
            h, c = cell(torch.cat([decode.embed.weight[word], z[i]]), (h, c))
            total += (h @ decode.readout.weight.T).log_softmax(0)[following]
        torch.testing.assert_close(decode.log_prob(x, z.unsqueeze(0))[0, i], total)


def test_a_skip_adds_a_map_of_z_to_the_logits_of_every_word(sentences):
    """The words' softmax sees z beside the LSTM; without a skip the weights are drawn as ever."""
    sizes = {"latent": 2, "embedding": 5, "hidden": 6, "dropout": 0.0}
    model, without = (lstm_vae(7, torch.Generator().manual_seed(0), skip=skip, **sizes) for skip in (True, False))
    decode, bare = model.joint.decode, without.joint.decode
    for name, value in bare.state_dict().items():
        torch.testing.assert_close(decode.state_dict()[name], value, rtol=0, atol=0)
    x, z = sentences.tokens, torch.randn(3, len(sentences.tokens), 2, generator=torch.Generator().manual_seed(1))
    added = torch.einsum("vd,kbd->kbv", decode.skip.weight, z).unsqueeze(2)
    torch.testing.assert_close(decode.logits(x, z), bare.logits(x, z) + added)
    log_p = (bare.logits(x[:, :-1], z) + added).log_softmax(-1)
    picked = log_p.gather(-1, x[:, 1:].expand(3, -1, -1).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(decode.log_prob(x, z), picked.masked_fill(x[:, 1:] == PAD, 0.0).sum(-1))


def test_the_encoder_is_the_loop_over_words(model, sentences):
    """An LSTMCell over the whole sentence, marks included; mean and log-variance are halves of a linear map of h."""
    x, encode = sentences.tokens, model.encoder
    cell = nn.LSTMCell(5, 6).double()
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in encode.lstm.state_dict().items()})
    q = encode(x)
    for i, length in enumerate(sentences.lengths):
        h = c = torch.zeros(6, dtype=torch.float64)
        for word in x[i, :length]:
            h, c = cell(encode.embed.weight[word], (h, c))
        numbers = encode.head.weight @ h
        torch.testing.assert_close(q.mean[i], numbers[:2])
        torch.testing.assert_close((2 * q.log_std[i]).exp(), numbers[2:].exp())


def test_dropout_leaves_out_embeddings_and_outputs(sentences):
    """As drawn from torch's generator one after the other; the rest is twice as large, and the encoder has none."""
    model = perturbed(lstm_vae(7, latent=2, embedding=5, hidden=6, dropout=0.5).double())
    decode, x, z = model.joint.decode, sentences.tokens, torch.ones(2, 3, 2, dtype=torch.float64)
    torch.manual_seed(1)
    found = decode.log_prob(x, z)
    assert torch.equal(model.encoder(x).mean, model.encoder(x).mean)
    torch.manual_seed(1)
    words = nn.functional.dropout(decode.embed(x[:, :-1]), 0.5)
    inputs = torch.cat([words.expand(2, -1, -1, -1), z.unsqueeze(2).expand(-1, -1, 7, -1)], -1).flatten(0, 1)
    c = decode.lift(z).reshape(1, 6, 6)
    states = nn.functional.dropout(decode.lstm(inputs, (c.tanh(), c))[0], 0.5)
    log_p = decode.readout(states).log_softmax(-1).unflatten(0, (2, 3))
    picked = log_p.gather(-1, x[:, 1:].expand(2, -1, -1).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(found, picked.masked_fill(x[:, 1:] == PAD, 0.0).sum(-1))


def test_a_sentence_has_the_product_of_its_softmaxes():
    """The probability of a sentence is the product of the softmaxes, each over all the words and marks."""
    model = perturbed(lstm_vae(5, latent=1, embedding=3, hidden=4, dropout=0.0).double())
    z = torch.ones(1, 1, 1, dtype=torch.float64)
    first = model.joint.decode.logits(torch.tensor([[BEGIN]]), z)[0, 0, 0].softmax(0)
    words = torch.tensor([[BEGIN, w, END] for w in range(1, 5)])
    second = model.joint.decode.logits(words[:, :2], z.expand(1, 4, 1))[0, :, 1].softmax(1)
    found = model.joint.decode.log_prob(words, z.expand(1, 4, 1))[0].exp()
    torch.testing.assert_close(found, first[1:] * second[:, END])


def test_every_word_learns():
    """No word is frozen: with nn.Embedding(padding_idx=-1), as in the authors' code, the last one is."""
    model = lstm_vae(9, latent=2, embedding=5, hidden=6, dropout=0.0)
    x = torch.tensor([[BEGIN, *range(3, 9), 8, END]])
    q = model.encoder(x)
    objectives.backward(ESTIMATORS["elbo-total"], model.joint, q, x, q.noise(1))
    for part in (model.encoder, model.joint.decode):
        assert (part.embed.weight.grad[3:].abs().sum(1) > 0).all()
    frozen = nn.Embedding(9, 5, padding_idx=-1)
    frozen(x).sum().backward()
    assert frozen.weight.grad[8].abs().sum() == 0


def test_it_starts_as_published_and_from_its_generator():
    before = torch.get_rng_state()
    model, again = (lstm_vae(50, torch.Generator().manual_seed(5), latent=3, embedding=8, hidden=9) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    for (name, p), q in zip(model.named_parameters(), again.parameters()):
        bound = 0.1 if "embed" in name else 0.01
        assert torch.equal(p, q) and 0.8 * bound < p.abs().max() <= bound
    assert not any("bias" in name for name, _ in model.named_parameters() if "lstm" not in name)


def test_the_language_model_is_the_autoencoder_without_z(sentences):
    model = perturbed(lstm_vae(7, latent=0, embedding=5, hidden=6, dropout=0.0).double())
    x = sentences.tokens
    value, error = evaluation.log_likelihood(model, x, 3, 2, return_standard_error=True)
    exact = model.joint.decode.log_prob(x, torch.empty(1, 3, 0, dtype=torch.float64))[0]
    torch.testing.assert_close(value, exact.detach())
    assert error.max() == 0 and model.encoder(x).kl().abs().max() == 0
    assert evaluation.active_units(model.encoder, x) == [0]
    assert evaluation.mutual_information(model.encoder, x) == 0


def test_importance_sampling_agrees_with_the_grid():
    """By 4,000 draws against quadrature over a scalar z: within 4 standard errors (wrong once in 16,000);
    with half of the prior it is not."""
    model = perturbed(lstm_vae(7, latent=1, embedding=3, hidden=4, dropout=0.0).double())
    with torch.no_grad():
        model.encoder.head.weight.mul_(0.1)
    x = torch.tensor([[BEGIN, 3, 4, 5, END]])
    grid = torch.linspace(-12, 12, 4801, dtype=torch.float64).view(-1, 1, 1)
    exact = model.joint(x, grid).logsumexp(0) + math.log(24 / 4800)
    value, error = evaluation.log_likelihood(
        model, x, 4000, 500, torch.Generator().manual_seed(0), return_standard_error=True
    )
    assert (value - exact).abs() < 4 * error
    other = model.joint(x, grid.clamp_min(0)).logsumexp(0) + math.log(24 / 4800)
    assert (value - other).abs() > 4 * error


def test_dropout_is_for_training_alone(sentences):
    model = perturbed(lstm_vae(7, latent=2, embedding=5, hidden=6, dropout=0.5))
    with pytest.raises(InputError, match="writes without dropout: call model.eval"):
        model.joint.decode.sample(torch.zeros(2, 2))
    assert len(model.eval().joint.decode.sample(torch.zeros(2, 2), torch.Generator().manual_seed(0))) == 2
    model.train()
    z = torch.zeros(1, 3, 2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not torch.equal(model.joint(sentences.tokens, z), model.joint(sentences.tokens, z))
    model.eval()
    assert torch.equal(model.joint(sentences.tokens, z), model.joint(sentences.tokens, z))


def test_samples_have_the_model_s_probabilities():
    """Of 20,000 first words, each share is within 4.5 standard errors of its probability (wrong once in 30,000)."""
    model = perturbed(lstm_vae(6, latent=1, embedding=3, hidden=4, dropout=0.0))
    z = torch.full((20_000, 1), 0.7)
    x = model.joint.decode.sample(z, torch.Generator().manual_seed(0), longest=3)
    assert x.shape == (20_000, 4) and (x[:, 0] == BEGIN).all()
    ended = (x == END).cumsum(1).cumsum(1) > 1
    assert ((x == PAD) == ended).all()
    logits = model.joint.decode.logits(torch.tensor([[BEGIN]]), z[None, :1])[0, 0, 0]
    logits[[PAD, BEGIN]] = -torch.inf
    p = logits.softmax(0).detach()
    share = torch.bincount(x[:, 1], minlength=6) / 20_000
    assert ((share - p).abs() <= 4.5 * (p * (1 - p) / 20_000).sqrt()).all()
    assert ((share - p.flip(0)).abs() > 4.5 * (p * (1 - p) / 20_000).sqrt()).any()


def test_bad_tokens_and_sizes_get_a_sentence(model, sentences):
    x, z = sentences.tokens, torch.zeros(1, 3, 2, dtype=torch.float64)
    for wrong, message in (
        (x + 10, "unknown token 17|unknown token 16"),
        (x.where(x != x.max(), torch.tensor(model.encoder.embed.num_embeddings)), "has the unknown|have the unknown"),
        (torch.zeros_like(x), "a sentence is empty"),
        (x[:, :0], "a sentence is empty"),
    ):
        for use in (lambda: model.encoder(wrong), lambda: model.joint(wrong, z)):
            with pytest.raises(InputError, match=message):
                use()
    for sizes, message in (
        ({"hidden": 0}, "hidden of the LSTM must be at least 1"),
        ({"latent": -1}, "latent of the LSTM must be at least 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and less than 1"),
    ):
        with pytest.raises(InputError, match=message):
            lstm_vae(7, **sizes)


@pytest.mark.parametrize("name", ["elbo-path", "elbo-total", "iwae-dreg"])
def test_the_engine_agrees_with_its_reference(name, model, sentences):
    x = sentences.tokens
    q, estimator = model.encoder(x), ESTIMATORS[name]
    eps = q.noise(3, torch.Generator().manual_seed(0))
    objectives.backward(estimator, model.joint, q, x, eps)
    loss = objectives.reference(estimator, model.joint, model.encoder(x), x, eps).mean()
    reference = torch.autograd.grad(loss, list(model.parameters()))
    for parameter, expected in zip(model.parameters(), reference):
        torch.testing.assert_close(parameter.grad, expected)
