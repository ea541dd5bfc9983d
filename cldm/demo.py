"""Code shared by the demonstrations of both ControlNets: the small base model, and a final comparison."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from cldm.model import add_control, load_state_dict, open_control_model
from ldm.checkpoint import MODELS, write_weights
from ldm.data.image import side_by_side, to_uint8, write_image

Restore = Callable[[nn.Module, dict], np.ndarray]  # model, item -> image, uint8 (h, w, 3)
Score = Callable[[dict, np.ndarray], dict[str, float]]
BASE = MODELS / "small_diffusion.safetensors"


def announce_demo() -> None:
    """Print a description of the demonstration, and limit the CPU threads for its small networks."""
    rank_zero_only(print)(
        "This demonstration adds a ControlNet to a small latent diffusion model included in the repository, "
        "trains it for minutes and restores held-out images. With Stable Diffusion the steps are the same."
    )
    torch.set_num_threads(min(4, torch.get_num_threads()))  # more threads would wait for each other


def make_demo_start(path: str | Path, config: Mapping) -> None:
    """Write the small base with a fresh ControlNet to `path`, as tool_add_control.py does, unless it exists.

    Raises FileNotFoundError if the base is missing.
    """
    if not Path(path).is_file():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        write_weights(path, add_control(load_state_dict(BASE), config, BASE)[0])


@rank_zero_only
def show_demo(
    included: Path,
    held_out: Dataset,
    folder: Path,
    restore: Restore,
    score: Score,
    others: Mapping[str, Callable[[dict], np.ndarray]] | None = None,
) -> None:
    """Restore `held_out` images as infer.py does: with the run's ControlNet, and with the `included` one.

    `others` are further methods, which need no model. Prints the mean scores of each method, and writes
    images/demo.png in the run's `folder`: a row per image with input, all results and ground truth.
    """
    trained = folder / "checkpoints" / "best.ckpt"
    if not trained.is_file():  # a short run was never validated
        trained = folder / "checkpoints" / "last.ckpt"
    runs = {"this run": (trained, None), "included weights": (included, BASE)}
    items = [held_out[index] for index in range(len(held_out))]
    columns = [[pixels(item["hint"], "hint") for item in items]]
    ways = {name: partial(restore, open_control_model(*files)) for name, files in runs.items()}
    for name, way in {**ways, **(others or {})}.items():
        images = [way(item) for item in tqdm(items, name, dynamic_ncols=True)]
        scores = [score(item, image) for item, image in zip(items, images, strict=True)]
        means = {key: np.mean([values[key] for values in scores]) for key in scores[0]}
        print(f"  {name}: {', '.join(f'{key} {value:.2f}' for key, value in means.items())}")
        columns.append(images)
    columns.append([pixels(item["jpg"]) for item in items])
    rows = [side_by_side(list(row)) for row in zip(*columns, strict=True)]
    (folder / "images").mkdir(exist_ok=True)
    write_image(folder / "images" / "demo.png", np.vstack(rows))
    print(f"  input, restored in these ways, ground truth: {folder / 'images' / 'demo.png'}")


def pixels(image: Tensor, key: str = "jpg") -> np.ndarray:
    """Convert an item's image (h, w, 3) in [-1, 1], or its `hint` in [0, 1], to uint8."""
    image = image.permute(2, 0, 1)[:3]
    return to_uint8(image * 2 - 1 if key == "hint" else image)
