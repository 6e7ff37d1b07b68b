"""Models of transformers, between their files on disk and logical tensors.

On disk each expert's matrices stand alone, whatever transformers fuses in memory, and every stored tensor is one
logical tensor: gates, projections and rotary order are ours. Two differ in shape: embedding and head hold the real
vocabulary only, and a norm over all heads is flat. So a family (hf_mixtral.py ...) is a translation of its
configuration and a table of names.
"""

import errno
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from ...base.errors import UserError
from ...base.files import write_atomically
from ...parallel.groups import Groups
from ..checksum import crc32_of
from ..state import BUFFER
from . import hf_deepseek_v3, hf_glm4_moe, hf_llama, hf_mixtral, hf_olmoe, hf_qwen3_moe
from .formats import Architecture, DType, Key, Reader, Setting, Stored, Target, logical_tensors
from .hf_config import Keys
from .tensor_files import (
    DTYPES,
    INDEX,
    SINGLE,
    SPELLING,
    StreamedFile,
    TensorFiles,
    ahead,
    cast,
    index_of,
    shards_of,
)

CONFIG = "config.json"
# What tokenizers and text generation read beside the weights.
FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
_OUTER = {"embedding": "model.embed_tokens.weight", "head": "lm_head.weight", "final_norm": "model.norm.weight"}
_LAYER = {
    "attention_norm": "input_layernorm.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "attention.q": "self_attn.q_proj.weight",
    "attention.k": "self_attn.k_proj.weight",
    "attention.v": "self_attn.v_proj.weight",
    "attention.o": "self_attn.o_proj.weight",
    "ffn.gate": "mlp.gate_proj.weight",
    "ffn.up": "mlp.up_proj.weight",
    "ffn.down": "mlp.down_proj.weight",
}
_NO_BIAS = "the model selects experts without a bias: zeros"
_FREQUENCIES = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


class Family(Protocol):
    """What differs between families: a module such as hf_mixtral.py."""

    NAME: str
    MODEL_TYPE: str
    CLASS: str
    MIXTURE: Mapping[str, str]
    WITHOUT_EFFECT: Mapping[str, str]

    def read(self, keys: Keys) -> Architecture: ...

    def refuse(self, found: Architecture) -> None: ...

    def write(self, found: Architecture) -> dict[str, Any]: ...


