"""From corpora to tokens on disk: once for each content, shared by every run that reads it.

A prepared folder is named by a hash of all that went into it (what the files hold, how they are split, the
tokenizer, this code's schema and sentencepiece's version) and holds ``tokenizer.model``, Megatron indexed data sets
(``stdlib.train.bin``/``.idx``), the order of each part's documents (``stdlib.train.npy``) and ``manifest.json``.
It is written beside and renamed, so that it is either whole or absent.
"""

import logging
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import sentencepiece

from ..base.errors import UserError
from ..base.files import digest
from .cache import CorruptData, building, data_root, file_hash, locked, read_manifest, write_manifest
from .config import DataConfig, DomainConfig
from .corpus import source_files
from .encode import encode_domain, index_domain, tokenizer_model
from .fingerprint import Fingerprints, UnknownFile
from .survey import Survey, corpus_changed, survey_indexed, survey_text
from .tokenizer import Tokenizer

logger = logging.getLogger(__name__)

SCHEMA = 1  # raise it with every change of what the same sources lead to
TOKENIZER = "tokenizer.model"
FINGERPRINTS = "fingerprints.json"
Split = Literal["train", "held_out"]


@dataclass(frozen=True)
class Part:
    """The training or held-out documents of a domain.

    ``prefix`` names a Megatron indexed data set, ``order`` [documents] int32 the sequences of it that belong to the
    part: training documents in the corpus's order, held-out ones in the order of their hash, so that the first few
    are a random choice.
    """

    prefix: str
    order: np.ndarray
    tokens: int
    bytes: int


