"""Logs and messages of a training run, for the plain loops (harness/run.py) and for Lightning's (cldm/)."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from ldm.checkpoint import write_atomically


def progress_bar(total: int, start: int, first: bool) -> tqdm:
    """Create a progress bar over a run's optimizer steps, at step `start`; hidden unless `first` (rank 0)."""
    return tqdm(total=total, initial=start, disable=not first, unit="step", dynamic_ncols=True)


def stop_message(problem: str, last_checkpoint: Path) -> str:
    """Format the message of a run that stops because a loss is not finite."""
    if last_checkpoint.is_file():
        return f"training stopped: {problem}; the last good checkpoint is {last_checkpoint}"
    return f"training stopped: {problem}; no checkpoint was saved yet"


def as_csv(columns: Sequence[str], rows: Iterable[Mapping]) -> str:
    """Format a table as CSV text with a header row."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


class MetricsCsv:
    """CSV table with one column per metric; every row is on disk as soon as it is appended.

    An existing file keeps its complete rows up to `step`; the others are dropped, because the run that
    resumes at `step` writes them again. Raises ValueError that names the file if it is not such a table.
    """

    def __init__(self, path: str | Path, step: int):
        self.path, self.columns = Path(path), []
        if self.path.is_file():
            try:
                rows = [row for row in self._rows() if int(row["step"]) <= step]
            except (ValueError, TypeError, KeyError, csv.Error) as error:
                raise ValueError(f"{path} is damaged (move it away to go on without it): {error}") from error
            self._rewrite(rows)

    def _rows(self) -> list[dict]:
        if not self.path.is_file():
            return []
        text = self.path.read_text(encoding="utf-8")
        reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))  # without a line cut off by a kill
        self.columns = list(reader.fieldnames or [])
        return list(reader)

    def _rewrite(self, rows: list[Mapping]) -> None:
        text = as_csv(self.columns, rows)
        write_atomically(self.path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def append(self, row: Mapping[str, float]) -> None:
        """Append a row, which must hold `step`; a new metric becomes a new column.

        Raises OSError that names the file.
        """
        new = [name for name in row if name not in self.columns]
        if new:
            rows = self._rows()
            self.columns += new
            return self._rewrite([*rows, row])
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                csv.DictWriter(file, self.columns, lineterminator="\n").writerow(row)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error  # a full disk names no file


def summary(folder: Path, step: int, what_next: str, score: str = "") -> str:
    """Format the last message of a run: its files and the next command; `score` follows best.ckpt's name."""
    last = folder / "checkpoints" / "last.ckpt"
    best = folder / "checkpoints" / "best.ckpt"
    logs = folder / "logs"
    also = f" and {best.name}{score}" if best.is_file() else ""
    return (
        f"finished at step {step}\n"
        f"  checkpoints  {last}{also}\n"
        f"  images       {folder / 'images'}\n"
        f"  curves       {logs / 'metrics.csv'}, or: tensorboard --logdir {logs}\n"
        f"next: {what_next}"
    )


def check_finite(weights: Mapping[str, torch.Tensor], step: int) -> None:
    """Raise ValueError that names the first weight that is not finite: it must not replace a good file."""
    for name, value in weights.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(f"weight {name} is not finite at step {step}: not saved, the old files stay")
