"""record.jsonl, schema version 1: every field of every line, with its unit.

A record is a JSON object a line, told apart by ``kind``. Floats are written in full (Python's shortest form that
reads back to the same bits). A number that is not finite is written as null: JSON has no word for it, and a reader
who forgets to look gets an error instead of a wrong mean. So null means: not measured on this step, not known on
this machine, or not finite (a loss of null on a step line is a diverged step).

Units: losses in nats a token, batch and noise scale in tokens, FLOPs exact (matrix products of forward and backward
pass, attention scores, router and head included), times in seconds, memory in bytes.

The writer does not validate, since that would cost more than the step's own bookkeeping; `read_record` with
``strict=True`` does, and so do the tests.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

SCHEMA = 1
HELD_OUT = "held_out"  # the domain of eval lines over the held-out documents of all training domains
State = Literal["done", "preempted", "failed"]


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Parameters(_Line):
    """Parameter counts. ``total`` and ``active`` leave the embeddings and the output head out."""

    total: int = Field(description="non-embedding parameters")
    active: int = Field(description="non-embedding parameters that one token uses")
    embedding: int = Field(description="token embedding and output head (a tied one once)")
    router: int = Field(description="routers of all layers; part of total and of active")


class FlopsPerToken(_Line):
    """Training FLOPs of one token: forward and backward."""

    exact: float = Field(description="all matrix products, attention scores, router and head")
    six_n: float = Field(description="6 x active non-embedding parameters")


class Mixture(_Line):
    """What the MoE layers are made of."""

    experts: int = Field(description="routed experts E of a layer")
    active: int = Field(description="routed experts K of a token")
    granularity: float = Field(description="G = 4 x model width / expert width (arXiv 2402.07871)")
    shared: int = Field(description="shared experts, not counted in experts and active")
    layers: int = Field(description="number of MoE layers")
    future: Literal["never", "training", "always"] = Field(
        "never", description="when routing lets a token's output depend on later tokens; always: evaluation too"
    )


class Parent(_Line):
    """The trunk that a decay branch starts from."""

    run: str = Field(description="folder of the trunk")
    step: int = Field(description="step of the trunk's checkpoint")


class Header(_Line):
    """One for each start of the run."""

    kind: Literal["header"]
    schema_version: int = Field(alias="schema", description="1")
    run: str = Field(description="name of the run")
    attempt: int = Field(ge=1, description="number of this start, from 1")
    resumed_from: int | None = Field(description="step of the checkpoint that this start goes on from")
    scientific_hash: str = Field(description="names what is computed, whatever the layout and the machine")
    config_hash: str = Field(description="names the whole configuration")
    code_version: str
    data_hash: str
    tokenizer_hash: str
    seed: int
    threads: int = Field(description="CPU threads of a rank")
    topology: dict[str, int | bool | str] = Field(description="sizes of the layout: world, tensor, pipeline, data, ...")
    parameters: Parameters
    flops_per_token: FlopsPerToken
    mixture: Mixture | None = Field(description="null: dense")
    parent: Parent | None = Field(None, description="of a decay branch")
    conventions: dict[str, str] = Field(description="what N, D, G, K mean here; how causal attention is counted")


class GradNorm(_Line):
    """L2 norms of the gradient before clipping."""

    total: float | None
    dense: float | None
    expert: float | None = Field(description="null: no expert parameters")


class NoiseParts(_Line):
    """Gradient noise of a set of parameters (McCandlish et al. 2018, appendix A.1)."""

    g2: float | None = Field(description="estimate of the squared norm of the true gradient; may be negative")
    trace: float | None = Field(description="estimate of tr(Sigma), the noise of one token; may be negative")
    b_simple: float | None = Field(description="trace / g2 in tokens; null where that makes no sense")


class Noise(_Line):
    """One measurement of the gradient noise scale."""

    all: NoiseParts
    dense: NoiseParts
    expert: NoiseParts | None = Field(description="null: no expert parameters")
    b_small: float = Field(description="tokens in the small batch")
    b_big: float = Field(description="tokens in the big batch")


class RouterLoad(_Line):
    """Load of one MoE layer over the step's global batch."""

    layer: int = Field(description="global index of the layer, from 0")
    max_violation: float | None = Field(description="largest load over mean load, minus 1")
    cv: float | None = Field(description="standard deviation over mean of the experts' loads")
    entropy: float | None = Field(description="mean entropy of the router's distribution, nats")
    dropped: float | None = Field(description="share of token-expert assignments dropped by capacity")
    dead: float | None = Field(description="share of experts without a token")
    p95_load: float | None = Field(description="95th percentile of load over mean load")
    bias_range: float | None = Field(None, description="largest minus smallest selection bias; absent: no bias")


