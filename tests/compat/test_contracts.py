"""What our code relies on in its pinned dependencies beyond their documented interfaces.

When a dependency changes, a test here fails before results do. Each message says what to look at again.
"""

import importlib.util
import inspect
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

Train = Callable[..., Any]


def test_versions_are_the_tested_ones() -> None:
    """Ranges in pyproject.toml say what may work; this file was written against these."""
    constraints = (Path(__file__).parents[2] / "constraints.txt").read_text()
    for package in ("deepspeed", "megatron-core", "torch"):
        pinned = next(line for line in constraints.splitlines() if line.startswith(f"{package}=="))
        assert version(package).split("+")[0] == pinned.split("==")[1].split("+")[0], (
            f"{package} is not the version that constraints.txt names: read the failures below, then pin the new one"
        )


# ---------------------------------------------------------------- DeepSpeed's ZeRO 1, for parallel/engine.py
@pytest.fixture
def zero_one(train: Train) -> Any:
    """An engine with reduced gradients."""
    made = train(zero=1)
    made.backward(first=0)
    made.raw = {p: p.grad.clone() for p in made.engine.parameters}
    made.engine.reduce()
    return made


def test_gradients_stay_in_averaged_gradients(zero_one: Any) -> None:
    optimizer = zero_one.engine._engine.optimizer
    for index, members in enumerate(optimizer.params_in_partition):
        gradients = optimizer.averaged_gradients[index]
        real = [g for g in gradients if not getattr(g, "_zero_padding", False)]
        assert [g.numel() for g in real] == [p.numel() for p in members], (
            "averaged_gradients is no longer aligned with params_in_partition: re-check Engine._reduced"
        )
        for parameter, gradient in zip(members, real, strict=True):
            expected = zero_one.raw[parameter].flatten()
            torch.testing.assert_close(gradient.flatten(), expected, msg="other gradients: re-check Engine.reduce")


def test_partitions_are_described_by_four_lists(zero_one: Any) -> None:
    optimizer = zero_one.engine._engine.optimizer
    groups = len(optimizer.bit16_groups)
    lengths = {
        name: len(getattr(optimizer, name))
        for name in ("params_in_partition", "partition_size", "first_offset", "single_partition_of_fp32_groups")
    }
    assert set(lengths.values()) == {groups}, f"{lengths}: re-check Engine._ranges and Engine.slices"
    for index in range(groups):
        flat = optimizer.single_partition_of_fp32_groups[index]
        assert flat.dtype == torch.float32, "masters are no longer float32: re-check Engine.slices"
        assert flat.numel() == optimizer.partition_size[index], "re-check Engine._ranges"
        assert optimizer.first_offset[index] == 0, "one rank holds whole parameters: re-check Engine._ranges"


def test_the_base_optimizer_steps_the_flat_partitions(zero_one: Any) -> None:
    optimizer = zero_one.engine._engine.optimizer
    stepped = [id(p) for group in optimizer.optimizer.param_groups for p in group["params"]]
    assert stepped == [id(flat) for flat in optimizer.single_partition_of_fp32_groups], "re-check Engine.slices"
    assert [group["lr"] for group in optimizer.param_groups] == [
        group["lr"] for group in optimizer.optimizer.param_groups
    ], "the learning rate no longer reaches the base optimizer: re-check Engine.step"


def test_publishing_masters(zero_one: Any) -> None:
    optimizer = zero_one.engine._engine.optimizer
    for flat in optimizer.single_partition_of_fp32_groups:
        flat.data.fill_(0.125)
    optimizer.update_lp_params()
    assert all((p == 0.125).all() for p in zero_one.engine.parameters), "re-check Engine.publish_masters"


def test_the_overflow_check_can_be_switched_off(zero_one: Any) -> None:
    optimizer = zero_one.engine._engine.optimizer
    assert "check_grad_overflow" in inspect.signature(type(optimizer).__init__).parameters, "re-check Engine.__init__"
    assert optimizer.check_grad_overflow is False, "re-check Engine.__init__"


