"""What is compared is the same computation: equal parameters, and equal losses from equal weights."""

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from moescale.benchmarks.cases import CASES, Case
from moescale.benchmarks.ours import run_config
from moescale.benchmarks.peers import HuggingFace, Plain
from moescale.data import DataConfig
from moescale.models.counts import count_parameters

TINY = next(case for case in CASES if case.name == "tiny")
MIXTURE = replace(TINY, name="tiny-moe", experts=8, active=2, expert_width=32)


def _data(config: DataConfig, case: Case) -> dict[str, object]:
    tokenizer = config.tokenizer.model_copy(update={"vocab": case.vocab})
    return config.model_copy(update={"tokenizer": tokenizer}).model_dump(mode="json")


def _copy_weights(ours: Any, plain: Plain) -> None:
    logical = {
        piece.name: piece.read(entry.parameter.detach())
        for entry in ours.state.entries.values()
        for piece in entry.pieces
    }
    with torch.no_grad():
        plain.model.embedding.weight.copy_(logical["embedding"])
        plain.model.final_norm.weight.copy_(logical["final_norm"])
        for index, layer in enumerate(plain.model.layers):
            of = {name.removeprefix(f"layers.{index}."): tensor for name, tensor in logical.items()}
            layer.attention_norm.weight.copy_(of["attention_norm"])
            layer.ffn_norm.weight.copy_(of["ffn_norm"])
            layer.qkv.weight.copy_(torch.cat([of[f"attention.{name}"] for name in "qkv"]))
            layer.o.weight.copy_(of["attention.o"])
            layer.gate_up.weight.copy_(torch.cat([of["ffn.gate"], of["ffn.up"]]))
            layer.down.weight.copy_(of["ffn.down"])


def test_the_plain_transformer_computes_what_ours_does(one_rank: Any, own_sources: DataConfig) -> None:
    from moescale.training.setup import build

    ours = build(run_config(TINY, _data(own_sources, TINY)), one_rank)
    plain = Plain(asdict(TINY), _data(own_sources, TINY))
    _copy_weights(ours, plain)
    batch = ours.batches.step(0, micro_batch=TINY.batch)
    expected = ours.passes.evaluate(batch.micro_batches).item() / batch.real_tokens
    (micro,) = batch.micro_batches
    assert plain.loss(micro.tokens, micro.labels).item() == pytest.approx(expected, rel=1e-6)
    tokens, labels = next(plain._batches)
    assert torch.equal(tokens, micro.tokens)
    assert torch.equal(labels, micro.labels)


@pytest.mark.parametrize("case", [TINY, MIXTURE], ids=lambda case: case.name)
def test_peers_have_our_parameters(case: Case, own_sources: DataConfig) -> None:
    expected = count_parameters(case.model(), case.moe(), case.vocab).all
    peers = [HuggingFace] if case.experts else [HuggingFace, Plain]
    for peer in peers:
        built = peer(asdict(case), _data(own_sources, case))
        assert sum(p.numel() for p in built.model.parameters()) == expected


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_hugging_face_runs_as_a_mixture(dtype: str, own_sources: DataConfig) -> None:
    case = replace(MIXTURE, dtype=dtype)
    stepper = HuggingFace(asdict(case), _data(own_sources, case))
    tokens, labels = next(stepper._batches)
    before = stepper.loss(tokens, labels).item()
    note = stepper.warm_up()
    assert note.startswith("OlmoeForCausalLM, experts ")
    assert stepper.loss(tokens, labels).item() < before
