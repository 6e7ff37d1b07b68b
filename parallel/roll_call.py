"""The first thing ranks do together: arrive, and find out whether they are about to run the same thing."""

import datetime
import json
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch.distributed as dist

from ..base.errors import UserError
from .failure import Failure, LostRank

SHOWN = 8  # differing ranks that an error names one by one; and differences of each
LOOK = 0.02  # seconds between two looks for ranks that have come
_REFERENCE, _VERDICT = "reference", "verdict"


@dataclass(frozen=True)
class Arrival:
    """What a rank brings to the start.

    Attributes:
        facts: JSON values that must be the same on all ranks, by the names an error should use.
        objection: why this rank cannot run; it comes to the roll call to tell the others.
    """

    facts: Mapping[str, object] = field(default_factory=dict)
    objection: str = ""


@dataclass(frozen=True)
class Roll:
    """The world that came together.

    Attributes:
        hosts: of all ranks.
        store: a part of the store that only these processes use.
    """

    hosts: list[str]
    store: dist.Store


class _Answer(NamedTuple):
    host: str
    objection: str
    differences: list[str]


def call_roll(store: dist.Store, rank: int, world: int, host: str, arrival: Arrival, timeout: float) -> Roll:
    """Wait for all ranks and compare their facts with rank 0's.

    A launcher that restarts its ranks keeps its store, and the keys of processes that are gone. So rank 0 opens a
    session, and hands its name to every rank that shows a fresh ticket.

    Args:
        timeout: seconds to wait for the last rank.

    Raises:
        UserError: on every rank, when any differs or objects; names ranks, hosts, facts and values.
        LostRank: on every rank that arrived, when one does not; names who is missing.
    """
    if rank == 0:
        name = secrets.token_hex(8)
        session = dist.PrefixStore(name, store)
        session.set(_REFERENCE, json.dumps(dict(arrival.facts)))
        answers = {0: _Answer(host, arrival.objection, []), **_hear_answers(store, name, world, timeout)}
        verdict = _compare(answers, world, timeout)
        session.set(_VERDICT, json.dumps(verdict))
        if verdict["text"]:
            _see_heard(session, [other for other in answers if other != 0])
    else:
        ticket = secrets.token_hex(8)
        store.set(f"ticket/{rank}", ticket)
        session = dist.PrefixStore(_get(store, f"session/{ticket}", timeout).decode(), store)
        reference = json.loads(_get(session, _REFERENCE, timeout))
        # What an objecting rank would have brought is unknown.
        differing = [] if arrival.objection or not reference else differences(arrival.facts, reference)
        session.set(f"answer/{rank}", json.dumps([host, arrival.objection, differing]))
        # Rank 0 waits as long for the last one; its word comes right after that.
        verdict = json.loads(_get(session, _VERDICT, 2 * timeout))
        session.set(f"heard/{rank}", "")
    if verdict["missing"]:
        raise LostRank(Failure(tuple(verdict["missing"]), verdict["text"]))
    if verdict["text"]:
        raise UserError(verdict["text"])
    return Roll(list(verdict["hosts"]), session)


def _get(store: dist.Store, key: str, timeout: float) -> bytes:
    try:
        store.wait([key], datetime.timedelta(seconds=timeout))
        return store.get(key)
    except dist.DistError as error:
        raise LostRank(Failure((0,), f"rank 0 said nothing within {timeout:g} s of the start ({error})")) from None


def _see_heard(session: dist.Store, ranks: list[int]) -> None:
    """Bad news ends this process, and with it the store: give the others a moment to hear it."""
    with suppress(dist.DistError):
        session.wait([f"heard/{rank}" for rank in ranks], datetime.timedelta(seconds=5))


def _hear_answers(store: dist.Store, name: str, world: int, timeout: float) -> dict[int, _Answer]:
    """Let ranks into the session ``name`` as they come; returns the answers of those that come in time."""
    session = dist.PrefixStore(name, store)
    answers: dict[int, _Answer] = {}
    admitted: dict[int, bytes] = {}
    deadline = time.monotonic() + timeout
    while len(answers) < world - 1 and time.monotonic() < deadline:
        for rank in range(1, world):
            if rank in answers or not store.check([f"ticket/{rank}"]):
                continue
            ticket = store.get(f"ticket/{rank}")
            if admitted.get(rank) != ticket:  # the first may be that of an earlier process
                admitted[rank] = ticket
                store.set(f"session/{ticket.decode()}", name)
            elif session.check([f"answer/{rank}"]):
                answers[rank] = _Answer(*json.loads(session.get(f"answer/{rank}")))
        time.sleep(LOOK)
    return dict(sorted(answers.items()))


def _compare(answers: Mapping[int, _Answer], world: int, timeout: float) -> dict[str, Any]:
    hosts = [answer.host for answer in answers.values()]
    missing = [rank for rank in range(world) if rank not in answers]
    if missing:
        text = (
            f"rank {_cut([str(rank) for rank in missing], ', ')} did not arrive within {timeout:g} s; {len(hosts)} of "
            f"{world} ranks did, on {', '.join(dict.fromkeys(hosts))}"
        )
    else:
        text = _objections(answers) or _differing(answers)
    return {"hosts": hosts, "missing": missing, "text": text}


def _objections(answers: Mapping[int, _Answer]) -> str:
    """Why ranks cannot run; once, where all of them say the same."""
    said = {answer.objection for answer in answers.values()}
    if len(said) == 1:
        return said.pop()
    objecting = [
        f"rank {rank} on {answer.host}: {answer.objection}" for rank, answer in answers.items() if answer.objection
    ]
    return _cut(objecting, "\n")


def _differing(answers: Mapping[int, _Answer]) -> str:
    differing = [
        f"  rank {rank} on {answer.host}: {_cut(answer.differences, '; ')}"
        for rank, answer in answers.items()
        if answer.differences
    ]
    if not differing:
        return ""
    return (
        f"ranks differ from rank 0 on {answers[0].host}; start all of them with one configuration and one "
        "installation:\n" + _cut(differing, "\n")
    )


def differences(mine: Mapping[str, object], reference: Mapping[str, object]) -> list[str]:
    """What a rank has to say of each fact in which it differs from rank 0."""
    return [
        f"{name} is {_value(mine, name)}, rank 0 has {_value(reference, name)}"
        for name in sorted({*mine, *reference})
        if _value(mine, name) != _value(reference, name)
    ]


def _value(facts: Mapping[str, object], name: str) -> str:
    return json.dumps(facts[name], sort_keys=True) if name in facts else "absent"


def _cut(items: list[str], separator: str) -> str:
    """The first few, and how many more there are."""
    more = len(items) - SHOWN
    return separator.join(items[:SHOWN]) + (f"{separator}and {more} more" if more > 0 else "")
