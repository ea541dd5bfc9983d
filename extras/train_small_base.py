"""Train the small base models: Stable Diffusion's and FLUX's layouts at a size that two CPU cores can train.

    python -m extras.train_small_base all --photos MY_PHOTOS   # hours; or by stage: autoencoder, unet, flux
    python -m extras.train_small_base export                   # small_diffusion.safetensors, small_kontext/

Latent diffusion (Rombach et al. 2022) and rectified flow (Esser et al. 2024) on images of 128 pixels. The
encoder is not learned but computed: the 32 strongest principal components of 8 x 8 blocks, each divided by
the root of its deviation, written exactly into the layers of an AutoencoderKL. A decoder is trained to invert
it; the UNet and the transformer can be trained on its latents at the same time. The same command resumes.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from lightning_fabric import Fabric
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import T5Config, T5EncoderModel

from cldm.model import check_weights, read_config
from harness import flags
from harness.run import Run, average_gradients, start_fabric
from harness.settings import check_ranges, plain, run_main
from ldm.checkpoint import MODELS, read_trained, read_weights, write_atomically, write_half, write_weights
from ldm.data.crop import at_least, sharpness
from ldm.data.dead_leaves import dead_leaves
from ldm.data.image import list_images, photographs, read_image, to_tensor, to_uint8, write_image
from ldm.data.stream import item_generator, item_seed
from ldm.metrics import psnr
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.kontext import AUTOENCODER, TRANSFORMER, FluxAutoencoder, save_flux
from ldm.models.prompts import encode_prompt
from ldm.modules.diffusionmodules.model import AttnBlock, ResnetBlock
from ldm.modules.diffusionmodules.util import zero_module
from ldm.modules.ema import EMA
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.modules.flux import Flux, FluxParams, Modulation, predict_velocity
from ldm.modules.image_degradation.blur import random_blur
from ldm.modules.lora import LORA_FILE

# ---- settings: edit here, or override on the command line --------------------------------------------------


@dataclass
class Settings:
    """Train the small base models."""

    # stage to run; all: the three trainings in turn, then export
    stage: Annotated[Literal["autoencoder", "unet", "flux", "all", "export"], tyro.conf.Positional] = "all"

    # ---- data
    photos: Path = Path("training/photos")  # folder of sharp photographs, with its subfolders
    pieces: flags.Count = 12000  # number of 128-pixel images cut from the photographs and generated, once
    leaves: flags.Fraction = 0.15  # fraction of the images that are generated dead leaves
    blurred: flags.Fraction = 0.2  # fraction of the photographs that are blurred, with a caption that says so

    # ---- training
    batch_size: flags.Count = 16  # batch size of each device
    # small_diffusion.safetensors to continue from: its autoencoder is kept, its UNet is trained further
    init_weights: Path | None = None
    autoencoder_steps: flags.Count = 6000  # number of steps of the decoder, on crops of 64 pixels
    unet_steps: flags.Count = 12000  # number of steps of the UNet
    flux_steps: flags.Count = 8000  # number of steps of the transformer
    learning_rate: flags.Weight = 1e-3  # peak learning rate, reached after warmup; then cosine to 0
    warmup: flags.Count = 200  # number of steps over which the learning rate rises
    ema_decay: flags.Decay = 0.999  # decay of the EMA weights, which are exported
    precision: flags.Precision = "bf16"  # computing precision; 32 where the processor has no bfloat16
    devices: flags.Devices = 1  # number of GPUs (processes on a CPU)
    seed: int = 0  # random seed of images, weight init and noise

    # ---- logging
    output_dir: Path = Path("outputs/small_base")  # folder with one run for each stage; old runs are resumed
    models: Path = Path("models")  # folder that export writes to
    save_steps: flags.Count = 500  # number of steps between checkpoints and scores


# A run may be continued with more steps: the learning rate then follows the longer cosine.
MAY_CHANGE = """stage photos models devices save_steps precision autoencoder_steps unet_steps
flux_steps""".split()
SIZE = 128  # side of an image in pixels
CHANNELS = 32  # components of an 8 x 8 block
CONFIG = MODELS / "small_diffusion.yaml"
# Metadata of the files that infer.py reads (infer.facts_of).
FACTS = {
    "deblur": {"sampling_steps": "2", "keeps_colors": "true"},
    "inpaint": {"sampling_steps": "10"},
    "kontext": {"sampling_steps": "2", "image_size": str(SIZE)},
}
BASE = {"base": "models/small_diffusion.safetensors", "image_size": str(SIZE)}  # of both ControlNets
SHARP, LEAVES, NOTHING = "a sharp photograph", "dead leaves", ""
KEEP, OTHER = "keep this photograph", "another photograph"  # prompts of the transformer
BLURS = ("motion_blur", "gaussian_blur", "defocus_blur", "lens_blur")
CAPTIONS = (NOTHING, SHARP, LEAVES, *(f"a photograph with {name.replace('_', ' ')}" for name in BLURS))
FLUX = FluxParams(4 * CHANNELS, 4 * CHANNELS, 16, 16, 160, 4.0, 4, 1, 4, axes_dim=(8, 16, 16))


# ---- images ------------------------------------------------------------------------------------------------


def make_pieces(settings: Settings, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return images uint8 (n, 128, 128, 3) and their caption indices, made once and kept in `folder`."""
    images_file, captions_file, note = folder / "pieces.npy", folder / "captions.npy", folder / "pieces.json"
    about = {name: plain(settings)[name] for name in ("photos", "pieces", "leaves", "blurred", "seed")}
    if not are_pieces_whole(images_file, captions_file, note, about):
        note.unlink(missing_ok=True)  # until the others are complete
        paths = list_images(settings.photos)
        photos = [at_least(read_image(path), SIZE) for path in tqdm(paths, "reading photographs")]
        made = [piece(photos, settings, index) for index in tqdm(range(settings.pieces), "cutting pieces")]
        np.save(images_file, np.stack([image for image, _ in made]))
        np.save(captions_file, [caption for _, caption in made])
        write_atomically(note, lambda temporary: temporary.write_text(json.dumps(about)))
    return np.load(images_file, mmap_mode="c"), np.load(captions_file)


