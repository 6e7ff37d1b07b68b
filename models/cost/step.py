"""Time of a training step on hardware that is known by its figures alone, and what the time goes into."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...moe.config import MoEConfig
from ...parallel.topology import Topology
from ..config import ModelConfig
from ..counts import HeldParameters, count_held, flops_per_token, kinds_of_stage
from .hardware import Hardware
from .layer import Part, Pass, Place, head_pass, layer_pass, ring_seconds, total
from .memory import Workload, activation_bytes, state_bytes
from .products import BYTES

# Bytes moved for a parameter that a rank updates: gradient, master and two moments read, the latter three written (28),
# and the gradient read once more for its norm (4). For each that it holds: gradient cleared, copied for the reduction
# (fp32 read, model's dtype written) and the new weight written.
_UPDATED_BYTES, _HELD_FP32_BYTES = 32, 8


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step by what they go into; all of them add up."""

    parts: Mapping[Part, float]

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def bound(self) -> Part:
        """What takes most of the step."""
        return max(self.parts, key=lambda part: self.parts[part])

    @property
    def shares(self) -> dict[str, float]:
        """Each part over the whole; the largest first."""
        return {part: self.parts[part] / self.seconds for part in sorted(self.parts, key=lambda p: -self.parts[p])}


@dataclass
class StepModel:
    """Times steps of one model in many layouts; what layouts have in common is computed once.

    Not foreseen: unequal loads of experts, stragglers, overlap of communication with computation (what is exchanged and
    reduced here waits), a host too slow to keep its device busy.
    """

    model: ModelConfig
    moe: MoEConfig | None
    vocab: int
    hardware: Hardware
    _layers: dict[object, tuple[Pass, Pass, Pass]] = field(default_factory=dict, init=False)
    _layers_of: dict[tuple[int, int], list[tuple[int, int, bool]]] = field(default_factory=dict, init=False)
    _held: dict[object, list[HeldParameters]] = field(default_factory=dict, init=False)

    def time(self, work: Workload, topology: Topology) -> StepTime:
        """Time of a step of ``work`` in this layout.

        A pipeline of p stages with v chunks each takes m micro-batches in m + (p - 1) / v times a stage's own
        (2104.04473, section 2.2). The slowest stage sets the pace; filling and draining take the mean.
        """
        place = Place(topology, self.hardware, work.dtype, work.micro_batch * work.seq, work.seq)
        kinds = self._kinds(topology)
        known = {kind: self._stage(place, work, *kind) for kind in dict.fromkeys(kinds)}
        slowest = max(known.values(), key=lambda parts: sum(parts.values()))
        count = work.batch_tokens // (place.tokens * topology.data)
        parts = {part: count * seconds for part, seconds in slowest.items()}
        mean = sum(sum(known[kind].values()) for kind in kinds) / len(kinds)
        parts["pipeline bubble"] = (topology.pipeline - 1) / topology.virtual_stages * mean
        parts["pipeline messages"] = count * self._messages(place)
        parts["gradient reduction"] = self._reduction(place, work)
        parts["optimizer"] = max(self._optimizer(held, work, topology) for held in set(self._holdings(topology)))
        return StepTime({part: seconds for part, seconds in parts.items() if seconds > 0})

    def flops_share(self, work: Workload, topology: Topology, seconds: float) -> float:
        """Model FLOPs of a step over what the devices' peak would compute in ``seconds`` (MFU), by the plan's count."""
        flops = flops_per_token(self.model, self.moe, self.vocab, work.seq).total * work.batch_tokens
        return flops / (seconds * topology.world * self.hardware.flops(work.dtype))

    def memory(self, work: Workload, topology: Topology) -> int:
        """Memory of the fullest rank, bytes, as `memory.fullest_bytes`."""
        return max(
            state_bytes(held, work, topology)
            + activation_bytes(self.model, self.moe, self.vocab, work, topology, stage)
            for stage, held in enumerate(self._holdings(topology))
        )

    def _kinds(self, topology: Topology) -> list[tuple[int, int, bool]]:
        """Of each stage: its dense layers, its mixtures, whether it is the last."""
        key = (topology.pipeline, topology.virtual_stages)
        if key not in self._layers_of:
            last = topology.pipeline - 1
            self._layers_of[key] = [
                (*kinds_of_stage(self.model, self.moe, topology, stage), stage == last) for stage in range(last + 1)
            ]
        return self._layers_of[key]

    def _stage(self, place: Place, work: Workload, plain: int, mixtures: int, last: bool) -> dict[Part, float]:
        """One micro-batch through a stage, forward and backward."""
        dense, mixture, head = self._passes(place)
        forward = total([_times(dense.forward, plain), _times(mixture.forward, mixtures)])
        backward = total([_times(dense.backward, plain), _times(mixture.backward, mixtures)])
        whole = total([forward, backward])
        if work.recompute:
            whole["recomputation"] = sum(forward.values())
        if last:
            whole = total([whole, head.forward, head.backward])
        return whole

    def _passes(self, place: Place) -> tuple[Pass, Pass, Pass]:
        """A dense layer, a mixture, the head."""
        topology = place.topology
        key = (topology.tensor, topology.sequence, topology.expert, topology.expert_over, topology.node_ranks,
               topology.world if not topology.node_ranks else 0, place.tokens, place.seq, place.dtype)  # fmt: skip
        if key not in self._layers:
            dense = layer_pass(self.model, None, place)
            mixture = layer_pass(self.model, self.moe, place) if self.moe is not None else dense
            self._layers[key] = (dense, mixture, head_pass(self.model, self.vocab, place))
        return self._layers[key]

    def _holdings(self, topology: Topology) -> list[HeldParameters]:
        key = (topology.tensor, topology.pipeline, topology.virtual_stages, topology.expert)
        if key not in self._held:
            stages = range(topology.pipeline)
            self._held[key] = [count_held(self.model, self.moe, self.vocab, topology, stage) for stage in stages]
        return self._held[key]

    def _messages(self, place: Place) -> float:
        """Seconds that a micro-batch waits for neighbours: activations forward and gradients back, for each chunk."""
        topology, hardware = place.topology, place.hardware
        if topology.pipeline == 1:
            return 0.0
        near = place.inside(topology.pipeline, topology.stage_ranks) > 1
        size = place.own * self.model.width * BYTES[place.dtype]
        one = size / hardware.link(2, 2 if near else 1) + hardware.latency(2, 2 if near else 1)
        return 2 * topology.virtual_stages * one

    def _reduction(self, place: Place, work: Workload) -> float:
        """Seconds to sum gradients over their replicas and, under ZeRO 1, to share out the new weights.

        DeepSpeed reduces in the model's dtype by all-reduces, which are worth two ring passes, whatever the partition
        (`allreduce_and_scatter`); the new weights are gathered in one more.
        """
        topology, hardware = place.topology, place.hardware
        passes = (3 if work.zero else 2) * BYTES[work.dtype]
        stride = topology.tensor if topology.experts_on_all_tensor_ranks else 1
        held = set(self._holdings(topology))
        data = place.inside(topology.data, topology.tensor)
        replicas = place.inside(topology.expert_data, topology.expert * stride)
        return max(
            ring_seconds(passes * one.dense, topology.data, data, hardware)
            + ring_seconds(passes * one.expert, topology.expert_data, replicas, hardware)
            for one in held
        )

    def _optimizer(self, held: HeldParameters, work: Workload, topology: Topology) -> float:
        owned = held.dense / topology.data + held.expert / topology.expert_data if work.zero else held.all
        moved = owned * _UPDATED_BYTES + held.all * (_HELD_FP32_BYTES + 2 * BYTES[work.dtype])
        return moved / self.hardware.memory


def _times(parts: Mapping[Part, float], factor: int) -> dict[Part, float]:
    return {part: factor * seconds for part, seconds in parts.items()}
