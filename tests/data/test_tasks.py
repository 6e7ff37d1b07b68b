"""Downstream tasks: questions from files and from held-out text, and the tokens that they become."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from held_out_text import documents_of

from moescale.base.errors import UserError
from moescale.data import PreparedData, Tokenizer
from moescale.data.choices import encode_choices
from moescale.data.continuations import continuations
from moescale.data.questions import Question, Questions, read_questions, write_questions
from moescale.data.task_config import ContinuationsConfig, TaskConfig
from moescale.data.tasks import questions_of, write_for_harness

SETTING = ContinuationsConfig(domain="files", count=12, choices=3, context=40, length=15)
ASKED = Questions(
    "asked",
    [
        Question("A gate sends each token", (" to two experts", " \u2581\u00e9", "\t\u4e16"), 0),
        Question("The router learns  \n", ("which", "were right"), 1),
    ],
)


def test_continuations_are_passages_of_held_out_documents(prepared: PreparedData) -> None:
    documents = documents_of(prepared, "files")
    found = continuations("t", SETTING, prepared)
    passages = [choice for question in found for choice in question.choices]
    assert len(found) == 12
    assert len(set(passages)) == len(passages) == 36
    for question in found:
        assert {len(choice) for choice in question.choices} == {15}
        assert len(question.context) == 40
        assert question.context == question.context.rstrip()
        assert {choice[0] for choice in question.choices} == {" "}
        before = prepared.tokenizer.encode(question.context)
        for choice in question.choices:  # no piece across the border
            assert prepared.tokenizer.encode(question.context + choice)[: len(before)] == before
        together = question.context + question.choices[question.answer]
        assert any(together in text for text in documents)
        assert all(any(choice in text for text in documents) for choice in question.choices)
    assert len({question.answer for question in found}) == 3  # the right one may stand anywhere


def test_continuations_follow_from_data_and_seed(prepared: PreparedData) -> None:
    assert continuations("t", SETTING, prepared) == continuations("t", SETTING, prepared)
    other = continuations("t", SETTING.model_copy(update={"seed": 1}), prepared)
    assert (
        len({question.context for question in other} & {q.context for q in continuations("t", SETTING, prepared)}) < 6
    )


@pytest.mark.parametrize("changes", [{"count": 5000}, {"context": 100_000}, {"domain": "elsewhere"}], ids=str)
def test_a_domain_with_too_little_text_is_refused(prepared: PreparedData, changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"eval\.tasks\.t\.continuations: the held-out text of domain .* lower count"):
        continuations("t", SETTING.model_copy(update=changes), prepared)


def test_a_file_comes_back(tmp_path: Path, prepared: PreparedData) -> None:
    path = tmp_path / "asked.jsonl"
    write_questions(path, ASKED)
    (found,) = questions_of({"asked": TaskConfig(file=str(path))}, prepared)
    assert found == ASKED
    assert found.hash == ASKED.hash
    assert found.chance == (1 / 3 + 1 / 2) / 2
    path.write_text(path.read_text() + "\n\n" + path.read_text().splitlines()[0])
    assert len(read_questions("asked", path)) == 3


GOOD = {"context": "one", "choices": [" two", " three"], "answer": 0}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not a JSON object"),
        ("[1]", r"context, choices and answer are expected \(found: list\)"),
        (json.dumps({"context": "a", "choices": ["b", "c"]}), r"expected \(found: choices, context\)"),
        (json.dumps(GOOD | {"context": " \n"}), r'context \(" \\n"\) must be text that is more than white space'),
        (json.dumps(GOOD | {"context": 3}), r"context \(3\) must be text"),
        (json.dumps(GOOD | {"context": "a\ud800"}), "context .* must be text"),
        (json.dumps(GOOD | {"choices": " two"}), "must be a list of texts"),
        (json.dumps(GOOD | {"choices": ["a", ""]}), "none of them empty"),
        (json.dumps(GOOD | {"choices": ["a"]}), "at least two, no two of them equal"),
        (json.dumps(GOOD | {"choices": ["a", "b", "a"]}), "no two of them equal"),
        (json.dumps(GOOD | {"answer": 2}), r"answer \(2\) must be the index of a choice, 0 to 1"),
        (json.dumps(GOOD | {"answer": True}), r"answer \(true\) must be the index"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{line}\n")
    with pytest.raises(UserError, match=rf"bad\.jsonl:2: .*{said}"):
        read_questions("bad", path)


def test_a_missing_and_an_empty_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"eval\.tasks\.a\.file \(.*no\.jsonl\): cannot be read: No such file"):
        read_questions("a", tmp_path / "no.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no question"):
        read_questions("a", tmp_path / "empty.jsonl")


def test_choices_become_windows_behind_their_contexts(tokenizer: Tokenizer) -> None:
    found = encode_choices(ASKED, tokenizer, 64)
    assert found.tokens_NS.shape == found.labels_NS.shape == found.mask_NS.shape == (5, 64)
    assert found.question_N.tolist() == [0, 0, 0, 1, 1]
    assert found.right_Q.tolist() == [0, 4]
    assert found.lengths_N.tolist() == [15, 3, 2, 5, 10]
    assert found.cut == 0
    row = 0
    for question in ASKED.content:
        before = tokenizer.encode(question.context.rstrip())
        for choice in question.choices:
            whole = tokenizer.encode(question.context + choice)
            labels = found.labels_NS[row][found.mask_NS[row].bool()]
            assert labels.tolist() == whole[len(before) :]
            assert found.tokens_NS[row, : len(whole) - 1].tolist() == [*before, *whole[len(before) : -1]]
            row += 1
    right = [found.labels_NS[r][found.mask_NS[r].bool()] for r in found.right_Q]
    assert found.n_tokens == sum(len(labels) for labels in right)
    # White space at the end of a context is predicted with its choices.
    assert found.n_bytes == len(b" to two experts") + len(b"  \nwere right")


def test_a_context_that_does_not_fit_loses_its_beginning(tokenizer: Tokenizer) -> None:
    whole, cut = encode_choices(ASKED, tokenizer, 64), encode_choices(ASKED, tokenizer, 8)
    assert 0 < cut.cut <= 2
    assert (cut.n_tokens, cut.n_bytes) == (whole.n_tokens, whole.n_bytes)
    for row in range(5):
        counted = whole.mask_NS[row].bool()
        last = int(counted.nonzero().max())
        wanted = whole.labels_NS[row][counted]
        assert torch.equal(cut.labels_NS[row][cut.mask_NS[row].bool()], wanted)
        kept = min(last + 1, 8)
        assert torch.equal(cut.tokens_NS[row, :kept], whole.tokens_NS[row, last + 1 - kept : last + 1])


def test_choices_that_cannot_be_scored_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"eval\.tasks\.asked, question 1 .* takes \d+ tokens and training\.seq is 4"):
        encode_choices(ASKED, tokenizer, 4)
    pair = next(piece.decode() for piece in tokenizer.pieces if len(piece) == 2 and piece.isalpha() and piece.isascii())
    swallowed = Questions("t", [Question(pair[0], (pair[1], " gate"), 0)])
    with pytest.raises(UserError, match="a choice adds no token to its context"):
        encode_choices(swallowed, tokenizer, 16)


def test_the_harness_gets_the_same_questions(tmp_path: Path) -> None:
    lines, task = write_for_harness(tmp_path / "tasks", ASKED)
    assert read_questions("asked", lines) == ASKED.content
    content = yaml.safe_load(task.read_text())
    assert content["dataset_kwargs"]["data_files"]["test"] == str(lines)
    assert lines.is_absolute()
    assert (content["task"], content["output_type"]) == ("asked", "multiple_choice")


def test_a_domain_without_much_text_still_gives_every_question_its_own_passages(prepared: PreparedData) -> None:
    many = continuations("t", SETTING.model_copy(update={"count": 40, "choices": 2}), prepared)
    counts = np.unique([question.answer for question in many], return_counts=True)[1]
    assert counts.min() > 5
