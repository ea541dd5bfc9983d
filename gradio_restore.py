"""A web page on this machine: restore an image with any of the systems here, or compare them all.

    python gradio_restore.py                              # then open http://127.0.0.1:7860
    python gradio_restore.py --srn_path my.safetensors    # weights from elsewhere

A system without weights says which file it needs and where that comes from. More in docs/web.md.
"""

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from PIL import Image

import infer
from harness.flags import Count, Range
from harness.settings import check_ranges, run_main
from ldm.device import choose_device, describe_start
from ldm.util import settle_precision
from web.request_filter import RequestFilter
from web.service import SIDES, RestorationService, System


@dataclass
class Settings:
    """Serve a web page that restores images with any of the systems here."""

    # ---- server
    host: str = "127.0.0.1"  # address to serve at; 0.0.0.0 lets other machines in, without a password
    port: Annotated[int, Range(1, 65535)] = 7860  # port of the page's address
    output_dir: Path = Path("outputs/web")  # folder of all files that the page reads or writes
    max_megapixels: Annotated[float, Range(0.001)] = 24.0  # largest image to open, in megapixels
    max_upload_mb: Count = 40  # largest file to upload, in MB
    device: Literal["auto", "cuda", "cpu"] = "auto"  # device that computes; auto: cuda if there is one
    # precision of the computation (Kontext chooses its own)
    precision: Literal["auto", "32", "16", "bf16"] = "auto"

    # ---- weights; None takes those of a run in outputs/ if there is one, else the included ones in models/
    srn_path: Path | None = None  # weights file of SRN-DeblurNet, from train_srn.py
    dbgan_path: Path | None = None  # weights of DBGAN's deblurring generator
    bgan_path: Path | None = None  # weights of BGAN's blurring generator
    deblur_path: Path | None = None  # weights of the deblurring ControlNet
    inpaint_path: Path | None = None  # weights of the inpainting ControlNet
    base_path: Path | None = None  # Stable Diffusion for both ControlNets; None takes the file that they name
    network_path: Path = Path("models/network.safetensors")  # weights of another network (docs/infer.md)
    kontext_path: Path | None = None  # model folder of Kontext; None takes models/FLUX.1-Kontext-dev
    lora_path: Path | None = None  # LoRA of Kontext, file or run's folder; None takes outputs/kontext_lora
    kontext_prompt: str = ""  # instruction to Kontext; empty takes the LoRA's; if given, no LoRA is needed


LARGE = 512  # pixels: for weights that were trained on smaller images the page says so
SAMPLING = ("num_inference_steps", "guidance_scale", "seed")
DEBLUR = (*SAMPLING, "scheduler", "strength", "self_ensemble", "prompt")
INPAINT = (*SAMPLING, "scheduler", "strength", "mask_blur", "only_masked_padding", *SIDES, "prompt")
INPAINT_RUNS = "controlnet_inpainting_*/final_model/model.ckpt"


