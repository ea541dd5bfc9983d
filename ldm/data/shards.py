"""Work that several processes share, and the notes of what a result was made from."""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def share_of(items: Sequence, shard: str) -> Sequence:
    """Every n-th item from the i-th on, for a shard `i/n`: n processes have each item exactly once.

    Raises ValueError for anything else than i/n with 1 <= i <= n.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", shard)
    number, count = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= number <= count:
        raise ValueError(f"shard must be i/n with i from 1 to n, such as 2/4, not {shard}")
    return items[number - 1 :: count]


def digest(lines: Iterable[str]) -> str:
    """A short fingerprint of a list of texts, such as the names of the images that a file is made from."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def check_made_from(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ValueError if what is at `path` was made with other values than those of `now`."""
    changed = [
        f"{key} was {before.get(key)}, is {value}" for key, value in now.items() if before.get(key) != value
    ]
    if changed:
        raise ValueError(f"{path} was made otherwise ({'; '.join(changed)}): delete it, or take another")
