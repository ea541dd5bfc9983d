import csv
import json
import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import vgg19

import infer
import train_dbgan as script
from harness.run import start_fabric
from harness.validation import HeldOut, Spectra
from ldm import checkpoint
from ldm.data import demo
from ldm.data.image import list_images, photographs, read_image, to_tensor, write_image
from ldm.data.pairs import find_pairs
from ldm.metrics import radial_power, spectrum_distance
from ldm.modules.generators import content_loss, restore_image
from ldm.modules.image_pool import ImagePool
from ldm.modules.mprnet import MPRNet
from ldm.modules.nafnet import NAFNet
from ldm.modules.sftnet import SFT, SFTNet
from tests.fill import draw, fill, relative_error
from train_dbgan import (
    GENERATORS,
    BGANGenerator,
    DBGANGenerator,
    Discriminator,
    Settings,
    Weights,
    export,
    load_generator,
    main,
    relativistic_d_loss,
    relativistic_g_loss,
)

ROOT = Path(__file__).parent.parent
REFERENCE = Path(__file__).parent / "reference"
TINY = {
    "crop_size": 16,
    "width": 4,
    "blocks": 1,
    "perceptual_loss_weight": 0.0,
    "epochs": 1,
    "batch_size": 2,
    "accumulate_grad_batches": 2,
    "learning_rate": 1e-3,
    "num_workers": 0,
    "val_crop": 32,
}


@pytest.fixture
def data(tmp_path):
    """A GoPro tree of two sequences and a folder of blurred photographs of another size."""
    for sequence, name in (("GOPR1", "coffee.png"), ("GOPR2", "rocket.jpg")):
        image = read_image(photographs((name,))[0])
        for kind in ("blur", "sharp"):
            folder = tmp_path / "data" / sequence / kind
            folder.mkdir(parents=True)
            for frame in range(4):
                crop = image[100 + frame : 140 + frame, 200:250]
                write_image(folder / f"{frame}.png", crop if kind == "sharp" else smooth(crop))
    (tmp_path / "RWBI").mkdir()
    for number in range(5):
        write_image(
            tmp_path / "RWBI" / f"{number}.png", smooth(image[40 * number : 40 * number + 33, 300:340])
        )
    return tmp_path


def smooth(image):
    blurred = F.avg_pool2d(to_tensor(image)[None], 3, 1, 1, count_include_pad=False)[0]
    return ((blurred + 1) * 127.5).byte().permute(1, 2, 0).numpy()


def settings(folder, mode="all", **changes):
    paths = {"data": folder / "data", "val_fraction": 0.5, "blur_data": folder / "RWBI"}
    return Settings(mode=mode, **{**TINY, **paths, "output_dir": folder / "run", **changes})


def rows(folder):
    with open(folder / "logs" / "metrics.csv") as file:
        return list(csv.DictReader(file))


# ---- networks


def test_the_papers_networks():
    dbgan, bgan = DBGANGenerator(), BGANGenerator()
    block = sum(9 * 64 * (64 * n) + 64 for n in range(1, 6))  # five 3x3 convolutions that see all before them
    ends = 9 * 64 * 64 + 64 + 9 * 64 * 3 + 3
    count = [sum(p.numel() for p in network.parameters()) for network in (dbgan, bgan)]
    assert count == [16 * block + ends + 9 * 3 * 64 + 64, 9 * block + ends + 9 * 7 * 64 + 64]
    names = [type(module).__name__ for module in dbgan.modules()]
    assert not any("Norm" in name for name in names) and "ConvTranspose2d" not in names
    torch.manual_seed(0)
    discriminator = Discriminator()
    assert discriminator.features[2].weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert discriminator(torch.rand(3, 3, 40, 16)).shape == (3,)
    widths = [m.out_channels for m in discriminator.modules() if isinstance(m, nn.Conv2d)]
    assert widths == [64, 64, 128, 128, 256, 256, 512, 512]
    assert sum(isinstance(m, nn.BatchNorm2d) for m in discriminator.modules()) == 7


def test_mprnet_is_the_authors():
    """Names, shapes and count at full size; numbers of a tiny one, filled by name."""
    manifest = json.loads((REFERENCE / "mprnet_keys.json").read_text())
    network = MPRNet()
    assert {name: list(value.shape) for name, value in network.state_dict().items()} == manifest["full"]
    assert sum(p.numel() for p in network.parameters()) == 20_127_073
    full = GENERATORS["mprnet"](96, 8)
    assert {n: v.shape for n, v in full.state_dict().items()} == {
        n: v.shape for n, v in network.state_dict().items()
    }
    network = fill(MPRNet(8, 4, 4, 2, 4)).eval()
    assert {name: list(value.shape) for name, value in network.state_dict().items()} == manifest["tiny"]
    expected = np.load(REFERENCE / "generators.npz")
    with torch.no_grad():
        outputs = network(torch.sigmoid(draw("input:image2", (1, 3, 32, 48))))
    for number, output in enumerate(outputs):
        assert relative_error(output, expected[f"mprnet.tiny.{number}"]) < 1e-4


