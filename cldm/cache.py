"""Cache of latents and text embeddings, so that training needs neither the encoder nor the text tower."""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import h5py
import numpy as np
import torch
from pytorch_lightning.utilities import rank_zero_only
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from cldm.cldm import ControlLDM
from harness.loading import make_loader
from ldm.checkpoint import write_atomically
from ldm.data.stream import Key, split_key
from ldm.device import choose_device
from ldm.models.diffusion.ddpm import image_of


class CachedLatents(Dataset):
    """Dataset that adds latents from the HDF5 file of `cache_latents` to the items of `dataset`.

    Each item gets `moments` (2c, h, w), mean and log variance, and if they were cached `hint_mean` (c, h, w),
    the mean of the hint's latent; c is the number of latent channels, 4 for Stable Diffusion.
    """

    def __init__(self, dataset: Dataset, path: Path):
        self.dataset, self.path = dataset, path
        self.file = None  # opened at the first read, in each worker process

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> dict:
        if self.file is None:
            self.file = h5py.File(self.path, "r")
        index = split_key(key)[1]
        latents = {name: torch.from_numpy(self.file[name][index]).float() for name in self.file}
        return {**self.dataset[key], **latents}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "file": None}


def cache_latents(
    model: ControlLDM,
    dataset: Dataset,
    path: Path,
    about: Mapping,
    batch_size: int,
    num_workers: int,
    hints_stay: bool = True,
) -> CachedLatents:
    """Encode every item's image (`jpg`) into the file `path`, or reuse it if made with the same `about`.

    `about` lists everything that the latents depend on: files with their sizes and modification times, crop
    size, model. Images must not change between epochs. If hints do not change either (`hints_stay`) and the
    ControlNet takes their latents, these are cached too. Rank 0 writes the file, other ranks wait for it.
    """
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    while rank_zero_only.rank and not _is_fresh(path, key):
        time.sleep(1)
    if not _is_fresh(path, key):
        path.parent.mkdir(parents=True, exist_ok=True)
        batches = make_loader(dataset, batch_size, num_workers)
        write_atomically(path, lambda temporary: _fill(model, batches, temporary, key, hints_stay))
    return CachedLatents(dataset, path)


def _is_fresh(path: Path, key: str) -> bool:
    try:
        with h5py.File(path, "r") as file:
            return file.attrs.get("key") == key
    except OSError:  # no such file, or not h5
        return False


@torch.no_grad()
def _fill(model: ControlLDM, batches: DataLoader, path: Path, key: str, hints_stay: bool) -> None:
    device = choose_device()
    autoencoder = model.first_stage_model.to(device)
    with h5py.File(path, "w") as file:
        start = 0
        for batch in tqdm(batches, desc="caching latents", dynamic_ncols=True):
            posterior = autoencoder.encode(image_of(batch, model.first_stage_key).to(device))
            latents = {"moments": torch.cat([posterior.mean, posterior.logvar], dim=1)}
            if model.sees_hint_latent and hints_stay:
                hint = model.hint_of(batch)[:, :3].to(device) * 2 - 1
                latents["hint_mean"] = autoencoder.encode(hint).mode()
            for name, values in latents.items():
                shape, chunks = (len(batches.dataset), *values.shape[1:]), (1, *values.shape[1:])
                kept = file.require_dataset(name, shape, np.float16, exact=True, chunks=chunks)
                kept[start : start + len(values)] = values.cpu().numpy().astype(np.float16)
            start += len(posterior.mean)
        file.attrs["key"] = key


def drop_encoders(model: ControlLDM, prompts: set[str] | None, hints_stay: bool = True) -> None:
    """Free the autoencoder's encoder, and the text tower after it has embedded `prompts`.

    The text tower is kept if `prompts` is None (there are too many to keep their embeddings). The encoder is
    kept if hints change between epochs and the ControlNet takes their latents.
    """
    if hints_stay or not model.sees_hint_latent:
        model.first_stage_model.encoder, model.first_stage_model.quant_conv = None, None
    if prompts is not None:
        model.get_learned_conditioning(sorted(prompts))
        model.cond_stage_model = None


def with_cached_latents(
    model: ControlLDM,
    datasets: Mapping[str, Dataset | None],
    files: Iterable[str | bytes | Path],
    prompts: set[str] | None,
    folder: Path,
    base: str | Path,
    image_size: int,
    batch_size: int,
    num_workers: int,
    hints_stay: bool = True,
) -> list[CachedLatents | None]:
    """Return the `datasets` (or None), in order, with latents cached in `folder`/NAME_latents.h5.

    A cache is made again if `files` (the images), `base` (the file of the model's weights) or `image_size`
    change. The model's encoders are freed afterwards (see `drop_encoders`). `hints_stay` is False if an
    item's hint changes between epochs.
    """
    about = {"files": [stamp(path) for path in files], "size": image_size, "model": stamp(base)[1:]}
    if model.sees_hint_latent and hints_stay:
        about["hint"] = "mean"
    cached: list[CachedLatents | None] = []
    for name, dataset in datasets.items():
        path, key = folder / f"{name}_latents.h5", {**about, "set": name}
        if dataset is None:
            cached.append(None)
        else:
            cached.append(cache_latents(model, dataset, path, key, batch_size, num_workers, hints_stay))
    drop_encoders(model, prompts, hints_stay)
    return cached


def stamp(path: str | bytes | Path) -> tuple[str, int, int]:
    """Return the name, size in bytes and modification time in nanoseconds of a file."""
    status = os.stat(path)
    return os.fsdecode(path), status.st_size, status.st_mtime_ns
