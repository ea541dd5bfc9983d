"""The settings block of a script: read from the command line, checked, recorded in checkpoints."""

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
    """Read the settings from the command line and call `main`; a user's mistake is one line and exit code 1.

    A dictionary of types makes its names subcommands; `demo` is what --demo stands for (read_settings),
    `complete` adds to the words of the command line what they leave out. With TRACEBACK=1 in the environment
    the whole traceback is shown instead of the line.
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
        # a DataLoader hands on what its worker raised as a whole traceback
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
    """Print a warning in one line, without the place in the code that gave it."""
    tqdm.write(f"warning: {message}", file=sys.stderr)


def is_lost_peer(error: RuntimeError) -> bool:
    """Return whether the peer process has ended (gloo's errors have no class of their own)."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def _report_once(problem: threading.ExceptHookArgs) -> None:
    """Report the error that ends a thread, but for OSError: TensorBoard raises its own in the main thread."""
    if not isinstance(problem.exc_value, OSError):
        threading.__excepthook__(problem)


def read_settings(
    settings_type: type | dict[str, type],
    demo: Mapping[str, Any] | None = None,
    words: Sequence[str] | None = None,
) -> Any:
    """Read the settings from the command line, or from `words`; SystemExit with a message if that fails.

    Where --demo is given, the values of `demo` are the defaults: every flag beside it counts.
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
    """The file that a tool is to write. Raises ValueError if it is there or has another suffix than the one
    that must be, and FileNotFoundError if its folder is missing."""
    if suffix and output.suffix != suffix:
        raise ValueError(f"the output must be a {suffix} file, not {output}")
    if output.exists() and not overwrite:
        raise ValueError(f"{output} exists already: remove it or pass --overwrite")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"output folder not found: {output.parent}")
    return output


def check_optimizer(name: str) -> None:
    """Raise ValueError for adamw8bit where the package that it comes from is not installed."""
    if name == "adamw8bit":
        check_package("bitsandbytes", "--optimizer adamw8bit")


def plain(values: Any) -> dict:
    """A dataclass or dict of settings as a dict that a checkpoint can hold (paths become strings)."""
    values = values if isinstance(values, Mapping) else asdict(values)
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


DATA_FACTS = ("samples", "blurrer")  # facts that a checkpoint records beside the settings


def check_settings(saved: dict, now: dict, may_change: set[str], path: Path) -> None:
    """Raise ValueError if settings `saved` in the checkpoint `path` differ from those of the run now."""
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
    """The option that gives a setting this value on the command line."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no_{name}"
    words = map(str, value) if isinstance(value, list | tuple) else [str(value)]
    return " ".join([f"--{name}", *words])
