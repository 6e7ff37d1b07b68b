"""What the parity proof runs: options of a small run, and the layouts that must not change what it computes."""

from dataclasses import dataclass, field
from typing import Any

Changes = dict[str, Any]

MIXTURE = {
    "experts": 4,
    "active": 2,
    "expert_width": 24,
    "aux_loss": 0.05,
    "z_loss": 0.01,
    "shared": 1,
    "first_dense": 1,
}
ODD = {"experts": 6, "active": 3, "expert_width": 16, "aux_loss": 0.05, "z_loss": 0.01, "score": "softmax_normalized"}
NOISE = {"every": 1, "small_batch": 4}
# Routers that are functions of more than a token's hidden state: of its place, its id, its sequence. With recomputation
# they must decide alike twice; under 1F1B another micro-batch goes forward in between.
AHEAD = {"grouping": "sequence", "allow_future_leak": True}
OPTIONS: dict[str, Changes] = {
    "groups": {"experts": 6, "groups": 3, "groups_active": 2, "score": "sigmoid_normalized", "weight_scale": 2.5},
    "jitter": {"jitter": 0.1},
    "hash": {"router": "hash"},
    "forced": {"router": "forced", "skew": 0.5},
    "choice": {"router": "expert_choice", **AHEAD},
    "sinkhorn": {"router": "sinkhorn", "score": "sigmoid", **AHEAD},
    "global-bias": {"balance": "global", "bias_rate": 0.02},
    "capacity": {"capacity": 1.0, "drop": "probability"},
    "capacity-position": {"capacity": 1.0, "drop": "position"},
    "capacity-padded": {"capacity": 1.0, "drop": "probability", "padded": True},
}


@dataclass(frozen=True)
class Case:
    """A small run and how its text is counted.

    Attributes:
        changes: what differs from the small run that tests train (tests/training/conftest.py).
        masked: whether labels are masked, in every sample another number of them.
        mutation: a rule that the ranks break on purpose, see parity_worker.py.
        node_ranks: ranks that count as one node; 0: all of them.
    """

    changes: Changes
    masked: bool = False
    mutation: str = ""
    node_ranks: int = 0

    @property
    def bf16(self) -> bool:
        return bool(self.changes.get("training", {}).get("dtype") == "bf16")


@dataclass
class World:
    """Cases of one number of ranks."""

    ranks: int
    cases: dict[str, Case] = field(default_factory=dict)

    def add(self, name: str, *parts: Changes, masked: bool = False, mutation: str = "", node_ranks: int = 0) -> None:
        """A case of several changes, section by section."""
        changes: Changes = {}
        for part in parts:
            for section, content in part.items():
                changes[section] = {**changes.get(section, {}), **content}
        assert name not in self.cases, name
        self.cases[name] = Case(changes, masked, mutation, node_ranks)


def parallel(**sizes: Any) -> Changes:
    return {"parallel": sizes}


MOE: Changes = {"moe": MIXTURE, "noise": NOISE}
BIASED: Changes = {"model": {"qkv_bias": True, "rotary_fraction": 0.5, "norm_eps": 1e-3, "qk_norm": "head"}}
UNTIED: Changes = {"model": {"tied": False}}
RECOMPUTE: Changes = {"training": {"recompute": "full"}}
DEEP: Changes = {"model": {"layers": 4}}
# Other inputs, where a token of the usual ones chooses between equals.
OTHER: Changes = {"training": {"seed": 4}}
# Ranks that no number of tensor ranks divides: projections to latents are whole on each.
LATENT: dict[str, Any] = {"q_rank": 11, "kv_rank": 13, "nope_dim": 8, "rope_dim": 6, "value_dim": 10}
YARN = {"factor": 8, "original_seq": 12, "beta_fast": 4, "beta_slow": 0.1, "mscale": 0.8, "mscale_all_dim": 1.3}
LATENTS: Changes = {"model": {"kv_heads": None, "mla": LATENT, "yarn": YARN}, **OTHER}
LATENT_KEYS: Changes = {"model": {"kv_heads": None, "mla": {**LATENT, "q_rank": None}}}
CLIPPED: Changes = {"optimizer": {"clip": 0.3, "eps": 1e-8}}


def micro(size: int) -> Changes:
    return {"training": {"micro_batch": size}}