def test_reduction_is_asked_for_by_hand(zero_one: Any) -> None:
    engine = zero_one.engine._engine
    engine.set_gradient_accumulation_boundary(False)
    assert not engine.is_gradient_accumulation_boundary(), "re-check Engine.reduce and Engine.step"
    engine.set_gradient_accumulation_boundary(True)
    assert engine.is_gradient_accumulation_boundary(), "re-check Engine.reduce and Engine.step"
    assert callable(engine.allreduce_gradients), "re-check Engine.reduce"


def test_deepspeed_neither_clips_nor_computes_norms_itself(zero_one: Any) -> None:
    from deepspeed.runtime.constants import GRADIENT_CLIPPING_DEFAULT

    assert GRADIENT_CLIPPING_DEFAULT == 1.0, "clipping is off by default now: 'gradient_clipping' need not be set"
    assert zero_one.engine._engine.optimizer.clip_grad == 0.0, "DeepSpeed clips: re-check engine._settings"
    assert zero_one.engine._engine.optimizer.compute_grad_norm is False, "re-check engine._settings"


def test_compute_grad_norm_is_refused_under_zero_0() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    with pytest.raises(ValueError, match="compute_grad_norm"):  # once it is taken: simplify engine._settings
        DeepSpeedZeroConfig(stage=0, compute_grad_norm=False)


def test_splitting_parameter_groups_keeps_our_keys() -> None:
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split

    dense, expert = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    expert.allreduce, expert.group_name = False, "ep_size_1"  # type: ignore[attr-defined]
    groups = split([{"params": [dense, expert], "name": "decay", "decay": True}])
    assert [(g["decay"], [id(p) for p in g["params"]]) for g in groups if g["params"]] == [
        (True, [id(dense)]),
        (True, [id(expert)]),
    ], "re-check engine._parameter_groups"
    assert groups[-1]["moe"] is True, "re-check how DeepSpeed marks expert groups"


def test_grad_dtype_accumulates_bfloat16_in_float32() -> None:
    """1 + 2^-10 added a hundred times: bfloat16 would never leave 1."""
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    parameter.grad_dtype = torch.float32  # type: ignore[attr-defined]
    for weight in [1.0] + [2**-10] * 100:
        (parameter * weight).backward()
    assert parameter.grad is not None
    assert parameter.grad.dtype == torch.float32, "bf16 gradients accumulate in bf16: re-check Engine.__init__"
    assert parameter.grad.item() == 1 + 100 * 2**-10, "re-check Engine.__init__"


# ---------------------------------------------------------------- DeepSpeed's experts and groups
def test_expert_groups_are_kept_in_private_dictionaries(one_rank: Any) -> None:
    from deepspeed.utils import groups

    assert groups._get_expert_parallel_group_dict() is groups._EXPERT_PARALLEL_GROUP, "re-check Groups.build"
    for name in ("_EXPERT_PARALLEL_GROUP", "_EXPERT_DATA_PARALLEL_GROUP"):
        assert "ep_size_1" in getattr(groups, name), f"{name} is gone or named otherwise: re-check Groups.destroy"
    assert groups._get_expert_parallel_group("ep_size_1") is one_rank.expert, "re-check Groups.build"
    assert groups._get_expert_data_parallel_group("ep_size_1") is one_rank.expert_data, "re-check Groups.build"
    assert groups.mpu is not None, "re-check Groups.build"


def test_expert_layers_are_recognised_by_class(train: Train) -> None:
    from deepspeed.moe.layer import MoE

    made = train()
    mixtures = [mixture for _, mixture in made.stage.mixtures()]
    assert mixtures
    assert all(isinstance(mixture, MoE) for mixture in mixtures), "re-check moe/bind_deepspeed.py"
    assert made.engine._engine.has_moe_layers, "DeepSpeed finds no experts: re-check moe/bind_deepspeed.py"
    assert made.engine._engine.num_experts == [mixture.config.experts for mixture in mixtures], "re-check mark_experts"


