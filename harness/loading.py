"""DataLoader with the options that all training runs here use."""

import cv2
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ldm.data.stream import Readable
from ldm.device import choose_device


def start_worker(number: int) -> None:
    """Initialise a DataLoader worker: OpenCV must not start a thread for every core in each of them."""
    cv2.setNumThreads(0)  # 1 would wait for threads of the parent


def make_loader(
    dataset: Dataset, batch_size: int, num_workers: int, sampler: Sampler | None = None
) -> DataLoader:
    """Return batches in the order of the sampler, or of the data, read by `num_workers` persistent workers.

    Samples whose images are damaged or missing are replaced by others (ldm.data.stream.Readable).
    """
    return DataLoader(
        Readable(dataset),
        batch_size,
        sampler=sampler,
        num_workers=num_workers,
        pin_memory=choose_device().type == "cuda",
        persistent_workers=num_workers > 0,
        worker_init_fn=start_worker,
        generator=torch.Generator(),  # its own: an iterator must not advance the global one
    )
