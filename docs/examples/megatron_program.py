"""A plain Megatron-core program whose feed-forward layers are moescale's mixtures, spread over all its ranks.

torchrun --nproc-per-node 2 megatron_program.py
"""

# ruff: noqa: E402
import torch
import torch.distributed as dist

from moescale.compat.cuda_standin import install

install()  # before Megatron is imported; where there is a CUDA device it does nothing
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import ModuleSpec, TransformerConfig

from moescale.moe import MoEConfig
from moescale.moe.bind_megatron import MegatronMoE
from moescale.parallel.exchange import make_exchange

MOE = MoEConfig(experts=8, active=2, expert_width=32)
STEPS, BATCH, SEQ, VOCAB = 10, 8, 32, 64


def build() -> DistributedDataParallel:
    config = TransformerConfig(num_layers=2, hidden_size=64, num_attention_heads=4, num_moe_experts=MOE.experts,
                               expert_model_parallel_size=dist.get_world_size(), use_cpu_initialization=True,
                               hidden_dropout=0.0, attention_dropout=0.0, bias_dropout_fusion=False,
                               finalize_model_grads_func=finalize_model_grads)  # fmt: skip
    exchange = make_exchange("torch", parallel_state.get_expert_model_parallel_group())
    spec = get_gpt_layer_local_spec()
    spec.submodules.mlp = ModuleSpec(module=MegatronMoE, params={"moe": MOE, "exchange": exchange})
    model = GPTModel(config, spec, vocab_size=VOCAB, max_sequence_length=SEQ)
    for layer in model.decoder.layers:
        torch.nn.init.normal_(layer.mlp.router.weight, std=0.02)
        for weight in layer.mlp.experts.parameters():
            weight.allreduce = False  # Megatron sums such gradients over the ranks that hold the same experts
            whole = torch.randn(MOE.experts, *weight.shape[1:]) * 0.2  # drawn alike on every rank
            weight.data.copy_(whole.chunk(exchange.size)[exchange.rank])
    return DistributedDataParallel(config, DistributedDataParallelConfig(), model)


def forward_step(batches, model):
    tokens = next(batches)
    position, later = torch.arange(SEQ).expand(len(tokens), -1), torch.ones(1, 1, SEQ, SEQ).triu(1).bool()
    losses = model(tokens[:, :-1], position, later, labels=tokens[:, 1:].contiguous())
    return losses, lambda losses: (losses.mean(), losses.detach().mean())


def main():
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(expert_model_parallel_size=dist.get_world_size())
    torch.manual_seed(0)
    model_parallel_cuda_manual_seed(0)
    model = build()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.05, momentum=0.9
    )  # Megatron's own ones insist on a CUDA device
    texts = (torch.arange(BATCH)[:, None] + torch.arange(SEQ + 1) * 7) % VOCAB  # to be learned by heart
    mine = texts.chunk(dist.get_world_size())[dist.get_rank()]
    for step in range(STEPS):
        model.zero_grad_buffer()
        (loss,) = get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=iter([mine]), model=[model], num_microbatches=1,
            seq_length=SEQ, micro_batch_size=len(mine), forward_only=False)  # fmt: skip
        for parameter in model.parameters():
            parameter.grad = parameter.main_grad
        optimizer.step()
        dist.all_reduce(loss)
        if dist.get_rank() == 0:
            print(f"step {step + 1} loss {loss.item() / dist.get_world_size():.6f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
