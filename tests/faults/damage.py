"""Randomly damaged files: images, lists, json, h5 and weights.

Each function changes a file in place and is listed under the expected outcome: "bad" must raise an error,
"odd" is unusual but valid and must be read, "either" may do one or the other.
"""

import json
import os
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from ldm import checkpoint

Damage = Callable[[Path, np.random.Generator], None]
MARKER = "executed"  # file that hostile code would write beside its checkpoint


# ---- any file --------------------------------------------------------------------------------------------


def truncated(path: Path, rng: np.random.Generator) -> None:
    content = path.read_bytes()
    end = max(3, int(len(content) * rng.uniform(0.02, 0.7)))
    while b"\n" in content[end - 1 : end + 1]:  # a list cut at a line break would be valid
        end -= 1
    path.write_bytes(content[:end])


def empty(path: Path, rng: np.random.Generator) -> None:
    path.write_bytes(b"")


def noise(path: Path, rng: np.random.Generator) -> None:
    path.write_bytes(rng.bytes(int(rng.integers(1, 5000))))


def text(path: Path, rng: np.random.Generator) -> None:
    path.write_text("<html><body>404 not found</body></html>\n")


def dangling_link(path: Path, rng: np.random.Generator) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def bytes_changed(path: Path, rng: np.random.Generator) -> None:
    content = bytearray(path.read_bytes())
    for place in rng.integers(len(content), size=int(rng.integers(1, 30))):
        content[place] = int(rng.integers(256))
    path.write_bytes(content)


def head_changed(path: Path, rng: np.random.Generator) -> None:
    """Change bytes in the first 200, where formats store their structure."""
    content = bytearray(path.read_bytes())
    for place in rng.integers(min(200, len(content)), size=int(rng.integers(1, 6))):
        content[place] = int(rng.integers(256))
    path.write_bytes(content)


ANY = {"bad": [truncated, empty, noise, text, dangling_link], "either": [bytes_changed, head_changed]}


# ---- images ----------------------------------------------------------------------------------------------


def png_of_size(width: int, height: int) -> Damage:
    """Return a function that writes a PNG with this size in its header and a few bytes of pixels."""

    def write(path: Path, rng: np.random.Generator) -> None:
        chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))]
        chunks += [(b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
        parts = [struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks]
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))

    write.__name__ = f"header_{width}x{height}"
    return write


def converted(name: str, mode: str, form: str, frames: int = 1, **options: object) -> Damage:
    """Return a function that converts an image to another mode and format under the same name."""

    def convert(path: Path, rng: np.random.Generator) -> None:
        with Image.open(path) as image:
            image = image.convert("L") if mode in ("I;16", "F") else image.convert(mode)
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
        if mode == "F":
            image = Image.fromarray(np.asarray(image).astype(np.float32) / 255)
        more = [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)] * (frames - 1)
        image.save(
            path, format=form, **({"save_all": True, "append_images": more} if more else {}), **options
        )

    convert.__name__ = name
    return convert


def turned(path: Path, rng: np.random.Generator) -> None:
    """Rotate the image by 90 degrees and set the EXIF tag that reverts it."""
    with Image.open(path) as image:
        image = image.convert("RGB").transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(path, format="JPEG", exif=exif)


PICTURE = {
    "bad": [*ANY["bad"], png_of_size(0, 40), png_of_size(60_000, 60_000), png_of_size(48, 56)],
    "either": ANY["either"],
    "odd": [
        converted("cmyk_jpeg", "CMYK", "JPEG"),
        converted("grey_16_bit", "I;16", "PNG"),
        converted("float_tiff", "F", "TIFF"),
        converted("palette", "P", "PNG"),
        converted("one_bit", "1", "PNG"),
        converted("grey_alpha", "LA", "PNG"),
        converted("transparent", "RGBA", "PNG"),
        converted("lab_tiff", "LAB", "TIFF"),
        converted("ycbcr_jpeg", "YCbCr", "JPEG", progressive=True),
        converted("animated_gif", "P", "GIF", frames=3),
        converted("animated_png", "RGB", "PNG", frames=3),
        converted("animated_webp", "RGB", "WEBP", frames=3, lossless=True),
        converted("pages_tiff", "RGB", "TIFF", frames=2),
        turned,
    ],
}


