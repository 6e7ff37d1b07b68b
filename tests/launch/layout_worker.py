"""Checks layouts of a small mixture in one process: ``layout_worker.py``. Prints what each showed, by name, as JSON.

The layouts marked ``broken`` are checked with a fault in the code that names what a rank holds.
"""

# ruff: noqa: E402
import json
from typing import Any

from moescale.base.config import validate
from moescale.launch.check_layout import Layout, check_layout
from moescale.models import counts
from moescale.training.config import RunConfig
from moescale.training.warm import import_all

import_all()  # with the stand-in for CUDA, before Megatron is imported

from moescale.models import names

RUN: dict[str, Any] = {
    "data": {"domains": {"stdlib": {"source": "stdlib"}}},
    "model": {"layers": 4, "width": 32, "heads": 4, "kv_heads": 2, "ffn": 64, "vocab_multiple": 64, "qk_norm": "full"},
    "moe": {"experts": 8, "active": 2, "expert_width": 16, "shared": 1, "first_dense": 1},
    "training": {"seq": 32, "batch": 16, "steps": 4},
    "optimizer": {"lr": 0.01},
}
MLA = {"kv_rank": 13, "nope_dim": 8, "rope_dim": 6, "value_dim": 10}
LATENTS = {"qk_norm": "none", "kv_heads": 4, "mla": {**MLA, "q_rank": 11}, "yarn": {"factor": 8, "original_seq": 12}}
LATENT_KEYS = {"qk_norm": "none", "kv_heads": 4, "mla": MLA}
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "alone": (1, {}, {}),
    "untied": (1, {}, {"tied": False}),
    "tensor": (2, {"tensor": 2}, {}),
    "tensor without sequence": (2, {"tensor": 2, "sequence": False, "expert_over": "dp"}, {}),
    "pipeline": (2, {"pipeline": 2}, {}),
    "virtual stages": (2, {"pipeline": 2, "virtual_stages": 2}, {"tied": False}),
    "experts over tensor ranks": (8, {"tensor": 2, "expert": 4}, {}),
    "experts over data ranks": (8, {"tensor": 2, "expert": 4, "expert_over": "dp"}, {"qk_norm": "head"}),
    "latents": (4, {"tensor": 2, "pipeline": 2, "expert": 2}, LATENTS),
    "latents without sequence": (2, {"tensor": 2, "sequence": False, "expert_over": "dp"}, LATENT_KEYS),
    "everything": (32, {"tensor": 2, "pipeline": 2, "virtual_stages": 2, "expert": 8}, {}),
}


def check(layout: str) -> dict[str, Any]:
    world, parallel, model = LAYOUTS[layout]
    config = validate(RunConfig, RUN | {"model": RUN["model"] | model, "parallel": parallel}, layout)
    topology = config.check_layout(world)
    found = check_layout(Layout.of(config, 1000, topology), [layout]).as_json()
    return found | {"counted": counts.count_parameters(config.model, config.moe, 1000).all}


def with_every_rank_first(layout: str) -> dict[str, Any]:
    """Every tensor rank believes that it holds the first part of what is cut into equal shares."""
    split = names._split
    names._split = lambda name, local, dimension, rank, ranks: split(name, local, dimension, 0, ranks)
    try:
        return check(layout)
    finally:
        names._split = split


def with_experts_of_all(layout: str) -> dict[str, Any]:
    """Experts are taken for parameters that all data ranks hold."""
    role = names.Role
    names.Role = lambda expert=False, **more: role(**more)
    try:
        return check(layout)
    finally:
        names.Role = role


if __name__ == "__main__":
    found = {layout: check(layout) for layout in LAYOUTS}
    found["broken cut"] = with_every_rank_first("tensor")
    found["broken experts"] = with_experts_of_all("experts over tensor ranks")
    print(json.dumps(found))
