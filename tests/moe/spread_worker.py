"""One of the ranks over which sequences are spread: ``python spread_worker.py FOLDER RANK RANKS``.

Runs each layer of ``job.pt`` on its own run of positions and stores what it computed; see test_spread_sequences.py.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from moescale.moe import MoEConfig, MoELayer
from moescale.moe.context import RoutingContext


def main():
    folder, rank, ranks = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    found = []
    for case in torch.load(folder / "job.pt"):
        config = MoEConfig.model_validate(case["config"])
        layer = MoELayer(case["x"].shape[-1], config, sequence_group=dist.group.WORLD, batch_first=case["batch_first"])
        layer.load_state_dict(case["state"])
        positions = 1 if case["batch_first"] else 0
        x = case["x"].chunk(ranks, dim=positions)[rank].contiguous().requires_grad_()
        mask = None if case["mask"] is None else case["mask"].chunk(ranks, dim=positions)[rank].contiguous()
        output = layer(x, mask, RoutingContext(**case["context"]))
        ((output.hidden * torch.cos(x.detach())).sum() + output.loss).backward()
        found.append(
            {
                "hidden": output.hidden.detach(),
                "x": x.grad,
                "parameters": {name: p.grad for name, p in layer.named_parameters()},
                "statistics": layer.take_statistics(),
            }
        )
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
