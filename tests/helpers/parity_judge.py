"""Judges what ranks computed by the model written out in plain torch in float64, with torch's own AdamW."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from parity_cases import Case
from torch import Tensor

from moescale.data import prepare
from moescale.data.loader import TrainStream
from moescale.models.initialise import _std, draw_box
from moescale.models.names import Piece
from moescale.training.config import RunConfig

STEPS = 2


class Masked:
    """A stream that counts another number of labels in every sample: from one to all of them."""

    def __init__(self, stream: TrainStream):
        self.stream = stream

    def samples(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        tokens, labels, mask = self.stream.samples(indices)
        for row, index in zip(mask, indices, strict=True):
            row[1 + index * 11 % len(row) :] = 0
        return tokens, labels, mask


class Errors:
    """Largest error of each kind, and the assertion that it is within its bound."""

    def __init__(self) -> None:
        self.largest: dict[str, float] = {}

    def number(self, kind: str, found: float, wanted: float, bound: float, scale: float | None = None) -> None:
        """``|found - wanted|`` over ``scale``, by default over ``wanted``."""
        error = abs(found - wanted) / max(abs(wanted) if scale is None else scale, 1e-300)
        self._note(kind, error, bound, kind)

    def tensors(self, kind: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], bound: float) -> None:
        """Each tensor against the largest entry of the wanted one."""
        assert found.keys() == wanted.keys(), f"{kind}: {sorted(found.keys() ^ wanted.keys())} on one side only"
        for name, tensor in wanted.items():
            error = (found[name].double() - tensor).abs().max().item()
            self._note(kind, error / max(tensor.abs().max().item(), 1e-12), bound, f"{kind} of {name}")

    def weights(self, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], lr: float, bound: float) -> None:
        """Against the learning rate."""
        for name, tensor in wanted.items():
            error = (found[name].double() - tensor).abs().max().item() / lr
            self._note("weights / lr", error, bound, f"weights of {name}")

    def _note(self, kind: str, error: float, bound: float, what: str) -> None:
        self.largest[kind] = max(self.largest.get(kind, 0.0), error)
        assert error <= bound, f"{what}: off by {error:.2e}, allowed are {bound:.0e}"


class Reference:
    """The same run in plain torch, float64, one process."""

    def __init__(self, config: RunConfig, shapes: dict[str, tuple[int, ...]], gpt: Any, masked: bool):
        self.config, self.gpt = config, gpt
        data = prepare(config.data)
        self.vocab = data.vocab_size
        stream = TrainStream(data, config.data, config.training.seq, config.training.seed)
        self.stream = Masked(stream) if masked else stream
        self.tensors = {name: self._initial(name, shape) for name, shape in shapes.items()}
        self.carried = self._carried()
        decay = [t for name, t in self.tensors.items() if not name.endswith(("norm", "_bias"))]
        plain = [t for name, t in self.tensors.items() if name.endswith(("norm", "_bias"))]
        settings = config.optimizer
        self.optimizer = torch.optim.AdamW(
            [{"params": decay, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
        )

    def _carried(self) -> dict[str, Tensor]:
        moe = self.config.moe
        if moe is None:
            return {}
        kinds = [kind for kind, used in (("bias", moe.bias_rate), ("load", moe.balance == "global")) if used]
        layers = [layer for layer in range(self.config.model.layers) if moe.is_mixture(layer)]
        return {
            f"layers.{layer}.moe.{kind}": torch.zeros(moe.experts, dtype=torch.float64)
            for layer in layers
            for kind in kinds
        }

    def _initial(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith(("norm", "_bias")):
            value = 0.0 if name.endswith("_bias") else 1.0
            return torch.full(shape, value, dtype=torch.float64, requires_grad=True)
        piece = Piece(name, shape, (0,) * len(shape), shape, lambda t: t)
        return draw_box(self.config.training.seed, piece, _std(piece, self.config.model)).double().requires_grad_()

    def gradients(
        self, samples: range, counted: float | None = None
    ) -> tuple[float, float, float, dict[str, Tensor], dict[int, Any]]:
        """(mean loss, mean load-balance loss, mean z-loss, gradients, what each mixture saw) of a batch.

        Args:
            counted: labels that the loss is a mean over; default: all that count in the batch.
        """
        tokens, labels, mask = self.stream.samples(samples)
        moe = self.config.moe
        seen: dict[int, Any] = {}
        tensors = {**self.tensors, **self.carried}
        at = (self.config.training.seed, samples.start // self.config.training.batch, samples.start)
        losses, aux, z_sum = self.gpt.reference_losses(
            tensors, self.config.model, moe, self.vocab, tokens, labels, at, seen
        )
        loss = (losses * mask).sum() / (mask.sum() if counted is None else counted)
        aux_sum, z_mean = sum(aux), sum(z_sum) / losses.numel()
        total = loss
        if moe is not None:
            total = loss + (moe.balance != "none") * moe.aux_loss * aux_sum + moe.z_loss * z_mean
        names = list(self.tensors)
        # An expert without a token has no gradient: zero.
        found = torch.autograd.grad(total, [self.tensors[n] for n in names], allow_unused=True, materialize_grads=True)
        layers = max(len(aux), 1)
        return (
            float(loss.detach()),
            float(aux_sum.detach()) / layers if moe else 0.0,
            float(z_mean.detach()) / layers if moe else 0.0,
            dict(zip(names, found, strict=True)),
            seen,
        )

    def counted(self, samples: range) -> float:
        """Labels that count."""
        return float(self.stream.samples(samples)[2].sum())

    def step(self, gradients: dict[str, Tensor], seen: dict[int, Any]) -> None:
        scale = clip_factor(self.config, gradients)
        for name, tensor in self.tensors.items():
            tensor.grad = gradients[name] * scale
        self.optimizer.step()
        for layer, visits in seen.items():
            load_E = visits.load_E.double()
            if (name := f"layers.{layer}.moe.bias") in self.carried:
                self.carried[name] += self.config.moe.bias_rate * torch.sign(load_E.mean() - load_E)  # type: ignore[union-attr]
            if (name := f"layers.{layer}.moe.load") in self.carried:
                self.carried[name] = load_E


def clip_factor(config: RunConfig, gradients: dict[str, Tensor]) -> float:
    clip, norm = config.optimizer.clip, math.sqrt(square(gradients))
    return clip / norm if clip and norm > clip else 1.0


def square(gradients: Mapping[str, Tensor], wanted: Callable[[str], bool] = lambda name: True) -> float:
    return float(sum(g.square().sum() for name, g in gradients.items() if wanted(name)))


def is_expert(name: str) -> bool:
    return ".experts." in name


def assembled(ranks: list[Any], part: str) -> dict[str, Tensor]:
    """Whole logical tensors from the boxes of all ranks; every element must be stored exactly once."""
    whole: dict[str, Tensor] = {}
    times: dict[str, Tensor] = {}
    for stored in ranks:
        for found, name, shape, start, values in stored:
            if found != part:
                continue
            whole.setdefault(name, torch.zeros(shape))
            times.setdefault(name, torch.zeros(shape))
            where = tuple(slice(s, s + n) for s, n in zip(start, values.shape, strict=True))
            whole[name][where] = values
            times[name][where] += 1
    for name, count in times.items():
        assert (count == 1).all(), f"{part} of {name}: elements stored {count.min():g} to {count.max():g} times"
    return whole


def judge(ranks: list[dict[str, Any]], config: RunConfig, case: Case, gpt: Any) -> Errors:
    """Everything that ``ranks`` computed under a layout, against the reference.

    Args:
        gpt: the module tests/reference_gpt.py.

    Raises:
        AssertionError: something is further off than promised.
    """
    assert config.moe is None or config.moe.layout_exact, f"{config.moe.inexact} depend on the layout: no case for this"
    shapes = {n: tuple(t.shape) for n, t in assembled([r["state"] for r in ranks], "master").items()}
    reference, errors = Reference(config, shapes, gpt, case.masked), Errors()
    batch = config.training.batch
    for step in range(STEPS):
        samples = range(step * batch, (step + 1) * batch)
        loss, aux, z, gradients, seen = reference.gradients(samples)
        found = assembled([r["gradients"][step] for r in ranks], "gradient")
        scale = clip_factor(config, gradients)
        # With eps 1e-8 Adam turns rounding into weight differences, which the next gradients show.
        bound = 1e-5 if step == 0 or config.optimizer.eps > 1e-8 else 3e-3
        kind = "" if bound == 1e-5 else " after Adam's eps"
        errors.tensors("gradient" + kind, found, {n: g * scale for n, g in gradients.items()}, bound)
        for rank in ranks:
            result = rank["results"][step]
            errors.number("loss" + kind, result.loss, loss, bound / 10)
            errors.number("squared norm" + kind, result.squares.total, square(gradients), bound)
            if config.moe is not None:
                errors.number("squared norm" + kind, result.squares.expert, square(gradients, is_expert), bound)
                errors.number("router losses" + kind, result.aux_loss, aux, bound)
                errors.number("router losses" + kind, result.z_loss, z, bound)
                check_loads(result.router, seen, config)
            if config.noise.every:
                check_noise(result.noise, reference, samples, gradients, errors)
        reference.step(gradients, seen)
    check_state(ranks, reference, errors)
    check_score(ranks, reference, errors)
    return errors


def check_loads(found: list[dict[str, Any]], seen: dict[int, Any], config: RunConfig) -> None:
    """Counts are counts: equal, not close."""
    assert config.moe is not None
    assert [load["layer"] for load in found] == list(seen)
    for load, visits in zip(found, seen.values(), strict=True):
        relative_E = visits.load_E.double() / visits.load_E.double().mean()
        assert abs(load["max_violation"] - (relative_E.max().item() - 1)) < 1e-12, "load of the busiest expert"
        assert abs(load["dropped"] - visits.dropped / visits.load_E.sum().item()) < 1e-12, "share of dropped visits"
        assert (visits.dropped > 0) == (config.moe.capacity is not None)


def check_noise(found: Any, reference: Reference, samples: range, gradients: Any, errors: Errors) -> None:
    """B_simple's parts from small-batch gradients of the plain model (McCandlish et al. 2018, A.1)."""
    config = reference.config
    small, seq = config.small_batch, config.training.seq
    count = config.training.batch // small
    # A small batch's share of the batch's mean, times their number: a mean over as many labels as an average one has.
    counted = reference.counted(samples) / count
    firsts = range(0, config.training.batch, small)
    parts = [reference.gradients(samples[first : first + small], counted)[3] for first in firsts]
    b_small, b_big = small * seq, config.training.batch * seq
    for kind, wanted in (("all", lambda n: True), ("dense", lambda n: not is_expert(n)), ("expert", is_expert)):
        if found[kind] is None:
            assert config.moe is None
            continue
        small_sq = sum(square(g, wanted) for g in parts) / len(parts)
        big_sq = square(gradients, wanted)
        scale = small_sq + big_sq
        g2 = (b_big * big_sq - b_small * small_sq) / (b_big - b_small)
        trace = (small_sq - big_sq) / (1 / b_small - 1 / b_big)
        errors.number("noise scale", found[kind]["g2"], g2, 2e-5, scale)
        errors.number("noise scale", found[kind]["trace"], trace, 2e-5, scale * b_big)
    assert (found["b_small"], found["b_big"]) == (b_small, b_big)