class Step(_Line):
    """One for each optimizer step."""

    kind: Literal["step"]
    step: int = Field(ge=1, description="optimizer steps done, from 1")
    tokens: int = Field(description="tokens trained on so far")
    flops: float = Field(description="FLOPs so far")
    seconds: float = Field(description="wall time of this step")
    loss: float | None = Field(description="language-model loss of the global batch, nats a token")
    aux_loss: float | None = Field(
        description="load-balance loss before its coefficient, mean over layers; null: dense"
    )
    z_loss: float | None = Field(description="router z-loss before its coefficient, mean over layers; null: dense")
    lr: float = Field(description="learning rate of this step")
    batch_tokens: int = Field(description="tokens of the global batch")
    grad_norm: GradNorm
    noise: Noise | None = Field(description="null: not measured on this step")
    router: list[RouterLoad] = Field(description="one for each MoE layer; empty: dense")
    tokens_per_second: float | None
    tflops: float | None = Field(description="1e12 FLOPs a second, all ranks together")
    mfu: float | None = Field(description="share of the devices' peak; null: peak not known")
    memory_bytes: int | None = Field(description="largest memory in use on rank 0 so far; null: not measured")


class Task(_Line):
    """The multiple-choice questions of a downstream task, and how they were answered (docs/downstream.md)."""

    hash: str = Field(description="names the questions: equal hashes, equal questions")
    questions: int
    chance: float = Field(description="share of the questions that a blind guess gets right on average")
    raw_score: float = Field(description="share whose right choice has the largest log-likelihood (acc)")
    cut: int = Field(description="questions whose context lost its beginning to fit into training.seq")


class Eval(_Line):
    """One evaluation on one domain or downstream task. Written before the checkpoint of the same step."""

    kind: Literal["eval"]
    step: int = Field(ge=0)
    tokens: int = Field(description="tokens trained on so far")
    flops: float = Field(description="training FLOPs so far")
    domain: str = Field(description="a domain or task; held_out: held-out documents of all training domains")
    loss: float | None = Field(description="nats a token; of a task: of the right choices, given their contexts")
    bits_per_byte: float | None = Field(description="bits a byte of the original text")
    score: float | None = Field(
        description="share of a task's questions whose right choice has the largest log-likelihood a character "
        "(acc_norm); null on plain text"
    )
    n_tokens: int = Field(description="tokens that loss is the mean of")
    task: Task | None = Field(None, description="absent: plain text")


class Event(_Line):
    """Something happened: saved, resumed, preempted, spike, skipped step, new topology."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    kind: Literal["event"]
    what: str
    step: int = Field(ge=0)
    why: str


class Totals(_Line):
    """Sums over the run, as the record stands."""

    steps: int
    tokens: int
    flops: float
    seconds: float = Field(description="wall time of all steps in the record")


class End(_Line):
    """The last line of an attempt that ended on its own accord."""

    kind: Literal["end"]
    state: State
    why: str = Field(description="empty when done")
    totals: Totals


_ANY: TypeAdapter[Any] = TypeAdapter(Annotated[Header | Step | Eval | Event | End, Field(discriminator="kind")])
KINDS = ("header", "step", "eval", "event", "end")


def check_line(line: dict[str, Any]) -> None:
    """Validate one line against the schema.

    Raises:
        pydantic.ValidationError: a field is missing, unknown or of the wrong type.
    """
    _ANY.validate_python(line)
