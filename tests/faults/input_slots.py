"""The places where scripts read a user's file, for tests/faults/bad_inputs.py."""

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from spandrel.architectures.Compact import Compact
from transformers import T5EncoderModel

from cldm.demo import make_demo_start
from cldm.model import read_config
from ldm import checkpoint
from ldm.data.coco import CocoRecords
from ldm.data.image import write_image
from ldm.models.diffusers_folder import INDEX
from ldm.models.kontext import TRANSFORMER, load_flux
from ldm.models.prompts import prompt_file
from ldm.modules.nafnet import NAFNet
from tests.faults.damage import (
    ANY,
    CAPTION,
    H5,
    JSON,
    JSON_LINES,
    LIST,
    PICTURE,
    TEXT,
    WEIGHTS,
    YAML,
    Damage,
)
from tests.faults.tiny_runs import (
    ROOT,
    TRAINERS,
    command,
    in_place,
    prepare_output,
    require_success,
    run,
    script,
)
from tests.test_flux import diffusers_flux
from tests.tiny_flux import VAE

SMALL_BASE = {"config_path": ROOT / "models" / "small_diffusion.yaml", "max_steps": 1, "val_steps": 1}
SMALL_KONTEXT = ROOT / "models" / "small_kontext"
PROMPT_FILE = str(prompt_file(Path(), "restore"))  # relative to the run folder
IN_EMA = ("shape_changed", "tensor_missing")  # EMA weights are used, not the damaged ones
Build = Callable[[Path, Path], "Case"]


@dataclass
class Case:
    """A command, its damaged file (`victim`), and the expected behaviour.

    `skips` is what the script prints, instead of failing, if the file is bad. `ignores` are kinds of damage
    that need not be detected. A file with `remade` is rebuilt without an error. `results` are outputs that
    must exist in spite of the error. The error must name the file, or `named`.
    """

    arguments: list[object]
    victim: Path
    skips: str = ""
    ignores: tuple[str, ...] = ()
    remade: bool = False
    results: tuple[Path, ...] = ()
    named: str = ""


@dataclass
class Slot:
    """A place where a file is read; `build` makes a case from its own folder and that of undamaged files."""

    name: str
    kind: dict[str, list[Damage]]
    build: Build


def make_ready(place: Path, work: Path, names: Iterable[str] = (*TRAINERS, "base", "cached")) -> None:
    """Write trained files of these runs, masks and annotations below `place`."""
    work.mkdir(parents=True, exist_ok=True)
    for name in names:
        trainer, options = ("deblur", {"cache_latents": True}) if name == "cached" else (name, {})
        if not (place / "runs" / name).exists():
            require_success(
                run(script(short(trainer, place, place / "runs" / name, **options)), work / "ready")
            )
    if not (place / "coco").exists():
        require_success(run(partial(_make_more, place), work / "ready"))


