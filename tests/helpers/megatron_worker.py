"""One of two ranks that build Megatron-core models, save them with its own ``dist_checkpointing`` and say their logits.

``megatron_worker.py RANK PORT FOLDER``: a checkpoint and ``logits.pt`` for each case.
"""

import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"


def main(rank: int, port: str, folder: Path) -> None:
    from moescale.compat.cuda_standin import install

    install()
    import torch
    import torch.distributed as dist
    from megatron_cases import CASES

    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for name, case in CASES.items():
        save(case, folder / name, rank)
    dist.destroy_process_group()


def save(case, folder: Path, rank: int) -> None:  # type: ignore[no-untyped-def]
    import torch
    import torch.distributed as dist
    from megatron.core import dist_checkpointing, parallel_state
    from megatron_cases import SEQ, VOCAB

    from moescale.checkpoint.convert.megatron_model import build_model

    parallel_state.initialize_model_parallel(**case.layout)
    layout = {key: size for key, size in case.layout.items()}
    model = build_model(case.found, **layout, perform_initialization=True).eval()
    generator = torch.Generator().manual_seed(rank)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):  # else they are all ones, all zeros
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
        for name, buffer in model.named_buffers():
            if name.endswith("expert_bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=torch.Generator().manual_seed(len(name))))
    del generator
    tokens_BS = torch.randint(0, VOCAB, (2, SEQ), generator=torch.Generator().manual_seed(1))
    logits = forward(model, tokens_BS, rank)
    folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    dist_checkpointing.save(model.sharded_state_dict(metadata=dict(case.metadata)), str(folder))
    if logits is not None and (rank == 1 or parallel_state.get_pipeline_model_parallel_world_size() == 1):
        torch.save((tokens_BS, logits[..., :VOCAB]), folder.parent / f"{folder.name}.logits-{rank}.pt")
    dist.barrier()
    parallel_state.destroy_model_parallel()


def forward(model, tokens_BS, rank: int):  # type: ignore[no-untyped-def]
    """Logits in the layout of the ranks; None on a stage that has none."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    length = tokens_BS.shape[1]
    position_BS = torch.arange(length).expand_as(tokens_BS)
    hidden = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    pipeline = parallel_state.get_pipeline_model_parallel_world_size() == 2
    with torch.no_grad():
        if pipeline and rank == 1:
            arrived = torch.empty(length, 2, model.config.hidden_size)
            dist.recv(arrived, 0)
            model.set_input_tensor([arrived])
        out = model(tokens_BS, position_BS, hidden)
        if pipeline and rank == 0:
            dist.send(out.contiguous(), 1)
            return None
        if parallel_state.get_tensor_model_parallel_world_size() == 2:
            parts = [torch.empty_like(out) for _ in range(2)]
            dist.all_gather(parts, out.contiguous())
            out = torch.cat(parts, dim=-1)
    return out


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