@pytest.mark.parametrize(
    "network", [MPRNet(12, 6, 4, 2), NAFNet(8, (1, 1, 1, 3), 1, (1, 1, 1, 1))], ids=["mprnet", "nafnet"]
)
def test_a_file_of_the_authors_opens(network, tmp_path):
    """It has no settings of ours: the parameters tell what it is."""
    fill(network).eval()
    names = {f"module.{name}": value for name, value in network.state_dict().items()}
    wrapper = "params" if isinstance(network, NAFNet) else "state_dict"
    torch.save({"epoch": 3, wrapper: names}, tmp_path / "theirs.pth")
    found = load_generator(tmp_path / "theirs.pth", "deblur")
    image = torch.rand(1, 3, 16, 32)
    with torch.no_grad():
        assert torch.equal(script.final(found(image)), script.final(network(image)))


def test_the_average_of_mprnets_one_activation_reaches_all_its_names():
    """The EMA knows it by its first name; a checkpoint has it under all."""
    network = MPRNet(8, 4, 4, 1)
    weights = network.state_dict()
    first, *others = [name for name in weights if weights[name].shape == (1,)]
    network.load_state_dict({**weights, first: torch.tensor([0.7])})
    found = [network.state_dict()[name].item() for name in others]
    assert len(found) > 10 and found == pytest.approx([0.7] * len(found))


def test_several_stages_train_with_the_sum_of_their_losses():
    torch.manual_seed(0)
    made, real = [torch.rand(2, 3, 16, 16) for _ in range(3)], torch.rand(2, 3, 16, 16)
    edges = []
    for one in made:
        x = F.pad(one - real, (1, 1, 1, 1))
        laplacian = x[..., :-2, 1:-1] + x[..., 2:, 1:-1] + x[..., 1:-1, :-2] + x[..., 1:-1, 2:]
        laplacian = (laplacian - 4 * x[..., 1:-1, 1:-1])[..., 1:-1, 1:-1]
        edges.append((laplacian.square() + 1e-6).sqrt().mean())
    expected = sum(F.l1_loss(one, real) for one in made) + 0.05 * sum(edges)
    assert content_loss(made, real, "l1").item() == pytest.approx(expected.item(), rel=1e-5)
    models, chosen = make("deblur", generator="mprnet", width=8)
    summed(script.deblur_losses(models, chosen, **batch()))["total_loss"].backward()
    assert gradients(models.generators["deblur"].stage1_decoder) > 0


def test_sftnet_is_told_of_the_blur():
    """Conditions change what the trunk does; those of a picture depend on that picture alone."""
    network = fill(SFTNet(8, 2)).eval()
    x = torch.rand(2, 3, 32, 48)
    with torch.no_grad():
        assert network(x).shape == x.shape
        assert torch.allclose(network(x)[:1], network(x[:1]), atol=1e-5)
        before = network(x)
        network.conditions[0].weight.mul_(2)
        assert not torch.allclose(network(x), before, atol=1e-3)
        layer, features, conditions = SFT(4), torch.rand(1, 4, 8, 8), torch.rand(1, 32, 2, 2)
        for maps in (layer.scale, layer.shift):
            nn.init.zeros_(maps[2].weight)
            nn.init.ones_(maps[2].bias)
        assert torch.allclose(layer(features, conditions), features * 2 + 1)


