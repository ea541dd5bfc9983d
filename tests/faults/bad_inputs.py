"""Malformed inputs for every script: each ends with one clear error line or is read correctly.

input_slots.py lists the places where a script reads a user's file, damage.py the kinds of damage. `campaign`
runs the scripts on one damaged file after another. In no case may there be a traceback, a hang, partial
output, a leftover temporary file or executed code from a file. Bad files must end the script with exit code 1
and one line that begins with "error: " and names the file, or, where documented, be skipped and counted.
Unusual but valid files must be read.
"""

import shutil
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
from tqdm import tqdm

from ldm import checkpoint
from ldm.data.image import read_image
from tests.faults.damage import MARKER
from tests.faults.input_slots import SLOTS, Case, make_ready
from tests.faults.tiny_runs import Result, require_success, run, script

SECONDS = 180  # until a script counts as hanging


# ---- checks of a case's end ------------------------------------------------------------------------------


def complaint(result: Result) -> str:
    """Return what is wrong with the way a script ended; "" if nothing is."""
    lines = [line for line in result.err.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    if result.code is None:
        return f"it hangs for {SECONDS} s"
    if result.code not in (0, 1):
        return f"exit code {result.code}"
    if "Traceback (most recent" in result.err + result.out:
        return "a traceback"
    if result.code == 1 and (len(errors) != 1 or lines[-1] != errors[0]):
        return f"{len(errors)} lines begin with error:, and the last is {lines[-1:]}"
    if result.code == 0 and errors:
        return "an error line and exit code 0"
    return ""


def half_done(folder: Path, victim: Path) -> str:
    """Return the first unreadable output, temporary file or sign of executed code; "" if there is none."""
    for path in folder.rglob("*"):
        if path.name.endswith(".tmp"):
            return f"left {path.name}"
        if path.name == MARKER:
            return "code from a file was run"
        if path == victim or "out" not in path.parts or not path.is_file():
            continue
        try:
            read_any(path)
        except (ValueError, OSError) as error:
            return f"half-written: {error}"
    return ""


def read_any(path: Path) -> None:
    if path.suffix == ".png":
        read_image(path)
    elif path.suffix in (".ckpt", ".safetensors"):
        checkpoint.read_weights(path)
    elif path.suffix == ".h5":
        h5py.File(path).close()


def find_problem(case: Case, verdict: str, result: Result) -> str:
    """Return what is wrong with the end of a case; "" if nothing is."""
    problem = complaint(result)
    if problem or verdict == "either":
        return problem
    if case.remade:
        return "not made anew" if result.code else ""
    if verdict == "odd":
        fails = result.code == 1 or bool(case.skips) and case.skips in result.out
        return "refused, though valid" if fails else ""
    if case.skips:
        told = result.code == 1 or case.skips in result.out + result.err
        named = told and case.victim.name in result.out + result.err
        return "" if named else f"not skipped and counted: {case.skips!r} and the name are not printed"
    if result.code == 0:
        return "not noticed"
    missing = [path.name for path in case.results if not path.is_file()]
    if missing:
        return f"others were not done: {', '.join(missing)}"
    last = result.err.strip().splitlines()[-1]
    named = case.named or case.victim.name
    return "" if named in last else f"the error does not name {named}"


def try_one(number: int, seed: int, place: Path, work: Path) -> tuple[str, str, Result]:
    """Run case `number` of a seed; return its name, what is wrong ("" if nothing) and the result."""
    rng = np.random.default_rng([seed, number])
    chosen = SLOTS[number % len(SLOTS)]
    verdicts = [name for name in chosen.kind for _ in range(3 if name == "bad" else 2)]
    verdict = verdicts[int(rng.integers(len(verdicts)))]
    ways = chosen.kind[verdict]
    harm = ways[int(rng.integers(len(ways)))]
    folder = work / f"{number:04d}"
    folder.mkdir(parents=True)
    case = chosen.build(folder, place)
    require_success(run(lambda: harm(case.victim, rng), work / "harm"))
    if harm.__name__ in case.ignores:
        verdict = "either"
    result = run(script(case.arguments), work / f"{number:04d}_log", SECONDS)
    problem = find_problem(case, verdict, result)
    if not problem:
        checked = run(lambda: print(half_done(folder, case.victim)), work / "check")
        problem = checked.out.strip() or checked.err
    return f"{chosen.name}: {harm.__name__} ({verdict})", problem, result


def campaign(place: Path, work: Path, seed: int, count: int) -> bool:
    """Run `count` cases, print those that fail and a summary; return whether all passed."""
    make_ready(place, work)
    tally, problems = Counter(), 0
    for number in tqdm(range(count), unit="case", disable=None):
        name, problem, result = try_one(number, seed, place, work)
        tally[{0: "read or skipped", 1: "one clear error"}.get(result.code, "other")] += not problem
        problems += bool(problem)
        if problem:
            end = " | ".join(result.err.strip().splitlines()[-3:])[-600:]
            tqdm.write(f"case {number} {name}: {problem}\n    {end}")
        else:
            shutil.rmtree(work / f"{number:04d}")
    print(
        f"{count} malformed or unusual inputs in {len(SLOTS)} places: {dict(tally)}, {problems} ended wrongly"
    )
    return not problems
