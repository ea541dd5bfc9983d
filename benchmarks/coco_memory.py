"""Memory of COCO's annotations: flat arrays against Python objects, on a synthetic file of real size.

    python -m benchmarks.coco_memory [--images 118287 --objects 860000]

Writes instances_synthetic.json (about 450 MB) to a temporary folder, unless --folder has it already. Then it
measures, in a process each: reading it as pycocotools does (json and its index), converting it to flat
arrays, and opening these. Shown is the memory that belongs to a process alone, its peak, and what a forked
worker adds that looks at every object once, as an epoch of training does.
"""

import json
import multiprocessing
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from pycocotools.coco import COCO

from ldm.data.coco import CocoRecords


@dataclass
class Settings:
    images: int = 118_287
    objects: int = 860_000
    # Numbers of a polygon, x and y, on average: chosen so that the file has the real one's 450 MB.
    coordinates: int = 56
    # Where the synthetic file is kept; None makes it anew in a temporary folder.
    folder: Path | None = None


def write_synthetic(path: Path, settings: Settings) -> None:
    """A json with images of 640x480 pixels and one polygon an object, with two decimals."""
    rng = np.random.default_rng(0)
    images = [
        {"id": n, "file_name": f"{n:012d}.jpg", "height": 480, "width": 640, "license": 3}
        for n in range(settings.images)
    ]
    with path.open("w") as file:
        file.write(f'{{"images": {json.dumps(images)}, "annotations": [')
        for n in range(settings.objects):
            corners = max(3, rng.poisson(settings.coordinates / 2))
            angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
            radius = rng.uniform(10, 120) * rng.uniform(0.6, 1, corners)
            center = rng.uniform([0, 0], [640, 480])
            points = center + np.stack([radius * np.cos(angles), radius * np.sin(angles)], axis=1)
            points = np.round(points.clip(0, [640, 480]), 2).ravel().tolist()
            record = {
                "segmentation": [points],
                "area": round(float(radius.mean() ** 2 * 3), 2),
                "iscrowd": 0,
                "image_id": int(rng.integers(settings.images)),
                "bbox": points[:4],
                "category_id": 1,
                "id": n,
            }
            file.write(("," if n else "") + json.dumps(record))
        file.write("]}")


def memory() -> float:
    """MiB that belong to this process alone; what is mapped from a file is not counted."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) / 1024


def walk_python(coco: COCO) -> None:
    """Look at every object."""
    for annotation in coco.dataset["annotations"]:
        sum(annotation["segmentation"][0])


def walk_flat(records: CocoRecords) -> None:
    """Look at every object."""
    for row in range(len(records["sizes"])):
        records.of(row)


def measure(path: str, kind: str, results: multiprocessing.Queue) -> None:
    """Open the annotations one way, then walk them in a forked worker; put numbers into `results`."""
    before, start = memory(), time.perf_counter()
    source = COCO(path) if kind == "python" else CocoRecords(path, "objects")
    if kind != "python":
        source["records"]
    seconds, here = time.perf_counter() - start, memory() - before
    peak = int(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1]) / 1024
    inner = multiprocessing.get_context("fork").Queue()

    def worker() -> None:
        start = memory()
        (walk_python if kind == "python" else walk_flat)(source)
        inner.put(memory() - start)

    process = multiprocessing.get_context("fork").Process(target=worker)
    process.start()
    results.put((seconds, here, peak, inner.get()))
    process.join()


def main(settings: Settings) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = settings.folder or Path(temporary)
        path = folder / "instances_synthetic.json"
        if not path.is_file():
            write_synthetic(path, settings)
        path.with_name(f"{path.stem}.objects.safetensors").unlink(missing_ok=True)
        size = path.stat().st_size / 2**20
        print(f"{settings.images} images, {settings.objects} objects: {size:.0f} MiB of json")
        print(f"{'':28}{'seconds':>9}{'MiB':>9}{'peak':>9}{'a worker':>10}")
        spawn = multiprocessing.get_context("spawn")
        for name, kind in (
            ("pycocotools' objects", "python"),
            ("flat arrays, converted", "flat"),
            ("flat arrays, opened", "flat"),
        ):
            results = spawn.Queue()
            process = spawn.Process(target=measure, args=(str(path), kind, results))
            process.start()
            seconds, here, peak, worker = results.get()
            process.join()
            print(f"{name:28}{seconds:9.1f}{here:9.0f}{peak:9.0f}{worker:10.0f}")
        size = path.with_name(f"{path.stem}.objects.safetensors").stat().st_size / 2**20
        print(f"on disk the flat arrays have {size:.0f} MiB")


if __name__ == "__main__":
    main(tyro.cli(Settings, use_underscores=True))
