"""Hundreds of run, study and cluster files with one thing wrong in each: exit 2, the key, its value, what to do.

What is broken is walked from the schemas (tests/helpers/breakage.py), so a new key is broken too.
"""

import copy
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from breakage import MISSING, Fault, as_yaml, faults, is_whole, keys

from moescale.launch.cluster_config import ClusterConfig
from moescale.launch.study_config import StudyConfig
from moescale.training.config import RunConfig

# Every section and every key that has sections below it, so that the walk reaches all keys.
RUN: dict[str, Any] = {
    "name": "mine",
    "model": {
        "layers": 2,
        "width": 32,
        "heads": 2,
        "mla": {"q_rank": 8, "kv_rank": 8, "nope_dim": 8, "rope_dim": 8, "value_dim": 8},
        "yarn": {"factor": 2, "original_seq": 32},
    },
    "moe": {"experts": 8, "active": 2, "granularity": 4},
    "parallel": {"tensor": 1},
    "data": {
        "path": "nowhere",
        "domains": {"python": {"source": "stdlib"}},
        "weights": {"python": 1.0},
        "tokenizer": {"vocab": 512},
    },
    "optimizer": {"lr": 0.01, "betas": [0.9, 0.95]},
    "schedule": {"kind": "wsd", "warmup": 2, "parent": {"run": "../trunk", "step": 4}},
    "training": {"seq": 32, "batch": 4, "steps": 60},
    "noise": {"every": 5, "small_batch": 2},
    "eval": {"domains": ["python"], "tasks": {"next": {"continuations": {"domain": "python"}}}},
    "checkpoint": {"every": 5},
    "logging": {"tensorboard": False},
    "runtime": {"threads": 1},
}
_OF_RULE = {"optimizer": {"betas": [0.9, 0.95]}}
STUDY: dict[str, Any] = {
    "name": "mine",
    "run": {key: _OF_RULE.get(key, value) for key, value in RUN.items() if key != "name"},
    "groups": {"small": {"family": "E4G4", "set": {"training.seed": 1}, "grid": {"training.batch": [4, 8]}}},
    "lr_rule": {"base_lr": 0.01, "base_width": 64, "check": {"at": {"training.batch": 4}}},
    "scale": 1.0,
    "workers": 1,
    "fit": [{"law": "power", "family": "E4G4", "map": {"c": "flops"}, "hold_out": "c>1e12"}],
}
CLUSTER: dict[str, Any] = {
    "name": "mine",
    "node": {"cores": 4, "memory_gb": 8, "devices": 1, "device_memory_gb": 8},
    "time_limit_hours": 1,
    "retry": {"restarts": 2},
    "environment": {"A": "b"},
}


class Case(NamedTuple):
    """A file and a call of the command line that must refuse it."""

    kind: str  # of file
    content: dict[str, Any]
    overrides: tuple[str, ...]
    said: tuple[str, ...]


def _in_run_file(fault: Fault) -> Case:
    return Case("run", fault.applied_to(RUN), (), (fault.dotted,))


def _in_override(fault: Fault) -> Case:
    if fault.value is MISSING or isinstance(fault.value, dict | list):
        return _in_run_file(fault)
    value = as_yaml([fault.value]).removeprefix("- ").strip()
    return Case("run", RUN, (f"{fault.dotted}={value}",), (fault.dotted,))


def _in_shared_run(fault: Fault) -> Case:
    if fault.path[0] == "training" and fault.path[-1] in ("batch", "seed"):
        return _in_run_file(fault)  # the group's own wins
    return Case("study", {**STUDY, "run": fault.applied_to(STUDY["run"])}, (), (f"run.{fault.dotted}",))


def _in_group(fault: Fault, section: str) -> Case:
    study = copy.deepcopy(STUDY)
    group = study["groups"]["small"]
    group["set"], group["grid"] = {}, {"training.seed": [1, 2]} if fault.path != ("training", "seed") else {}
    group[section][fault.dotted] = fault.value if section == "set" else [fault.value]
    return Case("study", study, (), (f"groups.small.{section}.{fault.dotted}",))


def _in_set(fault: Fault) -> Case:
    return _in_group(fault, "set")


def _in_grid(fault: Fault) -> Case:
    return _in_group(fault, "grid")


