"""The web page: its components and what they do."""

import html
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from PIL import Image

from ldm.data.image import image_size
from ldm.models.diffusion.samplers import METHODS
from web.service import SIDES, RestorationService, Stopped, System, is_painted, open_upload, save_mask

CSS = """
.gradio-container { width: 100%; max-width: 1280px !important; margin: auto; }
.toast-wrap { top: auto !important; bottom: 16px; }
"""
SHOWN = {"interactive": False, "buttons": ["fullscreen"]}  # of images that are only looked at
NO_IMAGE = "there is no image yet: upload one"
MISTAKES = (ValueError, OSError, torch.OutOfMemoryError, Image.DecompressionBombError)
SLIDERS = {  # option: least, most, step, label
    "num_inference_steps": (1, 100, 1, "Steps"),
    "guidance_scale": (1, 15, 0.1, "Guidance"),
    "strength": (0.05, 1, 0.05, "Strength"),
    "fidelity": (0, 1, 0.05, "Fidelity to the input"),
    "mask_blur": (0, 64, 1, "Feather, pixels"),
    "only_masked_padding": (-1, 256, 1, "Each hole alone, with so many pixels around (-1: no)"),
}


def sentence(error: Exception, hidden: Path | None = None) -> str:
    """Return what went wrong in one line of HTML, without the folder `hidden`."""
    if isinstance(error, torch.OutOfMemoryError):
        return "The GPU has too little memory for an image of this size."
    return html.escape(" ".join(str(error).replace(f"{hidden}{os.sep}", "").split()))


@contextmanager
def sentences(hidden: Path | None = None) -> Iterator[None]:
    """Show mistakes to the user, each in a sentence; a stop is none."""
    try:
        yield
    except Stopped:
        gr.Info("Stopped: nothing was written.", duration=3)
    except MISTAKES as error:
        raise gr.Error(sentence(error, hidden), duration=10, print_exception=False) from error


def make_control(option: str, value: Any) -> Any:
    """Return the component for an option of infer.py."""
    if option in SLIDERS:
        least, most, step, label = SLIDERS[option]
        precision = 0 if step == 1 else None
        return gr.Slider(least, most, value, step=step, label=label, precision=precision, min_width=190)
    if option in SIDES:
        label = f"Add at {option}, pixels"
        return gr.Number(0, precision=0, minimum=0, maximum=1024, label=label, min_width=120)
    if option == "seed":
        return gr.Number(value, precision=0, minimum=0, maximum=2**32 - 1, label="Seed", min_width=190)
    if option == "scheduler":
        return gr.Dropdown([*METHODS], value=value, label="Sampler", min_width=190)
    if option == "self_ensemble":
        return gr.Checkbox(value, label="Mean over 8 flips and rotations: 8 times slower")
    return gr.Textbox(value or "", max_length=1000, label="Prompt", min_width=400)


