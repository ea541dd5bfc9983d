"""What a LoRA learns on the small Kontext base: tasks told apart by prompt, noise levels, pixel alignment.

    python -m benchmarks.kontext_tasks tasks --photos PHOTOS      # two tasks in one LoRA
    python -m benchmarks.kontext_tasks timesteps --photos PHOTOS  # --timestep_sampling, after the same steps
    python -m benchmarks.kontext_tasks alignment --lora_path outputs/kontext_tasks/tasks

`tasks` damages every crop twice, by scratches and by fading. One task is to remove the scratches and to keep
the colours faded, the other the reverse: the damaged pictures are the same ones, so that only the prompt can
tell what to do. Printed is the gain in dB towards either target under either prompt, on the photographs
inside scikit-image. `timesteps` trains on the usual damage and prints the held-out loss and PSNR of each
choice. `alignment` prints by how many pixels restored pictures are shifted, and zoomed at their corners.
"""

import csv
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

import train_kontext_lora
from harness.run import start_fabric
from harness.settings import run_main
from harness.validation import middle
from ldm.data.image import list_images, photographs, read_image, write_image
from ldm.metrics import misalignment, psnr
from ldm.models.kontext import load_restorer
from ldm.modules.image_degradation.damage import degrade
from train_small_base import KEEP

SIDE = 128
PROMPTS = {"scratches": "remove the scratches", "fading": "restore the colours"}
TARGETS = {"scratches": "faded", "fading": "scratched"}  # what is left when the task is done


@dataclass
class Settings:
    """Compare what LoRAs of the small base learn."""

    what: tyro.conf.Positional[Literal["tasks", "timesteps", "alignment"]]
    photos: Path = Path("training/photos")  # to learn from
    base: Path = Path("models/small_kontext")  # the model folder
    steps: int = 1500  # of each training
    batch_size: int = 16
    seeds: int = 2  # of `timesteps`
    crops: int = 24  # of each photograph
    lora_path: Path | None = None  # of `alignment`; without it the base, told to keep the picture
    output_dir: Path = Path("outputs/kontext_tasks")


def crops(paths: list[Path], count: int) -> list[np.ndarray]:
    """Squares of SIDE pixels, `count` of each photograph, where it has the most detail of three draws."""
    rng, found = np.random.default_rng(0), []
    for image in map(read_image, paths):
        for _ in range(count if min(image.shape[:2]) >= SIDE else 0):
            places = [(int(rng.integers(n - SIDE + 1)) for n in image.shape[:2]) for _ in range(3)]
            drawn = [image[y : y + SIDE, x : x + SIDE] for y, x in places]
            found.append(max(drawn, key=lambda part: float(part.std())))
    return found


def write_pictures(folder: Path, images: list[np.ndarray]) -> None:
    """clean/, scratched/, faded/ and both/, with the same scratches and the same fading."""
    for number, image in enumerate(images):
        scratch, fade = (
            partial(
                degrade, rng=np.random.default_rng([seed, number]), types=[kind], damage_strength=(0.4, 0.9)
            )
            for seed, kind in enumerate(("scratches", "fading"))
        )
        made = {"clean": image, "scratched": scratch(image)}
        faded = np.random.default_rng([1, number])
        made |= {"faded": fade(image), "both": fade(made["scratched"], rng=faded)}
        for name, picture in made.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            write_image(folder / name / f"{number:04d}.png", picture)


def prepare(settings: Settings) -> tuple[Path, Path]:
    """Folders of pictures to learn from and of held-out ones."""
    train, held_out = (settings.output_dir / name for name in ("train", "held_out"))
    if not held_out.is_dir():
        write_pictures(train, crops(list_images(settings.photos), settings.crops))
        write_pictures(held_out, crops(photographs(), 4))
    return train, held_out


def training(settings: Settings, name: str, **values) -> train_kontext_lora.Settings:
    return train_kontext_lora.Settings(
        pretrained_model_name_or_path=settings.base,
        output_dir=settings.output_dir / name,
        resolution=SIDE,
        lora_targets="all",
        batch_size=settings.batch_size,
        accumulate_grad_batches=1,
        gradient_checkpointing=False,
        max_steps=settings.steps,
        save_steps=settings.steps,
        learning_rate=1e-3,
        lr_scheduler="cosine",
        lr_warmup_steps=20,
        num_workers=0,
        preview_steps=6,
        **values,
    )


