"""One rank of the parity proof: runs cases under a layout and stores what it computed, by logical names.

Started by test_parity.py, one process a rank, as ``python parity_worker.py JOB.json``.
"""

import gc
import json
import sys
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
warnings.filterwarnings("ignore")
torch.set_num_threads(1)

from moescale.base.config import validate
from moescale.compat.cuda_standin import install
from moescale.parallel.launchers import find_place
from moescale.parallel.world import leave, start
from moescale.training.config import RunConfig

install()

import deepspeed.comm
from deepspeed.utils import groups as deepspeed_groups
from parity_judge import Masked

from moescale.data.choices import encode_choices
from moescale.data.task_config import TaskConfig
from moescale.data.tasks import questions_of
from moescale.moe import balance
from moescale.parallel import engine
from moescale.parallel.groups import Groups
from moescale.parallel.noise import SmallBatchGradients
from moescale.parallel.roles import Role
from moescale.training.batches import Batches
from moescale.training.downstream import answer
from moescale.training.evaluate import evaluate
from moescale.training.setup import build
from moescale.training.step import take_step

# An odd number of choices, some of whose contexts are longer than a sequence.
TASK = {"domain": "words", "count": 5, "choices": 3, "context": 40, "length": 12}


def micro_batches_not_averaged():
    step = Batches.step

    def wrong(self, *arguments):
        batch = step(self, *arguments)
        return replace(batch, denominator=batch.denominator / len(batch.micro_batches))

    return mock.patch.object(Batches, "step", wrong)


def loss_as_mean_of_means():
    """Each rank divides by its own labels."""
    step = Batches.step

    def wrong(self, *arguments):
        batch = step(self, *arguments)
        own = sum(micro.mask.sum().item() for micro in batch.micro_batches)
        return replace(batch, denominator=own / len(batch.micro_batches))

    return mock.patch.object(Batches, "step", wrong)


def expert_gradients_not_summed():
    all_reduce = deepspeed.comm.all_reduce

    def wrong(tensor, *arguments, group=None, **keywords):
        if group is not deepspeed_groups._get_expert_data_parallel_group("ep_size_1"):
            all_reduce(tensor, *arguments, group=group, **keywords)

    return mock.patch.object(deepspeed.comm, "all_reduce", wrong)


def expert_gradients_over_all_data_ranks():
    """What DeepSpeed does when its gradients are not contiguous."""
    settings = engine._settings

    def wrong(*arguments, **keywords):
        found = settings(*arguments, **keywords)
        found["zero_optimization"]["contiguous_gradients"] = False
        return found

    return mock.patch.object(engine, "_settings", wrong)


def experts_left_out_of_norm():
    weight = Role.norm_weight
    return mock.patch.object(Role, "norm_weight", lambda self, *a, **k: 0.0 if self.expert else weight(self, *a, **k))


MUTATIONS = {
    "": nullcontext,
    "micro-batches-not-averaged": micro_batches_not_averaged,
    "loss-as-mean-of-means": loss_as_mean_of_means,
    "expert-gradients-not-summed": expert_gradients_not_summed,
    "expert-gradients-over-all-data-ranks": expert_gradients_over_all_data_ranks,
    "experts-left-out-of-norm": experts_left_out_of_norm,
    "replicas-counted-in-norm": lambda: mock.patch.object(Role, "norm_weight", return_value=1.0),
    "tied-embedding-not-summed": lambda: mock.patch.object(engine.Engine, "tied_parameters", return_value=[]),
    "sequence-parallel-not-summed": lambda: mock.patch.object(engine, "all_reduce_together", return_value=None),
    "load-balance-of-a-part": lambda: mock.patch.object(balance, "sum_then_same_everywhere", lambda x, group: x),
    "noise-of-one-rank": lambda: mock.patch.object(SmallBatchGradients, "_sum_over_replicas", return_value=None),
}


def capture_gradients(setup, into):
    """Store the reduced gradients just before each optimizer step uses them."""
    engine = setup.engine
    step = engine.step

    def capturing(lr):
        held = [(p, first, g.clone()) for p, first, g in engine.reduced_gradients()]
        into.append(boxes(box for one in setup.state.held_as("gradient", held) for box in one.boxes()))
        step(lr)

    engine.step = capturing


def boxes(found):
    return [(b.part, b.piece.name, b.piece.shape, b.piece.start, b.values.to("cpu", copy=True)) for b in found]


def run_case(case, place):
    config = validate(RunConfig, case["config"], case["name"])
    topology = config.check_layout(place.world, case["node_ranks"])
    groups = Groups.build(topology, config.parallel.exchange, 60.0, config.parallel.exchange_chunks)
    setup = build(config, groups)
    if case["masked"]:
        setup.batches.stream = Masked(setup.batches.stream)
    gradients = []
    capture_gradients(setup, gradients)
    results = []
    for step in range(case["steps"]):
        measure = config.noise.every > 0
        results.append(take_step(setup, step, config.optimizer.lr, measure_noise=measure, stop_asked=False))
    stored = {"results": results, "gradients": gradients, "state": boxes(setup.state.boxes())}
    (held_out,) = setup.held_out.values()
    stored["held_out"] = held_out
    stored["score"] = evaluate(setup.passes, groups, held_out, config.training.seq)
    tasks = questions_of({"words": TaskConfig.model_validate({"continuations": TASK})}, setup.data)
    choices = encode_choices(tasks[0], setup.data.tokenizer, config.training.seq)
    stored["answers"] = answer(setup.passes, groups, choices, config.training.seq)
    parameters = {
        piece.name: piece.read(entry.parameter.detach()).to("cpu", copy=True)
        for entry in setup.state.entries.values()
        for piece in entry.pieces
        if all(s == e for s, e in zip(piece.shape, piece.extent, strict=True))
    }
    stored["replicated"] = parameters  # whole tensors on this rank: every replica must agree
    setup.engine.close()
    groups.destroy()
    return stored


def main():
    job = json.loads(Path(sys.argv[1]).read_text())
    place = find_place()
    start(place, 120)
    for case in job["cases"]:
        with MUTATIONS[case["mutation"]]():
            stored = run_case(case, place)
        torch.save(stored, Path(job["out"]) / f"{case['name']}.{place.rank}.pt")
        # A case's process groups end, with their threads, when the engine that holds them is collected.
        del stored
        gc.unfreeze()
        gc.collect()
    leave()


if __name__ == "__main__":
    main()
