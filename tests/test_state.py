"""States as files: everything comes back as it was, with its type, and nothing that is read runs code."""

from __future__ import annotations

import base64
import collections
import enum
import json
import math
import random
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from flytekit_ckpt.state import INLINE_SIZE, File, decode, encode, read_file

well = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])

DTYPES = st.one_of(
    npst.scalar_dtypes(),
    npst.boolean_dtypes(),
    npst.unicode_string_dtypes(),
    npst.byte_string_dtypes(),
    npst.array_dtypes(npst.scalar_dtypes(), max_size=3).filter(lambda dtype: dtype.subdtype is None),
)
ARRAYS = npst.arrays(DTYPES, npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
SCALARS = npst.arrays(DTYPES, ()).map(lambda array: array[()])
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(10**5000), 10**5000),
    st.floats(),
    st.text(st.characters(codec=None)),
    st.text("$abc", max_size=3),
    st.binary(max_size=20),
    st.integers(0, 3 * INLINE_SIZE).map(bytes),
    ARRAYS,
    ARRAYS.map(np.transpose),
    SCALARS,
    st.text("a\0").map(np.str_),
    st.binary(max_size=3).map(np.bytes_),
    st.binary(min_size=3, max_size=3).map(lambda content: np.frombuffer(content, "V3")),
)
KEYS = st.one_of(st.text(max_size=5), st.text("$dict", max_size=5), st.integers())
STATES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(KEYS, inner, max_size=4),
    ),
    max_leaves=12,
)


def content(file: File) -> bytes:
    return b"".join(bytes(chunk) for chunk in file.chunks())


def back(files: list[File]) -> Any:
    read = {file.name: read_file(file.name, iter([content(file)])) for file in files}
    return decode("state", read)


