"""Settings of a script: reading them from the command line, checking them, recording them in checkpoints."""

import errno
import os
import sys
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_type_hints

import torch
import tyro
from tqdm import tqdm

from harness.flags import Range
from ldm.util import check_package


def run_main(
    main: Callable[[Any], None],
    settings_type: type | dict[str, type],
    demo: Mapping[str, Any] | None = None,
    complete: Callable[[list[str]], list[str]] | None = None,
) -> None:
    """Read the settings from the command line and call `main`; a user error prints one line, exit code 1.

    The names in a dictionary of types become subcommands. `demo` holds the values that --demo sets (see
    read_settings); `complete` adds missing words, such as a subcommand, to the command line. With TRACEBACK=1
    in the environment the whole traceback is shown instead of one line.
    """
    if not os.environ.get("TRACEBACK"):
        threading.excepthook = _report_once
    try:
        words = complete(sys.argv[1:]) if complete else None
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            main(read_settings(settings_type, demo, words))
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        for bar in [*getattr(tqdm, "_instances", ())]:
            bar.close()  # the error gets a line of its own
        lines = [line for line in str(error).splitlines() if line.strip()]
        # a DataLoader passes on its worker's error as a whole traceback
        in_worker = any("Original Traceback" in line for line in lines)
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        hint = ": make space for the output, then run the same command again" if full else ""
        print(f"error: {lines[-1] if in_worker else ' '.join(lines)}{hint}", file=sys.stderr)
        sys.exit(1)
    except RuntimeError as error:
        if os.environ.get("TRACEBACK") or not is_lost_peer(error):
            raise
        print(
            "error: another process of this run ended or cannot be reached: its own message says why; "
            "the same command resumes the run at its last checkpoint",
            file=sys.stderr,
        )
        sys.exit(1)


def _show_warning(message: Warning, *_: Any) -> None:
    """Print a warning in one line, without its place in the code."""
    tqdm.write(f"warning: {message}", file=sys.stderr)


def is_lost_peer(error: RuntimeError) -> bool:
    """Return True if the error means that another process was lost (gloo's errors have no own class)."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def _report_once(problem: threading.ExceptHookArgs) -> None:
    """Report an error that ends a thread, except OSError: TensorBoard raises it again in the main thread."""
    if not isinstance(problem.exc_value, OSError):
        threading.__excepthook__(problem)


def read_settings(
    settings_type: type | dict[str, type],
    demo: Mapping[str, Any] | None = None,
    words: Sequence[str] | None = None,
) -> Any:
    """Read the settings from the command line, or from `words`. Raises SystemExit with a message on errors.

    With --demo the values of `demo` are the defaults, and other flags override them.
    """
    if isinstance(settings_type, dict):
        return tyro.extras.subcommand_cli_from_dict(settings_type, args=words, use_underscores=True)
    words = list(sys.argv[1:] if words is None else words)
    chosen = tyro.cli(settings_type, args=words, use_underscores=True)
    if demo and chosen.demo:
        start = settings_type(demo=True, **demo)
        return tyro.cli(settings_type, args=words, default=start, use_underscores=True)
    return chosen


def check_ranges(values: Any) -> None:
    """Raise ValueError that names the first field of a settings dataclass outside the Range of its type."""
    for name, hint in get_type_hints(type(values), include_extras=True).items():
        for range_ in getattr(hint, "__metadata__", ()):
            if isinstance(range_, Range):
                range_.check(name, getattr(values, name))


def check_new(output: Path, overwrite: bool, suffix: str = "") -> Path:
    """Return the path of the file to write. Raises ValueError if it exists (unless `overwrite`) or does not
    have the suffix, and FileNotFoundError if its folder is missing."""
    if suffix and output.suffix != suffix:
        raise ValueError(f"the output must be a {suffix} file, not {output}")
    if output.exists() and not overwrite:
        raise ValueError(f"{output} exists already: remove it or pass --overwrite")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"output folder not found: {output.parent}")
    return output


def check_optimizer(name: str) -> None:
    """Raise ValueError for adamw8bit if its package, bitsandbytes, is not installed."""
    if name == "adamw8bit":
        check_package("bitsandbytes", "--optimizer adamw8bit")


def plain(values: Any) -> dict:
    """Convert a dataclass or dict of settings to a dict that a checkpoint can hold (paths become strings)."""
    values = values if isinstance(values, Mapping) else asdict(values)
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


DATA_FACTS = ("samples", "blurrer")  # facts that a checkpoint records beside the settings


def check_settings(saved: dict, now: dict, may_change: set[str], path: Path) -> None:
    """Raise ValueError if settings other than `may_change` differ from those `saved` in checkpoint `path`."""
    changes, ways = [], []
    for name in sorted({*saved, *now} - may_change):
        before, after = saved.get(name), now.get(name)
        if before == after:
            continue
        changes.append(f"{name} was {before!r}, is {after!r}")
        if name == "samples":
            ways.append(
                "the same number of training images (one that is damaged may stay: training passes it over, "
                "and an empty file in the place of one that is gone)"
            )
        elif name not in DATA_FACTS:
            ways.append(as_flag(name, before))
    if changes:
        raise ValueError(
            f"{path} is of a run with other settings: {'; '.join(changes)}. "
            f"To continue it: {', '.join(ways) or 'the old ones'}. To start anew: another --output_dir"
        )


def as_flag(name: str, value: Any) -> str:
    """Return the command-line option that gives a setting this value."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no_{name}"
    words = map(str, value) if isinstance(value, list | tuple) else [str(value)]
    return " ".join([f"--{name}", *words])
