"""Pictures inside a BasicSR lmdb, named as if it were a folder: gt.lmdb/0001_s001.png."""

import io
import os
import threading
from pathlib import Path
from typing import Any

from ldm.util import check_package

META = "meta_info.txt"  # in it: one picture a line, as `0001_s001.png (480,480,3) 1`


class DamagedDatabase(ValueError):
    """All images of an lmdb are lost, not one."""


def database(path: Path) -> Path | None:
    """The lmdb that a path is or lies in, or None."""
    return next((folder for folder in (path, *path.parents) if folder.suffix == ".lmdb"), None)


def list_packed(folder: Path) -> list[Path]:
    """The pictures of an lmdb.

    Raises FileNotFoundError without meta_info.txt, ValueError if that is damaged or lmdb is not installed.
    """
    check_package("lmdb", f"reading {folder}")
    if not (folder / META).is_file():
        raise FileNotFoundError(f"{folder} has no {META}, which BasicSR's create_lmdb.py writes")
    try:
        lines = (folder / META).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{folder / META} is not text in UTF-8: {error}") from error
    if not lines or not all(" (" in line for line in lines if line.strip()):
        raise ValueError(f"{folder / META} must hold lines as NAME.png (HEIGHT,WIDTH,3) 1")
    return [folder / line.rsplit(" (", 1)[0] for line in lines if line.strip()]


def read_packed(path: Path) -> io.BytesIO:
    """The file of a picture in an lmdb. Raises FileNotFoundError if there is none."""
    folder = database(path)
    key = path.relative_to(folder).with_suffix("").as_posix()
    with _open(str(folder)).begin() as transaction:
        data = transaction.get(key.encode())
    if data is None:
        raise FileNotFoundError(f"image not found: {path}")
    return io.BytesIO(data)


_handles: dict[str, Any] = {}
_lock = threading.Lock()


def _open(folder: str) -> Any:
    """An lmdb's handle: the one of this process, whose threads share it."""
    import lmdb

    file = Path(folder) / "data.mdb"
    with _lock:
        if folder not in _handles:
            try:
                handle = lmdb.open(folder, readonly=True, lock=False, readahead=False)
            except lmdb.Error as error:
                raise DamagedDatabase(f"cannot read {file}: {error}") from error
            if file.stat().st_size < (handle.info()["last_pgno"] + 1) * handle.stat()["psize"]:
                handle.close()  # to read behind the end would end the process
                raise DamagedDatabase(f"cannot read {file}: it is cut off")
            _handles[folder] = handle
        return _handles[folder]


def _close_inherited() -> None:
    """A handle must not be used across a fork, and the library opens no lmdb twice in one process."""
    global _lock
    _lock = threading.Lock()
    for handle in _handles.values():
        handle.close()
    _handles.clear()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_close_inherited)
