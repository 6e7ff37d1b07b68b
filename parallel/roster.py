"""What rank 0 hears from all ranks, and whom it holds responsible when the run breaks. No sockets, no clock."""

from collections.abc import Sequence
from dataclasses import dataclass

from .failure import DIED, Failure, Patience, name_ranks, silent_for

SETTLE = 0.3  # seconds in which the deaths that one accident causes become known


@dataclass(frozen=True)
class _Complaint:
    rank: int
    text: str
    timed_out: bool


class Roster:
    """Signs of life and trouble of every rank.

    Args:
        hosts: of all ranks.
        now: seconds on any clock; the same clock is used in every call.
    """

    def __init__(self, hosts: Sequence[str], patience: Patience, now: float):
        self._hosts, self._patience = hosts, patience
        self._heard = [now] * len(hosts)
        self._dead: list[int] = []
        self._failed: dict[int, str] = {}
        self._left: set[int] = set()
        self._complaints: list[_Complaint] = []
        self._trouble: float | None = None  # when the first rank died or failed
        self._complained: float | None = None

    def heard(self, rank: int, now: float) -> None:
        """A sign of life."""
        self._heard[rank] = now

    def failed(self, rank: int, cause: str, now: float) -> None:
        """The rank ends by a fault of its own."""
        self._failed[rank] = cause
        self._note_trouble(now)

    def left(self, rank: int) -> None:
        """The rank takes its leave."""
        self._left.add(rank)

    def ended(self, rank: int, now: float) -> None:
        """The rank's connection is closed."""
        if rank not in self._left and rank not in self._failed:
            self._dead.append(rank)
            self._note_trouble(now)

    def complained(self, rank: int, text: str, timed_out: bool, now: float) -> None:
        """A collective of the rank's was broken off, or waited in vain."""
        self._complaints.append(_Complaint(rank, text, timed_out))
        if self._complained is None:
            self._complained = now

    def verdict(self, now: float) -> Failure | None:
        """Who is at fault, once that can be told.

        A process that ends without a word outweighs an error that was reported, since it explains errors elsewhere;
        both outweigh silence, and all of these the complaints of ranks that lost contact.
        """
        if self._trouble is not None and now - self._trouble >= SETTLE:
            return self._dead_or_failed()
        silent = [
            rank
            for rank, heard in enumerate(self._heard)
            if rank not in self._left and now - heard > self._patience.wait
        ]
        if silent:
            return self._blame(silent, silent_for(now - max(self._heard[rank] for rank in silent)))
        if self._complained is not None and now - self._complained >= self._patience.settle:
            return self._settle_complaints()
        return None

    def _note_trouble(self, now: float) -> None:
        if self._trouble is None:
            self._trouble = now

    def _blame(self, ranks: Sequence[int], cause: str) -> Failure:
        return Failure(tuple(ranks), f"{name_ranks(ranks, self._hosts)}: {cause}")

    def _dead_or_failed(self) -> Failure:
        if self._dead:
            return self._blame(sorted(self._dead), DIED)
        rank, cause = next(iter(self._failed.items()))
        return self._blame([rank], cause)

    def _settle_complaints(self) -> Failure:
        """Every rank is alive. One that waited for nobody while others waited in vain was waited for."""
        first = self._complaints[0]
        if self._left:
            return self._blame(sorted(self._left), f"left before {name_ranks([first.rank], self._hosts)} was done")
        complaining = {complaint.rank for complaint in self._complaints}
        missed = [rank for rank in range(len(self._hosts)) if rank not in complaining]
        if first.timed_out and missed:
            return self._blame(
                missed, f"alive, but took no part in what the other ranks waited {self._patience.wait:.0f} s for"
            )
        if first.timed_out:
            return self._blame(
                sorted(complaining), f"each waited in vain for the others, in different operations: {first.text}"
            )
        return self._blame([first.rank], f"lost its connection to a rank that is alive: {first.text}")
