"""A run file as a whole: checks across sections, layouts, and the two hashes."""

from pathlib import Path
from typing import Any

import pytest

from moescale.base.config import merge, validate
from moescale.base.errors import UserError
from moescale.training.config import RunConfig, load_run

BASE: dict[str, Any] = {
    "model": {"layers": 4, "width": 64, "heads": 4},
    "data": {"domains": {"words": {"files": ["*.txt"]}}},
    "optimizer": {"lr": 0.01},
    "training": {"seq": 32, "batch": 8, "steps": 10},
}
MOE = {"moe": {"experts": 8, "active": 2, "granularity": 4}}


def run(*changes: dict[str, Any]) -> RunConfig:
    content = BASE
    for change in changes:
        content = merge(content, change)
    return validate(RunConfig, content, "run.yaml")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": {"max_seq": 16}}, r"training.seq \(32\) exceeds model.max_seq \(16\)"),
        (
            {"moe": {"experts": 8, "active": 2, "granularity": 6}},
            r"moe.granularity \(6\) with model.width \(64\) gives experts of width 42.6667, which must be a multiple",
        ),
        (
            {"moe": {**MOE["moe"], "first_dense": 4}},
            r"moe.first_dense \(4\) and moe.every \(1\) leave no mixture among model.layers \(4\)",
        ),
        (
            {"parallel": {"zero": 0}, "training": {"dtype": "bf16"}},
            r"parallel.zero \(0\) works in fp32 only; .* use parallel.zero=1",
        ),
        ({"eval": {"domains": ["code"]}}, r"eval.domains \(code\): not in data.domains \(words\)"),
        (
            {"eval": {"tasks": {"go-on": {"continuations": {"domain": "code"}}}}},
            r"eval.tasks.go-on.continuations.domain \(code\): not in data.domains \(words\)",
        ),
        (
            {"eval": {"tasks": {"words": {"file": "a.jsonl"}}}},
            r"eval.tasks.words: a name of a domain, or of all held-out",
        ),
        ({"eval": {"tasks": {"held_out": {"file": "a.jsonl"}}}}, r"eval.tasks.held_out: a name of a domain"),
        ({"eval": {"tasks": {"a/b": {"file": "a.jsonl"}}}}, r"eval.tasks.a/b: names files, so use letters, digits"),
        (
            {"eval": {"tasks": {"both": {"file": "a.jsonl", "continuations": {"domain": "words"}}}}},
            r"eval.tasks.[a-z]+: give exactly one of file, continuations \(given: file, continuations\)",
        ),
        ({"eval": {"tasks": {"none": {}}}}, r"exactly one of file, continuations \(given: none\)"),
        (
            {"eval": {"tasks": {"t": {"continuations": {"domain": "words", "choices": 1}}}}},
            r"eval.tasks.t.continuations.choices \(1\): input should be greater than or equal to 2",
        ),
        (
            {"noise": {"every": 2}, "training": {"batch": 1}},
            r"noise.every \(2\) needs training.batch \(1\) of at least 2",
        ),
        (
            {"noise": {"every": 2, "small_batch": 3}},
            r"noise.small_batch \(3\) must divide training.batch \(8\) and be smaller",
        ),
        ({"noise": {"small_batch": 8}}, r"noise.small_batch \(8\) must divide training.batch \(8\) and be smaller"),
        ({"training": {"dtype": "fp16"}}, r"training.dtype \('fp16'\)"),
        ({"optimizer": {"lr": 0}}, r"optimizer.lr \(0\): input should be greater than 0"),
        ({"trainig": {}}, "trainig: unknown key; did you mean training\\?"),
        ({"training": {"micro_batches": 1}}, "training.micro_batches: unknown key; did you mean micro_batch\\?"),
        ({"moe": {"experts": 2, "active": 3, "granularity": 4}}, r"moe.active \(3\) must not exceed moe.experts \(2\)"),
    ],
)
def test_sections_that_contradict_each_other(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        run(change)


@pytest.mark.parametrize(
    ("change", "world", "said"),
    [
        ({"parallel": {"tensor": 3}}, 3, r"parallel.tensor \(3\) must divide model.heads \(4\); try 1, 2, 4"),
        (
            {"parallel": {"tensor": 4}, "model": {"kv_heads": 2}},
            4,
            r"parallel.tensor \(4\) must divide model.kv_heads \(2\); try 1, 2",
        ),
        (
            {"parallel": {"tensor": 2}, "model": {"vocab_multiple": 1}},
            2,
            r"parallel.tensor \(2\) must divide model.vocab_multiple \(1\)",
        ),
        (
            {"parallel": {"tensor": 2}, "training": {"seq": 33}},
            2,
            r"parallel.tensor \(2\) must divide training.seq \(33\)",
        ),
        ({"parallel": {"pipeline": 3}}, 3, r"parallel.pipeline \(3\) must divide model.layers \(4\); try 1, 2, 4"),
        ({"parallel": {"expert": 2}}, 2, r"parallel.expert \(2\) needs a moe section; this model is dense"),
        (
            {"parallel": {"expert": 3}, "moe": MOE["moe"], "training": {"batch": 9}},
            3,
            r"parallel.expert \(3\) must divide moe.experts \(8\); try 1, 2, 4, 8",
        ),
        ({}, 3, r"training.batch \(8\) must be a multiple of the data-parallel size \(3 of 3 ranks\)"),
        (
            {"training": {"micro_batch": 3}},
            2,
            r"training.micro_batch \(3\) times the data-parallel size \(2\) must divide training.batch \(8\); "
            r"try micro_batch 1, 2, 4",
        ),
        (
            {"noise": {"every": 1, "small_batch": 1}},
            2,
            r"noise.small_batch \(1\) must be a multiple of the data-parallel size \(2 of 2 ranks\)",
        ),
        (
            {"parallel": {"pipeline": 2, "virtual_stages": 2}, "model": {"layers": 2}},
            2,
            r"parallel.virtual_stages \(2\) must divide the 1 layers of a pipeline stage; try 1",
        ),
        (
            {"parallel": {"pipeline": 2, "virtual_stages": 2}, "model": {"layers": 4}, "training": {"micro_batch": 8}},
            2,
            r"training.micro_batch \(8\) leaves 1 micro-batches a rank; with virtual stages they must be a multiple of "
            r"parallel.pipeline \(2\); try micro_batch 1, 2, 4",
        ),
        (
            {
                "parallel": {"pipeline": 2, "virtual_stages": 2},
                "model": {"layers": 4},
                "noise": {"every": 1, "small_batch": 1},
            },
            4,
            r"noise.small_batch \(1\) must be a multiple of the data-parallel size \(2 of 4 ranks\) x "
            r"parallel.pipeline \(2; virtual stages\); try noise.small_batch=4",
        ),
        (
            {**MOE, "parallel": {"tensor": 2, "sequence": False}},
            2,
            r"parallel.sequence: false leaves every tensor rank with the same tokens.*expert_over=dp",
        ),
        ({"parallel": {"tensor": 2, "pipeline": 2}}, 6, r"= 4 must divide the number of ranks \(6\)"),
        (
            {**MOE, "parallel": {"expert": 2, "exchange_chunks": 3}},
            2,
            r"parallel.exchange_chunks \(3\) must divide the \d experts of a rank; try 1, 2",
        ),
        (
            {**MOE, "parallel": {"expert": 2, "exchange_chunks": 2, "exchange": "shared"}},
            2,
            r"parallel.exchange_chunks \(2\) needs an exchange that goes on while a rank computes: "
            r"parallel.exchange torch or nccl or two_level, not shared",
        ),
    ],
)
def test_layouts_that_do_not_fit(change: dict[str, Any], world: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        run(change).check_layout(world)


def test_layouts_that_fit() -> None:
    topology = run(MOE, {"parallel": {"tensor": 2, "pipeline": 2, "expert": 4}}).check_layout(8)
    assert (topology.data, topology.expert, topology.expert_data) == (2, 4, 1)
    assert run().check_layout(4).data == 4


def test_micro_batches_and_small_batches() -> None:
    assert run().micro_batch(run().check_layout(1)) == 8
    assert run().micro_batch(run().check_layout(2)) == 4
    measured = run({"noise": {"every": 1}, "training": {"batch": 16}})
    assert measured.small_batch == 2
    one, two = measured.check_layout(1), measured.check_layout(2)
    assert (measured.micro_batch(one), measured.micro_batch(one, for_noise=True)) == (16, 2)
    assert (measured.micro_batch(two), measured.micro_batch(two, for_noise=True)) == (8, 1)
    assert run({"training": {"batch": 6}}).small_batch == 1
    assert run({"training": {"batch": 20}}).small_batch == 2
    assert run({"noise": {"small_batch": 4}}).small_batch == 4


UNSCIENTIFIC: list[dict[str, Any]] = [
    {"parallel": {"tensor": 2}},
    {"runtime": {"threads": 1}},
    {"logging": {"tensorboard": False}},
    {"checkpoint": {"every": 5}},
    {"checkpoint": {"keep_every": 5, "async": False}},
    {"name": "other"},
    {"data": {"path": "/elsewhere"}},
    {"training": {"micro_batch": 2}},
    {"training": {"recompute": "full"}},
]
SCIENTIFIC: list[dict[str, Any]] = [
    {"model": {"qk_norm": "head"}},
    MOE,
    {"optimizer": {"lr": 0.02}},
    {"schedule": {"kind": "wsd"}},
    {"training": {"seed": 1}},
    {"training": {"dtype": "bf16"}},
    {"data": {"held_out": 0.1}},
    {"noise": {"every": 2}},
    {"eval": {"every": 2}},
    {"eval": {"tasks": {"capitals": {"file": "capitals.jsonl"}}}},
]


@pytest.mark.parametrize("change", UNSCIENTIFIC, ids=str)
def test_what_does_not_change_the_science(change: dict[str, Any]) -> None:
    assert run(change).scientific_hash == run().scientific_hash
    assert run(change).config_hash != run().config_hash


@pytest.mark.parametrize("change", SCIENTIFIC, ids=str)
def test_what_changes_the_science(change: dict[str, Any]) -> None:
    assert run(change).scientific_hash != run().scientific_hash


def test_keys_that_came_later_leave_names_as_they_were() -> None:
    """Hashes that an older version gave, which its records hold; a later key counts where it changes something."""
    assert run().scientific_hash == "f96419656cf29c95"
    assert run(MOE).scientific_hash == "23303ba833c706e5"
    assert run().config_hash == "cae043a5a5eb871c"
    assert run({"eval": {"tasks": {}}}).config_hash == run().config_hash
    mla = {"kv_rank": 8, "nope_dim": 8, "rope_dim": 4, "value_dim": 8}
    yarn = {"factor": 4, "original_seq": 16}
    later = (
        *({"norm_eps": 1e-6}, {"rotary_fraction": 0.5}, {"qkv_bias": True}, {"rope_base": 10_000.5}),
        *({"mla": mla}, {"mla": {**mla, "q_rank": 8}}, {"mla": mla, "yarn": yarn}),
    )
    assert len({run().scientific_hash, *(run({"model": keys}).scientific_hash for keys in later)}) == 8


def test_spelling_does_not_change_a_hash() -> None:
    spelled = run({"model": {"kv_heads": 4, "ffn": 256, "rope_base": 1e4}, "training": {"seed": 0}})
    assert spelled.config_hash == run().config_hash


def test_a_resolved_file_is_the_run(tmp_path: Path) -> None:
    """What a run's folder keeps reads back as the same configuration."""
    import yaml

    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(run(MOE).model_dump(mode="json")))
    assert load_run(path) == run(MOE)


def test_the_key_async_is_no_word_of_python(tmp_path: Path) -> None:
    """In files, overrides and what is stored it is ``checkpoint.async``."""
    import yaml

    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run({"checkpoint": {"async": False}}).model_dump(mode="json")))
    assert yaml.safe_load(path.read_text())["checkpoint"]["async"] is False
    assert load_run(path).checkpoint.async_ is False
    assert load_run(path, ["checkpoint.async=true"]).checkpoint.async_ is True


def test_loading_names_the_run_after_its_file(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(
        "model: {shape: d32}\ndata: {domains: {words: {files: ['*.txt']}}}\n"
        "optimizer: {lr: 1e-2}\ntraining: {seq: 32, batch: 8, tokens: 1e6}\n"
    )
    loaded = load_run(path, ["training.batch=16", "optimizer.lr=3e-3"])
    assert (loaded.name, loaded.training.batch, loaded.optimizer.lr, loaded.training.tokens) == ("small", 16, 3e-3, 1e6)
    with pytest.raises(UserError, match=r"training\.batchs: unknown key; did you mean batch\?"):
        load_run(path, ["training.batchs=16"])