def _make_more(place: Path) -> None:
    (place / "coco").mkdir()
    (place / "masks").mkdir()
    names = [f"{number:03d}.png" for number in range(8)]
    images = [{"id": n, "file_name": name, "height": 64, "width": 64} for n, name in enumerate(names)]
    square = [[9, 9, 40, 9, 40, 40, 9, 40]]
    objects = [{"id": n, "image_id": n, "iscrowd": 0, "segmentation": square} for n in range(7)]
    code = {"size": [64, 64], "counts": [100, 900, 3096]}
    objects.append({"id": 7, "image_id": 7, "iscrowd": 0, "segmentation": code})
    captions = [{"id": n, "image_id": n, "caption": f"picture {n}"} for n in range(8)]
    for name, annotations in (("instances", objects), ("captions", captions)):
        content = {"images": images, "annotations": annotations}
        (place / "coco" / f"{name}.json").write_text(json.dumps(content))
    for number, name in enumerate(names):
        mask = np.zeros((64, 64, 3), np.uint8)
        mask[10 : 30 + number, 10:40] = 255
        write_image(place / "masks" / name, mask)
    base = checkpoint.read_weights(place / "deblur.safetensors")
    checkpoint.save(
        place / "base.ckpt",
        {"state_dict": {n: v.clone() for n, v in base.items() if not n.startswith("control_model.")}},
    )
    shutil.copy(ROOT / "models" / "cldm_tiny_deblur.yaml", place / "config.yaml")
    pairs = sorted((place / "gopro").glob("*/blur/*.png"))
    lines = [f"{path} {str(path).replace('/blur/', '/sharp/')}" for path in pairs]
    (place / "pairs.txt").write_text("".join(f"{line}\n" for line in lines))
    records = [dict(zip(("blur_image", "clear_image"), line.split(), strict=True)) for line in lines]
    (place / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    make_demo_start(place / "small.safetensors", read_config(SMALL_BASE["config_path"]))
    shutil.copytree(SMALL_KONTEXT, place / "sharded")
    text_encoder = T5EncoderModel.from_pretrained(place / "sharded" / "text_encoder_2")
    (place / "sharded" / "text_encoder_2" / "model.safetensors").unlink()
    text_encoder.save_pretrained(place / "sharded" / "text_encoder_2", max_shard_size="8KB")
    diffusers_flux(load_flux(place / "flux" / TRANSFORMER, dtype=torch.float32)).save_pretrained(
        place / "diffusers" / "transformer", max_shard_size="3MB"
    )
    AutoencoderKL(**VAE).save_pretrained(place / "diffusers" / "vae")
    checkpoint.save(place / "x2.pth", {"state_dict": Compact(num_feat=8, num_conv=2, upscale=2).state_dict()})
    checkpoint.save(
        place / "nafnet.pth", {"state_dict": NAFNet(8, (1, 1, 1, 1), 2, (1, 1, 1, 1)).state_dict()}
    )


def short(name: str, place: Path, output: Path, **changes: object) -> list[str]:
    """Return the command of a run that reads every file once."""
    few = {
        "deblur": {"max_steps": 4, "val_steps": 4, "save_steps": 2},
        "inpaint": {"max_steps": 4, "val_steps": 4, "save_steps": 4},
        "srn": {"epochs": 1, "val_images": 9},
        "dbgan": {"epochs": 1},
        "kontext": {"max_train_steps": 4, "save_every": 4},
        "base": {"autoencoder_steps": 1, "unet_steps": 1, "flux_steps": 1},
    }[name]
    prepare_output(name, place, output)
    return command(name, place, output, **{**few, **changes})


def copied(source: Path, target: Path) -> Path:
    """Copy a file or folder that the case may damage."""
    target.parent.mkdir(parents=True, exist_ok=True)
    (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    return target


# ---- trainers --------------------------------------------------------------------------------------------


def training(
    name: str,
    flag: str,
    source: str,
    victim: str = "",
    stage: str = "",
    ignores: tuple[str, ...] = (),
    **changes: object,
) -> Build:
    """Build a training run whose `flag` is a copy of `source` with the damaged file `victim`."""

    def build(folder: Path, place: Path) -> Case:
        copy = copied(place / source, folder / Path(source).name)
        arguments = short(name, place, folder / "out", **{flag: copy, **in_place(changes, place)})
        if stage:
            arguments[1] = stage
        path = copy / victim if victim else copy
        skips = "warning: " if path.suffix == ".png" and name != "base" else ""
        return Case(arguments, path, skips, ignores=ignores)

    return build


def resumed(
    name: str, victim: str, kept: str = "", remade: bool = False, stage: str = "", **changes: object
) -> Build:
    """Build a training run that resumes in a folder with the damaged file `victim`."""

    def build(folder: Path, place: Path) -> Case:
        copied(place / "runs" / (kept or name), folder / "out")
        arguments = short(name, place, folder / "out", **changes)
        if stage:
            arguments[1] = stage
        ignores = ("dangling_link", *(IN_EMA if stage == "export" else ()))
        return Case(arguments, folder / "out" / victim, ignores=ignores, remade=remade)

    return build


def mixed_with_pairs(name: str) -> Build:
    """Build a run of SRN or DBGAN's second stage on photos blurred on the fly and one damaged pair."""

    def build(folder: Path, place: Path) -> Case:
        pairs = folder / "pairs"
        for side in ("blur", "sharp"):
            frame = f"GOPR1/{side}/000001.png"
            copied(place / "gopro" / frame, pairs / frame)
        arguments = short(name, place, folder / "out")
        for flag in ("--data", "--blur_data"):
            if flag in arguments:
                at = arguments.index(flag)
                del arguments[at : at + 2]
        arguments += ["--sharp_dir", str(place / "photos"), "--pairs", str(pairs), "--pairs_fraction", "0.5"]
        if name == "dbgan":
            arguments[1] = "deblur"
            arguments += ["--generated_fraction", "0"]
        return Case(arguments, pairs / "GOPR1" / "blur" / "000001.png", skips="warning: ")

    return build


def annotations_cached(folder: Path, place: Path) -> Case:
    copy = copied(place / "coco", folder / "coco") / "instances.json"
    require_success(run(lambda: CocoRecords(copy, "objects"), folder / "log"))
    arguments = short("inpaint", place, folder / "out", ann_file=copy)
    return Case(arguments, copy.with_name("instances.objects.safetensors"), remade=True)


# ---- other scripts ---------------------------------------------------------------------------------------


WEIGHTS_OF = {
    "srn": "runs/srn/srn_deblur.safetensors",
    "dbgan": "runs/dbgan/deblur/dbgan.safetensors",
    "bgan": "runs/dbgan/blur/bgan.safetensors",
    "deblur": "runs/deblur/checkpoints/best.ckpt",
    "inpaint": "runs/inpaint/final_model/model.ckpt",
    "kontext": "runs/kontext/pytorch_lora_weights.safetensors",
}


def restoring(name: str, victim: str, weights: str = "", model: str = "flux") -> Build:
    """Build infer.py on an image; `victim` is "picture", "mask", "weights" or a file of folder `model`."""

    def build(folder: Path, place: Path) -> Case:
        source = place / (weights or WEIGHTS_OF[name])
        files = {
            "picture": copied(place / "photos" / "001.png", folder / "photo.png"),
            "mask": copied(place / "masks" / "001.png", folder / "mask.png"),
            "weights": copied(source, folder / source.name),
        }
        flag = "--input_image" if name == "inpaint" else "--input"
        arguments = ["infer.py", name, flag, files["picture"], "--output_dir", folder / "out"]
        arguments += ["--lora_path" if name == "kontext" else "--checkpoint_path", files["weights"]]
        if name in ("deblur", "inpaint", "kontext"):
            arguments += ["--num_inference_steps", 1]
        if name == "inpaint":
            arguments += ["--input_mask", files["mask"], "--resolution", 64]
        if name == "kontext":
            copied(place / PROMPT_FILE, folder / PROMPT_FILE)
            arguments += ["--pretrained_model_name_or_path", copied(place / model, folder / model)]
        averaged = victim == "weights" and source.suffix == ".ckpt"
        path = files[victim] if victim in files else folder / victim
        ignores = IN_EMA if averaged else ()
        named = ""
        if model == "diffusers":  # errors may name the folder of the shards
            ignores, named = ("dangling_link",), path.parent.name
        return Case(arguments, path, ignores=ignores, named=named)

    return build


def filled_classically(victim: str) -> Build:
    """Build infer.py inpaint without a model; the damaged file is the photo or the mask."""

    def build(folder: Path, place: Path) -> Case:
        photo = copied(place / "photos" / "001.png", folder / "photo.png")
        mask = copied(place / "masks" / "001.png", folder / "mask.png")
        arguments = ["infer.py", "inpaint", "--method", "telea", "--input", photo, "--input_mask", mask]
        return Case([*arguments, "--output_dir", folder / "out"], folder / victim)

    return build


def pairs_checked(side: str) -> Build:
    """Build tool_check_pairs.py, which must report the unreadable file."""

    def build(folder: Path, place: Path) -> Case:
        pairs = copied(place / "gopro", folder / "gopro")
        arguments = ["tool_check_pairs.py", "--data", pairs, "--output_dir", folder / "out"]
        # a one-bit image is sharper than the sharp side, which is reported as a swapped pair
        ignores = ("one_bit",)
        return Case(arguments, pairs / "GOPR1" / side / "000001.png", "cannot be read", ignores)

    return build


def folder_restored(folder: Path, place: Path) -> Case:
    """Build infer.py on a folder: the error names the unreadable file, the others are restored."""
    names = ("000", "001", "002")
    for name in names:
        copied(place / "photos" / f"{name}.png", folder / "photos" / f"{name}.png")
    arguments = ["infer.py", "srn", "--input", folder / "photos", "--output_dir", folder / "out"]
    arguments += ["--checkpoint_path", place / WEIGHTS_OF["srn"]]
    results = tuple(folder / "out" / f"deblurred_{name}.png" for name in ("000", "002"))
    return Case(arguments, folder / "photos" / "001.png", results=results)


def scored(kind: str) -> Build:
    """Build evaluate.py, which must skip and count the unreadable pair."""

    def build(folder: Path, place: Path) -> Case:
        arguments = ["evaluate.py"]
        for name in ("restored", "sharp", "blurry"):
            for number in range(3):
                source = place / "photos" / f"{number:03d}.png"
                copied(source, folder / name / source.name)
            arguments += [f"--{name}", folder / name]
        (folder / "out").mkdir()
        arguments += ["--output", folder / "out" / "report.json"]
        return Case(arguments, folder / kind / "001.png", skips="1 skipped")

    return build


def pairs_made(victim: str) -> Build:
    """Build tool_make_deblur_dataset.py with a damaged source, or a damaged file in its output folder."""

    def build(folder: Path, place: Path) -> Case:
        for number in range(3):
            copied(place / "photos" / f"{number:03d}.png", folder / "photos" / f"{number:03d}.png")
        arguments = ["tool_make_deblur_dataset.py", "--source_dir", folder / "photos", "--image_size", 32]
        arguments += ["--output_dir", folder / "out", "--num_samples", 6, "--num_workers", 1]
        if victim != "source":
            require_success(run(script(arguments), folder / "log"))
            made_again = ("line_missing", "line_long", "line_surrogate", "dangling_link", "empty")
            return Case(arguments, folder / "out" / victim, ignores=made_again)
        return Case(arguments, folder / "photos" / "001.png", skips="sources were not used")

    return build


def patches_made(folder: Path, place: Path) -> Case:
    copied(place / "gopro", folder / "gopro")
    arguments = ["tool_make_dbgan_dataset.py", "--blur_train_path", folder / "out" / "train.h5"]
    arguments += ["--deblur_train_data", folder / "gopro", "--patch_size", 32]
    return Case(arguments, folder / "gopro" / "GOPR1" / "blur" / "000001.png")


def mask_made(folder: Path, place: Path) -> Case:
    photo = copied(place / "photos" / "001.png", folder / "photo.png")
    return Case(["tool_make_mask.py", folder / "out" / "mask.png", "--image", photo], photo)


def control_added(folder: Path, place: Path) -> Case:
    (folder / "out").mkdir()
    base = copied(place / "base.ckpt", folder / "base.ckpt")
    config = ROOT / "models" / "cldm_tiny_deblur.yaml"
    return Case(["tool_add_control.py", base, folder / "out" / "control.ckpt", "--config", config], base)


def control_exported(folder: Path, place: Path) -> Case:
    (folder / "out").mkdir()
    weights = copied(place / WEIGHTS_OF["deblur"], folder / "best.ckpt")
    arguments = ["tool_export_control.py", weights, folder / "out" / "control.safetensors"]
    return Case(arguments, weights, ignores=IN_EMA)


def text_encoded(victim: str, source: str = "") -> Build:
    """Build infer.py kontext with a prompt that the model folder's text encoders must embed."""

    def build(folder: Path, place: Path) -> Case:
        model = copied(place / source if source else SMALL_KONTEXT, folder / "model")
        photo = copied(place / "photos" / "001.png", folder / "photo.png")
        arguments = ["infer.py", "kontext", "--input", photo, "--output_dir", folder / "out"]
        arguments += ["--prompt", "restore", "--num_inference_steps", 1]
        return Case([*arguments, "--pretrained_model_name_or_path", model], model / victim)

    return build


def onnx_exported(name: str) -> Build:
    def build(folder: Path, place: Path) -> Case:
        (folder / "out").mkdir()
        weights = copied(place / WEIGHTS_OF[name], folder / Path(WEIGHTS_OF[name]).name)
        return Case(["extras/export_onnx.py", weights, folder / "out" / "network.onnx"], weights)

    return build


def halved(folder: Path, place: Path) -> Case:
    """Build tool_export_control.py --half on the included file."""
    (folder / "out").mkdir()
    weights = copied(ROOT / "models" / "small_deblur.safetensors", folder / "small_deblur.safetensors")
    arguments = [
        "tool_export_control.py",
        weights,
        folder / "out" / "half.safetensors",
        "--half",
        "--allow_extra",
    ]
    return Case(arguments, weights, ignores=("tensor_missing", "shape_changed"))


CAPTIONED = {"captions": True, "instance_prompt": "mend", "pretrained_model_name_or_path": SMALL_KONTEXT}
WEIGHTS_MAY = {"either": [*WEIGHTS["bad"], *WEIGHTS["either"]]}  # there are no encoders to recompute it
CONTROL = "runs/inpaint/final_model/controlnet.safetensors"
CACHE = {"bad": ANY["bad"]}
TWO_PICTURES = ("photo.png", "mask.png")
DIFFUSERS = {
    "diffusers/transformer/config.json": JSON,
    f"diffusers/transformer/{INDEX}": JSON,
    "diffusers/transformer/diffusion_pytorch_model-00001-of-00004.safetensors": WEIGHTS,
    "diffusers/vae/config.json": JSON,
    "diffusers/vae/diffusion_pytorch_model.safetensors": WEIGHTS,
}
TEXT_ENCODERS = {
    "text_encoder/config.json": JSON,
    "text_encoder/model.safetensors": WEIGHTS,
    "text_encoder_2/config.json": JSON,
    "text_encoder_2/model.safetensors": WEIGHTS,
    "tokenizer_2/tokenizer.json": JSON,
}
SHARDS = {
    "text_encoder_2/model.safetensors.index.json": JSON,
    "text_encoder_2/model-00001-of-00003.safetensors": WEIGHTS,
}
PIECES = {"pieces.json": JSON, "pieces.npy": ANY, "captions.npy": ANY}
SLOTS = [
    Slot(
        "deblur --data_root", PICTURE, training("deblur", "data_root", "pairs", "blur_images/blur_000003.png")
    ),
    Slot("inpaint --image_dir", PICTURE, training("inpaint", "image_dir", "photos", "003.png")),
    Slot("inpaint --mask_dir", PICTURE, training("inpaint", "mask_dir", "masks", "003.png")),
    Slot("srn --data", PICTURE, training("srn", "data", "gopro", "GOPR1/blur/000001.png")),
    Slot(
        "dbgan paired --data", PICTURE, training("dbgan", "data", "gopro", "GOPR1/sharp/000001.png", "paired")
    ),
    Slot("dbgan blur --blur_data", PICTURE, training("dbgan", "blur_data", "real", "002.png", "blur")),
    Slot("kontext --hr_root", PICTURE, training("kontext", "hr_root", "photos", "003.png")),
    *(Slot(f"infer {name} picture", PICTURE, restoring(name, "picture")) for name in WEIGHTS_OF),
    Slot("infer inpaint mask", PICTURE, restoring("inpaint", "mask")),
    Slot("infer srn folder", PICTURE, folder_restored),
    *(Slot(f"evaluate --{kind}", PICTURE, scored(kind)) for kind in ("restored", "sharp", "blurry")),
    Slot("tool_make_deblur_dataset source", PICTURE, pairs_made("source")),
    Slot("tool_make_dbgan_dataset picture", PICTURE, patches_made),
    Slot("tool_make_mask --image", PICTURE, mask_made),
    Slot(  # without its list, it is read as folders of pairs
        "deblur --data_root list",
        JSON_LINES,
        training("deblur", "data_root", "pairs", "blur_types.json", ignores=("dangling_link",)),
    ),
    Slot("srn --data json lines", JSON_LINES, training("srn", "data", "pairs.jsonl")),
    Slot("srn --data list", LIST, training("srn", "data", "pairs.txt")),
    Slot("tool_make_deblur_dataset list", JSON_LINES, pairs_made("blur_types.json")),
    Slot("tool_make_deblur_dataset settings", JSON, pairs_made("settings.json")),
    Slot("srn metrics.csv", TEXT, resumed("srn", "logs/metrics.csv")),
    Slot("deblur --config_path", YAML, training("deblur", "config_path", "config.yaml")),
    Slot("inpaint --ann_file", JSON, training("inpaint", "ann_file", "coco/instances.json")),
    Slot("inpaint --captions_file", JSON, training("inpaint", "captions_file", "coco/captions.json")),
    Slot("inpaint annotations, cached", ANY, annotations_cached),
    Slot(
        "dbgan paired --data h5", H5, training("dbgan", "data", "train.h5", "", "paired", val_data="@gopro")
    ),
    Slot("dbgan --val_data h5", H5, training("dbgan", "val_data", "valid.h5", "", "paired")),
    Slot("dbgan --blur_data h5", H5, training("dbgan", "blur_data", "train.h5", "", "blur", ("h5_fewer",))),
    Slot(
        "deblur latents, cached",
        CACHE,
        resumed("deblur", "cache/train_latents.h5", "cached", remade=True, cache_latents=True),
    ),
    *(Slot(f"infer {name} weights", WEIGHTS, restoring(name, "weights")) for name in WEIGHTS_OF),
    Slot("infer srn checkpoint", WEIGHTS, restoring("srn", "weights", "runs/srn/checkpoints/last.ckpt")),
    Slot("infer kontext transformer", WEIGHTS, restoring("kontext", "flux/flux1-kontext-dev.safetensors")),
    Slot("infer kontext autoencoder", WEIGHTS, restoring("kontext", "flux/ae.safetensors")),
    Slot("infer kontext prompt", WEIGHTS_MAY, restoring("kontext", PROMPT_FILE)),
    Slot("deblur --resume_path", WEIGHTS, training("deblur", "resume_path", "deblur.safetensors")),
    Slot("inpaint --resume_path", WEIGHTS, training("inpaint", "resume_path", "inpaint.safetensors")),
    Slot("inpaint --init_control", WEIGHTS, training("inpaint", "init_control", CONTROL)),
    Slot("kontext --resume_lora", WEIGHTS, training("kontext", "resume_lora", WEIGHTS_OF["kontext"])),
    *(
        Slot(f"{name} resumed", WEIGHTS, resumed(name, "checkpoints/last.ckpt"))
        for name in TRAINERS
        if name != "dbgan"
    ),
    Slot("dbgan resumed", WEIGHTS, resumed("dbgan", "blur/checkpoints/last.ckpt")),
    Slot("tool_add_control", WEIGHTS, control_added),
    Slot("tool_export_control", WEIGHTS, control_exported),
    # later additions; the order determines the cases of a seed
    Slot("base --photos", PICTURE, training("base", "photos", "photos", "003.png", "unet")),
    Slot("kontext caption", CAPTION, training("kontext", "hr_root", "captioned", "001.txt", **CAPTIONED)),
    Slot("srn --init_weights", WEIGHTS, training("srn", "init_weights", "srn.safetensors")),
    Slot(
        "dbgan --init_weights", WEIGHTS, training("dbgan", "init_weights", "dbgan.safetensors", "", "paired")
    ),
    Slot(
        "deblur --resume_path small base",
        WEIGHTS,
        training("deblur", "resume_path", "small.safetensors", **SMALL_BASE),
    ),
    *(Slot(f"infer kontext {name}", kind, text_encoded(name)) for name, kind in TEXT_ENCODERS.items()),
    *(
        Slot(f"infer kontext T5 {name[15:]}", kind, text_encoded(name, "sharded"))
        for name, kind in SHARDS.items()
    ),
    Slot("base resumed", WEIGHTS, resumed("base", "unet/checkpoints/last.ckpt", stage="unet", unet_steps=2)),
    Slot("base exported", WEIGHTS, resumed("base", "unet/checkpoints/last.ckpt", stage="export")),
    *(
        Slot(f"base {name}", kind, resumed("base", name, stage="unet", unet_steps=2, remade=True))
        for name, kind in PIECES.items()
    ),
    *(Slot(f"export_onnx {name}", WEIGHTS, onnx_exported(name)) for name in ("srn", "dbgan")),
    Slot("tool_export_control --half", WEIGHTS, halved),
    Slot("infer network picture", PICTURE, restoring("network", "picture", "x2.pth")),
    Slot("infer network weights", WEIGHTS, restoring("network", "weights", "x2.pth")),
    Slot("infer network NAFNet", WEIGHTS, restoring("network", "weights", "nafnet.pth")),
    *(
        Slot(f"infer kontext diffusers {name}", kind, restoring("kontext", name, model="diffusers"))
        for name, kind in DIFFUSERS.items()
    ),
    *(Slot(f"infer inpaint telea {name}", PICTURE, filled_classically(name)) for name in TWO_PICTURES),
    *(Slot(f"tool_check_pairs {side}", PICTURE, pairs_checked(side)) for side in ("blur", "sharp")),
    *(Slot(f"{name} --pairs", PICTURE, mixed_with_pairs(name)) for name in ("srn", "dbgan")),
    Slot("base --init_weights", WEIGHTS, training("base", "init_weights", "small.safetensors", "", "unet")),
]
