"""Peers in the loop that everyone writes: zero, forward, loss, backward, clip, fused AdamW.

They get the same samples as our step, in the same order, drawn before anything is timed.
"""

import contextlib
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import DataConfig, prepare
from ..data.loader import TrainStream
from .cases import Case
from .device import DEVICE
from .fastest import fastest
from .plain import Transformer

BATCHES = 64  # drawn ahead, then repeated
LR, BETAS, WEIGHT_DECAY, CLIP = 1e-3, (0.9, 0.95), 0.1, 1.0
# The third that runs on CPU, batched_mm, copies an expert's weights for every visit: gigabytes here.
EXPERTS = ("grouped_mm", "eager")
WARM_UP = 5  # steps


class PlainLoop:
    """A `Stepper` around a model from tokens to logits; bf16 is autocast over fp32 parameters."""

    bytes_moved = None

    def __init__(self, model: nn.Module, case: Case, data: Mapping[str, Any]):
        self.model = model.to(DEVICE).train()
        self._autocast: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if case.dtype == "bf16":
            self._autocast = torch.autocast(DEVICE.type, torch.bfloat16)
        config = DataConfig.model_validate(data)
        stream = TrainStream(prepare(config), config, case.seq, seed=0)
        drawn = [stream.samples(range(n * case.batch, (n + 1) * case.batch)) for n in range(BATCHES)]
        self._batches = itertools.cycle([(tokens.to(DEVICE), labels.to(DEVICE)) for tokens, labels, _ in drawn])
        self._optimizer = torch.optim.AdamW(
            model.parameters(), lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
        )

    def warm_up(self) -> str:
        for _ in range(WARM_UP):
            self.step()
        return "plain torch loop"

    def step(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        with self._autocast:
            loss = self.loss(*next(self._batches))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self._optimizer.step()
        loss.item()  # every loop looks at its loss

    def loss(self, tokens_BS: Tensor, labels_BS: Tensor) -> Tensor:
        return _cross_entropy(self.model(tokens_BS), labels_BS)

    def close(self) -> None:
        pass


def _cross_entropy(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    return F.cross_entropy(logits_BSV.flatten(0, 1).float(), labels_BS.flatten())


class Plain(PlainLoop):
    """The hand-written dense transformer."""

    def __init__(self, case: Mapping[str, Any], data: Mapping[str, Any]):
        shape = Case(**case)
        torch.manual_seed(0)
        model = Transformer(shape.width, shape.layers, shape.heads, shape.ffn, shape.vocab, shape.seq)
        super().__init__(model, shape, data)


class HuggingFace(PlainLoop):
    """OLMoE with its load-balance loss for mixtures, Llama for dense models; SDPA attention."""

    def __init__(self, case: Mapping[str, Any], data: Mapping[str, Any]):
        from transformers import LlamaConfig, LlamaForCausalLM, OlmoeConfig, OlmoeForCausalLM

        shape = Case(**case)
        self._mixture = shape.experts > 0
        self._aux_loss = 0.01  # as the default of the moe section
        common: dict[str, Any] = {
            "vocab_size": shape.vocab,
            "hidden_size": shape.width,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "max_position_embeddings": shape.seq,
            "tie_word_embeddings": True,
            "use_cache": False,
            "pad_token_id": None,
            "attn_implementation": "sdpa",
        }
        torch.manual_seed(0)
        if self._mixture:
            config = OlmoeConfig(
                intermediate_size=shape.expert_width,
                num_experts=shape.experts,
                num_experts_per_tok=shape.active,
                output_router_logits=True,
                eos_token_id=None,
                **common,
            )
            model = OlmoeForCausalLM(config)
        else:
            model = LlamaForCausalLM(LlamaConfig(intermediate_size=shape.ffn, **common))
        self._choose_experts: Callable[[str], None] = model.set_experts_implementation
        super().__init__(model, shape, data)

    def warm_up(self) -> str:
        if not self._mixture:
            super().warm_up()
            return "LlamaForCausalLM"
        best, tried = fastest(EXPERTS, self._try)
        self._choose_experts(best)
        return f"OlmoeForCausalLM, experts {best} ({tried})"

    def _try(self, experts: str) -> None:
        self._choose_experts(experts)
        self.step()

    def loss(self, tokens_BS: Tensor, labels_BS: Tensor) -> Tensor:
        output = self.model(input_ids=tokens_BS)
        loss = _cross_entropy(output.logits, labels_BS)
        return loss + self._aux_loss * output.aux_loss if self._mixture else loss