def check_score(ranks: list[Any], reference: Reference, errors: Errors) -> None:
    """Loss on held-out text with the weights after the last step; neither jitter nor balanced assignment in it."""
    config, held_out = reference.config, ranks[0]["held_out"]
    moe = config.moe
    assert len({rank["score"] for rank in ranks}) == 1
    assert len({rank["answers"].loss_N.tobytes() for rank in ranks}) == 1
    if moe is not None and (moe.router == "expert_choice" or (moe.capacity and moe.drop == "probability")):
        return  # a sequence that begins with a token twice makes these draw between equals
    if moe is not None:
        moe = moe.model_copy(update={"jitter": 0.0, "router": "topk" if moe.router == "sinkhorn" else moe.router})

    def losses_of(windows: Any) -> Any:
        with torch.no_grad():
            losses_NS, *_ = reference.gpt.reference_losses(
                {**reference.tensors, **reference.carried},
                config.model,
                moe,
                reference.vocab,
                windows.tokens_NS,
                windows.labels_NS,
                (config.training.seed, 0, 0),
            )
        return losses_NS * windows.mask_NS

    bound = 1e-6 if config.optimizer.eps > 1e-8 else 1e-3
    for rank in ranks:
        errors.number("held-out loss", rank["score"].loss_sum, float(losses_of(held_out).sum()), bound)
        answers = rank["answers"]
        wanted_N = losses_of(answers.choices).sum(dim=1).tolist()
        for found, wanted in zip(answers.loss_N.tolist(), wanted_N, strict=True):
            errors.number("loss of a choice", found, wanted, bound)


