"""What ends a run: weights that are not finite, and its last words."""

from collections.abc import Mapping
from pathlib import Path

import torch


def summary(folder: Path, step: int, what_next: str, score: str = "") -> str:
    """The last words of a run: where everything is and what to run next; `score` is that of best.ckpt."""
    last, best = (folder / "checkpoints" / name for name in ("last.ckpt", "best.ckpt"))
    logs = folder / "logs"
    return (
        f"finished at step {step}\n"
        f"  checkpoints  {last}{f' and {best.name}{score}' if best.is_file() else ''}\n"
        f"  pictures     {folder / 'images'}\n"
        f"  curves       {logs / 'metrics.csv'}, or: tensorboard --logdir {logs}\n"
        f"next: {what_next}"
    )


def check_finite(weights: Mapping[str, torch.Tensor], step: int) -> None:
    for name, value in weights.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(f"weight {name} is not finite at step {step}: not saved, the old files stay")
