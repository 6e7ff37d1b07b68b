"""The ``moe`` section: what it derives and how it refuses."""

import pytest

from moescale.base.config import validate
from moescale.base.errors import UserError
from moescale.moe import MoEConfig


def refusal(**content: object) -> str:
    with pytest.raises(UserError) as error:
        validate(MoEConfig, content, "run.yaml")
    return str(error.value)


def test_more_active_than_experts() -> None:
    said = refusal(experts=4, active=5, granularity=4)
    assert said == "run.yaml: moe.active (5) must not exceed moe.experts (4); try 1 to 4"


def test_granularity_or_width() -> None:
    for both in ({}, {"granularity": 4, "expert_width": 64}):
        assert "give exactly one" in refusal(experts=4, active=1, **both)


def test_width_of_experts() -> None:
    assert MoEConfig(experts=4, active=1, granularity=4).width_of_expert(64) == 64
    assert MoEConfig(experts=4, active=1, granularity=1).width_of_expert(64) == 256
    assert MoEConfig(experts=4, active=1, expert_width=40).width_of_expert(64) == 40


@pytest.mark.parametrize(("width", "granularity"), [(48, 16 / 3 * 1.5), (64, 6), (96, 5), (8, 7)])
def test_illegal_granularity_names_legal_ones(width: int, granularity: float) -> None:
    config = MoEConfig(experts=4, active=1, granularity=granularity)
    wanted = 4 * width / granularity
    if wanted % 8 == 0:
        assert config.width_of_expert(width) == wanted
        return
    with pytest.raises(ValueError, match="must be a multiple of 8") as error:
        config.width_of_expert(width)
    said = str(error.value)
    assert f"moe.granularity ({granularity:g})" in said
    assert f"model.width ({width})" in said
    offered = [int(part.split(" ")[0]) for part in said.split("moe.expert_width=")[1:]]
    assert offered
    for legal in offered:
        assert MoEConfig(experts=4, active=1, expert_width=legal).width_of_expert(width) == legal
        assert abs(legal - wanted) < 16


def test_which_layers_are_mixtures() -> None:
    def mixtures(**keys: int) -> list[int]:
        config = MoEConfig(experts=4, active=1, granularity=4, **keys)
        return [layer for layer in range(6) if config.is_mixture(layer)]

    assert mixtures() == [0, 1, 2, 3, 4, 5]
    assert mixtures(first_dense=2) == [2, 3, 4, 5]
    assert mixtures(every=2) == [1, 3, 5]
    assert mixtures(every=2, first_dense=1) == [2, 4]
    assert mixtures(every=3) == [2, 5]


def test_unknown_key_is_guessed() -> None:
    assert "did you mean granularity?" in refusal(experts=4, active=1, granularty=4)
