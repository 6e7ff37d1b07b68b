"""Tests that are every rank of many worlds in turn, which a process that is in a world cannot be.

The test session has one (tests/conftest.py, ``one_rank``), so ../test_worlds.py runs these in a process of their own.
By hand: ``MOESCALE_WORLDS=1 python -m pytest tests/checkpoint/worlds``.
"""

import os

collect_ignore_glob = [] if "MOESCALE_WORLDS" in os.environ else ["test_*.py"]