def tasks(settings: Settings) -> None:
    """One LoRA, two prompts."""
    train, held_out = prepare(settings)
    lines = []
    for task, prompt in PROMPTS.items():
        lines += [f"{task}:", f"  instance_prompt: {prompt}", f"  hr_root: {train / TARGETS[task]}"]
        lines += [f"  lr_root: {train / 'both'}"]
    (settings.output_dir / "tasks.yaml").write_text("\n".join(lines))
    run = training(settings, "tasks", tasks=settings.output_dir / "tasks.yaml", random_flip=False)
    train_kontext_lora.main(run)
    print("| prompt | gain towards no scratches, dB | gain towards no fading, dB |\n|---|---|---|")
    damaged = [read_image(path) for path in list_images(held_out / "both")]
    for prompt in PROMPTS.values():
        restore = load_restorer(settings.base, run.output_dir, prompt, run.output_dir / "prompt.safetensors")
        restored = [restore(image, steps=6) for image in damaged]
        gains = []
        for target in TARGETS.values():
            wanted = [read_image(path) for path in list_images(held_out / target)]
            rows = zip(restored, damaged, wanted, strict=True)
            gains.append(statistics.mean(psnr(ours, w) - psnr(given, w) for ours, given, w in rows))
        print(f"| {prompt} | {gains[0]:.2f} | {gains[1]:.2f} |", flush=True)


def timesteps(settings: Settings) -> None:
    """Which noise levels to train at."""
    train, held_out = prepare(settings)
    print("| timestep_sampling | held-out loss | held-out PSNR, dB (input) |\n|---|---|---|")
    for sampling in ("logit_normal", "uniform", "shifted"):
        rows = []
        for seed in range(settings.seeds):
            values = {
                "hr_root": train / "clean",
                "validation_root": held_out / "clean",
                "lr_scale": (2.0, 4.0),
            }
            name = f"{sampling}_{seed}"
            run = training(settings, name, timestep_sampling=sampling, seed=seed, preview_images=24, **values)
            train_kontext_lora.main(run)
            rows.append(list(csv.DictReader((run.output_dir / "logs" / "metrics.csv").open()))[-1])
        cells = []
        for name in ("val/loss", "val/psnr", "val/psnr_input"):
            found = [float(row[name]) for row in rows]
            cells.append(f"{statistics.mean(found):.3f} ({min(found):.3f} to {max(found):.3f})")
        print(f"| {sampling} | {cells[0]} | {cells[1]}, {cells[2]} |", flush=True)


def alignment(settings: Settings) -> None:
    """Shift and zoom of what comes back, at sizes of every kind."""
    prompt = "" if settings.lora_path else KEEP
    cache = settings.output_dir / "prompt.safetensors"
    restore = load_restorer(settings.base, settings.lora_path, prompt, cache)
    ways = {
        "128 x 128": (128, {}),
        "150 x 150, padded": (150, {}),
        "256 x 256, in tiles": (256, {"tile": 128, "overlap": 64, "resolution": 128}),
        "256 x 256, shrunk": (256, {"resolution": 128}),
    }
    print(
        "| | shift, pixels: median, largest | zoom at the corners, pixels: median, largest |\n|---|---|---|"
    )
    for name, (side, options) in ways.items():
        images = [middle(read_image(path), side) for path in photographs()]
        found = np.array([misalignment(restore(image, steps=6, **options), image) for image in images])
        (shift, zoom), (most_shift, most_zoom) = np.median(found, axis=0), found.max(axis=0)
        print(f"| {name} | {shift:.3f}, {most_shift:.3f} | {zoom:.3f}, {most_zoom:.3f} |", flush=True)


def main(settings: Settings) -> None:
    start_fabric()
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    {"tasks": tasks, "timesteps": timesteps, "alignment": alignment}[settings.what](settings)


if __name__ == "__main__":
    run_main(main, Settings)
