"""One mixture layer as Megatron-core, DeepSpeed and transformers write it, from the same configuration as ours.

Megatron's and DeepSpeed's need a world of their own: `start_megatron`, `start_deepspeed`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..compat.cuda_standin import install
from ..moe.config import MoEConfig
from .floor import DTYPES
from .layer_cases import LayerCase
from .layers import Layer, LayerStep, our_layer

TIMEOUT = 600.0  # seconds; a world of one never waits


def start_deepspeed() -> Callable[[], None]:
    """A world of one rank; returns what ends it. DeepSpeed's layer makes its groups itself."""
    from ..parallel.launchers import Place
    from ..parallel.world import leave, start

    start(Place(rank=0, world=1, local_rank=0, local_world=1), TIMEOUT)
    return leave


def start_megatron() -> Callable[[], None]:
    """A world of one rank with Megatron's groups; returns what ends it."""
    install()
    from ..parallel.groups import Groups  # imports Megatron, so only now
    from ..parallel.topology import Topology

    leave = start_deepspeed()
    groups = Groups.build(Topology())

    def end() -> None:
        groups.destroy()
        leave()

    return end


def megatron_layer(width: int, config: MoEConfig, dtype: str) -> Layer:
    """Megatron-core's MoELayer: experts one after the other, since its grouped ones want a CUDA package, behind its
    all-gather dispatcher, since the all-to-all one wants CUDA streams.

    Raises:
        ValueError: it has nothing that computes what ``config`` says.
    """
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import TransformerConfig

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # 0.16.1 leaves the name undefined without Transformer Engine
    moe_utils.MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1, device=torch.cuda.current_device()))
    model_parallel_cuda_manual_seed(0)  # the tracker's states must exist
    expert_width = config.width_of_expert(width)
    settings = TransformerConfig(
        num_layers=1,
        hidden_size=width,
        num_attention_heads=1,
        ffn_hidden_size=expert_width,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        params_dtype=DTYPES[dtype],
        bf16=dtype == "bf16",
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        num_moe_experts=config.experts,
        moe_router_topk=config.active,
        moe_ffn_hidden_size=expert_width,
        moe_shared_expert_intermediate_size=config.shared * expert_width or None,
        moe_router_topk_scaling_factor=None if config.weight_scale == 1 else config.weight_scale,
        moe_router_dtype="fp32",
        moe_router_enable_expert_bias=config.bias_rate > 0,
        moe_aux_loss_coeff=config.aux_loss,
        moe_z_loss_coeff=config.z_loss or None,
        moe_expert_capacity_factor=config.capacity,
        moe_token_drop_policy="probs" if config.drop == "probability" else config.drop,
        moe_token_dispatcher_type="allgather",
        **_megatron_routing(config),
    )
    module = build_module(get_moe_module_spec(use_te=False, num_experts=config.experts), config=settings)
    module.set_layer_number(1)
    experts = module.experts.local_experts
    weights = {
        "router.weight": [module.router.weight],
        "experts.w_in": [expert.linear_fc1.weight for expert in experts],
        "experts.w_out": [expert.linear_fc2.weight for expert in experts],
    }
    if config.shared:
        weights["shared.w_in"] = [module.shared_experts.linear_fc1.weight]
        weights["shared.w_out"] = [module.shared_experts.linear_fc2.weight]
    note = "MoELayer, sequential experts, all-gather dispatcher, with both losses"
    return Layer(module, lambda x_SBD: (module(x_SBD)[0], None), weights, note)


def _megatron_routing(config: MoEConfig) -> dict[str, Any]:
    scores: dict[str, dict[str, Any]] = {
        "softmax": {"moe_router_score_function": "softmax", "moe_router_pre_softmax": True},
        "softmax_normalized": {"moe_router_score_function": "softmax", "moe_router_pre_softmax": False},
        "sigmoid_normalized": {"moe_router_score_function": "sigmoid"},
    }
    balances = {"sequence": "seq_aux_loss", "micro_batch": "aux_loss", "none": "none"}
    if config.router != "topk" or config.score not in scores or config.balance not in balances:
        raise ValueError(f"Megatron-core has no {config.router} with {config.score} and balance {config.balance}")
    found = {**scores[config.score], "moe_router_load_balancing_type": balances[config.balance]}
    if config.groups > 1:
        found.update(moe_router_num_groups=config.groups, moe_router_group_topk=config.groups_active)
    return found


