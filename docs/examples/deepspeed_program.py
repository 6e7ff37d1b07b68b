"""A plain DeepSpeed program whose feed-forward layers are moescale's mixtures, spread over all its ranks.

torchrun --nproc-per-node 2 deepspeed_program.py
"""

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.utils import groups
from torch import nn
from torch.nn import functional as F

from moescale.moe import MoEConfig, MoELayer
from moescale.moe.bind_deepspeed import DeepSpeedExperts
from moescale.parallel.exchange import Exchange, make_exchange

MOE = MoEConfig(experts=8, active=2, expert_width=32)
STEPS, BATCH, SEQ, VOCAB, WIDTH = 10, 8, 32, 64, 64
SETTINGS = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": 0.0,
    # Without contiguous gradients ZeRO 1 would sum experts over ranks that hold other experts.
    "zero_optimization": {"stage": 1, "contiguous_gradients": True},
    "zero_allow_untested_optimizer": True,
}


class Mixture(MoELayer, DeepSpeedExperts):
    """Experts that DeepSpeed knows to be experts; all ranks draw all of them and keep their own."""

    def __init__(self, exchange: Exchange):
        super().__init__(WIDTH, MOE, exchange=exchange, batch_first=True)
        self.mark_experts(self)
        for weight in self.router.parameters():
            nn.init.normal_(weight, std=0.02)
        for weight in self.experts.parameters():
            whole = torch.randn(MOE.experts, *weight.shape[1:]) * 0.2
            weight.data.copy_(whole.chunk(exchange.size)[exchange.rank])


class Model(nn.Module):
    """Guesses the next token from the last one: embedding, two mixtures, head."""

    def __init__(self, exchange: Exchange):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.mixtures = nn.ModuleList(Mixture(exchange) for _ in range(2))

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``[B, S + 1]`` -> mean loss of the tokens, auxiliary loss of the routers."""
        x, auxiliary = self.embedding(tokens[:, :-1]), torch.zeros(())
        for mixture in self.mixtures:
            output = mixture(F.rms_norm(x, x.shape[-1:]))
            x, auxiliary = x + output.hidden, auxiliary + output.loss
        return F.cross_entropy((x @ self.embedding.weight.t()).flatten(0, 1), tokens[:, 1:].flatten()), auxiliary


def main():
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # on CPU it would be compiled for a minute
    deepspeed.init_distributed("gloo")
    torch.manual_seed(0)
    ranks = dist.get_world_size()
    groups._create_expert_and_data_parallel(ranks)
    model = Model(make_exchange("torch", groups._get_expert_parallel_group(f"ep_size_{ranks}")))
    split = split_params_into_different_moe_groups_for_optimizer({"params": list(model.parameters()), "name": "all"})
    optimizer = torch.optim.SGD(split, lr=0.2, momentum=0.9)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=SETTINGS)
    texts = (torch.arange(BATCH)[:, None] + torch.arange(SEQ + 1) * 7) % VOCAB  # to be learned by heart
    for step in range(STEPS):
        loss, auxiliary = engine(texts.chunk(ranks)[dist.get_rank()])
        engine.backward(loss + auxiliary)
        engine.step()
        dist.all_reduce(loss := loss.detach() / ranks)
        if dist.get_rank() == 0:
            print(f"step {step + 1} loss {loss.item():.6f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
