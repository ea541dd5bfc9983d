"""Captions beside images: NAME.txt next to NAME.jpg, the convention of most trainers."""

from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm


def read_caption(*images: str | Path) -> str:
    """Read the first NAME.txt (or NAME.TXT) beside one of the images as one line, "" if there is none.

    Raises ValueError that names the file if it is not text in UTF-8.
    """
    for path in [Path(image).with_suffix(suffix) for image in images for suffix in (".txt", ".TXT")]:
        if path.is_file():
            try:
                return " ".join(path.read_text(encoding="utf-8-sig").split())
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} is not text in UTF-8: {error}") from error
    return ""


def check_captions(images: Iterable[str | Path]) -> bool:
    """Return whether any image has a caption. Reads all, so that a bad file raises before training."""
    paths = [Path(image) for image in images]
    folders = {folder for folder in {path.parent for path in paths} if any(folder.glob("*.[tT][xX][tT]"))}
    beside = [path for path in paths if path.parent in folders]
    captions = [read_caption(path) for path in tqdm(beside, "reading captions", leave=False)]
    return any(captions)
