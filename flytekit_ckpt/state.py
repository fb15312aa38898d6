"""A state as files, without pickle: readable JSON, and the arrays and long byte strings beside it.

The JSON holds strings, booleans, None, finite floats, integers of up to 64 bits, lists and dicts with string keys as
they are. Everything else is a dict with one key that begins with "$" and says what it stands for.
"""

from __future__ import annotations

import base64
import io
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from flytekit_ckpt.errors import CheckpointError
from flytekit_ckpt.pipeline import CHUNK_SIZE, Chunk

INLINE_SIZE = 1 << 10
"""Bytes that a byte string may have to stand in the JSON."""

MAX_HEADER_SIZE = 1 << 20
"""Bytes that the description of an array may have: some ten thousand fields."""


@dataclass(frozen=True)
class File:
    """A file of a state: its name, its size in bytes, and what gives its content."""

    name: str
    size: int
    chunks: Callable[[], Iterable[Chunk]]


# ---------------------------------------------------------------------------------------------------------------------
# To files
# ---------------------------------------------------------------------------------------------------------------------


def encode(state: Any, name: str, folder: str, *, copied: bool = False) -> list[File]:
    """Turn a state into files.

    Parameters
    ----------
    state : object
        Dicts with string and integer keys, lists, tuples, strings, bytes, numbers, booleans, None, NumPy arrays and
        scalars of every dtype but object; keys of JAX's random generators; and tensors of JAX and PyTorch, which come
        back as NumPy arrays. Of a subclass of a plain type, what it has in common with that type is kept.
    name : str
        What the state is called in messages; the first file is `<name>.json`.
    folder : str
        Folder that the other files are named in.
    copied : bool, default False
        Whether the arrays are copied now, so that they may change before the files are read.

    Raises
    ------
    TypeError
        If something in the state cannot be stored; the message names where it is.
    ValueError
        If the state holds itself, or is nested too deeply.
    """
    encoder = _Encoder(folder, copied=copied)
    try:
        content = json.dumps(encoder.encode(state, name), indent=1, ensure_ascii=False, allow_nan=False)
    except RecursionError:
        message = f"{name} is nested too deeply to be stored"
        raise ValueError(message) from None
    # Lone surrogates are legal in Python's strings.
    text = content.encode("utf-8", "surrogatepass")
    return [File(f"{name}.json", len(text), lambda: [text]), *encoder.files]