@pytest.mark.parametrize("name", GENERATORS)
def test_every_generator_takes_any_size(name):
    network = fill(GENERATORS[name](4, 1))
    image = read_image(photographs(("coffee.png",))[0])[:64, :128]
    part = image[:37, :50]
    restored = restore_image(network, part)
    assert restored.shape == part.shape and not np.array_equal(restored, part)
    whole = restore_image(network.eval(), image)
    x = (to_tensor(image)[None] + 1) / 2
    with torch.no_grad():
        expected = (script.final(network(x))[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    assert np.abs(whole.astype(int) - expected).max() <= 1


def test_the_generator_starts_near_the_identity_and_is_not_clamped():
    torch.manual_seed(0)
    image = torch.rand(1, 3, 16, 16)
    network = DBGANGenerator(64, 1)
    assert 0 < (network(image) - image).abs().max() < 0.05
    assert network(2 * image).max() > 1.5


def test_bgan_sees_its_noise_at_every_pixel():
    torch.manual_seed(0)
    network = fill(BGANGenerator(4, 1))
    image = torch.rand(2, 3, 8, 8)
    noise = script.draw_noise(image)
    assert noise.shape == (2, 4, 1, 1)
    assert not torch.allclose(network(image, noise), network(image, 2 * noise))
    expected = DBGANGenerator.forward(network, torch.cat([image, noise.expand(2, 4, 8, 8)], 1))
    assert torch.equal(network(image, noise), expected)


# ---- losses


def test_relativistic_losses_are_their_formulas():
    torch.manual_seed(0)
    real, fake = torch.randn(5), torch.randn(5)
    p_real = [1 / (1 + math.exp(-(r - fake.mean().item()))) for r in real.tolist()]
    p_fake = [1 / (1 + math.exp(-(f - real.mean().item()))) for f in fake.tolist()]
    d = (-sum(map(math.log, p_real)) - sum(math.log(1 - p) for p in p_fake)) / 10
    g = -sum(0.5 * math.log(p) + 0.5 * math.log(1 - p) for p in [*p_real, *p_fake]) / 10
    assert relativistic_d_loss(real, fake).item() == pytest.approx(d, rel=1e-5)
    assert relativistic_g_loss(real, fake).item() == pytest.approx(g, rel=1e-5)
    same = torch.full((4,), 3.0)
    assert relativistic_g_loss(same, same).item() == pytest.approx(
        math.log(2)
    )  # its minimum: both look alike
    assert relativistic_g_loss(same, same - 1) > relativistic_g_loss(same, same)
    assert relativistic_d_loss(same, same - 9) < 0.01


def make(stage, perceptual=None, **changes):
    torch.manual_seed(0)
    chosen = Settings(**{**TINY, "generated_fraction": 0.0, **changes})
    models = script.make_models(chosen, stage, perceptual, torch.device("cpu"))
    for module in (models.generators, models.discriminators):
        fill(module)
    return models, chosen


def batch(b=2):
    torch.manual_seed(1)
    sharp = torch.rand(b, 3, 16, 16)
    return {"blurry": F.avg_pool2d(sharp, 3, 1, 1), "sharp": sharp}


def summed(terms):
    """The losses of a step from its terms."""
    losses = {}
    for term in terms:
        losses |= {name: losses.get(name, 0) + value for name, value in term.items()}
    return losses


def gradients(network):
    return sum(p.grad.abs().sum().item() for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("stage", "of_d", "of_g"),
    [
        ("deblur", ["loss_d"], "total_loss"),
        ("paired", ["loss_d_blur", "loss_d_sharp"], "loss_g"),
        ("blur", ["loss_d_blur", "loss_d_sharp"], "loss_g"),
    ],
)
def test_each_loss_teaches_its_own_networks(stage, of_d, of_g):
    """The adversarial part alone reaches every generator, and no discriminator; theirs no generator."""
    models, chosen = make(stage)
    models.weights = Weights(content=0.0, adversarial=1.0, cycle=0.0, identity=0.0)
    losses = summed(script.STAGES[stage].losses[-1](models, chosen, **batch()))
    assert set(losses) == {*of_d, of_g}
    losses[of_g].backward(retain_graph=True)
    assert all(gradients(network) > 0 for network in models.generators.values())
    assert gradients(models.discriminators) == 0
    models.generators.zero_grad()
    sum(losses[name] for name in of_d).backward()
    assert gradients(models.generators) == 0
    assert all(gradients(network) > 0 for network in models.discriminators.values())
    assert all(p.requires_grad for p in models.discriminators.parameters())


def test_content_stage_has_no_discriminator():
    models, chosen = make("deblur")
    (found,) = script.content_losses(models, chosen, **batch())
    restored = models.generators["deblur"](batch()["blurry"])
    assert found["total_loss"].item() == pytest.approx(F.l1_loss(restored, batch()["sharp"]).item())
    found["total_loss"].backward()
    assert gradients(models.generators) > 0 and gradients(models.discriminators) == 0
    (squared,) = script.content_losses(models, replace(chosen, content_loss="mse"), **batch())
    assert squared["total_loss"].item() == pytest.approx(F.mse_loss(restored, batch()["sharp"]).item())


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vgg") / "vgg19.pth"
    torch.save(vgg19().state_dict(), path)
    return path


def test_the_weights_of_the_terms(vgg_file):
    """DBGAN: perceptual + alpha content + beta relativistic; BGAN on pairs has no content term."""
    perceptual = script.PerceptualLoss(file=vgg_file)
    models, chosen = make("deblur", perceptual, perceptual_loss_weight=1.0)
    x = batch()
    total = summed(script.deblur_losses(models, chosen, **x))["total_loss"].item()
    restored = models.generators["deblur"](x["blurry"])
    d = models.discriminators["sharp"]
    adversarial = relativistic_g_loss(*d(torch.cat([x["sharp"], restored])).chunk(2)).item()
    feature = perceptual(restored * 2 - 1, x["sharp"] * 2 - 1).mean().item()
    content = F.l1_loss(restored, x["sharp"]).item()
    assert total == pytest.approx(feature + 0.005 * content + 0.01 * adversarial, rel=1e-5)
    models, chosen = make("paired", perceptual, perceptual_loss_weight=1.0)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        own = script.relativistic_losses
        patch.setattr(script, "relativistic_losses", lambda *a: (seen.append((a[1], a[4])), own(*a))[1])
        summed(script.paired_losses(models, chosen, **x))
    assert seen == [("blur", 0.0), ("sharp", 0.005)]


def test_weights_of_the_losses_without_vgg_and_in_the_demonstration():
    """Without VGG the content loss stands in for the perceptual loss; the demonstration has its own."""
    assert make("deblur", perceptual_loss_weight=1.0)[0].weights == (0.005, 0.01, 10.0, 5.0)
    assert make("deblur")[0].weights == (1.0, 0.001, 10.0, 5.0)
    assert make("deblur", demo=True)[0].weights == (1.0, 0.001, 1.0, 0.5)


def test_unpaired_losses_are_their_formulas():
    models, chosen = make("blur")
    models.pools = {name: ImagePool(0) for name in models.pools}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "draw_noise", lambda like: torch.zeros(len(like), 4, 1, 1))
        x = batch()
        found = summed(script.unpaired_losses(models, chosen, **x))
        deblur = models.generators["deblur"]
        blur = partial(models.generators["blur"], noise=torch.zeros(2, 4, 1, 1))
        made_b, made_s = blur(x["sharp"]), deblur(x["blurry"])
        d_blur, d_sharp = models.discriminators["blur"], models.discriminators["sharp"]
        blur_scores, sharp_scores = (
            d(torch.cat([x[kind], made])).chunk(2)  # in one batch
            for d, kind, made in ((d_blur, "blurry", made_b), (d_sharp, "sharp", made_s))
        )
        expected = (blur_scores[0] - 0.9).square().mean() + (blur_scores[1] - 0.1).square().mean()
        assert found["loss_d_blur"].item() == pytest.approx(expected.item() / 2, rel=1e-4)
        g = (blur_scores[1] - 0.9).square().mean() + (sharp_scores[1] - 0.9).square().mean()
        g += 10 * (F.l1_loss(deblur(made_b), x["sharp"]) + F.l1_loss(blur(made_s), x["blurry"]))
        g += 5 * (F.l1_loss(blur(x["blurry"]), x["blurry"]) + F.l1_loss(deblur(x["sharp"]), x["sharp"]))
        assert found["loss_g"].item() == pytest.approx(g.item(), rel=1e-4)


def test_image_pool():
    torch.manual_seed(0)
    pool, seen = ImagePool(3), []
    assert torch.equal(pool(torch.arange(3.0).reshape(3, 1)), torch.arange(3.0).reshape(3, 1))  # fills first
    for number in range(3, 203):
        seen.append(number - int(pool(torch.tensor([[float(number)]]))))
    assert 60 < sum(age > 0 for age in seen) < 140 and max(seen) > 3 and len(pool.images) == 3
    other = ImagePool(3)
    other.load_state_dict(pool.state_dict())
    torch.manual_seed(5)
    expected = pool(torch.full((4, 1), -1.0))
    torch.manual_seed(5)
    assert torch.equal(other(torch.full((4, 1), -1.0)), expected)
    x = torch.rand(2, 3)
    assert torch.equal(ImagePool(0)(x), x)


def test_a_resumed_image_pool_follows_its_batch_to_the_device():
    """A checkpoint is read to the CPU; the fakes of a resumed run are elsewhere (here on `meta`)."""
    torch.manual_seed(0)
    pool = ImagePool(2)
    pool.load_state_dict({"images": [torch.zeros(3, 4, 4), torch.ones(3, 4, 4)]})
    for _ in range(4):
        assert pool(torch.empty(4, 3, 4, 4, device="meta")).device.type == "meta"


@pytest.mark.parametrize("stage", ["blur", "paired"])
def test_terms_one_by_one_give_the_same_gradients_in_less_memory(stage):
    """Backward term by term is backward of the sum; what is kept for it at once is at most half."""

    def step(split):
        models, chosen = make(stage, blocks=4, generated_fraction=0.5)
        torch.manual_seed(3)
        held, highest = [0], [0]

        class Saved(list):  # for backward; a plain list cannot be watched
            def __init__(self, tensor):
                super().__init__([tensor])
                held[0] += tensor.nbytes
                highest[0] = max(highest[0], held[0])

            def __del__(self):
                held[0] -= self[0].nbytes

        images = {name: (value * 256).round() / 256 for name, value in batch().items()}  # exact in [-1, 1]
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved[0]):
            if split:
                optimizer = fabric.setup_optimizers(torch.optim.SGD(models.generators.parameters(), lr=0.0))
                losses = partial(script.STAGES[stage].losses[-1], models, chosen)
                images = {name: value * 2 - 1 for name, value in images.items()}
                script.train_step(fabric, optimizer, images, 1, losses)
            else:
                sum(summed(script.STAGES[stage].losses[-1](models, chosen, **images)).values()).backward()
        grads = [p.grad for n in (models.generators, models.discriminators) for p in n.parameters()]
        return highest[0], grads

    fabric = start_fabric()
    (whole, expected), (split, found) = step(False), step(True)
    assert split < 0.6 * whole
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(found, expected, strict=True))