@dataclass(frozen=True)
class PreparedData:
    """A prepared folder. ``manifest`` is its manifest.json."""

    folder: Path
    manifest: dict[str, Any]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the tokens were made with."""
        return Tokenizer.load(self.folder / TOKENIZER)

    @property
    def data_hash(self) -> str:
        """Names the content: equal hashes mean equal tokens."""
        return str(self.manifest["hash"])

    @property
    def tokenizer_hash(self) -> str:
        """Names the tokenizer model."""
        return str(self.manifest["tokenizer"]["hash"])

    @property
    def vocab_size(self) -> int:
        """Tokens in the vocabulary, unpadded."""
        return int(self.manifest["tokenizer"]["vocab_size"])

    @property
    def train_tokens(self) -> int:
        """Unique training tokens of all domains, ends of documents included."""
        return int(self.manifest["train_tokens"])

    def part(self, domain: str, split: Split) -> Part | None:
        """The documents of a domain that are trained on or held out; None if there are none."""
        entry = self.manifest["domains"][domain]
        if entry[split] is None:
            return None
        prefix = entry["indexed"] or str(self.folder / f"{domain}.{split}")
        order = np.load(self.folder / f"{domain}.{split}.npy")
        return Part(prefix, order, entry[split]["tokens"], entry[split]["bytes"])

    def held_out(self, domain: str) -> Part | None:
        """The held-out documents of a domain; None if there are none, or no such domain."""
        return self.part(domain, "held_out") if domain in self.manifest["domains"] else None


def prepare(config: DataConfig, *, progress: bool = False) -> PreparedData:
    """Find the prepared data of ``config``, or make it.

    Several processes may call it at once: one builds, the others wait for its file lock and then find the result.
    No torch.distributed is involved. Data that is there already is found without a lock and without writing.

    Args:
        progress: say on stderr what is being done.

    Raises:
        UserError: a corpus is missing, empty or malformed, the tokenizer does not fit it, or the disk is full.
    """
    root = data_root(config.path)
    fingerprints = root / FINGERPRINTS
    content = _content(config, Fingerprints(fingerprints))
    name = digest(content)
    folder = root / name
    if ready := _find(folder):
        return ready
    try:
        root.mkdir(parents=True, exist_ok=True)
        with locked(root / f"{name}.lock"):
            if ready := _find(folder):
                return ready
            shutil.rmtree(folder, ignore_errors=True)
            with building(folder) as beside:
                _build(config, content, beside, _say if progress else _stay_quiet)
                after = _content(config, Fingerprints(fingerprints))["domains"]
                for domain in config.domains:
                    if after[domain] != content["domains"][domain]:
                        raise corpus_changed(domain)
    except OSError as error:
        raise UserError(
            f"data.path ({root}): prepared data cannot be written: {error.strerror or error}; make room there, or name "
            "another folder in data.path or $MOESCALE_CACHE"
        ) from None
    return PreparedData(folder, read_manifest(folder))


def find_prepared(config: DataConfig) -> PreparedData | None:
    """The prepared data of ``config`` if it is there; reads no corpus and writes nothing.

    None also where the corpus is not on this machine, or has changed since it was last prepared.
    """
    root = data_root(config.path)
    try:
        content = _content(config, Fingerprints(root / FINGERPRINTS, remembered_only=True))
    except (UnknownFile, UserError):
        return None
    return _find(root / digest(content))


def _find(folder: Path) -> PreparedData | None:
    """The prepared data in ``folder`` if it is there and whole; a damaged copy is reported and taken for absent."""
    if not folder.exists():
        return None
    try:
        manifest = read_manifest(folder)
        if file_hash(folder / TOKENIZER) != manifest["tokenizer"]["hash"]:
            raise CorruptData(f"{TOKENIZER} was changed")
    except CorruptData as reason:
        logger.warning("prepared data in %s is damaged (%s): it is built again", folder, reason)
        return None
    return PreparedData(folder, manifest)


def _content(config: DataConfig, fingerprints: Fingerprints) -> dict[str, Any]:
    """Everything that the prepared data depends on; where text lies and how samples are drawn is no part."""
    tokenizer = config.tokenizer.model
    return {
        "schema": SCHEMA,
        "sentencepiece": sentencepiece.__version__,
        "held_out": config.held_out,
        "tokenizer": config.tokenizer.vocab if tokenizer is None else fingerprints.of([Path(tokenizer)]),
        "domains": {name: _content_of(name, domain, fingerprints) for name, domain in config.domains.items()},
    }


def _content_of(name: str, domain: DomainConfig, fingerprints: Fingerprints) -> dict[str, Any]:
    files = source_files(name, domain)
    return {
        "source": domain.source,
        "indexed": domain.indexed and str(Path(domain.indexed).resolve()),  # read in place, so its place matters
        "evaluate_only": domain.evaluate_only,
        "text_key": domain.text_key,
        "files": [[path.suffix, content] for path, content in zip(files, fingerprints.of(files), strict=True)],
    }


def _build(config: DataConfig, content: dict[str, Any], folder: Path, say: Callable[[str], None]) -> None:
    domains = dict(sorted(config.domains.items()))
    surveys: dict[str, Survey] = {}
    for name, domain in domains.items():
        if domain.indexed is None:
            surveys[name] = survey_text(name, domain, config.held_out)
            say(f"{name}: {surveys[name]}")
    say(f"tokenizer: {config.tokenizer.model or f'training {config.tokenizer.vocab} pieces'}")
    model = tokenizer_model(config, surveys)
    (folder / TOKENIZER).write_bytes(model)
    tokenizer = Tokenizer(model, f"data.tokenizer.model ({config.tokenizer.model})")
    entries: dict[str, Any] = {}
    for name, domain in domains.items():
        if domain.indexed is None:
            entry = encode_domain(name, domain, surveys[name], tokenizer, folder)
        else:
            found = survey_indexed(name, domain, config.held_out, tokenizer)
            entry = index_domain(name, domain, found, folder)
        entries[name] = {
            "source_hash": digest(content["domains"][name]),
            "python": platform.python_version() if domain.source == "stdlib" else None,
            **entry,
        }
        train, held_out = ((entry[split] or {"tokens": 0})["tokens"] for split in ("train", "held_out"))
        say(f"{name}: {train:,} training tokens, {held_out:,} held out")
    write_manifest(
        folder,
        {
            "schema": SCHEMA,
            "hash": digest(content),
            "sentencepiece": sentencepiece.__version__,
            "tokenizer": {"hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size},
            "train_tokens": sum(entry["train"]["tokens"] for entry in entries.values() if entry["train"]),
            "domains": entries,
        },
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _stay_quiet(line: str) -> None:
    pass
