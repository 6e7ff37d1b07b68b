"""Our sentencepiece models as the ``tokenizer.json`` that transformers reads, token for token.

Sentencepiece's byte-pair encoding joins the neighbours whose piece has the highest score; the merges of a
``tokenizer.json`` are the same pieces cut in every way that leaves two pieces, in the order of these scores. Texts that
look like special tokens (``</s>``) stay ordinary text, as with us.
"""

import json
from pathlib import Path
from typing import Any

from ...base.files import write_atomically
from ...data.tokenizer import SPACE

MODEL, FAST, SETTINGS = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"


def add_tokenizer(folder: Path) -> list[str]:
    """Write ``tokenizer.json`` and its settings beside a ``tokenizer.model`` of the kind that we train.

    Returns:
        The files written: none where a ``tokenizer.json`` is there already, or where the model is of another kind
        (unigram, with normalisation, a dummy prefix, pieces of the user), which this would only approximate.
    """
    if (folder / FAST).exists() or not (folder / MODEL).exists():
        return []
    model = _parse((folder / MODEL).read_bytes())
    if not _is_ours(model):
        return []
    eos = model.pieces[model.trainer_spec.eos_id].piece
    settings = {
        "clean_up_tokenization_spaces": False,
        "eos_token": eos,
        "split_special_tokens": True,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": model.pieces[model.trainer_spec.unk_id].piece,
    }
    write_atomically(folder / FAST, json.dumps(_fast(model), ensure_ascii=False))
    write_atomically(folder / SETTINGS, json.dumps(settings, indent=1) + "\n")
    return [FAST, SETTINGS]


def _parse(content: bytes) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(content)
    return model


def _is_ours(model: Any) -> bool:
    training, normalizing = model.trainer_spec, model.normalizer_spec
    kinds = model.SentencePiece
    known = {kinds.NORMAL, kinds.BYTE, kinds.CONTROL, kinds.UNKNOWN}
    return bool(
        training.model_type == training.BPE
        and training.byte_fallback
        and training.eos_id >= 0
        and normalizing.name == "identity"
        and not normalizing.add_dummy_prefix
        and not normalizing.remove_extra_whitespaces
        and normalizing.escape_whitespaces
        and {piece.type for piece in model.pieces} <= known
    )


def _fast(model: Any) -> dict[str, Any]:
    """The content of ``tokenizer.json``."""
    kinds = model.SentencePiece
    special = [
        {
            "id": number,
            "content": piece.piece,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for number, piece in enumerate(model.pieces)
        if piece.type in (kinds.CONTROL, kinds.UNKNOWN)
    ]
    spaces = {"pattern": {"String": SPACE}, "content": " "}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [{"type": "Replace", **spaces}, {"type": "ByteFallback"}, {"type": "Fuse"}],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": model.pieces[model.trainer_spec.unk_id].piece,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece.piece: number for number, piece in enumerate(model.pieces)},
            "merges": _merges({piece.piece: piece.score for piece in model.pieces if piece.type == kinds.NORMAL}),
        },
    }


def _merges(scores: dict[str, float]) -> list[list[str]]:
    """Pairs of pieces that join, first those that join first."""
    found = [
        (-score, cut, piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return [[left, right] for _, _, left, right in sorted(found)]