def test_accumulated_gradients_are_those_of_the_whole_batch():
    fabric = start_fabric()
    weights = []
    for accumulate in (1, 4):
        models, chosen = make("deblur")
        optimizer = fabric.setup_optimizers(torch.optim.SGD(models.generators.parameters(), lr=0.1))
        images = {name: value * 2 - 1 for name, value in batch(8).items()}
        losses = partial(script.content_losses, models, chosen)
        found = script.train_step(fabric, optimizer, images, accumulate, losses)
        weights.append([found["total_loss"], *(p.detach().clone() for p in models.generators.parameters())])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*weights, strict=True))


def test_the_learning_rate_falls_by_a_cosine_in_each_phase_or_stays():
    cosine = Settings(learning_rate=1e-4)
    factor = partial(script.learning_rate_factor, phases=[10, 20], settings=cosine)
    assert [factor(step) for step in (0, 5, 10, 20, 30)] == pytest.approx([1, 0.505, 1, 0.505, 0.01])
    assert factor(9) < 0.05
    for phases in ([0, 4], [4, 0]):  # one of no epochs
        ends = [script.learning_rate_factor(step, phases, cosine) for step in (0, 4)]
        assert ends == pytest.approx([1, 0.01])
    constant = Settings(schedule="constant", warmup_steps=4)
    rates = [script.learning_rate_factor(step, [8], constant) for step in (0, 1, 4, 8)]
    assert rates == [0.25, 0.5, 1.0, 1.0]


def test_bgan_replaces_some_of_the_blurry_pictures():
    torch.manual_seed(0)
    x = batch(64)
    mixed = script.replace_some(fill(BGANGenerator(4, 1)), 0.25, **x)
    changed = (mixed != x["blurry"]).flatten(1).any(dim=1)
    assert 5 < changed.sum() < 30 and 0 <= mixed.min() and mixed.max() <= 1
    assert torch.equal(script.replace_some(None, 0.25, **x), x["blurry"])


