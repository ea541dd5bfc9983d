"""tool_check_pairs.py finds each kind of defect in a data set of pairs, and none in a clean one."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

import tool_check_pairs
from ldm.data.image import photographs, read_image, write_image
from ldm.data.scenes import split_of
from tool_check_pairs import CERTAIN, KINDS, Settings, main

SCENES = {  # photo -> split
    "astronaut": "train",
    "chelsea": "train",
    "coffee": "train",
    "rocket": "test",
    "motorcycle_left": "test",
}


def path_of(root: Path, scene: str, side: str, frame: int = 1) -> Path:
    return root / SCENES.get(scene, "train") / scene / side / f"{frame:06}.png"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Write a GoPro tree with a frame per scene; one scene has a second, nearly identical one."""
    folder = tmp_path_factory.mktemp("made")
    for path in photographs():
        if path.stem in SCENES:
            sharp = read_image(path)[20:260, 60:360]
            write_pair(folder, path.stem, sharp)
            if path.stem == "coffee":
                near = np.clip(sharp.astype(int) + 1, 0, 255).astype(np.uint8)
                write_pair(folder, path.stem, near, 2)
    return folder


@pytest.fixture
def root(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "data"))


def write_pair(root: Path, scene: str, sharp: np.ndarray, frame: int = 1) -> None:
    blurry = cv2.GaussianBlur(sharp, (0, 0), 2)
    for side, image in (("blur", blurry), ("sharp", sharp)):
        path_of(root, scene, side, frame).parent.mkdir(parents=True, exist_ok=True)
        write_image(path_of(root, scene, side, frame), image)


def run(root: Path, **options) -> dict[str, dict]:
    """Run the tool, check the error's count of pairs, and return the rows of pairs.csv by scene/frame."""
    output = root.parent / "out"
    certain = 0
    try:
        main(Settings(root, output_dir=output, **options))
    except ValueError as error:
        assert "pairs are certainly wrong" in str(error)
        certain = int(str(error).split()[0])
    with open(output / "pairs.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = {f"{row['scene']}/{Path(row['blurry']).stem[-1]}": row for row in rows}
    assert sum(bool({*row["findings"].split("; ")} & {*CERTAIN}) for row in rows) == certain
    return found


def findings(rows: dict[str, dict]) -> dict[str, str]:
    return {name: row["findings"] for name, row in rows.items() if row["findings"]}


def test_clean_data_set_has_no_findings(root, capsys):
    rows = run(root)
    assert len(rows) == 6 and findings(rows) == {}
    row = rows["coffee/1"]
    assert (row["split"], row["width"], row["height"]) == ("train", "300", "240")
    assert float(row["sharpness_ratio"]) < 0.9
    assert float(row["scale_percent"]) == pytest.approx(100, abs=0.1)
    printed = capsys.readouterr().out
    assert "6 pairs, 6 without findings" in printed
    assert all(f"  {kind:20} 0\n" in printed for kind in KINDS)
    sheet = read_image(root.parent / "out" / "worst.jpg")
    assert sheet.shape == (6 * 240, 3 * 300 + 2 * 4, 3)


def change(root: Path, scene: str, side: str, edit) -> None:
    path = path_of(root, scene, side)
    write_image(path, edit(read_image(path)))


def zoomed(image: np.ndarray) -> np.ndarray:
    turn = cv2.getRotationMatrix2D((149.5, 119.5), 0, 1.02)
    return cv2.warpAffine(image, turn, (300, 240), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)


def swap(root: Path) -> None:
    blurry, sharp = (path_of(root, "chelsea", side) for side in ("blur", "sharp"))
    images = read_image(blurry), read_image(sharp)
    write_image(sharp, images[0])
    write_image(blurry, images[1])


DEFECTS = {
    "swapped": swap,
    "shifted": lambda root: change(root, "chelsea", "blur", lambda x: np.roll(x, (4, -3), axis=(0, 1))),
    "scaled": lambda root: change(root, "chelsea", "blur", zoomed),
    "colour shifted": lambda root: change(root, "chelsea", "blur", lambda x: cv2.add(x, (0, 0, 9, 0))),
    "equal sides": lambda root: change(
        root, "chelsea", "blur", lambda x: read_image(path_of(root, "chelsea", "sharp"))
    ),
    "sizes differ": lambda root: change(root, "chelsea", "blur", lambda x: x[:, 1:]),
    "unreadable": lambda root: path_of(root, "chelsea", "sharp").write_bytes(b"\x89PNG"),
}


@pytest.mark.parametrize("kind", DEFECTS)
def test_defect_in_one_pair_is_found(kind, root, capsys):
    DEFECTS[kind](root)
    rows = run(root)
    assert findings(rows) == {"chelsea/1": kind}
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"  1  train/chelsea/blur/000001.png  {kind}: ")
    assert f"  {kind:20} 1" in printed
    assert next(iter(rows)) == "chelsea/1"  # worst pair first
    if kind == "shifted":
        assert float(rows["chelsea/1"]["shift_x"]) == pytest.approx(-3, abs=0.1)
        assert float(rows["chelsea/1"]["shift_y"]) == pytest.approx(4, abs=0.1)
    if kind == "scaled":
        assert float(rows["chelsea/1"]["scale_percent"]) == pytest.approx(102, abs=0.1)
    if kind == "colour shifted":
        assert float(rows["chelsea/1"]["blue"]) > 8 and abs(float(rows["chelsea/1"]["red"])) < 0.5


