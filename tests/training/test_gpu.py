"""What a run computes on a GPU is what it computes on the CPU: judged like layouts, by the model in plain torch.

One GPU is enough; two runs of the same configuration on it agree to the last bit.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from parity_cases import WORLDS
from parity_judge import judge, judge_bf16

from moescale.base.config import validate
from moescale.scaling.record import read_record, same
from moescale.training.config import RunConfig

ALONE = WORLDS["core-1"]
MIXTURE = {"experts": 8, "active": 2, "expert_width": 32, "bias_rate": 0.01}

pytestmark = pytest.mark.gpu


def names(bf16: bool) -> list[str]:
    return [name for name, case in ALONE.cases.items() if case.bf16 == bf16]


@pytest.fixture(scope="session")
def on_gpu(compute: Any) -> Callable[[str], list[dict[str, Any]]]:
    """``on_gpu(case)``: what one rank stored."""
    done: list[Path] = []

    def get(name: str) -> list[dict[str, Any]]:
        if not done:
            done.append(compute(ALONE, devices="0"))
        return [torch.load(done[0] / f"{name}.0.pt", weights_only=False)]

    return get


@pytest.mark.parametrize("name", names(bf16=False))
def test_a_gpu_does_not_change_the_result(name: str, on_gpu: Any, small_run: Any, reference_gpt: Any) -> None:
    case = ALONE.cases[name]
    errors = judge(on_gpu(name), validate(RunConfig, small_run(**case.changes), name), case, reference_gpt)
    print(name, {kind: f"{error:.0e}" for kind, error in errors.largest.items()})


@pytest.mark.parametrize("name", names(bf16=True))
def test_bf16_agrees_to_rounding(name: str, on_gpu: Any, computed: Any) -> None:
    errors = judge_bf16(computed("core-1", name), on_gpu(name))
    print(name, {kind: f"{error:.0e}" for kind, error in errors.largest.items()})


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_goes_on_to_the_last_bit(dtype: str, run_ranks: Any, small_run: Any, tmp_path: Path) -> None:
    """Interrupted runs equal undisturbed ones, as on the CPU: nothing in a step depends on the order of threads."""
    content = small_run(
        moe=MIXTURE,
        training={"steps": 12, "dtype": dtype},
        checkpoint={"every": 4, "keep": 3},
        eval={"every": 6},
        noise={"every": 3, "small_batch": 2},
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    command = ["-P", "-m", "moescale", "train", str(tmp_path / "run.yaml"), "--out"]
    for name in ("whole", "again"):
        run_ranks([*command, str(tmp_path / name)], 1, devices="0")
    assert same(read_record(tmp_path / "whole"), read_record(tmp_path / "again")) == []
    _forget_after(tmp_path / "again", 4)
    run_ranks([*command, str(tmp_path / "again")], 1, devices="0")
    resumed = read_record(tmp_path / "again")
    assert [header["resumed_from"] for header in resumed.headers][-1] == 4
    assert same(read_record(tmp_path / "whole"), resumed) == []


def _forget_after(folder: Path, step: int) -> None:
    """As if the run had been killed after the checkpoint of ``step``."""
    for checkpoint in (folder / "checkpoints").glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    (folder / "status.json").unlink()
