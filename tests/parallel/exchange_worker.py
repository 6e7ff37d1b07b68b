"""One rank of the proofs of test_exchange_ranks.py: ``python exchange_worker.py KIND:CASE...``.

Cases run one after the other in the world that the environment describes; each asserts what it is about.
"""

import os
import signal
import sys
import time

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from moescale.base.errors import UserError
from moescale.moe import MoEConfig, MoELayer
from moescale.parallel.exchange import GatheringExchange, TorchExchange, make_exchange
from moescale.parallel.world import leave

torch.set_num_threads(1)
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
D, E = 16, 12
# Every rank draws the same examples.
SAME = settings(
    max_examples=60, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


def drawn(rank, *shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * seed + rank)).to(dtype)


def equal(kind):
    """Any counts, several exchanges in flight, gradients in reverse order: bit for bit torch's exchange."""
    group = dist.group.WORLD
    ours, torchs = make_exchange(kind, group, 20), TorchExchange(group)
    rank, size = dist.get_rank(), dist.get_world_size()
    assert (ours.rank, ours.size) == (rank, size)

    @SAME
    @given(
        st.lists(st.lists(st.integers(0, 5), min_size=size * size, max_size=size * size), min_size=1, max_size=4),
        st.sampled_from([1, 3, 8]),
        st.sampled_from(DTYPES),
        st.one_of(st.none(), st.integers(0, size - 1)),
    )
    def compare(layers, width, dtype, slow):
        results = []
        for exchange in (ours, torchs):
            kept = []
            for number, flat in enumerate(layers):
                if slow == rank:
                    time.sleep(0.002)
                counts = torch.tensor(flat).view(size, size)  # from, to
                experts = torch.stack([counts[rank], counts[rank] + 1], dim=1)
                assert torch.equal(exchange.counts(experts), torch.stack([counts[:, rank], counts[:, rank] + 1], dim=1))
                sent, received = counts[rank].tolist(), counts[:, rank].tolist()
                rows = drawn(rank, sum(sent), width, dtype=dtype, seed=number).requires_grad_()
                kept.append((rows, exchange.rows(rows, sent, received)))
            found = [arrived.detach().clone() for _, arrived in kept]
            for rows, arrived in reversed(kept):
                found.append(torch.autograd.grad((arrived * arrived).sum(), rows)[0])
            results.append(found)
        for got, wanted in zip(*results, strict=True):
            assert got.dtype == wanted.dtype
            assert torch.equal(got, wanted)

    compare()
    ours.close()


def layer(kind):
    """A mixture layer over the exchange is the layer over torch's, ragged and padded, with all that is in between."""
    rank, size = dist.get_rank(), dist.get_world_size()
    exchanges = [make_exchange(kind, dist.group.WORLD, 20), TorchExchange(dist.group.WORLD)]
    assert isinstance(exchanges[0], GatheringExchange) == (kind == "shared")
    for dtype in (torch.float32, torch.bfloat16):
        for padded in (False, True):
            # Capacity of a sequence is the same on all ranks, so padded ranks need as many tokens; ragged ones do not.
            config = MoEConfig(experts=E, active=3, expert_width=8, capacity=1.0 if padded else None, padded=padded)
            tokens = 6 if padded else [9, 0, 4][rank]
            results = []
            for exchange in exchanges:
                torch.manual_seed(0)
                module = MoELayer(D, config, exchange=exchange)
                with torch.no_grad():
                    for parameter in module.parameters():
                        parameter.normal_(std=0.3)
                module.to(dtype)
                x = drawn(rank, tokens, 1, D, dtype=dtype).requires_grad_()
                hidden = module(module(x).hidden).hidden  # the same experts twice
                wanted = [x, *module.parameters()]
                results.append([hidden, *torch.autograd.grad(hidden.float().square().sum(), wanted)])
            for got, wanted in zip(*results, strict=True):
                assert torch.equal(got, wanted)
                assert rank == 1 or got.abs().max() > 0
    assert size <= 3
    exchanges[0].close()


