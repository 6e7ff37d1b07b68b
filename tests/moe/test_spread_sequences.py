"""Sequences spread over ranks (sequence parallelism) are balanced, dropped and counted as whole ones.

Two processes with a gloo group, each with half of the positions, against one process with all of them.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moescale.moe import MoEConfig, MoELayer
from moescale.moe.context import RoutingContext

S, B, D, RANKS = 10, 3, 16, 2
AHEAD = {"grouping": "sequence", "allow_future_leak": True}
# Arguments of a RoutingContext; ids are those of whole sequences.
CONTEXT = {
    "token_ids_BS": torch.arange(B * S).view(B, S) * 7 % 11,
    "sample_B": torch.tensor([5, 3, 8]),
    "step": 2,
    "seed": 1,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "sequence": {"balance": "sequence"},
    "global, bias": {"balance": "global", "bias_rate": 0.05},
    "micro batch": {"balance": "micro_batch"},
    "capacity by probability": {"capacity": 0.8},
    "capacity by position": {"capacity": 0.8, "drop": "position"},
    "capacity of the micro-batch": {"capacity": 0.7, "capacity_scope": "micro_batch"},
    "capacity of the micro-batch by position": {"capacity": 0.7, "capacity_scope": "micro_batch", "drop": "position"},
    "padded": {"capacity": 0.8, "padded": True},
    "groups of experts": {"groups": 2, "score": "sigmoid_normalized"},
    "jitter": {"jitter": 0.2},
    "hash": {"router": "hash"},
    "forced": {"router": "forced", "skew": 1.0},
    "experts choose at a position": {"router": "expert_choice"},
    "experts choose in a sequence": {"router": "expert_choice", **AHEAD},
    "balanced at a position": {"router": "sinkhorn"},
    "balanced in a sequence": {"router": "sinkhorn", **AHEAD},
}
LAYOUTS = {"": (False, False), ", batch first": (True, False), ", masked": (False, True), ", both": (True, True)}
CASES = {f"{name}{layout}": (options, *LAYOUTS[layout]) for name, options in OPTIONS.items() for layout in LAYOUTS}


@pytest.fixture(scope="module")
def whole_and_spread(
    make_layer: Callable[..., MoELayer], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[MoELayer, dict[str, Any], list[dict[str, Any]]]]:
    """(layer on one rank, its case, what each rank found) by name of the case."""
    folder = tmp_path_factory.mktemp("spread")
    layers, jobs = [], []
    for number, (options, batch_first, masked) in enumerate(CASES.values()):
        config = MoEConfig(experts=4, active=2, expert_width=8, shared=1, aux_loss=0.5, z_loss=0.2, **options)
        layer = make_layer(D, config, batch_first=batch_first)
        layer.balance.observe(torch.tensor([9.0, 1.0, 4.0, 6.0]))
        draw = torch.Generator().manual_seed(number)
        shape = (B, S) if batch_first else (S, B)
        mask = torch.rand(shape, generator=draw) > 0.3 if masked else None
        x = torch.randn(*shape, D, generator=draw)
        state = {name: value.clone() for name, value in layer.state_dict().items()}
        layers.append(layer)
        jobs.append(
            {
                "config": config.model_dump(),
                "state": state,
                "x": x,
                "mask": mask,
                "batch_first": batch_first,
                "context": CONTEXT,
            }
        )
    torch.save(jobs, folder / "job.pt")
    worker = Path(__file__).with_name("spread_worker.py")
    ranks = [
        subprocess.Popen([sys.executable, str(worker), str(folder), str(rank), str(RANKS)]) for rank in range(RANKS)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0] * RANKS
    found = [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]
    return {
        name: (layer, job, list(parts)) for name, layer, job, *parts in zip(CASES, layers, jobs, *found, strict=True)
    }


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_spread_is_whole(name: str, whole_and_spread: Any) -> None:
    layer, job, parts = whole_and_spread[name]
    positions = 1 if job["batch_first"] else 0
    x = job["x"].clone().requires_grad_()
    output = layer(x, job["mask"], RoutingContext(**CONTEXT))
    ((output.hidden * torch.cos(x.detach())).sum() + output.loss).backward()
    for key, value in (("hidden", output.hidden.detach()), ("x", x.grad)):
        torch.testing.assert_close(torch.cat([part[key] for part in parts], dim=positions), value, rtol=1e-4, atol=1e-5)
    for key, parameter in layer.named_parameters():
        summed = sum(part["parameters"][key] for part in parts)
        torch.testing.assert_close(summed, parameter.grad, rtol=1e-4, atol=1e-5)
    statistics = layer.take_statistics()
    torch.testing.assert_close(sum(part["statistics"] for part in parts), statistics)
    if layer.config.capacity is not None:
        assert statistics[layer.config.experts] > 0, "nothing was dropped: the case shows nothing"