def test_it_learns_one_batch():
    torch.manual_seed(0)
    fabric = start_fabric()
    models, chosen = make("deblur", width=8)
    for module in models.generators.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()  # so few steps are too few for N(0, 0.01)
    optimizer = fabric.setup_optimizers(torch.optim.Adam(models.generators.parameters(), lr=3e-3))
    sharp = F.interpolate(torch.rand(1, 3, 4, 4) * 2 - 1, 16)
    images = {"blurry": F.avg_pool2d(F.pad(sharp, (2, 2, 2, 2), "reflect"), 5, 1), "sharp": sharp}
    losses = partial(script.content_losses, models, chosen)
    found = [script.train_step(fabric, optimizer, images, 1, losses)["total_loss"].item() for _ in range(100)]
    assert found[-1] < 0.5 * found[0]


# ---- whole runs


def test_all_is_blur_and_deblur(data, capsys):
    main(settings(data))
    printed = capsys.readouterr().out
    assert "blur: 4 training images, 1 steps; 4 held out" in printed
    assert printed.count("eval psnr:") == printed.count("eval ssim:") == printed.count("rgb shift:") == 3
    run = data / "run"
    names = {path.relative_to(run).as_posix() for path in run.rglob("*.safetensors")}
    blur = {"blur/bgan.safetensors", "blur/dbgan.safetensors"}
    assert names == {*blur, "deblur/dbgan.safetensors", "deblur/dbgan_content.safetensors"}
    first, second = rows(run / "blur")[-1], rows(run / "deblur")[-1]
    assert float(first["spectrum/sharp"]) > 0 and float(first["train/loss_d_blur"]) > 0
    assert float(second["train/loss_d"]) > 0 and "spectrum/sharp" not in second
    assert read_image(run / "blur/images/blurred_0000001.png").shape[1] == 2 * 32 + 4
    state = checkpoint.load(run / "blur" / "checkpoints" / "last.ckpt")
    assert {"discriminators", "optimizer", "pool_blur", "pool_sharp", "ema"} <= state.keys()
    assert len(state["pool_blur"]["images"]) == 4
    exported = load_generator(run / "deblur" / "dbgan.safetensors", "deblur")
    average = checkpoint.load(run / "deblur" / "checkpoints" / "last.ckpt")["ema"]["average"]
    for name, value in exported.named_parameters():
        assert torch.allclose(value, average[f"deblur.{name}"], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("realistic", [False, True])
def test_pairs_are_made_of_photographs_and_dead_leaves(data, realistic):
    """Without pairs: each photo so many times, and dead leaves."""
    chosen = {"data": None, "sharp_dir": data / "RWBI", "val_data": data / "data", "dead_leaves": 6}
    chosen |= {"photo_crops": 2, "crop_candidates": 3, "realistic_blur": realistic}
    chosen = settings(data, "deblur", generated_fraction=0.0, **chosen)
    pairs, _ = script.open_data(chosen, "deblur")
    names = [pairs[n]["path"] for n in range(len(pairs))]
    assert len(pairs) == 5 * 2 + 6 and sum("leaves" in name for name in names) == 6
    main(replace(chosen, content_loss="charbonnier", fft_loss_weight=0.1, max_grad_norm=0.01))
    assert (data / "run" / "deblur" / "dbgan.safetensors").is_file()
    real = shutil.copytree(data / "RWBI", data / "real")
    unpaired, _ = script.open_data(replace(chosen, mode="blur", blur_data=real), "blur")
    assert len(unpaired) == 5 * 2  # photos alone: a discriminator would know dead leaves by their shapes


def test_gradients_are_clipped_all_together():
    fabric = start_fabric()
    models, chosen = make("deblur")
    optimizer = fabric.setup_optimizers(torch.optim.SGD(models.generators.parameters(), lr=1.0))
    before = [p.detach().clone() for p in models.generators.parameters()]
    images = {name: value * 2 - 1 for name, value in batch().items()}
    losses = partial(script.content_losses, models, chosen)
    script.train_step(fabric, optimizer, images, 1, losses, max_grad_norm=1e-3)
    moved = [
        (p.detach() - b).square().sum() for p, b in zip(models.generators.parameters(), before, strict=True)
    ]
    assert sum(moved).sqrt().item() == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("name", GENERATORS)
def test_every_generator_starts_from_weights(name, tmp_path):
    """Of its own kind alone: a file of another generator or width is one sentence."""
    path = tmp_path / "dbgan.safetensors"
    chosen = Settings(**TINY | {"generator": name, "width": 8, "generated_fraction": 0.0}, init_weights=path)
    first = fill(GENERATORS[name](8, 1))
    export(nn.ModuleDict({"deblur": first}), chosen, tmp_path)
    own = script.first_generator("deblur", chosen, "deblur").state_dict()
    for key, value in first.state_dict().items():
        assert torch.allclose(own[key], value, rtol=1e-2, atol=1e-3)
    gone = replace(chosen, init_weights=tmp_path / "gone", output_dir=tmp_path)
    begun = tmp_path / "deblur" / "checkpoints" / "last.ckpt"
    begun.parent.mkdir(parents=True)
    begun.touch()  # a stage that is resumed does not read them
    script.first_generator("deblur", gone, "deblur")
    with pytest.raises(FileNotFoundError, match="gone"):
        script.first_generator("deblur", gone, "blur")
    other = "srresnet" if name == "dbgan" else "dbgan"
    wrong = [({"generator": other}, f"dbgan.safetensors holds a {type(first).__name__}, this run trains a ")]
    wrong.append(({"width": 12}, "dbgan.safetensors does not fit"))
    for changes, message in wrong:
        with pytest.raises(ValueError, match=message):
            script.first_generator("deblur", replace(chosen, **changes), "deblur")


def test_a_run_starts_from_the_ema_weights_of_a_checkpoint(data):
    main(on_the_fly(data, output_dir=data / "first"))
    last = data / "first" / "deblur" / "checkpoints" / "last.ckpt"
    network = script.first_generator("deblur", on_the_fly(data, init_weights=last), "deblur")
    average = checkpoint.load(last)["ema"]["average"]
    assert all(torch.equal(value, average[f"deblur.{name}"]) for name, value in network.named_parameters())


def on_the_fly(folder, **changes):
    """A run of the content loss alone on sharp photographs blurred on the fly, with real pairs among them."""
    pairs = folder / "data"
    chosen = {"data": None, "sharp_dir": pairs, "pairs": pairs, "realistic_blur": True, "val_data": pairs}
    chosen |= {"generator": "unet", "crop_size": 64, "schedule": "constant", "warmup_steps": 2}
    chosen |= {"epochs": 0, "generated_fraction": 0.0, "max_steps": 2}
    return settings(folder, "deblur", **{**chosen, **changes})


def test_a_run_with_a_constant_rate_is_continued(data):
    main(on_the_fly(data, output_dir=data / "whole", max_steps=4))
    main(on_the_fly(data, output_dir=data / "legs"))
    main(on_the_fly(data, output_dir=data / "legs", max_steps=4))
    whole, legs = (
        checkpoint.load(data / name / "deblur" / "checkpoints" / "last.ckpt") for name in ("whole", "legs")
    )
    assert legs["step"] == 4 and all(same_states(whole[part], legs[part]) for part in PARTS)
    assert legs["scheduler"]["_last_lr"] == [1e-3]
    assert tuple(legs["optimizer"]["param_groups"][0]["betas"]) == (0.9, 0.9)  # no discriminator is trained
    with pytest.raises(ValueError, match="max_steps was 4, is 5"):
        main(on_the_fly(data, output_dir=data / "cosine", schedule="cosine", max_steps=4))
        main(on_the_fly(data, output_dir=data / "cosine", schedule="cosine", max_steps=5))


def test_the_length_may_change_only_where_no_phase_moves():
    """In `deblur` a later end of the first phase would lead a run back into it."""

    def lengths(stage, **changes):
        return {"epochs", "max_steps"}.intersection(script.may_change(Settings(**changes), stage))

    for stage in ("blur", "paired"):
        assert lengths(stage, schedule="constant") == {"epochs", "max_steps"}
    assert lengths("deblur", schedule="constant") == set()
    assert lengths("deblur", schedule="constant", epochs=0) == {"max_steps"}
    assert lengths("deblur", epochs=0) == lengths("blur") == set()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs_fraction": 1.5}, r"pairs_fraction must be in \[0, 1\], not 1.5"),
        ({"data": "data"}, "--dead_leaves and --pairs go with photos blurred on the fly"),
        ({"pairs": "RWBI"}, "RWBI"),
        ({"pairs": "nowhere"}, "nowhere"),
        ({"max_steps": -1}, "nothing to train: --epochs 0 is for `deblur`"),
    ],
)
def test_wrong_extra_pairs_and_lengths(data, changes, message):
    changes = {name: data / value if isinstance(value, str) else value for name, value in changes.items()}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        main(on_the_fly(data, **changes))