class Place:
    """Where a logical tensor stands in the files."""

    def __init__(self, name: str, logical: tuple[int, ...], vocab: int | None, flat: bool):
        self.name = name
        self.logical = logical
        self._vocab = vocab
        self._flat = flat

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in the files."""
        if self._vocab is not None:
            return (self._vocab, *self.logical[1:])
        return (self.logical[0] * self.logical[1],) if self._flat else self.logical

    def to_logical(self, stored: Tensor) -> Tensor:
        """Padded with zero rows, or split into heads."""
        if self._vocab is not None and self.logical[0] > self._vocab:
            return torch.cat([stored, stored.new_zeros(self.logical[0] - self._vocab, *self.logical[1:])])
        return stored.reshape(self.logical)

    def to_stored(self, logical: Tensor) -> Tensor:
        """Without padding, or flat."""
        return logical[: self._vocab] if self._vocab is not None else logical.reshape(self.shape)


def places_of(family: Family, found: Architecture) -> dict[Key, Place]:
    """Where every logical tensor stands.

    Raises:
        UserError: the family has no name for one.
    """
    table = {**_LAYER, **family.MIXTURE}
    places = {}
    for (part, name), shape in logical_tensors(found).items():
        if name in _OUTER:
            vocab = found.vocab if name in ("embedding", "head") else None
            places[part, name] = Place(_OUTER[name], shape, vocab, flat=False)
            continue
        _, layer, rest = name.split(".", 2)
        expert = re.search(r"(?<=experts\.)\d+", rest)
        pattern = table.get(re.sub(r"(?<=experts\.)\d+", "*", rest))
        if pattern is None:
            raise UserError(f"{name}: {family.NAME} has no such tensor")
        stored = f"model.layers.{layer}." + (pattern.replace("*", expert.group()) if expert else pattern)
        places[part, name] = Place(stored, shape, None, flat=rest.endswith(("q_norm", "k_norm")) and len(shape) == 2)
    return places


class HuggingFaceSource:
    """A folder of transformers, opened: see `formats.Source`."""

    def __init__(self, folder: Path, family: Family):
        keys = Keys.load(folder / CONFIG)
        keys.only("model_type", family.MODEL_TYPE, default=family.MODEL_TYPE)
        keys.only("architectures", [family.CLASS], None, default=None)
        self.architecture = family.read(keys)
        self.settings: list[Setting] = keys.finish(family.WITHOUT_EFFECT)
        self.files: Mapping[str, Path] = {name: folder / name for name in FILES if (folder / name).is_file()}
        self._tensors = TensorFiles(folder)
        self._places = places_of(family, self.architecture)
        self._left_out = dict(self._find_left_out())
        self._sums: dict[str, int] = {}
        self._check_shapes()

    def _check_shapes(self) -> None:
        for (_, name), place in self._places.items():
            stored = self._tensors.stored.get(place.name)
            if stored is not None and stored.shape != place.shape:
                raise UserError(
                    f"{self._tensors.folder}: {place.name} has shape {stored.shape}; the configuration says "
                    f"{place.shape} ({name})"
                )

    def _find_left_out(self) -> Iterator[tuple[str, str]]:
        layers = self.architecture.model.layers
        for name in self._tensors.stored:
            layer = re.match(r"model\.layers\.(\d+)\.", name)
            if _FREQUENCIES.fullmatch(name):
                yield name, "rotary frequencies, which follow from the configuration"
            elif layer is not None and int(layer.group(1)) >= layers and self._predicts_further(int(layer.group(1))):
                yield name, "a layer that predicts further tokens; it does not change the model's logits"
        if self.architecture.model.tied and _OUTER["head"] in self._tensors.stored:
            head, embedding = self._tensors.read(_OUTER["head"]), self._tensors.read(_OUTER["embedding"])
            if not torch.equal(head, embedding):
                raise UserError(
                    f"{self._tensors.folder}: tie_word_embeddings is true and lm_head.weight differs from the embedding"
                )
            yield _OUTER["head"], "tied: equal to the embedding"

    def _predicts_further(self, layer: int) -> bool:
        further = {s.key: s.value for s in self.settings}
        count = further.get("num_nextn_predict_layers", further.get("num_mtp_layers", 0))
        return isinstance(count, int) and layer < self.architecture.model.layers + count

    def stored(self) -> Mapping[str, Stored]:
        return self._tensors.stored

    def left_out(self) -> Mapping[str, str]:
        return self._left_out

    def made_of(self, part: str, name: str) -> tuple[str, ...]:
        return (self._places[part, name].name,)

    def whole(self, part: str, name: str) -> Tensor:
        place = self._places[part, name]
        stored = self._tensors.read(place.name)
        if place.name not in self._sums:
            self._sums[place.name] = crc32_of(stored)
        return place.to_logical(stored)

    def checksum(self, stored: str) -> int:
        known = self._sums.get(stored)
        return self._tensors.checksum(stored) if known is None else known


class HuggingFace:
    """A family of transformers as a `formats.Format`."""

    takes_configuration = False

    def __init__(self, family: Family):
        self.family = family
        self.name = family.NAME

    def recognises(self, path: Path) -> bool:
        """Whether ``path`` holds a ``config.json`` of this family."""
        return (path / CONFIG).is_file() and Keys.load(path / CONFIG).take("model_type", None) == self.family.MODEL_TYPE

    def open(self, path: Path, given: Architecture | None) -> HuggingFaceSource:
        """See `formats.Format`."""
        return HuggingFaceSource(path, self.family)

    def refuse(self, architecture: Architecture) -> None:
        """See `formats.Format`."""
        self.family.refuse(architecture)
        places_of(self.family, architecture)

    def write(self, folder: Path, architecture: Architecture, read: Reader, dtype: DType) -> list[Target]:
        """See `formats.Format`; buffers stay in fp32, as transformers keeps them."""
        content = {**self.family.write(architecture), "torch_dtype": str(DTYPES[SPELLING[dtype]]).split(".")[1]}
        write_atomically(folder / CONFIG, json.dumps(content, indent=2, sort_keys=True) + "\n")
        places = places_of(self.family, self._with_bias(architecture))
        planned = {
            place.name: Stored(place.shape, "F32" if part == BUFFER else SPELLING[dtype])
            for (part, _), place in places.items()
        }
        shards = shards_of(planned)
        targets = list(self._write_shards(folder, architecture, read, places, shards))
        if list(shards) != [SINGLE]:
            write_atomically(folder / INDEX, index_of(shards))
        there = TensorFiles(folder)
        for target, found in zip(targets, ahead(there.checksum, [t.name for t in targets]), strict=True):
            if found != target.checksum:
                raise OSError(errno.EIO, f"{target.name} reads back otherwise than it was written", str(folder))
        return targets

    def _write_shards(
        self,
        folder: Path,
        architecture: Architecture,
        read: Reader,
        places: Mapping[Key, Place],
        shards: Mapping[str, Mapping[str, Stored]],
    ) -> Iterator[Target]:
        has, keys = logical_tensors(architecture), {place.name: key for key, place in places.items()}

        def value(item: tuple[str, Stored]) -> Tensor:
            (name, stored), key = item, keys[item[0]]
            if key not in has:
                return torch.zeros(stored.shape)
            return cast(places[key].to_stored(read(*key)), stored.dtype, name)

        for file, group in shards.items():
            with StreamedFile(folder / file, group) as stream:
                for (name, stored), tensor in zip(group.items(), ahead(value, group.items()), strict=True):
                    logical, why = ((keys[name],), "") if keys[name] in has else ((), _NO_BIAS)
                    yield Target(name, stored, stream.write(name, tensor), logical, why)

    def _with_bias(self, found: Architecture) -> Architecture:
        """With the selection bias that the family always stores."""
        if found.moe is None or "moe.bias" not in self.family.MIXTURE:
            return found
        return replace(found, moe=found.moe.model_copy(update={"bias_rate": found.moe.bias_rate or 1.0}))

    def logits(self, path: Path, architecture: Architecture, tokens_BS: Tensor, dtype: DType, groups: Groups) -> Tensor:
        """See `formats.Format`: transformers' own model."""
        transformers = _transformers()
        model, said = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32,
            attn_implementation="eager",
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
        for complaint in ("missing_keys", "mismatched_keys"):
            if said[complaint]:
                raise UserError(f"{path}: transformers finds {complaint.replace('_', ' ')}: {sorted(said[complaint])}")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(DTYPES[SPELLING[dtype]]))
            return model.eval()(tokens_BS, use_cache=False).logits[..., : architecture.vocab].float()


def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError:
        raise UserError(
            "comparing logits needs transformers, which is not installed: pip install 'moescale[hf]', or give "
            "--no-check and compare them yourself"
        ) from None
    return transformers


FAMILIES: tuple[Any, ...] = (hf_llama, hf_mixtral, hf_olmoe, hf_qwen3_moe, hf_glm4_moe, hf_deepseek_v3)
