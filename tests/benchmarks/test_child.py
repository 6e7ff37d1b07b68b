"""What a measured process is asked beside its time."""

import torch

from moescale.benchmarks.child import peak_bytes_of


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