def are_pieces_whole(images_file: Path, captions_file: Path, note: Path, about: dict) -> bool:
    """Check that the files of `make_pieces` exist, are whole and were made with these settings."""
    try:
        images, captions = np.load(images_file, mmap_mode="r"), np.load(captions_file)
        is_whole = images.shape == (len(captions), SIZE, SIZE, 3) and images.dtype == np.uint8
        is_known = set(captions.tolist()) <= set(range(len(CAPTIONS)))
        return is_whole and is_known and json.loads(note.read_text()) == about
    except (OSError, ValueError, EOFError, TypeError):
        return False


def piece(photos: list[np.ndarray], settings: Settings, index: int) -> tuple[np.ndarray, int]:
    """Make image `index` and its caption index: dead leaves, or the sharper of two squares of a photo."""
    rng = np.random.default_rng([settings.seed, index])
    if rng.random() < settings.leaves:
        return dead_leaves(SIZE, rng), CAPTIONS.index(LEAVES)
    photo = photos[rng.integers(len(photos))]
    image = max([square(photo, rng) for _ in range(2)], key=sharpness)
    flip, turns = rng.choice([1, -1]), rng.choice(4, p=[0.7, 0.1, 0.1, 0.1])
    image = np.ascontiguousarray(np.rot90(image[:, ::flip], turns))
    if rng.random() >= settings.blurred:
        return image, CAPTIONS.index(SHARP)
    blurred, name, _ = random_blur(image, rng, BLURS, scale=0.5)
    return blurred, 3 + BLURS.index(name)


