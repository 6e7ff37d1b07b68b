"""Balancing losses: their values in cases that can be done in one's head, and what they are additive over."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moescale.moe.balance import TokenGrid, load_balance_loss, visits_by_sequence, z_loss_sum
from moescale.moe.router import Routing, TopKRouter


def route(logits_TE: Tensor, active: int, score: str = "softmax") -> Routing:
    """The router's own arithmetic on given logits: its weight is the identity."""
    router = TopKRouter(logits_TE.shape[1], logits_TE.shape[1], active, score)  # type: ignore[arg-type]
    with torch.no_grad():
        router.weight.copy_(torch.eye(logits_TE.shape[1]))
    return router(logits_TE)


def balance_of(routing: Routing, grid: TokenGrid) -> float:
    return load_balance_loss(routing, visits_by_sequence(routing, grid), grid).item()


def test_routing_is_softmax_and_top_k() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3]]))
    plain = route(logits, 2)
    assert plain.index_TK.tolist() == [[1, 2], [0, 2]]
    torch.testing.assert_close(plain.weight_TK, torch.tensor([[0.6, 0.3], [0.5, 0.3]]))
    torch.testing.assert_close(plain.probs_TE.sum(dim=1), torch.ones(2))
    torch.testing.assert_close(plain.logsumexp_T, torch.zeros(2), atol=1e-6, rtol=0)
    normalized = route(logits, 2, "softmax_normalized")
    torch.testing.assert_close(normalized.weight_TK, torch.tensor([[2 / 3, 1 / 3], [5 / 8, 3 / 8]]))


def test_scores_are_float32_for_bfloat16_tokens() -> None:
    router = TopKRouter(8, 4, 2).bfloat16()
    with torch.no_grad():
        router.weight.normal_()
    routing = router(torch.randn(5, 8).bfloat16())
    assert {t.dtype for t in (routing.probs_TE, routing.weight_TK, routing.logsumexp_T)} == {torch.float32}


def test_uniform_routing_costs_one() -> None:
    """Every expert visited and scored alike: token t prefers expert t mod E, then the next ones."""
    experts = 4
    preference_E = torch.tensor([3.0, 2.0, 1.0, 0.0])
    logits = torch.stack([preference_E.roll(t) for t in range(6 * experts)])
    for active in (1, 2, 3, 4):
        assert math.isclose(balance_of(route(logits, active), TokenGrid(sequences=1)), 1.0, rel_tol=1e-6)
        assert math.isclose(balance_of(route(logits, active), TokenGrid(6, batch_first=True)), 1.0, rel_tol=1e-6)


def test_collapse_onto_k_experts_costs_e_over_k() -> None:
    logits = torch.tensor([50.0, 49.0, 0.0, 0.0, 0.0, 0.0]).repeat(12, 1)
    assert math.isclose(
        balance_of(route(logits, 1), TokenGrid(1)), 6 * torch.softmax(logits[0], 0)[0].item(), rel_tol=1e-5
    )
    assert math.isclose(balance_of(route(logits, 2), TokenGrid(1)), 6 / 2, rel_tol=1e-5)


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 5), st.booleans(), st.integers(0, 10**6))
def test_losses_are_additive_over_sequences(
    sequences: int, length: int, experts: int, batch_first: bool, seed: int
) -> None:
    """However a batch is cut into micro-batches of whole sequences, means and sums over it stay."""
    generator = torch.Generator().manual_seed(seed)
    active = 1 + seed % experts
    logits_BSE = torch.randn(sequences, length, experts, generator=generator)
    mask_BS = torch.rand(sequences, length, generator=generator) > 0.3
    order = (lambda t: t) if batch_first else (lambda t: t.transpose(0, 1))
    routing = route(order(logits_BSE).reshape(-1, experts), active)
    grid = TokenGrid(sequences, batch_first, order(mask_BS).reshape(-1))
    alone = [(route(logits_BSE[b], active), TokenGrid(1, batch_first, mask_BS[b])) for b in range(sequences)]
    assert math.isclose(
        balance_of(routing, grid), sum(balance_of(*one) for one in alone) / sequences, rel_tol=1e-5, abs_tol=1e-6
    )
    z_sum = z_loss_sum(routing, grid).item()
    assert math.isclose(z_sum, sum(z_loss_sum(*one).item() for one in alone), rel_tol=1e-4, abs_tol=1e-5)
    visits = visits_by_sequence(routing, grid)
    torch.testing.assert_close(visits, torch.cat([visits_by_sequence(*one) for one in alone]))
    assert visits.sum() == active * mask_BS.sum()


def test_balancing_pushes_probability_away_from_crowded_experts() -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0]]).repeat(6, 1).requires_grad_()
    routing = route(logits, 1)
    grid = TokenGrid(1)
    (gradient,) = torch.autograd.grad(load_balance_loss(routing, visits_by_sequence(routing, grid), grid), logits)
    assert (gradient[:, 0] > 0).all()
    assert (gradient[:, 1:] < 0).all()


def test_z_loss_is_the_squared_log_partition() -> None:
    logits = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    expected = math.log(2) ** 2 + (1 + math.log(2)) ** 2
    assert math.isclose(z_loss_sum(route(logits, 1), TokenGrid(1)).item(), expected, rel_tol=1e-6)
