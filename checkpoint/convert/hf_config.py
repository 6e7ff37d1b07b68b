"""``config.json`` of transformers, read so that no key is passed over, and what the families' readers share."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...base.config import validate
from ...base.errors import UserError
from ...models.config import ModelConfig
from ...moe.config import MoEConfig
from .formats import IN_TRAINING, Architecture, Setting

_MISSING = object()
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
WITHOUT_EFFECT = {
    "_name_or_path": "where the model once lay",
    "_attn_implementation": "which kernel computes attention",
    "attention_dropout": IN_TRAINING,
    "dtype": "each tensor says how it is stored",
    "initializer_range": IN_TRAINING,
    "output_router_logits": "what is returned besides the logits",
    "pretraining_tp": "how products were cut in training",
    "router_aux_loss_coef": IN_TRAINING,
    "router_jitter_noise": IN_TRAINING,
    "torch_dtype": "each tensor says how it is stored",
    "transformers_version": "who wrote the file",
    "use_cache": "how text is generated, not which",
}


class Keys:
    """The keys of a ``config.json``. Each must be taken, required to have a value, or be known to have no effect."""

    def __init__(self, content: Mapping[str, Any], origin: str):
        self.origin = origin
        self._left = dict(content)
        self._settings: list[Setting] = []

    @classmethod
    def load(cls, path: Path) -> "Keys":
        """Read a file.

        Raises:
            UserError: missing or not a JSON object.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from None
        if not isinstance(content, dict):
            raise UserError(f"{path}: a JSON object is expected, not a {type(content).__name__}")
        return cls(content, str(path))

    def take(self, key: str, default: Any = _MISSING) -> Any:
        """The value of a key that is translated; ``default`` is what transformers takes where the key is missing.

        Raises:
            UserError: required and not given.
        """
        if key not in self._left:
            if default is _MISSING:
                raise UserError(f"{self.origin}: {key}: required and not given")
            return default
        value = self._left.pop(key)
        self._settings.append(Setting(key, value, "translated"))
        return value

    def integer(self, key: str, default: Any = _MISSING) -> int:
        """A positive whole number, or 0, that is translated.

        Raises:
            UserError: required and not given, or something else.
        """
        value = self.take(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise UserError(f"{self.origin}: {key} ({json.dumps(value)}): a whole number is expected")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or false, translated.

        Raises:
            UserError: something else.
        """
        value = self.take(key, default)
        if not isinstance(value, bool):
            raise UserError(f"{self.origin}: {key} ({json.dumps(value)}): true or false is expected")
        return value

    def only(self, key: str, *allowed: Any, default: Any) -> Any:
        """A key that changes the function and has no counterpart, except where it has one of these values.

        Raises:
            UserError: it has another one.
        """
        value = self.take(key, default)
        if value not in allowed or isinstance(value, bool) is not isinstance(allowed[0], bool):
            said = " or ".join(json.dumps(item) for item in allowed)
            raise UserError(f"{self.origin}: {key} ({json.dumps(value)}) cannot be expressed; only {said} can")
        return value

    def within(self, key: str, value: Mapping[str, Any]) -> "Keys":
        """The keys inside the value of ``key``."""
        return Keys({f"{key}.{inner}": item for inner, item in value.items()}, self.origin)

    def finish(self, without_effect: Mapping[str, str]) -> list[Setting]:
        """The fate of every key.

        Raises:
            UserError: keys are left that nobody knows: names each and its value.
        """
        known = {**WITHOUT_EFFECT, **without_effect}
        unknown = [f"{key} ({json.dumps(value)})" for key, value in self._left.items() if key not in known]
        if unknown:
            raise UserError(
                f"{self.origin}: unknown to this version, so it might change what the model computes: "
                f"{', '.join(unknown)}"
            )
        ignored = [Setting(key, value, "without effect", known[key]) for key, value in self._left.items()]
        return [*self._settings, *ignored]


def rotary(
    keys: Keys, *, base: float, fraction: float = 1.0, partial: bool = False, yarn: bool = False
) -> dict[str, Any]:
    """Model keys of rotary positions, in transformers' older spelling or that of version 5.

    Args:
        base, fraction: what transformers takes where nothing is said.
        partial: whether the family knows rotation of a part of the features.
        yarn: whether it can have stretched positions of this kind.

    Raises:
        UserError: positions that are scaled otherwise (linear, dynamic, llama3 ...).
    """
    scaling = keys.take("rope_scaling", None)
    parameters = keys.take("rope_parameters", None)
    base = keys.take("rope_theta", base)
    if yarn and scaling is not None and parameters is not None:
        raise UserError(f"{keys.origin}: rope_scaling and rope_parameters: one of them is expected")
    found: dict[str, Any] = {}
    if partial:
        fraction = keys.take("partial_rotary_factor", fraction)
    for name, value in (("rope_scaling", scaling), ("rope_parameters", parameters)):
        if value is None:
            continue
        if not isinstance(value, dict):
            raise UserError(f"{keys.origin}: {name} ({value!r}): an object is expected")
        inner = keys.within(name, value)
        kinds = ("default", "yarn") if yarn else ("default",)
        spelled = [inner.only(f"{name}.{key}", *kinds, default=None) for key in ("rope_type", "type") if key in value]
        base = inner.take(f"{name}.rope_theta", base)
        if partial:
            fraction = inner.take(f"{name}.partial_rotary_factor", fraction)
        if spelled[:1] == ["yarn"]:
            found["yarn"] = _yarn(inner, name)
        inner.finish({})
    return {"rope_base": base, "rotary_fraction": fraction, **found}


def _yarn(inner: Keys, name: str) -> dict[str, Any]:
    """The section ``model.yarn``, as transformers' ``_compute_yarn_parameters`` and DeepSeek-V3's attention compute it.

    Raises:
        UserError: settings that multiply scores and positions in another way than DeepSeek's.
    """
    inner.only(f"{name}.attention_factor", None, default=None)
    inner.only(f"{name}.truncate", True, default=True)
    mscale = inner.take(f"{name}.mscale", None) or 0
    all_dim = inner.take(f"{name}.mscale_all_dim", None) or 0
    if all_dim and not mscale:
        raise UserError(
            f"{inner.origin}: {name}.mscale_all_dim ({all_dim}) without {name}.mscale multiplies both positions and "
            "scores, which cannot be expressed"
        )
    return {
        "factor": inner.take(f"{name}.factor"),
        "original_seq": inner.take(f"{name}.original_max_position_embeddings"),
        "beta_fast": inner.take(f"{name}.beta_fast", None) or 32,
        "beta_slow": inner.take(f"{name}.beta_slow", None) or 1,
        "mscale": mscale if all_dim else 1,  # transformers reads neither where one is missing
        "mscale_all_dim": all_dim,
    }


def common_model(keys: Keys) -> dict[str, Any]:
    """Model keys that all families spell alike."""
    keys.only("hidden_act", "silu", "swish", default="silu")
    heads = keys.integer("num_attention_heads")
    kv_heads = keys.take("num_key_value_heads", None)
    return {
        "layers": keys.integer("num_hidden_layers"),
        "width": keys.integer("hidden_size"),
        "heads": heads,
        "kv_heads": heads if kv_heads is None else kv_heads,
        "tied": keys.flag("tie_word_embeddings", False),
        "norm_eps": keys.take("rms_norm_eps"),
        "max_seq": keys.take("max_position_embeddings", None),
    }


def architecture(keys: Keys, model: dict[str, Any], moe: dict[str, Any] | None) -> Architecture:
    """Both sections, checked, with the vocabulary and the special tokens that ``keys`` name.

    Raises:
        UserError: a shape that our configuration refuses, by our name for it.
    """
    mixture = None if moe is None else validate(MoEConfig, moe, f"{keys.origin}: as moe")
    vocab, special = keys.integer("vocab_size"), _special_tokens(keys)
    found = Architecture(validate(ModelConfig, model, f"{keys.origin}: as model"), mixture, vocab, special)
    if mixture is not None:
        try:
            mixture.width_of_expert(found.model.width)
        except ValueError as error:
            raise UserError(f"{keys.origin}: {error}") from None
    return found


def _special_tokens(keys: Keys) -> dict[str, Any]:
    """Ids of special tokens, where they are given."""
    found = {key: keys.take(key, None) for key in SPECIAL}
    return {key: value for key, value in found.items() if value is not None}


def written_common(found: Architecture, model_type: str, class_name: str) -> dict[str, Any]:
    """The keys that all families spell alike, as transformers 4 wrote them, which version 5 reads too."""
    model = found.model
    content = {
        "architectures": [class_name],
        "model_type": model_type,
        "attention_dropout": 0.0,
        **{key: found.special.get(key) for key in SPECIAL},
        "hidden_act": "silu",
        "hidden_size": model.width,
        "intermediate_size": model.ffn,
        "num_attention_heads": model.heads,
        "num_hidden_layers": model.layers,
        "num_key_value_heads": model.kv_heads,
        "rms_norm_eps": model.norm_eps,
        "rope_scaling": None,
        "rope_theta": model.rope_base,
        "tie_word_embeddings": model.tied,
        "use_cache": True,
        "vocab_size": found.vocab,
    }
    if model.max_seq is not None:
        content["max_position_embeddings"] = model.max_seq
    return content


def demand(name: str, found: Architecture, allowed: Mapping[str, tuple[Any, ...]]) -> None:
    """Check that the keys of ``allowed`` (``model.x`` or ``moe.x``) have one of the values that a format can express.

    Raises:
        UserError: names the key, its value and what can be.
    """
    for key, values in allowed.items():
        section, field = key.split(".")
        value = getattr(getattr(found, section), field)
        if value not in values:
            said = " or ".join("none" if item is None else str(item) for item in values)
            raise UserError(f"{key} ({value}) cannot be expressed in {name}, which has {said}")


NO_LATENTS: dict[str, tuple[Any, ...]] = {"model.mla": (None,)}
PLAIN_ATTENTION: dict[str, tuple[Any, ...]] = {
    **NO_LATENTS,
    "model.rotary_fraction": (1.0,),
    "model.qkv_bias": (False,),
}
PLAIN_MIXTURE: dict[str, tuple[Any, ...]] = {
    "moe.router": ("topk",),
    "moe.capacity": (None,),
}
NO_GROUPS: dict[str, tuple[Any, ...]] = {
    "moe.groups": (1,),
    "moe.weight_scale": (1.0,),
    "moe.bias_rate": (0.0,),
    "moe.shared": (0,),
}


def demand_mixture(name: str, found: Architecture) -> MoEConfig:
    """The mixture of a model that must be one.

    Raises:
        UserError: it is dense.
    """
    if found.moe is None:
        raise UserError(f"moe (none): the model is dense, and {name} is a mixture; hf-llama is dense")
    return found.moe


def demand_every_layer(name: str, found: Architecture) -> None:
    """Check that no layer is dense.

    Raises:
        UserError: one is.
    """
    moe = demand_mixture(name, found)
    if not all(moe.is_mixture(layer) for layer in range(found.model.layers)):
        raise UserError(
            f"moe.first_dense ({moe.first_dense}) and moe.every ({moe.every}) leave dense layers, which cannot be "
            f"expressed in {name}"
        )
