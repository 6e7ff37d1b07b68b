"""The ``data`` section of a run file (also the file that ``moescale data prepare`` reads)."""

import re
from typing import Literal, Self

from pydantic import BaseModel, Field, model_validator


class DomainConfig(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """One source of text. Exactly one of ``source``, ``packages``, ``files`` and ``indexed``."""

    source: Literal["stdlib"] | None = Field(None, description="built in: Python's standard library and topics")
    packages: tuple[str, ...] = Field((), description="installed Python packages by import name: their sources")
    files: tuple[str, ...] = Field((), description="globs of text or .jsonl files, relative to the working folder")
    text_key: str = Field("text", description="key of the text in .jsonl lines")
    indexed: str | None = Field(None, description="prefix of an existing Megatron .bin/.idx pair, used as it is")
    evaluate_only: bool = Field(False, description="a held-out domain: never trained on")

    @model_validator(mode="after")
    def _check(self) -> Self:
        kinds = ("source", "packages", "files", "indexed")
        given = [key for key in kinds if getattr(self, key)]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(kinds)} (given: {given or 'none'})")
        return self


class TokenizerConfig(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """A sentencepiece model: given, or trained on the corpus."""

    model: str | None = Field(None, description="an existing sentencepiece model file")
    vocab: int = Field(1024, ge=300, le=65_536, description="vocabulary when it is trained here (bytes included)")


class DataConfig(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """What is read, how it is split, and in which order it comes."""

    path: str | None = Field(None, description="folder for prepared data; default: data/ in the user's cache")
    domains: dict[str, DomainConfig] = Field(min_length=1)
    weights: dict[str, float] = Field({}, description="share of samples by domain; default: by its tokens")
    samples: int = Field(262_144, ge=1, description="samples in the fixed order that every budget reads a prefix of")
    tokenizer: TokenizerConfig = TokenizerConfig()
    held_out: float = Field(
        0.03, ge=0, lt=0.5, description="share of a domain's bytes kept for evaluation, whole documents"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        trained = [name for name, domain in self.domains.items() if not domain.evaluate_only]
        if not trained:
            raise ValueError("data.domains: every domain is evaluate_only; nothing is left to train on")
        for name, domain in self.domains.items():
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
                raise ValueError(f"data.domains.{name}: names files, so use letters, digits, - and _ only")
            if domain.indexed and self.tokenizer.model is None:
                raise ValueError(
                    f"data.domains.{name}.indexed ({domain.indexed}): give data.tokenizer.model, the sentencepiece "
                    "model that these tokens were made with"
                )
        for name, weight in self.weights.items():
            if name not in trained:
                raise ValueError(
                    f"data.weights.{name}: not a domain that is trained on; those are {', '.join(trained)}"
                )
            if weight < 0:
                raise ValueError(f"data.weights.{name} ({weight}): must not be negative")
        if self.weights and not any(self.weights.values()):
            raise ValueError("data.weights: at least one must be above 0")
        if self.weights and set(self.weights) != set(trained):
            raise ValueError(f"data.weights: give all trained domains or none ({', '.join(trained)})")
        return self
