"""The DeepSpeed engine behind five calls: reduce, squared norms, scale, step, state. Nobody else touches its insides.

One setting: ZeRO 1 (0 in fp32 parity tests), DeepSpeed's own clipping, norm and overflow check off, since norms and
clipping are ours: DeepSpeed's count replicated experts twice or average norms over groups, depending on the layout.
tests/compat/test_contracts.py fails when an attribute that this file relies on changes.

Scaling. Megatron's schedule divides losses by the number of micro-batches M; DeepSpeed sums gradients over a
parameter's replicas and divides by the full data-parallel size, for experts too (their tokens come from all ranks).
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor, nn

from .groups import Groups, MegatronUnits
from .roles import Role

LARGEST_BUCKET = 100_000_000  # elements reduced in one message
OptimizerFactory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Slice:
    """A contiguous range of a parameter's elements that this rank updates.

    Attributes:
        parameter: the local parameter.
        start: first element of the range in the flattened parameter.
        master: the fp32 values, a view that may be written.
        moments: optimizer state by name (``exp_avg`` ...), views; empty before the first step.
    """

    parameter: nn.Parameter
    start: int
    master: Tensor
    moments: dict[str, Tensor]


@dataclass(frozen=True)
class Squares:
    """Squared gradient norms over all distinct parameters of the model."""

    dense: float
    expert: float

    @property
    def total(self) -> float:
        return self.dense + self.expert


class Engine:
    """A model's parameters under DeepSpeed.

    Args:
        module: the raw model; the Megatron schedule runs it, never the DeepSpeed engine.
        roles: role of every parameter.
        optimizer: makes the optimizer from parameter groups.
        zero: ZeRO stage.
    """

    def __init__(
        self,
        module: nn.Module,
        roles: Mapping[nn.Parameter, Role],
        groups: Groups,
        optimizer: OptimizerFactory,
        zero: int,
    ):
        self.groups = groups
        self.roles = roles
        self.zero = zero
        self.parameters = list(roles)
        dtype = self.parameters[0].dtype
        if dtype == torch.bfloat16:
            for parameter in self.parameters:
                parameter.grad_dtype = torch.float32
        deepspeed_logger.setLevel(logging.ERROR)
        self._engine, *_ = deepspeed.initialize(
            model=module,
            config=_settings(zero, dtype, bucket=min(sum(p.numel() for p in self.parameters), LARGEST_BUCKET)),
            optimizer=optimizer(_parameter_groups(roles)),
            mpu=MegatronUnits,
        )
        if zero:
            self._engine.optimizer.check_grad_overflow = False  # non-finite losses are the loop's business
        experts = any(role.expert for role in roles.values())
        self._is_only_replica = groups.topology.data == 1 and (not experts or groups.topology.expert_data == 1)
        self._sum_over_tensor = [p for p, role in roles.items() if role.tensor_summed]
        self._tied = [p for p, role in roles.items() if role.tied_copy]

    # ------------------------------------------------------------------ gradients
    def reduce(self) -> None:
        """Turn the gradients of this rank's micro-batches into those of the global batch, for what it updates."""
        gradients = {p: p.grad for p in self.parameters if p.grad is not None}
        self.sum_inside_replica(gradients)
        self._engine.set_gradient_accumulation_boundary(True)
        if self.zero and self._is_only_replica:
            self._hand_over()
        else:
            self._engine.allreduce_gradients()

    def _hand_over(self) -> None:
        """What the reduction comes to where every parameter has one replica: gradients stay as they are.

        DeepSpeed would flatten, divide by one, reduce over one rank and copy back: a tenth of a small model's step.
        """
        optimizer = self._engine.optimizer
        for index, members in enumerate(optimizer.params_in_partition):
            gradients = [torch.zeros_like(p, dtype=torch.float32) if p.grad is None else p.grad for p in members]
            padding = optimizer.partition_size[index] - sum(p.numel() for p in members)
            if padding:
                filler: Any = torch.zeros(padding, dtype=gradients[0].dtype, device=gradients[0].device)
                filler._zero_padding = True  # DeepSpeed's own marker
                gradients.append(filler)
            optimizer.averaged_gradients[index] = gradients
        for parameter in self.parameters:
            parameter.grad = None

    def sum_inside_replica(self, gradients: Mapping[nn.Parameter, Tensor]) -> None:
        """Sums that make one data-parallel replica whole: over tensor ranks, and over a tied embedding's copies."""
        topology = self.groups.topology
        if topology.tensor > 1:
            all_reduce_together([gradients[p] for p in self._sum_over_tensor], self.groups.tensor)
        if topology.pipeline > 1 and self.groups.embedding is not None:
            for parameter in self.tied_parameters():
                dist.all_reduce(gradients[parameter], group=self.groups.embedding)

    def tied_parameters(self) -> list[nn.Parameter]:
        """This rank's copy of a tied embedding that another stage holds too."""
        shared = [p for p in self.parameters if getattr(p, "shared_embedding", False)]
        return shared or self._tied

    def squares(self) -> Squares:
        """Squared norms of the reduced gradients, the same on every rank."""
        return self.total_squares(
            (parameter, gradient, role.norm_weight(self.groups.topology, self.zero))
            for parameter, role, gradient in self._reduced()
        )

    def total_squares(self, weighted: Iterator[tuple[nn.Parameter, Tensor, float]]) -> Squares:
        """Sum over all ranks of weight x |gradient|^2, dense and expert parameters apart."""
        by_kind: dict[tuple[bool, float], list[Tensor]] = {}
        for parameter, gradient, weight in weighted:
            if weight:
                by_kind.setdefault((self.roles[parameter].expert, weight), []).append(gradient)
        sums = torch.zeros(2, dtype=torch.float64)
        for (expert, weight), gradients in by_kind.items():
            norms = torch.stack(torch._foreach_norm([g.float() for g in gradients]))
            sums[int(expert)] += weight * norms.double().square().sum().cpu()
        if self.groups.topology.world > 1:
            sums = sums.to(self.parameters[0].device)
            dist.all_reduce(sums)
        dense, expert_sum = sums.tolist()
        return Squares(dense, expert_sum)

    def scale(self, factor: float) -> None:
        """Multiply the reduced gradients (clipping)."""
        torch._foreach_mul_([gradient for _, _, gradient in self._reduced()], factor)

    def _reduced(self) -> Iterator[tuple[nn.Parameter, Role, Tensor]]:
        """Reduced gradients on this rank: whole ones under ZeRO 0, this rank's slices under ZeRO 1."""
        if self.zero == 0:
            for parameter, role in self.roles.items():
                if parameter.grad is not None:
                    yield parameter, role, parameter.grad
            return
        optimizer = self._engine.optimizer
        for index, members in enumerate(optimizer.params_in_partition):
            # averaged_gradients has one entry a member, and possibly padding behind them.
            gradients = [g for g in optimizer.averaged_gradients[index] if not getattr(g, "_zero_padding", False)]
            for parameter, gradient in zip(members, gradients, strict=False):
                yield parameter, self.roles[parameter], gradient

    def reduced_gradients(self) -> Iterator[tuple[nn.Parameter, int, Tensor]]:
        """(parameter, first element, flat reduced gradient) of everything this rank updates."""
        starts = {id(p): start for p, start, _ in self._ranges()} if self.zero else {}
        for parameter, _, gradient in self._reduced():
            yield parameter, starts.get(id(parameter), 0), gradient.reshape(-1)

    # ------------------------------------------------------------------ update
    def step(self, lr: float) -> None:
        """One optimizer step with the reduced gradients at learning rate ``lr``; forgets the gradients."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        self._engine.set_gradient_accumulation_boundary(False)

    # ------------------------------------------------------------------ state
    def slices(self) -> Iterator[Slice]:
        """What this rank updates, with master weights and moments as writable views."""
        optimizer = self._engine.optimizer
        if self.zero == 0:
            for parameter in self.parameters:
                state = {k: v.view(-1) for k, v in optimizer.state[parameter].items() if v.shape == parameter.shape}
                yield Slice(parameter, 0, parameter.data.view(-1), state)
            return
        offsets = [0] * len(optimizer.bit16_groups)
        for parameter, start, (group, length) in self._ranges():
            flat = optimizer.single_partition_of_fp32_groups[group]
            begin = offsets[group]
            offsets[group] += length
            state = {
                key: value.narrow(0, begin, length)
                for key, value in optimizer.optimizer.state.get(flat, {}).items()
                if value.shape == flat.shape
            }
            yield Slice(parameter, start, flat.data.narrow(0, begin, length), state)

    def _ranges(self) -> Iterator[tuple[nn.Parameter, int, tuple[int, int]]]:
        """(parameter, first element, (group, length)) of this rank's partitions, in flat order."""
        optimizer = self._engine.optimizer
        for group, members in enumerate(optimizer.params_in_partition):
            left = optimizer.partition_size[group]
            start = optimizer.first_offset[group]
            for parameter in members:
                length = min(parameter.numel() - start, left)
                yield parameter, start, (group, length)
                left -= length
                start = 0

    def prepare_moments(self) -> None:
        """Create the optimizer's state, zero, as its first step would; for loading a checkpoint into it."""
        optimizer = self._base_optimizer()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if not optimizer.state[parameter]:
                    optimizer.state[parameter] = {
                        "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                        "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
                    }
                    if not _counts_in_groups(optimizer):  # on the device, where fused AdamW looks for it
                        count = torch.zeros((), dtype=torch.float32, device=parameter.device)
                        optimizer.state[parameter]["step"] = count

    @property
    def steps_taken(self) -> int:
        """The optimizer's own step count, which its bias correction uses."""
        optimizer = self._base_optimizer()
        counted = optimizer.param_groups if _counts_in_groups(optimizer) else optimizer.state.values()
        counts = {int(one["step"]) for one in counted if "step" in one}
        return counts.pop() if counts else 0

    @steps_taken.setter
    def steps_taken(self, steps: int) -> None:
        optimizer = self._base_optimizer()
        if _counts_in_groups(optimizer):
            for group in optimizer.param_groups:
                group["step"] = steps
            return
        for state in optimizer.state.values():
            if "step" in state:  # plain gradient descent counts nothing
                state["step"].fill_(steps)

    def publish_masters(self) -> None:
        """Bring changed master weights into the model's parameters on every rank."""
        if self.zero:
            self._engine.optimizer.update_lp_params()

    def close(self) -> None:
        """Take DeepSpeed's hooks off the parameters: as long as they hang there, nothing of the engine is freed."""
        self._engine.destroy()

    def _base_optimizer(self) -> torch.optim.Optimizer:
        return self._engine.optimizer.optimizer if self.zero else self._engine.optimizer


