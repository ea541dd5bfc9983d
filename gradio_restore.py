"""A web page on this machine: restore a picture with any of the systems here, or compare them all.

    python gradio_restore.py                              # then open http://127.0.0.1:7860
    python gradio_restore.py --srn_path my.safetensors    # weights from elsewhere

A system without weights says which file it wants and where that comes from. More in docs/web.md.
"""

import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

import infer
from harness.settings import run_main
from ldm.checkpoint import repository_path
from ldm.data.image import image_size
from ldm.device import choose_device, describe_start
from ldm.models.diffusion.samplers import METHODS
from ldm.models.kontext import TRANSFORMER
from ldm.util import settle_precision
from web.doorkeeper import Doorkeeper, Terse, check_picture, sentence
from web.workshop import Stopped, System, Workshop, open_upload, painted, save_mask

# ---- settings: edit here, or override on the command line --------------------------------------------------


@dataclass
class Settings:
    """Serve a web page that restores pictures with any of the systems here."""

    host: str = "127.0.0.1"  # this machine only; 0.0.0.0 lets all others in, and there is no password
    port: int = 7860  # of the page's address
    output_dir: Path = Path("outputs/web")  # the page reads and writes pictures nowhere else
    max_megapixels: float = 24.0  # of a picture
    max_upload_mb: int = 40  # of its file
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: cuda if there is one
    precision: Literal["auto", "32", "16", "bf16"] = "auto"  # of the computation; Kontext chooses itself

    # Weights; None takes those of a run in outputs/ if there is one, else those that come along in models/.
    srn_path: Path = Path("models/srn_deblur.safetensors")  # weights of SRN-DeblurNet
    dbgan_path: Path | None = None  # weights of DBGAN
    bgan_path: Path | None = None  # weights of BGAN
    deblur_path: Path | None = None  # the deblurring ControlNet
    inpaint_path: Path | None = None  # the inpainting ControlNet
    base_path: Path | None = None  # Stable Diffusion for these two; None takes the file that they name
    kontext_path: Path | None = None  # the model folder; None takes models/FLUX.1-Kontext-dev
    lora_path: Path | None = None  # of Kontext, a file or a run's folder; None takes outputs/kontext_lora
    kontext_prompt: str = ""  # empty: the one that the LoRA was trained with; with it no LoRA is needed


def list_systems(settings: Settings) -> dict[str, System]:
    """The tabs, under the names of infer.py's subcommands."""
    base = settings.base_path
    same = {"input": settings.output_dir, "output_dir": settings.output_dir, "device": settings.device}
    exact = {**same, "precision": settings.precision}
    sampling = ("num_inference_steps", "guidance_scale", "seed")
    runs = "controlnet_inpainting_{}/final_model/model.ckpt"
    newest = max(Path("outputs").glob(runs.format("*")), default=Path("outputs") / runs.format("TIME"))
    deblur = choose(settings.deblur_path, "outputs/deblur/checkpoints/best.ckpt", "small_deblur", SMALL_BASE)
    deblur = infer.Deblur(**exact, checkpoint_path=deblur, base_path=base)
    inpaint = choose(settings.inpaint_path, newest, "small_inpaint", SMALL_BASE)
    inpaint = infer.Inpaint(**exact, checkpoint_path=inpaint, base_path=base)
    for options in (deblur, inpaint):
        options.num_inference_steps = options.sampling_steps()
    dbgan = choose(settings.dbgan_path, "outputs/dbgan/deblur/dbgan.safetensors", "dbgan")
    bgan = choose(settings.bgan_path, "outputs/dbgan/blur/bgan.safetensors", "bgan")
    named = {"pretrained_model_name_or_path": settings.kontext_path, "lora_path": settings.lora_path}
    kontext = infer.Kontext(**same, **named, prompt=settings.kontext_prompt)
    folder, lora = kontext.files()
    if lora is None and not settings.kontext_prompt:
        lora = Path("outputs/kontext_lora")
    kontext.pretrained_model_name_or_path, kontext.lora_path = folder, lora
    kontext.num_inference_steps = kontext.work()["steps"]
    made = "{} makes it; --{}_path says where it is."
    return {
        "srn": System(
            "SRN",
            "SRN-DeblurNet takes away blur in one pass. It has no chance in it: no seed, no steps.",
            infer.SRN(**exact, checkpoint_path=settings.srn_path),
            ("self_ensemble",),
            (repository_path(settings.srn_path),),
            made.format("train_srn.py (docs/srn.md), a small one with --demo,", "srn"),
            one_pass=True,
        ),
        "dbgan": System(
            "DBGAN",
            "DBGAN takes away blur in one pass. It was trained on blur that a network made.",
            infer.DBGAN(**exact, checkpoint_path=dbgan),
            (),
            (dbgan,),
            made.format("train_dbgan.py (docs/dbgan.md)", "dbgan"),
            one_pass=True,
        ),
        "deblur": System(
            "ControlNet",
            "A ControlNet takes away blur with Stable Diffusion, which invents detail: each seed its own."
            + size_note(deblur.checkpoint_path),
            deblur,
            (*sampling, "scheduler", "strength", "fidelity", "self_ensemble", "prompt"),
            (deblur.checkpoint_path, *([base] if base else [])),
            made.format("tutorial_train_deblur.py (docs/deblur.md)", "deblur"),
        ),
        "inpaint": System(
            "Inpaint",
            "A ControlNet on Stable Diffusion fills what you paint over, what is white in a mask, and what "
            "is added at the sides. All else stays as it is." + size_note(inpaint.checkpoint_path),
            inpaint,
            (*sampling, "scheduler", "strength", "mask_blur", "only_masked_padding", *SIDES, "prompt"),
            (inpaint.checkpoint_path, *([base] if base else [])),
            made.format("tutorial_train_inpaint.py (docs/inpaint.md)", "inpaint"),
        ),
        "kontext": System(
            "Kontext",
            "FLUX.1 Kontext undoes the damage that its LoRA was trained on."
            + size_note(folder / TRANSFORMER),
            kontext,
            sampling,
            tuple(filter(None, kontext.files())),
            "The folder is a download of black-forest-labs/FLUX.1-Kontext-dev, train_kontext_lora.py makes "
            "the LoRA (docs/kontext.md); --kontext_path and --lora_path say where they are.",
        ),
        "bgan": System(
            "BGAN",
            "BGAN makes realistic blur from a sharp picture.",
            infer.BGAN(**exact, checkpoint_path=bgan),
            ("seed",),
            (bgan,),
            made.format("train_dbgan.py (docs/dbgan.md)", "bgan"),
            one_pass=True,
        ),
    }


