"""Restore images for a web page: one system in memory, one image at a time; any job can be stopped."""

import gc
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock
from typing import Any

import cv2
import numpy as np
import torch

from harness.jobs import Command, run_restorer
from harness.settings import check_ranges
from ldm.data.image import image_size, write_image
from ldm.data.masks import read_mask, resize_mask
from ldm.data.photo import read_photo

SIDES = ("left", "top", "right", "bottom")  # to which outpainting adds pixels
PREVIEW = 1280  # pixels: longest side of an image as the page shows it


@dataclass
class System:
    """One way to restore images, and where its weights come from."""

    title: str
    does: str  # a sentence
    options: Command
    shown: tuple[str, ...]  # names of the options that the page offers
    source: str  # of its weights: a sentence

    def files(self) -> list[Path]:
        """List the weights without which it does not work."""
        names = ("checkpoint_path", "base_path", "pretrained_model_name_or_path", "lora_path")
        paths = [getattr(self.options, name, None) for name in names]
        return [path for path in paths if path]

    def missing(self) -> str:
        """Say in sentences what is missing and where it comes from; empty if nothing is."""
        files = " and ".join(str(path) for path in self.files() if not path.exists())
        return f"{self.title} has no weights yet: it needs {files}. {self.source}" if files else ""


class Stopped(Exception):
    """The user has stopped this job."""


class RestorationService:
    """Restores images for all open pages, one after the other, with one system in memory."""

    def __init__(self, systems: dict[str, System], results: Path):
        self.systems, self.results = systems, results
        self.name, self.restorer = "", None  # what is loaded
        self.turn = Lock()
        self.jobs: list[tuple[str, Event]] = []  # the page of each job and what stops it; waiting ones too

    def restore(self, name: str, image: Path, values: dict[str, Any], page: str, report: Callable) -> Path:
        """Restore a file by system `name` with `values` for its options; returns the file of the result.

        `report(0, desc=...)` and `report((done, all), desc=...)` are called as it goes on. Raises Stopped
        after `stop(page)`, FileNotFoundError without weights, and what the system raises.
        """
        job = (page, Event())
        self.jobs.append(job)
        try:
            report(0, desc="waiting for another image" if self.turn.locked() else "starting")
            while not self.turn.acquire(timeout=0.1):
                check_stop(job[1])
            try:
                return self._restore(name, image, values, report, job[1])
            finally:
                self.turn.release()
        finally:
            self.jobs.remove(job)

    def stop(self, page: str) -> None:
        """Stop all jobs of a page: before their next step or tile, or at once where they wait."""
        for owner, stop in list(self.jobs):
            if owner == page:
                stop.set()

    def _restore(self, name: str, image: Path, values: dict[str, Any], report: Callable, stop: Event) -> Path:
        system = self.systems[name]
        if problem := system.missing():
            raise FileNotFoundError(problem)

        def progress(steps: Iterable) -> Iterator:
            steps = list(steps)
            for done, step in enumerate(steps):
                check_stop(stop)
                report((done, len(steps)), desc=system.title)
                yield step

        system.options.input = image
        for option, value in values.items():
            setattr(system.options, option, value)
        check_ranges(system.options)
        if self.name != name:
            self.free()
            report(0, desc=f"loading {system.title}")
            self.restorer, self.name = system.options.restorer(), name
        check_stop(stop)
        report(0, desc=system.title)
        try:
            photo = read_photo(image)
            restored = run_restorer(self.restorer, photo, image, system.options.SEES_ALPHA, progress)
        except torch.OutOfMemoryError:
            self.free()
            raise
        check_stop(stop)
        return save(self.results, f"{image.stem}_{name}", restored)

    def free(self) -> None:
        """Forget the loaded system and give its memory back."""
        self.name, self.restorer = "", None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def check_stop(stop: Event) -> None:
    """Raise Stopped if the user wants that."""
    if stop.is_set():
        raise Stopped


def save(folder: Path, stem: str, image: np.ndarray) -> Path:
    """Write an image as PNG under a name that starts like `stem`, made harmless, and that is new."""
    stem = re.sub(r"[^\w-]+", "_", stem)[:80].strip("_") or "image"
    path = folder / f"{stem}_{secrets.token_hex(8)}.png"
    write_image(path, image, compress_level=3)
    return path


def open_upload(path: Path, results: Path, max_megapixels: float) -> tuple[Path, np.ndarray]:
    """Write an uploaded image as an upright PNG to `results`; return it also small enough to show.

    Raises ValueError if it is too large, by its header, or cannot be read.
    """
    photo = read_photo(path, max_megapixels=max_megapixels)
    image = photo.with_alpha(photo.pixels)  # uint8 (h, w, 3 or 4)
    height, width = image.shape[:2]
    scale = min(1.0, PREVIEW / max(width, height))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return save(results, path.stem, image), cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def is_painted(drawing: dict | None) -> bool:
    """True if there is a stroke in what gradio's image editor gives."""
    return any(layer[..., 3].any() for layer in (drawing or {}).get("layers", []))


def save_mask(drawing: dict | None, image: Path, file: Path | None = None) -> Path:
    """Join the strokes of gradio's image editor and a mask file in one mask of the image's size.

    It lies beside the image. Raises ValueError if there is neither, or if the file has another shape.
    """
    if file is None and not is_painted(drawing):
        raise ValueError("nothing is painted yet: paint over what is to be filled, or load a mask")
    size = image_size(image)
    mask = np.zeros(size[::-1], np.uint8)
    if is_painted(drawing):
        hole = np.any([layer[..., 3] > 0 for layer in drawing["layers"]], axis=0)
        mask = cv2.resize(hole.astype(np.uint8) * 255, size, interpolation=cv2.INTER_NEAREST)
    if file is not None:
        mask |= 255 * resize_mask(read_mask(file), mask.shape, file.name)
    return save(image.parent, f"{image.stem}_mask", mask)
