"""moescale: from a sweep file to a fitted, checked scaling law for dense and MoE language models."""

# Absolute, unlike everywhere else: pytest also loads this file by its path, as a module named after the checkout's
# folder, which need not be a package's name ("a-b 1.0").
from moescale.version import __version__

__all__ = ["__version__"]