BF16: Changes = {"moe": MIXTURE, "noise": NOISE, "training": {"micro_batch": 2, "dtype": "bf16"}}
VIRTUAL = parallel(pipeline=2, virtual_stages=2)


def _one() -> World:
    world = World(1)
    world.add("bf16", BF16)
    world.add("bf16-deep", BF16, DEEP)
    world.add("dense")
    world.add("dense-micro-2", micro(2))
    world.add("moe", MOE)
    world.add("moe-masked", MOE, micro(2), masked=True)
    world.add("moe-micro-1-untied-qk-full", {"moe": MIXTURE}, micro(1), {"model": {"tied": False, "qk_norm": "full"}})
    world.add("moe-biased", MOE, BIASED, micro(2))
    world.add("moe-latents", MOE, LATENTS, micro(2))
    world.add("moe-zero-0", {"moe": ODD, "noise": NOISE}, parallel(zero=0))
    world.add("moe-recompute", {"moe": MIXTURE}, RECOMPUTE)
    for option, settings in OPTIONS.items():
        world.add(option, {"moe": {**MIXTURE, **settings}}, micro(2), RECOMPUTE)
    return world


def _two() -> World:
    world = World(2)
    for name, sizes in {"dp2": {}, "ep2": {"expert": 2}, "tp2": {"tensor": 2}, "pp2": {"pipeline": 2}}.items():
        world.add(f"bf16-{name}", BF16, parallel(**sizes))
    world.add("dense-dp2", {"noise": NOISE}, micro(2))
    world.add("dense-tp2-untied", parallel(tensor=2), {"model": {"tied": False, "qk_norm": "head"}, "noise": NOISE})
    world.add("dense-tp2-no-sequence", parallel(tensor=2, sequence=False), {"model": {"qk_norm": "head"}})
    world.add("dense-tp2-biased", parallel(tensor=2), BIASED, {"noise": NOISE})
    world.add("dense-tp2-latents-no-sequence", parallel(tensor=2, sequence=False), LATENTS, {"noise": NOISE})
    world.add("dense-tp2-latent-keys", parallel(tensor=2), LATENT_KEYS, UNTIED)
    world.add("dense-pp2-untied", parallel(pipeline=2), UNTIED, micro(2))
    world.add("dense-pp2-virtual2", VIRTUAL, DEEP, micro(2), {"noise": NOISE})
    world.add("moe-dp2", MOE, micro(2))
    world.add("moe-dp2-masked", MOE, micro(2), masked=True)
    world.add("moe-ep2", MOE, micro(2), parallel(expert=2))
    world.add("moe-ep2-odd-zero-0", {"moe": ODD, "noise": NOISE}, parallel(expert=2, zero=0))
    world.add("moe-ep2-clip-eps", {"moe": ODD}, parallel(expert=2), CLIPPED)
    world.add("moe-tp2", MOE, parallel(tensor=2), {"model": {"qk_norm": "full"}})
    world.add("moe-tp2-ep2", MOE, parallel(tensor=2, expert=2))
    world.add("moe-tp2-over-dp", MOE, parallel(tensor=2, expert_over="dp"))
    world.add("moe-tp2-over-dp-no-sequence", MOE, parallel(tensor=2, expert_over="dp", sequence=False))
    world.add("moe-tp2-ep2-latents", MOE, LATENTS, parallel(tensor=2, expert=2))
    world.add("moe-ep2-latents", MOE, LATENTS, micro(2), parallel(expert=2))
    world.add("moe-pp2-latents-recompute", MOE, LATENTS, micro(2), RECOMPUTE, parallel(pipeline=2))
    world.add("moe-pp2", MOE, parallel(pipeline=2), micro(2))
    world.add("moe-pp2-masked", MOE, parallel(pipeline=2), micro(2), masked=True)
    world.add("moe-pp2-virtual2-recompute", MOE, VIRTUAL, DEEP, micro(2), RECOMPUTE)
    for option, axes in {
        "global-bias": ("data", "expert", "tensor", "pipeline"),
        "capacity": ("data", "expert", "tensor"),
        "capacity-position": ("tensor", "pipeline"),
        "capacity-padded": ("expert",),
    }.items():
        for axis in axes:
            sizes = {} if axis == "data" else {axis: 2}
            world.add(
                f"{option}-{axis}", {"moe": {**MIXTURE, **OPTIONS[option]}, "noise": NOISE}, micro(2), parallel(**sizes)
            )
    # Every visit goes to the first two experts: the second rank's have nothing to do.
    idle: Changes = {"moe": {**MIXTURE, "router": "forced", "skew": 60.0}}
    world.add("moe-ep2-one-rank-idle", idle, micro(2), RECOMPUTE, parallel(expert=2))
    for option in ("groups", "jitter", "hash", "forced", "choice", "sinkhorn"):
        routed: Changes = {"moe": {**MIXTURE, **OPTIONS[option]}}
        world.add(f"{option}-dp2", routed, micro(2), RECOMPUTE, {"noise": NOISE})
        world.add(f"{option}-tp2-ep2", routed, micro(2), RECOMPUTE, parallel(tensor=2, expert=2))
        world.add(f"{option}-pp2", routed, micro(2), RECOMPUTE, parallel(pipeline=2))
    return world


