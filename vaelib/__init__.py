"""The package behind the textbook Quiet Gradients: gradient estimators for variational autoencoders.

Import what you use: ``from vaelib import bounds, data, estimators, objectives``. Importing the package itself loads
nothing.
"""

__version__ = "0.1.0"