def test_pairs_of_two_sizes_are_found_before_the_first_step(data):
    path = data / "data" / "GOPR2" / "sharp" / "3.png"
    write_image(path, read_image(path)[:-2])
    with pytest.raises(ValueError, match="differ in size: .*3.png"):
        main(on_the_fly(data))


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_the_fraction_of_real_pairs_may_be_none_or_all(data, fraction):
    dataset, _ = script.open_data(on_the_fly(data, pairs_fraction=fraction), "deblur")
    paths = [dataset[(0, index)]["path"] for index in range(len(dataset))]
    assert {"blur" in path for path in paths} == {fraction == 1.0}


def test_max_steps_replaces_the_epochs_of_every_phase(data):
    main(settings(data, "deblur", generated_fraction=0.0, max_steps=3, epochs=50))
    state = checkpoint.load(data / "run" / "deblur" / "checkpoints" / "last.ckpt")
    assert state["step"] == 3 + 3


@pytest.mark.parametrize(
    ("generator", "precision"),
    [("dbgan", "32"), ("deblurgan", "bf16"), ("mprnet", "bf16")],
)
def test_paired(data, generator, precision):
    main(settings(data, "paired", blur_data=None, generator=generator, precision=precision))
    (row,) = rows(data / "run" / "paired")
    assert {"train/loss_d_blur", "train/loss_d_sharp", "train/loss_g", "spectrum/generated"} <= row.keys()
    assert len(load_generator(data / "run/paired/bgan.safetensors", "blur").blocks) == 1


