"""BGAN and DBGAN: one network learns to blur as real cameras do, the other to undo it. Explained in one file.

Zhang, Luo, Zhong, Ma, Stenger, Liu, Li: Deblurring by Realistic Blurring, CVPR 2020.

    python train_dbgan.py all --blur_data RWBI/train --data gopro/train --val_data gopro/test --precision bf16
    python train_dbgan.py all --demo            # minutes on two CPU cores, needs no data at all

`blur` is the unpaired half of `all`, `deblur` the other; `paired` trains both networks on pairs at once.
The same command again resumes a stopped run. Published for GoPro: 31.10 dB. More in docs/dbgan.md.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional as F

from harness import flags
from harness.run import Run, average_gradients, last_checkpoint, start_fabric, unscale_gradients
from harness.settings import check_counts, check_fractions, plain, run_main
from harness.training_data import Data, open_data
from harness.validation import Spectra, line, report
from ldm.checkpoint import fingerprint
from ldm.data.demo import write_demo
from ldm.data.patches import open_source
from ldm.modules import gan, generators
from ldm.modules.ema import EMA
from ldm.modules.image_degradation.blur import BLUR_TYPES
from ldm.modules.losses import PixelLoss
from ldm.modules.perceptual import FILE, PerceptualLoss

# ---- settings: edit here, or override on the command line --------------------------------------------------


@dataclass
class Settings:
    """Train BGAN (sharp to blurry) and DBGAN (blurry to sharp)."""

    mode: tyro.conf.Positional[Literal["paired", "blur", "deblur", "all"]] = "all"
    demo: bool = False  # small networks on generated data, minutes on a CPU; other flags still count
    output_dir: Path = Path("outputs/dbgan")  # a folder of logs, pictures and checkpoints for every stage

    data: Path | None = None  # pairs: GoPro tree, list of `blurry sharp` lines, or paired .h5
    blur_data: Path | None = None  # real blurred photographs: a folder, or unpaired .h5 (with its sharp ones)
    sharp_dir: Path | None = None  # sharp photographs for `blur`; without --data for all, blurred on the fly
    val_data: Path | None = None  # pairs to evaluate on, in any form of --data
    crop_size: int = 128  # of training images, a multiple of 16

    generator: Literal["dbgan", *generators.OTHERS] = "dbgan"  # the network that deblurs (docs/dbgan.md)
    width: int = 64  # channels of the generators
    init_weights: Path | None = None  # start the deblurring generator from this file
    perceptual_loss_weight: float = 1.0  # 0: VGG-19 is not needed

    blur_epochs: int = 20  # passes over the data, of `blur`
    pretrain_epochs: int = 20  # of `deblur`, on the content loss alone
    epochs: int = 20  # adversarial ones, of `deblur` and of `paired`
    max_steps: flags.MaxSteps = -1  # optimizer steps of every phase; above 0 it replaces the epochs
    batch_size: flags.BatchSize = 4  # of each device
    learning_rate: float = 1e-4  # at the start, by a cosine down to

    precision: flags.Precision = "32"  # bf16 or 16: mixed, faster on GPUs
    devices: flags.Devices = 1  # GPUs of each machine (processes on a CPU)

    dead_leaves: int = 0  # without it: generated pictures in every epoch, beside --sharp_dir or alone
    val_blur_data: Path | None = None  # real blurred photographs to compare BGAN's with; None: --blur_data
    val_fraction: float = 0.05  # without val_data: the part of the data that is held out (whole sequences)
    val_images: int = 32  # evaluate on at most that many, drawn once
    val_crop: int = 256  # evaluate on that many pixels in the middle; 0 = whole images: far slower
    pairs: Path | None = None  # real pairs mixed among crops blurred on the fly, in any form of --data
    pairs_fraction: float = 0.1  # fraction of the crops that come from --pairs
    realistic_blur: bool = False  # blur on the fly as real cameras do: varying shake, noise, JPEG
    blur_types: tuple[str, ...] = tuple(BLUR_TYPES)  # blur types made on the fly, without --realistic_blur
    blur_scale: float = 1.0  # scale of the blur sizes, without --realistic_blur
    jpeg_probability: float = 0.0  # part of the images blurred on the fly that went through a JPEG file
    sharp_fraction: float = 0.0  # part of them that is not, or hardly, blurred: do no harm
    photo_crops: int = 1  # crops of each photograph of --sharp_dir in an epoch: its ratio to --dead_leaves
    crop_candidates: int = 1  # windows drawn for a crop of --sharp_dir, of which the sharpest is taken
    color_jitter: float = 0.1  # the same for both pictures of an item: against a tint of the results
    cache: bool = False  # keep all training images decoded in memory

    blocks: int = 16  # of the deblurring generator; of nafnet's fourth encoder, mprnet's parts of stage 3
    blur_blocks: int = 9  # of BGAN
    sampling: bool = False  # work at half resolution: 4 times less to compute
    batch_norm: bool = False  # in BGAN; the paper has it, colours are steadier without
    varying_noise: bool = False  # BGAN draws four numbers for every pixel, not for the whole picture
    discriminator_width: int = 64  # channels of the discriminators' first layer

    init_std: float = 0.01  # deviation of first weights (dbgan, srresnet, deblurgan); narrow ones want more
    init_blur_weights: Path | None = None  # and BGAN from this
    content_loss: PixelLoss = "l1"  # distance of pixels
    fft_loss_weight: float = 0.0  # of the distance of Fourier transforms beside it
    content_loss_weight: float = 0.005  # alpha
    adversarial_loss_weight: float = 0.01  # beta
    cycle_loss_weight: float = 10.0  # in `blur`: there and back
    identity_loss_weight: float = 5.0  # in `blur`: what is blurry already stays
    vgg_file: Path = FILE  # weights of VGG-19, of the perceptual loss
    bgan_path: Path | None = None  # for `deblur`; None takes OUTPUT_DIR/blur/bgan.safetensors
    generated_fraction: float = 0.5  # of DBGAN's blurry pictures that BGAN makes, from the sharp ones

    accumulate_grad_batches: flags.Accumulate = 4  # batches to one optimizer step
    schedule: Literal["cosine", "constant"] = "cosine"  # constant suits runs that are continued later
    last_learning_rate: float = 1e-6  # learning rate at the end of the cosine
    warmup_steps: int = 0  # optimizer steps over which the learning rate rises from 0
    max_grad_norm: float = 0.0  # highest global norm of all gradients; 0 = not clipped
    pool_size: int = 50  # earlier pictures that the discriminators of `blur` see again; 0 = none
    ema_decay: float = 0.999  # of the averaged weights, which are evaluated and used; 0 for none
    seed: int = 0  # of the data's order, first weights and noise

    channels_last: bool = True  # memory layout: faster, above all on a GPU
    compile: bool = False  # torch.compile: minutes at the start, faster steps
    num_nodes: int = 1  # machines
    num_workers: int = 8  # processes that prepare images
    log_epoch: int = 1  # evaluate and save every so many epochs


DEMO_DATA = Path("outputs/dbgan_demo/data")
DEMO = {
    "output_dir": DEMO_DATA.parent,
    "data": DEMO_DATA / "train",
    "blur_data": DEMO_DATA / "real",
    "val_data": DEMO_DATA / "valid",
    "val_blur_data": DEMO_DATA / "valid" / "blur",
    "val_crop": 256,
    "crop_size": 48,
    "color_jitter": 0.2,
    "cache": True,
    "width": 16,
    "blocks": 2,
    "blur_blocks": 1,
    "discriminator_width": 16,
    "init_std": 0.08,
    "perceptual_loss_weight": 0.0,
    "content_loss_weight": 1.0,
    "adversarial_loss_weight": 0.001,
    "cycle_loss_weight": 1.0,
    "identity_loss_weight": 0.5,
    "generated_fraction": 0.2,
    "blur_epochs": 6,
    "pretrain_epochs": 6,
    "epochs": 4,
    "accumulate_grad_batches": 1,
    "learning_rate": 1e-3,
    "ema_decay": 0.99,
    "channels_last": True,
    "num_workers": 1,
    "log_epoch": 2,
}
# What may differ when a run is resumed: it changes the speed, not the weights (beyond rounding).
MAY_CHANGE = "devices num_nodes batch_size num_workers log_epoch cache channels_last compile".split()
MAY_CHANGE += ["mode", "val_crop"]
LENGTH = ["max_steps", "pretrain_epochs", "epochs"]  # may change too where the schedule is constant
SOFT_REAL, SOFT_FAKE = 0.9, 0.1  # soft labels of the least-squares discriminators


# ---- losses ------------------------------------------------------------------------------------------------


@dataclass
class Players:
    """All that a stage trains, and what it needs besides. `blurrer` is a finished BGAN."""

    generators: nn.ModuleDict
    discriminators: nn.ModuleDict
    pools: dict[str, gan.ImagePool] = field(default_factory=dict)
    perceptual: PerceptualLoss | None = None
    blurrer: nn.Module | None = None


def blurred(blurrer: nn.Module, sharp: Tensor) -> Tensor:
    """What BGAN makes of sharp pictures, with new noise."""
    return blurrer(sharp, blurrer.draw_noise(sharp))


def relativistic_losses(
    players: Players, name: str, made: Tensor | list[Tensor], real: Tensor, alpha: float, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Losses of a discriminator and of the generator that `made` comes from (paper, section 3).

    The generator's is perceptual + alpha * content + beta * relativistic. Both can be minimised in one
    backward: `made` is detached for the first, the discriminator frozen for the second.
    """
    discriminator, shown = players.discriminators[name], generators.final(made)
    loss_d = gan.relativistic_d_loss(*gan.judge(discriminator, real, shown.detach()))
    with gan.frozen(discriminator):
        adversarial = gan.relativistic_g_loss(*gan.judge(discriminator, real, shown))
    content = generators.content_loss(made, real, settings.content_loss, settings.fft_loss_weight)
    loss_g = alpha * content + settings.adversarial_loss_weight * adversarial
    if players.perceptual:
        distance = players.perceptual(shown * 2 - 1, real * 2 - 1).mean()
        loss_g = loss_g + settings.perceptual_loss_weight * distance
    return loss_d, loss_g