def _of_run() -> Iterator[tuple[str, Case]]:
    """Faults of runs, each in one of the places where keys of runs are written."""
    places = (_in_run_file, _in_set, _in_override, _in_shared_run, _in_grid)
    found = [fault for key in keys(RunConfig, RUN) for fault in faults(key)]
    for number, fault in enumerate(found):
        if (fault.dotted, fault.kind) == ("moe.balance", "null"):
            continue  # null stands for this default, which depends on another key
        place: Callable[[Fault], Case] = places[number % len(places)]
        in_study = place in (_in_set, _in_grid, _in_shared_run)
        ruled = fault.path == ("optimizer", "lr") or (fault.kind == "missing" and fault.path == ("optimizer",))
        if in_study and (fault.path[0] == "name" or ruled):
            place = _in_run_file  # a study names its runs, and this one has a rule for the learning rate
        elif place in (_in_set, _in_grid) and (
            fault.value is MISSING or len(fault.path) == 1 or any(isinstance(part, int) for part in fault.path)
        ):
            place = _in_shared_run
        case = place(fault)
        if fault.kind == "missing" and case.kind == "study":
            case = case._replace(said=(fault.dotted,))  # it stands nowhere
        yield f"{case.kind}-{fault.dotted}-{fault.kind}", case._replace(said=(*case.said, *fault.said))


def _of_others() -> Iterator[tuple[str, Case]]:
    for kind, model, content in (("study", StudyConfig, STUDY), ("cluster", ClusterConfig, CLUSTER)):
        for key in keys(model, content):
            for fault in faults(key):
                if fault.kind == "missing" and fault.path == ("name",):
                    continue  # then the file names it
                case = Case(kind, fault.applied_to(content), (), (fault.dotted, *fault.said))
                yield f"{kind}-{fault.dotted}-{fault.kind}", case


