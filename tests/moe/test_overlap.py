"""Mixing in chunks computes what mixing in one piece does, in the order that overlaps travel with products."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moescale.moe import MoEConfig, MoELayer
from moescale.moe.overlap import chunk_order

D, E = 16, 8
CASES: dict[str, dict[str, Any]] = {
    "ragged": {},
    "bf16": {"dtype": torch.bfloat16},
    "some ranks without tokens": {"tokens": (0, 9, 0, 4)},
    "nobody has tokens": {"tokens": (0, 0, 0, 0)},
    "all to one expert": {"favourite": 3},
    "drops": {"config": {"capacity": 0.6}},
    "padded": {"config": {"capacity": 1.5, "padded": True}, "tokens": (6, 6, 6, 6)},
}


def test_experts_of_a_chunk_become_neighbours() -> None:
    """Two peers, two chunks of three experts each."""
    index_TK = torch.tensor([list(range(12)), [-1, 12, 100, -5, *range(8)]])
    wanted = [0, 1, 2, 6, 7, 8, 3, 4, 5, 9, 10, 11]
    found = chunk_order(index_TK, peers=2, chunks=2, each=3)
    assert found[0].tolist() == wanted
    assert found[1].tolist() == [-1] * 4 + wanted[:8]


class Whole:
    """An exchange that cannot work on its own."""

    size, rank = 2, 0


def test_chunks_that_cannot_be_are_refused() -> None:
    config = MoEConfig(experts=E, active=2, expert_width=8)
    with pytest.raises(ValueError, match=r"chunks of an exchange \(3\) must divide the experts of a rank \(4\)"):
        MoELayer(D, config, exchange=Whole(), exchange_chunks=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Whole cannot exchange while a rank computes"):
        MoELayer(D, config, exchange=Whole(), exchange_chunks=2)  # type: ignore[arg-type]


def case(name: str, make_layer: Callable[..., Any], ranks: int) -> dict[str, Any]:
    options = CASES[name]
    config = MoEConfig(experts=E, active=2, expert_width=8, shared=1, **options.get("config", {}))
    layer = make_layer(D, config)
    draw = torch.Generator().manual_seed(3)
    x = [torch.randn(tokens, 1, D, generator=draw) for tokens in options.get("tokens", (7, 5, 3, 8))[:ranks]]
    if "favourite" in options:
        for one in x:
            one[..., 0] = 1.0
        with torch.no_grad():
            layer.router.weight[options["favourite"], 0] = 30.0
    return {
        "name": name,
        "config": config.model_dump(),
        "state": layer.state_dict(),
        "x": [one.to(options.get("dtype", torch.float32)) for one in x],
        "chunks": [n for n in (2, 4) if E // ranks % n == 0],
    }


def spawn(folder: Path, cases: list[dict[str, Any]], ranks: int, local: int) -> list[list[dict[str, Any]]]:
    """What each rank found."""
    torch.save(cases, folder / "cases.pt")
    command = [sys.executable, str(Path(__file__).with_name("overlap_worker.py")), str(folder)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(ranks), str(local)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(ranks)
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, said, strict=True):
        assert process.returncode == 0, output
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


def schedule(chunks: int) -> list[str]:
    """Starts, waits and products of a forward and a backward pass."""
    last_first = range(chunks)[::-1]
    forward = [f">{c}" for c in range(chunks)]
    for c in range(chunks):
        forward += [f"wait >{c}", "*", f"<{c}"]
    forward += [f"wait <{c}" for c in range(chunks)]
    backward = [f">{c}" for c in last_first]
    for c in last_first:
        backward += [f"wait >{c}", f"<{c}"]
    return forward + backward + [f"wait <{c}" for c in range(chunks)]


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "local"), [(2, 2), (4, 2)], ids=["2 ranks", "4 ranks in two levels"])
def test_chunks_are_the_whole(ranks: int, local: int, make_layer: Callable[..., Any], tmp_path: Path) -> None:
    found = spawn(tmp_path, [case(name, make_layer, ranks) for name in CASES], ranks, local)
    assert {(one["case"], one["chunks"]) for one in found[0]} >= {(name, 2) for name in CASES}
    for rank, results in enumerate(found):
        for one in results:
            what = f"{one['case']}, {one['chunks']} chunks, rank {rank}"
            assert one["differences"] == {}, what  # to the last bit
            assert one["log"] == schedule(one["chunks"]), what
