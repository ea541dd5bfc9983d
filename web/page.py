"""The web page: its components and what they do."""

import html
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from PIL import Image

from ldm.models.diffusion.samplers import METHODS
from web.service import SIDES, RestorationService, Stopped, System, is_painted

TITLE = "Image restoration"
SHOWN = {"interactive": False, "buttons": ["download", "fullscreen"]}  # for images that are not edited
NO_IMAGE = "there is no image yet: upload one"
MISTAKES = (ValueError, OSError, torch.OutOfMemoryError, Image.DecompressionBombError)
CONTROLS = {  # the component of each option of infer.py
    "num_inference_steps": partial(gr.Slider, 1, 100, step=1, precision=0, label="Steps"),
    "guidance_scale": partial(gr.Slider, 1, 15, step=0.1, label="Guidance"),
    "seed": partial(gr.Number, precision=0, minimum=0, maximum=2**32 - 1, label="Seed"),
    "scheduler": partial(gr.Dropdown, [*METHODS], label="Sampler"),
    "strength": partial(gr.Slider, 0.05, 1, step=0.05, label="Strength"),
    "mask_blur": partial(gr.Slider, 0, 64, step=1, precision=0, label="Feather, pixels"),
    "only_masked_padding": partial(
        gr.Slider, -1, 256, step=1, precision=0, label="Each hole alone, pixels around it (-1: no)"
    ),
    "self_ensemble": partial(gr.Checkbox, label="Mean over 8 flips and rotations: 8 times slower"),
    "prompt": partial(gr.Textbox, max_length=1000, label="Prompt"),
}
for side in SIDES:
    CONTROLS[side] = partial(gr.Number, precision=0, minimum=0, maximum=1024, label=f"Add at {side}, pixels")