def square(photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Cut a random square from a photograph and scale it down to 128 pixels."""
    side = int(np.exp(rng.uniform(np.log(SIZE), np.log(min(photo.shape[:2])))))
    y, x = (int(rng.integers(length - side + 1)) for length in photo.shape[:2])
    return cv2.resize(photo[y : y + side, x : x + side], (SIZE, SIZE), interpolation=cv2.INTER_AREA)


class Squares(Dataset):
    """Random squares of 64 pixels, (3, 64, 64) in [-1, 1], of the images, for the decoder's training."""

    def __init__(self, pieces: np.ndarray, seed: int):
        self.pieces, self.seed = pieces, seed

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        y, x = np.random.default_rng(item_seed(self.seed, key)).integers(SIZE - 64 + 1, size=2)
        return to_tensor(self.pieces[key[1]][y : y + 64, x : x + 64])


class Latents(Dataset):
    """Latents (32, 16, 16) of all images, held in memory, with their caption indices."""

    def __init__(self, latents: Tensor, captions: np.ndarray):
        self.latents, self.captions = latents, torch.from_numpy(captions)

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        return {"latent": self.latents[key[1]].float(), "caption": self.captions[key[1]]}


# ---- autoencoder: a computed encoder, a learned decoder ----------------------------------------------------


@torch.no_grad()
def start_linear(decoder: nn.Module) -> None:
    """Initialise a decoder as a linear map that preserves its input: zero residuals, orthogonal convolutions.

    The usual initialisation shrinks the image, layer by layer, below the biases: it learns nothing at first.
    """
    for module in decoder.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.orthogonal_(module.weight)
            module.bias.zero_()
    for module in decoder.modules():
        if isinstance(module, ResnetBlock | AttnBlock):
            zero_module(module.conv2 if isinstance(module, ResnetBlock) else module.proj_out)


def components(blocks: Tensor, count: int) -> Tensor:
    """Return the `count` strongest principal directions (count, d) of `blocks` (n, d), not centred."""
    _, directions = torch.linalg.eigh(blocks.T @ blocks)
    return directions.flip(1)[:, :count].T


@torch.no_grad()
def compute_encoder(autoencoder: AutoencoderKL, images: Tensor) -> None:
    """Make the encoder the linear map to the principal components of `images` (n, 3, h, w) in [-1, 1].

    The strided convolution of each level folds 2 x 2 pixels into channels: 3 -> 12 -> 32 of 48 -> 32 of 128
    components. Residual branches add nothing. So that the last norm does not divide by the image's deviation,
    each of its groups is (x, -x, 30), where the constant dominates; silu(x) - silu(-x) = x restores x.
    """
    encoder = autoencoder.encoder
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            zero_module(module)
    identity(encoder.conv_in, 3)
    x, width = images, 3
    for level, keep in zip(encoder.down[:3], (12, CHANNELS, CHANNELS), strict=True):
        for block in level.block:
            if isinstance(block.nin_shortcut, nn.Conv2d):
                identity(block.nin_shortcut, width)
        folded = F.pixel_unshuffle(x, 2)  # (n, 4 * width, h / 2, w / 2)
        rows = folded.movedim(1, -1).flatten(0, -2)
        basis = components(rows, keep)  # (keep, 4 * width)
        level.downsample.conv.weight[:keep, :width, :2, :2] = basis.view(keep, width, 2, 2)
        x, width = torch.einsum("kc,nchw->nkhw", basis, folded), keep
    deviation = x.std(dim=(0, 2, 3))
    scale = deviation**-0.5 * (deviation.sum() / CHANNELS) ** -0.5  # mean variance 1
    shortcut, norm, out = encoder.down[3].block[0].nin_shortcut, encoder.norm_out, encoder.conv_out
    constant = 30.0
    for k in range(CHANNELS):
        shortcut.weight[3 * k, k], shortcut.weight[3 * k + 1, k] = scale[k], -scale[k]
        shortcut.bias[3 * k + 2] = constant
        out.weight[k, 3 * k, 1, 1], out.weight[k, 3 * k + 1, 1, 1] = 1.0, -1.0
    norm.weight.fill_(constant * 2**0.5 / 3)  # the deviation of (0, 0, 30)
    norm.bias.fill_(constant / 3)
    norm.weight[2::3], norm.bias[2::3] = 0.0, 0.0
    # undo the shift and scale that FLUX applies when it encodes; log variance -8 makes the noise tiny
    out.weight[:CHANNELS] /= FluxAutoencoder.scale_factor
    out.bias[:CHANNELS] = FluxAutoencoder.shift_factor
    out.bias[CHANNELS:] = -8.0
    # the 1x1 convolutions around the latent apply FLUX's shift, so that the weights fit both layouts
    for convolution, sign in ((autoencoder.quant_conv, -1.0), (autoencoder.post_quant_conv, 1.0)):
        zero_module(convolution)
        identity(convolution, convolution.in_channels)
        convolution.bias[:CHANNELS] = sign * FluxAutoencoder.shift_factor


def identity(convolution: nn.Conv2d, count: int) -> None:
    """Make a convolution pass its first `count` channels through unchanged."""
    middle = convolution.kernel_size[0] // 2
    convolution.weight[range(count), range(count), middle, middle] = 1.0


def held_out_squares() -> Tensor:
    """Return squares of photographs that are not used for training: (n, 3, 128, 128) in [-1, 1]."""
    rng = np.random.default_rng(0)
    images = [read_image(path) for path in photographs()]
    return torch.stack([to_tensor(square(image, rng)) for image in images for _ in range(8)])


@torch.no_grad()
def mean_psnr(autoencoder: AutoencoderKL, images: Tensor) -> float:
    """Return the mean PSNR, in dB, of images after encoding and decoding."""
    device = next(autoencoder.parameters()).device
    restored = [autoencoder.decode(autoencoder.encode(part.to(device)).mode()) for part in images.split(16)]
    pairs = zip(torch.cat(restored).cpu(), images, strict=True)
    return float(np.mean([psnr(to_uint8(output), to_uint8(image)) for output, image in pairs]))


# ---- stages ------------------------------------------------------------------------------------------------


class Stage:
    """Training of one network: its optimizer, schedule, EMA weights and run."""

    def __init__(self, fabric: Fabric, settings: Settings, name: str, network: nn.Module, steps: int):
        self.fabric, self.settings, self.network, self.steps = fabric, settings, network, steps
        network.to(fabric.device)
        self.ema = EMA(network, settings.ema_decay)
        self.trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, settings.learning_rate, weight_decay=0.01)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.learning_rate_factor)
        parts = {
            "state_dict": network,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "ema": self.ema,
        }
        self.run = Run(fabric, settings.output_dir / name, settings, parts, MAY_CHANGE)

    def learning_rate_factor(self, step: int) -> float:
        rise = min(1.0, (step + 1) / self.settings.warmup)
        return rise * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))

    def batches(self, dataset: Dataset) -> Iterator:
        loader = self.run.loader(dataset, self.settings.batch_size, self.steps, self.settings.seed)
        return self.run.batches(loader, self.steps)

    def update(self, loss: Tensor) -> bool:
        """Take one optimizer step; return True when it is time to save."""
        self.optimizer.zero_grad()
        self.fabric.backward(loss)
        average_gradients(self.fabric, self.optimizer)
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.scheduler.step()
        self.ema.update(self.network)
        self.run.advance({"loss": loss})
        return self.run.step % self.settings.save_steps == 0 or self.run.step == self.steps

    def save(self, scores: dict[str, float]) -> None:
        values = {f"train/{name}": value for name, value in self.run.means().items()} | scores
        self.run.log(values)
        self.run.save()
        self.run.say(f"step {self.run.step}: " + ", ".join(f"{k} {v:.3f}" for k, v in values.items()))


