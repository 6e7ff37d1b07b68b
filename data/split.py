"""Which documents are kept for evaluation."""

from collections.abc import Sequence

import numpy as np

LARGEST_SHARE = 0.05  # of the held-out bytes, that one document may have


def held_out_documents(digests: Sequence[bytes], sizes: np.ndarray, share: float) -> np.ndarray:
    """Choose whole documents with about ``share`` of the bytes, by nothing but what they hold.

    Documents are taken in the order of their hash until the share is reached. Copies of one document stay
    together, so that nothing evaluated was trained on. No document may be more than 5 % of the held-out bytes (the
    standard library's ``_pydecimal.py`` would be a quarter of them), unless the corpus is so small that the share
    cannot be reached otherwise; then the limit is the smallest one that reaches it. At most half of the bytes go,
    so a corpus of one document has nothing to hold out.

    Args:
        digests: a hash of each document's content.
        sizes: [documents] bytes of each document.
        share: in [0, 0.5).

    Returns:
        [documents] bool.
    """
    by_content: dict[bytes, int] = {}
    for digest, size in zip(digests, sizes.tolist(), strict=True):
        by_content[digest] = by_content.get(digest, 0) + size
    total = int(sizes.sum())
    target = share * total
    limit = max(LARGEST_SHARE * target, _smallest_limit(list(by_content.values()), target))
    held: set[bytes] = set()
    taken = 0
    for digest in sorted(by_content):
        if taken >= target:
            break
        size = by_content[digest]
        if size <= limit and 2 * (taken + size) <= total:
            held.add(digest)
            taken += size
    return np.array([digest in held for digest in digests], dtype=bool)


def _smallest_limit(sizes: list[int], target: float) -> int:
    """The smallest limit under which the documents add up to ``target``."""
    ascending = np.sort(np.array(sizes, dtype=np.int64))
    return int(ascending[np.searchsorted(np.cumsum(ascending), target)])
