"""Training data of one or several restoration tasks, which a yaml lists (docs/kontext.md)."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch.utils.data import Dataset

from ldm.data.degraded import DegDataset
from ldm.data.stream import Key, split_key
from ldm.util import read_yaml

RANGES = ("lr_scale", "noise_level", "blur_radius", "jpeg_quality", "degradation_strength")


@dataclass
class Task:
    """The keys of a task in the yaml and their types: folders, prompt and degradation as in DegDataset.

    Ranges are numbers, pairs or "LOW,HIGH"; degradation types a list or a text with commas.
    """

    hr_root: Path
    lr_root: Path | None = None
    validation_root: Path | None = None
    instance_prompt: str = "restore this degraded photograph"
    captions: bool = False
    native_crop: bool = False
    random_flip: bool = True
    degradation_types: Any = "downsample,noise,blur"
    lr_scale: Any = 8
    noise_level: Any = 0.05
    blur_radius: Any = 1.0
    jpeg_quality: Any = 75
    degradation_strength: Any = "0.2,0.8"
    degradation_order: str = "fixed"
    degradation_rounds: int = 1
    weight: float = 1.0  # share of the training samples

    def __post_init__(self):
        self.degradation_types = tuple(str(kind).strip() for kind in split_list(self.degradation_types or ()))
        for name in RANGES:
            value = getattr(self, name)
            try:
                numbers = tuple(float(word) for word in split_list(value))
            except (TypeError, ValueError):
                numbers = ()
            if len(numbers) not in (1, 2):
                raise ValueError(f"{name} must be a number or a range LOW,HIGH, not {value}")
            setattr(self, name, numbers if len(numbers) == 2 else numbers[0])
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weight must be a number above 0, not {self.weight}")

    def datasets(self, resolution: int, buckets: bool, seed: int) -> tuple[DegDataset, DegDataset]:
        """The training set, and the set for previews: the same crops at every preview, no flips."""
        others = ("hr_root", "lr_root", "validation_root", "weight")
        options = {name: value for name, value in vars(self).items() if name not in others}
        options |= {"resolution": resolution, "buckets": buckets, "seed": seed}
        train = DegDataset(self.hr_root, lr_data_root=self.lr_root, **options)
        if self.captions and not train.captioned:
            raise ValueError(f"no image in {self.hr_root} has a caption (NAME.txt beside NAME.png)")
        options |= {"random_crop": False, "random_flip": False}
        if self.validation_root:
            return train, DegDataset(self.validation_root, **options)
        return train, DegDataset(self.hr_root, lr_data_root=self.lr_root, **options)


def split_list(value: Any) -> list | tuple:
    """The parts of a list or of a text with commas; of anything else its text."""
    return value if isinstance(value, list | tuple) else str(value).split(",")


class Tasks(Dataset):
    """The samples of several tasks, `datasets` by name, in shares proportional to their weights.

    An epoch has as many samples as all datasets together; each image of a task comes equally often.
    """

    def __init__(self, datasets: Mapping[str, DegDataset], weights: Mapping[str, float]):
        self.datasets = dict(datasets)
        samples = sum(len(dataset) for dataset in datasets.values())
        whole = sum(weights.values())
        self.counts = [max(1, round(samples * weights[name] / whole)) for name in datasets]  # in an epoch

    def __len__(self) -> int:
        return sum(self.counts)

    def __getitem__(self, key: Key) -> dict:
        dataset, own_key = self._find(key)
        return dataset[own_key]

    def group(self, key: Key) -> tuple[int, int]:
        """Height and width of a sample: a batch has samples of one size."""
        dataset, own_key = self._find(key)
        return dataset.group(own_key)

    def _find(self, key: Key) -> tuple[DegDataset, tuple[int, int]]:
        """The dataset that a key falls to, and the key there: its epochs have another length."""
        epoch, index = split_key(key)
        for dataset, count in zip(self.datasets.values(), self.counts, strict=True):
            if index < count:
                return dataset, divmod(epoch * count + index, len(dataset))
            index -= count
        raise IndexError(f"no sample {key} of {len(self)}")

    @property
    def prompts(self) -> list[str]:
        """Every prompt that a sample may have."""
        return list(dict.fromkeys(text for dataset in self.datasets.values() for text in dataset.prompts))

    def describe(self) -> str:
        """Say what it holds, in a line for each task."""
        counts = zip(self.datasets.items(), self.counts, strict=True)
        lines = [f"{name}: {dataset.describe()}; {count} an epoch" for (name, dataset), count in counts]
        return "\n".join(lines).removeprefix(": ")  # the only task of a command line has no name


def make_data(
    base: Task, path: Path | None, resolution: int, buckets: bool = False, seed: int = 0
) -> tuple[Tasks, dict[str, DegDataset], dict[str, dict[str, str]]]:
    """The training set; by task the sets for previews; and the yaml's values as a checkpoint keeps them.

    Without a yaml at `path` there is the one task `base`, called "". Raises FileNotFoundError or ValueError;
    the message names the yaml, the task and the key.
    """
    own_values = read_tasks(path) if path else {"": {}}
    train, previews, weights = {}, {}, {}
    for number, (name, own) in enumerate(own_values.items()):
        try:
            typed = OmegaConf.to_container(OmegaConf.merge(Task, own))  # checks keys and types
            # folders of the command line do not belong to a task with folders of its own
            folders = {"lr_root": None, "validation_root": None} if "hr_root" in own else {}
            task = replace(base, **folders | {key: typed[key] for key in own})
            # another seed for each task: an image that two tasks share gets other noise in each
            train[name], previews[name] = task.datasets(resolution, buckets, seed + 1_000_003 * number)
            weights[name] = task.weight
        except OmegaConfBaseException as error:
            raise ValueError(f"{path}: {name}: {error.full_key}: {str(error).splitlines()[0]}") from error
        except (ValueError, FileNotFoundError) as error:
            if path is None:
                raise
            raise ValueError(f"{path}: {name}: {error}") from error
    kept = {name: {key: str(value) for key, value in own.items()} for name, own in own_values.items() if name}
    return Tasks(train, weights), previews, kept


def read_tasks(path: Path) -> dict[str, dict[str, Any]]:
    """The values of each task in a yaml, by its name. Raises FileNotFoundError or ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"list of tasks not found: {path}")
    content = read_yaml(path)
    if not content or not isinstance(content, dict) or not all(isinstance(v, dict) for v in content.values()):
        raise ValueError(f"{path} must hold names of tasks, each with hr_root, instance_prompt, ... below it")
    for name in content:
        if not re.fullmatch(r"[\w-]+", str(name)):  # it is a part of file names
            raise ValueError(f"{path}: a task's name must be letters, digits, _ or -, not {name!r}")
    return {str(name): own for name, own in content.items()}