class _Encoder:
    def __init__(self, folder: str, *, copied: bool) -> None:
        self.files: list[File] = []
        self._folder = folder
        self._copied = copied
        # The containers that the value being encoded lies in.
        self._around: set[int] = set()

    def encode(self, value: Any, path: str) -> Any:
        kind = type(value)
        if value is None or kind is bool or kind is str:
            return value
        if _is_array(value):
            return self._encode_key(value, path) if kind.__name__ == "PRNGKeyArray" else self._encode_array(value, path)
        # Of a subclass, the plain value: enumerations say other things of themselves.
        if isinstance(value, int):
            value = int.__int__(value)
            # In hexadecimal: of long decimal numbers, Python refuses to read the digits.
            return value if value.bit_length() <= 64 else {"$int": hex(value)}
        if isinstance(value, float):
            value = float.__float__(value)
            return value if math.isfinite(value) else {"$float": repr(value)}
        if isinstance(value, str):
            return str.__str__(value)
        if isinstance(value, (bytes, bytearray, memoryview)):
            return self._encode_bytes(bytes(value))
        if isinstance(value, (dict, list, tuple)):
            return self._encode_container(value, path)
        message = f"{path} is of type {kind.__module__}.{kind.__qualname__}, which cannot be stored without pickle"
        raise TypeError(message)

    def _encode_container(self, value: dict[Any, Any] | list[Any] | tuple[Any, ...], path: str) -> Any:
        if id(value) in self._around:
            message = f"{path} holds itself, which cannot be stored"
            raise ValueError(message)
        self._around.add(id(value))
        try:
            if isinstance(value, dict):
                return self._encode_dict(value, path)
            items = [self.encode(item, _inside(path, index)) for index, item in enumerate(value)]
            return {"$tuple": items} if isinstance(value, tuple) else items
        finally:
            self._around.remove(id(value))

    def _encode_dict(self, value: dict[Any, Any], path: str) -> Any:
        for key in value:
            if not isinstance(key, (str, int)):
                message = f"{path} has the key {key!r} of type {type(key).__name__}: only strings and integers can be"
                raise TypeError(message)
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {key: self.encode(item, _inside(path, key)) for key, item in value.items()}
        pairs = [[self.encode(key, path), self.encode(item, _inside(path, key))] for key, item in value.items()]
        return {"$dict": pairs}

    def _encode_bytes(self, value: bytes) -> Any:
        if len(value) <= INLINE_SIZE:
            return {"$bytes": base64.b64encode(value).decode("ascii")}
        return {"$bytes_file": self._add("bin", len(value), lambda: [value])}

    def _encode_array(self, value: Any, path: str) -> Any:
        import numpy as np

        if isinstance(value, (np.str_, np.bytes_)):
            # An array would lose zeros at their end.
            return {f"$numpy.{type(value).__name__}": self.encode(value.item(), path)}
        if isinstance(value, np.ma.MaskedArray):
            message = f"{path} is a masked array: store its data and its mask"
            raise TypeError(message)
        try:
            # A tensor may be on another device, or part of a graph.
            array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
        except (TypeError, RuntimeError) as error:
            message = f"{path} has no form in NumPy: {error}"
            raise TypeError(message) from error
        header = _header(array, path)
        if isinstance(value, np.generic):
            return {"$scalar": base64.b64encode(header + array.tobytes()).decode("ascii")}
        # In the order in which it lies in memory, where that is one of the two that files have.
        array = array.T if _is_transposed(array) else array
        array = np.array(array, order="C") if self._copied else np.asarray(array, order="C")
        content = memoryview(array.reshape(-1).view(np.uint8).data if array.itemsize else b"")
        return {"$array": self._add("npy", len(header) + content.nbytes, lambda: _pieces(header, content))}

    def _encode_key(self, value: Any, path: str) -> Any:
        import jax

        return {"$jax.key": [str(jax.random.key_impl(value)), self.encode(jax.random.key_data(value), path)]}

    def _add(self, suffix: str, size: int, chunks: Callable[[], Iterable[Chunk]]) -> str:
        name = f"{self._folder}/{len(self.files)}.{suffix}"
        self.files.append(File(name, size, chunks))
        return name


def _is_array(value: Any) -> bool:
    kind = type(value)
    root = str(kind.__module__).partition(".")[0]
    if root in {"torch", "jax", "jaxlib"}:
        return hasattr(value, "__array__")
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic))


def _inside(path: str, key: object) -> str:
    # Python refuses to write out what is longer.
    shown = hex(key) if isinstance(key, int) and key.bit_length() > 64 else json.dumps(key)
    return f"{path}[{shown}]"


def _is_transposed(array: Any) -> bool:
    return bool(array.flags.f_contiguous and not array.flags.c_contiguous)


def _header(array: Any, path: str) -> bytes:
    """Describe an array as NumPy's own files do; what they cannot describe without pickle is a `TypeError`."""
    from numpy.lib import format as npy

    try:
        with warnings.catch_warnings():
            # Of what a dtype carries beside its type, which is lost.
            warnings.simplefilter("ignore")
            description = npy.dtype_to_descr(array.dtype)
        storable = not array.dtype.hasobject and npy.descr_to_dtype(description) == array.dtype
    except (TypeError, ValueError):
        storable = False
    storable = storable and len(repr(description)) < MAX_HEADER_SIZE // 2
    if not storable:
        message = f"{path} is an array of dtype {array.dtype}, which cannot be stored without pickle"
        raise TypeError(message)
    described = {"shape": array.shape, "fortran_order": _is_transposed(array), "descr": description}
    header = io.BytesIO()
    try:
        npy.write_array_header_2_0(header, described)
    except UnicodeEncodeError:
        return _utf8_header(described, path)
    return header.getvalue()


