"""From a budget in tokens, FLOPs or steps to a number of steps."""

from dataclasses import replace

from ..base.errors import UserError
from ..models.cost.memory import Workload
from ..models.cost.rates import Cost, estimate
from ..models.counts import flops_per_token
from ..parallel.topology import Topology
from .config import RunConfig


def tokens_per_step(config: RunConfig) -> int:
    """Tokens of a global batch."""
    return config.training.batch * config.training.seq


def flops_per_step(config: RunConfig, vocab: int) -> int:
    """Training FLOPs of a global batch by the exact count."""
    return flops_per_token(config.model, config.moe, vocab, config.training.seq).total * tokens_per_step(config)


def steps_of(config: RunConfig, vocab: int) -> int:
    """Optimizer steps that the budget buys, rounded to the nearest.

    Raises:
        UserError: the budget is below one batch, or needs more samples than the fixed order holds.
    """
    training = config.training
    if training.steps is not None:
        steps = training.steps
    elif training.tokens is not None:
        steps = round(training.tokens / tokens_per_step(config))
    else:
        assert training.flops is not None
        steps = round(training.flops / flops_per_step(config, vocab))
    if steps < 1:
        budget, value, one = (
            ("tokens", training.tokens, tokens_per_step(config))
            if training.tokens is not None
            else ("flops", training.flops, flops_per_step(config, vocab))
        )
        raise UserError(
            f"training.{budget} ({value:g}) is below one batch ({one:g}); raise it or lower training.batch "
            f"({training.batch})"
        )
    if steps * training.batch > config.data.samples:
        raise UserError(
            f"data.samples ({config.data.samples}) is less than the {steps} steps x {training.batch} sequences of this "
            f"budget; raise it to at least {steps * training.batch}"
        )
    return steps


def workload(config: RunConfig, vocab: int, topology: Topology) -> Workload:
    """What each rank of the run works on."""
    return replace(workload_of_step(config, topology), steps=steps_of(config, vocab))


def workload_of_step(config: RunConfig, topology: Topology) -> Workload:
    """What each rank works on in one step."""
    return Workload(
        micro_batch=config.micro_batch(topology),
        seq=config.training.seq,
        steps=1,
        batch_tokens=tokens_per_step(config),
        dtype=config.training.dtype,
        zero=config.parallel.zero,
        moments=0 if config.optimizer.impl == "sgd" else 2,
        recompute=config.training.recompute == "full",
    )


def cost_of(config: RunConfig, vocab: int, topology: Topology) -> Cost:
    """Estimated memory and time of the run."""
    return estimate(config.model, config.moe, vocab, workload(config, vocab, topology), topology)
