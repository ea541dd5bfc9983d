"""The inpainting data set: masks, captions, COCO annotations as flat arrays."""

import json
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from torch.utils.data import DataLoader

from ldm.data.coco import CocoRecords
from ldm.data.crop import ScaledCrop
from ldm.data.image import photographs, read_image, write_image
from ldm.data.inpaint import CocoInpaintingDataset, make_hint

SIZE = (96, 128)  # image height, width


def encoded(y: int, x: int, h: int, w: int) -> np.ndarray:
    mask = np.zeros(SIZE, np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    return mask


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Write 4 images; polygons, both kinds of RLE, a crowd, an image without objects and a missing one."""
    folder = tmp_path_factory.mktemp("coco")
    (folder / "photos").mkdir()
    picture = read_image(photographs()[3])
    for n in range(4):
        write_image(folder / "photos" / f"{n}.png", picture[40 * n : 40 * n + SIZE[0], : SIZE[1]])
    names = ["0.png", "1.png", "2.png", "3.png", "missing.jpg"]
    images = [{"id": 7 * n + 3, "file_name": x, "height": 96, "width": 128} for n, x in enumerate(names)]
    polygon = [30.5, 20, 90, 25.25, 80, 80, 25, 60.5]
    packed = coco_mask.encode(encoded(30, 40, 40, 30))
    packed = {"size": packed["size"], "counts": packed["counts"].decode()}
    runs = {"size": [96, 128], "counts": [96 * 40 + 20, 40, 56, 40, 56, 40, 96 * 85 - 20]}
    runs["counts"][-1] = 96 * 128 - sum(runs["counts"][:-1])
    shapes = [
        (3, [polygon], 0),
        (3, [[10, 10, 50, 10, 50, 60], [70, 40, 120, 40, 120, 90, 70, 90]], 0),
        (10, packed, 0),
        (10, runs, 0),
        (10, packed, 1),
        (17, [], 0),
        (17, [[1, 2, 3, 4]], 0),
        (17, [[5, 5, 6, 5, 6, 6]], 0),
        (31, [polygon], 0),
        (999, [polygon], 0),
    ]
    annotations = [
        {"id": n, "image_id": i, "segmentation": s, "iscrowd": c} for n, (i, s, c) in enumerate(shapes)
    ]
    (folder / "instances.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    captions = [{"id": n, "image_id": 3, "caption": f" größe {n}.\n"} for n in range(5)]
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    return folder


def dataset(place: Path, **options) -> CocoInpaintingDataset:
    return CocoInpaintingDataset(place / "photos", **{"size": 64, **options})


def test_object_masks_equal_pycocotools(place, capsys):
    records, coco = CocoRecords(place / "instances.json", "objects"), COCO(place / "instances.json")
    rows = records.rows(["missing.jpg", "0.png", "1.png", "2.png", "3.png", "unknown.png"])
    assert rows.tolist() == [4, 0, 1, 2, 3, -1]
    for row, image in enumerate(coco.dataset["images"]):
        wanted = [a for a in coco.loadAnns(coco.getAnnIds(image["id"])) if not a["iscrowd"]]
        wanted = [coco.annToMask(a) for a in wanted if a["segmentation"] not in ([], [[1, 2, 3, 4]])]
        masks = [records.mask(row, record) for record in records.of(row)]
        assert len(masks) == len(wanted) == (2, 2, 1, 0, 1)[row]
        assert all(np.array_equal(a, b) for a, b in zip(masks, wanted, strict=True))
    assert records.of(-1) == []


def test_flat_file_is_reused_and_rebuilt_when_stale_or_damaged(place, tmp_path, monkeypatch):
    source = tmp_path / "a.json"
    source.write_text((place / "captions.json").read_text())
    assert CocoRecords(source, "captions").of(0)[4] == "größe 4."
    monkeypatch.setattr("ldm.data.coco.flatten", lambda *_: pytest.fail("read again"))
    again = CocoRecords(source, "captions")
    assert len(again.of(0)) == 5 and len(pickle.loads(pickle.dumps(again)).of(0)) == 5
    monkeypatch.undo()
    source.write_text(source.read_text().replace("00dfe", "00df"))
    assert CocoRecords(source, "captions").of(0)[0] == "größ 0."
    twin = tmp_path / "a.captions.safetensors"
    twin.write_bytes(twin.read_bytes()[:50])
    assert CocoRecords(source, "captions").of(0)[0] == "größ 0."
    twin.unlink()
    twin.mkdir()
    with pytest.warns(UserWarning, match="kept in memory"):
        assert len(CocoRecords(source, "captions").of(0)) == 5


@pytest.mark.parametrize("kind", ["rectangle", "irregular", "mixed", "object", "folder"])
def test_items_are_consistent_and_repeatable(place, tmp_path, kind):
    for n, value in enumerate((255, 128, 190)):
        mask = np.zeros((50, 90, 3), np.uint8)
        mask[10:30, 20 + n : 60] = value
        write_image(tmp_path / f"{n}.png", mask)
    options = {"ann_file": place / "instances.json", "mask_dir": tmp_path, "mask_type": kind}
    items = dataset(place, augment=True, **options)
    seen = set()
    for key in [(epoch, index) for epoch in range(8) for index in range(4)]:
        item, again = items[key], items[key]
        assert all(np.array_equal(item[name], again[name]) for name in item)
        assert item["jpg"].shape == item["hint"].shape == (64, 64, 3) and item["mask"].shape == (64, 64, 1)
        assert 0.1 <= item["mask"].mean() <= 0.3 and set(item["mask"].unique().tolist()) == {0, 1}
        hole = item["mask"][..., 0] == 1
        assert (item["hint"][hole] == -1).all()
        assert torch.equal(item["hint"][~hole], (item["jpg"][~hole] + 1) / 2)
        seen.add(item["mask"].numpy().tobytes())
    assert len(seen) > 8
    workers = DataLoader(items, 2, num_workers=2)
    assert torch.equal(
        torch.cat([b["mask"] for b in workers]), torch.stack([i["mask"] for i in items_of(items)])
    )


def items_of(items: CocoInpaintingDataset) -> list[dict]:
    return [items[n] for n in range(len(items))]


def test_object_mask_is_the_object_in_the_crop(place):
    """An object within the size limits is the hole: the COCO mask, scaled and cropped like the image."""
    items = dataset(place, ann_file=place / "instances.json", mask_ratio=(0.02, 0.9))
    coco = encoded(30, 40, 40, 30), encoded(20, 40, 40, 3)
    expected = [
        cv2.resize(mask[:, 16:112] * 255, (64, 64), interpolation=cv2.INTER_AREA) > 127 for mask in coco
    ]
    mask = items[1]["mask"][..., 0].numpy() > 0
    assert min((mask != other).mean() for other in expected) < 0.02
    assert 0.02 <= items[2]["mask"].mean() <= 0.9  # no usable object: a random hole


def test_captions_are_sampled_and_dropped(place):
    items = dataset(place, captions_file=place / "captions.json", prompt="a photo", prompt_dropout=0.5)
    texts = [items[(epoch, 0)]["txt"] for epoch in range(300)]
    assert set(texts) == {"", *(f"größe {n}." for n in range(5))}
    assert 0.4 < texts.count("") / 300 < 0.6 and min(map(texts.count, set(texts))) > 10
    assert {items[(epoch, 1)]["txt"] for epoch in range(20)} == {"", "a photo"}
    assert dataset(place, prompt="x", prompt_dropout=0.0)[0]["txt"] == "x"


def test_hint_follows_published_convention():
    """As for control_v11p_sd15_inpaint, pixels are in [0, 1], and -1 where the mask is above one half."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    mask = np.random.default_rng(1).uniform(size=(8, 8)).astype(np.float32)
    theirs = pixels.astype(np.float32) / 255
    theirs[mask > 0.5] = -1
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    hint = make_hint(image, torch.from_numpy(mask)[None, None])
    assert np.allclose(hint[0].permute(1, 2, 0), theirs, atol=1e-6)
    four = make_hint(image, torch.from_numpy(mask)[None, None], channels=4)
    assert torch.equal(four[:, :3], hint) and np.array_equal(four[0, 3], mask > 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 100}, "multiple of 64, not 100"),
        ({"mask_ratio": (0.5, 0.2)}, "mask ratio"),
        ({"mask_type": "object"}, "need ann_file"),
        ({"mask_type": "folder"}, "need mask_dir"),
        ({"mask_type": "round"}, "mask kind"),
        ({"ann_file": "none.json"}, "not found: none.json"),
        ({"mask_dir": "nowhere"}, "folder not found: nowhere"),
    ],
)
def test_bad_options_raise(place, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        dataset(place, **options)[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [}', "a.json is not json: .*line 1 column 13"),
        ("[1, 2]", "lists `images` and `annotations`"),
        (
            '{"images": [{"id": 1}], "annotations": []}',
            r"a.json: image 1 cannot be read: KeyError\('file_name'\)",
        ),
        (
            '{"images": [{"id": 1, "file_name": "x"}], "annotations": [{"id": 5}]}',
            r"annotation 5 .*KeyError\('image_id'\)",
        ),
        ('{"images": [{"id": 1, "file_name": "x"}], "annotations": []}', "names none of the 4 images"),
        (
            '{"images": [{"id": 1, "file_name": "0.png", "height": 9, "width": 9}],'
            '"annotations": [{"id": 5, "image_id": 1, "segmentation": {"size": [8, 9], "counts": [72]}}]}',
            "annotation 5 cannot be read",
        ),
        (
            '{"images": [{"id": 1, "file_name": "0.png"}],'
            '"annotations": [{"id": 5, "image_id": 1, "segmentation": [[1, 1, 5, 1, 5, 5]]}]}',
            "its image is said to have 0 x 0 pixels",
        ),
        (
            '{"images": [{"id": 1, "file_name": "0.png", "height": 9, "width": 1000000}],'
            '"annotations": [{"id": 5, "image_id": 1, "segmentation": [[1, 1, 5, 1, 5, 5]]}]}',
            "image 1 .*1000000 x 9 pixels",
        ),
        (
            '{"images": [{"id": 1, "file_name": "0.png", "height": 9, "width": 9e40}],'
            '"annotations": [{"id": 5, "image_id": 1, "segmentation": [[1, 1, 5, 1, 5, 5]]}]}',
            "a.json: image 1 cannot be read",
        ),
        (
            '{"images": [{"id": 1, "file_name": "0.png", "height": 9, "width": 9}],'
            '"annotations": [{"id": 5, "image_id": 1, "segmentation": [[1, 1, 5, 1, 5, 1e30]]}]}',
            "annotation 5 .*far outside of the image",
        ),
        (
            '{"images": [{"id": 1, "file_name": "0.png", "height": 9, "width": 9}],'
            '"annotations": [{"id": 5, "image_id": 1, "segmentation": [[1, 1, 5, 1, 5, NaN]]}]}',
            "annotation 5 .*is no number",
        ),
        (
            '{"images": [{"id": 1, "file_name": "0.png", "height": 8, "width": 9}],'
            '"annotations": [{"id": 5, "image_id": 1, "segmentation": "x"}]}',
            "a.json: annotation 5 cannot be read",
        ),
        ('{"images": [3], "annotations": []}', "a.json .*lists `images` and `annotations`"),
        (
            '{"images": [{"id": 1, "file_name": "0.png", "height": 8, "width": 9}],'
            '"annotations": [{"id": 5, "image_id": 1, "segmentation": {"size": [8, 9], "counts": [71]}}]}',
            "annotation 5 .*run lengths",
        ),
        (
            '{"images": [{"id": 1, "file_name": "0.png", "height": 8, "width": 9}],'
            '"annotations": [{"id": 5, "image_id": 1, "segmentation": {"size": [8, 9], "counts": [-1, 73]}}'
            "]}",
            "annotation 5 .*run lengths",
        ),
    ],
)
def test_broken_annotations_raise(place, tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        dataset(place, ann_file=tmp_path / "a.json")


def test_empty_folder_and_unreadable_image_raise(tmp_path):
    with pytest.raises(FileNotFoundError, match="no images"):
        CocoInpaintingDataset(tmp_path)
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="a.png"):
        CocoInpaintingDataset(tmp_path)[0]


