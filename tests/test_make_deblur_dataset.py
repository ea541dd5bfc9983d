"""tool_make_deblur_dataset.py: determinism, continuing after an interruption, broken sources."""

import json
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from ldm.data.image import photographs, read_image, write_image
from ldm.data.paired import PairedDataset
from ldm.data.pairs import find_pairs, split_pairs
from ldm.modules.image_degradation.blur import BLUR_TYPES
from tool_make_deblur_dataset import Settings, main, make_dataset, make_pair


def settings(folder: Path, **changes) -> Settings:
    small = Settings(output_dir=str(folder), num_samples=8, image_size=48, blur_scale=0.2, num_workers=1)
    return replace(small, **changes)


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def records(folder: Path) -> list[dict]:
    return [
        json.loads(line) for line in (folder / "blur_types.json").read_text(encoding="utf-8").splitlines()
    ]


def photos(folder: Path, count: int, size: int = 80) -> Path:
    """Write crops of one photograph, named photo 0.png, photo 1.png, ..."""
    folder.mkdir()
    image = read_image(photographs(("chelsea.png",))[0])
    for number in range(count):
        write_image(folder / f"photo {number}.png", image[10 * number :][:size, 100 : 100 + size])
    return folder


def test_layout_records_and_images(tmp_path):
    summary = make_dataset(settings(tmp_path / "set", num_samples=20))
    assert (summary.made, summary.kept, summary.not_used) == (20, 0, {})
    lines = records(tmp_path / "set")
    assert [line["clear_image"] for line in lines] == [f"clear_images/clear_{i:06d}.png" for i in range(20)]
    assert [line["blur_image"] for line in lines] == [f"blur_images/blur_{i:06d}.png" for i in range(20)]
    assert {line["blur_type"] for line in lines} == set(BLUR_TYPES)
    names = [path.name for path in photographs()]
    for first in (0, 6, 12):  # every source is used once before any is repeated
        assert sorted(line["source"] for line in lines[first : first + 6]) == sorted(names)
    for line in lines:
        sharp, blurry = (read_image(tmp_path / "set" / line[key]) for key in ("clear_image", "blur_image"))
        assert sharp.shape == blurry.shape == (48, 48, 3)
        assert not np.array_equal(sharp, blurry) and abs(sharp.mean() - blurry.mean()) < 10
        assert line["parameters"] and sharp.max() > 0

    pairs = find_pairs(tmp_path / "set")
    training, held_out = split_pairs(pairs, 0.2, seed=0)
    assert not {pair.group for pair in training} & {pair.group for pair in held_out}
    assert PairedDataset(pairs, 48, 0)[3]["blur_type"] == lines[3]["blur_type"]


def test_output_depends_on_seed_but_not_on_number_of_workers(tmp_path):
    make_dataset(settings(tmp_path / "one", jpeg_probability=0.5))
    make_dataset(settings(tmp_path / "two", jpeg_probability=0.5, num_workers=2))
    one = content(tmp_path / "one")
    assert one == content(tmp_path / "two") and len(one) == 2 * 8 + 2
    make_dataset(settings(tmp_path / "other", jpeg_probability=0.5, seed=1))
    assert content(tmp_path / "other")["blur_images/blur_000000.png"] != one["blur_images/blur_000000.png"]


def test_second_run_adds_only_missing_pairs(tmp_path):
    folder = tmp_path / "set"
    make_dataset(settings(folder))
    whole = content(folder)
    (folder / "blur_images" / "blur_000003.png").unlink()
    untouched = (folder / "clear_images" / "clear_000000.png").stat().st_mtime_ns
    summary = make_dataset(settings(folder))
    assert (summary.made, summary.kept) == (1, 7)
    assert (folder / "clear_images" / "clear_000000.png").stat().st_mtime_ns == untouched
    assert content(folder) == whole
    summary = make_dataset(settings(folder, num_samples=10))  # more samples are added
    assert (summary.made, summary.kept) == (2, 8)
    make_dataset(settings(tmp_path / "at once", num_samples=10))
    assert content(folder) == content(tmp_path / "at once")


def test_killed_run_leaves_valid_list_and_continues(tmp_path):
    folder = tmp_path / "set"
    wanted = settings(folder, num_samples=40)
    run = get_context("fork").Process(target=make_dataset, args=(wanted,))
    run.start()
    for _ in range(3000):
        if len(list(folder.glob("blur_images/blur*.png"))) > 5:
            break
        time.sleep(0.01)
    run.kill()
    run.join()
    if (folder / "blur_types.json").exists():
        records(folder)  # every line is valid
    make_dataset(wanted)
    make_dataset(replace(wanted, output_dir=str(tmp_path / "undisturbed")))
    mine = {name: data for name, data in content(folder).items() if not name.endswith(".tmp")}
    assert mine == content(tmp_path / "undisturbed")


