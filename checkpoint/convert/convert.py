"""``moescale convert``: from any format to any other, through logical tensors, with every tensor accounted for.

The target is written beside, reopened from the disk, compared with the source tensor by tensor and logits by logits,
and only then renamed into place. Tensors stream: memory holds a few of them. Only the comparison of
logits needs a whole model, the source's first and then the target's.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...base.errors import UserError
from ...base.files import sync, write_atomically
from ...parallel.groups import Groups
from ...parallel.launchers import Place
from ...parallel.topology import Topology
from ...parallel.world import leave, start
from ..state import BUFFER
from ..upcycle import Upcycled, Upcycling
from .formats import Architecture, DType, Format, Key, Source, Target, logical_tensors
from .hf_tokenizer import add_tokenizer
from .huggingface import FAMILIES, HuggingFace
from .ledger import Ledger, check_source, check_target, entries_of
from .megatron import Megatron
from .run_folder import RunFolder
from .tensor_files import SPELLING, cast

LEDGER = "ledger.json"
TOLERANCE = 1e-4  # largest difference of logits over the largest logit; rounding in fp32 gives 1e-6
_COMPARED = (2, 64)  # sequences and tokens of each

FORMATS: tuple[Format, ...] = (RunFolder(), Megatron(), *(HuggingFace(family) for family in FAMILIES))
Side = tuple[Format, Path, Architecture]


def convert(
    source: Path,
    target: Path,
    to: str,
    *,
    dtype: DType = "fp32",
    given: Architecture | None = None,
    upcycling: Upcycling | None = None,
    check: bool = True,
    groups: Groups | None = None,
) -> Ledger:
    """Convert the model in ``source`` into a new folder ``target``.

    Args:
        to: name of the target's format.
        dtype: what parameters are rounded to; a checkpoint of moescale is fp32.
        given: the architecture, for sources that do not hold it.
        upcycling: makes a mixture of the dense model in ``source`` on the way.
        check: compare logits.
        groups: of a world of one rank; default: one is made for the comparison.

    Raises:
        UserError: the source cannot be read or accounted for, the target cannot express it, or their logits differ;
            ``target`` does not exist then.
    """
    if target.exists():
        raise UserError(f"{target}: exists already; choose another place, or remove it")
    wanted = _named(to)
    origin = _recognised(source)
    if given is not None and not origin.takes_configuration:
        raise UserError(f"--config: {source} ({origin.name}) holds its own configuration; leave it out")
    opened: Source = origin.open(source, given)
    before = opened.architecture
    if upcycling is not None:
        opened = Upcycled(opened, upcycling)
    wanted.refuse(opened.architecture)
    uses = check_source(opened, str(source))
    beside = target.resolve().parent / f".{target.name}.tmp"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    ledger = Ledger(
        {"path": str(source), "format": origin.name},
        {"path": str(target), "format": wanted.name},
        dtype,
        opened.settings,
        files=sorted(opened.files),
    )
    try:
        ledger.targets = list(wanted.write(beside, opened.architecture, opened.whole, dtype))
        for name, path in opened.files.items():
            shutil.copyfile(path, beside / name)
        if isinstance(wanted, HuggingFace):
            ledger.files = sorted([*ledger.files, *add_tokenizer(beside)])
        reopened = wanted.open(beside, None)
        check_target(ledger.targets, opened, reopened)
        _compare_tensors(ledger.targets, opened, reopened, dtype)
        ledger.entries = entries_of(opened, uses, ledger.targets)
        if not check:
            ledger.logits = {"compared": False, "why": "--no-check"}
        elif upcycling is not None and upcycling.noise:
            ledger.logits = {"compared": False, "why": "--noise changes them"}
        else:
            with _world(groups) as ours:
                sides = (origin, source, before), (wanted, beside, opened.architecture)
                ledger.logits = _compare_logits(*sides, dtype, ours)
        write_atomically(beside / LEDGER, json.dumps(ledger.as_json(), indent=1) + "\n")
        beside.rename(target)
        sync(target.resolve().parent)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return ledger


def _named(name: str) -> Format:
    for known in FORMATS:
        if known.name == name:
            return known
    raise UserError(f"--to {name}: unknown; the formats are {', '.join(f.name for f in FORMATS)}")


def _recognised(path: Path) -> Format:
    if not path.is_dir():
        raise UserError(f"{path}: no such folder")
    found = [known for known in FORMATS if known.recognises(path)]
    if len(found) != 1:
        said = f"looks like {' and '.join(f.name for f in found)}" if found else "is none of"
        known = "" if found else f" {', '.join(f.name for f in FORMATS)}"
        raise UserError(f"{path}: {said}{known}{_model_type(path)}")
    return found[0]


def _model_type(path: Path) -> str:
    """What a foreign ``config.json`` says it is."""
    try:
        return f"; its config.json says model_type {json.loads((path / 'config.json').read_text())['model_type']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _real(key: Key, tensor: Tensor, found: Architecture) -> Tensor:
    """Without the padding of the vocabulary."""
    return tensor[: found.vocab] if key[1] in ("embedding", "head") else tensor


def _compare_tensors(written: Sequence[Target], source: Source, target: Source, dtype: DType) -> None:
    """What does not stand in the target as it is, as the target gives it back: bit for bit.

    For the rest, a checksum of what lies on the disk says as much and needs no second reading of the source.
    """
    shapes = logical_tensors(source.architecture)
    plain = {t.logical[0] for t in written if len(t.logical) == 1 and t.stored.shape == shapes[t.logical[0]]}
    for key in (key for key in shapes if key not in plain):  # in order: what is fused is read once
        spelling = "F32" if key[0] == BUFFER else SPELLING[dtype]
        one, other = (
            cast(_real(key, side.whole(*key), source.architecture), spelling, key[1]) for side in (source, target)
        )
        if not torch.equal(one, other):
            raise RuntimeError(f"{'/'.join(key)} reads back from the target with other values")


def _compare_logits(source: Side, target: Side, dtype: DType, groups: Groups) -> dict[str, Any]:
    """What the ledger says of both sides' logits on the same tokens.

    Raises:
        UserError: they differ.
    """
    batches, length = _COMPARED
    found = source[2]
    length = min(length, found.model.max_seq or length)
    generator = torch.Generator().manual_seed(0)
    tokens_BS = torch.randint(0, found.vocab, (batches, length), generator=generator)
    one, other = (side.logits(path, found, tokens_BS, dtype, groups) for side, path, found in (source, target))
    largest, difference = one.abs().max().item(), (one - other).abs().max().item()
    if not difference <= TOLERANCE * largest:  # NaN differs too
        raise UserError(
            f"logits of both sides differ by {difference:.3g}, {difference / largest:.1e} of the largest; "
            f"{TOLERANCE:g} is allowed. Nothing was written"
        )
    return {
        "compared": True,
        "sequences": batches,
        "tokens": length,
        "largest": largest,
        "largest_difference": difference,
    }


@contextmanager
def _world(groups: Groups | None) -> Iterator[Groups]:
    """A world of this process alone, whatever launcher started it."""
    if groups is not None:
        yield groups
        return
    start(Place(0, 1, 0, 1), 60)
    own = Groups.build(Topology())
    try:
        yield own
    finally:
        own.destroy()
        leave()
