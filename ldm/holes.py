"""Fill holes without a model: methods for scratches, and baselines for models."""

from typing import Literal

import cv2
import numpy as np

from ldm.tiling import fill_smoothly

CoarseFill = Literal["none", "telea", "biharmonic"]
RADIUS = 5  # neighbourhood of a pixel in Telea's method, in pixels


def telea(image: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """Continue the surroundings from the edge of the hole inwards (Telea 2004, OpenCV).

    At the image's border OpenCV 5.0 also reads pixels inside the hole, so these are replaced first.
    """
    start = np.rint(fill_smoothly(image.astype(np.float32), hole)).astype(np.uint8)
    return cv2.inpaint(start, hole, RADIUS, cv2.INPAINT_TELEA)


def biharmonic(image: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """Solve the biharmonic equation in each hole (Damelin and Hoang 2018, scikit-image).

    Time and memory grow faster than linearly with the largest hole. Results are clipped to the range of the
    known pixels.
    """
    from skimage.restoration import inpaint_biharmonic  # here: not needed to restore with a model

    filled = inpaint_biharmonic(image / 255, hole, split_into_regions=True, channel_axis=2)
    return np.rint(255 * filled).astype(np.uint8)


def fsr(image: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """Continue the surroundings in the Fourier domain (Genser et al. 2018, opencv-contrib's fast profile)."""
    known = 1 - hole  # for OpenCV's xphoto a pixel is missing where its mask is 0
    missing = cv2.cvtColor(image, cv2.COLOR_RGB2BGR) * known[..., None]
    filled = np.zeros_like(image)
    cv2.xphoto.inpaint(missing, known, filled, cv2.xphoto.INPAINT_FSR_FAST)
    return cv2.cvtColor(filled, cv2.COLOR_BGR2RGB)


METHODS = {"telea": telea, "biharmonic": biharmonic}
if hasattr(cv2, "xphoto"):
    METHODS["fsr"] = fsr


def fill_classically(image: np.ndarray, hole: np.ndarray, method: str) -> np.ndarray:
    """Fill uint8 (h, w, 3) where `hole` (h, w) is not 0, by one of METHODS.

    Pixels outside the hole are unchanged; an image that is all hole becomes grey.
    """
    hole = (hole > 0).astype(np.uint8)
    if not hole.any():
        return image.copy()
    if hole.all():
        return np.rint(fill_smoothly(image.astype(np.float32), hole)).astype(np.uint8)
    return np.where(hole[..., None] > 0, METHODS[method](np.ascontiguousarray(image), hole), image)
