"""Types of settings that have aliases, a range of valid values, or their own command-line syntax."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Range:
    """Range of valid values of a setting, as part of its type; see harness.settings.check_ranges."""

    least: float
    most: float = math.inf
    include_most: bool = True

    def check(self, name: str, value: float) -> None:
        """Raise ValueError that names the setting if its value is out of range, NaN or infinite."""
        below = value <= self.most if self.include_most else value < self.most
        if math.isfinite(value) and value >= self.least and below:
            return
        limits = f"finite and at least {self.least}"
        if self.most < math.inf:
            limits = f"in [{self.least}, {self.most}{']' if self.include_most else ')'}"
        elif math.isfinite(value):
            limits = f"at least {self.least}"
        raise ValueError(f"{name} must be {limits}, not {value}")


Count = Annotated[int, Range(1)]
Whole = Annotated[int, Range(0)]  # a count that may be 0
Weight = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
Decay = Annotated[float, Range(0, 1, include_most=False)]

Devices = Annotated[int, Range(1), tyro.conf.arg(aliases=["--gpus"])]
MaxEpochs = Annotated[int, tyro.conf.arg(aliases=["--num_epochs"])]
MaxSteps = Annotated[int, tyro.conf.arg(aliases=["--max_train_steps"])]
BatchSize = Annotated[int, Range(1), tyro.conf.arg(aliases=["--train_batch_size"])]
Accumulate = Annotated[
    int, Range(1), tyro.conf.arg(aliases=["--accumulate", "--gradient_accumulation_steps"])
]
WeightDecay = Annotated[float, Range(0), tyro.conf.arg(aliases=["--weight_l2_reg"])]
Precision = Literal["32", "16", "bf16", "32-true", "16-mixed", "bf16-mixed"]
# For ControlNets, with accelerate's names; auto is bf16 or 16 on a GPU, 32 on a CPU; 16 needs a GPU.
AnyPrecision = Annotated[
    Literal["auto", "32", "16", "bf16", "32-true", "16-mixed", "bf16-mixed", "fp16", "no"],
    tyro.conf.arg(aliases=["--mixed_precision"], metavar="{auto,bf16,16,32}"),
]
ImageSize = Annotated[int, tyro.conf.arg(aliases=["--resolution"])]
LRScheduler = Literal["constant", "linear", "cosine"]
AdamW = Literal["adamw", "adamw8bit"]
StartPath = Annotated[str, tyro.conf.arg(aliases=["--pretrained_model_name_or_path"])]


def _read_range(words: list[str]) -> float | tuple[float, float]:
    numbers = [float(word) if "." in word or "e" in word else int(word) for word in words[0].split(",")]
    if len(numbers) > 2:
        raise ValueError(f"{words[0]} is neither a number nor a range: write LOW,HIGH")
    return tuple(numbers) if len(numbers) == 2 else numbers[0]


# A number, or LOW,HIGH: a value in that range is sampled for every image.
NumberOrRange = Annotated[
    float | tuple[float, float],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="X|LOW,HIGH",
        instance_from_str=_read_range,
        is_instance=lambda value: isinstance(value, int | float | tuple),
        str_from_instance=lambda value: [
            ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        ],
    ),
]
PRECISIONS = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}


def lightning_precision(precision: str) -> str:
    """Return Lightning's name for a precision: 32-true, 16-mixed or bf16-mixed for 32, 16 or bf16.

    Lightning's names are returned unchanged. Raises ValueError for other names.
    """
    precision = PRECISIONS.get(precision, precision)
    if precision not in PRECISIONS.values():
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    return precision