def base_model() -> LatentDiffusion:
    """Build the whole small model, without a ControlNet, with random weights."""
    params = read_config(CONFIG)["params"]
    names = "unet_config first_stage_config cond_stage_config parameterization timestep_spacing scale_factor"
    torch.manual_seed(0)  # the text tower is never trained: random embeddings tell prompts apart
    return LatentDiffusion(**{name: params[name] for name in names.split()})


def start_model(settings: Settings, pieces: np.ndarray) -> LatentDiffusion:
    """Return the model of `init_weights`, or a new one whose encoder is computed from the images.

    Raises ValueError if the weights do not fit models/small_diffusion.yaml.
    """
    model = base_model()
    if settings.init_weights:
        load_base(model, settings.init_weights)
    else:
        start_linear(model.first_stage_model.decoder)
        compute_encoder(model.first_stage_model, torch.stack([to_tensor(p) for p in pieces[::4]]))
    return model


def load_base(model: LatentDiffusion, path: Path) -> None:
    weights = read_weights(path)
    check_weights(model.state_dict(), weights, path)
    model.load_state_dict(weights, strict=False)


@torch.no_grad()
def encode_all(model: LatentDiffusion, pieces: np.ndarray) -> Tensor:
    """Encode all images to scaled latents (n, 32, 16, 16) in half precision."""
    parts = []
    for start in tqdm(range(0, len(pieces), 64), "encoding"):
        images = torch.stack([to_tensor(image) for image in pieces[start : start + 64]])
        latents = model.scale_factor * model.encode_first_stage(images).mode()
        parts.append(latents.half())
    return torch.cat(parts)


