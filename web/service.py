"""Restore images for a web page: one system in memory, one image at a time; any job can be stopped."""

import gc
import re
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from harness.jobs import Command, run_restorer
from harness.settings import check_ranges
from ldm.data.image import image_size, write_image
from ldm.data.masks import read_mask, resize_mask
from ldm.data.photo import read_photo

SIDES = ("left", "top", "right", "bottom")  # to which outpainting adds pixels
PREVIEW = 1280  # pixels: longest side of an image as the page shows it
FILES = ("checkpoint_path", "base_path", "pretrained_model_name_or_path", "lora_path")


@dataclass
class System:
    """Restoration system behind one tab of the page."""

    title: str
    options: Command
    shown: tuple[str, ...]  # names of the options that the page offers
    note: str = ""  # about its weights

    def missing(self) -> list[str]:
        """List the weight files that are missing."""
        paths = [getattr(self.options, name, None) for name in FILES]
        return [str(path) for path in paths if path and not path.exists()]

    def about(self) -> str:
        """Describe the system, with its missing weights; the text names its script and page of the docs."""
        does = type(self.options).__doc__.splitlines()[0] + self.note
        if files := self.missing():
            return f"{self.title} has no weights yet: it needs {' and '.join(files)}. {does}"
        return does


class Stopped(Exception):
    """Raised when the user has stopped a job."""


class RestorationService:
    """Service that restores images for all open pages, one at a time, with one system in memory."""

    def __init__(self, systems: dict[str, System], results: Path, max_megapixels: float):
        self.systems, self.results, self.max_megapixels = systems, results, max_megapixels
        self.name, self.restorer = "", None  # what is loaded
        self.turn = Lock()
        self.stops = Counter()  # how often each page has asked to stop

    def stop(self, page: str) -> None:
        """Stop all jobs of a page: before their next step or tile, or at once if they are waiting."""
        self.stops[page] += 1

    def restore(self, name: str, image: Path, values: dict[str, Any], page: str, report: Callable) -> Path:
        """Restore a file with system `name` and `values` for its options; return the file of the result.

        `report(0, desc=...)` and `report((done, all), desc=...)` are called to report progress. Raises
        Stopped after `stop(page)`, FileNotFoundError without weights, and what the system raises.
        """
        system, stops = self.systems[name], self.stops[page]
        if system.missing():
            raise FileNotFoundError(system.about())

        def check_stop() -> None:
            if self.stops[page] != stops:
                raise Stopped

        def progress(steps: Iterable) -> Iterator:
            steps = list(steps)
            for done, step in enumerate(steps):
                check_stop()
                report((done, len(steps)), desc=system.title)
                yield step

        report(0, desc="waiting for another image" if self.turn.locked() else f"starting {system.title}")
        while not self.turn.acquire(timeout=0.1):
            check_stop()
        try:
            restored = self.run(name, image, values, progress)
        except torch.OutOfMemoryError:
            self.free()
            raise
        finally:
            self.turn.release()
        check_stop()
        return self.save(f"{image.stem}_{name}", restored)

    def run(self, name: str, image: Path, values: dict[str, Any], progress: Callable) -> np.ndarray:
        """Restore a file with system `name`, loading the system if it is not in memory."""
        options = self.systems[name].options
        for option, value in {**values, "input": image}.items():
            setattr(options, option, value)
        check_ranges(options)
        if self.name != name:
            self.free()
            self.restorer, self.name = options.restorer(), name
        return run_restorer(self.restorer, read_photo(image), image, options.SEES_ALPHA, progress)

    def free(self) -> None:
        """Unload the current system and free its memory."""
        self.name, self.restorer = "", None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def save(self, stem: str, image: np.ndarray) -> Path:
        """Write an image as PNG under a new name that starts with `stem`, without special characters."""
        stem = re.sub(r"[^\w-]+", "_", stem)[:50]
        path = self.results / f"{stem}_{secrets.token_hex(8)}.png"
        write_image(path, image, compress_level=3)
        return path

    def open_image(self, path: Path) -> tuple[Path, Image.Image]:
        """Write an uploaded image as an upright PNG; return its path, and a small copy to show.

        Raises ValueError if it is too large, by its header, or cannot be read.
        """
        photo = read_photo(path, max_megapixels=self.max_megapixels)
        image = photo.with_alpha(photo.pixels)  # uint8 (h, w, 3 or 4)
        small = Image.fromarray(image)
        small.thumbnail((PREVIEW, PREVIEW))
        return self.save(path.stem, image), small

    def open_mask(
        self, image: Path, drawing: dict | None, file: str | Path | None, sides: tuple[int, ...]
    ) -> Path | None:
        """Join the strokes of gradio's image editor and a mask file in one mask file of the image's size.

        Returns None if only pixels at the sides are filled. Raises ValueError if there is nothing to fill, if
        the mask or the result is too large, or if the mask file has another shape than the image.
        """
        width, height = image_size(image)
        pixels = (width + sides[0] + sides[2]) * (height + sides[1] + sides[3])
        if any(sides) and pixels > self.max_megapixels * 1e6:
            raise ValueError(f"with what is added it has more than {self.max_megapixels:g} megapixels")
        mask = np.zeros((height, width), np.uint8)
        for layer in (drawing or {}).get("layers", []):
            hole = (layer[..., 3] > 0).astype(np.uint8)
            mask |= cv2.resize(hole, (width, height), interpolation=cv2.INTER_NEAREST)
        if file is not None:
            mask |= resize_mask(read_mask(file, self.max_megapixels), mask.shape, Path(file).name)
        if not mask.any() and not any(sides):
            raise ValueError("nothing is painted yet: paint over what is to be filled, or load a mask")
        return self.save(f"{image.stem}_mask", 255 * mask) if mask.any() else None


def is_painted(drawing: dict | None) -> bool:
    """Return True if the value of gradio's image editor holds a stroke."""
    return any(layer[..., 3].any() for layer in (drawing or {}).get("layers", []))
