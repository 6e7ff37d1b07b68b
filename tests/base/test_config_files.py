"""Configuration files: extending, overriding, and errors that name what is wrong."""

import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, Field

from moescale.base.config import apply_overrides, find_config, load_yaml, merge, validate
from moescale.base.errors import UserError
from moescale.base.yaml_text import parse_yaml


class Optimizer(BaseModel, frozen=True, extra="forbid"):
    lr: float = Field(gt=0)
    betas: tuple[float, float] = (0.9, 0.95)


class Run(BaseModel, frozen=True, extra="forbid"):
    steps: int
    optimizer: Optimizer
    other: Optimizer | None = None


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e11", 1e11),
        ("1E+3", 1000.0),
        ("-2e-4", -2e-4),
        ("1.5e9", 1.5e9),
        ("1_000e2", 100_000.0),
        ("1000", 1000),
        ("0.1", 0.1),
        ("yes", True),
        ("d64", "d64"),
        ("1e", "1e"),
        ("e5", "e5"),
        ("'1e5'", "1e5"),
        ("null", None),
        ("[1e2, a]", [100.0, "a"]),
        ("1.4B", "1.4B"),
        ("1:30", "1:30"),  # ninety in YAML 1.1
        ("010", "010"),  # eight
        ("2026-11-31", "2026-11-31"),  # no day, and an error in Python
        (".5e3", 500.0),
        ("-.inf", -math.inf),
        ("0x1F", 31),
    ],
)
def test_values(text: str, value: Any) -> None:
    found = parse_yaml(text, "here")
    assert found == value
    assert type(found) is type(value)


def test_duplicate_keys_are_refused() -> None:
    with pytest.raises(UserError, match=r"run\.yaml: not valid YAML:.*'lr' stands twice.*line 3"):
        parse_yaml("optimizer:\n  lr: 1\n  lr: 2\n", "run.yaml")


def test_malformed_text_names_its_place() -> None:
    with pytest.raises(UserError, match=r"run\.yaml: not valid YAML.*line 2"):
        parse_yaml("a: 1\nb: [1, 2\n", "run.yaml")


def test_code_is_not_run() -> None:
    with pytest.raises(UserError, match="not valid YAML"):
        parse_yaml("a: !!python/object/apply:os.getcwd []", "run.yaml")


def test_merging_is_deep_and_leaves_its_inputs() -> None:
    base, over = {"a": {"x": 1, "y": [1, 2]}, "b": 1}, {"a": {"y": [3]}, "b": {"z": 2}}
    assert merge(base, over) == {"a": {"x": 1, "y": [3]}, "b": {"z": 2}}
    assert base == {"a": {"x": 1, "y": [1, 2]}, "b": 1}


def test_extends(tmp_path: Path) -> None:
    write(tmp_path, "grand.yaml", "a: 1\nb: {x: 1, y: 1}\n")
    write(tmp_path, "one.yaml", "extends: grand.yaml\nb: {x: 2}\n")
    write(tmp_path, "two.yaml", "b: {z: 3}\nc: 5\n")
    child = write(tmp_path, "child.yaml", "extends: [one.yaml, two.yaml]\nc: 6\n")
    assert load_yaml(child) == {"a": 1, "b": {"x": 2, "y": 1, "z": 3}, "c": 6}


def test_extending_a_shipped_file_and_a_file_of_another_folder(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    write(tmp_path / "base", "top.yaml", "extends: beside.yaml\n")
    write(tmp_path / "base", "beside.yaml", "a: 1\n")  # found beside the file that names it
    assert load_yaml(write(tmp_path, "run.yaml", "extends: base/top.yaml\n")) == {"a": 1}
    assert find_config("data/stdlib.yaml", tmp_path).is_file()


def test_two_ways_to_one_ancestor_are_no_circle(tmp_path: Path) -> None:
    write(tmp_path, "root.yaml", "a: 1\n")
    for name in ("left", "right"):
        write(tmp_path, f"{name}.yaml", f"extends: root.yaml\n{name}: 1\n")
    assert load_yaml(write(tmp_path, "run.yaml", "extends: [left.yaml, right.yaml]\n")) == {
        "a": 1,
        "left": 1,
        "right": 1,
    }


def test_a_circle_of_extends(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "extends: b.yaml\n")
    write(tmp_path, "b.yaml", "extends: a.yaml\n")
    with pytest.raises(UserError, match=r"extends itself through a\.yaml -> b\.yaml -> a\.yaml"):
        load_yaml(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- 1\n- 2\n", "a mapping of keys to values is expected, not a list"),
        ("just text", "a mapping of keys to values is expected, not a str"),
        ("extends: nowhere.yaml\n", r"nowhere\.yaml: no such file in .* or in the shipped configs"),
        ("extends: 3\n", "extends"),
        ("extends: [1]\n", "extends"),
        ("extends: {a: 1}\n", "extends"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_yaml(write(tmp_path, "run.yaml", text))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.yaml: cannot be read"):
        load_yaml(tmp_path / "nothing.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UserError, match=r"binary\.yaml: cannot be read"):
        load_yaml(tmp_path / "binary.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_yaml(tmp_path)


def test_an_empty_file_is_an_empty_configuration(tmp_path: Path) -> None:
    assert load_yaml(write(tmp_path, "run.yaml", "# nothing\n")) == {}


def test_overrides() -> None:
    content = {"training": {"steps": 1, "seq": 8}, "list": [1, 2]}
    found = apply_overrides(content, ["training.steps=1e2", "model.shape=d64", "list=[3]", "training.note=a=b", "x="])
    assert found["training"] == {"steps": 100.0, "seq": 8, "note": "a=b"}
    assert found["model"] == {"shape": "d64"}
    assert (found["list"], found["x"]) == ([3], None)
    assert content == {"training": {"steps": 1, "seq": 8}, "list": [1, 2]}


@pytest.mark.parametrize("override", ["steps", "=3", "a.b=[1"])
def test_overrides_that_are_none(override: str) -> None:
    with pytest.raises(UserError, match="override"):
        apply_overrides({}, [override])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"steps": 1, "optimiser": {"lr": 1}}, "optimiser: unknown key; did you mean optimizer?"),
        ({"steps": 1, "optimizer": {"lr": 1, "beta": 1}}, "optimizer.beta: unknown key; did you mean betas?"),
        ({"steps": 1, "optimizer": {"lr": 1}, "other": {"beta": 2}}, "other.beta: unknown key; did you mean betas?"),
        ({"steps": 1, "optimizer": {"lr": 1, "zzz": 1}}, "optimizer.zzz: unknown key"),
        ({"steps": 1, "optimizer": {}}, "optimizer.lr: required and not given"),
        ({"steps": "x", "optimizer": {"lr": 1}}, "steps ('x'): input should be a valid integer"),
        ({"steps": 1, "optimizer": {"lr": -1}}, "optimizer.lr (-1): input should be greater than 0"),
        ({"steps": 1, "optimizer": {"lr": 1, "betas": [1]}}, "optimizer.betas"),
    ],
)
def test_complaints_name_field_and_value(content: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        validate(Run, content, "run.yaml")
    lines = str(error.value).splitlines()
    assert any(line.startswith(f"run.yaml: {said}") for line in lines), lines


def test_all_complaints_come_at_once() -> None:
    with pytest.raises(UserError) as error:
        validate(Run, {"stepz": 1, "optimizer": {"lr": 0}}, "run.yaml")
    assert len(str(error.value).splitlines()) == 3