def list_systems(settings: Settings) -> dict[str, System]:
    """Return the systems of the tabs by the names of infer.py's subcommands, with the options shown."""
    places = {"input": settings.output_dir, "output_dir": settings.output_dir, "device": settings.device}
    common = {**places, "precision": settings.precision}
    on_base = {**common, "base_path": settings.base_path}
    srn = choose(settings.srn_path, "srn/srn_deblur.safetensors", "srn_deblur")
    dbgan = choose(settings.dbgan_path, "dbgan/deblur/dbgan.safetensors", "dbgan")
    deblur = choose(settings.deblur_path, "deblur/checkpoints/best.ckpt", "small_deblur")
    inpaint = choose(settings.inpaint_path, INPAINT_RUNS, "small_inpaint")
    bgan = choose(settings.bgan_path, "dbgan/blur/bgan.safetensors", "bgan")
    systems = {
        "srn": System("SRN", infer.SRN(**common, checkpoint_path=srn), ("self_ensemble",)),
        "dbgan": System("DBGAN", infer.DBGAN(**common, checkpoint_path=dbgan), ()),
        "deblur": System("ControlNet", infer.Deblur(**on_base, checkpoint_path=deblur), DEBLUR),
        "inpaint": System("Inpaint", infer.Inpaint(**on_base, checkpoint_path=inpaint), INPAINT),
        "kontext": System("Kontext", kontext_options(settings, places), SAMPLING),
        "bgan": System("BGAN", infer.BGAN(**common, checkpoint_path=bgan), ("seed",)),
        "network": System("Network", infer.Network(**common, checkpoint_path=settings.network_path), ()),
    }
    for name, system in systems.items():
        options = system.options
        if "num_inference_steps" in system.shown:  # the slider needs a number, not None
            options.num_inference_steps = options.sampling_steps()
        file = options.transformer() if name == "kontext" else options.weights()
        size = infer.number_in(file, "image_size", LARGE)
        if size < LARGE:
            system.note = f" It was trained on images of {size} pixels, to show how it works."
    return systems


def choose(given: Path | None, runs: str, included: str) -> Path:
    """Return the weights that are given, else those of the newest run in outputs/, else the included ones."""
    found = sorted(Path("outputs").glob(runs), key=lambda path: path.stat().st_mtime)
    return given or (found[-1] if found else Path(f"models/{included}.safetensors"))


def kontext_options(settings: Settings, places: dict) -> infer.Kontext:
    """Return the options of Kontext with its files filled in; without a prompt it needs a LoRA."""
    options = infer.Kontext(
        **places,
        pretrained_model_name_or_path=settings.kontext_path,
        lora_path=settings.lora_path,
        prompt=settings.kontext_prompt,
    )
    options.pretrained_model_name_or_path, options.lora_path = options.files()
    if options.lora_path is None and not options.prompt:
        options.lora_path = Path("outputs/kontext_lora")
    return options


def main(settings: Settings) -> None:
    check_ranges(settings)
    device = choose_device(settings.device)
    print(describe_start(device, settle_precision(settings.precision, device), settings.device))

    # Folders; gradio reads the name of its folder from the environment when it is imported
    results, uploads = (settings.output_dir.resolve() / name for name in ("results", "uploads"))
    for folder in (results, uploads):
        folder.mkdir(parents=True, exist_ok=True)
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)
    import gradio as gr
    from starlette.middleware import Middleware

    from web.page import Page

    # Limits for uploads; Pillow itself refuses images of more than twice as many pixels
    max_bytes = settings.max_upload_mb * 2**20
    Image.MAX_IMAGE_PIXELS = int(settings.max_megapixels * 1e6)
    names = {"localhost", socket.gethostname().lower(), socket.getfqdn().lower(), settings.host.lower()}
    request_filter = Middleware(RequestFilter, names=names, max_bytes=max_bytes + 2**16)

    # Page; the service has a queue of its own, from which Stop can remove jobs
    service = RestorationService(list_systems(settings), results, settings.max_megapixels)
    page = Page(service).build(
        f"up to {settings.max_upload_mb} MB and {settings.max_megapixels:g} megapixels"
    )
    page.queue(default_concurrency_limit=16)
    off = dict.fromkeys(("share", "run_history", "enable_monitoring", "mcp_server", "ssr_mode", "pwa"), False)
    try:
        page.launch(
            **off,
            server_name=settings.host,
            server_port=settings.port,
            max_file_size=max_bytes,
            allowed_paths=[str(results)],
            app_kwargs={"middleware": [request_filter]},
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),  # no download
            footer_links=[],
            show_error=True,
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise OSError(f"cannot use port {settings.port} of {settings.host}: give another --port") from error
    print(f"open {page.local_url} (Ctrl+C ends it); images and results: {results}", flush=True)
    page.block_thread()


if __name__ == "__main__":
    run_main(main, Settings)
