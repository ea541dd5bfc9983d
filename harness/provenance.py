"""Provenance of results: a note in their EXIF, so that unchanged results of a folder are not made again."""

import hashlib
import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from ldm.data.photo import read_note

VERSION = 3  # to be raised when the same files and options give other pixels
LARGE = 2**30  # bytes: larger files are identified by size and date instead of their content


class Provenance:
    """Inputs of a command's results as ASCII JSON: equal texts mean equal results.

    With `hashed` files are identified by name and content, else by name alone (for a single image, which is
    always restored). `command` is a harness.jobs.Command.
    """

    def __init__(self, command: Any, hashed: bool):
        self.command, self.hashed = command, hashed
        models = command.inputs() if hashed else [command.weights()]
        options = {field.name: getattr(command, field.name) for field in fields(command)}
        self.shared = {
            "command": type(command).__name__,
            "version": VERSION,
            "options": {
                name: value
                for name, value in options.items()
                if name not in command.ELSEWHERE and not isinstance(value, Path)
            },
            "models": self._known([path for path in models if path]),
        }

    def of(self, source: Path) -> str:
        """Return the note of one result. Raises what `command.inputs_of` raises."""
        images = self._known(self.command.inputs_of(source))
        return json.dumps({**self.shared, "images": images}, sort_keys=True)

    def _known(self, paths: list[Path]) -> list[list[str]]:
        return [[path.name, content_hash(path) if self.hashed else ""] for path in paths]

    def is_unchanged(self, source: Path, made: list[Path]) -> bool:
        """Return True if the result files `made` exist and were made from the current inputs."""
        try:
            return os.path.exists(made[0]) and {read_note(path) for path in made} == {self.of(source)}
        except (FileNotFoundError, ValueError):  # a missing mask, say: reported when it is restored
            return False


def content_hash(path: Path) -> str:
    """Return a hash of a file's content, or "missing" for no file, which fails when it is used.

    A file above LARGE gets its size and time instead, a folder of weights the hash of its files' hashes.
    """
    if path.is_dir():
        parts = sorted(part for part in path.iterdir() if part.suffix in (".safetensors", ".json"))
        known = [f"{part.name} {content_hash(part)}" for part in parts]
        return hashlib.sha256("\n".join(known).encode()).hexdigest()[:16]
    if not path.is_file():
        return "missing"
    stat = path.stat()
    if stat.st_size > LARGE:
        return f"{stat.st_size} bytes of {stat.st_mtime_ns}"
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
