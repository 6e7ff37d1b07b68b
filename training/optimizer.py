"""The optimizer: AdamW from torch (fused), or NVIDIA Apex's where it is importable and CUDA is there; or plain SGD."""

import importlib.util
from typing import Any

import torch

from ..base.errors import UserError
from .config import OptimizerConfig


def apex_is_usable() -> bool:
    """Whether NVIDIA's apex (not PyPI's other ``apex``) and a CUDA device are there."""
    if not torch.cuda.is_available() or importlib.util.find_spec("apex") is None:
        return False
    return importlib.util.find_spec("apex.optimizers") is not None


def make_optimizer(config: OptimizerConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW or SGD over parameter groups whose key ``decay`` says whether weight decay applies.

    Raises:
        UserError: apex is asked for and not usable.
    """
    usable = apex_is_usable()
    if config.impl == "apex" and not usable:
        raise UserError(
            "optimizer.impl (apex): NVIDIA apex with a CUDA device is not available here; use auto or torch "
            "(the package 'apex' on PyPI is another project; build NVIDIA's from its source)"
        )
    for group in groups:
        group["weight_decay"] = config.weight_decay if group.pop("decay") else 0.0
    if config.impl == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, fused=True)
    settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if usable and config.impl in ("auto", "apex"):
        from apex.optimizers import FusedAdam

        return FusedAdam(groups, adam_w_mode=True, **settings)
    return torch.optim.AdamW(groups, fused=True, **settings)
