"""Lets Megatron-core run where there is no CUDA device.

Megatron-core 0.16 asks for CUDA devices, streams and generators in places that a CPU run passes through. This
module answers those calls with their CPU counterparts. Our entry points install it, before ``megatron.core`` is
imported; importing moescale does not, and where CUDA exists it is never installed.

Each replacement below names who calls the original. tests/compat/test_cuda_standin.py shows that each is needed.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

_installed = False


def install() -> bool:
    """Install the stand-in if there is no CUDA device; safe to call twice.

    Returns:
        Whether the stand-in is in place.
    """
    global _installed
    if torch.cuda.is_available():
        return False
    if not _installed:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found nothing better
        # Megatron says at import which CUDA packages it lacks: nothing that anybody could do something about here.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
        _replace_devices()
        _replace_generators()
        _replace_schedule_factories()
        _installed = True
    return True


def _replace_devices() -> None:
    # tensor-parallel layers, mappings and pipeline communication allocate on the current device.
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    # pipeline communication waits for the device after receiving.
    torch.cuda.synchronize = lambda device=None: None
    # LanguageModule moves the tied embedding to the device before its first reduction.
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def _replace_generators() -> None:
    # model_parallel_cuda_manual_seed and the tracker keep one state for each kind of random number; on CPU the
    # states are those of the one CPU generator.
    torch.cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    torch.cuda.manual_seed = lambda seed: torch.manual_seed(seed)  # type: ignore[assignment]

    import megatron.core.tensor_parallel.random as megatron_random

    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    megatron_random.CudaRNGStatesTracker.fork = _fork


@contextlib.contextmanager
def _fork(tracker: Any, name: str = "model-parallel-rng") -> Iterator[None]:
    """`CudaRNGStatesTracker.fork` over the CPU generator (the original warns that the CPU state moved)."""
    if name not in tracker.states_:
        raise KeyError(f"the random state {name!r} was never added")
    outside = torch.get_rng_state()
    torch.set_rng_state(tracker.states_[name])
    try:
        yield
    finally:
        tracker.states_[name] = torch.get_rng_state()
        torch.set_rng_state(outside)


class _CpuFactories(ModuleType):
    """``torch`` as the schedules see it: ``zeros(device="cuda")`` gives a CPU tensor, the rest is torch's own."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(*args, **{**kwargs, "device": "cpu"})


def _replace_schedule_factories() -> None:
    # The schedules count tokens in a tensor made with device="cuda". Only their view of torch is replaced, so that
    # nobody else's factories change.
    import megatron.core.pipeline_parallel.schedules as schedules

    schedules.torch = _CpuFactories("torch")
