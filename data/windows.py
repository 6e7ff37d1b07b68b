"""Text that a model is asked about, cut to the length of its sequences."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Windows:
    """N sequences of S tokens. tokens_NS and labels_NS are int64; mask_NS (float32) is one where a label counts."""

    tokens_NS: torch.Tensor
    labels_NS: torch.Tensor
    mask_NS: torch.Tensor
