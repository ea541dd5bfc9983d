"""Restoring pictures for a web page: one system in memory, one picture at a time, any job can be stopped."""

import gc
import re
import secrets
import time
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

from harness.jobs import run_restorer
from ldm.data.image import image_size, read_image, read_rgba, write_image
from ldm.data.masks import read_mask, resize_mask
from ldm.data.picture import read_picture

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
    one_pass: bool = False  # whether a picture is one step of work

    def missing(self) -> str:
        """What is missing and where it comes from, as sentences; empty if nothing is."""
        files = " and ".join(str(path) for path in self.wanted if not path.exists())
        return f"{self.title} has no weights yet: it wants {files}. {self.source}" if files else ""


class Stopped(Exception):
    """The user has stopped this job."""


class Meter:
    """How far a step of work is, judged by its layers: it takes as many as the step before did."""

    def __init__(self):
        self.before: list[float] = []  # work up to and with each layer
        self.now: list[float] = []

    def next(self) -> None:
        """A step ends, another begins."""
        self.before, self.now = self.now or self.before, []

    def layer(self, module: torch.nn.Module, inputs: tuple) -> float:
        """Count a layer that begins; which part of the step's work is done, from 0 to 1."""
        weight = getattr(module, "weight", None)
        if not (isinstance(weight, torch.Tensor) and weight.ndim > 1 and inputs):
            return self.part()
        work = inputs[0].numel() * weight[:, 0].numel()
        self.now.append(work + (self.now[-1] if self.now else 0.0))
        return self.part()

    def part(self) -> float:
        count = len(self.now) - 1  # the last one has only begun
        if not self.before or count < 1:
            return 0.0
        return self.before[min(count, len(self.before)) - 1] / self.before[-1]


@contextmanager
def stoppable(stop: Event, on_layer: Callable = lambda module, inputs: None) -> Iterator[None]:
    """All networks that run within raise Stopped at their next layer once `stop` is set.

    `on_layer(module, inputs)` is called before every layer.
    """

    def check(module: torch.nn.Module, inputs: tuple) -> None:
        if stop.is_set():
            raise Stopped
        on_layer(module, inputs)

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
        self.meter = Meter()
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
                return self._restore(name, picture, values, report, job[1])
            finally:
                self.turn.release()
        finally:
            self.jobs.remove(job)

    def stop(self, page: str) -> None:
        """Stop all jobs of a page: at the next layer of a network, or at once where they wait."""
        for owner, stop in list(self.jobs):
            if owner == page:
                stop.set()

    def _restore(
        self, name: str, picture: Path, values: dict[str, Any], report: Callable, stop: Event
    ) -> Path:
        system = self.systems[name]
        if problem := system.missing():
            raise FileNotFoundError(problem)

        steps, told = (0, 1), time.monotonic()

        def progress(todo: Iterable) -> Iterator:
            nonlocal steps
            for done, step in enumerate(todo := list(todo)):
                steps = done, len(todo)
                self.meter.next()
                report(steps, desc=system.title)
                yield step

        def on_layer(module: torch.nn.Module, inputs: tuple) -> None:
            nonlocal told
            part = self.meter.layer(module, inputs)
            if part and time.monotonic() > told + 0.5:
                told = time.monotonic()
                report((round(steps[0] + part, 2), steps[1]), desc=system.title)

        vars(system.options).update(values, input=picture, progress=progress)
        if self.name != name:
            self.free()
            report(0, desc=f"loading {system.title}")
            self.restorer, self.name = system.options.restorer(), name
            self.meter = Meter()
            if system.one_pass:  # on a small picture: how much of the work each layer is
                with stoppable(stop, self.meter.layer):
                    self.restorer(np.zeros((64, 64, 3), np.uint8), picture)
        report(0, desc=system.title)
        self.meter.next()
        shown = read_picture(picture)
        try:
            with stoppable(stop, on_layer):
                restored = run_restorer(self.restorer, shown, picture)
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
    path = folder / f"{stem}_{secrets.token_hex(8)}.png"
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


def save_mask(drawing: dict | None, picture: Path, file: Path | None = None) -> Path:
    """The strokes in what gradio's image editor gives and the mask in `file` as one of the size of `picture`.

    It lies beside it. Raises ValueError if there is neither, or if the file's mask is of another shape.
    """
    if file is None and not painted(drawing):
        raise ValueError("nothing is painted yet: paint over what is to be filled, or load a mask")
    size = image_size(picture)
    mask = np.zeros(size[::-1], np.uint8)
    if painted(drawing):
        hole = np.any([layer[..., 3] > 0 for layer in drawing["layers"]], axis=0)
        mask = cv2.resize(hole.astype(np.uint8) * 255, size, interpolation=cv2.INTER_NEAREST)
    if file is not None:
        mask |= 255 * resize_mask(read_mask(file), mask.shape, file.name)
    return save(picture.parent, f"{picture.stem}_mask", mask)
