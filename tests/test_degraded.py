import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.degraded import DEGRADATIONS, DegDataset, degrade, example_sheet
from ldm.data.image import photographs, read_image, write_image


@pytest.fixture
def folder(tmp_path):
    for path in photographs():
        image = read_image(path)
        write_image(tmp_path / f"{path.stem}.png", cv2.resize(image, None, fx=0.4, fy=0.4))
    return tmp_path


def blocky(size: int = 64) -> np.ndarray:
    squares = np.random.default_rng(0).integers(60, 200, (size // 4, size // 4, 3))
    return np.kron(squares, np.ones((4, 4, 1))).astype(np.uint8)


def test_contract(folder):
    dataset = DegDataset(folder, "restore", resolution=96, repeats=3)
    assert len(dataset) == 18
    item = dataset[(2, 7)]
    assert set(item) == {"control", "target", "prompts", "name", "index", "seed"}
    for name in ("control", "target"):
        assert item[name].shape == (3, 96, 96) and item[name].dtype == torch.float32
        assert -1 <= item[name].min() < item[name].max() <= 1
    assert item["prompts"] == "restore" and item["index"] == 1
    assert item["name"] == str(dataset.targets[1])


def test_samples_depend_on_seed_epoch_and_index_alone(folder):
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


def test_nothing_is_degraded_without_types(folder):
    for key in [(0, 0), (1, 3), (2, 5)]:
        item = DegDataset(folder, "", resolution=96, degradation_types=())[key]
        assert torch.equal(item["control"], item["target"])


@pytest.mark.parametrize("native_crop", [False, True])
def test_real_pairs_are_cut_alike(folder, tmp_path, native_crop):
    pairs = DegDataset(folder, "", resolution=96, lr_data_root=folder, native_crop=native_crop)
    for key in [(epoch, index) for epoch in range(4) for index in range(len(pairs))]:
        assert torch.equal(pairs[key]["control"], pairs[key]["target"])


def test_native_crops_are_pieces_of_the_file(folder):
    options = {"native_crop": True, "random_flip": False, "degradation_types": ()}
    item = DegDataset(folder, "", resolution=96, **options)[(1, 1)]
    image = read_image(item["name"])
    crop = item["target"].add(1).mul(127.5).round().byte().permute(1, 2, 0).numpy()
    x, y = cv2.minMaxLoc(cv2.matchTemplate(image, crop, cv2.TM_SQDIFF))[2]
    assert np.array_equal(image[y : y + 96, x : x + 96], crop)


def test_which_latents_may_be_kept(folder):
    plain = {"random_crop": False, "random_flip": False, "resolution": 96}
    synthetic, real = DegDataset(folder, "", **plain), DegDataset(folder, "", **plain, lr_data_root=folder)
    assert synthetic.fixed_targets and not synthetic.fixed_controls
    assert real.fixed_targets and real.fixed_controls
    assert torch.equal(synthetic[(0, 1)]["target"], synthetic[(5, 1)]["target"])
    assert not torch.equal(synthetic[(0, 1)]["control"], synthetic[(5, 1)]["control"])
    moving = DegDataset(folder, "", resolution=96, random_crop=False)
    assert not moving.fixed_targets
    flips = {moving[(epoch, 0)]["target"].numpy().tobytes() for epoch in range(8)}
    assert len(flips) == 2


def test_noise_has_the_given_standard_deviation():
    grey = np.full((200, 200, 3), 128, np.uint8)
    noisy = degrade(grey, np.random.default_rng(0), ["noise"], noise_level=0.05)
    assert noisy.std() == pytest.approx(0.05 * 255, rel=0.02)
    assert noisy.mean() == pytest.approx(128, abs=0.2)


def test_blur_is_a_gaussian_of_the_given_radius():
    point = np.zeros((41, 41, 3), np.uint8)
    point[20, 20] = 255
    response = degrade(point, np.random.default_rng(0), ["blur"], blur_radius=1.5)[..., 0].astype(float)
    x = np.arange(-20, 21)
    gaussian = np.exp(-(x**2) / (2 * 1.5**2))
    expected = 255 * np.outer(gaussian, gaussian) / gaussian.sum() ** 2
    assert np.abs(response - expected).max() < 1


def test_downsampling_keeps_place_and_loses_detail():
    image = blocky()
    result = degrade(image, np.random.default_rng(0), ["downsample"], lr_scale=8)
    expected = np.asarray(Image.fromarray(image).resize((8, 8), Image.Resampling.BICUBIC))
    again = np.asarray(Image.fromarray(result).resize((8, 8), Image.Resampling.BOX))
    assert np.abs(again.astype(int) - expected).mean() < 6
    turned = degrade(image[::-1, ::-1], np.random.default_rng(0), ["downsample"], lr_scale=8)[::-1, ::-1]
    assert np.abs(turned.astype(int) - result).max() <= 1  # no shift: turning commutes


def test_jpeg_is_the_last_and_of_the_given_quality():
    image = blocky()
    errors = []
    for quality in (20, 75, 95):
        result = degrade(image, np.random.default_rng(0), ["jpeg"], jpeg_quality=quality)
        errors.append(np.abs(result.astype(int) - image).mean())
    assert errors[0] > errors[1] > errors[2] > 0
    in_any_order = [degrade(image, np.random.default_rng(0), t) for t in (DEGRADATIONS, DEGRADATIONS[::-1])]
    assert np.array_equal(*in_any_order)


def test_channels_stay_in_order():
    red = np.zeros((64, 64, 3), np.uint8)
    red[..., 0] = 200
    result = degrade(red, np.random.default_rng(0))
    assert result[..., 0].mean() > 150 and result[..., 1:].mean() < 50


def test_example_sheet(folder):
    assert example_sheet(DegDataset(folder, "", resolution=96), 4).shape == (4 * 96, 2 * 96, 3)


def test_any_mode_is_read(tmp_path):
    Image.new("L", (40, 40), 100).save(tmp_path / "grey.png")
    Image.new("RGBA", (40, 40), (255, 0, 0, 128)).save(tmp_path / "transparent.png")
    dataset = DegDataset(tmp_path, "", resolution=32)
    assert dataset[0]["target"].shape == dataset[1]["target"].shape == (3, 32, 32)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"degradation_types": ["noise", "fog"]}, "unknown degradation fog: choose from downsample, noise"),
        ({"resolution": 100}, "multiple of 16, not 100"),
        ({"jpeg_quality": 0}, "jpeg_quality must lie in 1 ... 100"),
        ({"lr_scale": 0}, "lr_scale"),
        ({"noise_level": -1}, "noise_level"),
        ({"repeats": 0}, "repeats"),
    ],
)
def test_bad_values(folder, values, message):
    with pytest.raises(ValueError, match=message):
        DegDataset(folder, "", **{"resolution": 96, **values})


def test_bad_folders(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        DegDataset(tmp_path / "absent", "")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no images"):
        DegDataset(tmp_path / "empty", "")
    with pytest.raises(ValueError, match=r"6 of 6 pictures are smaller than 512 px: .*\d+x\d+"):
        DegDataset(folder, "")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="a.png"):
        DegDataset(tmp_path / "broken", "")


def test_pairs_of_unequal_size_are_named(tmp_path):
    for name, size in (("clean", 64), ("damaged", 48)):
        (tmp_path / name).mkdir()
        write_image(tmp_path / name / "a.png", np.zeros((size, size, 3), np.uint8))
    dataset = DegDataset(tmp_path / "clean", "", resolution=32, lr_data_root=tmp_path / "damaged")
    with pytest.raises(ValueError, match="damaged/a.png is 48x48, .*clean/a.png is 64x64"):
        dataset[0]
