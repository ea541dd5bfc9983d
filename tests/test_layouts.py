"""Layouts of data sets: every supported tree and list, scenes for the split, reversed pairs."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from ldm.data.image import photographs, read_image, write_image
from ldm.data.pairs import find_pairs, has_pairs, sharp_pairs, split_pairs
from ldm.data.scenes import place, scenes, side

PHOTOS = [read_image(path)[:96, :96] for path in photographs(("astronaut.png", "chelsea.png", "coffee.png"))]


def make(root: Path, *names: str) -> None:
    """Write a pair of images for each name, "BLURRY_PATH SHARP_PATH"."""
    for number, name in enumerate(names):
        blurry, sharp = name.split(" ")
        photo = PHOTOS[number % len(PHOTOS)]
        for path, image in ((blurry, cv2.GaussianBlur(photo, (0, 0), 3)), (sharp, photo)):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            write_image(root / path, image)


def found(root: Path, *arguments, **options) -> list[str]:
    pairs = find_pairs(*arguments, **options)
    return [f"{p.blurry.relative_to(root).as_posix()} {p.sharp.relative_to(root).as_posix()}" for p in pairs]


def check(root: Path, made: list[str], groups: list[str], source: Path | None = None, **options) -> None:
    """Check that these pairs and scenes are found in natural order, and that no split divides a scene."""
    source = source or root
    assert found(root, source, **options) == made
    pairs = find_pairs(source, **options)
    assert [pair.group for pair in pairs] == groups
    for seed in range(5):
        training, held_out = split_pairs(pairs, 0.3, seed)
        assert held_out and not {pair.group for pair in training} & {pair.group for pair in held_out}


# ---- trees -------------------------------------------------------------------------------------------------

TREES = {
    "realblur": [
        f"RealBlur-J_ECC_IMCORR_centroid_itensity_ref/scene00{s}/blur/blur_{n}.png "
        f"RealBlur-J_ECC_IMCORR_centroid_itensity_ref/scene00{s}/gt/gt_{n}.png"
        for s in (1, 2, 3)
        for n in (1, 2, 10)
    ],
    "gopro": [f"GOPR{s}_00/blur/{n:06}.png GOPR{s}_00/sharp/{n:06}.png" for s in (4, 10) for n in (47, 48)],
    "input_target": [
        f"train/input/GOPR{s}_00-{n:06}.png train/target/GOPR{s}_00-{n:06}.png"
        for s in (4, 10)
        for n in (1, 2)
    ],
    "rsblur": [
        f"{s}/00000{n}/real_blur/real_blur.png {s}/00000{n}/gt/gt.png" for s in ("01", "02") for n in (1, 2)
    ],
    "reds": [f"train_blur/{s}/{n}.png train_sharp/{s}/{n}.png" for s in ("000", "001") for n in (1, 2)],
    "dvd": [f"video_{s}/input/0{n}.png video_{s}/GT/0{n}.png" for s in (1, 2) for n in (1, 2)],
    "lq_gt": [
        f"lq/{s}_07_00_00004{n}.png gt/{s}_07_00_00004{n}.png" for s in ("0372", "0374") for n in (1, 2)
    ],
    "crops": [
        f"blur_crops/GOPR{s}_00_{n:06}_s00{c}.png sharp_crops/GOPR{s}_00_{n:06}_s00{c}.png"
        for s in (4, 10)
        for n in (1, 2)
        for c in (1, 2)
    ],
}
GROUPS = {
    "realblur": [
        f"RealBlur-J_ECC_IMCORR_centroid_itensity_ref/scene00{s}" for s in (1, 2, 3) for _ in range(3)
    ],
    "gopro": ["GOPR4_00"] * 2 + ["GOPR10_00"] * 2,
    "rsblur": ["01/000001", "01/000002", "02/000001", "02/000002"],
    "reds": ["000"] * 2 + ["001"] * 2,
    "dvd": ["video_1"] * 2 + ["video_2"] * 2,
    "input_target": ["train/GOPR4_00"] * 2 + ["train/GOPR10_00"] * 2,
    "lq_gt": ["0372_07_00"] * 2 + ["0374_07_00"] * 2,
    "crops": ["GOPR4_00"] * 4 + ["GOPR10_00"] * 4,
}


@pytest.mark.parametrize("layout", TREES)
def test_folder_trees(layout, tmp_path):
    make(tmp_path, *TREES[layout])
    check(tmp_path, TREES[layout], GROUPS[layout])
    assert has_pairs(tmp_path)
    alone = sharp_pairs(tmp_path)
    assert [f"{pair.sharp.relative_to(tmp_path).as_posix()}" for pair in alone] == [
        name.split(" ")[1] for name in TREES[layout]
    ]
    assert [pair.group for pair in alone] == GROUPS[layout]


def test_layout_of_the_srn_authors(tmp_path):
    """The folders are train/blur_lin and train/deblurred_lin, eval/blur and eval/deblur."""
    train = [f"train/blur_lin/{n}.png train/deblurred_lin/{n}.png" for n in (1, 2, 10)]
    held_out = [
        f"eval/blur/GOPR{s}_00_00000{n}.png eval/deblur/GOPR{s}_00_00000{n}.png"
        for s in (4, 10)
        for n in (1, 2)
    ]
    make(tmp_path, *train, *held_out)
    check(tmp_path, train, ["1", "2", "10"], tmp_path / "train")
    assert [pair.group for pair in find_pairs(tmp_path)] == [
        "eval/GOPR4_00",
        "eval/GOPR4_00",
        "eval/GOPR10_00",
        "eval/GOPR10_00",
        "train/1",
        "train/2",
        "train/10",
    ]
    assert found(tmp_path, tmp_path) == [*held_out, *train]
    assert [pair.sharp.parent.name for pair in sharp_pairs(tmp_path / "train")] == ["deblurred_lin"] * 3
    (tmp_path / "list.txt").write_text("\n".join(reversed(train)))  # in the format of SRN's data_list.py
    assert found(tmp_path, tmp_path / "list.txt") == train
    assert len({pair.group for pair in find_pairs(tmp_path / "list.txt")}) == 3


def test_restored_images_are_not_taken_for_sharp_ones(tmp_path):
    make(tmp_path, "input/1.png deblurred/1.png")
    with pytest.raises(FileNotFoundError, match="no pairs"):
        find_pairs(tmp_path)


def test_symlinks_and_tool_folders_are_skipped(tmp_path):
    """Each real folder is searched once, and folders of archivers and editors are not searched."""
    made = [f"GOPR{s}/blur/{n}.png GOPR{s}/sharp/{n}.png" for s in (1, 2) for n in (1, 2)]
    make(tmp_path, *made)
    (tmp_path / "GOPR1" / "again").symlink_to(tmp_path)
    (tmp_path / "a_link").symlink_to(tmp_path / "GOPR2")
    for name in ("__MACOSX", ".ipynb_checkpoints", "@eaDir"):
        make(tmp_path, f"{name}/blur/1.png {name}/sharp/1.png")
    pairs = find_pairs(tmp_path)
    assert (
        found(tmp_path, tmp_path) == made and [pair.group for pair in pairs] == ["GOPR1"] * 2 + ["GOPR2"] * 2
    )


def test_same_folder_for_both_sides_raises(tmp_path):
    make(tmp_path, "blur/1.png sharp/1.png", "real/1.png real/2.png")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for blurry, sharp in (("real", "real"), ("real", "link"), ("real", "blur/../real")):
        with pytest.raises(ValueError, match="the blurry and the sharp images are one folder, .*: give two"):
            find_pairs(tmp_path / blurry, tmp_path / sharp)
    (tmp_path / "tree").mkdir()
    for name in ("input", "target"):
        (tmp_path / "tree" / name).symlink_to(tmp_path / "real")
    with pytest.raises(ValueError, match="are one folder, .*target: give two"):
        find_pairs(tmp_path / "tree")


def test_hide_layout_with_one_folder_of_sharp_images(tmp_path):
    made = [
        f"test/test-close-ups/{n}fromGOPR{s}.MP4.png GT/{n}fromGOPR{s}.MP4.png"
        for n in (7, 9)
        for s in (1, 2)
    ]
    made += [f"test/test-long-shot/3fromGOPR{s}.MP4.png GT/3fromGOPR{s}.MP4.png" for s in (1, 2)]
    train = [f"train/{n}fromGOPR{s}.MP4.png GT/{n}fromGOPR{s}.MP4.png" for n in (1, 20) for s in (8, 9)]
    make(tmp_path, *made, *train)
    scenes_of = [f"GOPR{s}.MP4" for _ in range(5) for s in (1, 2)]
    check(tmp_path, train, ["GOPR8.MP4", "GOPR9.MP4"] * 2, tmp_path / "train")
    check(tmp_path, made[:4], scenes_of[:4], tmp_path / "test" / "test-close-ups")
    assert found(tmp_path, tmp_path / "test") == made
    assert found(tmp_path, tmp_path) == [*made, *train]
    empty = tmp_path / "empty"
    (empty / "target").mkdir(parents=True)  # a build folder, not one of sharp images
    make(empty, "photos/1.png photos/2.png")
    with pytest.raises(FileNotFoundError, match="no pairs in .*photos: expected"):
        find_pairs(empty / "photos")
    (tmp_path / "GT" / "7fromGOPR2.MP4.png").unlink()
    with pytest.raises(ValueError, match="without a counterpart: .*test-close-ups/7fromGOPR2.MP4.png"):
        find_pairs(tmp_path / "test")


def test_scene_without_sharp_folder_raises_with_its_name(tmp_path):
    make(tmp_path, *TREES["realblur"])
    gt = tmp_path / "RealBlur-J_ECC_IMCORR_centroid_itensity_ref" / "scene002" / "gt"
    gt.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="no folder of sharp images beside .*scene002/blur"):
        find_pairs(tmp_path)


def test_several_folders_of_one_side_raise(tmp_path):
    make(tmp_path, "blur/1.png sharp/1.png", "blur_crops/1.png sharp_crops/1.png")
    with pytest.raises(ValueError, match="several folders of one kind, blur, blur_crops, sharp, sharp_crops"):
        find_pairs(tmp_path)
    assert found(tmp_path, tmp_path / "blur", tmp_path / "sharp") == ["blur/1.png sharp/1.png"]


# ---- scenes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        ("GOPR4_00_000001 GOPR4_00_000002 GOPR10_1", "GOPR4_00 GOPR4_00 GOPR10"),
        ("a_1 a_2 b_1", "a a b"),
        ("IMG_1 IMG_2 DSC_7", "IMG_1 IMG_2 DSC_7"),  # camera names count all images
        ("20240101_120000 20240101_120107 PXL_20240101_5", "20240101_120000 20240101_120107 PXL_20240101_5"),
        ("frame_1 frame_2", "frame_1 frame_2"),  # one common word does not identify a scene
        ("scene1_1 scene1_2", "scene1 scene1"),
        ("0001_s001 0001_s002 0002_s001", "0001 0001 0002"),  # crops of one image
        ("000001 000002", "000001 000002"),
        ("seq/1 seq/2 other/1", "seq seq other"),
        ("train/1 train/2 test/1", "train/1 train/2 test/1"),
        (
            "train/GoPro/A4_00-1 train/GoPro/A4_00-2 test/HIDE/7fromG1",
            "train/GoPro/A4_00 train/GoPro/A4_00 test/HIDE/G1",
        ),
        ("RealBlur_J/s1-1 RealBlur_J/s1-2 RealBlur_J/s2-1", "RealBlur_J/s1 RealBlur_J/s1 RealBlur_J/s2"),
        (
            "GOPRO_Large/train/GOPR4/1 GOPRO_Large/train/GOPR4/2",
            "GOPRO_Large/train/GOPR4 GOPRO_Large/train/GOPR4",
        ),
        ("reds_train_001/1 train2017/1 train2017/2", "reds_train_001 train2017/1 train2017/2"),
        ("test-close-ups/3fromG1 test-close-ups/4fromG1", "test-close-ups/G1 test-close-ups/G1"),
    ],
)
def test_scenes_are_read_from_names(names, groups):
    assert scenes([place(Path(f"{name}.png")) for name in names.split()]) == groups.split()


def test_sides_are_read_from_whole_words():
    assert [side(name) for name in ("GT", "clear_images", "sharp_crops", "target")] == ["sharp"] * 4
    assert [side(name) for name in ("blur", "input", "lq", "blur_crops")] == ["blurry"] * 4
    assert [side(name) for name in ("blur_gamma", "deblur", "RealBlur_J", "sharp_and_blur", "7")] == [""] * 5
    assert str(place(Path("scene1/gt/gt_2.png"))) == "scene1/2"


# ---- lists -------------------------------------------------------------------------------------------------


def test_realblur_list_with_sharp_image_first(tmp_path):
    make(tmp_path, *TREES["realblur"])
    file = tmp_path / "RealBlur_J_train_list.txt"
    lines = [" ".join(reversed(name.split())) for name in TREES["realblur"]]
    file.write_text("\n".join(lines) + "\n")
    check(tmp_path, TREES["realblur"], ["scene001"] * 3 + ["scene002"] * 3 + ["scene003"] * 3, file)
    file.write_text("\n".join(f"{line} {number}" for number, line in enumerate(lines)))
    with pytest.raises(ValueError, match="list.txt:1: expected two paths, got 3"):
        find_pairs(file)


def test_reversed_pairs_are_detected_by_sharpness(tmp_path):
    made = [f"one/{n}.png two/{n}.png" for n in range(4)]
    make(tmp_path, *made)
    (tmp_path / "list.txt").write_text("\n".join(made))
    assert found(tmp_path, tmp_path / "list.txt") == made
    (tmp_path / "list.txt").write_text("\n".join(" ".join(reversed(name.split())) for name in made))
    with pytest.raises(
        ValueError, match="list.txt: the pairs are reversed: in 4 of 4 .*two/0.png than .*one/0.png"
    ):
        find_pairs(tmp_path / "list.txt")
    assert len(find_pairs(tmp_path / "one", tmp_path / "two")) == 4
    with pytest.raises(ValueError, match="two: the pairs are reversed"):
        find_pairs(tmp_path / "two", tmp_path / "one")
    assert find_pairs(tmp_path / "two", tmp_path / "one", blurred=False)  # degradation that adds detail


def test_noise_is_not_taken_for_sharpness(tmp_path):
    rng = np.random.default_rng(0)
    for number, photo in enumerate(PHOTOS):
        blurry = cv2.GaussianBlur(photo, (0, 0), 2) + rng.normal(0, 8, photo.shape)
        for folder, image in (("one", blurry.clip(0, 255).astype(np.uint8)), ("two", photo)):
            (tmp_path / folder).mkdir(exist_ok=True)
            write_image(tmp_path / folder / f"{number}.png", image)
    assert len(find_pairs(tmp_path / "one", tmp_path / "two")) == 3


def test_contradictory_names_raise(tmp_path):
    make(tmp_path, "blur/1.png sharp/1.png")
    with pytest.raises(ValueError, match="sharp: the pairs are reversed"):
        find_pairs(tmp_path / "sharp", tmp_path / "blur")
    make(tmp_path, "blur/2.png gt/2.png")
    (tmp_path / "list.txt").write_text("blur/1.png sharp/1.png\ngt/2.png blur/2.png\n")
    with pytest.raises(ValueError, match="sharp image comes first in .*list.txt:2, the blurry one in .*:1"):
        find_pairs(tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text("sharp/1.png gt/2.png\n")
    with pytest.raises(ValueError, match="list.txt:1: both columns are sharp images by their names"):
        find_pairs(tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text("blur/1.png blur/1.png\n")
    with pytest.raises(ValueError, match="list.txt:1: both columns are blurry|list.txt:1: .*are one file"):
        find_pairs(tmp_path / "list.txt")


def test_list_paths_are_relative_to_list_or_working_directory(tmp_path, monkeypatch):
    made = [f"DataSet/train/blur/{n}.png DataSet/train/sharp/{n}.png" for n in (1, 2)]
    make(tmp_path, *made)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lists").mkdir()
    for text in ("\n".join(f"./{b} {tmp_path / s}" for b, s in map(str.split, made)), "\n".join(made)):
        (tmp_path / "lists" / "train.txt").write_text(text)
        pairs = find_pairs("lists/train.txt")
        assert [pair.sharp.resolve() for pair in pairs] == [tmp_path / name.split()[1] for name in made]
    make(tmp_path / "lists", *made)  # order: data_root, the list's folder, working directory
    assert {pair.blurry.parts[0] for pair in find_pairs("lists/train.txt")} == {"lists"}
    assert found(tmp_path, "lists/train.txt", data_root=tmp_path) == made


# ---- data set with blur_types.json -------------------------------------------------------------------------


def documents_set(root: Path, count: int = 4) -> Path:
    make(root, *(f"blur_images/blur_{n:06}.png clear_images/clear_{n:06}.png" for n in range(count)))
    lines = [
        {"clear_image": f"clear_{n:06}.png", "blur_image": f"blur_{n:06}.png", "blur_type": "motion_blur"}
        for n in range(count)
    ]
    (root / "blur_types.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root / "blur_types.json"


def test_file_names_in_json_are_found_in_the_image_folders(tmp_path, monkeypatch):
    root = tmp_path / "training" / "deblur_dataset"
    file = documents_set(root)
    made = [f"blur_images/blur_{n:06}.png clear_images/clear_{n:06}.png" for n in range(4)]
    check(root, made, [f"{n:06}" for n in range(4)])
    monkeypatch.chdir(tmp_path)
    pairs = find_pairs("blur_types.json", data_root="./training/deblur_dataset")  # found in data_root
    assert len(pairs) == 4 and {pair.blur_type for pair in pairs} == {"motion_blur"}
    file.rename(tmp_path / "blur_types.json")  # in the working directory
    assert len(find_pairs("blur_types.json", data_root="./training/deblur_dataset")) == 4
    with pytest.raises(FileNotFoundError, match="no such file: a.json, nor training/deblur_dataset/a.json"):
        find_pairs("a.json", data_root="./training/deblur_dataset")


def test_missing_file_names_in_json_raise(tmp_path):
    documents_set(tmp_path)
    for folder in ("blur_images", "clear_images"):
        write_image(tmp_path / folder / "same.png", PHOTOS[0])
    (tmp_path / "blur_types.json").write_text('{"clear_image": "same.png", "blur_image": "same.png"}\n')
    assert found(tmp_path, tmp_path) == ["blur_images/same.png clear_images/same.png"]
    (tmp_path / "clear_images").rename(tmp_path / "elsewhere")
    with pytest.raises(
        FileNotFoundError, match="json:1: image not found: .*same.png, nor .*clear_images/same.png"
    ):
        find_pairs(tmp_path)