def test_from_files_of_patches(data):
    import tool_make_dbgan_dataset as tool

    gopro = {"deblur_train_data": data / "data", "deblur_valid_data": data / "data", "patch_size": 32}
    real = {"blur_train_data": data / "RWBI", "blur_valid_data": data / "RWBI"}
    for name, photos in (("pairs", {}), ("cycle", real)):
        paths = {f"blur_{part}_path": data / f"{name}_{part}.h5" for part in ("train", "valid")}
        tool.main(tool.Settings(**paths, **gopro, **photos))
    chosen = {"data": data / "pairs_train.h5", "val_data": data / "pairs_valid.h5"}
    chosen |= {"blur_data": data / "cycle_train.h5"}
    main(settings(data, **chosen))
    assert len(rows(data / "run" / "deblur")) == 2
    with pytest.raises(ValueError, match="cycle_train.h5 is unpaired"):
        main(settings(data, "deblur", **{**chosen, "data": chosen["blur_data"], "generated_fraction": 0}))


def same_states(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_states(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_states, a, b))
    return a == b


PARTS = ["state_dict", "discriminators", "optimizer", "scheduler", "ema", "step"]


@pytest.mark.parametrize("mode", ["all", "paired"])
def test_a_stopped_run_resumes_exactly(data, mode, monkeypatch):
    """Stopped in the blur stage and again between the phases of the other: as if it never happened."""
    whole, stopped = (settings(data, mode, output_dir=data / name, epochs=3) for name in ("whole", "stopped"))
    main(whole)
    save, count = script.Run.save, [0]

    def saving(run, score):
        save(run, score=score)
        count[0] += 1
        if count[0] in (2, 5, 8):
            raise KeyboardInterrupt

    monkeypatch.setattr(script.Run, "save", saving)
    stops = 0
    for _ in range(4):
        try:
            main(stopped)
        except KeyboardInterrupt:
            stops += 1
    assert stops == (3 if mode == "all" else 1)
    for stage, names in (("blur", ["pool_blur", "pool_sharp"]), ("deblur", []), ("paired", [])):
        if (mode == "all") == (stage == "paired"):
            continue
        a, b = (checkpoint.load(data / n / stage / "checkpoints/last.ckpt") for n in ("whole", "stopped"))
        assert all(same_states(a[part], b[part]) for part in [*PARTS, *names])
        assert same_states(a["processes"][0]["random"]["torch"], b["processes"][0]["random"]["torch"])
        own, other = (rows(data / name / stage) for name in ("whole", "stopped"))
        for row in (*own, *other):
            del row["train/images/s"]
        assert own == other


def test_nan_stops_the_run(data, monkeypatch):
    monkeypatch.setattr(script, "content_loss", lambda made, *_: made.sum() * float("nan"))
    with pytest.raises(ValueError, match=r"training stopped: total_loss = nan at step 1; its batch: .*png"):
        main(settings(data, "deblur", generated_fraction=0.0))
    assert not (data / "run" / "deblur" / "checkpoints" / "last.ckpt").exists()


@pytest.mark.parametrize(
    ("mode", "changes", "message"),
    [
        ("blur", {"blur_data": None}, "needs --blur_data"),
        ("blur", {"blur_data": "missing"}, "folder not found: .*missing"),
        ("blur", {"blur_data": "missing.h5"}, "file of patches not found"),
        ("blur", {"blur_data": "data"}, "the blurry and the sharp images are one folder, .*data: give two"),
        ("blur", {"data": None, "val_data": "data"}, "needs sharp photos"),
        ("deblur", {}, r"BGAN not found: .*run/blur/bgan.safetensors; train it with `blur`"),
        ("deblur", {"data": None, "val_data": "data"}, "nothing to train on: give --data"),
        ("all", {"init_weights": "none.safetensors"}, "checkpoint not found"),  # before the first stage
        ("deblur", {"dead_leaves": 8}, "--dead_leaves and --pairs go with photos blurred on the fly"),
        ("deblur", {"data": "missing"}, "no such data set"),
        ("all", {"crop_size": 24}, "crop_size must be a multiple of 16, not 24"),
        ("all", {"devices": 0}, "devices must be at least 1"),
        ("all", {"epochs": 0}, "nothing to train"),
        ("all", {"generated_fraction": 1.5}, "generated_fraction must be in"),
    ],
)
def test_bad_settings(data, mode, changes, message):
    changes = {k: data / v if isinstance(v, str) and k != "generator" else v for k, v in changes.items()}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        main(settings(data, mode, **changes))
    assert not (data / "run").exists()