# Each of these yields its losses in terms that share no graph: `train_step` is done with one before the next
# is computed, which takes a third of the memory in `blur`.
Terms = Iterator[dict[str, Tensor]]


def content_losses(players: Players, settings: Settings, blurry: Tensor, sharp: Tensor) -> Terms:
    """DBGAN before it meets a discriminator."""
    blurry = blurred_again(players.blurrer, settings, blurry, sharp)
    restored = players.generators["deblur"](blurry)
    loss = generators.content_loss(restored, sharp, settings.content_loss, settings.fft_loss_weight)
    yield {"total_loss": loss}


def deblur_losses(players: Players, settings: Settings, blurry: Tensor, sharp: Tensor) -> Terms:
    """DBGAN against its discriminator (paper, equations of RDBL)."""
    blurry = blurred_again(players.blurrer, settings, blurry, sharp)
    restored = players.generators["deblur"](blurry)
    alpha = settings.content_loss_weight
    loss_d, loss_g = relativistic_losses(players, "sharp", restored, sharp, alpha, settings)
    yield {"loss_d": loss_d, "total_loss": loss_g}


def paired_losses(players: Players, settings: Settings, blurry: Tensor, sharp: Tensor) -> Terms:
    """Both networks on pairs; DBGAN sees what BGAN makes as well."""
    made = blurred(players.generators["blur"], sharp)
    alpha = 0.0 if players.perceptual else settings.content_loss_weight  # BGAN's has no content term
    loss_d, loss_g = relativistic_losses(players, "blur", made, blurry, alpha, settings)
    yield {"loss_d_blur": loss_d, "loss_g": loss_g}
    blurry = mix(made.detach().clamp(0, 1), blurry, settings.generated_fraction)
    for found in deblur_losses(replace(players, blurrer=None), settings, blurry, sharp):
        yield {"loss_d_sharp": found["loss_d"], "loss_g": found["total_loss"]}


