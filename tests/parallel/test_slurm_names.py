"""Slurm's short forms of node lists and task counts."""

import pytest

from moescale.base.errors import UserError
from moescale.parallel.slurm_names import expand_counts, expand_hosts

LISTS = {
    "node1": ["node1"],
    "node[1-3]": ["node1", "node2", "node3"],
    "node[08-10],login": ["node08", "node09", "node10", "login"],
    "a[1,3-4]-ib,b2": ["a1-ib", "a3-ib", "a4-ib", "b2"],
    "r[1-2]n[0-1]": ["r1n0", "r1n1", "r2n0", "r2n1"],
    "gpu-a,gpu-b[001,003]": ["gpu-a", "gpu-b001", "gpu-b003"],
}


@pytest.mark.parametrize("text", LISTS)
def test_lists_of_nodes(text: str) -> None:
    assert expand_hosts(text) == LISTS[text]


@pytest.mark.parametrize("text", ["", "a,,b", "node[1-", "node[]", "node[1-x]", "node]1[", "node[[1]]"])
def test_what_is_no_list_of_nodes(text: str) -> None:
    with pytest.raises(UserError, match="not a list of nodes"):
        expand_hosts(text)


def test_counts() -> None:
    assert expand_counts("2(x3),1") == [2, 2, 2, 1]
    assert expand_counts("4") == [4]
    with pytest.raises(UserError, match="2x3"):
        expand_counts("2x3")
