"""Check the five systems on this GPU against the CPU, with the weights in models/.

A stage of benchmarks/gpu.py. References are computed on the CPU in float32. Cases are independent; a row that
misses its target names the system and the quantity.
"""

import io
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import infer
import train_dbgan
import train_kontext_lora
import train_srn
import tutorial_train_deblur
import tutorial_train_inpaint
from benchmarks import kontext_step, plan
from benchmarks.head import Case, Row, randomize_zero_weights
from cldm.model import open_control_model
from harness.run import start_fabric
from harness.validation import middle
from ldm.checkpoint import random_states, restore_random_states
from ldm.data.image import photographs, read_image, to_tensor, write_image
from ldm.metrics import psnr
from ldm.models.kontext import TRANSFORMER, load_flux
from ldm.modules import generators
from ldm.modules.image_degradation.blur import random_blur
from ldm.modules.lora import make_lora
from tests.fill import relative_error

MODELS = Path("models")


class System(NamedTuple):
    """A network on a device: trained parameters, and a function that returns output and loss."""

    trained: list[nn.Parameter]
    run: Callable[[], tuple[Tensor, Tensor]]


# ---- the systems, with the same weights and inputs on every device -----------------------------------------


def pictures(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a photograph, blurry and sharp, as uint8 (side, side, 3)."""
    sharp = np.ascontiguousarray(middle(read_image(photographs(("coffee.png",))[0]), side))
    return random_blur(sharp, np.random.default_rng(0), ["gaussian_blur"], scale=0.4)[0], sharp


def pair(side: int, device: str) -> tuple[Tensor, Tensor]:
    """Return both as tensors (1, 3, side, side) in [-1, 1]."""
    blurry, sharp = (to_tensor(picture)[None].to(device) for picture in pictures(side))
    return blurry, sharp


def srn(device: str, side: int) -> System:
    network = train_srn.load_network(MODELS / "srn_deblur.safetensors")
    network.to(device, memory_format=torch.channels_last)
    blurry, sharp = pair(side, device)

    def run() -> tuple[Tensor, Tensor]:
        restored = network(*train_srn.pyramid(blurry))
        return restored[0], sum(train_srn.scale_losses(restored, train_srn.pyramid(sharp), "mse"))

    return System(list(network.parameters()), run)


def gan(kind: str, name: str, device: str, side: int) -> System:
    """Load the generator of DBGAN or BGAN."""
    network = train_dbgan.load_generator(MODELS / name, kind).to(device, memory_format=torch.channels_last)
    entering, wanted = (generators.to_unit(image) for image in pair(side, device))
    extra = ()
    if kind == "blur":
        entering, wanted = wanted, entering
        extra = (train_dbgan.draw_noise(wanted.cpu(), torch.Generator().manual_seed(0)).to(device),)

    def run() -> tuple[Tensor, Tensor]:
        made = network(entering, *extra)
        return generators.final(made), generators.content_loss(made, wanted, "l1")

    return System(list(network.requires_grad_(True).parameters()), run)


def controlnet(name: str, device: str, side: int) -> System:
    model = open_control_model(MODELS / f"small_{name}.safetensors", MODELS / "small_diffusion.safetensors")
    model.sd_locked = True
    model.to(device, memory_format=torch.channels_last)
    blurry, sharp = pair(side, device)
    hint = (blurry + 1) / 2
    if name == "inpaint":
        hint[..., : side // 2, : side // 2] = -1
    channels = model.model.diffusion_model.out[-1].out_channels
    noise = torch.randn(2, 1, channels, side // 8, side // 8, generator=torch.Generator().manual_seed(0))
    batch = {"jpg": sharp.permute(0, 2, 3, 1), "hint": hint.permute(0, 2, 3, 1), "txt": [model.prompt]}
    batch |= {"noise_0": noise[0].to(device), "noise_1": noise[1].to(device)}
    t = torch.tensor([500], device=device)

    def run() -> tuple[Tensor, Tensor]:
        latents, cond = model.get_input(batch)
        output = model.apply_model(model.q_sample(latents, t, batch["noise_1"]), t, cond)
        return output, model.diffusion_loss(output, latents, t, batch["noise_1"])

    return System(list(model.control_model.parameters()), run)


def kontext(device: str, side: int, compiled: str = "", **storage) -> System:
    """Load the small transformer with a new LoRA; `storage` goes to load_flux, `compiled` is a backend."""
    path = MODELS / "small_kontext" / TRANSFORMER
    model = load_flux(path, device, torch.float32, **storage)
    model.checkpointing = True
    torch.manual_seed(0)
    adapter = randomize_zero_weights(make_lora(model, "attn_mlp", 4, 4)).to(device)
    data = kontext_step.inputs(model.params, side, 16, "cpu")
    target, control, prompt, sigma, noise = data
    prompt = {name: value.to(device) for name, value in prompt.items()}
    data = (target.to(device), control.to(device), prompt, sigma.to(device), noise.to(device))
    if compiled:  # one block of each kind
        model.double_blocks[0].compile(backend=compiled)
        model.single_blocks[0].compile(backend=compiled)

    def run() -> tuple[Tensor, Tensor]:
        loss, estimate = train_kontext_lora.flow_loss(model, *data)
        return estimate, loss

    return System(list(adapter.parameters()), run)


# ---- comparisons -------------------------------------------------------------------------------------------


def outcome(system: System) -> tuple[Tensor, Tensor]:
    """Return the output and the gradient of all trained parameters, on the CPU."""
    output, loss = system.run()
    loss.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in system.trained])
    return output.detach().cpu(), gradient.cpu().double()


def compared(name: str, make: Callable[[], System], reference: Callable[[], System]) -> list[Row]:
    """Compare output and gradient of a system with a reference."""
    found, expected = outcome(make()), outcome(reference())
    cosine = torch.nn.functional.cosine_similarity(found[1], expected[1], dim=0).item()
    return [
        Row(name, relative_error(found[0], expected[0]), "of the output's largest value", 1e-4),
        Row(name, 1 - cosine, "from 1, cosine of gradients", 1e-4),
    ]


def in_half(kind: type, device: str, side: int) -> list[Row]:
    """Return the PSNR difference in dB of infer.py in bf16 and on the CPU in float32; 2 sampling steps."""
    blurry, sharp = pictures(side)
    with tempfile.TemporaryDirectory() as folder:
        photo = Path(folder) / "photo.png"
        write_image(photo, blurry)
        options = {"input": photo}
        if kind in (infer.Deblur, infer.Inpaint):
            options |= {"num_inference_steps": 2}
        if kind is infer.Inpaint:
            hole = np.zeros_like(blurry)
            hole[side // 4 : side // 2, side // 4 : side // 2] = 255
            write_image(Path(folder) / "mask.png", hole)
            options |= {"input_mask": Path(folder) / "mask.png"}
        precise, half = {"precision": "32"}, {"precision": "bf16"}
        if kind is infer.Kontext:  # its dtype depends on the device
            precise, half = {}, {}
        found = []
        for place, precision in (("cpu", precise), (device, half)):
            command = kind(output_dir=Path(folder) / place, device=place, **precision, **options)
            found.append(psnr(command.restorer()(blurry, photo), sharp))
    exactly()
    name = f"{kind.__name__} in bf16 against the CPU in float32"
    return [Row(name, abs(found[0] - found[1]), "dB", 0.05)]


def resumed(name: str, make: Callable[[], plan.Work]) -> list[Row]:
    """Compare four steps with two and two resumed ones; return the distance relative to the total update."""

    def weights(work: plan.Work) -> Tensor:
        parameters = work.parts["state_dict"].parameters()
        return torch.cat([p.detach().float().flatten().cpu() for p in parameters if p.requires_grad])

    torch.manual_seed(0)
    whole = make()
    start = weights(whole)
    for _ in range(2):
        whole.step()
    file = io.BytesIO()
    torch.save({part: value.state_dict() for part, value in whole.parts.items()}, file)
    random = random_states()
    for _ in range(2):
        whole.step()
    file.seek(0)
    states = torch.load(file, map_location="cpu", weights_only=False)
    torch.manual_seed(0)
    second = make()
    for part, value in second.parts.items():
        value.load_state_dict(states[part])
    restore_random_states(random)
    for _ in range(2):
        second.step()
    apart = (weights(second) - weights(whole)).norm() / (weights(whole) - start).norm()
    return [Row(name, apart.item(), "of the distance trained", 0.02)]


def resumptions(device: str) -> Iterator[Case]:
    """Yield the cases of resumed runs, on tiny networks."""
    small = {"batch_size": 2, "learning_rate": 1e-3}
    control = {"image_size": 64, "config_path": "models/cldm_tiny_deblur.yaml", "ema_decay": 0.9, **small}
    narrow = {"width": 8, "crop_size": 32, **small}
    networks = {"blocks": 1, "accumulate_grad_batches": 1}
    deblur = tutorial_train_deblur.Settings(perceptual_loss_weight=0.0, **control)
    control["config_path"] = "models/cldm_tiny_inpaint.yaml"
    inpaint = tutorial_train_inpaint.Settings(**control)
    works = {
        "SRN": partial(plan.srn, train_srn.Settings(**narrow)),
        "DBGAN": partial(plan.dbgan, train_dbgan.Settings(**networks, **narrow)),
        "deblurring ControlNet": partial(plan.controlnet, deblur),
        "inpainting ControlNet": partial(plan.controlnet, inpaint),
    }
    for system, make in works.items():
        name = f"{system}, 2 + 2 steps against 4"
        yield Case(name, partial(resumed, name, partial(make, device)))


def exactly() -> None:
    """Disable TF32 and cuDNN benchmarking."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def checks(tiny: bool, device: str) -> Iterator[Case]:
    """Yield all checks, the fastest first."""
    start_fabric()
    exactly()
    side = 64 if tiny else 256
    systems = {
        "SRN": srn,
        "DBGAN": partial(gan, "deblur", "dbgan.safetensors"),
        "BGAN": partial(gan, "blur", "bgan.safetensors"),
        "deblurring ControlNet": partial(controlnet, "deblur"),
        "inpainting ControlNet": partial(controlnet, "inpaint"),
        "Kontext": kontext,
        "Kontext in fp8": partial(kontext, fp8=True),
    }
    for system, make in systems.items():
        name = f"{system}, float32 against the CPU"
        yield Case(name, partial(compared, name, partial(make, device, side), partial(make, "cpu", side)))
    plain = partial(kontext, device, side)
    name = "Kontext, blocks swapped against none"
    yield Case(name, partial(compared, name, partial(plain, blocks_to_swap=2), plain))
    yield from resumptions(device)
    for kind in (infer.SRN, infer.DBGAN, infer.BGAN, infer.Deblur, infer.Inpaint, infer.Kontext):
        yield Case(f"{kind.__name__} in bf16", partial(in_half, kind, device, side))
    name = "Kontext, compiled against not"
    backend = "eager" if tiny else "inductor"
    yield Case(name, partial(compared, name, partial(plain, compiled=backend), plain))