def unpaired_losses(players: Players, settings: Settings, blurry: Tensor, sharp: Tensor) -> Terms:
    """BGAN and a network back, without pairs: least-squares GAN, cycles, identity (Zhu et al. 2017)."""

    blur = partial(blurred, players.generators["blur"])

    def deblur(image: Tensor) -> Tensor:
        return generators.final(players.generators["deblur"](image))

    ways = [("blur", blur, deblur, sharp, blurry), ("sharp", deblur, blur, blurry, sharp)]
    for name, there, back, source, real in ways:
        made, discriminator = there(source), players.discriminators[name]
        real_scores, fake_scores = gan.judge(discriminator, real, players.pools[name](made))
        loss_d = gan.least_squares(real_scores, SOFT_REAL) + gan.least_squares(fake_scores, SOFT_FAKE)
        with gan.frozen(discriminator):
            _, fake_scores = gan.judge(discriminator, real, made)
        cycle = F.l1_loss(back(made).float(), source)
        loss_g = gan.least_squares(fake_scores, SOFT_REAL) + settings.cycle_loss_weight * cycle
        yield {f"loss_d_{name}": loss_d / 2, "loss_g": loss_g}
    for _, there, _, _, real in ways:
        yield {"loss_g": settings.identity_loss_weight * F.l1_loss(there(real).float(), real)}


