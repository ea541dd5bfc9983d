import csv
import json

import cv2
import numpy as np
import pytest

import evaluate
from ldm.data.image import photographs, read_image, write_image
from ldm.metrics import psnr

STEMS = ("astronaut", "chelsea", "coffee", "rocket")


@pytest.fixture
def folders(tmp_path):
    """Write blurry, partly restored and sharp crops of photographs."""
    for name in ("blurry", "restored", "sharp"):
        (tmp_path / name).mkdir()
    for sigma, path in enumerate(photographs(), start=1):
        if path.stem in STEMS:
            sharp = read_image(path)[100:180, 100:200]
            write_image(tmp_path / "sharp" / f"{path.stem}.png", sharp)
            write_image(tmp_path / "blurry" / f"{path.stem}.png", cv2.GaussianBlur(sharp, (0, 0), sigma))
            restored = cv2.GaussianBlur(sharp, (0, 0), sigma / 2)
            write_image(tmp_path / "restored" / f"deblurred_{path.stem}_x.png", restored)
    return tmp_path


def settings(folder, **changes):
    names = {"restored": folder / "restored", "sharp": folder / "sharp", "blurry": folder / "blurry"}
    return evaluate.Settings(**{**names, "prefix": "deblurred_", "suffix": "_x", **changes})


def test_report_and_csv_agree(folders, capsys):
    chosen = settings(folders, output=folders / "report.json")
    evaluate.main(chosen)
    report = json.loads(chosen.output.read_text())
    assert report["pairs"] == {
        "found": 4,
        "used": 4,
        "skipped": {},
        "unmatched": {"restored": 0, "sharp": 0, "blurry": 0},
    }
    with open(folders / "report.csv") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert list(rows) == list(STEMS)
    for stem in STEMS:
        pair = folders / f"restored/deblurred_{stem}_x.png", folders / f"sharp/{stem}.png"
        assert float(rows[stem]["psnr"]) == psnr(*map(read_image, pair))
    for name in ("psnr", "ssim", "psnr_blurry", "ssim_blurry"):
        assert report[name] == pytest.approx(np.mean([float(row[name]) for row in rows.values()]))
    assert (
        report["psnr_gain"] == pytest.approx(report["psnr"] - report["psnr_blurry"])
        and report["psnr_gain"] > 1
    )
    assert report["worst"][0] == min(rows, key=lambda name: float(rows[name]["psnr"]))
    printed = capsys.readouterr().out
    assert "4 found, 4 used, 0 skipped" in printed and f"gain {report['psnr_gain']:+.3f} dB" in printed


def test_pairs_that_cannot_be_scored_are_reported(folders, capsys):
    write_image(folders / "sharp" / "coffee.png", np.zeros((20, 20, 3), np.uint8))
    (folders / "restored" / "deblurred_rocket_x.png").write_bytes(b"not a picture")
    (folders / "restored" / "deblurred_chelsea_x.png").unlink()
    evaluate.main(settings(folders, blurry=None))
    printed = capsys.readouterr().out
    assert "3 found, 1 used, 2 skipped; unmatched: 1 sharp" in printed
    assert "skipped coffee: images of different shapes" in printed
    assert "skipped rocket: cannot read image" in printed
    (folders / "sharp" / "rocket.png").unlink()
    (folders / "sharp" / "rocket.png").symlink_to("nowhere")
    evaluate.main(settings(folders, blurry=None))
    assert "1 used, 2 skipped" in capsys.readouterr().out
    (folders / "restored" / "deblurred_astronaut_x.png").unlink()
    with pytest.raises(ValueError, match="none of 2 pairs can be scored: .*different shapes"):
        evaluate.main(settings(folders, blurry=None))