# ---- lists and json --------------------------------------------------------------------------------------


def line(name: str, content: str) -> Damage:
    """Return a function that replaces one line of a list by `content`."""

    def replace(path: Path, rng: np.random.Generator) -> None:
        lines = path.read_text().splitlines()
        lines[int(rng.integers(len(lines)))] = content
        path.write_text("\n".join(lines) + "\n", errors="surrogatepass")

    replace.__name__ = f"line_{name}"
    return replace


def utf16(path: Path, rng: np.random.Generator) -> None:
    path.write_bytes(path.read_text().encode("utf-16"))


RECORD = '{"blur_image": %s, "clear_image": %s}'
NOT_PAIRS = [line("missing", RECORD % ('"no.png"', '"no.png"')), line("null_byte", "a\0b c\0d")]
JSON_LINES = {
    "bad": [
        *(damage for damage in ANY["bad"]),
        *NOT_PAIRS,
        utf16,
        line("list", "[]"),
        line("null", "null"),
        line("number", RECORD % ("3", "[]")),
        line("cut", '{"blur_image": "blur'),
        line("long", RECORD % (f'"{"x" * 5000}"', '"a"')),
        line("surrogate", RECORD % ('"\\ud800"', '"\\ud800"')),
    ],
    "either": [bytes_changed],
}
LIST = {
    "bad": [
        *ANY["bad"],
        *NOT_PAIRS,
        utf16,
        line("one", "blur/1.png"),
        line("three", "a b c"),
        line("quote", '"a b'),
        line("long", "x" * 5000 + " y"),
    ],
    "either": [bytes_changed],
}
VALUES = [None, -1, 0, 1e30, 10**12, "x", "", [], {}, True, [[1]], [[0, 0, 1]], [["a"] * 6], float("nan")]


def value_changed(path: Path, rng: np.random.Generator) -> None:
    """Replace or delete one value of a json or json-lines file."""
    lines = path.read_text().splitlines() if _is_lines(path) else [path.read_text()]
    number = int(rng.integers(len(lines)))
    content = json.loads(lines[number])
    node = content
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = keys[int(rng.integers(len(keys)))]
        if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.8:
            node = node[key]
            continue
        if rng.random() < 0.2:
            del node[key]
        else:
            node[key] = VALUES[int(rng.integers(len(VALUES)))]
        break
    lines[number] = json.dumps(content)
    path.write_text("\n".join(lines) + "\n")


def _is_lines(path: Path) -> bool:
    try:
        json.loads(path.read_text())
        return False
    except json.JSONDecodeError:
        return True


JSON = {"bad": ANY["bad"], "either": [*[value_changed] * 6, bytes_changed, utf16]}
JSON_LINES["either"] = [value_changed] * 3 + JSON_LINES["either"]
TEXT = {"either": [*ANY["bad"][:4], *ANY["either"], utf16]}  # metrics.csv, which may be written again
YAML = {"bad": [empty, noise, text], "either": [truncated, bytes_changed, bytes_changed]}


CAPTION = {"bad": [utf16], "either": [*ANY["bad"], bytes_changed]}  # any other text is a caption


# ---- h5 --------------------------------------------------------------------------------------------------


def patches(name: str, change: Callable[[dict], None]) -> Damage:
    """Return a function that changes the content of a file of patches."""

    def rewrite(path: Path, rng: np.random.Generator) -> None:
        with h5py.File(path) as file:
            content = {key: file[key][:] if key in ("sharp", "blur") else 0 for key in file}
            about = dict(file.attrs)
        change(content)
        with h5py.File(path, "w") as file:
            for key, value in content.items():
                file[key] = value
            file.attrs.update(about)

    rewrite.__name__ = f"h5_{name}"
    return rewrite