def check_state(ranks: list[Any], reference: Reference, errors: Errors) -> None:
    """Moments, weights, what balancing carries, and that every replica holds the same."""
    config, states = reference.config, [r["state"] for r in ranks]
    exact = config.optimizer.eps > 1e-8
    moments = {n: reference.optimizer.state[t] for n, t in reference.tensors.items()}
    for part in ("exp_avg", "exp_avg_sq"):
        wanted = {n: s[part] for n, s in moments.items()}
        # With a small eps Adam's first step is all but a sign: where that flips, the second step's gradients differ.
        errors.tensors("moments", assembled(states, part), wanted, 2e-5 if exact else 5e-3)
    errors.tensors("balance", assembled(states, "buffer"), reference.carried, 1e-6)
    masters = assembled(states, "master")
    tensors = {name: tensor.detach() for name, tensor in reference.tensors.items()}
    if exact:
        errors.tensors("weights", masters, tensors, 1e-5)
    else:
        errors.weights(masters, tensors, config.optimizer.lr, 2e-1)
    for rank in ranks:  # what every rank computes with next is what was stored
        for name, tensor in rank["replicated"].items():
            torch.testing.assert_close(tensor, masters[name], rtol=0, atol=0)


def judge_bf16(alone: list[Any], spread: list[Any]) -> Errors:
    """The stated bound in bf16, against one rank in bf16: loss 1e-3, norms 2.5 %, the whole gradient 5 % in L2.

    Weights and activations are rounded to 8 bits everywhere; gradients are summed in fp32 over micro-batches, and
    rounded to bf16 only where ranks exchange them. A token near the top-k border may visit another expert when sums
    are taken in another order, which single entries of small tensors show: they are bounded by 25 %.
    """
    errors = Errors()
    wanted = assembled([r["gradients"][0] for r in alone], "gradient")
    found = assembled([r["gradients"][0] for r in spread], "gradient")
    errors.tensors("gradient", found, {n: g.double() for n, g in wanted.items()}, 0.25)
    difference = math.sqrt(square({n: found[n] - g for n, g in wanted.items()}) / square(wanted))
    errors.number("gradient, L2", difference, 0.0, 0.05, scale=1.0)
    for one, two in zip(alone[0]["results"], spread[0]["results"], strict=True):
        errors.number("loss", two.loss, one.loss, 1e-3)
        errors.number("squared norm", two.squares.total, one.squares.total, 5e-2)
        errors.number("squared norm", two.squares.expert, one.squares.expert, 5e-2)
        errors.number("noise scale", two.noise["all"]["g2"], one.noise["all"]["g2"], 5e-2, one.squares.total)
    return errors