def test_a_unit_with_sequence_parallelism_would_be_asked_for_other_groups() -> None:
    from deepspeed.utils import groups

    from moescale.parallel.groups import MegatronUnits

    assert not hasattr(MegatronUnits, "initialize_sequence_parallel")
    assert "initialize_sequence_parallel" in inspect.getsource(groups._get_data_parallel_group), (
        "DeepSpeed tells units apart differently: re-check MegatronUnits"
    )


def test_the_shared_memory_operator_is_asked_for_by_name() -> None:
    from deepspeed.comm.torch import build_shm_op
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    source = inspect.getsource(build_shm_op)
    assert "__compatible_ops__.get(builder.NAME" in source, "world.start no longer prevents a minute of compiling"
    assert ShareMemCommBuilder.NAME == "deepspeed_shm_comm", "re-check world.start"


def test_nothing_was_compiled(one_rank: Any) -> None:
    import deepspeed

    assert deepspeed.comm.comm.cdb.shm_comm_op is None, "DeepSpeed compiled an operator at start: re-check world.start"


# ---------------------------------------------------------------- Megatron-core
def test_the_schedule_scales_auxiliary_losses_only_with_num_moe_experts() -> None:
    from megatron.core.pipeline_parallel import schedules

    source = inspect.getsource(schedules.forward_step_calc_loss)
    before, _, after = source.partition("config.num_moe_experts is not None")
    assert "MoEAuxLossAutoScaler.set_loss_scale" in after, "re-check models/build.py and moe/bind_megatron.py"
    assert "MoEAuxLossAutoScaler" not in before, "re-check models/build.py and moe/bind_megatron.py"
    assert "num_microbatches" in after, "auxiliary losses are not divided by the micro-batches: re-check both bindings"


