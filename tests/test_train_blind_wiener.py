"""extras/train_blind_wiener.py: degraded crops, flipped spectra, resuming."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from extras import train_blind_wiener as script
from extras.train_blind_wiener import Crops, Settings, degrade_crops, errors, main
from ldm.checkpoint import read_weights
from ldm.data.image import photographs, read_image, write_image
from ldm.modules.blind_wiener import FFT, BlindWiener
from tests.fill import fill


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for path in photographs()[:3]:
        write_image(folder / path.name, read_image(path))
    return folder


def test_crops_are_cached_and_slightly_degraded_ones_left_out(photos, tmp_path):
    paths = sorted(photos.iterdir())
    crops = degrade_crops(paths, 10, 0, tmp_path / "crops.npy")
    assert 4 < len(crops) <= 10 and crops.shape[1:] == (2, FFT, FFT) and crops.dtype == torch.float16
    differences = (crops[:, 0].float() - crops[:, 1].float()).square()
    assert differences[:, script.MIDDLE, script.MIDDLE].mean((1, 2)).min() > 1e-5
    written = (tmp_path / "crops.npy").stat().st_mtime_ns
    assert torch.equal(degrade_crops(paths, 10, 0, tmp_path / "crops.npy"), crops)
    assert (tmp_path / "crops.npy").stat().st_mtime_ns == written
    assert not torch.equal(degrade_crops(paths, 10, 1, tmp_path / "crops.npy")[:3], crops[:3])


def test_spectra_are_flipped_with_the_crops():
    crops = torch.rand(1, 2, FFT, FFT)
    crops[:, :, :, ::3] += 1  # a preferred direction
    network = BlindWiener(8)
    turned = Crops(crops, network, 0, augment=True)
    seen = set()
    at = torch.tensor([FFT // 2])
    for epoch in range(20):
        item = turned[epoch, 0]
        spectra = network.spectra(item["blurry"][None, None], at, at)[0, 0, 0]
        assert torch.allclose(item["spectra"], spectra, atol=0.2) and item["sharp"].shape == (FFT, FFT)
        seen.add(tuple(item["blurry"][:2, 0].tolist()))
    assert len(seen) == 4


def test_errors_before_and_after_the_selected_filter():
    """The filter with the highest score is applied; the identity does not change the error."""
    network = fill(BlindWiener(8))
    network.estimator.forward = lambda spectra: torch.eye(len(network.bank))[[0, 30]] * 1e4
    batch = {name: torch.rand(2, FFT, FFT) for name in ("blurry", "sharp")} | {"spectra": torch.zeros(2)}
    before, after = errors(network, batch)
    assert after[0] == pytest.approx(before[0].item(), rel=1e-4) and abs(after[1] - before[1]) > 0.02


def test_stopped_run_resumes_exactly_and_writes_filter_weights(photos, tmp_path, monkeypatch):
    whole = Settings(
        photos, 16, 4, batch_size=8, steps=4, warmup=1, output_dir=tmp_path / "whole", save_steps=2
    )
    main(whole)
    save = script.Stage.save

    def save_and_stop(self, scores):
        save(self, scores)
        raise KeyboardInterrupt

    stopped = replace(whole, output_dir=tmp_path / "stopped")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(script.Stage, "save", save_and_stop)
        main(stopped)
    main(stopped)
    first, second = (read_weights(run.output_dir / "blind_wiener.safetensors") for run in (whole, stopped))
    assert first and all(name.startswith("estimator.") for name in first)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert (first["estimator.motion.weight"] != 0).any()


def test_single_photo_raises(tmp_path):
    (tmp_path / "photos").mkdir()
    write_image(tmp_path / "photos" / "a.png", np.zeros((300, 300, 3), np.uint8))
    with pytest.raises(ValueError, match="give at least two photographs"):
        main(Settings(tmp_path / "photos", output_dir=tmp_path / "run"))