def test_gopro_tree_is_matched_by_sequence_and_frame(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)
    for place in ("a/sharp/1", "b/sharp/1", "a/blur/1", "b/blur/1", "a/blur_gamma/1"):
        path = tmp_path / "test" / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_image(path, image)
    for place in ("a/blur/deblurred_1.png", "b/blur/deblurred_1.png"):
        path = tmp_path / "restored" / place
        path.parent.mkdir(parents=True)
        write_image(path, image // 2)
    tree = tmp_path / "test"
    chosen = evaluate.Settings(tmp_path / "restored", tree, tree, prefix="deblurred_")
    report, rows, files = evaluate.evaluate(chosen)
    assert report["pairs"]["used"] == 2 and set(files) == {"a/1", "b/1"}
    assert files["a/1"]["blurry"] == tree / "a/blur/1.png" and files["a/1"]["sharp"] == tree / "a/sharp/1.png"
    assert report["psnr_blurry"] == float("inf")


def test_generated_data_set_is_matched_by_number(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)
    made, restored = tmp_path / "made", tmp_path / "restored"
    for place in ("clear_images/clear_", "blur_images/blur_"):
        for number in range(2):
            (made / place).parent.mkdir(parents=True, exist_ok=True)
            write_image(made / f"{place}{number:06}.png", image)
    write_image(made / "preview.png", image)
    restored.mkdir()
    write_image(restored / "deblurred_blur_000001.png", image // 2)
    for sharp, blurry in ((made, made), (made / "clear_images", made / "blur_images")):
        chosen = evaluate.Settings(restored, sharp, blurry, prefix="deblurred_blur_")
        report, rows, files = evaluate.evaluate(chosen)
        assert set(files) == {"000001"} and report["pairs"]["unmatched"]["sharp"] == 1
        assert files["000001"]["blurry"] == made / "blur_images/blur_000001.png"
    (restored / "blur_images").mkdir()  # as infer.py --input made --pattern "blur_images/*" writes
    (restored / "deblurred_blur_000001.png").rename(restored / "blur_images/deblurred_blur_000001.png")
    assert set(evaluate.evaluate(evaluate.Settings(restored, made, prefix="deblurred_"))[2]) == {"000001"}


TREES = {
    "realblur": [(f"scene{s}/blur/blur_{n}.png", f"scene{s}/gt/gt_{n}.png") for s in (1, 2) for n in (1, 2)],
    "hide": [(f"test-close-ups/{n}fromG1.MP4.png", f"GT/{n}fromG1.MP4.png") for n in (1, 2)],
}


@pytest.mark.parametrize("layout", TREES)
def test_other_trees_are_matched_by_scene_and_frame(layout, tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)
    tree, restored = tmp_path / "tree", tmp_path / "restored"
    for blurry, sharp in TREES[layout]:
        made = (restored / blurry).with_name(f"deblurred_{blurry.split('/')[-1]}")
        for path, picture in ((tree / blurry, image // 2), (tree / sharp, image), (made, image // 2)):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_image(path, picture)
        spare = (restored / sharp).with_name(f"deblurred_{sharp.split('/')[-1]}")  # restored too
        spare.parent.mkdir(parents=True, exist_ok=True)
        write_image(spare, image)
    for blurry in (tree, tree / "test-close-ups") if layout == "hide" else (tree,):
        report, _, files = evaluate.evaluate(evaluate.Settings(restored, tree, blurry, prefix="deblurred_"))
        assert report["pairs"]["unmatched"] == {"restored": 0, "sharp": 0, "blurry": 0}
        found = [
            tuple(str(paths[kind].relative_to(tree)) for kind in ("blurry", "sharp"))
            for paths in files.values()
        ]
        assert sorted(found) == sorted(TREES[layout])
        assert report["psnr"] == report["psnr_blurry"] < 20


def test_additional_metrics_are_defined_in_report(folders, capsys):
    more = {"ssim3d": True, "y": True, "align": True}
    chosen = settings(folders, output=folders / "report.json", **more)
    evaluate.main(chosen)
    report, printed = json.loads(chosen.output.read_text()), capsys.readouterr().out
    names = ["psnr", "ssim", "ssim3d", "psnr_y", "ssim_y", "psnr_aligned", "ssim_aligned"]
    assert [*report["definitions"]] == names
    for name in names:
        assert report[f"{name}_gain"] == pytest.approx(report[name] - report[f"{name}_blurry"])
        assert f"{name.upper()}: " in printed  # its definition
    assert report["ssim3d"] > report["ssim"] and report["psnr_y"] > report["psnr"]
    with open(folders / "report.csv") as file:
        assert {"ssim3d", "ssim3d_blurry"} <= next(csv.DictReader(file)).keys()


def test_shift_and_zoom_are_reported_for_restored_and_blurry_images(folders, capsys):
    for path in photographs():
        if path.stem in STEMS:
            sharp = read_image(path)[40:240, 60:320]
            restored = np.roll(sharp, (1, 3), axis=(0, 1)) if path.stem != "rocket" else sharp * 0 + 9
            write_image(folders / "sharp" / f"{path.stem}.png", sharp)
            write_image(folders / "blurry" / f"{path.stem}.png", cv2.GaussianBlur(sharp, (0, 0), 2))
            write_image(folders / "restored" / f"deblurred_{path.stem}_x.png", restored)
    chosen = settings(folders, shift=True, output=folders / "report.json")
    evaluate.main(chosen)
    report = json.loads(chosen.output.read_text())
    assert report["shift_px"] == pytest.approx(np.hypot(1, 3), abs=0.1) and report["shift_px_blurry"] < 0.1
    assert report["scale_percent"] == pytest.approx(100, abs=0.1)
    with open(folders / "report.csv") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert float(rows["coffee"]["shift_x"]) == pytest.approx(3, abs=0.1)
    assert rows["rocket"]["shift_px"] == rows["rocket"]["scale_percent"] == "nan"  # not measurable
    assert "SHIFT_PX: distance in pixels" in capsys.readouterr().out


def test_infinite_psnr_of_equal_images_is_valid_json(folders):
    chosen = settings(folders, restored=folders / "sharp", prefix="", suffix="", output=folders / "r.json")
    evaluate.main(chosen)
    assert json.loads(chosen.output.read_text())["psnr"] == "inf"


def test_bad_input_raises(folders):
    with pytest.raises(
        ValueError, match="no names in common; the first ones are: restored deblurred_astronaut_x"
    ):
        evaluate.main(settings(folders, prefix="", suffix=""))
    with pytest.raises(ValueError, match="has the prefix 'other_'"):
        evaluate.main(settings(folders, prefix="other_"))
    with pytest.raises(FileNotFoundError, match="folder not found: .*missing"):
        evaluate.main(settings(folders, sharp=folders / "missing"))
    with pytest.raises(FileNotFoundError, match="folder not found: .*nowhere"):
        evaluate.main(settings(folders, output=folders / "nowhere" / "report.json"))
    with pytest.raises(ValueError, match="--output is a .json file"):
        evaluate.main(settings(folders, output=folders / "report.csv"))
    write_image(folders / "sharp" / "coffee.jpg", np.zeros((20, 20, 3), np.uint8))
    with pytest.raises(ValueError, match="have the same name, coffee"):
        evaluate.main(settings(folders))
