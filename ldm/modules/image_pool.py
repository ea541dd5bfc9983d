"""A pool of earlier generated images for discriminators (Shrivastava et al. 2017)."""

import torch
from torch import Tensor


class ImagePool:
    """Up to `size` earlier fakes; half of what a full pool returns is from before."""

    def __init__(self, size: int):
        self.size = size
        self.images: list[Tensor] = []

    def __call__(self, fakes: Tensor) -> Tensor:
        """Take (b, 3, h, w) in, give as many out; draws from torch's random numbers."""
        chosen = []
        for fake in fakes.detach():
            if len(self.images) < self.size:
                self.images.append(fake.clone())
            elif self.size and torch.rand(()) < 0.5:
                index = int(torch.randint(self.size, ()))
                older = self.images[index].to(fake)  # a resumed pool is on the CPU
                self.images[index] = fake.clone()
                fake = older
            chosen.append(fake)
        return torch.stack(chosen)

    def state_dict(self) -> dict:
        return {"images": self.images}

    def load_state_dict(self, state: dict) -> None:
        self.images = list(state["images"])
