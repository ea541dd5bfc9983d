"""The restoration U-Net of train_dbgan.py: size, scales, tiles, training, weights files."""

import torch
from torch.nn import functional as F

import train_dbgan
from ldm.checkpoint import write_weights
from ldm.modules.blind_wiener import BlindWiener
from ldm.modules.generators import restore_image
from ldm.modules.restoration_unet import RestorationUNet
from tests.fill import fill


def test_the_default_network_has_the_documented_size():
    network = RestorationUNet()
    assert sum(value.numel() for value in network.parameters()) == 6_441_164
    assert network.multiple == 64
    with torch.device("meta"):
        small = RestorationUNet(16)
    widths = [stage[0].conv1.out_channels for stage in small.encoders]
    assert widths == [16, 32, 64] and small.middle[0].conv1.out_channels == 128


def test_an_untrained_network_returns_its_input():
    blurry = torch.rand(2, 3, 64, 128)
    assert torch.equal(RestorationUNet(4)(blurry), blurry)


def test_each_scale_gets_the_correction_of_the_coarser_one():
    """From the paper's equation (SRN, 2018), computed scale by scale."""
    network = fill(RestorationUNet(4))
    blurry = torch.rand(1, 3, 64, 64)
    half, quarter = (F.adaptive_avg_pool2d(blurry, side) for side in (32, 16))
    with torch.no_grad():
        first = network.unet(torch.cat([quarter, torch.zeros_like(quarter)], dim=1))
        up = F.interpolate(first, size=(32, 32), mode="bilinear")
        second = network.unet(torch.cat([half, up], dim=1))
        up = F.interpolate(second, size=(64, 64), mode="bilinear")
        expected = blurry + network.unet(torch.cat([blurry, up], dim=1))
        assert torch.allclose(network(blurry), expected, atol=1e-5)


def test_every_parameter_gets_a_gradient():
    network = fill(RestorationUNet(4))
    network(torch.rand(1, 3, 64, 64)).square().mean().backward()
    assert all(value.grad is not None and value.grad.any() for value in network.parameters())


def test_a_tile_is_restored_as_the_whole_image_would_be():
    image = torch.rand(1, 3, 1024, 64)
    changed = image.clone()
    changed[..., :16, :] = 0
    network = fill(RestorationUNet(2, (1, 1, 1), 1, (1, 1, 1)))
    with torch.no_grad():
        assert not (network(image) - network(changed))[..., -16:, :].any()


def test_it_learns_a_batch():
    torch.manual_seed(0)
    network = RestorationUNet(8)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    sharp = torch.rand(2, 3, 64, 64)
    blurry = torch.nn.functional.avg_pool2d(sharp, 3, 1, 1, count_include_pad=False)
    first = (blurry - sharp).square().mean().item()
    for _ in range(150):
        loss = (network(blurry) - sharp).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.4 * first


def test_a_weights_file_loads_and_restores_any_size(tmp_path):
    network = fill(RestorationUNet(4, middle_blocks=1))
    chosen = train_dbgan.Settings(generator="unet", width=4, blocks=1)
    train_dbgan.export(torch.nn.ModuleDict({"deblur": network}), chosen, tmp_path)
    opened = train_dbgan.load_generator(tmp_path / "dbgan.safetensors", "deblur")
    image = (torch.rand(37, 53, 3) * 255).byte().numpy()
    assert restore_image(opened, image).shape == image.shape


def test_the_wiener_filter_is_trained_first_and_frozen_after(tmp_path):
    wiener = BlindWiener()
    with torch.no_grad():
        wiener.estimator.others.bias[5] = 6.0  # a filter of the bank
    write_weights(tmp_path / "blind_wiener.safetensors", wiener.state_dict())
    chosen = train_dbgan.Settings(
        generator="wiener_unet", width=4, blocks=1, init_weights=tmp_path / "blind_wiener.safetensors"
    )
    network = train_dbgan.first_generator("deblur", chosen, "deblur")
    blurry = torch.rand(1, 3, 64, 128)
    sharper = wiener(blurry)
    assert sharper.abs().max() > 0.01
    assert torch.allclose(network(blurry), blurry + sharper, atol=1e-5)
    network(blurry).square().mean().backward()
    assert network.last.bias.grad.any()
    assert all(value.grad is None for value in network.wiener.parameters())
