"""A model that training made, exported: transformers loads it, generates, and finds the loss that evaluation found."""

import math
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from moescale.base.errors import UserError
from moescale.scaling.record import read_record
from moescale.training.config import load_run
from moescale.training.run import train

SEQ = 32


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run ``run`` and its export ``there``."""
    folder = tmp_path_factory.mktemp("trained")
    generator = random.Random(0)
    words = ["the", "model", "reads", "a", "token", "and", "sends", "it", "to", "an", "expert", "that", "knows"]
    for document in range(30):
        lines = [" ".join(generator.choices(words, k=12)) + f" {generator.random()}" for _ in range(30)]
        (folder / f"{document:02d}.txt").write_text("\n".join(lines))
    content: dict[str, Any] = {
        "model": {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "qk_norm": "head", "norm_eps": 1e-4},
        "moe": {"experts": 6, "active": 2, "expert_width": 24, "first_dense": 1},
        "data": {
            "path": str(folder / "prepared"),
            "domains": {"words": {"files": [str(folder / "*.txt")]}},
            "tokenizer": {"vocab": 330},
            "held_out": 0.1,
            "samples": 4096,
        },
        "optimizer": {"lr": 0.01},
        "training": {"seq": SEQ, "batch": 8, "steps": 30},
        "eval": {"sequences": 16},
        "logging": {"tensorboard": False},
        "runtime": {"threads": 1},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    train_in(folder, "run.yaml", "run", "there", "hf-qwen3-moe")
    return folder


def train_in(folder: Path, *arguments: str) -> None:
    script = Path(__file__).with_name("train_and_convert.py")
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "there", attn_implementation="eager").eval()


def test_the_loss_is_the_evaluations(exported: Path) -> None:
    from moescale.base.config import validate
    from moescale.data import DataConfig, prepare
    from moescale.data.loader import held_out_sequences

    section = yaml.safe_load((exported / "run.yaml").read_text())["data"]
    held_out = held_out_sequences(prepare(validate(DataConfig, section, "data")), "words", SEQ, 16)
    with torch.no_grad():
        logits = load(exported)(held_out.tokens_NS).logits
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), held_out.labels_NS, reduction="none")
    loss = float((losses * held_out.mask_NS).sum() / held_out.mask_NS.sum())
    recorded = read_record(exported / "run").evals[-1]
    assert loss == pytest.approx(recorded["loss"], rel=1e-6)
    assert loss < math.log(330) - 0.5  # it has learned something


def test_it_generates_text_of_its_corpus(exported: Path) -> None:
    """From the tokenizer that went along: words that the corpus is made of."""
    from moescale.data import Tokenizer

    tokenizer = Tokenizer.load(exported / "there" / "tokenizer.model")
    model = load(exported)
    assert model.config.eos_token_id == tokenizer.eod
    prompt = torch.tensor([tokenizer.encode("the model reads")])
    written = model.generate(prompt, max_new_tokens=24, do_sample=False)
    assert written.shape == (1, prompt.shape[1] + 24)
    assert torch.equal(written[:, : prompt.shape[1]], prompt)
    assert tokenizer.decode(written[0].tolist()).startswith("the model reads")


def test_a_run_starts_from_it(exported: Path, convert: Callable[..., Any], tmp_path: Path) -> None:
    """Back into a run's folder, and on from there: at a learning rate of nearly nothing the evaluation is the same."""
    convert(exported / "there", exported / "again", "moescale")
    sections = yaml.safe_load((exported / "run.yaml").read_text())
    content = {key: value for key, value in sections.items() if key not in ("model", "moe")}
    content |= {
        "extends": "again/config.yaml",
        "optimizer": {"lr": 1e-12},
        "training": {**sections["training"], "steps": 1},
    }
    (exported / "again.yaml").write_text(yaml.safe_dump(content))
    changed = load_run(exported / "again.yaml", ["model.rope_base=500"])
    with pytest.raises(UserError, match=r"holds a converted model with model\.rope_base \(10000\), not 500"):
        train(changed, exported / "again")
    train_in(exported, "again.yaml", "again")
    first, second = (read_record(exported / run) for run in ("run", "again"))
    assert [line["step"] for line in second.steps] == [1]
    assert second.evals[-1]["loss"] == pytest.approx(first.evals[-1]["loss"], rel=1e-6)