CASES = [*_of_run(), *_of_others()]
SHORT = CASES[::12]
# What goes together in no run: keys to change, and what is said of them. A dotted key is nested.
CONTRADICTIONS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "two budgets": ({"training.tokens": 1e6}, ("training: give exactly one of tokens, flops, steps", "tokens, steps")),
    "no budget": ({"training.steps": None}, ("training: give exactly one of tokens, flops, steps",)),
    "heads": (
        {"model.heads": 3, "model.mla": None, "model.yarn": None},
        ("model.heads (3)", "model.width (32)", "try"),
    ),
    "endless heads": (
        {"model.heads": 2**62 + 1, "model.mla": None, "model.yarn": None},
        ("model.heads (4611686018427387905)", "model.width (32)", "try"),
    ),
    "kv_heads": (
        {"model.kv_heads": 3, "model.mla": None, "model.yarn": None},
        ("model.kv_heads (3)", "model.heads (2)", "try 1, 2"),
    ),
    "kv_heads and mla": ({"model.kv_heads": 1}, ("model.kv_heads (1)", "model.mla", "leave it out")),
    "yarn without mla": ({"model.mla": None}, ("model.yarn needs model.mla",)),
    "yarn": ({"model.yarn.beta_fast": 0.5}, ("model.yarn.beta_fast (0.5)", "model.yarn.beta_slow (1)")),
    "rotary": (
        {"model.mla": None, "model.yarn": None, "model.rotary_fraction": 0.06},
        ("model.rotary_fraction (0.06)", "model.head_dim (16)", "try"),
    ),
    "max_seq": ({"model.max_seq": 16}, ("training.seq (32)", "model.max_seq (16)")),
    "shape": ({"model.shape": "d47"}, ("model.shape (d47)", "d48")),
    "active": ({"moe.active": 9}, ("moe.active (9)", "moe.experts (8)", "try 1 to 8")),
    "two widths": ({"moe.expert_width": 16}, ("moe.granularity (4.0)", "moe.expert_width (16)", "exactly one")),
    "no width": ({"moe.granularity": None}, ("moe.granularity (None)", "moe.expert_width (None)", "exactly one")),
    "odd width": ({"moe.granularity": 3}, ("moe.granularity (3)", "model.width (32)", "try moe.expert_width=")),
    "experts twice": ({"moe.sparsity": 0.75}, ("moe.sparsity (0.75)", "moe.experts (8)", "exactly one")),
    "sparsity": ({"moe.experts": None, "moe.sparsity": 0.7}, ("moe.sparsity (0.7)", "moe.active (2)", "try")),
    "groups": ({"moe.groups": 3}, ("moe.groups (3)", "moe.experts (8)", "try 1, 2, 4, 8")),
    "groups_active": ({"moe.groups_active": 2}, ("moe.groups_active (2)", "moe.groups (1)", "try 1 to 1")),
    "skew": ({"moe.skew": 0.5}, ("moe.skew (0.5)", "moe.router topk", "forced")),
    "balance": ({"moe.router": "hash", "moe.balance": "global"}, ("moe.balance (global)", "moe.router hash")),
    "drop": ({"moe.drop": "probability"}, ("moe.drop (probability)", "moe.capacity")),
    "future": (
        {"moe.router": "sinkhorn", "moe.grouping": "sequence"},
        ("moe.grouping (sequence)", "moe.router sinkhorn", "moe.allow_future_leak=true"),
    ),
    "no mixture": ({"moe.first_dense": 2}, ("moe.first_dense (2)", "moe.every (1)", "model.layers (2)")),
    "zero": ({"parallel.zero": 0, "training.dtype": "bf16"}, ("parallel.zero (0)", "training.dtype bf16")),
    "small batch": ({"noise.small_batch": 3}, ("noise.small_batch (3)", "training.batch (4)")),
    "noise": ({"training.batch": 1, "noise.small_batch": None}, ("noise.every (5)", "training.batch (1)")),
    "domain": ({"eval.domains": ["go"]}, ("eval.domains (go)", "data.domains (python)")),
    "task's domain": (
        {"eval.tasks.next.continuations.domain": "go"},
        ("eval.tasks.next.continuations.domain (go)", "data.domains (python)"),
    ),
    "two tasks in one": (
        {"eval.tasks.next.file": "a.jsonl"},
        ("eval.tasks.next: give exactly one of file, continuations",),
    ),
    "two sources": (
        {"data.domains.python.files": ["*"]},
        ("data.domains.python: give exactly one of", "source, packages, files"),
    ),
    "weights": ({"data.weights": {"go": 1}}, ("data.weights.go", "python")),
    "no weight": ({"data.weights": {"python": 0}}, ("data.weights", "above 0")),
    "nothing to train on": ({"data.domains.python.evaluate_only": True, "data.weights": {}}, ("data.domains",)),
    "branch": ({"schedule.kind": "cosine"}, ("schedule.parent", "schedule.kind wsd", "cosine")),
    "warm-up": ({"schedule.warmup": 0.1}, ("schedule.warmup (0.1)", "steps")),
    "half a step": ({"schedule.warmup": 1.5}, ("schedule.warmup (1.5)", "whole")),
    "sgd": ({"optimizer.impl": "sgd", "optimizer.eps": 1e-3}, ("optimizer.eps (0.001)", "optimizer.impl sgd")),
    "layout": ({"parallel.tensor": 2}, ("parallel.tensor (2)", "number of ranks (1)")),
    "micro-batch": ({"training.micro_batch": 3}, ("training.micro_batch (3)", "training.batch (4)", "try")),
}
# Texts that are no configuration, of any kind.
TEXTS: dict[str, tuple[str | bytes, str]] = {
    "a list": ("- 1\n- 2\n", "a mapping of keys to values is expected, not a list"),
    "a text": ("just text\n", "a mapping of keys to values is expected, not a str"),
    "false": ("false\n", "a mapping of keys to values is expected, not a bool"),
    "empty": ("", "required and not given"),
    "unclosed": ("model: {layers: 2\n", "not valid YAML"),
    "tabs": ("model:\n\tlayers: 2\n", "not valid YAML"),
    "two documents": ("a: 1\n---\nb: 2\n", "not valid YAML"),
    "a key twice": ("name: a\nname: b\n", "the key 'name' stands twice"),
    "a key that is a list": ("? [a, b]\n: 1\n", "cannot be a key"),
    "a number as a key": ("1: 2\n", "1"),
    "a binary file": (bytes(range(256)), "cannot be read"),
    "a zero byte": ("name: a\0b\n", "not valid YAML"),
    "an unknown tag": ("name: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
    "a tag that lies": ("name: !!int many\n", "'many' is no int"),
    "too many digits": (f"workers: 0x{'f' * 10_000}\n", "too many digits"),
    "an unknown alias": ("name: *nobody\n", "not valid YAML"),
    "an endless alias": ("name: &a {b: *a}\n", "an alias stands for what it is part of"),
    "a bomb of aliases": (
        "a: &a [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]\n"
        + "".join(f"{n}: &{n} [{', '.join([f'*{m}'] * 10)}]\n" for m, n in zip("abcdefgh", "bcdefghi", strict=True)),
        "more than 1,000,000 values",
    ),
    "too deep": ("a: " + "[" * 2000 + "]" * 2000 + "\n", "nested too deeply"),
    "too large": ("# " + "x" * (5 << 20) + "\n", "larger than 4 MiB"),
    "extends nothing": ("extends: nowhere.yaml\n", "nowhere.yaml: no such file"),
    "extends itself": ("extends: file.yaml\n", "extends itself through file.yaml -> file.yaml"),
    "extends a number": ("extends: 3\n", "extends (3): a file name or a list of file names is expected"),
    "an unknown key": ("sprache: naïve ☃\n", "sprache: unknown key"),
}
VERBS = {
    "run": ("train", "file.yaml"),
    "study": ("study", "plan", "file.yaml"),
    "cluster": ("study", "submit", "good.yaml", "--cluster", "file.yaml", "--dry-run"),
}


@pytest.fixture
def call(main: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Calls the command line on ``file.yaml``, in a folder that holds a study besides and afterwards nothing else."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.yaml").write_text(as_yaml(STUDY), encoding="utf-8")

    def made(kind: str, content: bytes | str | Mapping[str, Any], *more: str) -> Any:
        text = as_yaml(content) if isinstance(content, Mapping) else content
        (tmp_path / "file.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        ended = main(*VERBS[kind], *more, *(["--dry-run"] if kind == "run" else []))
        assert sorted(os.listdir(tmp_path)) == ["file.yaml", "good.yaml"]
        return ended

    return made


@pytest.fixture
def refused(call: Callable[..., Any]) -> Callable[..., str]:
    """What the command line says of a file, once it is sure to have refused it."""

    def made(*arguments: Any) -> str:
        ended = call(*arguments)
        assert ended.returncode == 2, ended
        assert ended.stderr.startswith("error: ")
        assert ended.stdout == ""
        assert len(ended.stderr) < 2000
        return str(ended.stderr)

    return made


@pytest.mark.parametrize(("kind", "content"), [("run", RUN), ("study", STUDY), ("cluster", CLUSTER)])
def test_unbroken_they_are_accepted(kind, content, call):
    ended = call(kind, content)
    assert ended.returncode == 0, ended.stderr


def _named(case: Case, refused: Callable[..., str]) -> None:
    said = refused(case.kind, case.content, *case.overrides)
    for words in case.said:
        assert words in said


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in SHORT])
def test_a_broken_key_is_named(case, refused):
    _named(case, refused)


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES])
def test_every_broken_key_is_named(case, refused):
    _named(case, refused)


