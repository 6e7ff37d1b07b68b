"""Promise 1: what a run computes does not depend on its layout.

Each world size is spawned once and runs many cases (tests/helpers/parity_cases.py); each case is judged against the
model written out in plain torch in float64 (tests/helpers/parity_judge.py): loss, every gradient, norms, noise scale,
router statistics, moments and weights. Named after reports of what goes wrong elsewhere: pytorch#160285 (gradients
doubled at EP=2), DeepSpeed#5259 (scale depends on EP), Megatron-LM#5916 (norm undercounts), Megatron-LM#5047
(auxiliary loss depends on TP), Automodel#3816 (another norm in each EP group).

The core runs by default, the whole matrix with ``-m slow``; ``--parity-table FILE`` writes what was measured.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from parity_cases import MUTATED, WORLDS
from parity_judge import Errors, judge, judge_bf16

from moescale.base.config import validate
from moescale.training.config import RunConfig


def labels(bf16: bool) -> list[Any]:
    """(world, case) of all cases of a kind; those of the matrix are slow."""
    return [
        pytest.param(where, name, id=f"{where}-{name}", marks=[pytest.mark.slow] if where.startswith("matrix") else [])
        for where, world in WORLDS.items()
        for name, case in world.cases.items()
        if where != "mutated" and case.bf16 == bf16 and not (bf16 and world.ranks == 1)
    ]


@pytest.fixture(scope="session")
def table(request: pytest.FixtureRequest) -> Iterator[Any]:
    """``table(world, case, errors)``: a line of the published table."""
    lines: list[str] = []

    def note(where: str, name: str, errors: Errors) -> None:
        case = WORLDS[where].cases[name]
        sizes = ", ".join(f"{key} {value}" for key, value in case.changes.get("parallel", {}).items()) or "data only"
        found = [errors.largest.get(kind) for kind in ("loss", "gradient", "squared norm", "noise scale", "weights")]
        cells = " | ".join("" if error is None else f"{error:.0e}" for error in found)
        lines.append(f"| {WORLDS[where].ranks} | {name} | {sizes} | {cells} |")

    yield note
    file = request.config.getoption("--parity-table")
    if file and lines:
        head = (
            "| ranks | case | layout | loss | gradient | norm | noise | weights |\n|---|---|---|---|---|---|---|---|\n"
        )
        Path(file).write_text(head + "\n".join(lines) + "\n")


@pytest.mark.distributed
@pytest.mark.parametrize(("where", "name"), labels(bf16=False))
def test_layout_does_not_change_the_result(
    where: str, name: str, computed: Any, small_run: Any, reference_gpt: Any, table: Any
) -> None:
    ranks = computed(where, name)
    case = WORLDS[where].cases[name]
    config = validate(RunConfig, small_run(**case.changes), name)
    table(where, name, judge(ranks, config, case, reference_gpt))


@pytest.mark.distributed
@pytest.mark.parametrize(("where", "name"), labels(bf16=True))
def test_bf16_layouts_agree_to_rounding(where: str, name: str, computed: Any, table: Any) -> None:
    deep = WORLDS[where].cases[name].changes.get("model", {}).get("layers") == 4
    table(where, name, judge_bf16(computed("core-1", "bf16-deep" if deep else "bf16"), computed(where, name)))


@pytest.mark.distributed
@pytest.mark.parametrize("name", list(MUTATED.cases))
def test_a_broken_rule_is_found_out(name: str, computed: Any, small_run: Any, reference_gpt: Any) -> None:
    """The proof can fail: with any one rule of docs/layout.md dropped, it does."""
    ranks = computed("mutated", name)
    case = MUTATED.cases[name]
    with pytest.raises(AssertionError, match="off by"):
        judge(ranks, validate(RunConfig, small_run(**case.changes), name), case, reference_gpt)