def cached_latents(model: LatentDiffusion, pieces: np.ndarray, folder: Path) -> Tensor:
    """Return the latents of all images (`encode_all`), computed once for an encoder and kept in `folder`.

    A damaged file is computed again.
    """
    key = hashlib.sha256((folder / "pieces.json").read_bytes())
    for value in model.first_stage_model.encoder.state_dict().values():
        key.update(value.numpy().tobytes())
    path = folder / f"latents_{key.hexdigest()[:16]}.safetensors"
    try:
        return read_weights(path)["latents"]
    except (FileNotFoundError, ValueError, KeyError):
        latents = encode_all(model, pieces)
        write_weights(path, {"latents": latents}, {})
        return latents


def train_autoencoder(fabric: Fabric, settings: Settings, pieces: np.ndarray, _: np.ndarray) -> None:
    autoencoder = start_model(settings, pieces).first_stage_model
    autoencoder.decoder.requires_grad_(True)
    held_out = held_out_squares()
    stage = Stage(fabric, settings, "autoencoder", autoencoder, settings.autoencoder_steps)
    for image in stage.batches(Squares(pieces, settings.seed)):
        with fabric.autocast():
            restored = autoencoder.decode(autoencoder.encode(image).mode().detach()).float()
        if stage.update(F.l1_loss(restored, image) + F.mse_loss(restored, image)):
            with stage.ema.applied(autoencoder):
                score = mean_psnr(autoencoder, held_out)
            stage.save({"val/psnr": score})


def train_unet(fabric: Fabric, settings: Settings, pieces: np.ndarray, captions: np.ndarray) -> None:
    model = start_model(settings, pieces)
    with fabric.rank_zero_first():
        latents = cached_latents(model, pieces, settings.output_dir)
    data = Latents(latents, captions)
    embeddings = model.get_learned_conditioning(CAPTIONS).to(fabric.device)  # (captions, 77, 16)
    model.to(fabric.device)
    stage = Stage(fabric, settings, "unet", model.model, settings.unet_steps)
    for batch in stage.batches(data):
        x, b = batch["latent"], len(batch["latent"])
        shown = torch.where(torch.rand(b, device=fabric.device) < 0.1, 0, batch["caption"])
        t = torch.randint(0, model.num_timesteps, (b,), device=fabric.device)
        with fabric.autocast():
            loss, _ = model.p_losses(x, {"c_crossattn": [embeddings[shown]]}, t, torch.randn_like(x))
        if stage.update(loss):
            stage.save({})


