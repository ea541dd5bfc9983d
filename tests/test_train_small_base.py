"""extras/train_small_base.py: computed encoder, training stages, exported files."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cldm.model import add_control, load_state_dict, read_config
from extras import train_small_base as script
from extras.train_small_base import (
    CHANNELS,
    CONFIG,
    KEEP,
    Settings,
    base_model,
    components,
    compute_encoder,
    main,
    piece,
)
from ldm.checkpoint import write_weights
from ldm.data.image import photographs, to_tensor, write_image
from ldm.models.kontext import load_autoencoder, load_restorer


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    rng = np.random.default_rng(0)
    images = [script.read_image(path) for path in photographs()]
    return torch.stack([to_tensor(script.square(images[n % len(images)], rng)) for n in range(24)])


def test_encoder_projects_on_principal_components(pictures):
    """Linear reconstruction from its latents is within 15 % of the optimal (PCA) error."""
    autoencoder = base_model().first_stage_model
    compute_encoder(autoencoder, pictures)
    latents = autoencoder.encode(pictures).mode()
    assert latents.shape == (24, CHANNELS, 16, 16)

    def rows(x: torch.Tensor) -> torch.Tensor:
        return x.movedim(1, -1).flatten(0, -2)

    blocks = rows(F.pixel_unshuffle(pictures, 8))
    known = torch.cat([rows(latents), torch.ones(len(blocks), 1)], dim=1)
    ours = blocks - known @ torch.linalg.lstsq(known, blocks).solution
    basis = components(blocks, CHANNELS)
    best = blocks - blocks @ basis.T @ basis
    assert best.square().mean() < ours.square().mean() < 1.15 * best.square().mean()
    twice = autoencoder.encode(0.5 * pictures).mode()  # the encoder is linear in spite of its norm
    assert (twice - 0.5 * latents).abs().max() < 0.02 * latents.abs().max()


def test_pieces_are_deterministic_and_distinct():
    photos = [np.random.default_rng(1).integers(0, 256, (200, 300, 3), dtype=np.uint8)]
    settings = Settings(leaves=0.5, blurred=0.5)
    made = [piece(photos, settings, index) for index in range(8)]
    again = [piece(photos, settings, index) for index in range(8)]
    assert all(np.array_equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(made, again, strict=True))
    assert len({image.tobytes() for image, _ in made}) == 8 and len({caption for _, caption in made}) > 2
    assert all(image.shape == (128, 128, 3) and image.dtype == np.uint8 for image, _ in made)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Settings:
    """Run all stages for two steps each, and export."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "photos").mkdir()
    for n in range(2):
        noise = np.random.default_rng(n).integers(0, 256, (150, 160, 3), dtype=np.uint8)
        write_image(folder / "photos" / f"{n}.png", noise)
    steps = dict.fromkeys(("autoencoder_steps", "unet_steps", "flux_steps"), 2)
    settings = Settings(
        photos=folder / "photos", output_dir=folder / "run", models=folder / "models", pieces=12, batch_size=2
    )
    settings = replace(settings, **steps, save_steps=1, warmup=1, precision="32")
    squares = script.held_out_squares()[:8]
    with pytest.MonkeyPatch.context() as patch:  # fewer images to score and to sample
        patch.setattr(script, "held_out_squares", lambda: squares)
        patch.setattr(script, "unconditional", partial(script.unconditional, count=1))
        main(settings)
    return settings


@pytest.mark.slow
def test_exported_files_load_like_the_original_models(trained):
    config = read_config(CONFIG)
    weights = load_state_dict(trained.models / "small_diffusion.safetensors")
    assert {value.dtype for name, value in weights.items() if "position_ids" not in name} == {torch.float16}
    started, names = add_control(weights, config, "the base")
    assert names["kept"] and names["copied"] and not names["ignored"]
    image = np.full((40, 52, 3), 128, np.uint8)
    restore = load_restorer(
        trained.models / "small_kontext", None, KEEP, trained.output_dir / "p.safetensors"
    )
    assert restore(image, steps=1).shape == image.shape


@pytest.mark.slow
def test_both_exported_autoencoders_are_equal(trained, pictures):
    """Stable Diffusion's 1x1 convolutions and scale are equivalent to FLUX's shift and scale."""
    model = base_model()
    weights = load_state_dict(trained.models / "small_diffusion.safetensors")
    model.load_state_dict(
        {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}, strict=False
    )
    flux = load_autoencoder(trained.models / "small_kontext" / "ae.safetensors")
    latents = model.scale_factor * model.encode_first_stage(pictures[:2]).mode()
    assert torch.allclose(latents, flux.encode(pictures[:2]), atol=1e-4)
    assert torch.allclose(model.decode_first_stage(latents), flux.decode(latents), atol=1e-4)


@pytest.mark.slow
def test_training_continues_from_weights_and_keeps_autoencoder(trained, tmp_path):
    old = trained.models / "small_diffusion.safetensors"
    settings = replace(trained, stage="unet", init_weights=old, output_dir=tmp_path / "run", models=tmp_path)
    main(settings)
    main(replace(settings, stage="export"))
    weights = [load_state_dict(folder / old.name) for folder in (trained.models, tmp_path)]
    changed = {name for name, value in weights[0].items() if not torch.equal(value, weights[1][name])}
    assert changed and all(name.startswith("model.diffusion_model.") for name in changed)
    (latents,) = (tmp_path / "run").glob("latents_*.safetensors")
    written, content = latents.stat().st_mtime_ns, latents.read_bytes()
    main(replace(settings, unet_steps=3))
    assert latents.stat().st_mtime_ns == written  # not computed again
    latents.write_bytes(content[:-50])
    main(replace(settings, unet_steps=4))
    assert latents.read_bytes() == content
    name = "model.diffusion_model.out.2.bias"
    write_weights(tmp_path / "torn.safetensors", {**weights[0], name: torch.zeros(3)})
    with pytest.raises(ValueError, match=r"torn.safetensors does not fit this model: .*out.2.bias"):
        main(replace(settings, init_weights=tmp_path / "torn.safetensors", output_dir=tmp_path / "b"))


@pytest.mark.slow
def test_stage_resumes(trained, capsys):
    main(replace(trained, stage="unet"))
    assert "resuming" in capsys.readouterr().out
    with pytest.raises(ValueError, match="learning_rate was 0.001"):
        main(replace(trained, stage="unet", learning_rate=0.5))