SIDES = ("left", "top", "right", "bottom")  # to which outpainting adds
LARGE = 512  # pixels: weights that were trained on smaller images say so
SMALL_BASE = "small_diffusion"  # without which the small ControlNets are of no use


def choose(given: Path | None, run: str | Path, *shipped: str) -> Path:
    """The file of weights: the one that is given, else a run's, else the first of the included ones."""
    included = [repository_path(f"models/{name}.safetensors") for name in shipped]
    shown = included[0] if all(path.exists() for path in included) else Path(run)
    return given or (Path(run) if Path(run).exists() else shown)


def size_note(path: Path) -> str:
    """What to say of weights that were trained on small images."""
    size = infer.number_in(path, "image_size", LARGE)
    return f" It was trained on images of {size} pixels, to show how it works." if size < LARGE else ""


# ---- the page (gradio is imported where it is used, after `main` has said where its files go) --------------

CSS = """
.gradio-container { width: 100%; max-width: 1280px !important; margin: auto; }
.toast-wrap { top: auto !important; bottom: 16px; }
"""
SHOWN = {"interactive": False, "buttons": ["fullscreen"]}  # of pictures that are there to be looked at
NO_PICTURE = "there is no picture yet: upload one"


@contextmanager
def sentences(hidden: Path | None = None) -> Iterator[None]:
    """Show mistakes to the user, each in a sentence, without the folder `hidden`; a stop is none."""
    import gradio as gr

    try:
        yield
    except Stopped:
        gr.Info("Stopped: nothing was written.", duration=3)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        raise gr.Error(sentence(error, hidden), duration=10, print_exception=False) from error


def make_control(option: str, value: Any) -> Any:
    """The component for an option of infer.py."""
    import gradio as gr

    size = {"min_width": 190}
    whole = {"step": 1, "precision": 0, **size}
    alone = "Each hole alone, with so many pixels around (-1: no)"
    make = {
        "num_inference_steps": lambda: gr.Slider(1, 100, value, label="Steps", **whole),
        "guidance_scale": lambda: gr.Slider(1, 15, value, step=0.1, label="Guidance", **size),
        "seed": lambda: gr.Number(value, precision=0, minimum=0, maximum=2**32 - 1, label="Seed", **size),
        "scheduler": lambda: gr.Dropdown([*METHODS], value=value, label="Sampler", **size),
        "strength": lambda: gr.Slider(0.05, 1, value, step=0.05, label="Strength", **size),
        "mask_blur": lambda: gr.Slider(0, 64, value, label="Feather, pixels", **whole),
        "prompt": lambda: gr.Textbox(value or "", max_length=1000, label="Prompt", min_width=400),
        "fidelity": lambda: gr.Slider(0, 1, value, step=0.05, label="Fidelity to the input", **size),
        "only_masked_padding": lambda: gr.Slider(-1, 256, value, label=alone, **whole),
        "self_ensemble": lambda: gr.Checkbox(value, label="Mean over 8 flips and turns: 8 times slower"),
    }
    if option in SIDES:
        label = f"Add at {option}, pixels"
        return gr.Number(0, precision=0, minimum=0, maximum=1024, label=label, min_width=120)
    return make[option]()


