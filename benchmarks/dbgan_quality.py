"""What the generators of train_dbgan.py and BGAN's blur are worth, each for the same processor time.

    python -m benchmarks.dbgan_quality generators --seconds 120
    python -m benchmarks.dbgan_quality bgan --seconds 60 --seeds 3
    python -m benchmarks.dbgan_quality bgan --real train.h5 valid.h5   # tool_make_dbgan_dataset.py --by_focus

`generators` trains each on the content loss of the demonstration's data, width 16 and 2 blocks, and prints
what it gains on the held-out pictures, what it computes, and what a training step keeps in memory.

`bgan` asks whether BGAN helps. Pairs have gaussian and defocus blur, the blur that is called real is motion
blur of other pictures: BGAN sees it without pairs. Printed are distances of its blur from the real one, and
what DBGAN gains on held-out motion blur with BGAN's pictures and without them. With --real the real blur is
that of photographs; nothing sharp belongs to it, so restored crops are compared with sharp ones as sets.

    python -m benchmarks.dbgan_quality ship --run outputs/RUN

writes models/dbgan.safetensors and models/bgan.safetensors from a run of the mode `all`, with command, commit
and scores on the photographs inside scikit-image: of each the middle 128 pixels, with each blur at scale 0.4.

Processor time is that of the process, data included: other programs do not count.
"""

import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import scipy.linalg
import torch
import tyro
from torch import nn
from torch.utils.data import Dataset, default_collate

from harness.profile import count_macs
from harness.run import start_fabric
from harness.settings import run_main
from harness.training_data import open_data
from harness.validation import middle
from ldm.checkpoint import read_settings, read_weights, write_weights
from ldm.data.demo import CAMERA, write_demo
from ldm.data.image import PHOTOGRAPHS, list_images, photographs, read_image, write_image
from ldm.data.patches import Patches
from ldm.metrics import psnr, radial_power, spectrum_distance
from ldm.modules.ema import EMA
from ldm.modules.generators import OTHERS, blur_image, load_generator, restore_image
from ldm.modules.image_degradation.blur import BLUR_TYPES, random_blur
from train_dbgan import DEMO, DEMO_DATA, STAGES, Players, make_players, train_step
from train_dbgan import Settings as TrainSettings

SCORED = 128  # pixels in the middle of a photograph


@dataclass
class Settings:
    """Compare generators, or DBGAN with and without BGAN, after the same processor time."""

    what: tyro.conf.Positional[Literal["generators", "bgan", "ship"]]
    seconds: float = 120  # processor time of each training
    seeds: int = 3  # of `bgan`: runs that differ in all that is random
    run: Path = Path("outputs/dbgan")  # of `ship`: the run's folder
    stages: tuple[str, str] = ("deblur", "blur")  # of `ship`: those that dbgan and bgan are of
    command: str = ""  # of `ship`: what was run
    real: tuple[Path, Path] | None = None  # patches of photographs to learn from, and held-out ones


def train_for(
    settings: TrainSettings, stage: str, seconds: float, blurrer: nn.Module | None = None
) -> Players:
    """Networks after that much processor time of a stage's first losses, averaged weights in place."""
    fabric = start_fabric(seed=settings.seed)
    dataset, _ = open_data(settings, stage)
    players = make_players(replace(settings, generated_fraction=0.0), stage, None, fabric.device)
    players.blurrer = blurrer
    networks = [*players.generators.parameters(), *players.discriminators.parameters()]
    betas = (0.5, 0.999) if stage == "blur" else (0.9, 0.999)
    optimizer = torch.optim.Adam(networks, settings.learning_rate, betas)
    ema, losses = EMA(players.generators, settings.ema_decay), STAGES[stage][2][0]
    ready, start = fabric.setup_optimizers(optimizer), time.process_time()
    for batch in batches(dataset, settings.batch_size, settings.seed):
        share = (time.process_time() - start) / seconds
        if share >= 1:
            break
        for group in optimizer.param_groups:  # a cosine to zero, as the script's, but in time
            group["lr"] = settings.learning_rate * (1 + np.cos(np.pi * share)) / 2
        train_step(fabric, ready, batch, 1, partial(losses, players, settings))
        ema.update(players.generators)
    for name, value in players.generators.named_parameters():
        value.data.copy_(ema.average[name])
    print(f"  {stage}: {ema.updates} steps", flush=True)
    return players


def batches(dataset: Dataset, size: int, seed: int) -> Iterator[dict]:
    """Batches without end, each epoch in an order of its own."""
    for epoch in range(10**6):
        order = np.random.default_rng([seed, epoch]).permutation(len(dataset))
        for start in range(0, len(order) - size + 1, size):
            items = [dataset[epoch, int(index)] for index in order[start : start + size]]
            yield default_collate([{name: item[name] for name in ("blurry", "sharp")} for item in items])


