"""What the demonstrations of the two ControlNets share: the small base to start from, and a comparison."""

from collections.abc import Callable, Mapping
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

Restore = Callable[[nn.Module, dict], np.ndarray]  # a model and an item to the picture, uint8 (h, w, 3)
Score = Callable[[dict, np.ndarray], dict[str, float]]
BASE = MODELS / "small_diffusion.safetensors"


def announce_demo() -> None:
    """Say what the demonstration is; its small networks get few threads."""
    rank_zero_only(print)(
        "This demonstration adds a ControlNet to a small latent diffusion model that comes with the project, "
        "trains it for minutes and shows what it restores. With Stable Diffusion the steps are the same."
    )
    torch.set_num_threads(min(4, torch.get_num_threads()))  # small networks: more would wait for each other


def make_demo_start(path: str | Path, config: Mapping) -> None:
    """Write the small base with a fresh ControlNet to `path`, as tool_add_control.py does, unless it exists.

    Raises FileNotFoundError if the base is missing.
    """
    if not Path(path).is_file():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        write_weights(path, add_control(load_state_dict(BASE), config, BASE)[0])


@rank_zero_only
def show_demo(shipped: Path, held_out: Dataset, folder: Path, restore: Restore, score: Score) -> None:
    """Restore `held_out` pictures as infer.py does, with the run's ControlNet and the one that comes along.

    Prints the means of their scores, and writes images/demo.png of the run's `folder`: each picture as it
    came, as the first and the second restored it, and as it should be.
    """
    best, last = (folder / "checkpoints" / f"{name}.ckpt" for name in ("best", "last"))
    runs = {
        "these minutes": (best if best.is_file() else last, None),  # a short run was never validated
        "the one that comes along": (shipped, BASE),
    }
    items, columns = [held_out[index] for index in range(len(held_out))], []
    for name, (path, base) in runs.items():
        model = open_control_model(path, base)
        pictures = [restore(model, item) for item in tqdm(items, name, dynamic_ncols=True)]
        scores = [score(item, picture) for item, picture in zip(items, pictures, strict=True)]
        means = {key: np.mean([values[key] for values in scores]) for key in scores[0]}
        print(f"  {name}: {', '.join(f'{key} {value:.2f}' for key, value in means.items())}")
        columns.append(pictures)
    came, truth = ([pixels(item[key], key) for item in items] for key in ("hint", "jpg"))
    rows = [side_by_side([came[n], columns[0][n], columns[1][n], truth[n]]) for n in range(len(items))]
    (folder / "images").mkdir(exist_ok=True)
    write_image(folder / "images" / "demo.png", np.vstack(rows))
    print(f"  held-out pictures, these two, the truth: {folder / 'images' / 'demo.png'}")


def pixels(image: Tensor, key: str = "jpg") -> np.ndarray:
    """An item's (h, w, 3), in [-1, 1], or the `hint` in [0, 1], as uint8."""
    image = image.permute(2, 0, 1)[:3]
    return to_uint8(image * 2 - 1 if key == "hint" else image)
