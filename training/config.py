"""RunConfig: one run, composed of the sections that the lower folders own, cross-checked here."""

import math
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

from ..base.config import apply_overrides, load_yaml, merge, validate
from ..base.errors import UserError
from ..base.files import digest
from ..checkpoint.config import CheckpointConfig
from ..data.config import DataConfig
from ..data.task_config import TaskConfig, check_task_name
from ..models.config import ModelConfig
from ..moe.config import MoEConfig
from ..parallel.config import OVERLAPPING, ParallelConfig, RuntimeConfig
from ..parallel.topology import Topology
from ..scaling.record_schema import HELD_OUT
from .logging_config import LoggingConfig

CONFIG = "config.yaml"  # of a run, resolved, in its folder
BUDGETS = ("tokens", "flops", "steps")
# What does not change the result; everything else is hashed.
UNSCIENTIFIC = ("parallel", "runtime", "logging", "checkpoint")
# Keys that came after runs had been named by their hashes: left out of them where they change nothing.
LATER = {
    "model": ("norm_eps", "rotary_fraction", "qkv_bias", "mla", "yarn"),
    "eval": ("tasks",),
    "checkpoint": ("keep_every", "async_"),
    "logging": ("wandb",),
}


class OptimizerConfig(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """AdamW (Loshchilov & Hutter 2019), or plain gradient descent, which keeps nothing besides the parameters.

    Weight decay acts on matrices, not on norm gains.
    """

    impl: Literal["auto", "torch", "apex", "sgd"] = Field("auto", description="whose AdamW; sgd: gradient descent")
    lr: float = Field(gt=0, description="peak learning rate")
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    clip: float = Field(1.0, ge=0, description="largest global gradient norm; 0: no clipping")

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key in ("betas", "eps"):
            value = getattr(self, key)
            if self.impl == "sgd" and value != OptimizerConfig.model_fields[key].default:
                raise ValueError(f"optimizer.{key} ({value}) means nothing with optimizer.impl sgd; leave it out")
        return self


class Parent(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """The trunk that a decay branch starts from."""

    run: str = Field(description="folder of the trunk run; a relative one starts from the branch's own folder")
    step: int = Field(ge=1, description="a branch step that the trunk kept a checkpoint of")


class ScheduleConfig(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """Learning rate over steps.

    ``wsd`` (warm-up, stable, decay) runs can branch: a trunk with ``branches`` keeps a checkpoint where the decay
    of each shorter budget starts, and a run with ``parent`` starts there, so many budgets share one trunk.
    """

    kind: Literal["constant", "cosine", "wsd"] = "cosine"
    warmup: float = Field(0.05, ge=0, description="share of the steps if below 1, else a number of steps")
    decay: float = Field(0.2, gt=0, le=1, description="wsd: share of the steps in which lr falls linearly")
    min_ratio: float = Field(0.1, ge=0, le=1, description="final lr over peak lr")
    branches: tuple[int, ...] = Field((), description="wsd trunk: total steps of each branch")
    parent: Parent | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.branches or self.parent) and self.kind != "wsd":
            raise ValueError(f"schedule.branches and schedule.parent need schedule.kind wsd, not {self.kind}")
        if (self.branches or self.parent) and 0 < self.warmup < 1:
            raise ValueError(
                f"schedule.warmup ({self.warmup:g}): a trunk and its branches share a warm-up, so give it in steps"
            )
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ValueError(f"schedule.warmup ({self.warmup:g}): a number of steps must be whole")
        return self


class TrainingConfig(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """Batch, budget, precision, seed. Exactly one of ``tokens``, ``flops`` and ``steps``."""

    seq: int = Field(ge=2, description="tokens in a sequence")
    batch: int = Field(ge=1, le=10_000_000, description="sequences in a global batch")
    micro_batch: int | None = Field(
        None, ge=1, description="sequences a rank computes at once; default: all of its own"
    )
    tokens: float | None = Field(None, gt=0)
    flops: float | None = Field(None, gt=0, description="training FLOPs by the exact count")
    steps: int | None = Field(None, ge=1)
    dtype: Literal["fp32", "bf16"] = "fp32"
    seed: int = Field(0, ge=0)
    recompute: Literal["none", "full"] = "none"

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [key for key in BUDGETS if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(
                f"training: give exactly one of tokens, flops, steps (given: {', '.join(given) or 'none'})"
            )
        return self


class NoiseConfig(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """The gradient noise scale (McCandlish et al. 2018, appendix A.1)."""

    every: int = Field(0, ge=0, description="steps between measurements; 0: never")
    small_batch: int | None = Field(
        None, ge=1, description="sequences in the small batch; default: an eighth of the batch"
    )


class EvalConfig(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """Evaluation on held-out documents and domains, and on downstream tasks; always once at the end."""

    every: int = Field(0, ge=0, description="steps between evaluations; 0: only at the end")
    domains: tuple[str, ...] = Field((), description="default: all of the data section")
    sequences: int = Field(256, ge=1, description="at most so many held-out sequences of each domain")
    tasks: dict[str, TaskConfig] = Field({}, description="multiple-choice tasks by name (docs/downstream.md)")

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in self.tasks:
            check_task_name(name)
        return self


class RunConfig(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """One run."""

    name: str = Field("run", min_length=1, max_length=200)
    model: ModelConfig
    moe: MoEConfig | None = None
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig
    noise: NoiseConfig = NoiseConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        model, moe, parallel = self.model, self.moe, self.parallel
        if model.max_seq is not None and self.training.seq > model.max_seq:
            raise ValueError(f"training.seq ({self.training.seq}) exceeds model.max_seq ({model.max_seq})")
        if moe is not None:
            moe.width_of_expert(model.width)
            if not any(moe.is_mixture(layer) for layer in range(model.layers)):
                raise ValueError(
                    f"moe.first_dense ({moe.first_dense}) and moe.every ({moe.every}) leave no mixture "
                    f"among model.layers ({model.layers})"
                )
        if parallel.zero == 0 and self.training.dtype == "bf16":
            raise ValueError("parallel.zero (0) works in fp32 only; with training.dtype bf16 use parallel.zero=1")
        for domain in self.eval.domains:
            if domain not in self.data.domains:
                raise ValueError(f"eval.domains ({domain}): not in data.domains ({', '.join(self.data.domains)})")
        self._check_tasks()
        if self.noise.every and self.training.batch < 2:
            raise ValueError(
                f"noise.every ({self.noise.every}) needs training.batch ({self.training.batch}) of at least 2"
            )
        small = self.noise.small_batch
        if small is not None and (small >= self.training.batch or self.training.batch % small):
            raise ValueError(
                f"noise.small_batch ({small}) must divide training.batch ({self.training.batch}) and be smaller"
            )
        return self

    def _check_tasks(self) -> None:
        """Eval lines of the record tell domains and tasks apart by their names alone."""
        domains = self.data.domains
        for name, task in self.eval.tasks.items():
            if name in (*domains, HELD_OUT):
                raise ValueError(
                    f"eval.tasks.{name}: a name of a domain, or of all held-out text ({HELD_OUT}); take another"
                )
            if task.continuations is not None and task.continuations.domain not in domains:
                raise ValueError(
                    f"eval.tasks.{name}.continuations.domain ({task.continuations.domain}): not in data.domains "
                    f"({', '.join(domains)})"
                )

    @property
    def small_batch(self) -> int:
        """Sequences in the noise scale's small batch."""
        if self.noise.small_batch is not None:
            return self.noise.small_batch
        batch = self.training.batch
        return next(n for n in range(max(batch // 8, 1), batch + 1) if batch % n == 0)

    def check_layout(self, world: int, node_ranks: int = 0) -> Topology:
        """The topology on ``world`` ranks, ``node_ranks`` of them on each node.

        Raises:
            UserError: the layout does not fit the world, the model or the batch; says what to try.
        """
        topology = Topology.build(self.parallel, world, node_ranks)
        _check_model_on(self, topology)
        _check_batch_on(self, topology)
        return topology

    def micro_batch(self, topology: Topology, *, for_noise: bool = False) -> int:
        """Sequences a rank computes at once: as given, or all of its share.

        On steps that measure the noise scale, small batches are computed apart, so it must divide their share too.
        """
        dealt = topology.data * topology.rounds
        micro = self.training.micro_batch or self.training.batch // dealt
        return math.gcd(micro, self.small_batch // dealt) if for_noise else micro

    @property
    def scientific_hash(self) -> str:
        """Names what is computed, whatever the layout, the machine and the logging."""
        content = self._content(exclude={*UNSCIENTIFIC, "name"})
        content["data"].pop("path")
        content["training"].pop("micro_batch")
        content["training"]["recompute"] = "none"  # it changes no result; older hashes hold the key
        content["schedule"].pop("branches")  # which checkpoints a trunk keeps
        return digest(content)

    @property
    def config_hash(self) -> str:
        """Names the whole configuration."""
        return digest(self._content(exclude=set()))

    def _content(self, exclude: set[str]) -> dict[str, Any]:
        """What is hashed: every key that was always there, and later ones that differ from their default."""
        content = self.model_dump(mode="json", exclude=exclude)
        for section in LATER.keys() & content.keys():
            fields = type(getattr(self, section)).model_fields
            for key in LATER[section]:
                spelled = fields[key].alias or key
                if content[section][spelled] == fields[key].default:
                    del content[section][spelled]
        for domain in content["data"]["domains"].values():
            if not domain["packages"]:
                del domain["packages"]  # came later too
        return content


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, min(number, 64) + 1) if number % n == 0)


def _check_model_on(config: RunConfig, topology: Topology) -> None:
    model, moe = config.model, config.moe
    tensor, pipeline = topology.tensor, topology.pipeline
    for name, value in (("heads", model.heads), ("kv_heads", model.kv_heads), ("ffn", model.ffn)):
        if value % tensor:
            raise UserError(f"parallel.tensor ({tensor}) must divide model.{name} ({value}); try {_divisors(value)}")
    if model.vocab_multiple % tensor:
        raise UserError(f"parallel.tensor ({tensor}) must divide model.vocab_multiple ({model.vocab_multiple})")
    if topology.sequence and config.training.seq % tensor:
        raise UserError(f"parallel.tensor ({tensor}) must divide training.seq ({config.training.seq})")
    if model.layers % pipeline:
        raise UserError(
            f"parallel.pipeline ({pipeline}) must divide model.layers ({model.layers}); try {_divisors(model.layers)}"
        )
    per_stage, chunks = model.layers // pipeline, topology.virtual_stages
    if per_stage % chunks:
        raise UserError(
            f"parallel.virtual_stages ({chunks}) must divide the {per_stage} layers of a pipeline stage; "
            f"try {_divisors(per_stage)}"
        )
    if moe is None and topology.expert > 1:
        raise UserError(f"parallel.expert ({topology.expert}) needs a moe section; this model is dense")
    if moe is not None and tensor > 1 and not (topology.sequence or topology.experts_on_all_tensor_ranks):
        raise UserError(
            "parallel.sequence: false leaves every tensor rank with the same tokens, so experts cannot be spread over "
            "tensor ranks; take parallel.sequence=true or parallel.expert_over=dp"
        )
    if moe is not None and moe.experts % topology.expert:
        raise UserError(
            f"parallel.expert ({topology.expert}) must divide moe.experts ({moe.experts}); try {_divisors(moe.experts)}"
        )
    if moe is not None and topology.expert > 1:
        _check_chunks(config.parallel, moe.experts // topology.expert)


def _check_chunks(parallel: ParallelConfig, experts_of_rank: int) -> None:
    if experts_of_rank % parallel.exchange_chunks:
        raise UserError(
            f"parallel.exchange_chunks ({parallel.exchange_chunks}) must divide the {experts_of_rank} experts of a "
            f"rank; try {_divisors(experts_of_rank)}"
        )
    if parallel.exchange_chunks > 1 and parallel.exchange not in OVERLAPPING:
        raise UserError(
            f"parallel.exchange_chunks ({parallel.exchange_chunks}) needs an exchange that goes on while a rank "
            f"computes: parallel.exchange {' or '.join(OVERLAPPING)}, not {parallel.exchange}"
        )


def _check_batch_on(config: RunConfig, topology: Topology) -> None:
    batch, data = config.training.batch, topology.data
    if batch % data:
        raise UserError(
            f"training.batch ({batch}) must be a multiple of the data-parallel size ({data} of {topology.world} ranks)"
        )
    rounds = topology.rounds
    if batch % (data * rounds):
        raise UserError(
            f"training.batch ({batch}) must be a multiple of the data-parallel size ({data}) x parallel.pipeline "
            f"({rounds}): with virtual stages a rank takes micro-batches in rounds of one for each pipeline stage"
        )
    micro = config.micro_batch(topology)
    if batch % (micro * data):
        raise UserError(
            f"training.micro_batch ({micro}) times the data-parallel size ({data}) must divide training.batch "
            f"({batch}); try micro_batch {_divisors(batch // data)}"
        )
    micro_batches = batch // (micro * data)
    if micro_batches % rounds:
        raise UserError(
            f"training.micro_batch ({micro}) leaves {micro_batches} micro-batches a rank; with virtual stages they "
            f"must be a multiple of parallel.pipeline ({rounds}); try micro_batch {_divisors(batch // data // rounds)}"
        )
    if config.noise.every and config.small_batch % (data * rounds):
        virtual = f" x parallel.pipeline ({rounds}; virtual stages)" if rounds > 1 else ""
        raise UserError(
            f"noise.small_batch ({config.small_batch}) must be a multiple of the data-parallel size ({data} of "
            f"{topology.world} ranks){virtual}; try noise.small_batch={data * rounds}"
        )


def load_run(path: Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a run file, apply ``key=value`` overrides, validate.

    Raises:
        UserError: anything wrong with the file or the overrides.
    """
    content = load_yaml(path)
    overrides = overrides or []
    if any(override.startswith(tuple(f"training.{key}=" for key in BUDGETS)) for override in overrides):
        # A budget on the command line takes the place of the file's, whichever of the three that is.
        content = merge(content, {"training": dict.fromkeys(BUDGETS)})
    content = apply_overrides(content, overrides)
    content.setdefault("name", Path(path).stem)
    return validate(RunConfig, content, str(path))
