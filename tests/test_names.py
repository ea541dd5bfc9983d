"""Commands from the original documents run here with our script names and paths (docs/names.md)."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

import infer
from harness.settings import read_settings
from ldm.data.crop import ScaledCrop
from ldm.data.image import image_size, list_images, write_image
from tests.faults import tiny_runs
from tests.test_commands import ROOT, SMALL, module_of, settings_of
from tests.tiny_flux import write_tiny_folder

PAGE = (ROOT / "docs" / "names.md").read_text(encoding="utf-8")
PROMPT = "Restore this degraded photograph to high fidelity"
DEBLUR = (
    "python train_deblur_controlnet.py --data_root ./training/deblur_dataset --json_file blur_types.json "
    "--batch_size {} --learning_rate 1e-5 --deblur_loss_weight 1.0 --perceptual_loss_weight 0.1 "
    "--max_epochs 100 "
)
KONTEXT = (
    "accelerate launch train_deg_lora_flux_kontext.py "
    '--pretrained_model_name_or_path="path/to/flux-kontext-model" '
    '--hr_root="path/to/high-quality-images" --output_dir="output/flux-kontext-deg-lora" '
    f'--instance_prompt="{PROMPT}" --resolution=512 --train_batch_size=4 --gradient_accumulation_steps=4 '
    '--max_train_steps=3000 --learning_rate=1e-4 --lr_scheduler="constant" --lr_warmup_steps=0 '
    '--degradation_types="downsample,noise,blur" --noise_level=0.03 --blur_radius=1.2 '
)
COCO = "--image_dir data/coco/train2017 --ann_file data/coco/annotations/instances_train2017.json "
DBGAN = "python dataset_make.py --blur_train_path {0}_train.h5 --blur_valid_path {0}_valid.h5 "
GOPRO = "--deblur_train_data gopro/small/train/ --deblur_valid_data gopro/small/valid/"
FILL = (
    "python infer.py --checkpoint_path outputs/controlnet_inpainting_*/final_model/controlnet.pth "
    "--input_image test_images/sample.jpg --input_mask test_images/mask.png "
)
# (command line, system if several scripts have the name). Later commands use outputs of earlier ones.
COMMANDS = [
    (
        "python create_deblur_dataset.py --source_dir /path/to/source/images "
        "--output_dir ./training/deblur_dataset --num_samples 10000 --image_size 512",
        "",
    ),
    (DEBLUR.format(4) + "--gpus 1", ""),
    (DEBLUR.format(4) + "--gpus 1 --use_attention", ""),
    (DEBLUR.format(4) + "--gpus 1 --use_augmentation", ""),
    (DEBLUR.format(8) + "--gpus 2 --precision 16", ""),
    (KONTEXT + "--perceptual_loss", ""),
    (KONTEXT + "--jpeg_quality=60 --lr_scale=4", ""),
    (
        f"python train_lightning.py {COCO}--batch_size 4 --num_epochs 100 --learning_rate 1e-5 "
        "--precision 16-mixed --devices 1",
        "",
    ),
    (
        f"python train.py {COCO}--pretrained_model_name_or_path runwayml/stable-diffusion-v1-5 "
        "--batch_size 4 --num_epochs 100 --learning_rate 1e-5 --output_dir ./outputs --mixed_precision fp16 "
        "--save_steps 1000 --log_steps 50 --num_workers 4 --image_size 512",
        "inpainting",
    ),
    (FILL + "--output_dir ./outputs/inference --num_inference_steps 50 --scheduler ddpm", "inpainting"),
    (FILL + "--scheduler ddim --num_inference_steps 20 --seed 42", "inpainting"),
    (
        DBGAN.format("cycle")
        + "--blur_train_data RWBI-Dataset/train/ --blur_valid_data RWBI-Dataset/valid/ "
        + GOPRO,
        "",
    ),
    (DBGAN.format("deblur") + GOPRO, ""),
    ("sh train_all.sh", ""),
    ("python train.py", "DBGAN"),
    ("python train_blur.py", ""),
    ("python train_deblur.py", ""),
    ("python train.py", "SRN"),
]
# Replacements for the documents' paths, and arguments to append for a tiny run.
PATHS = {
    "/path/to/source/images": "photos",
    "path/to/flux-kontext-model": "flux",
    "path/to/high-quality-images": "photos",
    "data/coco/train2017": "photos",
    "data/coco/annotations/instances_train2017.json": "instances.json",
    "runwayml/stable-diffusion-v1-5": "inpaint.safetensors",
    "outputs/controlnet_inpainting_*/final_model/controlnet.pth": "RUN/final_model/model.ckpt",
    "test_images/sample.jpg": "photos/000.png",
    "test_images/mask.png": "mask.png",
    "RWBI-Dataset/train/": "real",
    "RWBI-Dataset/valid/": "real",
    "gopro/small/train/": "gopro",
    "gopro/small/valid/": "gopro",
}
MORE = {
    "tutorial_train_deblur.py": "--resume_path deblur.safetensors --devices 1 --output_dir run_deblur",
    "tutorial_train_inpaint.py": "--resume_path inpaint.safetensors --output_dir RUN",
    "train_kontext_lora.py": "--no_perceptual_loss",
    "train_dbgan.py": "--data gopro --blur_data real --generated_fraction 0",
    "train_srn.py": "--data list.txt",
    "infer.py": "--num_inference_steps 1",
}


def scripts() -> dict[tuple[str, str], list[str]]:
    """Read the page's table: (original script, system) -> our script and arguments."""
    table = PAGE.split("## Scripts")[1].split("##")[0]
    rows = re.findall(r"^\| `([\w.]+)`(?: \((\w+)[^)]*\))? \| `([\w. ]+)`", table, re.M)
    return {(name, about): ours.split() for name, about, ours in rows}


