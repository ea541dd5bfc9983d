"""A pool of previously generated images for discriminators (Shrivastava et al. 2017)."""

import torch
from torch import Tensor


class ImagePool:
    """Pool of up to `size` earlier fakes; once full, it replaces half of its inputs by earlier ones."""

    def __init__(self, size: int):
        self.size = size
        self.images: list[Tensor] = []

    def __call__(self, fakes: Tensor) -> Tensor:
        """Return fakes (b, 3, h, w), some replaced by earlier ones; uses torch's global random generator."""
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
