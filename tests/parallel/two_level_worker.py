"""One of four ranks that exchange as two nodes of two: ``python two_level_worker.py FOLDER RANK RANKS``.

Compares the exchange in two levels with torch's flat one, to the last bit; see test_two_level.py.
"""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moescale.base.errors import UserError
from moescale.parallel.exchange import TorchExchange, TwoLevelExchange, make_exchange

LOCAL, EXPERTS, WIDTH = 2, 3, 5


def compare(flat, other, case):
    """Counts, rows and gradients of several exchanges under way, backward in reverse order."""
    sent_PE = case["counts"][flat.rank]
    received_PE = flat.counts(sent_PE)
    assert torch.equal(other.counts(sent_PE), received_PE)
    sent, received = sent_PE.sum(dim=1).tolist(), received_PE.sum(dim=1).tolist()
    draw = torch.Generator().manual_seed(flat.rank)
    layers = []
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        rows = torch.randn(sum(sent), WIDTH, generator=draw).to(dtype)
        weight = torch.randn(sum(received), WIDTH, generator=draw).to(dtype)
        mine = []
        for exchange in (flat, other):
            leaf = rows.clone().requires_grad_()
            arrived = exchange.rows(leaf, sent, received)
            returned = exchange.rows(arrived * weight, received, sent)
            mine.append((leaf, arrived, returned))
        layers.append(mine)
    for mine in reversed(layers):
        for _, arrived, returned in mine:
            (arrived.sin().sum() + returned.cos().sum()).backward()
        for of_flat, of_other in zip(*mine, strict=True):
            assert of_flat.shape == of_other.shape
            assert torch.equal(of_flat, of_other)
        assert torch.equal(mine[0][0].grad, mine[1][0].grad)


def main():
    folder, rank, ranks = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    flat = TorchExchange(dist.group.WORLD)
    other = make_exchange("two_level", dist.group.WORLD, node=lambda member: member // LOCAL)
    assert isinstance(other, TwoLevelExchange)
    assert (other.size, other.rank, other.local, other.nodes) == (ranks, rank, LOCAL, ranks // LOCAL)
    for case in torch.load(folder / "cases.pt"):
        compare(flat, other, case)
    for node in (lambda member: 0, lambda member: member):  # one node; every rank on its own
        assert isinstance(make_exchange("two_level", dist.group.WORLD, node=node), TorchExchange)
    with pytest.raises(UserError, match=r"these ranks are on the nodes 0, 0, 0, 1"):
        make_exchange("two_level", dist.group.WORLD, node=lambda member: member // 3)
    with pytest.raises(UserError, match="needs CUDA; this group's backend is gloo"):
        make_exchange("nccl", dist.group.WORLD)
    other.close()
    assert len(dist.distributed_c10d._world.pg_map) == 1
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
