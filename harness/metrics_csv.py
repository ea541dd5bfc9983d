"""A table of metrics that survives a kill and a resume."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ldm.checkpoint import write_atomically


def as_csv(columns: Sequence[str], rows: Iterable[Mapping]) -> str:
    """A table with a line of names on top."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


class MetricsCsv:
    """A table with one column per metric that is on disk after every row.

    Opening it keeps the whole rows up to `step` and drops the rest: a run resumed there writes those again.
    Raises ValueError that names the file if it is no such table.
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
        reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))  # without a line cut by a kill
        self.columns = list(reader.fieldnames or [])
        return list(reader)

    def _rewrite(self, rows: list[Mapping]) -> None:
        text = as_csv(self.columns, rows)
        write_atomically(self.path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def append(self, row: Mapping[str, float]) -> None:
        """Add a row, which holds a step; a metric that is new becomes a new column.

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
