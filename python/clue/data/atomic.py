"""Writing a file or a folder whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy.typing as npt

#: What a write fails with where no more fits.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write under a temporary name beside ``path``, flush to disk, rename; an existing file is replaced."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(content)


def write_arrays(path: str | os.PathLike[str], arrays: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str]) -> None:
    """Write one safetensors file, whole or not at all; the same arrays and metadata give the same bytes.

    The library writes the metadata's keys in the order of a hash map, another in every process.
    """
    from safetensors.numpy import save

    content = save(dict(arrays), dict(metadata))
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors stay aligned
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(memoryview(content)[end:])


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary name beside ``path`` to write the file under; at the end it is flushed to disk and renamed.

    An existing file is replaced; on an exception it stays as it was.

    Raises:
        OSError: as :func:`naming`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with naming(path):
            yield temporary
            flush(temporary)
            os.replace(temporary, path)
            flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have a full disk be an OSError that names ``path``, whoever was writing.

    It would name a temporary file otherwise, and the libraries in Rust that write tensors and tokenizers raise exceptions
    of their own, which give the system's error as ``(os error 28)``.
    """
    try:
        yield
    except Exception as error:
        told = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
        if number not in FULL:
            raise
        raise OSError(number, os.strerror(number), str(path)) from None


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder beside ``folder``, where nothing may be; at the end it is flushed to disk and renamed.

    On an exception nothing is left, nor of the parents that had to be made.

    Raises:
        OSError: as :func:`naming`.
    """
    missing = [parent for parent in folder.parents if not parent.exists()]
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        with naming(folder):
            temporary.mkdir(parents=True)
            yield temporary
            flush_tree(temporary)
            os.replace(temporary, folder)
            flush(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in missing:
            if parent.exists() and not any(parent.iterdir()):
                parent.rmdir()
        raise


def flush_tree(folder: Path) -> None:
    """Have a folder and all that is in it reach the disk."""
    for base, _, names in os.walk(folder):
        for name in names:
            flush(Path(base) / name)
        flush(base)


def flush(path: str | os.PathLike[str]) -> None:
    """Have a file, or the names in a folder, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
