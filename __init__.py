"""moescale: from a sweep file to a fitted, checked scaling law for dense and MoE language models."""

from .version import __version__

__all__ = ["__version__"]
