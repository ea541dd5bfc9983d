"""COCO annotations as flat arrays: read once, kept on disk beside the json file, shared by all workers.

A json of COCO's size (118,287 images, 860,000 objects) takes gigabytes as Python objects, and every worker
would end up with a copy. Here each object is stored as its run-length code and each caption as its text.
"""

import json
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as coco_mask
from tqdm import tqdm

from ldm.checkpoint import read_metadata, read_weights, write_weights

FORMAT = "3"  # version of the flat file; changing it rebuilds old files
LARGEST = 2**16  # pixels a side: for larger shapes pycocotools would use unlimited memory


class CocoRecords:
    """Records of a COCO json by image: captions, or the compressed run lengths of objects."""

    def __init__(self, path: str | Path, kind: str):
        """Read `path`, a json of `kind` "objects" or "captions", or its up-to-date flat copy beside it.

        The copy, NAME.KIND.safetensors, is written if needed; its memory-mapped arrays are shared by workers.
        Raises FileNotFoundError, or ValueError that names the file and the problem.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"annotation file not found: {path}")
        twin = path.with_name(f"{path.stem}.{kind}.safetensors")
        made_from = f"{FORMAT} {kind} {path.stat().st_size} {path.stat().st_mtime_ns}"
        if _is_fresh(twin, made_from):
            tensors = read_weights(twin)
        else:
            tensors = {name: torch.from_numpy(array) for name, array in flatten(path, kind).items()}
            try:
                write_weights(twin, tensors, {"made_from": made_from})
            except OSError as error:
                warnings.warn(f"annotations are kept in memory, not on disk: {error}", stacklevel=2)
        self.arrays = {name: tensor.numpy() for name, tensor in tensors.items()}

    def rows(self, names: Iterable[str]) -> np.ndarray:
        """Return the image's row for each file name, -1 if the json does not list it: int32."""
        known = self.arrays["names"].tobytes().decode().split("/")
        numbers = {name: row for row, name in enumerate(known)}
        return np.array([numbers.get(name, -1) for name in names], np.int32)

    def of(self, row: int) -> list[str]:
        """Return the records of one image; none for row -1."""
        if row < 0:
            return []
        start, end = self.arrays["starts"][row : row + 2]
        return json.loads(self.arrays["records"][start:end].tobytes())

    def mask(self, row: int, record: str) -> np.ndarray:
        """Return an object's mask, uint8 (height, width) of 0 and 1."""
        return coco_mask.decode({"size": self.arrays["sizes"][row].tolist(), "counts": record})


def _is_fresh(twin: Path, made_from: str) -> bool:
    try:
        return twin.is_file() and read_metadata(twin).get("made_from") == made_from
    except ValueError:  # damaged: it is rebuilt
        return False


def flatten(path: Path, kind: str) -> dict[str, np.ndarray]:
    """Read the arrays of CocoRecords from a json file, skipping annotations of unlisted images.

    `names` are the images' file names and `sizes` their heights and widths; `records` are concatenated json
    lists, one per image, and `starts` the offsets at which each list starts and the last one ends.
    Raises ValueError that names the file and the entry.
    """
    content = _read_json(path)
    names, sizes, rows = [], [], {}
    entry = ""
    try:
        for row, image in enumerate(content["images"]):
            entry = f"image {image.get('id')}"
            rows[image["id"]] = row
            names.append(Path(image["file_name"]).name.encode())
            height, width = int(image.get("height", 0)), int(image.get("width", 0))
            if not 0 <= min(height, width) <= max(height, width) <= LARGEST:
                raise ValueError(f"it is said to have {width} x {height} pixels")
            sizes.append((height, width))
        texts = [[] for _ in names]
        for annotation in tqdm(content["annotations"], f"reading {path.name}", leave=False):
            entry = f"annotation {annotation.get('id')}"
            row = rows.get(annotation["image_id"])
            if row is None:
                continue
            if kind == "captions":
                text = annotation["caption"].strip()
            else:
                text = run_lengths(annotation, *sizes[row])
            if text:
                texts[row].append(text)
    except Exception as error:  # pycocotools raises bare Exceptions
        raise ValueError(f"{path}: {entry} cannot be read: {error!r}") from error
    records = [json.dumps(own).encode() for own in texts]
    return {
        "names": np.frombuffer(bytearray(b"/".join(names)), np.uint8),  # no name has a slash
        "sizes": np.array(sizes, np.int32).reshape(-1, 2),
        "records": np.frombuffer(bytearray(b"".join(records)), np.uint8),
        "starts": np.cumsum([0, *map(len, records)], dtype=np.int64),
    }


def _read_json(path: Path) -> dict[str, list[dict]]:
    """Read a json with COCO's two lists. Raises ValueError that names the file and the problem."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not json: {error}") from error
    for name in ("images", "annotations"):
        entries = content.get(name) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"{path} is not in COCO's format: it needs the lists `images` and `annotations`")
    return content


def run_lengths(annotation: dict, height: int, width: int) -> str:
    """Return the compressed run lengths of a polygon or RLE, "" for crowds and objects without a shape.

    Raises ValueError for mistakes that pycocotools does not check for.
    """
    shape = annotation.get("segmentation")
    if annotation.get("iscrowd") or not shape:
        return ""
    if min(height, width) < 1:
        raise ValueError(f"its image is said to have {width} x {height} pixels")
    if isinstance(shape, list):
        # fewer than three corners have no area; pycocotools would read four numbers as a box
        polygons = [polygon for polygon in shape if len(polygon) >= 6]
        if not polygons:
            return ""
        if not all(np.abs(np.array(polygon, float)).max() <= LARGEST for polygon in polygons):
            raise ValueError("a corner of its shape is no number, or far outside of the image")
        return coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))["counts"].decode()
    counts = shape["counts"]
    if shape["size"] != [height, width]:
        raise ValueError(f"its mask is {shape['size']}, the image {[height, width]} (height, width)")
    if isinstance(counts, str):
        return counts
    if min(counts) < 0 or sum(counts) != height * width:
        raise ValueError("its run lengths do not add up to its image")
    return coco_mask.frPyObjects(shape, height, width)["counts"].decode()
