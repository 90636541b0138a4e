"""Models: decoders with their closed forms, encoders, joint densities, and builders by name.

The PixelCNN and the LSTM are in :mod:`vaelib.models.pixelcnn` and :mod:`vaelib.models.text`, which are loaded where
they are asked for.
"""

from vaelib.models.builders import MODELS, build
from vaelib.models.decoders import BernoulliMLP, CosineDecoder, GaussianDecoder, LinearDecoder
from vaelib.models.encoders import (
    DetachedEncoder,
    DetachedOutputs,
    DiscreteEncoder,
    GaussianMixtureMLP,
    GaussianMLP,
    HierarchicalEncoder,
)
from vaelib.models.joints import DiscreteJoint, Guided, HierarchicalJoint, Joint
from vaelib.models.linear import LinearEncoder, LinearGaussian, exact_encoder, ppca
from vaelib.models.vae import VAE, Start

__all__ = [
    "MODELS",
    "VAE",
    "BernoulliMLP",
    "CosineDecoder",
    "DetachedEncoder",
    "DetachedOutputs",
    "DiscreteEncoder",
    "DiscreteJoint",
    "GaussianDecoder",
    "GaussianMLP",
    "GaussianMixtureMLP",
    "Guided",
    "HierarchicalEncoder",
    "HierarchicalJoint",
    "Joint",
    "LinearDecoder",
    "LinearEncoder",
    "LinearGaussian",
    "Start",
    "build",
    "exact_encoder",
    "ppca",
]
