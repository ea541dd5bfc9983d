"""Restoring pictures for a web page: one system in memory, one picture at a time, any job can be stopped."""

import gc
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock
from typing import Any

import cv2
import numpy as np
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from ldm.data.image import image_size, read_image, read_rgba, write_image

PREVIEW = 1280  # pixels: longest side of a picture as the page shows it


@dataclass
class System:
    """One way to restore pictures, and where its weights come from."""

    title: str
    does: str  # a sentence
    options: Any  # of infer.py: their restorer() loads it
    shown: tuple[str, ...]  # names of the options that the page offers
    wanted: tuple[Path, ...]  # its files
    source: str  # of the files: a sentence

    def missing(self) -> str:
        """What is missing and where it comes from, as sentences; empty if nothing is."""
        files = " and ".join(str(path) for path in self.wanted if not path.exists())
        return f"{self.title} has no weights yet: it wants {files}. {self.source}" if files else ""


class Stopped(Exception):
    """The user has stopped this job."""


@contextmanager
def stoppable(stop: Event) -> Iterator[None]:
    """All networks that run within raise Stopped at their next layer once `stop` is set."""

    def check(module: torch.nn.Module, inputs: tuple) -> None:
        if stop.is_set():
            raise Stopped

    handle = register_module_forward_pre_hook(check)
    try:
        yield
    finally:
        handle.remove()


class Workshop:
    """Restores pictures for all open pages, one after the other, with one system in memory."""

    def __init__(self, systems: dict[str, System], results: Path):
        self.systems, self.results = systems, results
        self.name, self.restorer = "", None  # what is loaded
        self.turn = Lock()
        self.jobs: list[tuple[str, Event]] = []  # of which page, and what stops it; waiting ones too

    def restore(self, name: str, picture: Path, values: dict[str, Any], page: str, report: Callable) -> Path:
        """The file of the result of system `name` with `values` for its options.

        `report(0, desc=...)` and `report((done, all), desc=...)` are called as it goes on. Raises Stopped
        after `stop(page)`, FileNotFoundError without weights, and what the system raises.
        """
        job = (page, Event())
        self.jobs.append(job)
        try:
            report(0, desc="waiting for another picture" if self.turn.locked() else "starting")
            while not self.turn.acquire(timeout=0.1):
                if job[1].is_set():
                    raise Stopped
            try:
                with stoppable(job[1]):
                    return self._restore(name, picture, values, report)
            finally:
                self.turn.release()
        finally:
            self.jobs.remove(job)

    def stop(self, page: str) -> None:
        """Stop all jobs of a page: at the next layer of a network, or at once where they wait."""
        for owner, stop in list(self.jobs):
            if owner == page:
                stop.set()

    def _restore(self, name: str, picture: Path, values: dict[str, Any], report: Callable) -> Path:
        system = self.systems[name]
        if problem := system.missing():
            raise FileNotFoundError(problem)

        def progress(steps: Iterable) -> Iterator:
            for done, step in enumerate(steps := list(steps)):
                report((done, len(steps)), desc=system.title)
                yield step

        vars(system.options).update(values, input=picture, progress=progress)
        if self.name != name:
            self.free()
            report(0, desc=f"loading {system.title}")
            self.restorer, self.name = system.options.restorer(), name
        report(0, desc=system.title)
        try:
            restored = self.restorer(read_image(picture), picture)
        except torch.OutOfMemoryError:
            self.free()
            raise
        return save(self.results, f"{picture.stem}_{name}", restored)

    def free(self) -> None:
        """Forget the loaded system and give its memory back."""
        self.name, self.restorer = "", None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def save(folder: Path, stem: str, image: np.ndarray) -> Path:
    """Write a picture as PNG under a name that starts like `stem`, made harmless, and that is new."""
    stem = re.sub(r"[^\w-]+", "_", stem)[:80].strip("_") or "picture"
    path = folder / f"{stem}_{secrets.token_hex(4)}.png"
    write_image(path, image, compress_level=3)
    return path


def open_upload(path: Path, results: Path, max_megapixels: float) -> tuple[Path, np.ndarray]:
    """An uploaded picture as an upright PNG in `results`, and small enough to show: uint8 (h, w, 3 or 4).

    Raises ValueError if it is too large, by its header, or cannot be read.
    """
    image = read_image(path, max_megapixels)
    rgba = read_rgba(path)
    image = image if rgba is None else rgba
    height, width = image.shape[:2]
    scale = min(1.0, PREVIEW / max(width, height))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return save(results, path.stem, image), cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def painted(drawing: dict | None) -> bool:
    """Whether there is a stroke in what gradio's image editor gives."""
    return any(layer[..., 3].any() for layer in (drawing or {}).get("layers", []))


def save_mask(drawing: dict | None, picture: Path) -> Path:
    """The strokes in what gradio's image editor gives, as a mask of the size of `picture` and beside it.

    Raises ValueError if there are none.
    """
    if not painted(drawing):
        raise ValueError("nothing is painted yet: paint over what is to be filled")
    hole = np.any([layer[..., 3] > 0 for layer in drawing["layers"]], axis=0)
    mask = cv2.resize(hole.astype(np.uint8) * 255, image_size(picture), interpolation=cv2.INTER_NEAREST)
    return save(picture.parent, f"{picture.stem}_mask", mask)