def test_the_auto_scaler_adds_its_scale_as_gradient() -> None:
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    hidden, loss = torch.ones(3, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    try:
        MoEAuxLossAutoScaler.set_loss_scale(torch.tensor([0.25]))
        MoEAuxLossAutoScaler.apply(hidden, loss).sum().backward()
    finally:
        MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
    assert loss.grad is not None
    assert loss.grad.item() == 0.25, "re-check moe/bind_megatron.py"


def test_layers_hand_the_padding_mask_to_any_mlp() -> None:
    from megatron.core.transformer.transformer_layer import TransformerLayer

    source = inspect.getsource(TransformerLayer._forward_mlp)
    assert "self.mlp(pre_mlp_layernorm_output, padding_mask=padding_mask)" in source, "re-check MegatronMoE.forward"


def test_ranks_are_numbered_tensor_first_pipeline_last() -> None:
    from megatron.core import parallel_state

    order = inspect.signature(parallel_state.initialize_model_parallel).parameters["order"].default
    assert order == "tp-cp-ep-dp-pp", "re-check parallel/topology.py and Groups.build"


def test_the_loss_of_a_model_can_be_overridden() -> None:
    from megatron.core.models.gpt import GPTModel

    from moescale.models.build import GPT

    assert list(inspect.signature(GPTModel.compute_language_model_loss).parameters) == ["self", "labels", "logits"]
    assert "self.compute_language_model_loss(" in inspect.getsource(GPTModel), (
        "the padded vocabulary would get probability: re-check models/build.py"
    )
    assert GPT.compute_language_model_loss is not GPTModel.compute_language_model_loss


def test_fused_queries_keys_and_values_lie_group_by_group() -> None:
    """models/names.py cuts linear_qkv so; tests/models proves the values. Here: who lays it out."""
    from megatron.core.transformer.attention import SelfAttention

    source = inspect.getsource(SelfAttention.get_query_key_value_tensors)
    assert "num_query_groups_per_partition" in source, "re-check NameMap._qkv"
    assert "[sq, b, hp] --> [sq, b, ng, (np/ng + 2) * hn]" in source, "re-check NameMap._qkv"


def test_latent_attention_takes_transformer_engine_for_present() -> None:
    """Where it is absent: models/latent_attention.py puts that right."""
    if importlib.util.find_spec("transformer_engine") is not None:
        pytest.skip("it is present")
    from megatron.core.transformer import multi_latent_attention

    assert not isinstance(multi_latent_attention.TELinear, type), "its classes are no mocks any more: drop the repair"


def test_a_whole_projection_to_a_latent_is_not_gathered() -> None:
    """`LatentAttention` gives full widths, of this rank's tokens; Megatron's code then cuts and gathers no latent."""
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention

    source = inspect.getsource(MLASelfAttention.get_query_key_value_tensors)
    for condition in (
        "if q_compressed.size(-1) != self.config.q_lora_rank:",
        "if kv_combined.size(-1) != self.config.kv_lora_rank + self.config.qk_pos_emb_head_dim:",
        "k_pos_emb = gather_from_sequence_parallel_region(k_pos_emb, group=self.tp_group)",
    ):
        assert condition in source, "other cases: re-check models/latent_attention.py with the parity cases of latents"


def test_megatrons_copy_over_tensor_ranks_sums_contiguous_gradients_only() -> None:
    """Why parallel/sums.py has a function of its own."""
    from megatron.core.tensor_parallel import mappings

    source = inspect.getsource(mappings._reduce)
    assert "all_reduce(input_.contiguous(), group=group)" in source, "see whether same_then_split_use is still needed"
    assert "return input_" in source


def test_the_tied_embedding_is_marked_on_both_stages() -> None:
    from megatron.core.models.common.language_module.language_module import LanguageModule

    source = inspect.getsource(LanguageModule.setup_embeddings_and_output_layer)
    assert "shared_embedding = True" in source, "re-check Engine.tied_parameters"


def test_gpt_dataset_gives_token_rows_and_its_order() -> None:
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    parameters = inspect.signature(GPTDataset._query_document_sample_shuffle_indices).parameters
    assert list(parameters) == ["self", "idx"], "re-check data/loader.py"
    assert "seed" in inspect.getsource(GPTDataset._build_document_sample_shuffle_indices), "re-check data/loader.py"
    fields = GPTDatasetConfig.__dataclass_fields__
    for name in ("random_seed", "sequence_length", "tokenizer", "create_attention_mask"):
        assert name in fields, f"GPTDatasetConfig.{name} is gone: re-check data/loader.py"


def test_the_blend_is_greedy_and_a_prefix_of_longer_ones() -> None:
    from megatron.core.datasets.helpers_cpp import build_blending_indices

    weights = np.array([0.7, 0.3])
    found = {}
    for size in (10, 50):
        domain_of, sample_of = np.zeros(size, np.int16), np.zeros(size, np.int64)
        build_blending_indices(domain_of, sample_of, weights, 2, size, False)
        found[size] = (domain_of.tolist(), sample_of.tolist())
    assert [part[:10] for part in found[50]] == list(found[10]), "longer budgets see another order: re-check _blend"
    assert found[50][0].count(1) == 15, "re-check data/loader.py: _blend"


# ---------------------------------------------------------------- apex, which is two projects
def test_nvidia_apex_is_told_from_the_other_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyPI's apex has no ``optimizers``; finding out must not import either."""
    from moescale.training import optimizer

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    importlib.invalidate_caches()
    assert not optimizer.apex_is_usable()
    (tmp_path / "apex" / "optimizers").mkdir()
    (tmp_path / "apex" / "optimizers" / "__init__.py").write_text("raise RuntimeError('imported')")
    importlib.invalidate_caches()
    assert optimizer.apex_is_usable()