def _three() -> World:
    """Numbers that are no powers of two: six experts, twelve samples, three heads."""
    world = World(3)
    twelve: Changes = {"training": {"batch": 12, "micro_batch": 2}, "noise": {"every": 1, "small_batch": 6}}
    thirds: Changes = {"model": {"width": 48, "heads": 6, "kv_heads": 3, "ffn": 72, "vocab_multiple": 96}}
    for name, sizes in {"dp3": {}, "ep3": {"expert": 3}, "ep3-zero-0": {"expert": 3, "zero": 0}}.items():
        world.add(f"moe-{name}", {"moe": ODD}, twelve, parallel(**sizes))
    world.add("moe-ep3-masked", {"moe": ODD}, twelve, parallel(expert=3), masked=True)
    world.add("moe-tp3-ep3", {"moe": ODD}, twelve, thirds, parallel(tensor=3, expert=3), {"training": {"seq": 33}})
    world.add("moe-pp3", {"moe": ODD}, twelve, parallel(pipeline=3), {"model": {"layers": 3}})
    return world


FOUR_RANKS: dict[str, Changes] = {
    "dp4": {},
    "ep4": parallel(expert=4),
    "ep2-dp2": parallel(expert=2),
    "tp2-dp2": parallel(tensor=2),
    "tp2-ep2": parallel(tensor=2, expert=2),
    "tp2-ep4": parallel(tensor=2, expert=4),
    "tp2-ep2-over-dp": parallel(tensor=2, expert=2, expert_over="dp"),
    "tp2-ep2-over-dp-no-sequence": parallel(tensor=2, expert=2, expert_over="dp", sequence=False),
    "tp2-pp2": parallel(tensor=2, pipeline=2),
    "tp2-pp2-ep2": parallel(tensor=2, pipeline=2, expert=2),
    "pp2-dp2": parallel(pipeline=2),
    "pp2-ep2": parallel(pipeline=2, expert=2),
    "pp2-virtual2-ep2": {**VIRTUAL, "parallel": {**VIRTUAL["parallel"], "expert": 2}, **DEEP},
    "pp2-virtual2-tp2": {**VIRTUAL, "parallel": {**VIRTUAL["parallel"], "tensor": 2}, **DEEP},
    "pp4": {**parallel(pipeline=4), **DEEP},
}


def _four(layouts: dict[str, Changes]) -> World:
    world = World(4)
    small = {**MOE, "training": {"micro_batch": 1}}
    for name, layout in layouts.items():
        world.add(f"moe-{name}", small, layout)
    return world


