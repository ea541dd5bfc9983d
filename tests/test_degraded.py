import hashlib
import shutil

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from ldm.alignment import measure_movement
from ldm.data.degraded import DegDataset
from ldm.data.image import photographs, read_image, write_image
from ldm.modules.image_degradation.degrade import DEGRADATIONS, KINDS, degrade


@pytest.fixture
def folder(tmp_path):
    for path in photographs():
        image = read_image(path)
        write_image(tmp_path / f"{path.stem}.png", cv2.resize(image, None, fx=0.4, fy=0.4))
    return tmp_path


def blocky(size: int = 64) -> np.ndarray:
    squares = np.random.default_rng(0).integers(60, 200, (size // 4, size // 4, 3))
    return np.kron(squares, np.ones((4, 4, 1))).astype(np.uint8)


def test_item_format(folder):
    dataset = DegDataset(folder, "restore", resolution=96, repeats=3)
    assert len(dataset) == 18
    item = dataset[(2, 7)]
    assert set(item) == {"control", "target", "prompts", "name", "seed"}
    for name in ("control", "target"):
        assert item[name].shape == (3, 96, 96) and item[name].dtype == torch.float32
        assert -1 <= item[name].min() < item[name].max() <= 1
    assert item["prompts"] == "restore"
    assert item["name"] == str(dataset.targets[1])


def test_samples_depend_only_on_seed_epoch_and_index(folder):
    datasets = [DegDataset(folder, "", resolution=96, seed=seed) for seed in (1, 1, 2)]
    first, same, other_seed = (dataset[(3, 2)] for dataset in datasets)
    other_epoch, repeated = (
        datasets[0][(4, 2)],
        DegDataset(folder, "", resolution=96, seed=1, repeats=2)[(3, 8)],
    )
    assert torch.equal(first["control"], same["control"]) and first["seed"] == same["seed"]
    for other in (other_seed, other_epoch, repeated):
        assert not torch.equal(first["control"], other["control"])
        assert first["seed"] != other["seed"]


def test_no_degradation_types_leave_image_unchanged(folder):
    for key in [(0, 0), (1, 3), (2, 5)]:
        item = DegDataset(folder, "", resolution=96, degradation_types=())[key]
        assert torch.equal(item["control"], item["target"])


@pytest.mark.parametrize("native_crop", [False, True])
def test_both_sides_of_real_pairs_get_the_same_crop(folder, tmp_path_factory, native_crop):
    copy = shutil.copytree(folder, tmp_path_factory.mktemp("copies") / "copy")
    pairs = DegDataset(folder, "", resolution=96, lr_data_root=copy, native_crop=native_crop)
    for key in [(epoch, index) for epoch in range(4) for index in range(len(pairs))]:
        assert torch.equal(pairs[key]["control"], pairs[key]["target"])


def test_native_crop_is_not_resized(folder):
    options = {"native_crop": True, "random_flip": False, "degradation_types": ()}
    item = DegDataset(folder, "", resolution=96, **options)[(1, 1)]
    image = read_image(item["name"])
    crop = item["target"].add(1).mul(127.5).round().byte().permute(1, 2, 0).numpy()
    x, y = cv2.minMaxLoc(cv2.matchTemplate(image, crop, cv2.TM_SQDIFF))[2]
    assert np.array_equal(image[y : y + 96, x : x + 96], crop)


def test_target_is_constant_without_random_crop_and_flip(folder):
    plain = DegDataset(folder, "", resolution=96, random_crop=False, random_flip=False)
    assert torch.equal(plain[(0, 1)]["target"], plain[(5, 1)]["target"])
    assert not torch.equal(plain[(0, 1)]["control"], plain[(5, 1)]["control"])
    flipped = DegDataset(folder, "", resolution=96, random_crop=False)
    assert len({flipped[(epoch, 0)]["target"].numpy().tobytes() for epoch in range(8)}) == 2


def test_caption_files_replace_the_prompt(folder):
    (folder / "coffee.txt").write_text("a cup,\nscratched\n")
    dataset = DegDataset(folder, "restore", resolution=96, captions=True)
    place = [path.stem for path in dataset.targets].index("coffee")
    assert dataset[(3, place)]["prompts"] == "a cup, scratched"
    assert dataset.prompts[place - 1] == "restore" and dataset.captioned == 1
    assert dataset.describe() == "6 images; 5 without a caption take the prompt"
    plain = DegDataset(folder, "restore", resolution=96)
    assert {plain[index]["prompts"] for index in range(6)} == {"restore"}
    assert torch.equal(dataset[(1, 2)]["control"], plain[(1, 2)]["control"])  # same degradation


@pytest.mark.parametrize("kind", KINDS)
def test_degradations_do_not_shift_the_image(kind):
    """A LoRA would learn to undo the shift."""
    image = photograph(192)
    seeds = range(4)
    moved = [
        measure_movement(degrade(image, np.random.default_rng(seed), [kind], lr_scale=4), image)
        for seed in seeds
    ]
    # the correlation peak of a bent path is near its middle
    assert np.median([movement.shift for movement in moved]) < 0.5
    assert np.median([abs(movement.scale - 100) for movement in moved]) < 0.3


def test_noise_has_given_standard_deviation():
    grey = np.full((200, 200, 3), 128, np.uint8)
    noisy = degrade(grey, np.random.default_rng(0), ["noise"], noise_level=0.05)
    assert noisy.std() == pytest.approx(0.05 * 255, rel=0.02)
    assert noisy.mean() == pytest.approx(128, abs=0.2)


def test_blur_is_gaussian_of_given_radius():
    point = np.zeros((41, 41, 3), np.uint8)
    point[20, 20] = 255
    response = degrade(point, np.random.default_rng(0), ["blur"], blur_radius=1.5)[..., 0].astype(float)
    x = np.arange(-20, 21)
    gaussian = np.exp(-(x**2) / (2 * 1.5**2))
    expected = 255 * np.outer(gaussian, gaussian) / gaussian.sum() ** 2
    assert np.abs(response - expected).max() < 1


def test_downsampling_loses_detail_without_shift():
    image = blocky()
    result = degrade(image, np.random.default_rng(0), ["downsample"], lr_scale=8)
    expected = np.asarray(Image.fromarray(image).resize((8, 8), Image.Resampling.BICUBIC))
    again = np.asarray(Image.fromarray(result).resize((8, 8), Image.Resampling.BOX))
    assert np.abs(again.astype(int) - expected).mean() < 6
    turned = degrade(image[::-1, ::-1], np.random.default_rng(0), ["downsample"], lr_scale=8)[::-1, ::-1]
    assert np.abs(turned.astype(int) - result).max() <= 1  # no shift: rotation by 180 degrees commutes


def test_jpeg_is_applied_last_with_given_quality():
    image = blocky()
    errors = []
    for quality in (20, 75, 95):
        result = degrade(image, np.random.default_rng(0), ["jpeg"], jpeg_quality=quality)
        errors.append(np.abs(result.astype(int) - image).mean())
    assert errors[0] > errors[1] > errors[2] > 0
    in_any_order = [degrade(image, np.random.default_rng(0), t) for t in (DEGRADATIONS, DEGRADATIONS[::-1])]
    assert np.array_equal(*in_any_order)


def photograph(size: int = 128) -> np.ndarray:
    image = read_image(photographs(("coffee.png",))[0])[:, :400]
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)


OTHERS = [name for name in KINDS if name not in DEGRADATIONS]


@pytest.mark.parametrize("kind", OTHERS)
def test_other_degradations_grow_with_strength(kind):
    image = photograph()
    errors = []
    for strength in (0.02, 0.4, 1.0):
        made = [
            degrade(image, np.random.default_rng(4), [kind], degradation_strength=strength) for _ in range(2)
        ]
        assert made[0].shape == image.shape and np.array_equal(*made)
        errors.append(np.abs(made[0].astype(float) - image).mean())
    assert errors[0] < errors[1] < errors[2] and errors[0] < 6 and errors[2] > 1.5
    other = degrade(image, np.random.default_rng(5), [kind], degradation_strength=1.0)
    assert not np.array_equal(other, made[0])
    assert degrade(image[:16, :20], np.random.default_rng(0), [kind]).shape == (16, 20, 3)


def degraded(kind: str, value: int = 128, strength: float = 1.0) -> np.ndarray:
    grey = np.full((200, 200, 3), value, np.uint8)
    return degrade(grey, np.random.default_rng(1), [kind], degradation_strength=strength).astype(float)


def test_properties_of_other_degradations():
    grain = degraded("film_grain")
    assert np.ptp(grain, axis=2).max() == 0 and grain.std() == pytest.approx(0.08 * 255, rel=0.05)
    assert degraded("film_grain", 5).std() < 0.4 * grain.std() and np.ptp(degraded("film_grain", 0)) == 0
    faded = [degraded("fading", value) for value in (0, 255)]
    assert faded[0].min() == pytest.approx(0.3 * 255, abs=1) and faded[1].max() == pytest.approx(
        0.9 * 255, abs=1
    )
    dark = degraded("low_light")
    assert 20 < dark.mean() < 50 < degraded("low_light", strength=0.3).mean() < 110 and dark.std() > 2
    torn = degraded("scratches")
    assert 0.5 < (torn == 128).mean() < 0.995 and torn.max() > 200 and torn.min() < 60
    point = np.zeros((129, 129, 3), np.uint8)
    point[64, 64] = 255
    smeared = degrade(np.kron(point, np.ones((4, 4, 1), np.uint8)), np.random.default_rng(0), ["motion_blur"])
    y, x = np.nonzero(smeared[..., 0] > 20)
    assert 8 < max(np.ptp(y), np.ptp(x)) < 60


def test_values_are_sampled_from_ranges():
    grey = np.full((200, 200, 3), 128, np.uint8)
    levels = [
        degrade(grey, np.random.default_rng(seed), ["noise"], noise_level=(0.01, 0.1)).std() / 255
        for seed in range(40)
    ]
    assert 0.009 < min(levels) < 0.025 < 0.085 < max(levels) < 0.102


def test_default_degradation_is_bitwise_stable():
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    made = degrade(image, np.random.default_rng(1), ("downsample", "noise", "blur"))
    assert hashlib.sha256(made.tobytes()).hexdigest()[:16] == "2e56531f9f364efd"
    made = degrade(image, np.random.default_rng(1))
    assert hashlib.sha256(made.tobytes()).hexdigest()[:16] == "729262f17bb508ed"


def test_apply_degradation_accepts_pillow_and_numpy_images(folder):
    dataset = DegDataset(folder, "", resolution=96, degradation_types=["noise", "fading"])
    picture = Image.fromarray(photograph())
    result = dataset.apply_degradation(picture)
    assert isinstance(result, Image.Image) and result.size == picture.size
    rng = np.random.default_rng(3)
    assert np.asarray(dataset.apply_degradation(np.asarray(picture), rng)).std() > 0


@pytest.mark.parametrize(
    "values, message",
    [
        ({"degradation_types": ["noise", "fog"]}, "unknown degradation fog: choose from downsample, noise"),
        ({"resolution": 100}, "multiple of 16, not 100"),
        ({"jpeg_quality": 0}, "jpeg_quality must lie in 1 ... 100"),
        ({"lr_scale": 0}, "lr_scale"),
        ({"noise_level": -1}, "noise_level"),
        ({"repeats": 0}, "repeats"),
        ({"degradation_types": ["rain"]}, "choose from downsample, noise, blur, jpeg, low_light, motion_"),
        ({"noise_level": (0.1, 0.01)}, "noise_level 0.1,0.01 is reversed: write 0.01,0.1"),
        ({"degradation_strength": (0.5, 1.5)}, "degradation_strength must lie in 0 ... 1, not 0.5,1.5"),
    ],
)
def test_bad_values_raise(folder, values, message):
    with pytest.raises(ValueError, match=message):
        DegDataset(folder, "", **{"resolution": 96, **values})


def test_bad_folders_raise(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        DegDataset(tmp_path / "absent", "")
    with pytest.raises(ValueError, match=r"6 of 6 images are smaller than 512 px: .*\d+x\d+"):
        DegDataset(folder, "")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="a.png"):
        DegDataset(tmp_path / "broken", "")[0]


def test_pairs_of_different_sizes_raise(tmp_path):
    for name, size in (("clean", 64), ("damaged", 48)):
        (tmp_path / name).mkdir()
        write_image(tmp_path / name / "a.png", np.zeros((size, size, 3), np.uint8))
    dataset = DegDataset(tmp_path / "clean", "", resolution=32, lr_data_root=tmp_path / "damaged")
    with pytest.raises(ValueError, match="damaged/a.png is 48x48, .*clean/a.png is 64x64"):
        dataset[0]