def test_bad_patches_stop_before_training(data):
    path = data / "bad.h5"
    with h5py.File(path, "w", libver="latest") as file:
        file["sharp"] = np.zeros((4, 16, 16, 3), np.uint8)
    with pytest.raises(ValueError, match="bad.h5 has no patches 'blur', only sharp"):
        main(settings(data, "blur", blur_data=path))
    with h5py.File(path, "a") as file:
        file["blur"] = np.zeros((5, 16, 16, 3), np.uint8)
    with h5py.File(data / "small.h5", "w") as file:
        file["sharp"] = file["blur"] = np.zeros((2, 8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="small.h5: patches of 8 pixels cannot be scored"):
        main(settings(data, "paired", val_data=data / "small.h5"))
    content = path.read_bytes()
    path.write_bytes(content[:60] + b"\xff" + content[61:])  # in what names the patches
    with pytest.raises(ValueError, match="bad.h5 is damaged or no HDF5 file"):
        main(settings(data, "blur", blur_data=path))
    path.write_bytes(content)
    with pytest.raises(ValueError, match="bad.h5 has 5 blurry and 4 sharp patches: no pairs"):
        main(settings(data, "paired", data=path, val_data=data / "data"))
    assert not (data / "run").exists()


def test_another_bgan_does_not_resume(data):
    chosen = settings(data)
    main(chosen)
    export(fill(nn.ModuleDict({"blur": BGANGenerator(4, 1)})), chosen, data / "run" / "blur")
    with pytest.raises(ValueError, match="blurrer was"):
        main(settings(data, "deblur"))


def test_what_a_stage_does_not_read_may_change(data):
    main(settings(data, "blur", content_loss="l1"))
    main(settings(data, "all", content_loss="mse", fft_loss_weight=0.1))
    assert (data / "run" / "deblur" / "dbgan.safetensors").is_file()
    with pytest.raises(ValueError, match="other settings: learning_rate was 0.001, is 0.1"):
        main(settings(data, "blur", learning_rate=0.1))


def test_files_that_are_no_generators(tmp_path):
    networks = nn.ModuleDict({"blur": BGANGenerator(4, 1)})
    path = tmp_path / "bgan.safetensors"
    export(networks, Settings(**TINY), tmp_path)
    with pytest.raises(ValueError, match=r"bgan.safetensors holds no deblurring generator"):
        load_generator(path, "deblur")
    export(networks, Settings(**TINY | {"width": 8}), tmp_path)
    with pytest.raises(
        ValueError,
        match=r"does not fit BGANGenerator: first.weight is \(4, 7, 3, 3\), not \(8, 7, 3, 3\), .* more",
    ):
        load_generator(path, "blur")
    with pytest.raises(FileNotFoundError, match="checkpoint not found"):
        load_generator(tmp_path / "gone.safetensors", "blur")


# ---- measures


def test_radial_power_finds_the_frequency():
    y, x = np.indices((64, 64))
    wave = 128 + 60 * np.sin(2 * np.pi * (6 * x + 8 * y) / 64)  # 10 cycles in 64 pixels, slanted
    image = np.repeat(wave[..., None], 3, axis=2).round().astype(np.uint8)
    power = radial_power(image)
    assert power.shape == (32,) and power.argmax() == 10 - 1
    assert power[9] > 100 * power[19]
    assert spectrum_distance(power[None], 100 * power[None]) == pytest.approx(2, abs=1e-3)  # decades
    with pytest.raises(ValueError, match="square image, not 40 x 64"):
        radial_power(image[:, :40])


def test_spectra_tell_blurred_from_sharp(data):
    pairs = find_pairs(data / "data")
    held_out = HeldOut(pairs, 4, seed=0)
    check = Spectra(held_out)
    scores, picture = check(lambda image, number: held_out[number][0])  # what the real ones look like
    assert scores["spectrum/generated"] == 0 < scores["spectrum/sharp"] and picture.dtype == np.uint8
    scores, _ = check(lambda image, number: image)
    assert scores["spectrum/generated"] == scores["spectrum/sharp"]


# ---- restoring and blurring


def test_infer_blurs_and_deblurs(tmp_path):
    networks = fill(nn.ModuleDict({"blur": BGANGenerator(4, 1), "deblur": DBGANGenerator(4, 1)}))
    export(networks, Settings(**TINY), tmp_path)
    image = read_image(photographs(("coffee.png",))[0])[:45, :61]
    (tmp_path / "photos").mkdir()
    for name in ("a", "b"):
        write_image(tmp_path / "photos" / f"{name}.png", image)
    places = {"input": tmp_path / "photos", "device": "cpu"}

    def results(command, kind, folder, **changes):
        weights = tmp_path / {"blur": "bgan.safetensors", "deblur": "dbgan.safetensors"}[kind]
        infer.restore_files(
            command(**places, checkpoint_path=weights, output_dir=tmp_path / folder, **changes)
        )
        return [read_image(path) for path in sorted((tmp_path / folder).iterdir())]

    whole = results(infer.DBGAN, "deblur", "deblurred")
    assert len(whole) == 2 and np.array_equal(whole[0], whole[1])
    expected = restore_image(load_generator(tmp_path / "dbgan.safetensors", "deblur"), image)
    assert np.array_equal(whole[0], expected) and not np.array_equal(expected, image)
    tiled = results(infer.DBGAN, "deblur", "tiled", tile=32, overlap=24)[0].astype(int)
    assert np.abs(tiled[8:-8, 8:-8] - whole[0][8:-8, 8:-8]).mean() < 2

    first, again = (results(infer.BGAN, "blur", folder) for folder in ("one", "two"))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))  # seeded
    assert not np.array_equal(first[0], first[1])  # but another blur for another picture
    assert not np.array_equal(first[0], results(infer.BGAN, "blur", "three", seed=1)[0])
    assert (tmp_path / "one" / "blurred_a.png").is_file()


def test_the_demonstrations_data(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "LEAVES", 2)
    data = tmp_path / "data"
    demo.write_demo(data, [None, tmp_path / "other"])
    assert not data.exists()  # a user's own data need none
    demo.write_demo(data, [data / "train"])
    sharp, blurry = (list_images(data / "train" / kind) for kind in ("sharp", "blur"))
    assert [path.name for path in sharp] == [path.name for path in blurry] and len(sharp) > 10
    real = {path.name for path in (data / "real").iterdir()}
    assert not real & {path.name for path in sharp}  # other scenes
    assert len(list_images(data / "valid" / "sharp")) == 9
