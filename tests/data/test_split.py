import hashlib
from collections import defaultdict

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moescale.data.config import DomainConfig
from moescale.data.corpus import documents
from moescale.data.split import LARGEST_SHARE, held_out_documents


def digests_of(contents: list[int]) -> list[bytes]:
    return [hashlib.sha256(str(content).encode()).digest() for content in contents]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)), min_size=1, max_size=60), st.floats(0.01, 0.49))
def test_split_goes_by_content_alone(found: list[tuple[int, int]], share: float) -> None:
    contents = [content for content, _ in found]
    sizes = np.array([1 + content**2 for content in contents])
    held = held_out_documents(digests_of(contents), sizes, share)
    assert 2 * sizes[held].sum() <= sizes.sum()
    sides = defaultdict(set)
    for content, is_held in zip(contents, held.tolist(), strict=True):
        sides[content].add(is_held)
    assert all(len(side) == 1 for side in sides.values()), "copies of a document stand on both sides"
    backwards = held_out_documents(digests_of(contents[::-1]), sizes[::-1], share)
    assert backwards[::-1].tolist() == held.tolist()


def test_share_and_limit_on_many_documents() -> None:
    sizes = np.random.default_rng(0).lognormal(8, 1.5, 2000).astype(np.int64)
    held = held_out_documents(digests_of(list(range(2000))), sizes, 0.03)
    target = 0.03 * sizes.sum()
    assert target <= sizes[held].sum() <= (1 + LARGEST_SHARE) * target
    assert sizes[held].max() <= LARGEST_SHARE * target


def test_small_corpora_still_hold_something_out() -> None:
    assert held_out_documents(digests_of([1, 2, 3, 4, 5, 6, 7, 8, 9, 10]), np.full(10, 100), 0.03).sum() == 1
    assert held_out_documents(digests_of([1, 2]), np.array([1, 1000]), 0.03).tolist() == [True, False]
    assert not held_out_documents(digests_of([1]), np.array([50]), 0.03).any()
    assert not held_out_documents(digests_of([1, 2, 3]), np.array([5, 5, 5]), 0.0).any()


def test_no_file_dominates_what_is_held_out_of_the_standard_library() -> None:
    found = list(documents("stdlib", DomainConfig(source="stdlib")))
    contents = [document.text.encode() for document in found]
    sizes = np.array([len(content) for content in contents])
    held = held_out_documents([hashlib.sha256(content).digest() for content in contents], sizes, 0.03)
    assert sizes[held].max() <= LARGEST_SHARE * sizes[held].sum()
    assert held.sum() >= 40
