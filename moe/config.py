"""The ``moe`` section of a run file."""

import math
from typing import Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

# F.grouped_mm needs row strides in multiples of 16 bytes: 8 elements cover bf16.
WIDTH_MULTIPLE = 8
# Relative error of a number of experts that counts as none: a sparsity is a decimal, and 1 / (1 - S) magnifies it.
WHOLE = 1e-6
_SCORED = ("topk", "expert_choice", "sinkhorn")
# The default of each option that not every router has, and the routers that have it.
_ROUTERS_OF: dict[str, tuple[Any, tuple[str, ...]]] = {
    "score": ("softmax", _SCORED),
    "groups": (1, ("topk",)),
    "groups_active": (1, ("topk",)),
    "jitter": (0.0, _SCORED),
    "grouping": ("position", ("expert_choice", "sinkhorn")),
    "skew": (0.0, ("forced",)),
    "bias_rate": (0.0, ("topk",)),
    "capacity": (None, ("topk", "sinkhorn", "hash", "forced")),
}


class MoEConfig(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """Which layers are mixtures, of what, and how tokens find their experts.

    ``sparsity`` S = 1 - K / E may be given in place of ``experts``, so that a sweep can hold it fixed.
    """

    experts: int = Field(ge=1, le=1_000_000, description="routed experts E of a layer")
    active: int = Field(ge=1, description="routed experts K that a token visits")
    granularity: float | None = Field(None, gt=0, description="G = 4 width / expert_width (arXiv 2402.07871)")
    expert_width: int | None = Field(None, ge=1, description="hidden width F of an expert; give it or granularity")
    shared: int = Field(0, ge=0, description="shared experts, each of expert_width, that every token visits")
    first_dense: int = Field(0, ge=0, description="the first layers that stay dense")
    every: int = Field(1, ge=1, description="of the others, every n-th is a mixture (the last of each n)")
    router: Literal["topk", "expert_choice", "sinkhorn", "hash", "forced"] = Field(
        "topk", description="how tokens find experts: moe/routers/, docs/moe.md"
    )
    score: Literal["softmax", "softmax_normalized", "sigmoid", "sigmoid_normalized"] = Field(
        "softmax", description="what a visit weighs; 'normalized' divides by the sum over the experts selected"
    )
    weight_scale: float = Field(1.0, gt=0, description="what the weights of all visits are multiplied by")
    groups: int = Field(1, ge=1, description="topk: equal groups that the experts form")
    groups_active: int = Field(1, ge=1, description="topk: groups that a token may visit")
    jitter: float = Field(0.0, ge=0, lt=1, description="in training the router's input times uniform [1 - j, 1 + j]")
    grouping: Literal["position", "sequence"] = Field(
        "position", description="tokens among which experts choose or are balanced: of equal position, or a sequence's"
    )
    allow_future_leak: bool = Field(False, description="permits grouping sequence: later tokens decide on earlier ones")
    skew: float = Field(0.0, ge=0, description="forced: expert i is visited in proportion to (i + 1)^-skew")
    balance: Literal["sequence", "global", "micro_batch", "none"] = Field(
        "sequence", description="scope of the load-balance loss; default without one to balance: none"
    )
    aux_loss: float = Field(0.01, ge=0, description="coefficient of the load-balance loss")
    z_loss: float = Field(0.001, ge=0, description="coefficient of the router z-loss")
    bias_rate: float = Field(0.0, ge=0, description="topk: step of the selection bias towards equal loads; 0: no bias")
    capacity: float | None = Field(None, gt=0, description="visits an expert serves, over its equal share; null: all")
    drop: Literal["probability", "position"] = Field(
        "position", description="visits that go first beyond capacity: of the lowest weight, or the latest"
    )
    capacity_scope: Literal["sequence", "micro_batch"] = Field("sequence", description="tokens that share a capacity")
    padded: bool = Field(False, description="experts always compute their full capacity: no sizes leave the device")

    @model_validator(mode="before")
    @classmethod
    def _resolve_sparsity(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "sparsity" not in given:
            return given
        content = {key: value for key, value in given.items() if key != "sparsity"}
        if given["sparsity"] is None:
            return content
        if content.get("experts") is not None:
            raise ValueError(
                f"moe.sparsity ({given['sparsity']}) and moe.experts ({content['experts']}): give exactly one"
            )
        return {**content, "experts": _experts_at(given["sparsity"], content.get("active"))}

    @model_validator(mode="before")
    @classmethod
    def _resolve_balance(cls, given: Any) -> Any:
        """Only token choice has loads that a loss can balance, so that is where it is on by default."""
        if not isinstance(given, dict) or given.get("balance") is not None:
            return given
        balance = "sequence" if given.get("router", "topk") == "topk" else "none"
        return {**given, "balance": balance}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.active > self.experts:
            raise ValueError(
                f"moe.active ({self.active}) must not exceed moe.experts ({self.experts}); try 1 to {self.experts}"
            )
        if (self.granularity is None) == (self.expert_width is None):
            raise ValueError(
                f"moe.granularity ({self.granularity}) and moe.expert_width ({self.expert_width}): give exactly one"
            )
        self._check_meaning()
        self._check_groups()
        if self.grouping == "sequence" and not self.allow_future_leak:
            raise ValueError(
                f"moe.grouping ({self.grouping}) with moe.router {self.router} lets later tokens decide where earlier "
                "ones go, which flatters the loss; use moe.grouping=position, or accept it with "
                "moe.allow_future_leak=true"
            )
        return self

    def _check_meaning(self) -> None:
        """An option that would do nothing is refused: two runs that differ in it would pass for two experiments."""
        for key, (default, routers) in _ROUTERS_OF.items():
            value = getattr(self, key)
            if value != default and self.router not in routers:
                raise ValueError(
                    f"moe.{key} ({value}) means nothing with moe.router {self.router}; it is for {', '.join(routers)}"
                )
        if self.balance != "none" and self.router != "topk":
            raise ValueError(
                f"moe.balance ({self.balance}) means nothing with moe.router {self.router}: its loads follow from the "
                "router; use moe.balance=none"
            )
        for key, default in (("drop", "position"), ("capacity_scope", "sequence"), ("padded", False)):
            if self.capacity is None and getattr(self, key) != default:
                raise ValueError(f"moe.{key} ({getattr(self, key)}) needs moe.capacity, such as moe.capacity=1.25")

    def _check_groups(self) -> None:
        if self.experts % self.groups:
            legal = ", ".join(str(n) for n in range(1, min(self.experts, 64) + 1) if self.experts % n == 0)
            raise ValueError(f"moe.groups ({self.groups}) must divide moe.experts ({self.experts}); try {legal}")
        if self.groups_active > self.groups:
            raise ValueError(
                f"moe.groups_active ({self.groups_active}) must not exceed moe.groups ({self.groups}); try 1 to "
                f"{self.groups}"
            )
        reachable = self.groups_active * self.experts // self.groups
        if self.active > reachable:
            enough = -(-self.active * self.groups // self.experts)
            raise ValueError(
                f"moe.active ({self.active}): moe.groups_active ({self.groups_active}) of moe.groups ({self.groups}) "
                f"hold {reachable} experts; try moe.groups_active={enough}"
            )

    def width_of_expert(self, width: int) -> int:
        """Expert hidden width F for model width ``width``.

        Raises:
            ValueError: F would not be a multiple of 8; the text names the nearest legal values.
        """
        wanted = self.expert_width if self.expert_width is not None else 4 * width / self.granularity  # type: ignore[operator]
        if wanted % WIDTH_MULTIPLE:
            low = max(int(wanted // WIDTH_MULTIPLE), 1) * WIDTH_MULTIPLE
            nearest = (low, low + WIDTH_MULTIPLE)
            if self.expert_width is not None:
                said = f"moe.expert_width ({self.expert_width})"
                advice = f"{nearest[0]} or {nearest[1]}"
            else:
                said = (
                    f"moe.granularity ({self.granularity:g}) with model.width ({width}) gives experts of width "
                    f"{wanted:g}, which"
                )
                advice = " or ".join(f"moe.expert_width={n} (granularity {4 * width / n:g})" for n in nearest)
            raise ValueError(f"{said} must be a multiple of {WIDTH_MULTIPLE}; try {advice}")
        return int(wanted)

    @property
    def scored(self) -> bool:
        """Whether the router scores experts: it then has a matrix, and weights that it learns."""
        return self.router in _SCORED

    @property
    def future(self) -> Literal["never", "training", "always"]:
        """When a token's output depends on later tokens of its sequence.

        After ``training`` alone the evaluation loss is honest; after ``always`` it is not a language model's loss:
        later tokens tell on earlier ones.
        """
        chosen = self.router == "expert_choice" and self.grouping == "sequence"
        # Of equal weights the earlier visit stays, so without scores nothing is told.
        outbid = self.capacity is not None and self.drop == "probability" and self.scored
        if chosen or outbid:
            return "always"
        return "training" if self.router == "sinkhorn" and self.grouping == "sequence" else "never"

    @property
    def causal(self) -> bool:
        """Whether no output depends on later tokens, in training and in evaluation."""
        return self.future == "never"

    @property
    def inexact(self) -> list[str]:
        """Settings that couple the sequences of a micro-batch, so that the result depends on the layout."""
        settings = {
            "moe.balance=micro_batch": self.balance == "micro_batch",
            "moe.capacity_scope=micro_batch": self.capacity is not None and self.capacity_scope == "micro_batch",
            "moe.grouping=position": self.router in _ROUTERS_OF["grouping"][1] and self.grouping == "position",
        }
        return [setting for setting, given in settings.items() if given]

    @property
    def layout_exact(self) -> bool:
        """Whether every layout and micro-batch size computes the same."""
        return not self.inexact

    def is_mixture(self, layer: int) -> bool:
        """Whether layer ``layer`` (global, from 0) is a mixture."""
        behind = layer - self.first_dense
        return behind >= 0 and behind % self.every == self.every - 1


def _experts_at(sparsity: Any, active: Any) -> int:
    """Routed experts E of which ``active`` ones leave ``sparsity`` = 1 - K / E.

    Raises:
        ValueError: not a sparsity, or no whole number of experts has it; the text names the nearest that have one.
    """
    if not isinstance(active, int) or isinstance(active, bool) or active < 1:
        raise ValueError(f"moe.sparsity ({sparsity}) needs moe.active ({active}), a whole number of at least 1")
    if not isinstance(sparsity, int | float) or isinstance(sparsity, bool) or not 0 <= sparsity < 1:
        raise ValueError(f"moe.sparsity ({sparsity}): at least 0 and below 1 is expected; it is 1 - active / experts")
    wanted = active / (1 - sparsity)
    experts = round(wanted)
    if abs(wanted - experts) > WHOLE * wanted:
        nearest = " or ".join(
            f"{1 - active / legal:.9g} (moe.experts {legal})" for legal in (math.floor(wanted), math.ceil(wanted))
        )
        raise ValueError(
            f"moe.sparsity ({sparsity}) with moe.active ({active}) asks for {wanted:.6g} experts; try {nearest}"
        )
    return experts