class Page:
    """The components of the page and what they do. `build` makes it."""

    def __init__(self, service: RestorationService, max_megapixels: float, max_upload_mb: int):
        self.service, self.max_megapixels, self.max_upload_mb = service, max_megapixels, max_upload_mb
        self.controls: dict[str, dict[str, Any]] = {}  # by system and option
        self.image = self.editor = None  # the path of the opened image; where the mask is painted
        self.mask = None  # the path of the mask file

    def build(self) -> gr.Blocks:
        limits = f"up to {self.max_upload_mb} MB and {self.max_megapixels:g} megapixels"
        title = "Image restoration"
        with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 86400)) as page:
            # On the server: a page cannot name other files
            self.image, self.mask = gr.State(None), gr.State(None)
            gr.Markdown(f"# {title}\nOne image, any of the systems. Nothing is sent to the internet.")
            with gr.Row():
                with gr.Column(scale=2, min_width=300):
                    upload = gr.File(
                        label=f"Image, {limits}", file_types=["image"], height=160, elem_id="upload"
                    )
                    shown = gr.Image(label="Image", visible=False, height=320, elem_id="shown", **SHOWN)
                with gr.Column(scale=3, min_width=320), gr.Tabs():
                    for name, system in self.service.systems.items():
                        with gr.Tab(system.title):
                            self.build_tab(name, system)
                    with gr.Tab("Compare"):
                        self.build_comparison()

            def open_image(path: str) -> tuple:
                with sentences(Path(path).parent):
                    image, small = open_upload(Path(path), self.service.results, self.max_megapixels)
                return image, gr.Image(small, visible=True), small

            opened = [self.image, shown, self.editor]
            upload.upload(open_image, upload, opened)
            page.unload(self.stop)
            upload.clear(lambda: (None, gr.Image(None, visible=False), None), None, opened)
        return page

    def build_tab(self, name: str, system: System) -> None:
        gr.Markdown(system.does)
        gr.Markdown(lambda: f"**{system.missing()}**" if system.missing() else "")  # at every visit anew
        if name == "inpaint":
            self.build_editor()
        with gr.Row():
            self.controls[name] = {
                option: make_control(option, getattr(system.options, option, 0)) for option in system.shown
            }
        start = self.buttons(name)
        slider, download = self.result(name)

        def restore(data: dict, request: gr.Request, progress=gr.Progress()) -> tuple:  # noqa: B008
            with sentences():
                result = str(self.restore(name, data, request, progress))
                before = str(data[self.image])
                return (before, result), gr.DownloadButton(value=result, interactive=True)
            return gr.skip(), gr.skip()

        inputs = {self.image, *self.controls[name].values()}
        if name == "inpaint":
            inputs |= {self.editor, self.mask}
        start.click(restore, inputs, [slider, download], show_progress_on=slider)

    def build_editor(self) -> None:
        self.editor = gr.ImageEditor(
            label="Mask: paint here",
            height=480,
            sources=[],
            transforms=[],
            layers=False,
            brush=gr.Brush(colors=["#ff3b30"], color_mode="fixed"),
            buttons=["fullscreen"],
            elem_id="editor",
        )
        mask = gr.File(
            label="Or a mask file: white is filled", file_types=["image"], height=100, elem_id="mask"
        )
        mask.upload(self.open_mask, mask, self.mask)
        mask.clear(lambda: None, None, self.mask)

    def build_comparison(self) -> None:
        results = gr.State({})  # names and files
        gr.Markdown(
            "All that restores and has weights, one after the other, with the settings of its tab. "
            "Inpaint joins in if something is painted there."
        )
        start = self.buttons("compare")
        gallery = gr.Gallery(label="Results", columns=3, height="auto", elem_id="gallery", **SHOWN)
        with gr.Row():
            left, right = (gr.Dropdown([], label=side, min_width=120) for side in ("Left", "Right"))
        slider, download = self.result("compare")

        def compare(data: dict, request: gr.Request, progress=gr.Progress()) -> Iterator:  # noqa: B008
            found = {}
            with sentences():
                for name, file in self.compare(data, request, progress):
                    found[name] = str(file)
                    sides = (gr.Dropdown(list(found), value=value) for value in ("input", name))
                    yield dict(found), [(path, caption) for caption, path in found.items()], *sides

        def choose(found: dict, left: str, right: str) -> tuple:
            if not {left, right} <= found.keys():
                return None, gr.DownloadButton(value=None, interactive=False)
            return (found[left], found[right]), gr.DownloadButton(value=found[right], interactive=True)

        controls = [control for tab in self.controls.values() for control in tab.values()]
        inputs = {self.image, self.editor, self.mask, *controls}
        start.click(compare, inputs, [results, gallery, left, right], show_progress_on=gallery)
        gr.on([left.change, right.change], choose, [results, left, right], [slider, download])

    def buttons(self, name: str) -> gr.Button:
        """Build a button that starts, which is returned, and one that stops all jobs of the page."""
        with gr.Row():
            start = gr.Button("Start", variant="primary", min_width=100, elem_id=f"start-{name}")
            stop = gr.Button("Stop", variant="stop", min_width=100, elem_id=f"stop-{name}")
        stop.click(self.stop)
        return start

    def stop(self, request: gr.Request) -> None:
        self.service.stop(request.session_hash)

    def result(self, name: str) -> tuple[Any, Any]:
        """Build the before/after slider and the button that downloads what is on its right."""
        look = {"max_height": 640, "elem_id": f"slider-{name}", **SHOWN}
        slider = gr.ImageSlider(label="Before and after", type="filepath", **look)
        return slider, gr.DownloadButton("Download", interactive=False, elem_id=f"download-{name}")

    def restore(self, name: str, data: dict, request: gr.Request, progress: Callable) -> Path:
        """Restore the page's image by the system `name` with the values of its tab."""
        image = data[self.image]
        if image is None:
            raise ValueError(NO_IMAGE)
        values = {option: data[control] for option, control in self.controls[name].items()}
        if name == "deblur":
            values["prompt"] = values["prompt"] or None  # None: that of the training
        if name == "inpaint":
            values |= self.hole(data, image, tuple(int(values.pop(side) or 0) for side in SIDES))
        return self.service.restore(name, image, values, request.session_hash, progress)

    def hole(self, data: dict, image: Path, sides: tuple[int, ...]) -> dict[str, Any]:
        """Return what is to be filled, as options of infer.py. Raises ValueError if that is too large."""
        width, height = image_size(image)
        pixels = (width + sides[0] + sides[2]) * (height + sides[1] + sides[3]) / 1e6
        if any(sides) and pixels > self.max_megapixels:
            raise ValueError(f"with what is added it has more than {self.max_megapixels:g} megapixels")
        mask = None
        if data[self.mask] or is_painted(data[self.editor]) or not any(sides):
            mask = save_mask(data[self.editor], image, data[self.mask])
        return {"input_mask": mask, "outpaint": sides}

    def open_mask(self, path: str) -> Path:
        """Keep an uploaded mask on the server."""
        with sentences(Path(path).parent):
            return open_upload(Path(path), self.service.results, self.max_megapixels)[0]

    def compare(self, data: dict, request: gr.Request, progress: Callable) -> Iterator[tuple[str, Path]]:
        """Yield the image, then every result, as titles and files. What fails is named and stops no other."""
        systems = {k: v for k, v in self.service.systems.items() if k != "bgan" and not v.missing()}
        if data[self.mask] is None and not is_painted(data[self.editor]):
            systems.pop("inpaint", None)
        if data[self.image] is None:
            raise ValueError(NO_IMAGE)
        if not systems:
            raise ValueError("no system has weights yet")
        yield "input", data[self.image]
        for name, system in systems.items():
            try:
                yield system.title, self.restore(name, data, request, progress)
            except MISTAKES as error:
                gr.Warning(f"{system.title}: {sentence(error)}", duration=10)