def same(one: Any, other: Any) -> bool:
    """Compare with types; not a number is the same as itself."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(map(same, one.values(), other.values()))
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, (np.str_, np.bytes_)):
        # An array loses the zeros at their end.
        return one.item() == other.item()
    if isinstance(one, (np.ndarray, np.generic)):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, float):
        return (math.isnan(one) and math.isnan(other)) or (one == other and math.copysign(1, one * other) >= 0)
    return one == other


@well
@given(st.dictionaries(KEYS, STATES, max_size=5), st.booleans())
def test_a_state_comes_back_with_its_types_and_its_order(state: dict[Any, Any], copied: bool) -> None:
    files = encode(state, "state", "arrays", copied=copied)
    assert [len(content(file)) for file in files] == [file.size for file in files]
    assert len({file.name for file in files}) == len(files)
    assert same(back(files), state)


def test_plain_states_are_plain_json() -> None:
    state = {"epoch": 2, "name": "é", "rate": 0.5, "done": [True, None], "shuffle": {"seed": 2**63}}
    (file,) = encode(state, "state", "arrays")
    assert json.loads(content(file)) == state
    assert "é".encode() in content(file)


def test_short_byte_strings_stand_in_the_json_and_long_ones_beside_it() -> None:
    files = encode({"short": bytes(INLINE_SIZE), "long": bytes(INLINE_SIZE + 1)}, "state", "arrays")
    assert [file.name for file in files] == ["state.json", "arrays/0.bin"]
    assert content(files[1]) == bytes(INLINE_SIZE + 1)


def test_arrays_are_files_that_numpy_opens(tmp_path: Any) -> None:
    array = np.arange(12.0).reshape(3, 4).T
    _, file = encode({"weights": array}, "state", "arrays")
    path = tmp_path / "weights.npy"
    path.write_bytes(content(file))
    opened = np.load(path)
    assert np.array_equal(opened, array)
    assert opened.flags.f_contiguous


@pytest.mark.parametrize("bits", [np.random.PCG64, np.random.MT19937, np.random.Philox, np.random.SFC64])
def test_generators_go_on_where_they_were(bits: Any) -> None:
    generator = np.random.Generator(bits(3))
    generator.random(5)
    state = back(encode({"numpy": generator.bit_generator.state}, "state", "arrays"))
    other = np.random.Generator(bits(4))
    other.bit_generator.state = state["numpy"]
    assert other.random(5).tolist() == generator.random(5).tolist()

    plain = random.Random(3)
    plain.random()
    again = random.Random()
    again.setstate(back(encode({"random": plain.getstate()}, "state", "arrays"))["random"])
    assert again.random() == plain.random()

    legacy = np.random.RandomState(5)
    legacy.rand(3)
    legacy_again = np.random.RandomState()
    legacy_again.set_state(back(encode({"legacy": legacy.get_state()}, "state", "arrays"))["legacy"])
    assert legacy_again.rand() == legacy.rand()


class Colour(enum.IntEnum):
    RED = 3


class Mode(str, enum.Enum):
    TRAIN = "train"


class Odd(int):
    def __int__(self) -> int:
        return 99


Point = collections.namedtuple("Point", "x y")


def test_of_subclasses_what_they_share_with_the_plain_type_is_kept() -> None:
    state = {
        "ordered": collections.OrderedDict(a=1),
        "counter": collections.Counter("aab"),
        "named": Point(1, 2),
        "enum": Colour.RED,
        "mode": {Mode.TRAIN: Mode.TRAIN},
        "odd": Odd(3),
        "bytearray": bytearray(b"x"),
        "view": memoryview(b"y"),
        "record": np.zeros(2, [("a", "<i4")]).view(np.recarray),
    }
    found = back(encode(state, "state", "arrays"))
    plain = {key: value for key, value in found.items() if key != "record"}
    expected = {"ordered": {"a": 1}, "counter": {"a": 2, "b": 1}, "named": (1, 2), "enum": 3, "odd": 3}
    assert plain == {**expected, "mode": {"train": "train"}, "bytearray": b"x", "view": b"y"}
    assert {key: type(value) for key, value in plain.items()} == {
        **dict.fromkeys(("ordered", "counter", "mode"), dict),
        **dict.fromkeys(("enum", "odd"), int),
        **dict.fromkeys(("bytearray", "view"), bytes),
        "named": tuple,
    }
    assert type(next(iter(found["mode"]))) is str
    assert found["record"].tolist() == state["record"].tolist()


@pytest.mark.parametrize(
    ("state", "path"),
    [
        ({"sampler": {"fn": print}}, 'state["sampler"]["fn"] is of type builtins.builtin_function'),
        ({"a": [1, (2, {3: object()})]}, 'state["a"][1][1][3] is of type builtins.object'),
        ({"a": {1, 2}}, 'state["a"] is of type builtins.set'),
        ({"a": 1j}, 'state["a"] is of type builtins.complex'),
        ({"a": {(1, 2): 3}}, 'state["a"] has the key (1, 2) of type tuple'),
        ({"a": {1.5: 3}}, 'state["a"] has the key 1.5 of type float'),
        ({"a": np.array([None])}, 'state["a"] is an array of dtype object'),
        ({"a": np.zeros(2, [("x", object)])}, 'state["a"] is an array of dtype'),
        ({"a": np.ma.masked_array([1, 2], [True, False])}, 'state["a"] is a masked array'),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:30],
)
def test_what_cannot_be_stored_is_named(state: dict[str, Any], path: str) -> None:
    with pytest.raises(TypeError) as error:
        encode(state, "state", "arrays")
    assert str(error.value).startswith(path)


def test_a_state_that_holds_itself_or_is_too_deep_is_an_error() -> None:
    around: dict[str, Any] = {"a": {}}
    around["a"]["b"] = [around]
    with pytest.raises(ValueError, match=r'state\["a"\]\["b"\]\[0\] holds itself'):
        encode(around, "state", "arrays")
    deep: list[Any] = []
    for _ in range(sys.getrecursionlimit() * 2):
        deep = [deep]
    with pytest.raises(ValueError, match="nested too deeply"):
        encode({"deep": deep}, "state", "arrays")
    twice = [1]
    assert back(encode({"a": twice, "b": twice}, "state", "arrays")) == {"a": [1], "b": [1]}


def test_a_copied_state_does_not_change_with_its_arrays() -> None:
    array = np.arange(5)
    files, live = (encode({"array": array}, "state", "arrays", copied=copied) for copied in (True, False))
    array[:] = 7
    assert back(files)["array"].tolist() == [0, 1, 2, 3, 4]
    # Nor is it copied where that is not asked for.
    assert back(live)["array"].tolist() == [7] * 5


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1, ",
        '{"$unknown": 1}',
        '{"$array": "arrays/9.npy"}',
        '{"$array": [1]}',
        '{"$bytes": "!"}',
        '{"$bytes": 5}',
        '{"$int": "x"}',
        '{"$dict": [[1]]}',
        '{"$dict": [[[], 1]]}',
        '{"$tuple": 5}',
        '{"$scalar": "AAAA"}',
        '{"$float": "x", "b": 1}',
        "[" * 100_000,
    ],
    ids=range(14),
)
def test_a_foreign_file_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"state\.json is not a state"):
        decode("state", {"state.json": text.encode()})


def test_a_pickled_array_is_not_opened() -> None:
    import io

    out = io.BytesIO()
    np.save(out, np.array([print]), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        read_file("a.npy", iter([out.getvalue()]))


@pytest.mark.heavy
def test_tensors_come_back_as_arrays() -> None:
    import torch

    tensor = torch.arange(6.0).reshape(2, 3)
    state = {"plain": tensor, "turned": tensor.T, "learned": torch.nn.Parameter(tensor), "zero": torch.tensor(5)}
    found = back(encode(state, "state", "arrays"))
    assert same(found["plain"], tensor.numpy())
    assert found["turned"].tolist() == tensor.T.tolist()
    assert same(found["learned"], tensor.numpy())
    assert same(found["zero"], np.array(5))
    with pytest.raises(TypeError, match=r'state\["half"\] has no form in NumPy'):
        encode({"half": tensor.bfloat16()}, "state", "arrays")


def test_an_array_of_very_many_fields_comes_back_or_is_refused() -> None:
    wide = np.zeros(2, [(f"field_{number}", "<f8") for number in range(600)])
    assert same(back(encode({"wide": wide, "one": wide[0]}, "state", "arrays")), {"wide": wide, "one": wide[0]})
    too_wide = np.zeros(1, [(f"field_{number}", "<f8") for number in range(40_000)])
    with pytest.raises(TypeError, match=r'state\["too wide"\]'):
        encode({"too wide": too_wide}, "state", "arrays")


def test_a_key_may_be_longer_than_python_writes_out() -> None:
    assert back(encode({"a": {10**5000: [1]}}, "state", "arrays")) == {"a": {10**5000: [1]}}


@pytest.mark.parametrize(
    "description",
    [
        "{",
        "{'descr': (), 'fortran_order': False, 'shape': (1,)}",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (10**22,)}",
        "{1: 2, 'a': 3}",
        "{'descr': 'f8,,', 'fortran_order': False, 'shape': (1,)}",
        "-" * 5000 + "1",
    ],
    ids=range(6),
)
def test_a_damaged_description_of_an_array_is_a_value_error(description: str) -> None:
    text = description.encode() + b"\n"
    content = b"\x93NUMPY\x02\x00" + len(text).to_bytes(4, "little") + text + bytes(8)
    with pytest.raises(ValueError, match=r"state/0\.npy is not an array"):
        read_file("state/0.npy", iter([content]))
    scalar = json.dumps({"$scalar": base64.b64encode(content).decode()}).encode()
    with pytest.raises(ValueError, match="is not a state"):
        decode("state", {"state.json": scalar})