class Page:
    """Components of the page and their callbacks. `build` creates the page."""

    def __init__(self, service: RestorationService):
        self.service = service
        self.controls: dict[str, dict[str, Any]] = {}  # by system and option
        self.image = self.editor = self.mask = None  # path of the opened image; painted mask; mask file

    def build(self, limits: str) -> gr.Blocks:
        with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 86400)) as page:
            self.image = gr.State(None)  # on the server: a page cannot name other files
            gr.Markdown(f"# {TITLE}\nOne image, any of the systems. Nothing is sent to the internet.")
            with gr.Row():
                with gr.Column(scale=2, min_width=300):
                    upload = gr.File(label=f"Image, {limits}", file_types=["image"], elem_id="upload")
                    shown = gr.Image(label="Image", visible=False, elem_id="shown", **SHOWN)
                with gr.Column(scale=3, min_width=320), gr.Tabs():
                    for name, system in self.service.systems.items():
                        with gr.Tab(system.title):
                            self.build_tab(name, system)
                    with gr.Tab("Compare"):
                        self.build_comparison()

            def open_image(path: str | None) -> tuple:
                if path is None:
                    return None, gr.Image(None, visible=False), None
                try:
                    image, small = self.service.open_image(Path(path))
                except MISTAKES as error:
                    raise self.told(error) from error
                return image, gr.Image(small, visible=True), small

            gr.on([upload.upload, upload.clear], open_image, upload, [self.image, shown, self.editor])
            page.unload(self.stop)
        return page

    def build_tab(self, name: str, system: System) -> None:
        gr.Markdown(system.about)  # a function: called at every visit
        inputs = {self.image}
        if name == "inpaint":
            tools = {"sources": [], "transforms": [], "layers": False, "buttons": ["fullscreen"]}
            self.editor = gr.ImageEditor(label="Mask: paint here", height=480, elem_id="editor", **tools)
            self.mask = gr.File(label="Or a mask file: white is filled", file_types=["image"], elem_id="mask")
            inputs |= {self.editor, self.mask}
        with gr.Row():
            self.controls[name] = {
                option: CONTROLS[option](value=getattr(system.options, option, 0), min_width=190)
                for option in system.shown
            }
        start, slider = self.build_result(name)

        def restore(data: dict, request: gr.Request, progress=gr.Progress()) -> Any:  # noqa: B008
            result = self.restore(name, data, request, progress)
            return (data[self.image], result) if result else gr.skip()

        inputs |= {*self.controls[name].values()}
        start.click(restore, inputs, slider, show_progress_on=slider)

    def build_comparison(self) -> None:
        gr.Markdown("Restores with all that have weights, as their tabs say; Inpaint joins in with a mask.")
        results = gr.State({})  # files by title
        start, slider = self.build_result("compare")
        with gr.Row():
            left, right = gr.Dropdown([], label="Left"), gr.Dropdown([], label="Right")
        gallery = gr.Gallery(label="Results", columns=3, height="auto", elem_id="gallery", **SHOWN)

        def choose(found: dict, left: str, right: str) -> tuple | None:
            return (found[left], found[right]) if {left, right} <= found.keys() else None

        controls = [control for tab in self.controls.values() for control in tab.values()]
        inputs = {self.image, self.editor, self.mask, *controls}
        start.click(self.compare, inputs, [results, gallery, left, right], show_progress_on=gallery)
        gr.on([left.change, right.change], choose, [results, left, right], slider)

    def build_result(self, name: str) -> tuple[gr.Button, gr.ImageSlider]:
        """Build a Start button, a Stop button for all jobs of the page, and a slider between two images."""
        with gr.Row():
            start = gr.Button("Start", variant="primary", min_width=100, elem_id=f"start-{name}")
            stop = gr.Button("Stop", variant="stop", min_width=100, elem_id=f"stop-{name}")
        stop.click(self.stop)
        slider = gr.ImageSlider(label="Before and after", max_height=640, elem_id=f"slider-{name}", **SHOWN)
        return start, slider

    def stop(self, request: gr.Request) -> None:
        self.service.stop(request.session_hash)

    def restore(self, name: str, data: dict, request: gr.Request, progress: Callable) -> Path | None:
        """Restore the page's image with system `name` and the values of its tab; return None if stopped."""
        image = data[self.image]
        values = {option: data[control] for option, control in self.controls[name].items()}
        try:
            if image is None:
                raise ValueError(NO_IMAGE)
            if name == "deblur":
                values["prompt"] = values["prompt"] or None  # None: the training prompt
            if name == "inpaint":
                sides = tuple(int(values.pop(side) or 0) for side in SIDES)
                hole = self.service.open_mask(image, data[self.editor], data[self.mask], sides)
                values |= {"outpaint": sides, "input_mask": hole}
            return self.service.restore(name, image, values, request.session_hash, progress)
        except Stopped:
            gr.Info("Stopped: nothing was written.")
            return None
        except MISTAKES as error:
            raise self.told(error) from error

    def compare(self, data: dict, request: gr.Request, progress=gr.Progress()) -> Iterator[tuple]:  # noqa: B008
        """Yield each system's result when it is ready. A system that fails is reported; the others go on."""
        if data[self.image] is None:
            raise gr.Error(NO_IMAGE, print_exception=False)
        has_mask = data[self.mask] is not None or is_painted(data[self.editor])
        left_out = {"bgan"} if has_mask else {"bgan", "inpaint"}
        found = {"input": data[self.image]}
        for name, system in self.service.systems.items():
            if name in left_out or system.missing():
                continue
            try:
                result = self.restore(name, data, request, progress)
            except gr.Error as error:
                gr.Warning(f"{system.title}: {error.message}")
                continue
            if result is None:  # stopped
                return
            found = {**found, system.title: result}
            sides = [gr.Dropdown([*found], value=value) for value in ("input", system.title)]
            yield found, [(file, title) for title, file in found.items()], *sides

    def told(self, error: Exception) -> gr.Error:
        """Convert an error to an HTML message for the user, without the folders of the page's files."""
        text = " ".join(str(error).split())
        if isinstance(error, torch.OutOfMemoryError):
            text = "The GPU has too little memory for an image of this size."
        folder = re.escape(str(self.service.results.parent))
        text = html.escape(re.sub(rf"{folder}[\\/](\w+[\\/])*", "", text))
        return gr.Error(text, print_exception=False)
