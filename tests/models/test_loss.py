"""The loss over a padded vocabulary against torch's cross-entropy over the real part of it."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from moescale.models.loss import token_losses

T, V = 7, 12


@pytest.mark.parametrize("grouped", [False, True], ids=["alone", "in a group of one"])
@pytest.mark.parametrize("real", [1, 9, V])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(one_rank: Any, grouped: bool, real: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(real)
    logits = (5 * torch.randn(T, V, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(0, real, (T,), generator=generator)
    weights = torch.rand(T, generator=generator)
    found = token_losses(logits, labels, real, one_rank.tensor if grouped else None)
    exact = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(exact[:, :real], labels, reduction="none")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad((found * weights).sum(), logits)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), exact)
    assert gradient.dtype == dtype
    bound = 1e-6 if dtype == torch.float32 else 4e-3  # the gradient is rounded to the logits' dtype
    assert (gradient.double() - wanted).abs().max() < bound
    assert real == V or gradient[:, real:].abs().max() == 0


def test_large_logits_do_not_overflow() -> None:
    logits = torch.tensor([[3e4, -3e4, 0.0]], requires_grad=True)
    loss = token_losses(logits, torch.tensor([1]), 3, None)
    loss.sum().backward()
    assert loss.item() == 6e4
    assert logits.grad is not None
    assert logits.grad.tolist() == [[1.0, -1.0, 0.0]]


def test_what_a_rank_of_padding_only_sends_is_float32(one_rank: Any) -> None:
    """With bf16 logits too: the ranks that hold real columns send float32 in the same messages."""
    logits = torch.zeros(T, V, dtype=torch.bfloat16, requires_grad=True)
    loss = token_losses(logits, torch.zeros(T, dtype=torch.int64), 0, one_rank.tensor)
    assert loss.dtype == torch.float32
    assert loss.tolist() == [0.0] * T
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient.abs().max() == 0