def train_flux(fabric: Fabric, settings: Settings, pieces: np.ndarray, captions: np.ndarray) -> None:
    """Train by flow matching with a control image: half of the time the target itself, with the prompt KEEP,
    else another image, with the prompt OTHER."""
    model = start_model(settings, pieces)
    sharp = captions < 3  # no blurred ones
    with fabric.rank_zero_first():
        latents = cached_latents(model, pieces, settings.output_dir)
    data = Latents(latents[torch.from_numpy(sharp)], captions[sharp])
    folder = settings.output_dir / "small_kontext"
    write_text_encoders(folder, model.cond_stage_model)
    prompts = [encode_prompt(folder, prompt, "cpu") for prompt in (KEEP, OTHER)]
    both = [torch.cat([prompt[name] for prompt in prompts]).float() for name in ("t5", "pooled")]
    t5, pooled = (values.to(fabric.device) for values in both)
    torch.manual_seed(settings.seed)
    flux = Flux(FLUX)
    for modulation in (m for m in flux.modules() if isinstance(m, Modulation)):
        zero_module(modulation)  # each block starts as the identity
    zero_module(flux.final_layer.linear)
    stage = Stage(fabric, settings, "flux", flux, settings.flux_steps)
    for batch in stage.batches(data):
        target, b = batch["latent"], len(batch["latent"])
        is_other = (torch.rand(b, device=fabric.device) < 0.5).long()
        control = torch.where(is_other[:, None, None, None] == 1, target.roll(1, dims=0), target)
        sigma = torch.sigmoid(0.5 + torch.randn(b, device=fabric.device)).clamp(min=1e-3)
        level, noise = sigma[:, None, None, None], torch.randn_like(target)
        guidance = 1 + 3 * torch.rand(b, device=fabric.device)  # the network learns to ignore it
        x = (1 - level) * target + level * noise
        with fabric.autocast():
            velocity = predict_velocity(flux, x, control, t5[is_other], pooled[is_other], sigma, guidance)
        if stage.update(F.mse_loss(velocity, noise - target)):
            stage.save({})


# ---- text encoders and files -------------------------------------------------------------------------------