def _whole_four() -> World:
    world = _four(FOUR_RANKS)
    heads: Changes = {"model": {"kv_heads": 4}}
    eight: Changes = {"moe": {**MIXTURE, "experts": 8}}
    two_level = parallel(expert=4, exchange="two_level", exchange_chunks=2)
    world.add("moe-ep4-two-level-chunks", {**MOE, **micro(1)}, eight, two_level, node_ranks=2)
    for name in ("tp2-ep2-over-dp-no-sequence", "tp2-pp2-ep2", "pp2-virtual2-tp2"):
        world.add(f"moe-{name}-latents", MOE, LATENTS, micro(1), FOUR_RANKS[name])
    world.add("moe-tp4-ep4-latents", MOE, LATENTS, parallel(tensor=4, expert=4))
    world.add("moe-tp4-ep4", MOE, heads, parallel(tensor=4, expert=4))
    world.add("dense-tp4-no-sequence", heads, parallel(tensor=4, sequence=False), {"noise": NOISE})
    for name in ("dp4", "tp2-dp2", "tp2-pp2", "pp2-virtual2-tp2", "pp4"):
        world.add(f"dense-{name}", {"noise": NOISE}, micro(1), FOUR_RANKS[name])
        world.add(
            f"dense-{name}-untied",
            micro(1),
            FOUR_RANKS[name],
            {"model": {**FOUR_RANKS[name].get("model", {}), "tied": False}},
        )
    for name, layout in FOUR_RANKS.items():
        world.add(
            f"moe-{name}-masked-recompute-clip", {"moe": MIXTURE}, micro(1), RECOMPUTE, CLIPPED, layout, masked=True
        )
        world.add(f"bf16-{name}", BF16, micro(1), layout)
    shared: Changes = {"parallel": {"exchange": "shared"}}
    for name in ("ep4", "tp2-ep4", "tp2-pp2-ep2", "pp2-virtual2-ep2", "tp2-ep2-over-dp"):
        world.add(f"moe-{name}-shared-recompute", MOE, micro(1), RECOMPUTE, FOUR_RANKS[name], shared)
    for option, settings in OPTIONS.items():
        even = {**settings, "experts": 8, "groups": 4} if option == "groups" else settings
        for name in ("ep4", "tp2-ep4", "tp2-pp2-ep2", "pp2-virtual2-ep2", "tp2-ep2-over-dp-no-sequence"):
            inputs = OTHER if name == "pp2-virtual2-ep2" else {}
            world.add(f"{option}-{name}", {"moe": {**MIXTURE, **even}}, micro(1), RECOMPUTE, inputs, FOUR_RANKS[name])
    return world


def _eight() -> World:
    world = World(8)
    layouts: dict[str, Changes] = {
        "tp2-pp2-ep2": parallel(tensor=2, pipeline=2, expert=2),
        "tp2-pp2-ep4": parallel(tensor=2, pipeline=2, expert=4),
        "tp2-pp2-virtual2-ep4": {**parallel(tensor=2, pipeline=2, virtual_stages=2, expert=4), **DEEP},
        "ep8": parallel(expert=8),
    }
    eight: Changes = {"moe": {**MIXTURE, "experts": 8}, "noise": {"every": 1, "small_batch": 8}}
    for name, layout in layouts.items():
        sixteen: Changes = {"training": {"batch": 16, "micro_batch": 1}}
        world.add(f"moe-{name}", eight, sixteen, layout)
        world.add(f"moe-{name}-masked-recompute", eight, sixteen, RECOMPUTE, OTHER, layout, masked=True)
    return world


def _mutated() -> World:
    """Every rule of docs/layout.md, broken; each of these must be found out."""
    world = World(2)
    base = {**MOE, "training": {"micro_batch": 2}}
    world.add("micro-batches-not-averaged", base, mutation="micro-batches-not-averaged")
    world.add("expert-gradients-not-summed", base, mutation="expert-gradients-not-summed")
    world.add(
        "expert-gradients-over-all-data-ranks",
        base,
        parallel(expert=2),
        mutation="expert-gradients-over-all-data-ranks",
    )
    world.add("tied-embedding-not-summed", base, parallel(pipeline=2), mutation="tied-embedding-not-summed")
    world.add("replicas-counted-in-norm", base, parallel(tensor=2), mutation="replicas-counted-in-norm")
    world.add("experts-left-out-of-norm", base, parallel(expert=2), mutation="experts-left-out-of-norm")
    world.add("sequence-parallel-not-summed", base, parallel(tensor=2), mutation="sequence-parallel-not-summed")
    world.add("load-balance-of-a-part", base, parallel(tensor=2), mutation="load-balance-of-a-part")
    world.add("loss-as-mean-of-means", base, masked=True, mutation="loss-as-mean-of-means")
    world.add("noise-of-one-rank", base, mutation="noise-of-one-rank")
    return world


CORE = {1: _one(), 2: _two(), 4: _four({n: FOUR_RANKS[n] for n in ("tp2-ep4", "pp2-virtual2-ep2", "tp2-ep2-over-dp")})}
MATRIX = {3: _three(), 4: _whole_four(), 8: _eight()}
MUTATED = _mutated()
WORLDS = {f"core-{world.ranks}": world for world in CORE.values()}
WORLDS |= {f"matrix-{world.ranks}": world for world in MATRIX.values()}
WORLDS["mutated"] = MUTATED
