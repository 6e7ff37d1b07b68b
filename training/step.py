"""One optimizer step: passes, reduction, norms, clipping, noise scale, update."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..models.counts import mixture_layers
from ..moe.statistics import EXTRA, mean_losses, summarise
from ..parallel.engine import Squares
from ..parallel.noise import SmallBatchGradients
from ..scaling.noise import estimate
from .batches import StepBatch, small_batches
from .setup import Setup


@dataclass(frozen=True)
class StepResult:
    """What the record wants to know of a step. ``stop`` is whether any rank was asked to stop."""

    loss: float
    squares: Squares
    noise: dict[str, Any] | None
    router: list[dict[str, Any]]
    aux_loss: float | None
    z_loss: float | None
    stop: bool

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.squares.total)


def take_step(setup: Setup, step: int, lr: float, *, measure_noise: bool, stop_asked: bool) -> StepResult:
    """Optimizer step ``step`` (from 0). A step with a non-finite loss or gradient changes no parameter."""
    batch = setup.batches.step(step, setup.config.micro_batch(setup.groups.topology, for_noise=measure_noise))
    engine = setup.engine
    if measure_noise:
        parts = setup.config.training.batch // setup.config.small_batch
        small = SmallBatchGradients(engine, parts)
        loss_sum = torch.zeros(())
        for micro_batches in small_batches(batch, parts):
            loss_sum = loss_sum + setup.passes.train(micro_batches, batch.denominator)
            small.take()
        small_squares = small.give_back()
    else:
        loss_sum = setup.passes.train(batch.micro_batches, batch.denominator)
    engine.reduce()
    squares = engine.squares()
    noise = _noise(setup, small_squares, squares) if measure_noise else None
    loss, vectors, bias_ranges, stop = _gather(setup, loss_sum, batch, stop_asked)
    aux_loss, z_loss = mean_losses(vectors) if len(vectors) else (None, None)
    layers = mixture_layers(setup.config.model, setup.config.moe)
    router = [summarise(layer, vector) for layer, vector in zip(layers, vectors, strict=True)]
    if setup.config.moe is not None and setup.config.moe.bias_rate:
        router = [{**load, "bias_range": found} for load, found in zip(router, bias_ranges, strict=True)]
    result = StepResult(loss, squares, noise, router, aux_loss, z_loss, stop)
    if result.finite:
        clip = setup.config.optimizer.clip
        norm = math.sqrt(squares.total)
        if clip and norm > clip:
            engine.scale(clip / norm)
        engine.step(lr)
        for layer, mixture in setup.stage.mixtures():
            mixture.balance.observe(vectors[layers.index(layer), :-EXTRA])
    return result


def _gather(
    setup: Setup, loss_sum: Tensor, batch: StepBatch, stop_asked: bool
) -> tuple[float, Tensor, list[float], bool]:
    """Mean loss, statistics vector and range of biases of each mixture layer, whether to stop: all in one message."""
    groups = setup.groups
    topology, rank = groups.topology, groups.rank
    counts_loss = groups.is_last_stage and topology.tensor_rank(rank) == 0
    vectors, bias_ranges_L = _statistics(setup), _bias_ranges(setup)
    head = torch.tensor([0.0, float(stop_asked)], dtype=torch.float64, device=loss_sum.device)
    if counts_loss:
        head[0] = loss_sum
    message = torch.cat([head, bias_ranges_L, vectors.flatten().double()])
    if topology.world > 1:
        dist.all_reduce(message)
    first = 2 + len(bias_ranges_L)
    loss, stops, *bias_ranges = message[:first].tolist()
    return loss / batch.real_tokens, message[first:].view(vectors.shape), bias_ranges, stops > 0


def _statistics(setup: Setup) -> Tensor:
    """``[mixture layers of the model, E + extra]``: this rank's sums, zeros for other stages' layers."""
    moe = setup.config.moe
    layers = mixture_layers(setup.config.model, moe)
    width = moe.experts + EXTRA if moe is not None else 0
    table = torch.zeros(len(layers), width, device=setup.batches.device)
    topology, rank = setup.groups.topology, setup.groups.rank
    for layer, mixture in setup.stage.mixtures():
        vector = mixture.take_statistics()
        if topology.sequence or topology.tensor_rank(rank) == 0:  # otherwise tensor ranks count the same tokens
            table[layers.index(layer)] = vector
    return table


def _bias_ranges(setup: Setup) -> Tensor:
    """``[mixture layers of the model]`` float64: largest minus smallest selection bias, on one rank of each stage."""
    layers = mixture_layers(setup.config.model, setup.config.moe)
    ranges_L = torch.zeros(len(layers), dtype=torch.float64, device=setup.batches.device)
    topology, rank = setup.groups.topology, setup.groups.rank
    if topology.data_rank(rank) == 0 and topology.tensor_rank(rank) == 0:
        for layer, mixture in setup.stage.mixtures():
            if mixture.balance.bias_E is not None:
                low, high = mixture.balance.bias_E.aminmax()
                ranges_L[layers.index(layer)] = high - low
    return ranges_L


def _noise(setup: Setup, small: Squares, big: Squares) -> dict[str, Any]:
    """The record's noise entry; batch sizes in tokens."""
    training = setup.config.training
    b_small, b_big = setup.config.small_batch * training.seq, training.batch * training.seq

    def entry(small_square: float, big_square: float) -> dict[str, Any]:
        found = estimate(small_square, big_square, b_small, b_big)
        return {"g2": found.g2, "trace": found.trace, "b_simple": found.b_simple}

    return {
        "all": entry(small.total, big.total),
        "dense": entry(small.dense, big.dense),
        "expert": entry(small.expert, big.expert) if setup.config.moe is not None else None,
        "b_small": b_small,
        "b_big": b_big,
    }
