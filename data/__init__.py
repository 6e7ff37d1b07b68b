"""Text to training samples: corpora, tokenizer, prepared token files, a fixed order of samples, held-out windows."""

from .config import DataConfig, DomainConfig, TokenizerConfig
from .loader import HeldOut, TrainStream, held_out_sequences
from .prepare import PreparedData, prepare
from .tokenizer import Tokenizer, vocabulary_size

__all__ = [
    "DataConfig",
    "DomainConfig",
    "HeldOut",
    "PreparedData",
    "Tokenizer",
    "TokenizerConfig",
    "TrainStream",
    "held_out_sequences",
    "prepare",
    "vocabulary_size",
]
