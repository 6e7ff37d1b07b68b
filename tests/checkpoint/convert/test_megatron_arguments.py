"""Megatron-LM's arguments and our configuration: translated both ways, what has no words refused by name."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron_cases import DEEPSEEK, DENSE, MIXED, MIXTURE, MODELS

from moescale.base.errors import UserError
from moescale.checkpoint.convert.formats import Architecture, logical_tensors
from moescale.checkpoint.convert.megatron_arguments import architecture_of, arguments_of, check_agree, check_expressible
from moescale.checkpoint.convert.megatron_files import DistCheckpoint
from moescale.checkpoint.convert.megatron_writer import DistWriter
from moescale.moe import MoEConfig


@pytest.mark.parametrize("name", MODELS)
def test_our_arguments_mean_our_model(name: str) -> None:
    found = MODELS[name]
    back, settings = architecture_of(arguments_of(found), "file")
    check_agree(back, found, "file")
    assert logical_tensors(back) == logical_tensors(found)
    assert {setting.key for setting in settings} >= {"num_layers", "hidden_size", "rotary_base", "normalization"}


def of(**changes: Any) -> Architecture:
    """What the mixture's arguments mean with some changed."""
    return architecture_of(arguments_of(MIXTURE) | changes, "file")[0]


def test_arguments_as_megatron_lm_leaves_them_out_and_fills_them_in() -> None:
    plain = {
        "num_layers": 4, "hidden_size": 64, "num_attention_heads": 8, "group_query_attention": False,
        "num_query_groups": 1, "kv_channels": 8, "ffn_hidden_size": 172 - 4, "normalization": "RMSNorm", "swiglu": True,
        "add_bias_linear": False, "untie_embeddings_and_output_weights": True, "position_embedding_type": "rope",
        "vocab_size": 50_257, "padded_vocab_size": 50_304, "num_experts": None,
    }  # fmt: skip
    model = architecture_of(plain, "file")[0].model
    assert (model.kv_heads, model.tied, model.padded_vocab(50_257)) == (8, False, 50_304)
    for_eight_ranks = architecture_of({**plain, "padded_vocab_size": 51_200}, "file")[0]
    assert for_eight_ranks.model.padded_vocab(for_eight_ranks.vocab) == 51_200


def test_routing_means_the_same() -> None:
    def moe(**changes: Any) -> MoEConfig:
        found = of(**{"moe_router_enable_expert_bias": False, **changes}).moe
        assert found is not None
        return found

    softmax = {"moe_router_score_function": "softmax"}
    assert moe(**softmax, moe_router_pre_softmax=True).score == "softmax"
    assert moe(**softmax, moe_router_pre_softmax=False).score == "softmax_normalized"
    assert moe().score == "sigmoid_normalized"
    assert moe(moe_router_topk=1).score == "sigmoid"
    assert moe(moe_router_num_groups=3).groups == 1  # Megatron looks at groups only where it is told how many
    assert moe(moe_router_load_balancing_type="seq_aux_loss", moe_aux_loss_coeff=0.5).aux_loss == 0.5


