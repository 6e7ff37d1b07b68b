"""A study as its runs would have recorded it: made-up losses from a known law, written by the real writer."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moescale.scaling.points import Point, point_from_record
from moescale.scaling.record import Record, RecordWriter, read_record

FAMILIES = {"dense": None, "E8G2": (16, 2, 2.0), "E8G4": (32, 4, 4.0)}
GAIN = {"dense": 0.0, "E8G2": 0.09, "E8G4": 0.13}  # nats by which a family beats dense at equal size and tokens


def header(name: str = "run", attempt: int = 1, **more: Any) -> dict[str, Any]:
    """The content of a header line."""
    return {
        "run": name,
        "attempt": attempt,
        "resumed_from": None,
        "scientific_hash": "5c1e",
        "config_hash": "c0f1",
        "code_version": "0.1.0",
        "data_hash": "da7a",
        "tokenizer_hash": "70ce",
        "seed": 0,
        "threads": 1,
        "topology": {"world": 1, "tensor": 1, "pipeline": 1, "data": 1, "expert": 1, "expert_data": 1},
        "parameters": {"total": 50_000, "active": 50_000, "embedding": 32_768, "router": 0},
        "flops_per_token": {"exact": 500_000.0, "six_n": 300_000.0},
        "mixture": None,
        "conventions": {"n": "non-embedding parameters", "attention": "causal, counted in full"},
        **more,
    }


def step(number: int, loss: float = 3.0, **more: Any) -> dict[str, Any]:
    """The content of a step line."""
    return {
        "step": number,
        "tokens": 512 * number,
        "flops": 2.56e8 * number,
        "seconds": 0.01,
        "loss": loss,
        "aux_loss": None,
        "z_loss": None,
        "lr": 0.01,
        "batch_tokens": 512,
        "grad_norm": {"total": 1.25, "dense": 1.25, "expert": None},
        "noise": None,
        "router": [],
        "tokens_per_second": 51_200.0,
        "tflops": 0.0256,
        "mfu": None,
        "memory_bytes": 400_000_000,
        **more,
    }


def evaluation(number: int, loss: float = 3.1, domain: str = "held_out", **more: Any) -> dict[str, Any]:
    """The content of an eval line."""
    return {
        "step": number,
        "tokens": 512 * number,
        "flops": 2.56e8 * number,
        "domain": domain,
        "loss": loss,
        "bits_per_byte": 0.62 * loss,
        "score": None,
        "n_tokens": 32_768,
        **more,
    }


def ending(number: int, state: str = "done", why: str = "") -> dict[str, Any]:
    """The content of an end line."""
    totals = {"steps": number, "tokens": 512 * number, "flops": 2.56e8 * number, "seconds": 0.01 * number}
    return {"state": state, "why": why, "totals": totals}


@pytest.fixture
def lines() -> SimpleNamespace:
    """Makers of the contents of record lines."""
    return SimpleNamespace(header=header, step=step, evaluation=evaluation, ending=ending)


def true_loss(family: str, n: float, d: float) -> float:
    return 1.4 + 12 / n**0.28 + 60 / d**0.31 + 0.9 - GAIN[family]


def write_run(folder: Path, family: str, width: int, budget: float, seed: int, rng: np.random.Generator) -> None:
    """One run of a family at a budget, with curves, evaluations, noise measurements and router loads."""
    active, embedding = 24 * width**2, 1024 * width
    per_token = 6.0 * active + 6.0 * embedding
    steps = 60
    batch = max(int(budget / per_token / steps), 1)
    kind = FAMILIES[family]
    mixture = kind and {"experts": kind[0], "active": kind[1], "granularity": kind[2], "shared": 0, "layers": 2}
    total = active if not kind else 8 * width**2 + 16 * width**2 * kind[0] // kind[1]
    writer = RecordWriter(folder)
    counts = {"total": total, "active": active, "embedding": embedding, "router": 0}
    flops = {"exact": per_token, "six_n": 6.0 * active}
    writer.header(header(folder.name, seed=seed, parameters=counts, flops_per_token=flops, mixture=mixture))
    final = true_loss(family, active, batch * steps) + 0.008 * rng.standard_normal()
    for i in range(1, steps + 1):
        loss = final + (7 - final) * (1 - i / steps) ** 2 * math.exp(-4 * i / steps) + 0.02 * rng.standard_normal()
        so_far = {"tokens": batch * i, "flops": per_token * batch * i, "batch_tokens": batch}
        parts = {"g2": 0.5 + 0.1 * rng.standard_normal(), "trace": 500 * 20 / loss, "b_simple": None}
        noise = {"all": parts, "dense": parts, "expert": None, "b_small": batch / 8, "b_big": float(batch)}
        load = {"cv": 0.2, "entropy": 2.0, "dropped": 0.0, "dead": 0.0, "p95_load": 1.3}
        violation = 2.0 * math.exp(-i / 15) + 0.4 + 0.05 * rng.standard_normal()
        router = [{"layer": j, "max_violation": violation, **load} for j in range(2)] if kind else []
        writer.step(step(i, loss, **so_far, noise=noise if i % 5 == 0 else None, router=router))
    tokens = {"tokens": batch * steps, "flops": per_token * batch * steps}
    for domain, shift in (("held_out", 0.0), ("stdlib", 0.0), ("topics", 0.35)):
        writer.eval(evaluation(steps, final + shift, domain, **tokens))
    writer.end(ending(steps))
    writer.close()


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Points and records of three families at three budgets, with three seeds in one cell and one failed run."""
    folder = tmp_path_factory.mktemp("study")
    rng = np.random.default_rng(7)
    families: dict[str, str] = {}
    for family in FAMILIES:
        for budget, widths in ((1e11, (16, 24, 32, 48)), (3e11, (24, 32, 48, 64)), (1e12, (32, 48, 64, 96))):
            for width in widths:
                for seed in (0, 1, 2) if (budget, width) == (3e11, 48) else (0,):
                    name = f"{family}-{budget:.0e}-w{width}-s{seed}"
                    write_run(folder / name, family, width, budget, seed, rng)
                    families[name] = family
    writer = RecordWriter(folder / "dense-failed")
    writer.header(header("dense-failed"))
    writer.step(step(1, math.nan))
    writer.end(ending(1, "failed", "loss is not finite at step 1"))
    writer.close()
    families["dense-failed"] = "dense"
    records: dict[str, Record] = {name: read_record(folder / name, strict=True) for name in families}
    points: list[Point] = [point_from_record(records[name], name, families[name]) for name in families]
    return SimpleNamespace(folder=folder, records=records, points=points)
