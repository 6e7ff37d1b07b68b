"""Run by test_cuda_standin.py in a process of its own: what happens without each replacement.

Prints JSON: for the untouched originals whether calling them raises, and for each replacement whether a small
training step still works once the original is put back in its place.
"""

import importlib
import json
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch

warnings.filterwarnings("ignore")
torch.set_num_threads(1)

# Where each replacement lies: (module or class, attribute).
PLACES = {
    "current_device": ("torch.cuda", "current_device"),
    "synchronize": ("torch.cuda", "synchronize"),
    "Tensor.cuda": ("torch.Tensor", "cuda"),
    "get_rng_state": ("torch.cuda", "get_rng_state"),
    "manual_seed": ("torch.cuda", "manual_seed"),
    "_get_cuda_rng_state": ("megatron.core.tensor_parallel.random", "_get_cuda_rng_state"),
    "_set_cuda_rng_state": ("megatron.core.tensor_parallel.random", "_set_cuda_rng_state"),
    "fork": ("megatron.core.tensor_parallel.random.CudaRNGStatesTracker", "fork"),
    "schedules.torch": ("megatron.core.pipeline_parallel.schedules", "torch"),
}


def owner(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        return getattr(importlib.import_module(module), name)


def failure(work: Callable[[], object]) -> str | None:
    try:
        work()
    except Exception as error:
        return type(error).__name__
    return None


logged: list[logging.LogRecord] = []


class Collect(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        logged.append(record)


def train_one_step(groups: Any) -> None:
    """What a run asks of Megatron: random states, a model with recomputation, the schedule, and on several ranks the
    calls around sending and the tied embedding."""
    import megatron.core.tensor_parallel.random as random
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from moescale.models.build import build_stage
    from moescale.models.config import ModelConfig
    from moescale.models.initialise import initialise
    from moescale.models.names import NameMap

    logged.clear()
    random.model_parallel_cuda_manual_seed(0, force_reset_rng=True)
    default = torch.Generator().manual_seed(0).get_state()
    assert torch.equal(torch.get_rng_state(), default), "adding the named states moved the default one"
    tracker = random.get_cuda_rng_tracker()
    outside = torch.get_rng_state()
    with tracker.fork():
        first = torch.rand(4)
    assert torch.equal(torch.get_rng_state(), outside), "forking moved the outer state"
    with tracker.fork():
        assert not torch.equal(torch.rand(4), first), "the forked state does not go on"
    assert not logged, "forking warns of what is meant"
    states = [state.tobytes() for state in (s.numpy() for s in tracker.get_states().values())]
    assert len(set(states)) == len(states), "two kinds of random numbers share a state"
    model = ModelConfig(layers=1, width=16, heads=2)
    stage = build_stage(model, None, vocab=20, seq=8, dtype="fp32", groups=groups, recompute="full").train()
    initialise(NameMap(model, None, groups).entries(stage).values(), model, 0)
    tokens = torch.zeros(2, 8, dtype=torch.int64)

    def forward_step(_: Any, gpt: Any) -> Any:
        losses = gpt(tokens, torch.arange(8).expand(2, -1), None, labels=tokens)
        return losses, lambda out: (out.mean(), out.mean().detach())

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter([None]),
        model=list(stage),
        num_microbatches=1,
        seq_length=8,
        micro_batch_size=2,
        forward_only=False,
    )
    torch.cuda.synchronize()  # p2p_communication, after receiving
    stage[0].embedding.word_embeddings.weight.data.cuda()  # LanguageModule, for a tied embedding on two stages


def main() -> dict[str, Any]:
    assert not torch.cuda.is_available()
    logging.getLogger("megatron.core.tensor_parallel.random").addHandler(Collect())
    untouched = {
        "current_device": failure(torch.cuda.current_device),
        "synchronize": failure(torch.cuda.synchronize),
        "Tensor.cuda": failure(lambda: torch.zeros(1).cuda()),
        "get_rng_state": failure(torch.cuda.get_rng_state),
        "schedules.torch": failure(lambda: torch.zeros([], device="cuda")),
    }
    before = {name: getattr(owner(path), attribute) for name, (path, attribute) in PLACES.items()}

    from moescale.compat import cuda_standin

    assert all(getattr(owner(path), attribute) is before[name] for name, (path, attribute) in PLACES.items())
    installed = cuda_standin.install() and cuda_standin.install()
    replaced = {name: getattr(owner(path), attribute) for name, (path, attribute) in PLACES.items()}

    from moescale.parallel.groups import Groups
    from moescale.parallel.launchers import Place
    from moescale.parallel.topology import Topology
    from moescale.parallel.world import leave, start

    start(Place(0, 1, 0, 1), 60)
    groups = Groups.build(Topology())
    whole = failure(lambda: train_one_step(groups))
    without = {}
    for name, (path, attribute) in PLACES.items():
        setattr(owner(path), attribute, before[name])
        without[name] = failure(lambda: train_one_step(groups))
        setattr(owner(path), attribute, replaced[name])
    again = failure(lambda: train_one_step(groups))
    leave()
    return {
        "untouched": untouched,
        "installed": installed,
        "not replaced": [name for name in PLACES if replaced[name] is before[name]],
        "whole": whole,
        "without": without,
        "again": again,
    }


print(json.dumps(main()))
