"""Images inside a BasicSR lmdb, named as if it were a folder: gt.lmdb/0001_s001.png."""

import io
import threading
from pathlib import Path
from typing import Any

from ldm.util import check_package

META = "meta_info.txt"  # in it: one image a line, as `0001_s001.png (480,480,3) 1`
# lmdb opens no database twice in one process: threads take turns. It is closed after each image (to open it
# takes far less time than to decode a PNG), since a handle must not be used across a fork.
TURN = threading.Lock()


class DamagedDatabase(ValueError):
    """All images of an lmdb are lost, not one."""


def database(path: Path) -> Path | None:
    """The lmdb that a path is or lies in, or None."""
    return next((folder for folder in (path, *path.parents) if folder.suffix == ".lmdb"), None)


def list_packed(folder: Path) -> list[Path]:
    """The images of an lmdb.

    Raises FileNotFoundError without meta_info.txt, ValueError if that is damaged or lmdb is not installed.
    """
    check_package("lmdb", f"reading {folder}")
    if not (folder / META).is_file():
        raise FileNotFoundError(f"{folder} has no {META}, which BasicSR's create_lmdb.py writes")
    try:
        lines = (folder / META).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{folder / META} is not text in UTF-8: {error}") from error
    lines = [line for line in lines if line.strip()]
    if not lines or not all(" (" in line for line in lines):
        raise ValueError(f"{folder / META} must hold lines as NAME.png (HEIGHT,WIDTH,3) 1")
    return [folder / line.rsplit(" (", 1)[0] for line in lines]


def read_packed(path: Path) -> io.BytesIO:
    """The file of an image in an lmdb. Raises FileNotFoundError if there is none, DamagedDatabase."""
    folder = database(path)
    key = path.relative_to(folder).with_suffix("").as_posix()
    with TURN, _open(folder) as environment, environment.begin() as transaction:
        data = transaction.get(key.encode())
    if data is None:
        raise FileNotFoundError(f"image not found: {path}")
    return io.BytesIO(data)


def _open(folder: Path) -> Any:
    import lmdb  # here: only these data sets need the package

    file = folder / "data.mdb"
    try:
        environment = lmdb.open(str(folder), readonly=True, lock=False, readahead=False)
    except lmdb.Error as error:
        raise DamagedDatabase(f"cannot read {file}: {error}") from error
    pages = environment.info()["last_pgno"] + 1
    if file.stat().st_size < pages * environment.stat()["psize"]:
        environment.close()  # to read behind the end would end the process
        raise DamagedDatabase(f"cannot read {file}: it is cut off")
    return environment