def slow(kind):
    """A rank that is late by far is waited for, and the sleeping wake up."""
    exchange = make_exchange(kind, dist.group.WORLD, 20)
    rank, size = dist.get_rank(), dist.get_world_size()
    for late in range(size):
        if rank == late:
            time.sleep(0.4)
        arrived = exchange.rows(torch.full((size, 2), float(rank)), [1] * size, [1] * size)
        assert arrived[:, 0].tolist() == list(range(size))
    exchange.close()


def memory(kind):
    """Rows outlive their exchange, memory is used again, and nothing with a name is left."""
    exchange = make_exchange(kind, dist.group.WORLD, 20)
    size = dist.get_world_size()
    rows = torch.ones(size, 1000)
    first = exchange.rows(rows, [1] * size, [1] * size)
    place = first.data_ptr()
    second = exchange.rows(2 * rows, [1] * size, [1] * size)
    assert second.data_ptr() != place
    del first
    third = exchange.rows(3 * rows, [1] * size, [1] * size)
    assert third.data_ptr() == place
    exchange.close()
    assert second.eq(2).all()
    assert third.eq(3).all()
    left = {os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")}
    assert not any("moescale exchange" in name for name in left), "the arena's file is still open"


def disagree(kind):
    """Ranks whose counts do not fit together are told so, both."""
    exchange = make_exchange(kind, dist.group.WORLD, 20)
    rows, sent, received = [(3, [0, 3], [0, 0]), (0, [0, 0], [2, 0])][dist.get_rank()]
    with pytest.raises(RuntimeError, match="rank 0 sends 12 bytes to rank 1, which expects 8: "):
        exchange.rows(torch.ones(rows, 1), sent, received)
    with pytest.raises(RuntimeError, match="an earlier exchange failed: rank 0 sends"):
        exchange.counts(torch.ones(2, 1, dtype=torch.int64))
    exchange.close()


def silent(kind):
    """A rank that says nothing is an error when the time is up, not before."""
    exchange = make_exchange(kind, dist.group.WORLD, 1.0)
    pids = [0, 0]
    dist.all_gather_object(pids, os.getpid())
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)  # until rank 0 wakes it
    else:
        began = time.monotonic()
        with pytest.raises(RuntimeError, match=r"rank 1 has not come .* for 1 s \(see runtime.timeout\)"):
            exchange.counts(torch.ones(2, 1, dtype=torch.int64))
        assert 0.9 < time.monotonic() - began < 5
        os.kill(pids[1], signal.SIGCONT)
    exchange.close()


def dies(kind):
    """A rank that is killed is an error at once."""
    exchange = make_exchange(kind, dist.group.WORLD, 600)
    if dist.get_rank() == 1:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 1 ended in the middle of an exchange"):
        exchange.counts(torch.ones(2, 1, dtype=torch.int64))
    assert time.monotonic() - began < 10


def refused(kind):
    """All ranks of a group that cannot use the exchange say why."""
    with pytest.raises(UserError) as refusal:
        make_exchange(kind, dist.group.WORLD, 20)
    print(refusal.value)
    wanted = {"shared": "needs the expert-parallel ranks on one host", "mpi": "start with mpirun"}[kind]
    assert wanted in str(refusal.value)


CASES = {case.__name__: case for case in (equal, layer, slow, memory, disagree, silent, dies, refused)}


def main():
    if "OMPI_COMM_WORLD_SIZE" in os.environ and "RANK" not in os.environ:
        world = int(os.environ["OMPI_COMM_WORLD_SIZE"])
        # The other way round than MPI counts: the exchange must not take one number for the other.
        os.environ["RANK"] = str(world - 1 - int(os.environ["OMPI_COMM_WORLD_RANK"]))
        os.environ["WORLD_SIZE"] = str(world)
    dist.init_process_group("gloo")
    for argument in sys.argv[1:]:
        kind, name = argument.split(":")
        CASES[name](kind)
        print(f"rank {dist.get_rank()}: {argument}", flush=True)
    if name == "dies":
        os._exit(0)  # there is nobody left to say goodbye to
    dist.barrier()  # gloo aborts a rank now and then that leaves while another still sets up a connection
    leave()


if __name__ == "__main__":
    main()
