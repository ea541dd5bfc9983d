"""A tiny latent diffusion model, taught in a minute on a CPU, for demonstrations without any download."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from pytorch_lightning.utilities import rank_zero_only
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from cldm.model import add_control, load_state_dict
from ldm import checkpoint
from ldm.data.stream import SampleStream
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusion.ddpm import LatentDiffusion, image_of
from ldm.modules.diffusionmodules.model import AttnBlock, ResnetBlock

BATCH_SIZE, LEARNING_RATE = 8, 3e-3


def announce_demo(lacking: str) -> None:
    """Say what the demonstration is and what it is not; threads are limited to one."""
    rank_zero_only(print)(
        "This demonstration checks the installation: a tiny model learns for a few minutes. It shows every "
        f"stage of training and {lacking}; that takes Stable Diffusion's weights and a GPU."
    )
    torch.set_num_threads(1)  # tiny networks: more threads would only wait for each other


def make_demo_start(path: str | Path, config: Mapping, dataset: Dataset, steps: tuple[int, int]) -> None:
    """Teach the tiny model that stands in for Stable Diffusion, and write it with a ControlNet to `path`.

    `steps` are the autoencoder's and the UNet's. What exists is not made again.
    """
    base = Path(path).with_name("tiny_diffusion.safetensors")
    make_demo_base(base, config, dataset, *steps)
    if not Path(path).is_file():
        checkpoint.write_weights(path, add_control(load_state_dict(base), config, base)[0])


def make_demo_base(
    path: Path, config: Mapping, dataset: Dataset, autoencoder_steps: int, unet_steps: int
) -> None:
    """Train the autoencoder, then the UNet of `config` on the images (`jpg`) of `dataset`, and save them.

    The file has the layout of a Stable Diffusion checkpoint (no ControlNet). Nothing is done if it exists.
    """
    if path.is_file():
        return
    torch.manual_seed(0)
    params = config["params"]
    names = ("unet_config", "first_stage_config", "cond_stage_config", "parameterization", "scale_factor")
    model = LatentDiffusion(**{name: params[name] for name in names})
    start_linear(model.first_stage_model)
    model.to(memory_format=torch.channels_last)
    stream = SampleStream(len(dataset), seed=0)
    batches = iter(DataLoader(dataset, BATCH_SIZE, sampler=stream))

    autoencoder = model.first_stage_model.requires_grad_(True)
    for batch, update in lessons(autoencoder, batches, autoencoder_steps, "teaching a tiny autoencoder"):
        image = image_of(batch, "jpg")
        update(F.l1_loss(autoencoder.decode(autoencoder.encode(image).mode()), image))
    normalise_latents(autoencoder, image)
    autoencoder.requires_grad_(False)
    for batch, update in lessons(model.model, batches, unet_steps, "teaching a tiny UNet"):
        update(model.shared_step(batch)[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_weights(path, dict(model.state_dict()))


def lessons(
    module: nn.Module, batches: Iterator[dict], steps: int, title: str
) -> Iterator[tuple[dict, Callable[[torch.Tensor], None]]]:
    """`steps` batches, each with a function that takes its loss and updates `module`; shows progress."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps + 1)

    def update(loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)

    with tqdm(total=steps, desc=title, dynamic_ncols=True) as bar:
        for _ in range(steps):
            yield next(batches), update
            bar.update()


@torch.no_grad()
def start_linear(autoencoder: AutoencoderKL) -> None:
    """Begin as a linear map that keeps what it sees: residual branches at zero, convolutions orthogonal.

    The usual initialisation shrinks the image below the biases on its way: a few steps teach it nothing.
    """
    for module in autoencoder.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.orthogonal_(module.weight)
            module.bias.zero_()
    for module in autoencoder.modules():
        if isinstance(module, ResnetBlock | AttnBlock):
            last = module.conv2 if isinstance(module, ResnetBlock) else module.proj_out
            last.weight.zero_()
            last.bias.zero_()


@torch.no_grad()
def normalise_latents(autoencoder: AutoencoderKL, image: torch.Tensor) -> None:
    """Give the latents of `image` zero mean and unit variance in each channel, and next to no noise.

    The change is made in the 1x1 convolutions around the latent and leaves the reconstruction as it is.
    """
    latent = autoencoder.encode(image).mode()
    mean, std = latent.mean(dim=(0, 2, 3)), latent.std(dim=(0, 2, 3))
    into, out, channels = autoencoder.quant_conv, autoencoder.post_quant_conv, len(mean)
    into.weight[:channels] /= std[:, None, None, None]
    into.bias[:channels] = (into.bias[:channels] - mean) / std
    into.weight[channels:] = 0.0
    into.bias[channels:] = -8.0  # the log variance
    out.bias += out.weight[:, :, 0, 0] @ mean
    out.weight *= std[:, None, None]
