"""One of the ranks that mix in chunks: ``python overlap_worker.py FOLDER RANK RANKS LOCAL``; see test_overlap.py.

LOCAL is the number of ranks on a node; below RANKS the chunks travel in two levels. The layer in one piece, over
torch's exchange, is what the layer in chunks is compared with.
"""

import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from moescale.moe import MoEConfig, MoELayer, overlap
from moescale.parallel.exchange import TorchExchange, make_exchange

D = 16


class Logged:
    """A plan that notes when it starts and when it is waited for."""

    def __init__(self, plan, log, chunk, way):
        self.plan, self.log, self.chunk, self.way = plan, log, chunk, way
        self.leaving, self.arriving = plan.leaving, plan.arriving

    def reversed(self):
        return Logged(self.plan.reversed(), self.log, self.chunk, {">": "<", "<": ">"}[self.way])

    def start(self, rows, into):
        self.log.append(f"{self.way}{self.chunk}")
        return LoggedTransfer(self.plan.start(rows, into), self.log, f"wait {self.way}{self.chunk}")


class LoggedTransfer:
    def __init__(self, transfer, log, text):
        self.transfer, self.log, self.text = transfer, log, text

    def wait(self):
        self.log.append(self.text)
        return self.transfer.wait()


def logged(exchange, log):
    plans = exchange.plans
    exchange.plans = lambda *arguments: [Logged(plan, log, c, ">") for c, plan in enumerate(plans(*arguments))]
    products = overlap._products

    def noting(*arguments):
        log.append("*")
        return products(*arguments)

    return mock.patch.object(overlap, "_products", noting)


def build(config, exchange, chunks, state, dtype):
    layer = MoELayer(D, config, exchange=exchange, exchange_chunks=chunks)
    local = config.experts // exchange.size
    mine = slice(exchange.rank * local, (exchange.rank + 1) * local)
    layer.load_state_dict({n: t[mine] if n.startswith("experts") else t for n, t in state.items()}, strict=False)
    return layer.to(dtype)


def work(layer, x):
    """Output and gradients, twice: they must be the same to the last bit."""
    found = []
    for _ in range(2):
        leaf = x.clone().requires_grad_()
        hidden = layer(leaf).hidden
        wanted = {"x": leaf, **dict(layer.named_parameters())}
        gradients = torch.autograd.grad((hidden * torch.cos(x)).sum(), list(wanted.values()))
        found.append({"y": hidden.detach(), **dict(zip(wanted, gradients, strict=True))})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    return found[0]


def main():
    folder, rank, ranks, local = Path(sys.argv[1]), *map(int, sys.argv[2:])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    flat = TorchExchange(dist.group.WORLD)
    chunked = make_exchange("two_level", dist.group.WORLD, node=lambda member: member // local)
    log = []
    results = []
    with logged(chunked, log):
        for case in torch.load(folder / "cases.pt", weights_only=False):
            config, x = MoEConfig.model_validate(case["config"]), case["x"][rank]
            whole = work(build(config, flat, 1, case["state"], x.dtype), x)
            for chunks in case["chunks"]:
                log.clear()
                layer = build(config, chunked, chunks, case["state"], x.dtype)
                parts = work(layer, x)
                results.append(
                    {
                        "case": case["name"],
                        "chunks": chunks,
                        "log": log[: len(log) // 2],
                        "differences": {n: error(parts[n], whole[n]) for n in whole if not parts[n].equal(whole[n])},
                    }
                )
    torch.save(results, folder / f"{rank}.pt")
    chunked.close()
    dist.destroy_process_group()


def error(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


if __name__ == "__main__":
    main()