class _Expert(nn.Module):
    """A SwiGLU expert as DeepSpeed's users write it."""

    def __init__(self, width: int, expert_width: int):
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * expert_width, bias=False)
        self.down = nn.Linear(expert_width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def deepspeed_layer(width: int, config: MoEConfig, dtype: str) -> Layer:
    """DeepSpeed's MoE without dropping: it always divides by the sum of the selected, and every expert computes as
    many rows as the busiest one has."""
    from deepspeed.moe.layer import MoE

    if config.router != "topk" or config.score != "softmax_normalized" or config.shared or config.capacity:
        raise ValueError("DeepSpeed's MoE: top-k of a normalized softmax, without shared experts or capacity")
    module = MoE(
        width,
        _Expert(width, config.width_of_expert(width)),
        num_experts=config.experts,
        k=config.active,
        drop_tokens=False,
        use_rts=False,
        top2_2nd_expert_sampling=False,
    )
    module.set_deepspeed_parallelism()
    module.to(DTYPES[dtype])
    experts = module.deepspeed_moe.experts.deepspeed_experts
    weights = {
        "router.weight": [module.deepspeed_moe.gate.wg.weight],
        "experts.w_in": [expert.gate_up.weight for expert in experts],
        "experts.w_out": [expert.down.weight for expert in experts],
    }

    def forward(x_SBD: Tensor) -> tuple[Tensor, Tensor | None]:
        hidden, aux, _ = module(x_SBD)
        return hidden, None if config.balance == "none" else config.aux_loss * aux

    note = "MoE, drop_tokens=False: all experts padded to the busiest; load-balance loss, no z-loss"
    return Layer(module, forward, weights, note)


def olmoe_layer(width: int, config: MoEConfig, dtype: str) -> Layer:
    """transformers' OlmoeSparseMoeBlock. Its experts run in either of two ways; the third, batched_mm, copies an
    expert's weights for every visit."""
    import transformers
    from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

    if config.router != "topk" or not config.score.startswith("softmax") or config.shared or config.capacity:
        raise ValueError("OLMoE's block: top-k of a softmax, without shared experts or capacity")
    settings = transformers.OlmoeConfig(
        hidden_size=width,
        intermediate_size=config.width_of_expert(width),
        num_experts=config.experts,
        num_experts_per_tok=config.active,
        norm_topk_prob=config.score == "softmax_normalized",
    )
    settings._experts_implementation = "eager"
    module = OlmoeSparseMoeBlock(settings).to(DTYPES[dtype])

    def choose(experts: str) -> None:
        settings._experts_implementation = experts

    return Layer(
        module,
        lambda x_SBD: (module(x_SBD), None),
        {
            "router.weight": [module.gate.weight],
            "experts.w_in": [module.experts.gate_up_proj],
            "experts.w_out": [module.experts.down_proj],
        },
        "OlmoeSparseMoeBlock, no losses (they are the model's)",
        options=("grouped_mm", "eager"),
        choose=choose,
    )


def megatron(case: Mapping[str, Any]) -> LayerStep:
    """Factory; a world of one rank lives as long."""
    return _step(case, megatron_layer, start_megatron())


def deepspeed(case: Mapping[str, Any]) -> LayerStep:
    """Factory; a world of one rank lives as long."""
    return _step(case, deepspeed_layer, start_deepspeed())


def olmoe(case: Mapping[str, Any]) -> LayerStep:
    """Factory."""
    return _step(case, olmoe_layer, lambda: None)


def _step(
    case: Mapping[str, Any], build: Callable[[int, MoEConfig, str], Layer], leave: Callable[[], None]
) -> LayerStep:
    shape = LayerCase(**case)
    layer = build(shape.width, shape.moe(), shape.dtype)
    layer.load(our_layer(shape.width, shape.moe(), shape.dtype))
    return LayerStep(shape, layer, leave)
