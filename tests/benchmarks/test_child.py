"""What a measured process is asked beside its time."""

import torch

from moescale.benchmarks.child import Child, peak_bytes_of


def test_peak_is_what_lives_at_once() -> None:
    def step() -> None:
        first = torch.empty(1000)
        second = torch.empty(500)
        del first
        third = torch.empty(800)
        del second, third

    step()
    assert peak_bytes_of(step) == 4 * 1500


def test_peak_leaves_out_what_lived_before() -> None:
    kept = [torch.zeros(4000)]

    def step() -> None:
        kept[0] = kept[0].narrow(0, 0, 1000).clone()

    assert peak_bytes_of(step) == 4 * 1000


def test_a_process_says_what_its_steps_move_and_hold() -> None:
    case = {"name": "x", "dtype": "fp32", "threads": 1, "experts": 4, "active": 2, "expert_width": 16}
    payload = {"case": {**case, "width": 32, "seq": 32, "batch": 4}}
    with Child(".floor:LayerFloor", payload, 1, {}) as child:
        assert child.wait_until_built() is None
        assert "matrix products" in child.warm_up()
        assert child.measure(0.0) > 0
        assert child.peak_bytes() >= 0
