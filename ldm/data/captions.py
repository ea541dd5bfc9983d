"""Captions beside pictures: NAME.txt next to NAME.jpg, as most trainers have them."""

from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm


def read_caption(*pictures: str | Path) -> str:
    """What the first NAME.txt (or NAME.TXT) beside one of the pictures says, in one line; else "".

    Raises ValueError that names the file if it is not text in UTF-8.
    """
    for path in [Path(picture).with_suffix(suffix) for picture in pictures for suffix in (".txt", ".TXT")]:
        if path.is_file():
            try:
                return " ".join(path.read_text(encoding="utf-8-sig").split())
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} is not text in UTF-8: {error}") from error
    return ""


def check_captions(pictures: Iterable[str | Path]) -> bool:
    """Whether any picture has a caption beside it; all are read, so that one that cannot be is found now."""
    pictures = [Path(picture) for picture in pictures]
    folders = {folder for folder in {path.parent for path in pictures} if any(folder.glob("*.[tT][xX][tT]"))}
    beside = [path for path in pictures if path.parent in folders]
    return any([read_caption(path) for path in tqdm(beside, "reading captions", leave=False)])
