"""The ``model`` section: what it derives, and errors that name field, value and alternative."""

import pytest

from moescale.base.config import validate
from moescale.base.errors import UserError
from moescale.models.config import ModelConfig
from moescale.models.shapes import SHAPES


def refusal(**content: object) -> str:
    with pytest.raises(UserError) as error:
        validate(ModelConfig, content, "run.yaml")
    return str(error.value)


def test_defaults_follow_from_width_and_heads() -> None:
    model = ModelConfig(layers=2, width=64, heads=4)
    assert (model.kv_heads, model.head_dim, model.ffn) == (4, 16, 256)


def test_a_shape_is_a_rung_and_keys_beside_it_win() -> None:
    model = ModelConfig(shape="d64", heads=4, ffn=128)
    assert (model.layers, model.width, model.heads, model.head_dim, model.ffn) == (3, 64, 4, 16, 128)
    assert ModelConfig(shape="7B").kv_heads == 8


@pytest.mark.parametrize("name", SHAPES)
def test_every_rung_is_a_model(name: str) -> None:
    model = ModelConfig(shape=name)
    assert model.heads * model.head_dim == model.width
    assert model.head_dim >= 16


def test_unknown_shape() -> None:
    said = refusal(shape="1.5B")
    assert said.startswith("run.yaml: model.shape (1.5B): unknown")
    assert "1.4B" in said
    assert "model.shape (['d64']): unknown" in refusal(shape=["d64"])


def test_heads_that_do_not_divide_the_width() -> None:
    said = refusal(layers=2, width=64, heads=5)
    assert "model.heads (5) must divide model.width (64), or give model.head_dim; try 1, 2, 4, 8" in said


def test_key_heads_that_do_not_divide_the_heads() -> None:
    said = refusal(layers=2, width=64, heads=4, kv_heads=3)
    assert "model.kv_heads (3) must divide model.heads (4); try 1, 2, 4" in said


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"layers": 2, "width": 60, "heads": 4}, ("width (60)", "multiple of 8")),
        ({"layers": 2, "width": 64, "heads": 4, "ffn": 100}, ("ffn (100)", "multiple of 8")),
        ({"layers": 0, "width": 64, "heads": 4}, ("layers (0)", "greater than or equal to 1")),
        ({"layers": 2, "width": 64, "heads": 4, "head_dim": 15}, ("head_dim (15)", "multiple of 2")),
        ({"layers": 2, "width": 64, "heads": 4, "qk_norm": "all"}, ("qk_norm ('all')", "'head'")),
        (
            {"layers": 2, "width": 64, "heads": 4, "rotary_fraction": 0.2},
            ("rotary_fraction (0.2)", "is 3.2", "try 0.25"),
        ),
        (
            {"layers": 2, "width": 64, "heads": 4, "rotary_fraction": 1.5},
            ("rotary_fraction (1.5)", "less than or equal"),
        ),
        ({"layers": 2, "width": 64, "heads": 4, "norm_eps": 0}, ("norm_eps (0)", "greater than 0")),
        ({"layers": 2, "width": 64, "heads": 0}, ("heads (0)", "greater than or equal to 1")),
        ({"layers": 2, "width": 64}, ("heads", "required")),
        ({"layer": 2, "width": 64, "heads": 4}, ("layer", "did you mean layers?")),
    ],
)
def test_illegal_values_are_named(content: dict[str, object], words: tuple[str, str]) -> None:
    said = refusal(**content)
    for word in words:
        assert word in said


def test_the_vocabulary_is_padded_by_the_model_alone() -> None:
    model = ModelConfig(shape="d64")
    assert [model.padded_vocab(n) for n in (1, 128, 129, 32_000)] == [128, 128, 256, 32_000]
    assert ModelConfig(shape="d64", vocab_multiple=1).padded_vocab(129) == 129
