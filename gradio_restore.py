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
from ldm.checkpoint import repository_path
from ldm.device import choose_device, describe_start
from ldm.util import settle_precision
from web.request_filter import RequestFilter
from web.service import PREVIEW, SIDES, RestorationService, System


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
    srn_path: Path = Path("models/srn_deblur.safetensors")  # weights file of SRN-DeblurNet, from train_srn.py
    dbgan_path: Path | None = None  # weights of DBGAN's deblurring generator
    bgan_path: Path | None = None  # weights of BGAN's blurring generator
    deblur_path: Path | None = None  # weights of the deblurring ControlNet
    inpaint_path: Path | None = None  # weights of the inpainting ControlNet
    base_path: Path | None = None  # Stable Diffusion for both ControlNets; None takes the file that they name
    network_path: Path = Path("models/network.safetensors")  # weights of another network (docs/infer.md)
    kontext_path: Path | None = None  # model folder of Kontext; None takes models/FLUX.1-Kontext-dev
    lora_path: Path | None = None  # LoRA of Kontext, file or run's folder; None takes outputs/kontext_lora
    kontext_prompt: str = ""  # instruction to Kontext; empty takes the LoRA's, with it no LoRA is needed


LARGE = 512  # pixels: weights that were trained on smaller images say so
SMALL_BASE = "small_diffusion"  # without which the small ControlNets are of no use
SAMPLING = ("num_inference_steps", "guidance_scale", "seed")
SOURCE = "{} makes it; --{}_path says where it is."


def list_systems(settings: Settings) -> dict[str, System]:
    """List the tabs, under the names of infer.py's subcommands."""
    places = {"input": settings.output_dir, "output_dir": settings.output_dir, "device": settings.device}
    common = {**places, "precision": settings.precision}
    on_base = {**common, "base_path": settings.base_path}
    runs = "controlnet_inpainting_{}/final_model/model.ckpt"
    newest = max(Path("outputs").glob(runs.format("*")), default=Path("outputs") / runs.format("TIME"))
    dbgan = choose(settings.dbgan_path, "outputs/dbgan/deblur/dbgan.safetensors", "dbgan")
    deblur = choose(settings.deblur_path, "outputs/deblur/checkpoints/best.ckpt", "small_deblur", SMALL_BASE)
    inpaint = choose(settings.inpaint_path, newest, "small_inpaint", SMALL_BASE)
    bgan = choose(settings.bgan_path, "outputs/dbgan/blur/bgan.safetensors", "bgan")
    systems = {
        "srn": System(
            "SRN",
            "SRN-DeblurNet removes blur in one pass. It has no chance in it: no seed, no steps.",
            infer.SRN(**common, checkpoint_path=settings.srn_path),
            ("self_ensemble",),
            SOURCE.format("train_srn.py (docs/srn.md), a small one with --demo,", "srn"),
        ),
        "dbgan": System(
            "DBGAN",
            "DBGAN removes blur in one pass. It was trained on blur that a network made.",
            infer.DBGAN(**common, checkpoint_path=dbgan),
            (),
            SOURCE.format("train_dbgan.py (docs/dbgan.md)", "dbgan"),
        ),
        "deblur": System(
            "ControlNet",
            "A ControlNet removes blur with Stable Diffusion, which invents detail: each seed its own."
            + size_note(deblur),
            infer.Deblur(**on_base, checkpoint_path=deblur),
            (*SAMPLING, "scheduler", "strength", "fidelity", "self_ensemble", "prompt"),
            SOURCE.format("tutorial_train_deblur.py (docs/deblur.md)", "deblur"),
        ),
        "inpaint": System(
            "Inpaint",
            "A ControlNet on Stable Diffusion fills what you paint over, what is white in a mask, and what "
            "is added at the sides. All else stays as it is." + size_note(inpaint),
            infer.Inpaint(**on_base, checkpoint_path=inpaint),
            (*SAMPLING, "scheduler", "strength", "mask_blur", "only_masked_padding", *SIDES, "prompt"),
            SOURCE.format("tutorial_train_inpaint.py (docs/inpaint.md)", "inpaint"),
        ),
        "kontext": make_kontext(settings, places),
        "bgan": System(
            "BGAN",
            "BGAN makes realistic blur from a sharp image.",
            infer.BGAN(**common, checkpoint_path=bgan),
            ("seed",),
            SOURCE.format("train_dbgan.py (docs/dbgan.md)", "bgan"),
        ),
        "network": System(
            "Network",
            "A network of other authors, such as NAFNet, SwinIR or Real-ESRGAN, restores or enlarges.",
            infer.Network(**common, checkpoint_path=settings.network_path),
            (),
            "It is a file that its authors publish (docs/infer.md); --network_path says where it is.",
        ),
    }
    for name in ("deblur", "inpaint"):  # shown on the page: a number instead of None
        systems[name].options.num_inference_steps = systems[name].options.sampling_steps()
    return systems


def make_kontext(settings: Settings, places: dict) -> System:
    options = infer.Kontext(
        **places,
        pretrained_model_name_or_path=settings.kontext_path,
        lora_path=settings.lora_path,
        prompt=settings.kontext_prompt,
    )
    folder, lora = options.files()
    if lora is None and not settings.kontext_prompt:
        lora = Path("outputs/kontext_lora")
    options.pretrained_model_name_or_path, options.lora_path = folder, lora
    options.num_inference_steps = options.work()["steps"]
    return System(
        "Kontext",
        f"FLUX.1 Kontext undoes what its LoRA was trained to undo.{size_note(options.transformer())}",
        options,
        SAMPLING,
        "The folder is a download of black-forest-labs/FLUX.1-Kontext-dev, train_kontext_lora.py makes "
        "the LoRA (docs/kontext.md); --kontext_path and --lora_path say where they are.",
    )


def choose(given: Path | None, run: str | Path, *included: str) -> Path:
    """Return the file of weights: the one that is given, else a run's, else the first of those included."""
    if given or Path(run).exists():
        return given or Path(run)
    files = [repository_path(f"models/{name}.safetensors") for name in included]
    return files[0] if all(path.exists() for path in files) else Path(run)


def size_note(path: Path) -> str:
    """Return what to say of weights that were trained on small images."""
    size = infer.number_in(path, "image_size", LARGE)
    return f" It was trained on images of {size} pixels, to show how it works." if size < LARGE else ""


def main(settings: Settings) -> None:
    check_ranges(settings)
    device = choose_device(settings.device)
    print(describe_start(device, settle_precision(settings.precision, device), settings.device))

    # Folders; gradio reads its own from the environment when it is imported
    results, uploads = (settings.output_dir.resolve() / name for name in ("results", "uploads"))
    for folder in (results, uploads):
        folder.mkdir(parents=True, exist_ok=True)
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)
    import gradio as gr
    from starlette.middleware import Middleware

    from web.page import CSS, Page

    # Limits of what others send: Pillow refuses images of twice as many pixels wherever it opens one
    max_bytes = settings.max_upload_mb * 2**20
    Image.MAX_IMAGE_PIXELS = int(max(settings.max_megapixels * 1e6, PREVIEW**2))
    names = {"localhost", socket.gethostname().lower(), socket.getfqdn().lower(), settings.host.lower()}
    request_filter = Middleware(RequestFilter, names=names, max_bytes=max_bytes + 2**16)

    # Page; the service has a queue of its own, which Stop can leave
    service = RestorationService(list_systems(settings), results)
    page = Page(service, settings.max_megapixels, settings.max_upload_mb).build()
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
            css=CSS,
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