@pytest.mark.parametrize(("changes", "said"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_keys_that_contradict_each_other_are_named(changes, said, refused):
    content: dict[str, Any] = RUN
    for key, value in changes.items():
        *sections, last = key.split(".")
        broken: Any = copy.deepcopy(content)
        inner = broken
        for section in sections:
            inner = inner[section]
        inner[last] = value
        content = broken
    complaint = refused("run", content)
    for words in said:
        assert words in complaint


@pytest.mark.parametrize("kind", VERBS)
@pytest.mark.parametrize(("text", "said"), TEXTS.values(), ids=TEXTS)
def test_what_is_no_configuration_is_refused(text, said, kind, refused):
    complaint = refused(kind, text)
    assert "file.yaml" in complaint
    assert said in complaint


NUMBERS = [
    (kind, key)
    for kind, model, content in (
        ("run", RunConfig, RUN),
        ("study", StudyConfig, STUDY),
        ("cluster", ClusterConfig, CLUSTER),
    )
    for key in keys(model, content)
    if is_whole(key)
]


@pytest.mark.parametrize(("kind", "key"), [pytest.param(kind, key, id=f"{kind}-{key.dotted}") for kind, key in NUMBERS])
def test_absurdly_large_numbers_end_at_once(kind, key, call):
    """Accepted or refused, but nobody counts that far."""
    content = {"run": RUN, "study": STUDY, "cluster": CLUSTER}[kind]
    began = time.monotonic()
    for value in (2**62, 10**12 + 39):
        ended = call(kind, Fault("large", key.path, value, ()).applied_to(content))
        assert ended.returncode in (0, 2)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("kind", VERBS)
def test_as_a_process_too(kind, tmp_path, environment):
    """In a terminal that knows no Unicode."""
    (tmp_path / "good.yaml").write_text(as_yaml(STUDY), encoding="utf-8")
    (tmp_path / "file.yaml").write_text("sprache: naïve ☃\nñandú: 1\n", encoding="utf-8")
    command = [sys.executable, "-m", "moescale", *VERBS[kind]]
    plain = {**environment, "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    ended = subprocess.run(command, cwd=tmp_path, env=plain, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2, ended.stderr
    assert "sprache: unknown key" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert sorted(os.listdir(tmp_path)) == ["file.yaml", "good.yaml"]
