"""COCO annotations as flat arrays: read once, kept on disk beside the json file, shared by all workers.

A json of COCO's size (118,287 images, 860,000 objects) is gigabytes of Python objects, of which every worker
would end up with a copy. Here each object is the bytes of its run-length code, each caption its text.
"""

import json
import warnings
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ldm.checkpoint import read_metadata, read_weights, write_weights

LARGEST = 2**16  # pixels: pycocotools would take memory without end for shapes beyond
FORMAT = "1"  # of the flat file; another number makes old files anew


class CocoRecords:
    """What a COCO json says of each picture, in its order: byte strings, found by the file's name.

    Arrays: `names` and `records` (uint8) are joined texts, `name_starts` and `record_starts` (int64) where
    each one starts and the last one ends, `first` (int64) each image's first record, `sizes` (int32) height
    and width. On disk they are memory-mapped, so that workers and processes share one copy.
    """

    def __init__(self, path: str | Path, kind: str, cache: str | Path | None = None):
        """Read `path`, a json of `kind` "objects" or "captions", or its flat twin if that is fresh.

        The twin is `cache`, by default NAME.KIND.safetensors beside the json.
        Raises FileNotFoundError, or ValueError that names the file and what is wrong with it.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"annotation file not found: {path}")
        self.path = path
        self.file = Path(cache) if cache else path.with_name(f"{path.stem}.{kind}.safetensors")
        stat = path.stat()
        self.key = f"{FORMAT} {kind} {stat.st_size} {stat.st_mtime_ns}"
        self.arrays: dict[str, np.ndarray] = {}
        if not self._is_fresh():
            arrays = flatten(read_json(path), RECORD_OF[kind], path)
            try:
                tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
                write_weights(self.file, tensors, {"key": self.key})
            except OSError as error:
                warnings.warn(f"kept in memory, not on disk: {error}", stacklevel=2)
                self.file, self.arrays = None, arrays

    def _is_fresh(self) -> bool:
        try:
            return self.file.is_file() and read_metadata(self.file).get("key") == self.key
        except ValueError:  # damaged: it is made anew
            return False

    def __getitem__(self, name: str) -> np.ndarray:
        """One of the arrays, mapped into memory where it is first wanted."""
        if not self.arrays:
            self.arrays = {key: value.numpy() for key, value in read_weights(self.file).items()}
        return self.arrays[name]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "arrays": {} if self.file else self.arrays}

    def rows(self, names: Iterable[str]) -> np.ndarray:
        """The image's number for each file name, -1 for those that the json does not name: int32."""
        starts, text = self["name_starts"], self["names"].tobytes()
        known = {text[a:b]: n for n, (a, b) in enumerate(pairwise(starts.tolist()))}
        return np.array([known.get(name.encode(), -1) for name in names], np.int32)

    def of(self, row: int) -> list[bytes]:
        """The records of one image; none for row -1."""
        if row < 0:
            return []
        first, end = self["first"][row : row + 2]
        starts = self["record_starts"][first : end + 1].tolist()
        return [self["records"][a:b].tobytes() for a, b in pairwise(starts)]

    def mask(self, row: int, record: bytes) -> np.ndarray:
        """An object's mask, uint8 (height, width) of 0 and 1."""
        from pycocotools import mask as coco_mask  # here: only annotations need this package

        height, width = self["sizes"][row].tolist()
        return coco_mask.decode({"size": [height, width], "counts": record})


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
    """The arrays of CocoRecords; annotations of images that are not listed are left out."""
    try:
        images = {image["id"]: n for n, image in enumerate(content["images"])}
        sizes = [(int(image.get("height", 0)), int(image.get("width", 0))) for image in content["images"]]
        names = [Path(image["file_name"]).name for image in content["images"]]
        owners = [images.get(annotation["image_id"], -1) for annotation in content["annotations"]]
        places = np.array(sizes, np.int32).reshape(-1, 2)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not in COCO's format: an entry has no {error}") from error
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path}: an entry cannot be read: {error}") from error
    owners = np.array(owners, np.int64)
    order = np.argsort(owners, kind="stable")[(owners < 0).sum() :]
    records, counts = [], np.zeros(len(images) + 1, np.int64)
    for n in tqdm(order, f"reading {path.name}", unit="annotation", leave=False):
        annotation, owner = content["annotations"][n], owners[n]
        try:
            record = record_of(annotation, *sizes[owner])
        except Exception as error:  # pycocotools raises bare Exceptions
            name = annotation.get("id", n)
            raise ValueError(f"{path}: annotation {name} cannot be read: {error!r}") from error
        if record:
            records.append(record)
            counts[owner + 1] += 1
    return {
        "names": joined([name.encode() for name in names]),
        "name_starts": np.cumsum([0, *map(len, names)], dtype=np.int64),
        "records": joined(records),
        "record_starts": np.cumsum([0, *map(len, records)], dtype=np.int64),
        "first": np.cumsum(counts),
        "sizes": places,
    }


def joined(texts: list[bytes]) -> np.ndarray:
    """Texts as one uint8 array."""
    return np.frombuffer(bytearray(b"".join(texts) or b"\0"), np.uint8)


def object_record(annotation: dict, height: int, width: int) -> bytes:
    """The run-length code of a polygon or RLE; empty for crowds and for objects without a shape."""
    from pycocotools import mask as coco_mask

    shape = annotation.get("segmentation")
    if annotation.get("iscrowd") or not shape:
        return b""
    if height < 1 or width < 1:
        raise ValueError("its picture has no height and width")
    if max(height, width) > LARGEST:
        raise ValueError(f"its picture is said to have {width} x {height} pixels")
    if isinstance(shape, dict):
        size = [int(side) for side in shape["size"]]
        if size != [height, width]:
            raise ValueError(f"its mask is {size}, the picture {[height, width]} (height, width)")
        counts = shape["counts"]
        if isinstance(counts, list) and (min(counts) < 0 or sum(counts) != height * width):
            raise ValueError("its run lengths do not add up to its picture")
        code = coco_mask.frPyObjects(shape, height, width) if isinstance(shape["counts"], list) else shape
    else:
        polygons = [polygon for polygon in shape if len(polygon) >= 6]
        if not polygons:
            return b""
        if not all(np.abs(np.array(polygon, float)).max() <= LARGEST for polygon in polygons):
            raise ValueError("a corner of its shape is no number, or far outside of the picture")
        code = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
    counts = code["counts"]
    return counts.encode() if isinstance(counts, str) else counts


def caption_record(annotation: dict, height: int, width: int) -> bytes:
    """The text of a caption."""
    return annotation["caption"].strip().encode()


RECORD_OF = {"objects": object_record, "captions": caption_record}