def test_duplicates_are_found_at_other_sizes_but_not_among_similar_frames(root):
    sharp = read_image(path_of(root, "coffee", "sharp"))
    write_pair(root, "coffee", sharp, 3)  # equal pixels in one scene
    write_pair(root, "again", cv2.resize(read_image(path_of(root, "chelsea", "sharp")), (400, 320)))
    expected = {name: "duplicate" for name in ("coffee/1", "coffee/3", "again/1", "chelsea/1")}
    assert findings(run(root)) == expected


def test_leaks_between_splits_are_found(root, capsys):
    for number, scene in enumerate(("rocket", "chelsea")):  # leaks by content, then by scene name
        source = path_of(root, "rocket", "sharp") if scene == "rocket" else None
        image = read_image(source) if source else np.rot90(read_image(photographs()[0]))[:240, :300]
        for side, pixels in (("blur", cv2.GaussianBlur(image, (0, 0), 2 + number)), ("sharp", image)):
            folder = root / ("train/other" if scene == "rocket" else "test/chelsea") / side
            folder.mkdir(parents=True)
            write_image(folder / f"{7 + number:06}.png", np.ascontiguousarray(pixels))
    assert findings(run(root)) == {
        "rocket/1": "in two splits",
        "other/7": "in two splits",
        "chelsea/1": "scene in two splits",
        "chelsea/8": "scene in two splits",
    }
    assert "same image as train/other/blur/000007.png" in capsys.readouterr().out


def test_numbered_scenes_and_dark_images_are_not_reported(tmp_path):
    """REDS has a folder 000 in both train and val; nearly black frames are not duplicates of each other."""
    data = tmp_path / "data"
    for name, split in (("astronaut", "train"), ("coffee", "val")):
        image = read_image(photographs((f"{name}.png",))[0])[:200, :260]
        dark = np.random.default_rng(len(name)).integers(0, 3, image.shape, np.uint8)
        for number, sharp in enumerate((image, dark)):
            for side, pixels in (("blur", cv2.GaussianBlur(sharp, (0, 0), 2)), ("sharp", sharp)):
                folder = data / split / f"{split}_{side}" / "000"
                folder.mkdir(parents=True, exist_ok=True)
                write_image(folder / f"{number:08}.png", pixels)
    main(Settings(data, output_dir=tmp_path / "out"))
    with open(tmp_path / "out" / "pairs.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["split"] for row in rows} == {"train", "val"} and not any(row["findings"] for row in rows)
    assert [row["shift_x"] for row in rows].count("nan") == 2  # not measurable


def test_split_is_read_from_folder_names():
    paths = (
        "train/a/blur/1.png",
        "GoPro/val_blur/000/1.png",
        "test-close-ups/1.png",
        "a/reds_train_001/1.png",
    )
    assert [split_of(Path(path)) for path in paths] == ["train", "val", "test", ""]


def test_single_pair_list_separate_folders_and_truncated_table(root, tmp_path, capsys, monkeypatch):
    one = root / "train" / "chelsea"
    rows = run(one)
    assert len(rows) == 1 and findings(rows) == {}
    swap(root)
    sides = [path_of(root, "chelsea", side) for side in ("blur", "sharp")]
    listed = tmp_path / "list.jsonl"
    line = json.dumps({"clear_image": str(sides[1]), "blur_image": str(sides[0])})
    listed.write_text(f"{line}\n", encoding="utf-8")
    assert [*findings(run(listed)).values()] == ["swapped"]
    apart = run(root / "train" / "chelsea" / "blur", sharp_dir=root / "train" / "chelsea" / "sharp")
    assert [*findings(apart).values()] == ["swapped"]
    monkeypatch.setattr(tool_check_pairs, "SHIFT", -1.0)
    monkeypatch.setattr(tool_check_pairs, "LINES", 2)
    capsys.readouterr()
    run(root)
    assert "     and 4 more, in pairs.csv" in capsys.readouterr().out


def test_exit_code_of_defects_and_error_of_empty_folder(root, tmp_path):
    swap(root)
    command = [
        sys.executable,
        "tool_check_pairs.py",
        "--output_dir",
        str(tmp_path / "out"),
        "--data",
        str(root),
    ]
    place = Path(__file__).parent.parent
    wrong = subprocess.run(command, capture_output=True, text=True, cwd=place)
    assert wrong.returncode == 1 and "error: 1 of 6 pairs are certainly wrong (unreadable" in wrong.stderr
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no pairs in .*empty"):
        main(Settings(tmp_path / "empty", output_dir=tmp_path / "none"))
    assert not (tmp_path / "none").exists()