H5 = {
    "bad": [
        *ANY["bad"],
        patches("no_blur", lambda c: c.pop("blur")),
        patches("float", lambda c: c.update(sharp=c["sharp"] / 255)),
        patches("grey", lambda c: c.update(sharp=c["sharp"][..., 0])),
        patches("none", lambda c: c.update(sharp=c["sharp"][:0], blur=c["blur"][:0])),
        patches("small", lambda c: c.update(sharp=c["sharp"][:, :8, :8], blur=c["blur"][:, :8, :8])),
        patches("fewer", lambda c: c.update(blur=c["blur"][:-1])),
        patches("scalar", lambda c: c.update(blur=3)),
    ],
    "either": ANY["either"],
}


# ---- weights ---------------------------------------------------------------------------------------------


class Hostile:
    """Object that runs a command when it is unpickled."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


def hostile_pickle(path: Path, rng: np.random.Generator) -> None:
    content = {"state_dict": Hostile(f"touch '{path.parent / MARKER}'")}
    if rng.random() < 0.5:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))


def rewrite_tensors(path: Path, change: Callable[[dict], None]) -> None:
    """Change the state dict in a file of weights of any format."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        weights = {name: value.clone() for name, value in checkpoint.read_weights(path).items()}
        change(weights)
        return save_file(weights, path, metadata)
    content = checkpoint.load(path, mmap=False)
    change(content.get("state_dict", content))
    torch.save(content, path)


def shape_changed(path: Path, rng: np.random.Generator) -> None:
    def change(weights: dict) -> None:
        name = _pick(weights, rng)
        weights[name] = torch.zeros(*weights[name].shape, 2)

    rewrite_tensors(path, change)


def tensor_missing(path: Path, rng: np.random.Generator) -> None:
    rewrite_tensors(path, lambda weights: weights.pop(_pick(weights, rng)))


def _pick(weights: dict, rng: np.random.Generator) -> str:
    names = [name for name, value in weights.items() if isinstance(value, torch.Tensor) and value.ndim > 1]
    return names[int(rng.integers(len(names)))]


def not_finite(path: Path, rng: np.random.Generator) -> None:
    def change(weights: dict) -> None:
        name = _pick(weights, rng)
        if weights[name].is_floating_point():
            weights[name] = torch.full_like(weights[name], float("nan"))

    rewrite_tensors(path, change)


def integers(path: Path, rng: np.random.Generator) -> None:
    def change(weights: dict) -> None:
        name = _pick(weights, rng)
        weights[name] = weights[name].to(torch.int32)

    rewrite_tensors(path, change)


def no_dictionary(path: Path, rng: np.random.Generator) -> None:
    contents = [[torch.zeros(3)], torch.zeros(3), {"state_dict": [1]}, {"a": 1}, {}, {3: torch.zeros(2)}]
    torch.save(contents[int(rng.integers(len(contents)))], path)


def other_file(path: Path, rng: np.random.Generator) -> None:
    """Write weights of an unknown network."""
    weights = {"lora_te.down": torch.zeros(4, 2), "layer.weight": torch.zeros(2, 2)}
    checkpoint.write_weights(path, weights)


def metadata_broken(path: Path, rng: np.random.Generator) -> None:
    if path.suffix == ".safetensors":
        names = ("settings", "flux_params", "ddconfig")
        save_file(checkpoint.read_weights(path), path, dict.fromkeys(names, '{"width": "x", '))
    else:
        part_missing(path, rng)


def part_missing(path: Path, rng: np.random.Generator) -> None:
    """Delete or replace one part of a checkpoint."""
    if path.suffix == ".safetensors":
        return tensor_missing(path, rng)
    content = checkpoint.load(path, mmap=False)
    name = list(content)[int(rng.integers(len(content)))]
    if rng.random() < 0.4:
        del content[name]
    else:
        content[name] = [None, "x", {}, [], 1.5][int(rng.integers(5))]
    torch.save(content, path)


WEIGHTS = {
    "bad": [
        *ANY["bad"],
        hostile_pickle,
        hostile_pickle,
        shape_changed,
        tensor_missing,
        no_dictionary,
        other_file,
    ],
    "either": [*ANY["either"], not_finite, integers, metadata_broken, part_missing, part_missing],
}