def blurred_again(blurrer: nn.Module | None, settings: Settings, blurry: Tensor, sharp: Tensor) -> Tensor:
    """The blurry pictures, some of them replaced by BGAN's from the sharp ones."""
    if blurrer is None:
        return blurry
    with torch.no_grad():
        made = blurred(blurrer, sharp).float().clamp(0, 1)
    return mix(made, blurry, settings.generated_fraction)


def mix(made: Tensor, real: Tensor, fraction: float) -> Tensor:
    chosen = torch.rand(len(real), 1, 1, 1) < fraction
    return torch.where(chosen.to(real.device), made.to(real), real)


def train_step(
    fabric: Fabric,
    optimizer: torch.optim.Optimizer,
    batch: dict,
    parts: int,
    losses: Callable[[Tensor, Tensor], Terms],
    max_grad_norm: float = 0.0,
) -> dict[str, Tensor]:
    """One step of all networks on the mean gradient of `parts` equal parts of a batch; the mean losses."""
    optimizer.zero_grad()
    sums: dict[str, Tensor] = {}
    pieces = (generators.to_unit(batch[name]).chunk(parts) for name in ("blurry", "sharp"))
    for blurry, sharp in zip(*pieces, strict=True):
        terms = losses(blurry, sharp)
        while True:
            with fabric.autocast():
                found = next(terms, None)
            if found is None:
                break
            fabric.backward(sum(found.values()) / parts)
            sums |= {name: sums.get(name, 0) + value.detach() / parts for name, value in found.items()}
    average_gradients(fabric, optimizer)  # DDP's wrapper cannot run a network twice in a step
    if max_grad_norm:
        unscale_gradients(fabric, optimizer)
        for group in optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], max_grad_norm)
    optimizer.step()
    return sums


