"""Text to training samples: corpora, tokenizer, prepared token files, a fixed order of samples, held-out windows.

What needs torch (`data.loader`) is imported from there, so that planning a study does not wait for it.
"""

from .config import DataConfig, DomainConfig, TokenizerConfig
from .prepare import PreparedData, find_prepared, prepare
from .tokenizer import Tokenizer, vocabulary_size

__all__ = [
    "DataConfig",
    "DomainConfig",
    "PreparedData",
    "Tokenizer",
    "TokenizerConfig",
    "find_prepared",
    "prepare",
    "vocabulary_size",
]