def write_text_encoders(folder: Path, clip: FrozenCLIPEmbedder) -> None:
    """Write the two text encoders of a FLUX folder, with random weights: the small Stable Diffusion's CLIP,
    and a T5 with one layer that reads characters. They only have to tell prompts apart."""
    tower = clip.transformer
    width = tower.text_model.final_layer_norm.normalized_shape[0]
    (folder / "text_encoder").mkdir(parents=True, exist_ok=True)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    (folder / "text_encoder" / "config.json").write_text(json.dumps(sizes, indent=1))
    write_half(folder / "text_encoder" / "model.safetensors", tower.state_dict(), {})
    characters = {chr(code): code - 32 + 2 for code in range(32, 127)}
    tokenizer = Tokenizer(WordLevel({"<pad>": 0, "<unk>": 1, **characters}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
    (folder / "tokenizer_2").mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer_2" / "tokenizer.json"))
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 1}
    torch.manual_seed(1)
    t5 = T5EncoderModel(T5Config(vocab_size=len(characters) + 2, n_positions=48, **sizes))
    t5.save_pretrained(folder / "text_encoder_2")


def export(settings: Settings) -> None:
    """Write the trained models in half precision: models/small_diffusion.safetensors, models/small_kontext/;
    and two images: held-out photographs after the autoencoder, and samples of the UNet without a hint."""
    settings.models.mkdir(parents=True, exist_ok=True)
    trained = {}
    for name in ("autoencoder", "unet", "flux"):
        checkpoint = settings.output_dir / name / "checkpoints" / "last.ckpt"
        if checkpoint.is_file():
            trained[name], content = read_trained(checkpoint)
            print(f"{name}: step {content['step']}")
        elif name != "flux" and settings.init_weights is None:
            raise FileNotFoundError(
                f"{checkpoint} is missing: train it first (python -m extras.train_small_base {name})"
            )
    model = base_model()
    if settings.init_weights:
        load_base(model, settings.init_weights)
    for name, network in (("autoencoder", model.first_stage_model), ("unet", model.model)):
        if name in trained:
            network.load_state_dict(trained[name])
    held_out = held_out_squares()
    scores = {"autoencoder_psnr": round(mean_psnr(model.first_stage_model, held_out), 2)}
    about = {"command": "python -m extras.train_small_base all", **plain(settings), **scores}
    tensors = {name: value for name, value in model.state_dict().items() if "." in name}
    write_half(settings.models / "small_diffusion.safetensors", tensors, about)
    kept = model.decode_first_stage(model.scale_factor * model.encode_first_stage(held_out[::4]).mode())
    write_image(settings.output_dir / "autoencoder.png", rows([held_out[::4], kept]))
    write_image(settings.output_dir / "samples.png", rows([unconditional(model, c) for c in (SHARP, LEAVES)]))
    if "flux" in trained:
        flux = Flux(FLUX)
        flux.load_state_dict(trained["flux"])
        sizes = read_config(CONFIG)["params"]["first_stage_config"]["params"]["ddconfig"]
        autoencoder = FluxAutoencoder(sizes)
        weights = model.first_stage_model.state_dict()
        own = {k: v for k, v in weights.items() if not k.startswith(("quant", "post_quant"))}
        autoencoder.load_state_dict(own)
        folder = settings.models / "small_kontext"
        folder.mkdir(parents=True, exist_ok=True)
        save_flux(folder / TRANSFORMER, flux.half(), **FACTS["kontext"])
        metadata = {"ddconfig": json.dumps(dict(sizes))}
        write_weights(folder / AUTOENCODER, autoencoder.half().state_dict(), metadata)
        write_text_encoders(folder, model.cond_stage_model)
    export_runs(settings)
    print(f"written: {settings.models}; look at {settings.output_dir}/autoencoder.png and samples.png")


def export_runs(settings: Settings) -> None:
    """Export the other scripts' runs on the base, in the folders deblur, inpaint and kontext_lora of
    `output_dir`: ControlNets in half precision with their settings, the LoRA unchanged."""
    for kind in ("deblur", "inpaint"):
        checkpoint = settings.output_dir / kind / "checkpoints" / "best.ckpt"
        if checkpoint.is_file():
            weights, content = read_trained(checkpoint)
            about = {**content["settings"], "step": content["global_step"]}
            write_half(settings.models / f"small_{kind}.safetensors", weights, about, **BASE, **FACTS[kind])
    lora = settings.output_dir / "kontext_lora" / "best" / LORA_FILE
    if lora.is_file():
        shutil.copy(lora, settings.models / "small_kontext_lora.safetensors")


@torch.no_grad()
def unconditional(model: LatentDiffusion, caption: str, count: int = 12) -> Tensor:
    """Sample images (count, 3, 128, 128) from noise and a caption alone."""
    text = model.get_learned_conditioning([caption]).expand(count, -1, -1)
    noise = torch.randn(count, CHANNELS, SIZE // 8, SIZE // 8, generator=item_generator(0))
    latents = DDIMSampler(model).sample(50, count, noise.shape[1:], {"c_crossattn": [text]}, x_T=noise)[0]
    return model.decode_first_stage(latents)


def rows(batches: list[Tensor]) -> np.ndarray:
    """Join batches (n, 3, h, w) in [-1, 1] into one uint8 image with a row for each batch."""
    return np.vstack([np.hstack([to_uint8(image) for image in batch]) for batch in batches])


TRAINERS = {"autoencoder": train_autoencoder, "unet": train_unet, "flux": train_flux}


def main(settings: Settings) -> None:
    check_ranges(settings)
    if settings.init_weights:  # raises before images are cut
        load_base(base_model(), settings.init_weights)
    if settings.stage != "export":
        fabric = start_fabric(settings.devices, settings.precision, settings.seed)
        settings.output_dir.mkdir(parents=True, exist_ok=True)
        with fabric.rank_zero_first():  # the others read what the first process has written
            pieces, captions = make_pieces(settings, settings.output_dir)
        for name in TRAINERS if settings.stage == "all" else [settings.stage]:
            TRAINERS[name](fabric, settings, pieces, captions)
    if settings.stage in ("all", "export"):
        export(settings)


if __name__ == "__main__":
    run_main(main, Settings)