SCRIPTS = scripts()


def ours(line: str, about: str) -> tuple[str, list[str]]:
    """Translate an original command line to our script and its arguments."""
    words = shlex.split(line)
    start = next(n for n, word in enumerate(words) if word.endswith((".py", ".sh")))
    known = SCRIPTS.get((words[start], about)) or SCRIPTS[(words[start], "")]
    return known[0], [*known[1:], *words[start + 1 :]]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Create tiny versions of the documents' data."""
    place = tmp_path_factory.mktemp("names") / "place"
    tiny_runs.make_test_files(place)
    write_tiny_folder(place / "flux", place, PROMPT)
    images, objects = [], []
    for number, path in enumerate(list_images(place / "photos")):
        width, height = image_size(path)
        images.append({"id": number, "file_name": path.name, "width": width, "height": height})
        box = [0, 0, width // 2, 0, width // 2, height // 2, 0, height // 2]
        more = {"area": width * height / 4, "bbox": [0, 0, width // 2, height // 2], "iscrowd": 0}
        objects.append(
            {"id": number + 1, "image_id": number, "category_id": 1, "segmentation": [box], **more}
        )
    content = {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "thing"}]}
    (place / "instances.json").write_text(json.dumps(content))
    mask = ScaledCrop.fit((64, 64), 64).cut(tiny_runs.read_image(place / "photos" / "000.png")) * 0
    mask[8:24, 8:24] = 255
    write_image(place / "mask.png", mask)
    tree = sorted((place / "gopro").glob("*/blur/*"))  # relative to the working directory, like data_list.py
    lines = [f"./{path.relative_to(place)} ./{path.relative_to(place)}".split() for path in tree]
    (place / "list.txt").write_text(
        "\n".join(f"{blurry} {sharp.replace('/blur/', '/sharp/')}" for blurry, sharp in lines)
    )
    return place


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "about"), COMMANDS, ids=[f"{line[:40]} {about}" for line, about in COMMANDS]
)
def test_documented_commands_run(line, about, workplace, monkeypatch):
    script, words = ours(line, about)
    monkeypatch.chdir(workplace)
    if module_of(script) is infer:
        words = infer.with_subcommand(words)
    read_settings(settings_of(script), words=words)  # every flag and value is accepted
    words = [PATHS.get(word, word) for word in words]
    words = [next((w.replace(a, b) for a, b in PATHS.items() if w.endswith(f"={a}")), w) for w in words]
    words += f"{SMALL.get(script, '')} {MORE.get(script, '')}".split()
    if script.startswith("t") and "kontext" not in script and "tool" not in script:
        for folder in ("RUN", "run_deblur", "outputs"):
            if folder != "RUN" or "inpaint" in script:
                shutil.rmtree(folder, ignore_errors=True)
    settings = read_settings(settings_of(script), words=words)
    if script == "train_kontext_lora.py":
        shutil.rmtree(settings.output_dir, ignore_errors=True)
        shutil.copytree("cache", settings.output_dir / "cache")
    module = module_of(script)
    (module.restore_files if module is infer else module.main)(settings)
    if module is infer:
        assert (settings.output_dir / "inpainted.png").is_file()


def test_hub_name_raises_with_our_tool_in_the_message(workplace, monkeypatch):
    line = next(line for line, _ in COMMANDS if "runwayml" in line)
    script, words = ours(line, "inpainting")
    monkeypatch.chdir(workplace)
    words = [*words, *"--image_dir photos --ann_file instances.json --output_dir hub".split()]
    with pytest.raises(FileNotFoundError, match=r"runwayml/stable-diffusion-v1-5 .*tool_add_control.py"):
        module_of(script).main(read_settings(settings_of(script), words=words))


def test_chinese_page_has_the_same_names():
    """Compares the inline code in each table row."""
    chinese = (ROOT / "docs" / "names_zh.md").read_text(encoding="utf-8")
    rows = [
        sorted(
            " ".join(sorted(re.findall("`[^`]+`", row))) for row in page.splitlines() if row.startswith("|")
        )
        for page in (PAGE, chinese)
    ]
    assert [row for row in rows[0] if row not in rows[1]] == [] and len(rows[0]) == len(rows[1])


def test_scripts_named_in_the_page_exist():
    assert len(SCRIPTS) >= 13
    for words in SCRIPTS.values():
        assert words[0] == "python" or (ROOT / words[0]).is_file(), words
    for name in re.findall(r"`((?:ldm|cldm)/[\w/]+\.py)`", PAGE):
        assert Path(ROOT, name).is_file(), name


def test_classes_named_in_the_page_exist():
    import cldm.deblur
    import ldm.data.degraded
    import ldm.modules.perceptual
    from ldm.modules.generators import OTHERS

    for name in ("DeblurControlNet", "DeblurControlNetWithAttention", "AttentionControlNet"):
        assert name in PAGE and hasattr(cldm.deblur, name)
    for name in ("deblur_losses", "perceptual"):
        assert name in PAGE and hasattr(cldm.deblur.DeblurControlNet, name)
    assert ldm.data.degraded.DegDataset and ldm.modules.perceptual.PerceptualLoss
    assert {"srresnet", "deblurgan", "sftnet", "mprnet"} <= {*OTHERS}
