"""A trained model's score is what lm-evaluation-harness finds for the exported one: as many questions right.

Needs ``pip install 'moescale[downstream]'``; nothing is downloaded.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from moescale.data import DataConfig, prepare
from moescale.data.task_config import TaskConfig
from moescale.data.tasks import questions_of, write_for_harness
from moescale.scaling.record import read_record

pytestmark = pytest.mark.slow

WORDS = ["the", "model", "reads", "a", "token", "and", "sends", "it", "to", "an", "expert", "that", "knows"]
TASKS: dict[str, Any] = {
    "go_on": {"continuations": {"domain": "words", "count": 120, "choices": 4, "context": 60, "length": 12}},
    "of_a_file": {"file": "asked.jsonl"},
}
FORMATS = {
    "hf-mixtral": {"experts": 6, "active": 2, "expert_width": 24, "score": "softmax_normalized"},
    "hf-llama": None,
}


def text(generator: random.Random) -> str:
    """Lines in which words follow one another by a rule, so that there is something to know."""
    lines = []
    for _ in range(30):
        at, line = generator.randrange(len(WORDS)), []
        for _ in range(12):
            line.append(WORDS[at])
            at = (at + generator.choice((1, 2))) % len(WORDS)
        lines.append(" ".join(line) + f" {generator.randrange(100)}")
    return "\n".join(lines)


@pytest.fixture(scope="module", params=FORMATS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``run``, its export ``there`` and the questions in ``tasks``."""
    pytest.importorskip("lm_eval", reason="pip install 'moescale[downstream]'")
    folder = tmp_path_factory.mktemp("harness")
    generator = random.Random(0)
    for document in range(40):
        (folder / f"{document:02d}.txt").write_text(text(generator))
    questions = [
        # A context that is too long, one that ends in white space, choices of several lengths and in several scripts.
        {"context": " ".join(WORDS * 4), "choices": [" the model", " expert the", " 世界"], "answer": 0},
        {"context": "the model reads \n", "choices": ["a token", "the", "an expert that knows"], "answer": 2},
        {"context": "and sends it to", "choices": [" an", " an expert that", " it it it it it"], "answer": 1},
    ]
    (folder / "asked.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    data = {
        "path": str(folder / "prepared"),
        "domains": {"words": {"files": [str(folder / "*.txt")]}},
        "tokenizer": {"vocab": 330},
        "held_out": 0.2,
        "samples": 4096,
    }
    content = {
        "model": {"layers": 2, "width": 32, "heads": 4, "tied": False},
        "moe": FORMATS[request.param],
        "data": data,
        "optimizer": {"lr": 0.01},
        "training": {"seq": 48, "batch": 8, "steps": 60},
        "eval": {"sequences": 16, "tasks": TASKS},
        "logging": {"tensorboard": False},
        "runtime": {"threads": 1},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    script = Path(__file__).with_name("train_and_convert.py")
    command = [sys.executable, str(script), "run.yaml", "run", "there", request.param]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    given = {**TASKS, "of_a_file": {"file": str(folder / "asked.jsonl")}}
    prepared = prepare(DataConfig.model_validate(data))
    for questions_ in questions_of({name: TaskConfig.model_validate(task) for name, task in given.items()}, prepared):
        write_for_harness(folder / "tasks", questions_)
    return folder


@pytest.fixture(scope="module")
def asked(exported: Path) -> Path:
    """Where the harness wrote its results."""
    command = [
        sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", "pretrained=there,dtype=float32",
        "--tasks", ",".join(TASKS), "--include_path", "tasks", "--device", "cpu", "--batch_size", "4",
        "--output_path", "results", "--log_samples",
    ]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(exported / "hf")}
    done = subprocess.run(
        command, cwd=exported, env={**os.environ, **offline}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return exported / "results"


@pytest.mark.parametrize("name", TASKS)
def test_the_harness_finds_as_many_right(exported: Path, asked: Path, name: str) -> None:
    (file,) = asked.rglob("results_*.json")
    theirs = json.loads(file.read_text())["results"][name]
    (ours,) = (line for line in read_record(exported / "run", strict=True).evals if line["domain"] == name)
    count = ours["task"]["questions"]
    assert count == (120 if name == "go_on" else 3)
    assert round(theirs["acc_norm,none"] * count) == round(ours["score"] * count)
    assert round(theirs["acc,none"] * count) == round(ours["task"]["raw_score"] * count)
    assert theirs["acc_norm,none"] == pytest.approx(ours["score"], abs=1e-12)
    if name == "go_on":
        assert ours["score"] > 0.4  # a quarter is chance


@pytest.mark.parametrize("name", TASKS)
def test_the_harness_finds_the_same_loss_of_the_right_choices(exported: Path, asked: Path, name: str) -> None:
    (file,) = asked.rglob(f"samples_{name}_*.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    right = -sum(float(sample["resps"][sample["doc"]["answer"]][0][0]) for sample in samples)
    (ours,) = (line for line in read_record(exported / "run").evals if line["domain"] == name)
    assert right / ours["n_tokens"] == pytest.approx(ours["loss"], rel=1e-5)