def test_mask_gets_the_same_crop_as_its_photo(place, tmp_path):
    """One of two mask files beside the photo is used; the second has twice the size."""
    mask = np.zeros(SIZE, np.uint8)
    mask[40:80, 30:70] = 255
    write_image(tmp_path / "a.png", read_image(place / "photos" / "0.png"))
    write_image(tmp_path / "a_mask000.png", mask)
    write_image(tmp_path / "a_mask001.png", (255 - mask).repeat(2, 0).repeat(2, 1))
    options = {"mask_dir": tmp_path, "size": 64, "augment": True, "mask_ratio": (0.0, 1.0)}
    items = CocoInpaintingDataset(tmp_path, **options)
    assert len(items) == 1 and len(items.masks) == 2
    seen = set()
    for epoch in range(30):
        item = items[(epoch, 0)]
        crop = ScaledCrop.fit(SIZE, 64, np.random.default_rng(item["seed"]))
        hole = crop.cut_mask(mask // 255)
        same = (item["mask"][..., 0].numpy() == hole).mean()
        assert same < 0.02 or same > 0.98
        seen.add(round(same))
    assert seen == {0, 1}


@pytest.mark.parametrize("at", [(0, 0), (95, 127), (0, 127), (50, 60)])
@pytest.mark.parametrize("augment", [False, True])
def test_thin_hole_is_kept_in_the_crop(place, tmp_path, at, augment):
    mask = np.zeros((4 * SIZE[0], 4 * SIZE[1]), np.uint8)  # hole smaller than a pixel of the crop
    mask[4 * at[0], 4 * at[1]] = 255
    write_image(tmp_path / "0.png", mask)
    items = dataset(place, mask_dir=tmp_path, augment=augment, mask_ratio=(0.0, 0.3))
    for epoch in range(5):
        hole = items[(epoch, 0)]["mask"][..., 0].numpy()
        assert 1 <= hole.sum() <= 4
        if not augment and at in ((0, 0), (95, 127)):
            corner = hole[:2, :2] if at == (0, 0) else hole[-2:, -2:]
            assert corner.any()


@pytest.mark.parametrize("value", [0, 1])
def test_mask_without_hole_raises_with_its_name(place, tmp_path, value):
    write_image(tmp_path / "m.png", np.full(SIZE, value, np.uint8))
    with pytest.raises(ValueError, match=f"m.png.*brightest value .*is {value} of 255"):
        dataset(place, mask_dir=tmp_path)[0]
