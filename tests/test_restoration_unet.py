"""The U-Net of train_dbgan.py: form, start, tiles, precision, learning."""

import pytest
import torch

from ldm.modules.generators import load_generator, restore_image
from ldm.modules.restoration_unet import FourierResBlock, RestorationUNet
from tests.fill import fill


def test_the_default_network_has_the_documented_size():
    network = RestorationUNet()
    assert sum(value.numel() for value in network.parameters()) == 6_437_708
    assert network.multiple == 16
    with torch.device("meta"):
        small = RestorationUNet(16)
    widths = [stage[0].conv1.out_channels for stage in small.encoders]
    assert widths == [16, 32, 64] and small.middle[0].conv1.out_channels == 128


@pytest.mark.parametrize("fourier", [False, True])
def test_an_untrained_network_returns_its_input(fourier):
    blurry = torch.rand(2, 3, 32, 48)
    assert torch.equal(RestorationUNet(4, fourier=fourier)(blurry), blurry)


@pytest.mark.parametrize("fourier", [False, True])
def test_every_parameter_takes_part(fourier):
    network = fill(RestorationUNet(4, fourier=fourier))
    network(torch.rand(1, 3, 32, 32)).square().mean().backward()
    assert all(value.grad is not None and value.grad.any() for value in network.parameters())


def test_a_fourier_block_sees_the_whole_image_and_a_plain_network_does_not():
    image = torch.rand(1, 3, 512, 16)
    changed = image.clone()
    changed[..., :16, :] = 0
    for fourier, reaches in ((False, False), (True, True)):
        network = fill(RestorationUNet(2, (1, 1, 1), 1, (1, 1, 1), fourier=fourier))
        with torch.no_grad():
            difference = (network(image) - network(changed))[..., -16:, :].abs().max()
        assert (difference > 0) == reaches


def test_a_fourier_block_is_linear_where_its_relu_is_open():
    """With the identity as its convolutions and only positive parts, the branch returns its input."""
    block = FourierResBlock(1)
    for parameter in block.parameters():
        torch.nn.init.zeros_(parameter)
    torch.nn.init.eye_(block.spectrum1.weight[..., 0, 0].data)
    torch.nn.init.eye_(block.spectrum2.weight[..., 0, 0].data)
    x = torch.zeros(1, 1, 8, 8)
    x[..., 0, 0] = 1  # an impulse has a spectrum of ones
    with torch.no_grad():
        assert torch.allclose(block(x), 2 * x, atol=1e-6)


def test_it_learns_a_batch():
    torch.manual_seed(0)
    network = RestorationUNet(8)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    sharp = torch.rand(2, 3, 32, 32)
    blurry = torch.nn.functional.avg_pool2d(sharp, 3, 1, 1, count_include_pad=False)
    first = (blurry - sharp).square().mean().item()
    for _ in range(150):
        loss = (network(blurry) - sharp).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.4 * first


def test_a_file_of_it_is_opened_and_restores_any_size(tmp_path):
    from ldm.modules import generators

    form = {"generator": "unet", "width": 4, "blocks": 1, "blur_blocks": 1, "sampling": False}
    form |= {"batch_norm": False, "varying_noise": False}
    network = fill(generators.make_generator("deblur", form))
    generators.export(torch.nn.ModuleDict({"deblur": network}), form, tmp_path)
    opened = load_generator(tmp_path / "dbgan.safetensors", "deblur")
    image = (torch.rand(37, 53, 3) * 255).byte().numpy()
    assert restore_image(opened, image).shape == image.shape
