"""Pickles are read as data: nothing in them runs, and what is no data is refused by name."""

import contextlib
import pickle
import pickletools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moescale.base.errors import UserError
from moescale.checkpoint.convert.megatron_metadata import METADATA_NAMES
from moescale.checkpoint.convert.unpickle import Name, Record, unpickle


class Calls:
    """Pickles as the call of a function."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def _touch(path: Path, protocol: int) -> bytes:
    return pickle.dumps({"a": Calls(Path.touch, path)}, protocol)


@pytest.mark.parametrize("protocol", range(6))
def test_a_call_is_refused_by_name_and_not_made(tmp_path: Path, protocol: int) -> None:
    import os

    target = tmp_path / "made"
    for content in (
        pickle.dumps(Calls(os.system, f"touch {target}"), protocol),
        pickle.dumps([Calls(eval, f"open({str(target)!r}, 'w')")], protocol),
        _touch(target, protocol),
    ):
        with pytest.raises(
            UserError, match=r"names (posix\.system|\w*builtin\w*\.(eval|getattr)|pathlib[\w.]*), which"
        ):
            unpickle(content, METADATA_NAMES, "file")
    assert not target.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cos\nsystem\n(S'touch made'\ntR.",
        b"(S'touch made'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'touch made'\no.",  # OBJ
        b"\x80\x02\x82\x01.",  # EXT1
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0atouch made\x85R.",
        b"\x80\x02ctorch\nSize\n((I1\nttR(I2\ntR.",  # a call of what a call returned
        b"\x80\x02}(S'a'\nI1\nu}b.",  # a state for a dictionary
        b"Pos.system\n.",
        b"\x80\x02]q\x00h\x00Q.",  # a reference outside
    ],
)
def test_other_ways_to_call_are_refused(content: bytes) -> None:
    with pytest.raises(UserError, match="file: "):
        unpickle(content, {"torch.Size"}, "file")


def test_a_name_on_the_list_is_a_name_and_an_object_of_it_a_record() -> None:
    record = unpickle(pickle.dumps(Path("/tmp")), {"pathlib.PosixPath", "pathlib._local.PosixPath"}, "file")
    assert isinstance(record, Record)
    assert isinstance(record.name, Name)
    assert record.name.name == "PosixPath"
    assert "/" in record.arguments


def test_room_is_made_for_no_more_than_the_file_holds() -> None:
    """A place far out in the memo, a text longer than any file."""
    assert unpickle(b"\x80\x02]r\xff\xff\xff\xff.", (), "file") == []
    with pytest.raises(UserError):
        unpickle(b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\x00\x00abc.", (), "file")
    with pytest.raises(UserError):
        unpickle(b"\x80\x05\x96\xff\xff\xff\xff\xff\x00\x00\x00abc.", (), "file")


DATA = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@settings(max_examples=60, deadline=None)
@given(DATA, st.integers(0, 4))
def test_data_comes_back_as_it_was(value: Any, protocol: int) -> None:
    names = {"_codecs.encode", "builtins.bytes", "__builtin__.bytes"}
    found = unpickle(pickle.dumps(value, protocol), names, "file")
    if not any(op.name in ("GLOBAL", "STACK_GLOBAL") for op, _, _ in pickletools.genops(pickle.dumps(value, protocol))):
        assert found == value


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60))
@example(b"\x80\x02K")
def test_any_bytes_are_data_or_refused(content: bytes) -> None:
    with contextlib.suppress(UserError):
        unpickle(content, METADATA_NAMES, "file")
