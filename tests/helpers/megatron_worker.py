"""Two ranks that build Megatron-core models, save them with its own ``dist_checkpointing`` and say their logits.

``megatron_worker.py PORT FOLDER``: in the folder a checkpoint and the logits of its ranks for each case.
"""

import os
import sys
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
RANKS = 2


def main(port: str, folder: Path) -> int:
    """Import once, then be both ranks; returns the exit code."""
    from moescale.compat.cuda_standin import install

    install()
    import torch.distributed as dist
    from megatron_cases import CASES

    import moescale.checkpoint.convert.megatron_model  # noqa: F401

    child = os.fork()
    rank = 0 if child else 1
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    for name, case in CASES.items():
        save(name, case, folder, rank)
    dist.destroy_process_group()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) if child else 0


def save(name: str, case: Any, folder: Path, rank: int) -> None:
    """Build a case's model in its layout, with weights that are nowhere all alike; save it and its logits."""
    import torch
    import torch.distributed as dist
    from megatron.core import dist_checkpointing, parallel_state
    from megatron_cases import SEQ, VOCAB

    from moescale.checkpoint.convert.megatron_model import build_model

    parallel_state.initialize_model_parallel(**case.layout)
    model = build_model(case.found, **case.layout, perform_initialization=True).eval()
    with torch.no_grad():
        for kind, values in (*model.named_parameters(), *model.named_buffers()):
            if "norm" in kind or kind.endswith("bias"):  # else ones and zeros
                values.add_(0.1 * torch.randn(values.shape, generator=torch.Generator().manual_seed(len(kind))))
    tokens_BS = torch.randint(0, VOCAB, (2, SEQ), generator=torch.Generator().manual_seed(1))
    logits = forward(model, tokens_BS, rank)
    (folder / name).mkdir(parents=True, exist_ok=True)
    dist.barrier()
    dist_checkpointing.save(model.sharded_state_dict(metadata=dict(case.metadata)), str(folder / name))
    if logits is not None:
        torch.save((tokens_BS, logits[..., :VOCAB]), folder / f"{name}.logits-{rank}.pt")
    dist.barrier()
    parallel_state.destroy_model_parallel()


def forward(model: Any, tokens_BS: Any, rank: int) -> Any:
    """Logits in the layout of the ranks; None on a stage that has none."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    length = tokens_BS.shape[1]
    hidden = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    staged = parallel_state.get_pipeline_model_parallel_world_size() > 1
    with torch.no_grad():
        if staged and rank == 1:
            arrived = torch.empty(length, len(tokens_BS), model.config.hidden_size)
            dist.recv(arrived, 0)
            model.set_input_tensor([arrived])
        out = model(tokens_BS, torch.arange(length).expand_as(tokens_BS), hidden)
        if staged and rank == 0:
            dist.send(out.contiguous(), 1)
            return None
        if parallel_state.get_tensor_model_parallel_world_size() > 1:
            parts = [torch.empty_like(out) for _ in range(RANKS)]
            dist.all_gather(parts, out.contiguous())
            out = torch.cat(parts, dim=-1)
    return out


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
