"""A model that training made, exported: transformers loads it, generates, and finds the loss that evaluation found."""

import math
import random
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from moescale.base.errors import UserError
from moescale.data.tokenizer import SPACE
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


def test_it_generates_text(exported: Path) -> None:
    """With transformers alone, tokenizer included."""
    from transformers import AutoTokenizer

    model, tokenizer = load(exported), AutoTokenizer.from_pretrained(exported / "there")
    assert model.config.eos_token_id == tokenizer.eos_token_id == 1
    prompt = tokenizer("the model reads", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    text = tokenizer.decode(written[0])
    assert text.startswith("the model reads")
    assert len(text) > len("the model reads")


@settings(deadline=None, max_examples=300)
@given(
    text=st.lists(
        st.sampled_from(
            ["the", "model", " ", "  ", "   ", "\n", "token", "ex", "</s>", "<unk>", "<0x41>", "é", "漢", "🎉"]
        )
        | st.text(max_size=6).filter(lambda t: SPACE not in t),
        max_size=12,
    ).map("".join)
)
def test_the_tokenizer_is_the_same(exported: Path, text: str) -> None:
    """Token for token, texts that look like special tokens included; and every text comes back."""
    ours, theirs = tokenizers(exported / "there")
    tokens = theirs.encode(text, add_special_tokens=False)
    assert tokens == ours.encode(text)
    assert theirs.decode(tokens) == text


@cache
def tokenizers(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    from moescale.data import Tokenizer

    return Tokenizer.load(folder / "tokenizer.model"), AutoTokenizer.from_pretrained(folder)


def test_other_sentencepiece_models_are_not_approximated(tmp_path: Path) -> None:
    import sentencepiece

    from moescale.checkpoint.convert.hf_tokenizer import add_tokenizer

    lines = [" ".join(random.Random(n).choices(["reads", "a", "token", "and", "sends"], k=9)) for n in range(60)]
    for number, options in enumerate(({"model_type": "unigram"}, {"model_type": "bpe"})):
        folder = tmp_path / str(number)
        folder.mkdir()
        with (folder / "tokenizer.model").open("wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines), model_writer=file, vocab_size=16, minloglevel=2, **options
            )
        assert add_tokenizer(folder) == []
        assert [path.name for path in folder.iterdir()] == ["tokenizer.model"]


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
