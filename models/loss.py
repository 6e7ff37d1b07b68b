"""Cross-entropy over a vocabulary that is cut over tensor-parallel ranks and padded at its end.

Megatron's own passes over the logits six times and needs the padding filled; on small models it took as long as a
transformer layer (docs/findings.md). Here each rank takes one fused log-softmax of its real columns, and the ranks
then agree on the log-partition over all columns.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def token_losses(logits_TV: Tensor, labels_T: Tensor, real_vocab: int, group: ProcessGroup | None) -> Tensor:
    """Loss of each token, ``[T]`` float32.

    Args:
        logits_TV: this rank's columns of the padded vocabulary, ``[rank * V, (rank + 1) * V)``.
        labels_T: int64, below ``real_vocab``; columns from there on get no probability.
        group: the tensor-parallel group, or None when all columns are here.
    """
    return _TokenLosses.apply(logits_TV, labels_T, real_vocab, group)


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, labels_T: Tensor, real_vocab: int, group: ProcessGroup | None) -> Tensor:
        first = 0 if group is None else dist.get_rank(group) * logits_TV.shape[1]
        real = min(max(real_vocab - first, 0), logits_TV.shape[1])
        local_T, mine_T = labels_T, None
        if group is not None:
            local_T = labels_T - first
            mine_T = (local_T >= 0) & (local_T < real)
            local_T = local_T.masked_fill(~mine_T, 0)
        logp_TV = torch.log_softmax(logits_TV[:, :real], dim=-1, dtype=torch.float32)
        loss_T = -logp_TV.gather(1, local_T.unsqueeze(1)).squeeze(1) if real else logp_TV.new_zeros(len(labels_T))
        shift_T = None
        if mine_T is not None:
            # log-partition of this rank's columns, recovered from any one of them (-inf where there are none)
            part_T = logits_TV[:, 0].float() - logp_TV[:, 0] if real else torch.full_like(loss_T, float("-inf"))
            parts_RT = [torch.empty_like(part_T) for _ in range(dist.get_world_size(group))]
            dist.all_gather(parts_RT, part_T.contiguous(), group=group)
            shift_T = part_T - torch.logsumexp(torch.stack(parts_RT), dim=0)
            loss_T = (loss_T - shift_T).masked_fill(~mine_T, 0.0)
            dist.all_reduce(loss_T, group=group)
        ctx.save_for_backward(local_T, shift_T, mine_T)
        ctx.logp_TV = logp_TV  # turned into the gradient in place: the backward pass can run once
        ctx.columns, ctx.dtype = logits_TV.shape[1], logits_TV.dtype
        return loss_T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        local_T, shift_T, mine_T = ctx.saved_tensors
        logp_TV, ctx.logp_TV = ctx.logp_TV, None
        if logp_TV is None:
            raise RuntimeError("the gradient of the token losses can be taken only once")
        gradient_T1 = gradients[0].unsqueeze(1)
        if shift_T is not None:
            logp_TV += shift_T.unsqueeze(1)
        grad_TV = logp_TV.exp_().mul_(gradient_T1)
        if logp_TV.shape[1]:
            own_T1 = gradient_T1 if mine_T is None else gradient_T1 * mine_T.unsqueeze(1)
            grad_TV.scatter_add_(1, local_T.unsqueeze(1), -own_T1)
        if ctx.columns > logp_TV.shape[1]:
            grad_TV = torch.nn.functional.pad(grad_TV, (0, ctx.columns - logp_TV.shape[1]))
        return grad_TV.to(ctx.dtype), None, None, None
