"""A model folder in FLUX's layout with random weights and toy sizes."""

import json
from pathlib import Path

import torch
from torch import nn

from ldm.checkpoint import write_weights
from ldm.models.kontext import AUTOENCODER, TRANSFORMER, FluxAutoencoder, save_flux
from ldm.models.prompts import prompt_file
from ldm.modules.flux import Flux, FluxParams

# Arguments of diffusers' AutoencoderKL: as for FLUX, but with few channels.
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (32, 64, 64, 96),
    "layers_per_block": 1,
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def write_tiny_folder(folder: str | Path, run: Path, prompt: str, seed: int = 0, channels: int = 16) -> None:
    """Write a transformer and an autoencoder of random weights and toy sizes.

    The run folder `run` gets an embedding of `prompt`: 16 random tokens instead of text encoders.
    """
    generator = torch.Generator().manual_seed(seed)
    width = 4 * channels
    sizes = FluxParams(
        width, width, 32, 48, 128, 4.0, 4, depth=2, depth_single_blocks=4, axes_dim=(8, 12, 12)
    )
    config = {"ch": 32, "ch_mult": [1, 2, 2, 2], "num_res_blocks": 1, "z_channels": channels}
    flux, autoencoder = Flux(sizes), FluxAutoencoder(config)
    for parameter in (*flux.parameters(), *autoencoder.parameters()):
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5, generator=generator)
        else:  # biases and norm weights
            nn.init.constant_(parameter, float((parameter == 1).all()))
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_flux(Path(folder) / TRANSFORMER, flux)
    metadata = {"ddconfig": json.dumps(config)}
    write_weights(Path(folder) / AUTOENCODER, autoencoder.state_dict(), metadata)
    t5, pooled = (torch.randn(shape, generator=generator) for shape in ((1, 16, 48), (1, 32)))
    cache = prompt_file(run, prompt)
    cache.parent.mkdir(parents=True, exist_ok=True)
    write_weights(cache, {"t5": t5, "pooled": pooled}, {"prompt": prompt})
