"""Downstream tasks: their questions, and what lm-evaluation-harness needs to ask the same ones."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..base.files import write_atomically
from .continuations import continuations
from .prepare import PreparedData
from .questions import Question, Questions, read_questions, write_questions
from .task_config import TaskConfig


def questions_of(tasks: Mapping[str, TaskConfig], prepared: PreparedData) -> list[Questions]:
    """The questions of every task, in the order of their names.

    Raises:
        UserError: a file is missing or malformed, or a domain has too little held-out text.
    """
    return [Questions(name, _content(name, tasks[name], prepared)) for name in sorted(tasks)]


def _content(name: str, task: TaskConfig, prepared: PreparedData) -> list[Question]:
    if task.file is not None:
        return read_questions(name, Path(task.file))
    assert task.continuations is not None
    return continuations(name, task.continuations, prepared)


def write_for_harness(folder: Path, questions: Questions) -> tuple[Path, Path]:
    """Write ``NAME.jsonl`` and ``NAME.yaml``, the task for lm-evaluation-harness' ``--include_path``.

    The YAML names the questions by their absolute path: the harness reads it from its own working folder.

    Returns:
        Both paths.
    """
    folder = folder.resolve()
    lines, task = folder / f"{questions.name}.jsonl", folder / f"{questions.name}.yaml"
    write_questions(lines, questions)
    write_atomically(task, yaml.safe_dump(_harness_task(questions, lines), sort_keys=False))
    return lines, task


def _harness_task(questions: Questions, lines: Path) -> dict[str, Any]:
    """Fields of the questions by their names, without a delimiter: texts are asked as they stand."""
    return {
        "task": questions.name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(lines)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "num_fewshot": 0,
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc_norm", "acc")
        ],
        "metadata": {"version": questions.hash},
    }