def test_interrupted_run_keeps_its_list(tmp_path, monkeypatch):
    import tool_make_deblur_dataset as tool

    whole = tool.make_pair
    calls = []

    def breaks(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(tool, "make_pair", breaks)
    with pytest.raises(KeyboardInterrupt):
        make_dataset(settings(tmp_path / "set"))
    assert len(records(tmp_path / "set")) == 3
    assert make_dataset(settings(tmp_path / "set")).kept == 3


def test_small_sources_are_scaled_up(tmp_path):
    source = photos(tmp_path / "photos", 1)
    write_image(source / "tiny.png", np.full((20, 30, 3), 90, np.uint8))
    make_dataset(settings(tmp_path / "set", source_dir=str(source), num_samples=2))
    found = {line["source"]: line["clear_image"] for line in records(tmp_path / "set")}
    assert np.array_equal(read_image(tmp_path / "set" / found["tiny.png"]), np.full((48, 48, 3), 90))


def test_unreadable_sources_are_reported_and_replaced(tmp_path, capsys):
    source = photos(tmp_path / "photos", 3)
    (source / "broken.jpg").write_text("no picture")
    cut = (source / "photo 0.png").read_bytes()
    (source / "truncated.png").write_bytes(cut[: len(cut) // 2])
    wanted = settings(tmp_path / "set", source_dir=str(source), num_samples=10)
    main(wanted)
    printed = capsys.readouterr().out
    assert "10 pairs made" in printed and "2 sources were not used" in printed
    assert "broken.jpg" in printed and "truncated.png" in printed
    assert f"python tutorial_train_deblur.py --data_root {tmp_path / 'set'}" in printed
    assert {line["source"] for line in records(tmp_path / "set")} == {f"photo {n}.png" for n in range(3)}
    for path in source.glob("photo*"):
        path.write_text("gone")
    with pytest.raises(ValueError, match="no source can be used; the first: cannot read image"):
        make_dataset(replace(wanted, output_dir=str(tmp_path / "none"), seed=1))


def test_sharpest_of_several_crops_is_chosen():
    """One crop is random; of six in an image that is half flat, nearly always a detailed one is chosen."""
    rng = np.random.default_rng(0)
    image = np.full((64, 512, 3), 128, np.uint8)
    image[:, 256:] = rng.integers(0, 256, (64, 256, 3))
    taken = {}
    for several in (1, 6):
        settings = Settings(image_size=32, sharpest_of=several)
        pairs = [make_pair(image, np.random.default_rng(n), settings) for n in range(40)]
        taken[several] = np.mean([sharp.std() > 1 for sharp, *_ in pairs])
    assert taken[1] < 0.75 < 0.95 < taken[6]


def test_bad_settings_raise_before_writing(tmp_path):
    for changes, message in (
        ({"num_samples": 0}, "num_samples must be at least 1, not 0"),
        ({"image_size": 4}, "image_size must be at least 16"),
        ({"blur_types": ("zoom",)}, "'zoom'.*choose from motion_blur"),
        ({"jpeg_probability": 2.0}, "jpeg_probability"),
        ({"blur_scale": 0.0}, "blur_scale"),
    ):
        with pytest.raises(ValueError, match=message):
            make_dataset(settings(tmp_path / "set", **changes))
    with pytest.raises(FileNotFoundError, match="folder not found: .*nowhere"):
        make_dataset(settings(tmp_path / "set", source_dir=str(tmp_path / "nowhere")))
    assert not (tmp_path / "set").exists()


def test_other_settings_in_same_folder_raise(tmp_path):
    make_dataset(settings(tmp_path / "set", num_samples=2))
    before = content(tmp_path / "set")
    for changes, name in (
        ({"seed": 3}, "seed was 0, is 3"),
        ({"image_size": 64}, "image_size was 48, is 64"),
    ):
        with pytest.raises(ValueError, match=f"made otherwise .*{name}"):
            make_dataset(settings(tmp_path / "set", **changes))
    with pytest.raises(ValueError, match="sources"):
        make_dataset(settings(tmp_path / "set", source_dir=str(photos(tmp_path / "photos", 1))))
    assert content(tmp_path / "set") == before
    for text in ("{", "3", "[1]"):
        (tmp_path / "set" / "settings.json").write_text(text)
        with pytest.raises(ValueError, match="settings.json is damaged"):
            make_dataset(settings(tmp_path / "set"))
