"""The account of a conversion: what became of every tensor and every key, on both sides.

Three sums must come out. Every stored tensor of the source is read for a logical tensor, or left out for a stated
reason. Every logical tensor of the architecture is made of tensors that the source holds. Every logical tensor stands
in the target, in exactly one tensor or as one of several that it is fused from, and the target's files hold nothing
else. Converters of well-known frameworks have lost all expert weights silently; here a lost one has a name.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ...base.errors import UserError
from .formats import Key, Setting, Source, Stored, Target, logical_tensors

SCHEMA = 1
_SHOWN = 8  # names in an error


@dataclass(frozen=True)
class Entry:
    """A stored tensor of the source."""

    name: str
    stored: Stored
    fate: str  # converted, left out
    targets: tuple[str, ...]
    checksum: int
    why: str = ""


@dataclass
class Ledger:
    """What became of everything. ``logits`` is what the comparison said, or why there was none."""

    source: Mapping[str, str]
    target: Mapping[str, str]
    dtype: str
    settings: Sequence[Setting]
    entries: list[Entry] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    logits: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """One JSON document; checksums are CRC-32 in hexadecimal."""
        return {
            "schema": SCHEMA,
            "source": dict(self.source),
            "target": dict(self.target),
            "dtype": self.dtype,
            "settings": [asdict(setting) for setting in self.settings],
            "tensors": [
                {**_described(e.name, e.stored, e.checksum), "fate": e.fate, "targets": list(e.targets), "why": e.why}
                for e in self.entries
            ],
            "written": [
                {**_described(t.name, t.stored, t.checksum), "logical": ["/".join(k) for k in t.logical], "why": t.why}
                for t in self.targets
            ],
            "files": self.files,
            "logits": dict(self.logits),
        }

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """(tensors of the source, how many, shapes, fate, what they became), for people.

        Alike layers and experts stand together, and so does what was left out for one reason.
        """
        groups: dict[tuple[str, str, str], list[Entry]] = defaultdict(list)
        for entry in self.entries:
            became = ", ".join(dict.fromkeys(_pattern(name) for name in entry.targets))
            name = _pattern(entry.name) if became else ""
            groups[name, entry.fate, became or entry.why].append(entry)
        return [
            (name or _first_and_last(members), str(len(members)), _shapes(members) if name else "", fate, became)
            for (name, fate, became), members in groups.items()
        ]


def _described(name: str, stored: Stored, checksum: int) -> dict[str, Any]:
    return {"name": name, "shape": list(stored.shape), "dtype": stored.dtype, "crc32": f"{checksum:08x}"}


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _first_and_last(entries: Sequence[Entry]) -> str:
    first, last = entries[0].name, entries[-1].name
    return first if first == last else f"{first} ... {last}"


def _shapes(entries: Iterable[Entry]) -> str:
    return ", ".join(dict.fromkeys(f"{e.stored.dtype} {'x'.join(map(str, e.stored.shape))}" for e in entries))


def check_source(source: Source, origin: str) -> dict[str, list[Key]]:
    """Account for the source before anything is written.

    Returns:
        The logical tensors that each stored tensor takes part in.

    Raises:
        UserError: a stored tensor has no use, or a logical tensor nothing that it could be made of: names them.
    """
    stored, left_out = source.stored(), source.left_out()
    uses: dict[str, list[Key]] = defaultdict(list)
    missing: list[str] = []
    for key in logical_tensors(source.architecture):
        for name in source.made_of(*key):
            uses[name].append(key)
            if name not in stored:
                missing.append(f"{name} ({key[1]})")
    if missing:
        raise UserError(f"{origin}: the configuration asks for tensors that the files do not hold: {_some(missing)}")
    stray = [name for name in stored if name not in uses and name not in left_out]
    if stray:
        raise UserError(f"{origin}: the files hold tensors that the configuration has no use for: {_some(stray)}")
    return dict(uses)


def check_target(written: Sequence[Target], source: Source, reopened: Source) -> None:
    """Account for what was written, against the architecture and against the files as they lie on the disk.

    Raises:
        RuntimeError: a format has lost, doubled or invented a tensor: names them.
    """
    times: dict[Key, int] = defaultdict(int)
    for target in written:
        for key in target.logical:
            times[key] += 1
    expected = logical_tensors(source.architecture)
    wrong = [f"{'/'.join(key)} ({times[key]} times)" for key in expected if times[key] != 1]
    wrong += ["/".join(key) for key in times if key not in expected]
    if wrong:
        raise RuntimeError(f"logical tensors that do not stand in the target exactly once: {_some(wrong)}")
    there, said = dict(reopened.stored()), {target.name: target.stored for target in written}
    differing = [name for name in there.keys() | said.keys() if there.get(name) != said.get(name)]
    if differing:
        raise RuntimeError(f"the target's files differ from what was written: {_some(sorted(differing))}")
    unexplained = [target.name for target in written if not target.logical and not target.why]
    if unexplained:
        raise RuntimeError(f"tensors in the target without an origin: {_some(unexplained)}")


def entries_of(source: Source, uses: Mapping[str, Sequence[Key]], written: Sequence[Target]) -> list[Entry]:
    """An entry for each stored tensor of the source."""
    holder = {key: target.name for target in written for key in target.logical}
    entries = []
    for name, stored in source.stored().items():
        if name in uses:
            targets = tuple(dict.fromkeys(holder[key] for key in uses[name]))
            entries.append(Entry(name, stored, "converted", targets, source.checksum(name)))
        else:
            entries.append(Entry(name, stored, "left out", (), source.checksum(name), source.left_out()[name]))
    return entries


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
