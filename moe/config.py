"""The ``moe`` section of a run file."""

import math
from typing import Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

# F.grouped_mm needs row strides in multiples of 16 bytes: 8 elements cover bf16.
WIDTH_MULTIPLE = 8
# Relative error of a number of experts that counts as none: a sparsity is a decimal, and 1 / (1 - S) magnifies it.
WHOLE = 1e-6


class MoEConfig(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """Which layers are mixtures, of what, and how tokens find their experts.

    ``sparsity`` S = 1 - K / E may be given in place of ``experts``, so that a sweep can hold it fixed.
    """

    experts: int = Field(ge=1, description="routed experts E of a layer")
    active: int = Field(ge=1, description="routed experts K that a token visits")
    granularity: float | None = Field(None, gt=0, description="G = 4 width / expert_width (arXiv 2402.07871)")
    expert_width: int | None = Field(None, ge=1, description="hidden width F of an expert; give it or granularity")
    shared: int = Field(0, ge=0, description="shared experts, each of expert_width, that every token visits")
    first_dense: int = Field(0, ge=0, description="the first layers that stay dense")
    every: int = Field(1, ge=1, description="of the others, every n-th is a mixture (the last of each n)")
    router: Literal["topk"] = Field("topk", description="token choice")
    score: Literal["softmax", "softmax_normalized"] = Field(
        "softmax", description="softmax over all experts; 'normalized' divides the K selected by their sum"
    )
    balance: Literal["sequence", "none"] = Field("sequence", description="scope of the load-balance loss")
    aux_loss: float = Field(0.01, ge=0, description="coefficient of the load-balance loss")
    z_loss: float = Field(0.001, ge=0, description="coefficient of the router z-loss")

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
        return self

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
