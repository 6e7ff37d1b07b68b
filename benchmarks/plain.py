"""The transformer that one writes by hand: RMSNorm, rotary positions, SDPA, SwiGLU, tied head. No parallelism.

It computes what our dense model computes (tests/benchmarks compares the losses), so it says what Megatron's layers,
its schedule, DeepSpeed's engine and the record cost together.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-5


def _rotation(seq: int, width: int, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[S, width]`` of rotary positions (Su et al. 2021), halves rotated against each other."""
    frequency = base ** (-torch.arange(0, width, 2) / width)
    angle = torch.outer(torch.arange(seq).float(), frequency).repeat(1, 2)
    return angle.cos(), angle.sin()


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-second, first), dim=-1) * sine


class Layer(nn.Module):
    """Attention and feed-forward network, each behind its norm and added to the residual stream."""

    def __init__(self, width: int, heads: int, ffn: int):
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.RMSNorm(width, EPS)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.o = nn.Linear(width, width, bias=False)
        self.ffn_norm = nn.RMSNorm(width, EPS)
        self.gate_up = nn.Linear(width, 2 * ffn, bias=False)
        self.down = nn.Linear(ffn, width, bias=False)

    def forward(self, x_BSD: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        batch, seq, width = x_BSD.shape
        qkv = self.qkv(self.attention_norm(x_BSD)).view(batch, seq, 3, self.heads, width // self.heads)
        q_BHSd, k_BHSd, v_BHSd = qkv.permute(2, 0, 3, 1, 4)
        q_BHSd, k_BHSd = _rotate(q_BHSd, cosine, sine), _rotate(k_BHSd, cosine, sine)
        mixed_BHSd = F.scaled_dot_product_attention(q_BHSd, k_BHSd, v_BHSd, is_causal=True)
        x_BSD = x_BSD + self.o(mixed_BHSd.transpose(1, 2).reshape(batch, seq, width))
        gate, up = self.gate_up(self.ffn_norm(x_BSD)).chunk(2, dim=-1)
        return x_BSD + self.down(F.silu(gate) * up)


class Transformer(nn.Module):
    """Tokens ``[B, S]`` to logits ``[B, S, V]``."""

    cosine: Tensor
    sine: Tensor

    def __init__(self, width: int, layers: int, heads: int, ffn: int, vocab: int, seq: int):
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(Layer(width, heads, ffn) for _ in range(layers))
        self.final_norm = nn.RMSNorm(width, EPS)
        cosine, sine = _rotation(seq, width // heads)
        self.register_buffer("cosine", cosine, persistent=False)
        self.register_buffer("sine", sine, persistent=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        x_BSD = self.embedding(tokens_BS)
        for layer in self.layers:
            x_BSD = layer(x_BSD, self.cosine, self.sine)
        return F.linear(self.final_norm(x_BSD), self.embedding.weight)
