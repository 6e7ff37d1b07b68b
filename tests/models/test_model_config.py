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


MLA: dict[str, object] = {"kv_rank": 16, "nope_dim": 8, "rope_dim": 4, "value_dim": 6}
YARN: dict[str, object] = {"factor": 4, "original_seq": 64}
LATENT: dict[str, object] = {"layers": 2, "width": 64, "heads": 5, "mla": MLA}


def test_latent_attention_says_what_heads_are() -> None:
    """Heads need not divide the width, a rung's key heads are not meant, and what is written out reads back."""
    model = ModelConfig.model_validate({**LATENT, "yarn": YARN})
    assert (model.kv_heads, model.head_dim, model.rotary_dim) == (5, 12, 4)
    assert ModelConfig.model_validate(model.model_dump(mode="json")) == model
    rung = ModelConfig.model_validate({"shape": "7B", "mla": MLA})
    assert (rung.heads, rung.kv_heads, rung.head_dim) == (32, 32, 12)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"qk_norm": "head"}, "model.qk_norm (head) does not go with model.mla, where it is none; leave it out"),
        ({"qkv_bias": True}, "model.qkv_bias (True) does not go with model.mla"),
        ({"rotary_fraction": 0.5}, "model.rotary_fraction (0.5) does not go with model.mla"),
        ({"kv_heads": 1}, "model.kv_heads (1) does not go with model.mla, where it is 5; leave it out"),
        ({"head_dim": 16}, "model.head_dim (16) does not go with model.mla, where it is 12; leave it out"),
        ({"mla": {**MLA, "rope_dim": 3}}, "mla.rope_dim (3): input should be a multiple of 2"),
        ({"mla": {**MLA, "nope_dim": "x"}}, "mla.nope_dim ('x')"),
        ({"mla": {**MLA, "v_dim": 3}}, "mla.v_dim: unknown key"),
        ({"mla": {"kv_rank": 16}}, "mla.rope_dim: required and not given"),
        ({"mla": 3}, "mla (3)"),
        ({"mla": None, "heads": 4, "yarn": YARN}, "model.yarn needs model.mla"),
        ({"yarn": {**YARN, "factor": 0.5}}, "yarn.factor (0.5): input should be greater than or equal to 1"),
        (
            {"yarn": {**YARN, "beta_slow": 40}},
            "model.yarn.beta_fast (32) must exceed model.yarn.beta_slow (40); the paper has 32 and 1",
        ),
    ],
    ids=str,
)
def test_what_does_not_go_with_latent_attention(content: dict[str, object], words: str) -> None:
    said = refusal(**{**LATENT, **content})
    assert words in said
    assert "\n" not in said or "mla." in said, "of a section that is not valid nothing else is said"