def _utf8_header(described: dict[str, Any], path: str) -> bytes:
    """Describe an array whose fields have names beyond Latin-1: version 3 of the files, which NumPy does not offer."""
    from numpy.lib import format as npy

    try:
        text = repr(described).encode()
    except UnicodeEncodeError as error:
        message = f"{path} is an array with a field whose name is not valid text"
        raise TypeError(message) from error
    magic = npy.magic(3, 0)
    text += b" " * (-(len(magic) + 4 + len(text) + 1) % npy.ARRAY_ALIGN) + b"\n"
    return bytes(magic + len(text).to_bytes(4, "little") + text)


def _pieces(header: bytes, content: memoryview) -> Iterator[Chunk]:
    yield header
    for start in range(0, content.nbytes, CHUNK_SIZE):
        yield content[start : start + CHUNK_SIZE]


# ---------------------------------------------------------------------------------------------------------------------
# From files
# ---------------------------------------------------------------------------------------------------------------------


def read_file(name: str, chunks: Iterator[Chunk]) -> Any:
    """Read one of the files of a state: an array, or bytes."""
    if not name.endswith(".npy"):
        return b"".join(chunks)
    try:
        from numpy.lib import format as npy
    except ImportError as error:
        message = "the state holds arrays: install NumPy"
        raise ImportError(message) from error
    file = cast("BinaryIO", io.BufferedReader(_Reader(chunks)))
    try:
        return npy.read_array(file, allow_pickle=False, max_header_size=MAX_HEADER_SIZE)
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # numpy reads the description as Python's own literals, and raises what that raises
        message = f"{name} is not an array that flytekit_ckpt stored ({type(error).__name__}: {error})"
        raise ValueError(message) from error


class _Reader(io.RawIOBase):
    """Chunks as a file."""

    def __init__(self, chunks: Iterator[Chunk]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk).cast("B")
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def decode(name: str, files: Mapping[str, Any]) -> Any:
    """Turn files, as `read_file` gives them, into the state again.

    Raises
    ------
    ValueError
        If they are not what `encode` makes.
    """
    try:
        return _decoded(json.loads(files[f"{name}.json"].decode("utf-8", "surrogatepass")), files)
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        message = f"{name}.json is not a state that flytekit_ckpt stored ({type(error).__name__}: {error})"
        raise ValueError(message) from error


def _decoded(value: Any, files: Mapping[str, Any]) -> Any:
    if isinstance(value, list):
        return [_decoded(item, files) for item in value]
    if not isinstance(value, dict):
        return value
    tag = next(iter(value), "")
    if not tag.startswith("$"):
        return {key: _decoded(item, files) for key, item in value.items()}
    (content,) = value.values()
    if tag == "$dict":
        return {key: _decoded(item, files) for key, item in ((_decoded(key, files), item) for key, item in content)}
    if tag == "$tuple":
        return tuple(_decoded(item, files) for item in content)
    if tag in {"$array", "$bytes_file"}:
        return files[content]
    return _TAGS[tag](_decoded(content, files))


def _scalar(content: str) -> Any:
    data = base64.b64decode(content, validate=True)
    return read_file("scalar.npy", iter([data]))[()]


def _numpy(name: str) -> Callable[[Any], Any]:
    def made(content: Any) -> Any:
        import numpy as np

        return getattr(np, name)(content)

    return made


def _key(content: Any) -> Any:
    try:
        import jax
    except ImportError as error:
        message = "the state holds keys of JAX's random generators: install JAX"
        raise ImportError(message) from error
    implementation, data = content
    return jax.random.wrap_key_data(data, impl=implementation)


_TAGS: dict[str, Callable[[Any], Any]] = {
    "$int": lambda content: int(content, 16),
    "$float": float,
    "$bytes": lambda content: base64.b64decode(content, validate=True),
    "$scalar": _scalar,
    "$jax.key": _key,
    "$numpy.str_": _numpy("str_"),
    "$numpy.bytes_": _numpy("bytes_"),
}
