"""The example programs of docs/examples learn, and alike on one rank and on two with the experts spread over them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"


def losses(program: str, ranks: int) -> list[float]:
    outside = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*launcher, str(EXAMPLES / program)],
        env={**outside, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [float(value) for value in re.findall(r"^step \d+ loss (\S+)$", done.stdout, flags=re.MULTILINE)]


@pytest.mark.distributed
@pytest.mark.parametrize("program", ["megatron_program.py", "deepspeed_program.py"])
def test_an_example_learns_alike_on_one_rank_and_on_two(program: str) -> None:
    alone, spread = losses(program, 1), losses(program, 2)
    assert len(alone) == 10
    assert min(alone) < 0.9 * alone[0]
    # Steps multiply rounding; a wrong scale or sum of gradients would show in the second already.
    assert spread[:3] == pytest.approx(alone[:3], rel=1e-5)
    assert spread == pytest.approx(alone, rel=1e-3)