class Page:
    """The components of the page and what they do. `build` makes it."""

    def __init__(self, workshop: Workshop, settings: Settings):
        self.workshop, self.settings = workshop, settings
        self.controls: dict[str, dict[str, Any]] = {}  # by system and option
        self.picture = self.editor = None  # the path of the opened picture; where the mask is painted
        self.mask = None  # the path of the mask file
        self.stop: Callable | None = None  # stops all jobs of the page that asks for it

    def build(self) -> Any:
        """The page as gradio.Blocks, to be launched."""
        import gradio as gr

        limits = f"up to {self.settings.max_upload_mb} MB and {self.settings.max_megapixels:g} megapixels"
        title = "Image restoration"

        def stop(request: gr.Request) -> None:
            self.workshop.stop(request.session_hash)

        self.stop = stop
        with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 86400)) as page:
            # On the server: a page cannot name other files
            self.picture, self.mask = gr.State(None), gr.State(None)
            gr.Markdown(f"# {title}\nOne picture, any of the systems. Nothing is sent to the internet.")
            with gr.Row():
                with gr.Column(scale=2, min_width=300):
                    upload = gr.File(
                        label=f"Picture, {limits}", file_types=["image"], height=160, elem_id="upload"
                    )
                    shown = gr.Image(label="Picture", visible=False, height=320, elem_id="shown", **SHOWN)
                with gr.Column(scale=3, min_width=320), gr.Tabs():
                    for name, system in self.workshop.systems.items():
                        with gr.Tab(system.title):
                            self.build_tab(name, system)
                    with gr.Tab("Compare"):
                        self.build_comparison()

            def open_picture(path: str) -> tuple:
                with sentences(Path(path).parent):
                    limit = self.settings.max_megapixels
                    picture, small = open_upload(Path(path), self.workshop.results, limit)
                return picture, gr.Image(small, visible=True), small

            opened = [self.picture, shown, self.editor]
            upload.upload(open_picture, upload, opened)
            page.unload(self.stop)
            upload.clear(lambda: (None, gr.Image(None, visible=False), None), None, opened)
        return page

    def build_tab(self, name: str, system: System) -> None:
        import gradio as gr

        gr.Markdown(system.does)
        gr.Markdown(lambda: f"**{system.missing()}**" if system.missing() else "")  # at every visit anew
        if name == "inpaint":
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
        with gr.Row():
            self.controls[name] = {
                option: make_control(option, getattr(system.options, option, 0)) for option in system.shown
            }
        start = self.buttons(name)
        slider, download = self.result(name)

        def restore(data: dict, request: gr.Request, progress=gr.Progress()) -> tuple:  # noqa: B008
            with sentences():
                result = str(self.restore(name, data, request, progress))
                before = str(data[self.picture])
                return (before, result), gr.DownloadButton(value=result, interactive=True)
            return gr.skip(), gr.skip()

        inputs = {self.picture, *self.controls[name].values()}
        inputs |= {self.editor, self.mask} if name == "inpaint" else set()
        start.click(restore, inputs, [slider, download], show_progress_on=slider)

    def build_comparison(self) -> None:
        import gradio as gr

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
                    sides = (gr.Dropdown(list(found), value=value) for value in ("picture", name))
                    yield dict(found), [(path, caption) for caption, path in found.items()], *sides

        def choose(found: dict, left: str, right: str) -> tuple:
            if not {left, right} <= found.keys():
                return None, gr.DownloadButton(value=None, interactive=False)
            return (found[left], found[right]), gr.DownloadButton(value=found[right], interactive=True)

        controls = [control for tab in self.controls.values() for control in tab.values()]
        inputs = {self.picture, self.editor, self.mask, *controls}
        start.click(compare, inputs, [results, gallery, left, right], show_progress_on=gallery)
        gr.on([left.change, right.change], choose, [results, left, right], [slider, download])

    def buttons(self, name: str) -> Any:
        """A button that starts, which is returned, and one that stops all jobs of the page."""
        import gradio as gr

        with gr.Row():
            start = gr.Button("Start", variant="primary", min_width=100, elem_id=f"start-{name}")
            stop = gr.Button("Stop", variant="stop", min_width=100, elem_id=f"stop-{name}")
        stop.click(self.stop)
        return start

    def result(self, name: str) -> tuple[Any, Any]:
        """The before/after slider and the button that downloads what is on its right."""
        import gradio as gr

        look = {"max_height": 640, "elem_id": f"slider-{name}", **SHOWN}
        slider = gr.ImageSlider(label="Before and after", type="filepath", **look)
        return slider, gr.DownloadButton("Download", interactive=False, elem_id=f"download-{name}")

    def restore(self, name: str, data: dict, request: Any, progress: Callable) -> Path:
        """The result of the system `name` for the page's picture, with the values of its tab."""
        picture = data[self.picture]
        if picture is None:
            raise ValueError(NO_PICTURE)
        values = {option: data[control] for option, control in self.controls[name].items()}
        if name == "deblur":
            values["prompt"] = values["prompt"] or None  # None: that of the training
        if name == "inpaint":
            values |= self.hole(data, picture, tuple(int(values.pop(side) or 0) for side in SIDES))
        return self.workshop.restore(name, picture, values, request.session_hash, progress)

    def hole(self, data: dict, picture: Path, sides: tuple[int, ...]) -> dict[str, Any]:
        """What is to be filled, as options of infer.py. Raises ValueError if the result is too large."""
        width, height = image_size(picture)
        pixels = (width + sides[0] + sides[2]) * (height + sides[1] + sides[3]) / 1e6
        if any(sides) and pixels > self.settings.max_megapixels:
            raise ValueError(f"with that added it has more than {self.settings.max_megapixels:g} megapixels")
        if any(sides) and data[self.mask] is None and not painted(data[self.editor]):
            return {"input_mask": None, "outpaint": sides}
        return {"input_mask": save_mask(data[self.editor], picture, data[self.mask]), "outpaint": sides}

    def open_mask(self, path: str) -> Path:
        """An uploaded mask, kept on the server."""
        with sentences(Path(path).parent):
            return open_upload(Path(path), self.workshop.results, self.settings.max_megapixels)[0]

    def compare(self, data: dict, request: Any, progress: Callable) -> Iterator[tuple[str, Path]]:
        """The picture, then every result, as titles and files. What fails is named and holds up no other."""
        import gradio as gr

        systems = {k: v for k, v in self.workshop.systems.items() if k != "bgan" and not v.missing()}
        if data[self.mask] is None and not painted(data[self.editor]):
            systems.pop("inpaint", None)
        if not systems or data[self.picture] is None:
            raise ValueError(NO_PICTURE if systems else "no system has weights yet")
        yield "picture", data[self.picture]
        for name, system in systems.items():
            try:
                yield system.title, self.restore(name, data, request, progress)
            except (ValueError, OSError, torch.OutOfMemoryError) as error:
                gr.Warning(f"{system.title}: {sentence(error)}", duration=10)


