"""Several restoration tasks in one training set, listed in a yaml (docs/kontext.md), and their mixture."""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ldm.data.degraded import DegDataset
from ldm.util import read_yaml

PATHS = ("hr_root", "lr_root", "validation_root")
RANGES = ("lr_scale", "noise_level", "blur_radius", "jpeg_quality", "damage_strength")
DAMAGE = (*RANGES, "degradation_order", "degradation_rounds")
KEYS = (*PATHS, "instance_prompt", "captions", "native_crop", "degradation_types", *DAMAGE, "weight")


class Tasks(Dataset):
    """The pictures of several tasks, `datasets` by name, in shares that go with their weights.

    An epoch has as many samples as all pictures together; each picture of a task comes equally often.
    """

    def __init__(self, datasets: Mapping[str, DegDataset], weights: Mapping[str, float]):
        self.datasets = dict(datasets)
        total, whole = sum(map(len, datasets.values())), sum(weights.values())
        self.counts = [max(1, round(total * weights[name] / whole)) for name in datasets]  # in an epoch
        self.starts = np.cumsum([0, *self.counts])
        pictures = [len(dataset.targets) for dataset in datasets.values()]
        self.first = np.cumsum([0, *pictures])  # index of the first picture of each

    def __len__(self) -> int:
        return sum(self.counts)

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        task, dataset, own = self._find(key)
        item = dataset[own]
        return item | {"index": item["index"] + int(self.first[task])}

    def group(self, key: int | tuple[int, int]) -> tuple[int, int]:
        """Height and width of a sample."""
        _, dataset, own = self._find(key)
        return dataset.group(own)

    def _find(self, key: int | tuple[int, int]) -> tuple[int, DegDataset, tuple[int, int]]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        task = int(np.searchsorted(self.starts, index, "right")) - 1
        dataset = list(self.datasets.values())[task]
        return task, dataset, divmod(epoch * self.counts[task] + index - int(self.starts[task]), len(dataset))

    @property
    def fixed(self) -> tuple[bool, bool]:
        """Whether all targets, and all controls, are the same in every epoch: latents may be kept."""
        every = self.datasets.values()
        return all(d.fixed_targets for d in every), all(d.fixed_controls for d in every)

    @property
    def prompts(self) -> list[str]:
        """Every prompt that a sample may have."""
        every = [*self.datasets.values()]
        unsaid = any(d.caption_dropout for d in every)
        return list(dict.fromkeys([prompt for d in every for prompt in d.prompts] + [""] * unsaid))

    def describe(self) -> str:
        """What it holds, a line for each task."""
        rows = zip(self.datasets.items(), self.counts, strict=True)
        return "\n".join(f"{f'{name}: ' * bool(name)}{d.describe()}; {n} an epoch" for (name, d), n in rows)


def make_data(settings: Any) -> tuple[Tasks, dict[str, DegDataset], dict[str, dict]]:
    """The training set; by task the sets for previews, which are the same at every preview; and the tasks as
    a checkpoint keeps them, {} without a yaml. `settings` are those of train_kontext_lora.py.

    Raises what `DegDataset` and `read_tasks` do; what a task's own values do wrong names file and task.
    """
    tasks = read_tasks(settings.tasks) if settings.tasks else {}
    weights = {name: own.get("weight", 1) for name, own in tasks.items()} or {"": 1}
    train, previews = {}, {}
    for number, name in enumerate(weights):
        try:
            train[name], previews[name] = _datasets(_with(settings, tasks.get(name, {})), number)
        except (ValueError, FileNotFoundError) as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(f"{settings.tasks}: {name}: {error}" if tasks else str(error)) from error
    kept = {name: {key: str(value) for key, value in own.items()} for name, own in tasks.items()}
    return Tasks(train, weights), previews, kept


def _datasets(settings: Any, number: int) -> tuple[DegDataset, DegDataset]:
    if not settings.hr_root.exists():
        raise FileNotFoundError(f"no clean photographs at {settings.hr_root}: give --hr_root (or try --demo)")
    kinds = [kind.strip() for kind in settings.degradation_types.split(",") if kind.strip()]
    names = (*DAMAGE, "instance_prompt", "captions", "native_crop", "resolution", "buckets")
    common = {name: getattr(settings, name) for name in names} | {"degradation_types": kinds}
    common["seed"] = settings.seed + 1_000_003 * number  # the same picture in two tasks: other noise
    moving = {n: getattr(settings, n) for n in ("repeats", "random_crop", "random_flip", "caption_dropout")}
    train = DegDataset(settings.hr_root, lr_data_root=settings.lr_root, **moving, **common)
    if settings.captions and not train.captioned:
        raise ValueError(f"no picture in {settings.hr_root} has a caption (NAME.txt beside NAME.png)")
    damaged = None if settings.validation_root else settings.lr_root
    clean = settings.validation_root or settings.hr_root
    return train, DegDataset(clean, lr_data_root=damaged, random_crop=False, random_flip=False, **common)


def _with(settings: Any, own: dict) -> Any:
    """The settings of a task. With a folder of its own the command line's others do not belong to it."""
    own = {name: value for name, value in own.items() if name != "weight"}
    others = {"lr_root": None, "validation_root": None} if "hr_root" in own else {}
    return replace(settings, **(others | own))


def read_tasks(path: Path) -> dict[str, dict]:
    """The tasks of a yaml by name: their values have the types of the settings of the same names.

    Raises FileNotFoundError, or ValueError that names the file, the task, the key and what is allowed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"list of tasks not found: {path}")
    content = read_yaml(path)
    if not content or not isinstance(content, dict) or not all(isinstance(v, dict) for v in content.values()):
        raise ValueError(f"{path} must hold names of tasks, each with {', '.join(KEYS[:4])}, ... below it")
    tasks = {}
    for name, own in content.items():
        if not re.fullmatch(r"[\w-]+", str(name)):
            raise ValueError(f"{path}: a task's name must be letters, digits, _ or -, not {name!r}")
        tasks[str(name)] = {key: _read(f"{path}: {name}", key, value) for key, value in own.items()}
    return tasks


def _read(where: str, key: str, value: Any) -> Any:
    """A value of a task in the type of its setting."""
    if key not in KEYS:
        near = get_close_matches(str(key), KEYS, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"{where}: {key} is not known: {hint}A task may have {', '.join(KEYS)}")
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    if key in RANGES or key in ("weight", "degradation_rounds"):
        return _read_numbers(where, key, text)
    if key in ("captions", "native_crop"):
        if not isinstance(value, bool):
            raise ValueError(f"{where}: {key} must be true or false, not {value!r}")
        return value
    if key == "degradation_types":
        return "" if value is None else text
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where}: {key} must be a text, not {value!r}")
    return Path(value) if key in PATHS else value


def _read_numbers(where: str, key: str, text: str) -> float | tuple[float, float]:
    most, wanted = (2, "a number or LOW,HIGH") if key in RANGES else (1, "a number above 0")
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not 1 <= len(numbers) <= most or (most == 1 and not 0 < numbers[0] < math.inf):
        raise ValueError(f"{where}: {key} must be {wanted}, not {text}")
    if key == "degradation_rounds":
        return int(numbers[0])
    return numbers if len(numbers) == 2 else numbers[0]
