"""Kernels with an error in them: the emulator, a sanitizer or the poison must say so."""

import pytest
import torch

NUMBERS = torch.arange(1, 129, dtype=torch.int32)
FAULTS = (
    "none", "missing_barrier", "missing_syncwarp", "divergent_barrier", "barrier_after_exit", "barriers_on_two_lines",
    "mask_without_caller", "mask_of_absent_lane", "different_masks", "different_functions", "lane_outside_mask",
    "out_of_bounds_global", "out_of_bounds_shared", "race_in_block", "race_of_blocks", "uninitialised_shared",
)  # fmt: skip
FAULT_STATUS = 70  # of emulator/simt.cpp


def run(programs, fault, sanitizer="", seed=0):
    return programs.run("faults", sanitizer, {"in": NUMBERS}, {"fault": FAULTS.index(fault), "seed": seed})


def wanted():
    """Each block's numbers reversed, plus the sum of the 32 that its warp then holds."""
    reversed_ = NUMBERS.view(2, 64).flip(1).reshape(4, 32)
    return (reversed_ + reversed_.sum(dim=1, keepdim=True)).flatten().to(torch.int32)


@pytest.mark.parametrize("sanitizer", ["", "address", "thread"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_sound_kernel_passes_every_check(programs, sanitizer, seed):
    done = run(programs, "none", sanitizer, seed)
    assert done.status == 0, done.stderr
    assert done.stderr == ""
    assert torch.equal(done.array("out", (128,), torch.int32), wanted())
    assert done.array("flag", (2,), torch.int32).tolist() == [0, 64]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("divergent_barrier", "threads of a block wait at different __syncthreads"),
        ("barrier_after_exit", "__syncthreads after threads of the block have left"),
        ("barriers_on_two_lines", "threads of a block wait at different __syncthreads"),
        ("mask_without_caller", "the mask of a warp function lacks its caller"),
        ("mask_of_absent_lane", "the mask names a lane that has left"),
        ("different_masks", "lanes that wait for each other have different masks"),
        ("different_functions", "lanes that wait for each other are in different warp functions"),
        ("lane_outside_mask", "a shuffle reads a lane outside its mask"),
    ],
)
@pytest.mark.parametrize("seed", [0, 5])
def test_the_emulator_reports_wrong_use_of_barriers_and_warps(programs, fault, message, seed):
    done = run(programs, fault, seed=seed)
    assert done.status == FAULT_STATUS
    assert message in done.stderr
    assert "faults.cpp:" in done.stderr, "the message names the line"


@pytest.mark.parametrize("fault", ["missing_barrier", "missing_syncwarp", "race_in_block", "race_of_blocks"])
@pytest.mark.parametrize("seed", [0, 5])
def test_thread_sanitizer_reports_races(programs, fault, seed):
    done = run(programs, fault, "thread", seed)
    assert done.status != 0
    assert "WARNING: ThreadSanitizer: data race" in done.stderr
    assert "reverse_and_add" in done.stderr


@pytest.mark.parametrize("fault", ["out_of_bounds_global", "out_of_bounds_shared"])
def test_address_sanitizer_reports_accesses_out_of_bounds(programs, fault):
    done = run(programs, fault, "address")
    assert done.status != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert "faults.cpp" in done.stderr


@pytest.mark.parametrize("fault", ["missing_barrier", "missing_syncwarp", "uninitialised_shared"])
def test_poison_and_schedules_change_the_result_of_a_wrong_kernel(programs, fault):
    done = run(programs, fault, seed=3)
    assert done.status == 0
    assert not torch.equal(done.array("out", (128,), torch.int32), wanted())
