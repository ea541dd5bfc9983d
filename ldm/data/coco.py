"""COCO annotations as flat arrays: read once, kept on disk beside the json file, shared by all workers.

A json of COCO's size (118,287 images, 860,000 objects) is gigabytes of Python objects, of which every worker
would end up with a copy. Here each object is the bytes of its run-length code, each caption its text.
"""

import json
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as coco_mask
from tqdm import tqdm

from ldm.checkpoint import read_metadata, read_weights, write_weights

FORMAT = "2"  # of the flat file; another number makes old files anew
LARGEST = 2**16  # pixels: pycocotools would take memory without end for shapes beyond


class CocoRecords:
    """The records of a COCO json by image: captions as bytes, or objects as compressed run lengths."""

    def __init__(self, path: str | Path, kind: str):
        """Read `path`, a json of `kind` "objects" or "captions", or its flat twin beside it if that is fresh.

        The twin is NAME.KIND.safetensors. On disk the arrays are memory-mapped, so that workers share them.
        Raises FileNotFoundError, or ValueError that names the file and what is wrong with it.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"annotation file not found: {path}")
        twin = path.with_name(f"{path.stem}.{kind}.safetensors")
        made_from = f"{FORMAT} {kind} {path.stat().st_size} {path.stat().st_mtime_ns}"
        if not _is_fresh(twin, made_from):
            arrays = flatten(read_json(path), RECORD_OF[kind], path)
            tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
            try:
                write_weights(twin, tensors, {"made_from": made_from})
            except OSError as error:
                warnings.warn(f"annotations are kept in memory, not on disk: {error}", stacklevel=2)
                self.arrays = arrays
                return
        self.arrays = {name: tensor.numpy() for name, tensor in read_weights(twin).items()}

    def rows(self, names: Iterable[str]) -> np.ndarray:
        """The image's row for each file name, -1 for those that the json does not name: int32."""
        texts = self.arrays["names"].view(f"S{self.arrays['names'].shape[1]}")[:, 0]
        numbers = {name: row for row, name in enumerate(texts.tolist())}
        return np.array([numbers.get(name.encode(), -1) for name in names], np.int32)

    def of(self, row: int) -> list[bytes]:
        """The records of one image; none for row -1."""
        if row < 0:
            return []
        first, end = self.arrays["first"][row : row + 2]
        starts = self.arrays["starts"]
        return [self.arrays["records"][starts[n] : starts[n + 1]].tobytes() for n in range(first, end)]

    def mask(self, row: int, record: bytes) -> np.ndarray:
        """An object's mask, uint8 (height, width) of 0 and 1."""
        return coco_mask.decode({"size": self.arrays["sizes"][row].tolist(), "counts": record})


def _is_fresh(twin: Path, made_from: str) -> bool:
    try:
        return twin.is_file() and read_metadata(twin).get("made_from") == made_from
    except ValueError:  # damaged: it is made anew
        return False


def read_json(path: Path) -> dict:
    """The json with COCO's two lists; ValueError that names the file and the place otherwise."""
    try:
        content = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{path} is not json: {place}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not json: {error}") from error
    lists = ("images", "annotations")
    if not isinstance(content, dict) or not all(isinstance(content.get(name), list) for name in lists):
        raise ValueError(f"{path} is not in COCO's format: it needs the lists `images` and `annotations`")
    return content


def flatten(content: dict, record_of: Callable[[dict, int, int], bytes], path: Path) -> dict[str, np.ndarray]:
    """The arrays of CocoRecords; annotations of images that are not listed are left out.

    `names` are the images' file names and `sizes` their heights and widths; `records` are joined bytes,
    `starts` where each one starts and the last one ends, `first` the first record of each image.
    """
    try:
        images = {image["id"]: n for n, image in enumerate(content["images"])}
        sizes = [(int(image.get("height", 0)), int(image.get("width", 0))) for image in content["images"]]
        names = [Path(image["file_name"]).name.encode() for image in content["images"]]
        owners = [images.get(annotation["image_id"], -1) for annotation in content["annotations"]]
        size_array = np.array(sizes, np.int32).reshape(-1, 2)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not in COCO's format: an entry has no {error}") from error
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path}: an entry cannot be read: {error}") from error
    records, counts = [], np.zeros(len(sizes) + 1, np.int64)
    for n in tqdm(np.argsort(owners, kind="stable"), f"reading {path.name}", unit="annotation", leave=False):
        annotation, owner = content["annotations"][n], owners[n]
        if owner < 0:
            continue
        try:
            record = record_of(annotation, *sizes[owner])
        except Exception as error:  # pycocotools raises bare Exceptions
            name = annotation.get("id", n)
            raise ValueError(f"{path}: annotation {name} cannot be read: {error!r}") from error
        if record:
            records.append(record)
            counts[owner + 1] += 1
    return {
        "names": np.array(names or [b"-"]).reshape(-1, 1).view(np.uint8),
        "sizes": size_array,
        "records": np.frombuffer(bytearray(b"".join(records) or b"-"), np.uint8),
        "starts": np.cumsum([0, *map(len, records)], dtype=np.int64),
        "first": np.cumsum(counts),
    }


def object_record(annotation: dict, height: int, width: int) -> bytes:
    """Compressed run lengths of a polygon or RLE; empty for crowds and for objects without a shape."""
    shape = annotation.get("segmentation")
    if annotation.get("iscrowd") or not shape:
        return b""
    if not 1 <= min(height, width) <= max(height, width) <= LARGEST:
        raise ValueError(f"its image is said to have {width} x {height} pixels")
    if isinstance(shape, dict):
        _check_runs(shape, height, width)
        code = coco_mask.frPyObjects(shape, height, width) if isinstance(shape["counts"], list) else shape
    else:
        polygons = [polygon for polygon in shape if len(polygon) >= 6]
        if not polygons:
            return b""
        if not all(np.abs(np.array(polygon, float)).max() <= LARGEST for polygon in polygons):
            raise ValueError("a corner of its shape is no number, or far outside of the image")
        code = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
    counts = code["counts"]
    return counts.encode() if isinstance(counts, str) else counts


def _check_runs(shape: dict, height: int, width: int) -> None:
    """Raise ValueError for run lengths that do not fit their image: pycocotools does not check them."""
    size = [int(side) for side in shape["size"]]
    if size != [height, width]:
        raise ValueError(f"its mask is {size}, the image {[height, width]} (height, width)")
    counts = shape["counts"]
    if isinstance(counts, list) and (min(counts) < 0 or sum(counts) != height * width):
        raise ValueError("its run lengths do not add up to its image")


def caption_record(annotation: dict, height: int, width: int) -> bytes:
    """The text of a caption."""
    return annotation["caption"].strip().encode()


RECORD_OF = {"objects": object_record, "captions": caption_record}
