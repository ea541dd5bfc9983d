"""Split work between processes, and check the recorded inputs of a result."""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def share_of(items: Sequence, shard: str) -> Sequence:
    """Return every n-th item from the i-th for a shard `i/n`, so that n processes get each item exactly once.

    Raises ValueError unless the shard is i/n with 1 <= i <= n.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", shard)
    number, count = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= number <= count:
        raise ValueError(f"shard must be i/n with i from 1 to n, such as 2/4, not {shard}")
    return items[number - 1 :: count]


def digest(lines: Iterable[str]) -> str:
    """Return a short hash of a list of strings, such as the names of the images that a file is made from."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def check_made_from(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ValueError if the values `before`, with which `path` was made, differ from those in `now`."""
    changed = [
        f"{key} was {before.get(key)}, is {value}" for key, value in now.items() if before.get(key) != value
    ]
    if changed:
        raise ValueError(f"{path} was made otherwise ({'; '.join(changed)}): delete it, or take another")
