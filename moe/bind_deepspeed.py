"""What DeepSpeed must see to treat experts as experts: an instance of its MoE class and tagged parameters."""

import deepspeed.moe.layer
from torch import nn

from .layer import MoELayer


class DeepSpeedExperts(deepspeed.moe.layer.MoE):
    """Mixin before a `MoELayer` subclass.

    DeepSpeed recognises MoE layers by class and reduces parameters with ``allreduce = False`` over the expert-data
    group named by ``group_name``. The groups themselves exist already: parallel/groups.py makes them.
    """

    def __init__(self) -> None:  # not MoE.__init__, which would build DeepSpeed's own experts
        nn.Module.__init__(self)

    def mark_experts(self, layer: MoELayer) -> None:
        """Tag the expert parameters of ``layer`` (usually the same object)."""
        self.ep_size = layer.exchange.size
        self.num_experts = layer.config.experts
        self.num_local_experts = self.num_experts // self.ep_size
        self.expert_group_name = f"ep_size_{self.ep_size}"
        self.use_residual = False
        self.enable_expert_tensor_parallelism = False
        for parameter in layer.experts.parameters():
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = self.expert_group_name  # type: ignore[attr-defined]

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Called by the engine; there is nothing left to create."""
