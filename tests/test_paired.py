"""Finding pairs, splitting by source, crops that treat both sides alike, and blur on the fly."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from ldm.data import paired
from ldm.data.crop import Crop, at_least, sharpness
from ldm.data.dead_leaves import DeadLeaves
from ldm.data.image import photographs, read_image, to_tensor, write_image
from ldm.data.paired import BlurDataset, ConcatSource, ImageFiles, MixedDataset, PairedDataset
from ldm.data.pairs import Pair, find_pairs, match_folders, sharp_pairs, split_pairs
from ldm.data.stream import SampleStream, item_seed
from ldm.modules.image_degradation.blur import BLUR_TYPES


def picture(path: Path, seed: int = 0, height: int = 24, width: int = 32) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
    return path


def names(pairs: list[Pair], root: Path) -> list[tuple[str, str]]:
    return [(p.blurry.relative_to(root).as_posix(), p.sharp.relative_to(root).as_posix()) for p in pairs]


# ---- finding -----------------------------------------------------------------------------------------------


def test_two_folders_are_matched_by_stem_in_natural_order(tmp_path):
    for number in (10, 9, 1):
        picture(tmp_path / "in" / f"{number}.png")
        picture(tmp_path / "out" / f"{number}.bmp").rename(tmp_path / "out" / f"{number}.webp")
    pairs = find_pairs(tmp_path / "in", tmp_path / "out")
    assert names(pairs, tmp_path) == [(f"in/{n}.png", f"out/{n}.webp") for n in (1, 9, 10)]
    assert [pair.group for pair in pairs] == ["1", "9", "10"]


def test_subfolders_are_matched_by_path_and_become_groups(tmp_path):
    for side in ("in", "out"):
        for name in ("a/1.png", "a/2.png", "b/1.png"):
            picture(tmp_path / side / name)
    pairs = find_pairs(tmp_path / "in", tmp_path / "out")
    assert names(pairs, tmp_path) == [(f"in/{n}", f"out/{n}") for n in ("a/1.png", "a/2.png", "b/1.png")]
    assert [pair.group for pair in pairs] == ["a", "a", "b"]


def test_missing_counterpart_raises_with_its_name(tmp_path):
    for name in ("in/1.png", "in/2.png", "out/1.png", "out/3.png"):
        picture(tmp_path / name)
    with pytest.raises(ValueError, match="without a counterpart: .*in/2.png, .*out/3.png"):
        find_pairs(tmp_path / "in", tmp_path / "out")
    picture(tmp_path / "in" / "1.bmp")
    with pytest.raises(ValueError, match="two images of one name.*1.bmp and 1.png|1.png and 1.bmp"):
        match_folders(tmp_path / "in", tmp_path / "out")


def test_gopro_tree_is_found(tmp_path):
    for part, sequence, frames in (
        ("train", "GOPR10_00", (2, 10)),
        ("train", "GOPR9_00", (1,)),
        ("test", "G", (1,)),
    ):
        for kind in ("blur", "blur_gamma", "sharp"):
            for frame in frames:
                picture(tmp_path / part / sequence / kind / f"{frame}.png")
    pairs = find_pairs(tmp_path / "train")
    expected = ["GOPR9_00/{}/1.png", "GOPR10_00/{}/2.png", "GOPR10_00/{}/10.png"]
    assert names(pairs, tmp_path / "train") == [(n.format("blur"), n.format("sharp")) for n in expected]
    assert [pair.group for pair in pairs] == ["GOPR9_00", "GOPR10_00", "GOPR10_00"]
    assert {pair.group for pair in find_pairs(tmp_path)} == {"train/GOPR9_00", "train/GOPR10_00", "test/G"}
    assert len(find_pairs(tmp_path / "test" / "G")) == 1  # a single sequence

    (tmp_path / "test" / "G" / "sharp" / "1.png").unlink()
    with pytest.raises(FileNotFoundError, match="no images.*test/G/sharp"):
        find_pairs(tmp_path)


def write_jsonl(folder: Path, lines: list) -> Path:
    file = folder / "blur_types.json"
    file.write_text(
        "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), encoding="utf-8"
    )
    return file


def test_jsonl_list_is_read(tmp_path):
    records = []
    for number in (10, 2):
        record = {"clear_image": f"清晰 的/c_{number}.png", "blur_image": f"blur images/b_{number}.png"}
        for name in record.values():
            picture(tmp_path / name)
        records.append(
            {**record, "blur_type": "lens_blur", "source": f"photo {number}.jpg", "parameters": {}}
        )
    file = write_jsonl(tmp_path, [records[0], "", records[1]])
    for pairs in (find_pairs(tmp_path), find_pairs(file)):
        assert names(pairs, tmp_path) == [(f"blur images/b_{n}.png", f"清晰 的/c_{n}.png") for n in (2, 10)]
        assert [pair.group for pair in pairs] == ["photo 2.jpg", "photo 10.jpg"]
        assert {pair.blur_type for pair in pairs} == {"lens_blur"}
    (tmp_path / "lists").mkdir()
    moved = file.rename(tmp_path / "lists" / "train.jsonl")
    assert len(find_pairs(moved, data_root=tmp_path)) == 2
    with pytest.raises(
        FileNotFoundError, match=r"train.jsonl:1: image not found: .*lists.blur images.b_10.png"
    ):
        find_pairs(moved)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"clear_image": "a.png", "blur_image": ', "blur_types.json:2: not a line of JSON"),
        ('{"clear_image": "a.png"}', "blur_types.json:2: expected an object with .*blur_image"),
        ('{"clear_image": "a.png", "blur_image": 3}', "blur_types.json:2: expected"),
        ('["a.png"]', "blur_types.json:2: expected an object"),
        (
            '{"clear_image": "a.png", "blur_image": "a.png", "blur_type": 3}',
            "json:2: blur_type must be a text",
        ),
        (
            '{"clear_image": "a.png", "blur_image": "a.png", "source": []}',
            "json:2: source must be a text",
        ),
        ('{"clear_image": "a.png", "blur_image": "no.png"}', "blur_types.json:2: image not found: .*no.png"),
    ],
)
def test_broken_jsonl_line_raises_with_its_number(tmp_path, line, message):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    write_jsonl(tmp_path, [{"clear_image": "a.png", "blur_image": "b.png"}, line])
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        find_pairs(tmp_path)


def test_list_with_tabs_spaces_and_quotes_is_read(tmp_path):
    for name in ("a/blur/1.png", "a/sharp/1.png", "模糊 图/2.png", "清晰 图/2.png", "x.png", "y.png"):
        picture(tmp_path / name)
    text = "# blurry sharp\nx.png y.png\n\n模糊 图/2.png\t清晰 图/2.png\r\n"
    text += '"模糊 图/2.png" "清晰 图/2.png"\na/blur/1.png   a/sharp/1.png\n'
    file = tmp_path / "pairs.txt"
    file.write_text(text, encoding="utf-8-sig")
    pairs = find_pairs(file)
    twice = ("模糊 图/2.png", "清晰 图/2.png")
    assert names(pairs, tmp_path) == [("a/blur/1.png", "a/sharp/1.png"), ("x.png", "y.png"), twice, twice]
    assert pairs[0].group == "a" and pairs[2].group == pairs[3].group != pairs[1].group


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x.png", "list.txt:2: expected two paths, got 1"),
        ("my x.png my y.png", "list.txt:2: expected two paths, got 4.*tab"),
        ('"x.png y.png', "list.txt:2: unexpected end of data"),
        ("x.png gone.png", "list.txt:2: image not found: .*gone.png"),
        (f"x.png {'x' * 5000}.png", "list.txt:2: image not found: "),
        (
            "sharp/1.png x.png",
            "sharp image comes first in .*list.txt:2, the blurry one in .*list.txt:1: a list",
        ),
    ],
)
def test_broken_list_line_raises_with_its_number(tmp_path, line, message):
    for name in ("x.png", "sharp/1.png"):
        picture(tmp_path / name)
    (tmp_path / "list.txt").write_text(f"x.png sharp/1.png\n{line}\n")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        find_pairs(tmp_path / "list.txt")


def test_missing_or_empty_data_set_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such data set: .*nowhere"):
        find_pairs(tmp_path / "nowhere")
    with pytest.raises(
        FileNotFoundError, match="no pairs in .*expected blur_types.json, or folders blur and sharp"
    ):
        find_pairs(tmp_path)
    (tmp_path / "in").mkdir()
    with pytest.raises(FileNotFoundError, match="no images.*in"):
        find_pairs(tmp_path / "in", tmp_path)
    (tmp_path / "list.txt").write_text("\n")
    with pytest.raises(FileNotFoundError, match="no pairs in .*list.txt"):
        find_pairs(tmp_path / "list.txt")
    (tmp_path / "photo.txt").write_bytes(b"\xff\xd8\xff\xe0 binary")
    with pytest.raises(ValueError, match="photo.txt is not text"):
        find_pairs(tmp_path / "photo.txt")


# ---- splitting ---------------------------------------------------------------------------------------------


def test_split_is_by_source_and_deterministic():
    pairs = [
        Pair(Path(f"b{g}_{i}"), Path(f"s{g}_{i}"), group=f"photo{g}") for g in range(20) for i in range(g + 1)
    ]
    training, held_out = split_pairs(pairs, 0.25, seed=1)
    groups = [{pair.group for pair in part} for part in (training, held_out)]
    assert not groups[0] & groups[1] and len(groups[1]) == 5
    assert sorted(training + held_out, key=pairs.index) == pairs
    assert split_pairs(pairs, 0.25, seed=1) == (training, held_out)
    assert split_pairs(pairs[::-1], 0.25, seed=1)[1] == held_out[::-1]  # independent of the list's order
    assert split_pairs(pairs, 0.25, seed=2)[1] != held_out
    assert split_pairs(pairs, 0, seed=1) == (pairs, [])
    assert {pair.group for pair in split_pairs(pairs, 0.001, seed=1)[1]} and split_pairs(pairs, 0.99, 1)[0]
    with pytest.raises(ValueError, match="one source, 'photo0'"):
        split_pairs(pairs[:1], 0.1, seed=1)
    with pytest.raises(ValueError, match="got 1.5"):
        split_pairs(pairs, 1.5, seed=1)


# ---- crops -------------------------------------------------------------------------------------------------


@pytest.fixture
def same_pairs(tmp_path) -> list[Pair]:
    """Write pairs whose blurry side is the inverted sharp one, so that both can be compared exactly."""
    pairs = []
    for seed in range(3):
        sharp = picture(tmp_path / f"sharp/{seed}.png", seed, 40, 56)
        (tmp_path / "blur").mkdir(exist_ok=True)
        write_image(tmp_path / f"blur/{seed}.png", 255 - read_image(sharp))
        pairs.append(Pair(tmp_path / f"blur/{seed}.png", sharp, "lens_blur", str(seed)))
    return pairs


def test_item_format_and_range(same_pairs):
    dataset = PairedDataset(same_pairs, size=16, seed=3)
    item = dataset[(2, 1)]
    assert set(item) == {"blurry", "sharp", "path", "blur_type", "seed"} and len(dataset) == 3
    for name in ("blurry", "sharp"):
        assert item[name].shape == (3, 16, 16) and item[name].dtype == torch.float32
        assert -1 <= item[name].min() < -0.9 and 0.9 < item[name].max() <= 1
    assert item["path"] == str(same_pairs[1].blurry) and item["blur_type"] == "lens_blur"
    assert item["seed"] == item_seed(3, (2, 1))
    centre = read_image(same_pairs[1].sharp)[12:28, 20:36]
    assert torch.equal(item["sharp"], to_tensor(centre))  # without augmentation: the center crop
    assert torch.equal(dataset[1]["sharp"], item["sharp"])


def test_both_sides_get_the_same_crop_flip_and_rotation(same_pairs):
    dataset = PairedDataset(same_pairs, size=16, seed=0, augment=True)
    whole, seen, corners = read_image(same_pairs[0].sharp), set(), set()
    for epoch in range(120):
        item = dataset[(epoch, 0)]
        assert torch.allclose(item["blurry"], -item["sharp"], atol=1e-6)
        crop = ((item["sharp"] + 1) * 127.5).round().numpy().transpose(1, 2, 0)
        for turns in range(4):
            for flip in (False, True):
                upright = np.rot90(crop, -turns)
                upright = (upright[:, ::-1] if flip else upright).astype(np.uint8)
                match = cv2.matchTemplate(whole, np.ascontiguousarray(upright), cv2.TM_SQDIFF)
                if match.min() == 0:
                    seen.add((turns, flip))
                    corners.add(np.unravel_index(match.argmin(), match.shape))
    assert len(seen) == 8 and len(corners) > 80  # every rotation and flip, at many positions
    assert max(y for y, _ in corners) > 20 and max(x for _, x in corners) > 36


def test_colour_jitter_is_the_same_affine_map_for_both_sides(same_pairs):
    plain = PairedDataset(same_pairs, size=16, seed=0)
    jittered = PairedDataset(same_pairs, size=16, seed=0, color_jitter=0.2)
    for epoch in range(5):
        before, after = plain[(epoch, 0)], jittered[(epoch, 0)]
        assert not torch.allclose(before["sharp"], after["sharp"], atol=0.02)
        matrix = paired.color_matrix(np.random.default_rng(item_seed(0, (epoch, 0))), 0.2)
        for name in ("blurry", "sharp"):
            pixels = (before[name] + 1).div(2).flatten(1).numpy()  # (3, n) in [0, 1]
            expected = (matrix[:, :3] @ pixels + matrix[:, 3:]).clip(0, 1)
            assert np.abs(expected - (after[name] + 1).div(2).flatten(1).numpy()).max() < 1 / 255  # one level
    strengths = [
        np.abs(paired.color_matrix(np.random.default_rng(s), 0.0) - np.eye(3, 4)).max() for s in range(3)
    ]
    assert max(strengths) < 1e-12


def test_small_images_are_scaled_up_not_padded(tmp_path):
    for side in ("blur", "sharp"):
        (tmp_path / side).mkdir()
        write_image(tmp_path / side / "1.png", np.full((10, 30, 3), 200, np.uint8))
    item = PairedDataset(find_pairs(tmp_path), size=24, seed=0, augment=True)[0]
    assert item["sharp"].shape == (3, 24, 24)
    assert torch.allclose(item["sharp"], torch.full((3, 24, 24), 200 / 127.5 - 1))
    photo = np.zeros((50, 21, 3), np.uint8)
    assert at_least(photo, 64).shape == (152, 64, 3) and at_least(photo, 21) is photo


def test_items_do_not_depend_on_workers_or_resuming(same_pairs):
    dataset = PairedDataset(same_pairs, size=16, seed=0, augment=True, color_jitter=0.1)

    def batches(workers: int, start: int = 0) -> list[torch.Tensor]:
        stream = SampleStream(len(dataset), seed=0, start=start, total=8)
        return [b["blurry"] for b in DataLoader(dataset, batch_size=2, sampler=stream, num_workers=workers)]

    whole = batches(0)
    assert all(torch.equal(a, b) for a, b in zip(whole, batches(2), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], batches(0, start=4), strict=True))
    assert not torch.equal(dataset[(0, 1)]["sharp"], dataset[(1, 1)]["sharp"])


def test_cached_items_are_equal_and_read_once(same_pairs):
    plain = PairedDataset(same_pairs, size=16, seed=0, augment=True)
    cached = PairedDataset(same_pairs, size=16, seed=0, augment=True, cache=True)
    expected = [plain[(1, index)] for index in range(3)]
    for pair in same_pairs:
        pair.blurry.unlink()
        pair.sharp.unlink()
    for index in range(3):
        assert torch.equal(cached[(1, index)]["blurry"], expected[index]["blurry"])
        assert torch.equal(cached[(1, index)]["blurry"], expected[index]["blurry"])  # cache not modified


def test_bad_pairs_raise(same_pairs, tmp_path):
    picture(same_pairs[1].blurry, 0, 40, 57)
    dataset = PairedDataset(same_pairs, size=16, seed=0)
    with pytest.raises(ValueError, match=r"differ in size: .*blur/1.png is 57x40, .*sharp/1.png is 56x40"):
        dataset[1]
    same_pairs[2].sharp.write_text("no picture")
    with pytest.raises(ValueError, match="cannot read image .*sharp/2.png"):
        dataset[2]
    cached = PairedDataset(same_pairs, size=16, seed=0, cache=True)
    assert torch.equal(cached[0]["sharp"], dataset[0]["sharp"])
    with pytest.raises(ValueError, match="cannot read image .*sharp/2.png"):
        cached[2]
    with pytest.raises(ValueError, match="empty"):
        PairedDataset([], size=16, seed=0)
    with pytest.raises(ValueError, match="crop size"):
        PairedDataset(same_pairs, size=0, seed=0)


# ---- blur on the fly ---------------------------------------------------------------------------------------


def test_blur_on_the_fly_has_pair_format_and_new_blur_each_epoch():
    dataset = BlurDataset(photographs(), size=48, seed=0)
    assert len(dataset) == len(photographs())
    first, again, later = dataset[(0, 2)], dataset[2], dataset[(1, 2)]
    assert set(first) == {"blurry", "sharp", "path", "blur_type", "seed"}
    assert torch.equal(first["blurry"], again["blurry"])
    assert torch.equal(first["sharp"], later["sharp"]) and not torch.equal(first["blurry"], later["blurry"])
    assert first["path"] == str(photographs()[2])
    assert {dataset[(epoch, 0)]["blur_type"] for epoch in range(40)} == {*BLUR_TYPES}


def test_blur_on_the_fly_stays_aligned_after_flips_and_rotations(monkeypatch):
    monkeypatch.setattr(paired, "BLUR_NAMES", ("defocus_blur",))
    dataset = BlurDataset(photographs(("chelsea.png",)), 96, 0, augment=True, scale=0.4, noise=0)
    for epoch in range(10):
        item = dataset[(epoch, 0)]
        sharp, blurry = item["sharp"].flatten(), item["blurry"].flatten()
        assert torch.corrcoef(torch.stack([sharp, blurry]))[0, 1] > 0.97
        turned = item["blurry"].rot90(1, (1, 2)).flatten()
        assert torch.corrcoef(torch.stack([sharp, turned]))[0, 1] < 0.9


def test_blur_of_a_crop_includes_light_from_outside():
    """Blurring a crop equals cropping the blurred larger image."""
    image = np.zeros((128, 128, 3), np.uint8)
    image[:, :38] = 255  # ends 2 pixels left of the crop
    crop = Crop(40, 40, 48, 48)
    sharp = crop.cut(image)
    blurry, blur_type, drawn = paired.blur_crop(
        image, crop, np.random.default_rng(0), ["gaussian_blur"], noise=0
    )
    assert blurry.shape == sharp.shape == (48, 48, 3) and blur_type == "gaussian_blur" and drawn["sigma"] > 1
    assert sharp.max() == 0 and blurry[:, 0].min() > 60  # light from outside the crop
    assert blurry[:, -1].max() == 0
    alone = paired.blur_crop(sharp, Crop(0, 0, 48, 48), np.random.default_rng(0), ["gaussian_blur"], noise=0)
    assert alone[0].max() == 0


def test_sharp_images_of_a_tree_or_folder_are_found(tmp_path):
    picture = np.zeros((8, 8, 3), np.uint8)
    for name in ("GOPR1/sharp/1.png", "GOPR1/blur/1.png", "GOPR1/sharp/2.png", "GOPR2/sharp/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_image(tmp_path / name, picture)
    found = sharp_pairs(tmp_path)
    assert [pair.sharp.relative_to(tmp_path).as_posix() for pair in found] == [
        "GOPR1/sharp/1.png",
        "GOPR1/sharp/2.png",
        "GOPR2/sharp/1.png",
    ]
    assert all(pair.blurry == pair.sharp for pair in found)
    assert [Path(pair.group).name for pair in found] == ["GOPR1", "GOPR1", "GOPR2"]
    (tmp_path / "GOPR1/sharp/more").mkdir()
    write_image(tmp_path / "GOPR1/sharp/more/3.png", picture)
    found = sharp_pairs(tmp_path / "GOPR1" / "sharp")  # the folder itself may have that name
    assert [pair.sharp.name for pair in found] == ["1.png", "2.png", "3.png"]
    assert len({pair.group for pair in found}) == 3
    assert sharp_pairs(None) == []


# ---- the recipe --------------------------------------------------------------------------------------------


def test_sources_are_mixed_by_ratio():
    leaves = DeadLeaves(24, 4, seed=0)
    both = ConcatSource((ImageFiles(photographs()), 3), (leaves, 1))
    assert len(both) == 3 * len(photographs()) + 4
    assert [both.name(index) for index in range(3)] == [str(photographs()[0])] * 3
    assert both.name((2, len(both) - 1)) == "dead leaves (2, 3)"
    assert np.array_equal(both[5, len(both) - 1], leaves[5, 3])
    dataset = BlurDataset(both, size=32, seed=0, augment=True)
    crops = [dataset[(0, index)]["sharp"] for index in range(3)]
    assert not torch.equal(crops[0], crops[1])  # different crops of the same photograph


def test_sharpest_candidate_crop_is_chosen(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 128, 3), dtype=np.uint8)
    write_image(tmp_path / "half.png", np.where(np.arange(128)[:, None] < 64, noise, 128).astype(np.uint8))
    assert sharpness(noise) > 1000 and sharpness(noise * 0 + 9) == 0

    def in_focus(candidates: int) -> float:
        dataset = BlurDataset([tmp_path / "half.png"], 32, 0, augment=True, candidates=candidates)
        return np.mean([dataset[(epoch, 0)]["sharp"].std().item() > 0.1 for epoch in range(40)])

    assert in_focus(1) < 0.85 < 0.99 < in_focus(8)


def test_lens_vignetting_of_a_crop_can_be_disabled(monkeypatch):
    monkeypatch.setattr(paired, "BLUR_NAMES", ("lens_blur",))
    flat = np.full((80, 80, 3), 200, np.uint8)
    source = [Path("flat.png")]

    def darkest(**options) -> float:
        images = ImageFiles(source)
        images.images = {source[0]: flat}
        dataset = BlurDataset(images, 48, 0, noise=0, **options)
        return min(dataset[(epoch, 0)]["blurry"].min().item() for epoch in range(8))

    level = 200 / 127.5 - 1
    assert darkest(field=(0.0, 0.0)) == pytest.approx(level, abs=0.01) and darkest() < level - 0.02


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_real_pairs_are_mixed_in_by_fraction(same_pairs, fraction):
    photos = BlurDataset([Path(path) for path in photographs()] * 50, 16, seed=0)
    mixed = MixedDataset(photos, PairedDataset(same_pairs, 16, seed=0, augment=True), fraction)
    assert len(mixed) == len(photos)
    real = [mixed[(0, index)] for index in range(40)]
    taken = [item for item in real if item["path"].startswith(str(same_pairs[0].blurry.parent))]
    assert len(taken) == pytest.approx(40 * fraction, abs=9)
    assert len({item["path"] for item in taken}) in (0, 3)
    for item in taken[:5]:
        assert torch.allclose(item["blurry"], -item["sharp"], atol=0.01)  # both sides have the same crop
    again = mixed[(0, 7)]
    assert torch.equal(again["blurry"], real[7]["blurry"])  # a pure function of the key