def gain(network: nn.Module, pairs: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Mean gain in dB over the blurry pictures."""
    gains = [psnr(restore_image(network, blurry), sharp) - psnr(blurry, sharp) for blurry, sharp in pairs]
    return statistics.mean(gains)


def held_bytes(compute: Callable[[], torch.Tensor]) -> int:
    """Bytes that `compute` keeps for its backward pass."""
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held = compute()  # alive until all is counted
    del held
    return sum(kept.values())


def generators(settings: Settings) -> None:
    """The table of docs/dbgan.md."""
    write_demo(DEMO_DATA, [DEMO_DATA / "train"])
    demo = replace(TrainSettings(mode="deblur"), **DEMO)
    _, held_out = open_data(demo, "deblur")
    pairs = [held_out[number] for number in range(len(held_out))]
    print("| generator | gain, dB | parameters | GMAC, 1280 x 720 | s, 640 x 360 | kept by a step, MB |")
    print("|---|---|---|---|---|---|")
    for name in ("dbgan", *OTHERS):
        network = train_for(replace(demo, generator=name), "deblur", settings.seconds).generators["deblur"]
        image = np.zeros((360, 640, 3), np.uint8)
        start = time.process_time()
        restore_image(network, image)
        seconds = time.process_time() - start
        macs = 4 * count_macs(partial(restore_image, network, image))
        kept = held_bytes(lambda net=network: net.train()(torch.rand(4, 3, 48, 48)))
        count = sum(parameter.numel() for parameter in network.parameters())
        cost = f"{count:,} | {macs / 1e9:.1f} | {seconds:.2f} | {kept / 1e6:.1f}"
        print(f"| `{name}` | {gain(network.eval(), pairs):.2f} | {cost} |", flush=True)


# ---- is BGAN's blur real? ----------------------------------------------------------------------------------


def features(pictures: list[np.ndarray]) -> np.ndarray:
    """What a blur kernel does to a picture (n, 12): log10 of how the mean step between neighbours falls from
    one octave to the next (three octaves), along four directions. What the picture shows cancels out."""
    rows = []
    for picture in pictures:
        grey, steps = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(np.float32), []
        for _ in range(4):
            ways = (grey[:, 1:] - grey[:, :-1], grey[1:] - grey[:-1])
            ways += (grey[1:, 1:] - grey[:-1, :-1], grey[1:, :-1] - grey[:-1, 1:])
            steps.append([np.log10(np.abs(way).mean() + 1e-3) for way in ways])
            grey = cv2.resize(grey, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
        rows.append(np.diff(steps, axis=0).ravel())
    return np.array(rows)


def frechet(first: list[np.ndarray], second: list[np.ndarray]) -> float:
    """Distance of two sets of pictures: that of two gaussians fitted to their `features` (as FID's)."""
    a, b = features(first), features(second)
    means = np.square(a.mean(0) - b.mean(0)).sum()
    left, right = (np.cov(x.T) + 1e-6 * np.eye(x.shape[1]) for x in (a, b))
    return float(means + np.trace(left + right - 2 * scipy.linalg.sqrtm(left @ right).real))


def spectra(pictures: list[np.ndarray]) -> np.ndarray:
    return np.stack([radial_power(picture) for picture in pictures])


def write_domains(folder: Path) -> None:
    """Pairs of gaussian and defocus blur, and motion blur of other pictures, from the demonstration's sharp
    ones; and motion blur of held-out photographs."""
    rng = np.random.default_rng(0)
    for number, path in enumerate(list_images(DEMO_DATA / "train" / "sharp")):
        sharp = read_image(path)
        kinds = ("motion_blur",) if number % 2 else ("gaussian_blur", "defocus_blur")
        blurry = random_blur(sharp, rng, kinds, **CAMERA)[0]
        places = [("real", blurry)] if number % 2 else [("train/blur", blurry), ("train/sharp", sharp)]
        for place, picture in places:
            (folder / place).mkdir(parents=True, exist_ok=True)
            write_image(folder / place / path.name, picture)
    for path in list_images(DEMO_DATA / "valid" / "sharp"):
        sharp = read_image(path)[:256, :256]
        blurry = random_blur(sharp, rng, ("motion_blur",), **CAMERA)[0]
        for place, picture in (("valid/blur", blurry), ("valid/sharp", sharp)):
            (folder / place).mkdir(parents=True, exist_ok=True)
            write_image(folder / place / path.name, picture)


def bgan(settings: Settings) -> None:
    """Distances of BGAN's blur, and DBGAN with it and without it."""
    write_demo(DEMO_DATA, [DEMO_DATA / "train"])
    folder = DEMO_DATA.parent / "bgan_judged"
    if not (folder / "valid").is_dir():
        write_domains(folder)
    data = {
        "data": folder / "train",
        "blur_data": folder / "real",
        "val_data": folder / "valid",
        "val_crop": 0,
    }
    chosen = replace(TrainSettings(), **{**DEMO, **data, "generated_fraction": 0.5})
    if settings.real:
        chosen = replace(chosen, blur_data=settings.real)
        patches = [Patches(settings.real, key) for key in ("blur", "sharp")]
        real, sharp = (
            [source[n] for n in range(0, len(source), max(1, len(source) // 200))] for source in patches
        )
    else:
        _, held_out = open_data(chosen, "blur")
        real = [read_image(path) for path in list_images(folder / "real")[::2]]
        pairs = [held_out[n] for n in range(len(held_out))]
        sharp = [read_image(path) for path in list_images(folder / "train" / "sharp")]
    rows = []
    for seed in range(settings.seeds):
        run = replace(chosen, seed=seed)
        blurrer = train_for(run, "blur", settings.seconds).generators["blur"].eval().requires_grad_(False)
        made = [blur_image(blurrer, picture, number) for number, picture in enumerate(sharp)]
        row = {
            "spectrum, sharp": spectrum_distance(spectra(sharp), spectra(real)),
            "spectrum, made": spectrum_distance(spectra(made), spectra(real)),
            "Frechet, sharp": frechet(sharp, real),
            "Frechet, made": frechet(made, real),
        }
        for name, blur in (("without", None), ("with", blurrer)):
            network = train_for(run, "deblur", settings.seconds, blur).generators["deblur"].eval()
            if settings.real:
                row[f"Frechet to sharp, {name}"] = frechet([restore_image(network, x) for x in real], sharp)
            else:
                row[f"gain in dB, {name}"] = gain(network, pairs)
        rows.append(row)
        print(f"seed {seed}: " + ", ".join(f"{key} {value:.3f}" for key, value in row.items()), flush=True)
    for key in rows[0]:
        values = [row[key] for row in rows]
        print(f"{key:28s} {statistics.mean(values):7.3f}  ({min(values):.3f} to {max(values):.3f})")


# ---- weights to ship ---------------------------------------------------------------------------------------


def deblur_scores(network: nn.Module, name: str) -> dict[str, float]:
    """Gain in dB by blur type on one photograph of scikit-image, PSNR of the sharp one to itself, and how far
    the spectra of restored and of blurry pictures are from the sharp one's, in decades."""
    sharp = middle(read_image(photographs((name,))[0]), SCORED)
    row, made = {}, {"restored": [], "blurry": []}
    for number, kind in enumerate(BLUR_TYPES):
        blurry = random_blur(sharp, np.random.default_rng(number), [kind], scale=0.4)[0]
        restored = restore_image(network, blurry)
        row[kind] = psnr(restored, sharp) - psnr(blurry, sharp)
        made["restored"].append(restored)
        made["blurry"].append(blurry)
    row["sharp"] = psnr(restore_image(network, sharp), sharp)
    for key, pictures in made.items():
        row[f"spectrum_{key}"] = spectrum_distance(spectra(pictures), spectra([sharp]))
    return row


def blur_scores(network: nn.Module, name: str) -> dict[str, float]:
    """What BGAN takes from one photograph: PSNR to the sharp one, and change of its spectrum, in decades."""
    sharp = middle(read_image(photographs((name,))[0]), SCORED)
    made = blur_image(network, sharp, seed=0)
    return {"psnr": psnr(made, sharp), "spectrum": spectrum_distance(spectra([made]), spectra([sharp]))}


def ship(settings: Settings) -> None:
    """Write models/dbgan.safetensors and models/bgan.safetensors, and print their scores."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    content = load_generator(settings.run / "deblur" / "dbgan_content.safetensors", "deblur")
    before = {name: deblur_scores(content, name) for name in PHOTOGRAPHS}
    print("before the adversarial phase:", mean_scores(before))
    made = (("deblur", "dbgan", deblur_scores), ("blur", "bgan", blur_scores))
    for stage, (kind, name, score) in zip(settings.stages, made, strict=True):
        path = settings.run / stage / f"{name}.safetensors"
        network = load_generator(path, kind)
        scores = {photograph: score(network, photograph) for photograph in PHOTOGRAPHS}
        metadata = {
            "settings": json.dumps(read_settings(path)),
            "command": settings.command,
            "commit": commit.strip(),
            "data": "photographs and licences: docs/weights.md",
            "scores": json.dumps(scores),
        }
        write_weights(Path("models") / path.name, read_weights(path), metadata)
        print(path.name, mean_scores(scores))


def mean_scores(scores: dict[str, dict[str, float]]) -> str:
    rows = list(scores.values())
    return ", ".join(f"{key} {statistics.mean(row[key] for row in rows):.3f}" for key in rows[0])


def main(settings: Settings) -> None:
    torch.set_num_threads(1)
    {"generators": generators, "bgan": bgan, "ship": ship}[settings.what](settings)


if __name__ == "__main__":
    run_main(main, Settings)