def _counts_in_groups(optimizer: torch.optim.Optimizer) -> bool:
    """Whether steps are counted once for each group, as by apex's FusedAdam, and not in each parameter's state."""
    return "bias_correction" in optimizer.defaults


def _settings(zero: int, dtype: torch.dtype, bucket: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,  # batch sizes are the loop's business; DeepSpeed wants some number
        "gradient_accumulation_steps": 1,
        "steps_per_print": 10**9,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": {
            "stage": zero,
            "overlap_comm": False,
            # Without it DeepSpeed reduces experts over the whole data group: silently wrong for EP > 1.
            "contiguous_gradients": True,
            "reduce_bucket_size": bucket,
            "compute_grad_norm": zero == 0,  # DeepSpeed refuses to leave it out there, and does not compute it
        },
    }


def _parameter_groups(roles: Mapping[nn.Parameter, Role]) -> list[dict[str, Any]]:
    """Groups by weight decay, split again by DeepSpeed into dense and expert ones."""
    found = []
    for decay in (True, False):
        members = [p for p, role in roles.items() if role.decay == decay]
        if members:
            found.append({"params": members, "name": "decay" if decay else "plain", "decay": decay})
    split: list[dict[str, Any]] = split_params_into_different_moe_groups_for_optimizer(found)
    return [group for group in split if group["params"]]


def all_reduce_together(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Sum many small tensors in one message."""
    if not tensors:
        return
    flat = torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(flat, group=group)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
