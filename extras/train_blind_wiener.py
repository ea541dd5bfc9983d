"""Train the blind Wiener filter (ldm/modules/blind_wiener.py) of train_dbgan.py's `wiener_unet`.

    python -m extras.train_blind_wiener --photos PHOTOS      # the same command resumes

Crops of photos and of dead leaves are degraded once (ldm/data/realistic_blur.py). The loss is the logarithm
of each crop's error relative to its error before filtering: with an absolute loss the network filters too
weakly. Nearly sharp crops are left out: their relative error is huge, and the network would filter nothing.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from extras.train_small_base import Stage
from harness import flags
from harness.run import start_fabric
from harness.settings import check_ranges, plain, run_main
from ldm.checkpoint import write_atomically, write_weights
from ldm.data.blurred import blurred_photos
from ldm.data.image import list_images
from ldm.data.stream import item_seed
from ldm.modules.blind_wiener import ANGLES, FFT, BlindWiener


@dataclass
class Settings:
    """Train a blind Wiener filter."""

    # ---- data
    photos: Path = Path("training/photos")  # folder of sharp photographs, with its subfolders
    crops: flags.Count = 15000  # number of crops of 256 pixels to degrade, once
    held_out: flags.Count = 300  # number of crops to score on, from every 12th photo

    # ---- training
    batch_size: flags.Count = 64  # batch size of each device
    steps: flags.Count = 4000  # number of optimizer steps
    learning_rate: flags.Weight = 2e-3  # peak learning rate, reached after warmup; then cosine to 0
    warmup: flags.Count = 100  # number of steps over which the learning rate rises
    ema_decay: flags.Decay = 0.99  # decay of the EMA weights, which are exported
    precision: flags.Precision = "32"  # computing precision; Fourier transforms always use 32
    devices: flags.Devices = 1  # number of GPUs (processes on a CPU)
    seed: int = 0  # random seed of crops, weight init and order

    # ---- logging
    output_dir: Path = Path("outputs/blind_wiener")  # folder of the run, which is resumed if there is one
    save_steps: flags.Count = 500  # number of steps between checkpoints and scores


HOLD_OUT = 12  # one of this many photos is held out
WEAKEST = 2e-5  # mean squared error, for values in [0, 1], that a degraded crop must exceed
MIDDLE = slice(FFT // 4, -FFT // 4)  # pixels of a crop that are compared: away from the borders
IDENTITY = 4.8  # initial score of the identity, which gives it about a third of the weight


def degrade_crops(photos: list[Path], count: int, seed: int, file: Path) -> Tensor:
    """Return the luma of degraded and sharp crops, (n, 2, 256, 256) in [0, 1], made once and kept in `file`.

    Crops that are hardly degraded are left out of the `count`. Raises ValueError if none is left.
    """
    about = {"photos": [str(path) for path in photos], "count": count, "seed": seed}
    note = file.with_suffix(".json")
    if note.is_file() and json.loads(note.read_text()) == about:
        return torch.from_numpy(np.load(file))
    note.unlink(missing_ok=True)  # until the crops are complete
    dataset = blurred_photos(photos, 2 * len(photos), FFT, seed, repeats=8, candidates=3)
    rng = np.random.default_rng(seed)
    weights = BlindWiener().luma
    crops = []
    for number in tqdm(range(count), f"degrading crops for {file.name}"):
        item = dataset[number, int(rng.integers(len(dataset)))]
        pair = torch.stack([item["blurry"], item["sharp"]])
        luma = ((pair + 1) / 2 * weights).sum(1)  # (2, 256, 256)
        if (luma[0] - luma[1])[MIDDLE, MIDDLE].square().mean() > WEAKEST:
            crops.append(luma.half())
    if not crops:
        raise ValueError(f"none of {count} crops is blurred: give more of them")
    np.save(file, torch.stack(crops).numpy())
    write_atomically(note, lambda temporary: temporary.write_text(json.dumps(about)))
    return torch.stack(crops)


class Crops(Dataset):
    """Crops with the spectra of their middle, randomly flipped and transposed if `augment`."""

    def __init__(self, crops: Tensor, network: BlindWiener, seed: int, augment: bool):
        self.crops, self.seed, self.augment = crops, seed, augment
        at = torch.tensor([FFT // 2])
        with torch.no_grad():
            parts = [network.spectra(part[:, :1].float(), at, at)[:, 0, 0] for part in crops.split(32)]
        self.spectra = torch.cat(parts)  # (n, 2 * RINGS, ANGLES)

    def __len__(self) -> int:
        return len(self.crops)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        pair, spectra = self.crops[key[1]].float(), self.spectra[key[1]]
        if self.augment:
            flips, transposes = np.random.default_rng(item_seed(self.seed, key)).integers(2, size=2)
            angles = torch.arange(ANGLES)
            if flips:
                pair, angles = pair.flip(2), (ANGLES - angles) % ANGLES
            if transposes:  # after the flip, whose angles are looked up
                pair, angles = pair.transpose(1, 2), angles[(ANGLES // 2 - torch.arange(ANGLES)) % ANGLES]
            spectra = spectra[:, angles]
        return {"spectra": spectra, "blurry": pair[0], "sharp": pair[1]}


def errors(network: BlindWiener, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the mean squared errors (b,) of the crops' middles before and after filtering."""
    blurry, sharp = batch["blurry"], batch["sharp"]
    weights = network.estimator(batch["spectra"]).softmax(-1)
    filters = (weights @ network.bank).view(-1, FFT, FFT // 2 + 1)
    mean = blurry.mean((1, 2), keepdim=True)
    filtered = torch.fft.irfft2(torch.fft.rfft2(blurry - mean) * filters, s=(FFT, FFT)) + mean
    before, after = ((image - sharp)[:, MIDDLE, MIDDLE] for image in (blurry, filtered))
    return before.square().mean((1, 2)), after.square().mean((1, 2))


def loss_of(before: Tensor, after: Tensor) -> Tensor:
    return torch.log(after / before + 1e-3).mean()


@torch.no_grad()
def mean_gain(network: BlindWiener, dataset: Crops) -> float:
    """Return the mean gain in PSNR (dB) on the middles of all crops."""
    device = network.bank.device
    gains = []
    for index in range(len(dataset)):
        batch = {name: value[None].to(device) for name, value in dataset[0, index].items()}
        before, after = errors(network, batch)
        gains.append(10 * torch.log10(before / after).item())
    return float(np.mean(gains))


def main(settings: Settings) -> None:
    """Degrade crops, train the estimator, and write the filter as OUTPUT_DIR/blind_wiener.safetensors."""
    check_ranges(settings)
    photos = list_images(settings.photos)
    held_out = photos[::HOLD_OUT]
    rest = [path for path in photos if path not in held_out]
    if not rest:
        raise ValueError(f"{settings.photos}: give at least two photographs, one is held out")
    fabric = start_fabric(settings.devices, settings.precision, settings.seed)
    folder, seed = settings.output_dir, settings.seed
    folder.mkdir(parents=True, exist_ok=True)

    # Data: crops that are degraded once, with their spectra
    network = BlindWiener()
    train = Crops(degrade_crops(rest, settings.crops, seed, folder / "crops.npy"), network, seed, True)
    validation = degrade_crops(held_out, settings.held_out, seed + 1, folder / "held_out.npy")
    validation = Crops(validation, network, seed, False)

    # Training
    network.estimator.others.bias.data[0] = IDENTITY
    stage = Stage(fabric, settings, "training", network, settings.steps)
    for batch in stage.batches(train):
        if stage.update(loss_of(*errors(network, batch))):
            with stage.ema.applied(network):
                gain = mean_gain(network, validation)
            stage.save({"val/gain": gain})

    # The filter for train_dbgan.py --generator wiener_unet --init_weights
    with stage.ema.applied(network):
        about = {"settings": json.dumps(plain(settings)), "step": str(stage.run.step)}
        write_weights(folder / "blind_wiener.safetensors", network.state_dict(), about)
    print(f"written: {folder / 'blind_wiener.safetensors'}")


if __name__ == "__main__":
    run_main(main, Settings)