# ---- the server --------------------------------------------------------------------------------------------


def main(settings: Settings) -> None:
    if not 0 < settings.port < 2**16:
        raise ValueError(f"port must lie in 1 ... 65535, not {settings.port}")
    if settings.max_megapixels <= 0 or settings.max_upload_mb < 1:
        raise ValueError("max_megapixels must be above 0 and max_upload_mb at least 1")

    device = choose_device(settings.device)
    precision = settle_precision(settings.precision, device)
    print(describe_start(device, precision, settings.device))

    # Folders; gradio reads its own from the environment when it is imported
    results, uploads = (settings.output_dir.resolve() / name for name in ("results", "uploads"))
    for folder in (results, uploads):
        folder.mkdir(parents=True, exist_ok=True)
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)
    import gradio as gr
    from starlette.middleware import Middleware

    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # none to download

    # Page; the workshop has a queue of its own, which Stop can leave
    page = Page(Workshop(list_systems(settings), results), settings).build()
    page.queue(default_concurrency_limit=16)

    # Server
    names = {"localhost", socket.gethostname().lower(), socket.getfqdn().lower(), settings.host.lower()}
    doorkeeper = Middleware(
        Doorkeeper,
        names=names,
        max_bytes=settings.max_upload_mb * 2**20,
        check=partial(check_picture, max_megapixels=settings.max_megapixels),
    )
    if not os.environ.get("TRACEBACK"):
        sys.stderr = Terse(sys.stderr)
    off = dict.fromkeys(("share", "run_history", "enable_monitoring", "mcp_server", "ssr_mode", "pwa"), False)
    try:
        page.launch(
            **off,
            server_name=settings.host,
            server_port=settings.port,
            max_file_size=settings.max_upload_mb * 2**20,
            allowed_paths=[str(results)],
            app_kwargs={"middleware": [doorkeeper]},
            theme=theme,
            css=CSS,
            footer_links=[],
            show_error=True,
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise OSError(f"cannot use port {settings.port} of {settings.host}: give another --port") from error
    print(f"open {page.local_url} (Ctrl+C ends it); pictures and results: {results}", flush=True)
    page.block_thread()


if __name__ == "__main__":
    run_main(main, Settings)