def learning_rate_factor(
    step: int, phases: list[int], last: float, schedule: str = "cosine", warmup_steps: int = 0
) -> float:
    """Learning-rate multiplier after `step` steps: in each phase 1, or a cosine from 1 to `last`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    phases = [length for length in phases if length]
    while len(phases) > 1 and step >= phases[0]:
        step -= phases.pop(0)
    return last + (1 - last) * (1 + math.cos(math.pi * min(1, step / phases[0]))) / 2


def check(settings: Settings) -> None:
    """Raise ValueError for numbers that cannot be."""
    check_counts(settings, "blur_epochs batch_size accumulate_grad_batches log_epoch")
    check_counts(settings, "width blocks blur_blocks discriminator_width devices num_nodes")
    if not 0 <= settings.last_learning_rate <= settings.learning_rate:
        last = settings.last_learning_rate
        raise ValueError(f"last_learning_rate must lie between 0 and learning_rate, not {last}")
    check_counts(settings, "pretrain_epochs epochs pool_size warmup_steps", least=0)
    check_fractions(settings, "ema_decay", whole=False)
    check_fractions(settings, "generated_fraction")


# ---- the whole run -----------------------------------------------------------------------------------------


STAGES = {  # what is trained, and by which losses
    "paired": ("blur deblur", "blur sharp", [paired_losses]),
    "blur": ("blur deblur", "blur sharp", [unpaired_losses]),
    "deblur": ("deblur", "sharp", [content_losses, deblur_losses]),
}
# Settings that only another stage reads: they may change.
UNUSED = {
    "paired": "bgan_path blur_epochs pretrain_epochs pool_size blur_data cycle_loss_weight "
    "identity_loss_weight".split(),
    "blur": "bgan_path pretrain_epochs epochs generated_fraction content_loss content_loss_weight "
    "perceptual_loss_weight adversarial_loss_weight vgg_file".split(),
    "deblur": "blur_epochs pool_size blur_data val_blur_data cycle_loss_weight identity_loss_weight".split(),
}


def make_players(settings: Settings, stage: str, vgg: nn.Module | None, device: torch.device) -> Players:
    """The networks of a stage, on their device."""
    makers, judges = (names.split() for names in STAGES[stage][:2])
    width = settings.discriminator_width
    players = Players(
        nn.ModuleDict({kind: first_generator(kind, settings, stage) for kind in makers}),
        nn.ModuleDict({n: gan.initialise(gan.Discriminator(width)) for n in judges}),
        {name: gan.ImagePool(settings.pool_size) for name in judges},
        vgg,
    )
    for networks in (players.generators, players.discriminators):
        networks.to(device, memory_format=torch.channels_last if settings.channels_last else None)
        for network in networks.values() if settings.compile else ():
            network.compile()
    if stage == "deblur" and settings.generated_fraction:
        blurrer = generators.load_generator(bgan_path(settings), "blur")
        players.blurrer = blurrer.requires_grad_(False).to(device)
    return players


def first_generator(kind: str, settings: Settings, stage: str) -> nn.Module:
    """A generator with its first weights; those of a file are not read where the stage is resumed."""
    path = settings.init_blur_weights if kind == "blur" else settings.init_weights
    if last_checkpoint(settings.output_dir / stage).is_file():
        path = None
    return generators.begin(kind, plain(settings), path, settings.init_std)


def bgan_path(settings: Settings) -> Path:
    return settings.bgan_path or settings.output_dir / "blur" / "bgan.safetensors"


def main(settings: Settings) -> None:
    check(settings)
    stages = ["blur", "deblur"] if settings.mode == "all" else [settings.mode]

    # What would fail later fails now: data, first weights, BGAN, VGG-19
    fabric = start_fabric(settings.devices, settings.num_nodes, settings.precision, settings.seed)
    if settings.demo:
        write_demo(DEMO_DATA, (settings.data, settings.val_data, settings.blur_data))
    data = {stage: open_data(settings, stage) for stage in stages}
    for stage in stages:
        for kind in STAGES[stage][0].split():
            first_generator(kind, settings, stage)
    if settings.mode == "deblur" and settings.generated_fraction and not bgan_path(settings).is_file():
        raise FileNotFoundError(
            f"BGAN not found: {bgan_path(settings)}; train it with `blur`, give --bgan_path, or do without "
            "(--generated_fraction 0)"
        )
    perceptual = None
    if settings.perceptual_loss_weight and settings.mode != "blur":
        perceptual = PerceptualLoss(file=settings.vgg_file).to(fabric.device)
    for stage in stages:
        fabric.seed_everything(settings.seed, verbose=False)
        train(fabric, settings, stage, data[stage], perceptual)


def train(fabric: Fabric, settings: Settings, stage: str, data: Data, vgg: nn.Module | None) -> None:
    """One stage from where it stands to its end."""
    # Networks, optimizer, average
    players = make_players(settings, stage, vgg, fabric.device)
    networks = players.generators
    parameters = [*networks.parameters(), *players.discriminators.parameters()]
    fused = fabric.device.type == "cuda"
    betas = (0.5, 0.999) if stage == "blur" else (0.9, 0.999)
    optimizer = torch.optim.Adam(parameters, settings.learning_rate, betas, fused=fused)
    fabric_optimizer = fabric.setup_optimizers(optimizer)
    ema = EMA(networks, settings.ema_decay)

    # Phases: their losses and their steps
    dataset, held_out = data
    batch_size = settings.batch_size * settings.accumulate_grad_batches
    steps_per_epoch = max(1, round(len(dataset) / (batch_size * fabric.world_size)))
    epochs = {"blur": [settings.blur_epochs], "deblur": [settings.pretrain_epochs, settings.epochs]}
    phases = [steps_per_epoch * count for count in epochs.get(stage, [settings.epochs])]
    if settings.max_steps > 0:
        phases = [settings.max_steps if count else 0 for count in phases]
    if not sum(phases):
        raise ValueError("nothing to train: pretrain_epochs and epochs are both 0")
    steps, last = sum(phases), settings.last_learning_rate / settings.learning_rate
    schedule = partial(
        learning_rate_factor,
        phases=phases,
        last=last,
        schedule=settings.schedule,
        warmup_steps=settings.warmup_steps,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)

    # Resume
    folder = settings.output_dir / stage
    parts = {"state_dict": networks, "discriminators": players.discriminators, "optimizer": optimizer}
    parts |= {"scheduler": scheduler, "ema": ema}
    parts |= {f"pool_{name}": pool for name, pool in players.pools.items()}
    known = {**plain(settings), "samples": len(dataset), "blurrer": fingerprint(players.blurrer)}
    may_change = [*MAY_CHANGE, *UNUSED[stage], *(LENGTH if settings.schedule == "constant" else [])]
    run = Run(fabric, folder, known, parts, may_change, defaults=Settings())
    baseline, _ = held_out.evaluate(lambda blurry: blurry, run)
    check_blur = None
    if "blur" in networks:
        real = settings.val_blur_data or (settings.blur_data if stage == "blur" else None)
        check_blur = Spectra(held_out, open_source(real, "blur") if real else None)
    run.say(f"{stage}: {len(dataset)} training images, {steps} steps; {len(held_out)} held out")

    # Loop
    loader = run.loader(dataset, batch_size, steps, settings.seed, settings.num_workers)
    for batch in run.batches(loader, steps):
        losses = STAGES[stage][2][0 if run.step < phases[0] else -1]
        losses = partial(losses, players, settings)
        how = settings.accumulate_grad_batches, losses, settings.max_grad_norm
        metrics = train_step(fabric, fabric_optimizer, batch, *how)
        scheduler.step()
        ema.update(networks)
        run.advance(metrics, batch["path"])
        if run.step % (settings.log_epoch * steps_per_epoch) and run.step not in (phases[0], steps):
            continue

        # Evaluate the averaged weights, log, save
        values = {f"train/{name}": value for name, value in run.means().items()}
        with ema.applied(networks):
            restore = partial(generators.restore_image, networks["deblur"], precision=settings.precision)
            scores, picture = held_out.evaluate(restore, run)
            run.picture("deblurred", picture)
            if check_blur:
                blur = partial(generators.blur_image, networks["blur"], precision=settings.precision)
                spectrum, picture = check_blur(blur)
                run.picture("blurred", picture)
                values |= spectrum
            if fabric.is_global_zero and run.step in (phases[0], steps):
                suffix = "" if run.step == steps else "_content"
                generators.export(networks, plain(settings), folder, suffix)
        run.log(values | report(scores, baseline))
        run.save(score=scores["psnr"])
        run.say(f"{stage} epoch {run.step // steps_per_epoch}: {line(values, scores, baseline)}")
    what, where = ("bgan", "blurred") if stage == "blur" else ("dbgan", "restored")
    weights = folder / f"{what}.safetensors"
    run.finish(f"python infer.py {what} --checkpoint_path {weights} --input PHOTOS --output_dir {where}")


if __name__ == "__main__":
    run_main(main, Settings, DEMO)
