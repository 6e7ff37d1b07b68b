"""Everything a rank needs before its first step, built from a run's configuration."""

import gc
from dataclasses import dataclass

import torch

from ..checkpoint.state import LogicalState
from ..data import PreparedData, prepare
from ..data.choices import Choices, encode_choices
from ..data.loader import HeldOut, TrainStream, held_out_sequences
from ..data.tasks import questions_of
from ..models.build import Stage, build_stage
from ..models.initialise import initialise
from ..models.names import NameMap
from ..parallel.engine import Engine
from ..parallel.groups import Groups
from .batches import Batches
from .budget import steps_of
from .config import RunConfig
from .optimizer import make_optimizer
from .passes import Passes
from .schedule import check_schedule


@dataclass
class Setup:
    """The parts of one rank of a run."""

    config: RunConfig
    groups: Groups
    data: PreparedData
    stage: Stage
    engine: Engine
    state: LogicalState
    batches: Batches
    passes: Passes
    held_out: dict[str, HeldOut]
    tasks: list[Choices]
    steps: int


def build(config: RunConfig, groups: Groups) -> Setup:
    """Prepare data, build the model with its initial parameters, and its engine."""
    data = prepare(config.data)
    training = config.training
    steps = steps_of(config, data.vocab_size)
    check_schedule(config, steps)
    tasks = [
        encode_choices(questions, data.tokenizer, training.seq) for questions in questions_of(config.eval.tasks, data)
    ]
    stage = build_stage(
        config.model,
        config.moe,
        vocab=data.vocab_size,
        seq=training.seq,
        dtype=training.dtype,
        groups=groups,
        recompute=training.recompute,
    )
    names = NameMap(config.model, config.moe, groups)
    entries = names.entries(stage)
    initialise(entries.values(), config.model, training.seed)
    engine = Engine(
        stage,
        {entry.parameter: entry.role for entry in entries.values()},
        groups,
        lambda parameter_groups: make_optimizer(config.optimizer, parameter_groups),
        config.parallel.zero,
    )
    stream = TrainStream(data, config.data, training.seq, training.seed)
    gc.freeze()  # imports left a million objects that each full collection would walk over again
    return Setup(
        config=config,
        groups=groups,
        data=data,
        stage=stage,
        engine=engine,
        state=LogicalState(engine, entries, names.buffers(stage)),
        batches=Batches(stream, groups, training.batch),
        passes=Passes(stage, training.seq, training.seed),
        held_out=_held_out(config, data),
        tasks=tasks,
        steps=steps,
    )


def _held_out(config: RunConfig, data: PreparedData) -> dict[str, HeldOut]:
    """Held-out sequences by domain; domains without held-out text are left out."""
    wanted = config.eval.domains or tuple(config.data.domains)
    found = {name: held_out_sequences(data, name, config.training.seq, config.eval.sequences) for name in wanted}
    return {name: sequences for name, sequences in found.items() if sequences.n_tokens}


def peak_memory() -> int:
    """Largest memory use of this process so far, bytes: device memory on CUDA, resident memory on CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