@pytest.mark.parametrize(
    ("frequency", "expected"),
    [(1, (0, 1)), ([1, 1, 1, 1], (0, 1)), ([0, 1, 1, 1], (1, 1)), ([0, 1, 0, 1], (0, 2)), ([0, 0, 0, 1], (3, 1))],
)
def test_which_layers_are_mixtures(frequency: Any, expected: tuple[int, int]) -> None:
    moe = architecture_of({**arguments_of(MIXED), "moe_layer_freq": frequency}, "file")[0].moe
    assert moe is not None
    wanted = frequency if isinstance(frequency, list) else [1] * 4
    assert [int(moe.is_mixture(layer)) for layer in range(4)] == wanted
    probe = moe.model_copy(update={"first_dense": expected[0], "every": expected[1]})
    assert [probe.is_mixture(n) for n in range(4)] == [moe.is_mixture(n) for n in range(4)]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"normalization": "LayerNorm"}, r"normalization \('LayerNorm'\) cannot be expressed; 'RMSNorm' can"),
        ({"swiglu": False}, r"swiglu \(False\)"),
        ({"add_bias_linear": True}, r"add_bias_linear \(True\)"),
        ({"position_embedding_type": "yarn"}, r"position_embedding_type \('yarn'\)"),
        ({"use_rope_scaling": True}, r"use_rope_scaling \(True\)"),
        ({"rotary_seq_len_interpolation_factor": 4}, r"rotary_seq_len_interpolation_factor \(4\)"),
        ({"window_size": (128, 0)}, r"window_size \(\(128, 0\)\)"),
        (
            {"multi_latent_attention": True, "qk_layernorm": True},
            r"lack q_lora_rank, which multi_latent_attention needs",
        ),
        ({"layernorm_zero_centered_gamma": True}, r"layernorm_zero_centered_gamma \(True\)"),
        ({"apply_layernorm_1p": True}, r"apply_layernorm_1p \(True\)"),
        ({"mtp_num_layers": 1}, r"mtp_num_layers \(1\)"),
        ({"moe_expert_capacity_factor": 1.25}, r"moe_expert_capacity_factor \(1\.25\)"),
        ({"moe_shared_expert_gate": True}, r"moe_shared_expert_gate \(True\)"),
        ({"moe_shared_expert_intermediate_size": 30}, r"moe_shared_expert_intermediate_size \(30\)"),
        ({"moe_layer_freq": 2}, r"moe_layer_freq \(2\) cannot be expressed"),
        ({"moe_router_score_function": "sqrtsoftplus"}, r"moe_router_score_function \('sqrtsoftplus'\)"),
        ({"moe_router_load_balancing_type": "sinkhorn"}, r"sinkhorn"),
        ({"moe_router_num_groups": 3, "moe_router_group_topk": 1}, r"moe\.groups_active \(1\)"),
        ({"hidden_size": 30}, r"make no model of ours"),
    ],
)
def test_what_we_cannot_compute_is_refused_by_name(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        of(**changes)


def test_latent_attention_means_the_same() -> None:
    def model(**changes: Any) -> Any:
        return architecture_of(arguments_of(DEEPSEEK) | changes, "file")[0].model

    assert model() == DEEPSEEK.model
    silent = arguments_of(DEEPSEEK)
    for key in ("rope_type", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
        del silent[key]
    yarn = architecture_of(silent, "file")[0].model.yarn
    assert yarn is not None
    assert (yarn.factor, yarn.beta_fast, yarn.beta_slow, yarn.mscale, yarn.mscale_all_dim) == (4, 32, 1, 1, 0)
    assert model(rope_type="rope", mscale_all_dim=0.0).yarn is None
    for changes, complaint in (
        ({"rope_type": "rope"}, r"mscale_all_dim \(1\.3\) with rope_type \('rope'\)"),
        ({"rope_type": "long"}, r"rope_type \('long'\) cannot be expressed"),
        ({"qk_layernorm": False}, r"qk_layernorm \(False\) with multi_latent_attention"),
        ({"kv_lora_rank": "many"}, r"make no model of ours"),
    ):
        with pytest.raises(UserError, match=complaint):
            model(**changes)


def test_an_argument_of_a_later_version_must_have_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    from megatron.core.transformer import transformer_config

    later = dataclasses.make_dataclass(
        "Later", [("attention_of_tomorrow", bool, False)], bases=(transformer_config.TransformerConfig,)
    )
    monkeypatch.setattr(transformer_config, "TransformerConfig", later)
    of(attention_of_tomorrow=False)
    with pytest.raises(UserError, match=r"attention_of_tomorrow \(True\) is not known here"):
        of(attention_of_tomorrow=True)


def test_arguments_that_lack_what_decides_are_refused() -> None:
    arguments = arguments_of(DENSE)
    del arguments["normalization"]
    with pytest.raises(UserError, match="the arguments lack normalization"):
        architecture_of(arguments, "file")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"rope_base": 20_000}, r"arguments say model\.rope_base 500, --config says 20000"),
        ({"heads": 2, "kv_heads": 2, "head_dim": 16}, r"model\.heads 4, --config says 2"),
        ({"norm_eps": 1e-3}, r"model\.norm_eps"),
    ],
)
def test_a_given_configuration_must_agree(changes: dict[str, Any], complaint: str) -> None:
    given = replace(MIXTURE, model=MIXTURE.model.model_copy(update=changes))
    with pytest.raises(UserError, match=complaint):
        check_agree(of(), given, "file")


def test_a_given_routing_must_agree() -> None:
    assert MIXTURE.moe is not None
    given = replace(MIXTURE, moe=MIXTURE.moe.model_copy(update={"weight_scale": 1.0}))
    with pytest.raises(UserError, match=r"moe\.weight_scale 2\.5, --config says 1\.0"):
        check_agree(of(), given, "file")
    check_agree(of(), replace(MIXTURE, moe=MIXTURE.moe.model_copy(update={"aux_loss": 0.5, "jitter": 0.1})), "file")


def test_the_arguments_of_a_run_are_read_with_its_enumerations(tmp_path: Path) -> None:
    """common.pt as Megatron-LM writes it: a namespace of numbers, texts, paths, dtypes and enumerations."""
    from megatron.core.enums import ModelType
    from megatron.core.transformer.enums import AttnBackend

    more = {
        "params_dtype": torch.bfloat16,
        "attention_backend": AttnBackend.auto,
        "save": Path("/checkpoints"),
        "data_path": ["1.0", "/data/text"],
        "model_type": ModelType.encoder_or_decoder,
        "lr": 3e-4,
    }
    common = {"args": argparse.Namespace(**arguments_of(DENSE), **more), "iteration": 7, "rng": torch.ones(3)}
    DistWriter(tmp_path, common).close()
    arguments = DistCheckpoint(tmp_path).common["args"].state
    assert arguments["lr"] == 3e-4
    assert arguments["data_path"] == ["1.0", "/data/text"]
    found, settings = architecture_of(arguments, "file")
    check_agree(found, DENSE, "file")
    assert settings[-1].key == "other arguments"


def test_expressible_models_pass() -> None:
    for found in MODELS.values():
        check_expressible(found)
