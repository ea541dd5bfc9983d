"""Measure how far a restored image is shifted and zoomed relative to its input, and undo it."""

import math
from typing import NamedTuple

import cv2
import numpy as np

SIDES = (256, 1024)  # longest side in pixels of the two scales at which images are compared
SMALLEST = 32  # side of the smallest image that can be measured, in pixels
FINE, COARSE = 1.5, 20.0  # standard deviations of the band-pass, in pixels
BLURS = (0.4, 0.6, 0.9, 1.2, 1.6, 2.0, 2.5, 3.0, 3.6, 4.3, 5.2, 6.2, 7.5, 9.0)  # pixels
LEAST_CORRELATION = 0.5  # below this, the images are assumed to show different content
LEAST_TEXTURE = 0.05  # grey levels: smallest standard deviation of a band-passed image with any detail
LEAST_SPREAD = 1e-3  # smallest ratio of edge energy across and along the main direction: plain stripes have 0
LARGEST_ZOOM = 1.25  # largest factor that is measured; the smallest is its inverse


class Movement(NamedTuple):
    """Shift of an image's centre in pixels (right, down) and its scale in percent; NaN if unknown."""

    x: float
    y: float
    scale: float

    @property
    def shift(self) -> float:
        """Length of the shift in pixels."""
        return math.hypot(self.x, self.y)

    @property
    def is_known(self) -> bool:
        """True if the movement could be measured."""
        return math.isfinite(self.scale)

    def __str__(self) -> str:
        if not self.is_known:
            return "movement not measurable"
        return f"shift {self.x:+.2f} {self.y:+.2f} px, scale {self.scale:.2f} %"


UNKNOWN = Movement(math.nan, math.nan, math.nan)


def measure_movement(restored: np.ndarray, image: np.ndarray) -> Movement:
    """Measure the shift and zoom of `restored` relative to `image`, both uint8 (h, w, 3).

    Fits an affine map of the band-passed grey images that maximises the enhanced correlation coefficient
    (Evangelidis and Psarakis 2008, by OpenCV) at two scales, starting from a phase correlation. Returns
    UNKNOWN for images without texture in two directions, below 32 pixels, of different content, or zoomed by
    more than LARGEST_ZOOM. Raises ValueError if shapes differ.
    """
    if restored.shape != image.shape:
        raise ValueError(f"images of different shapes: {restored.shape} and {image.shape}")
    height, width = image.shape[:2]
    if min(height, width) < SMALLEST:
        return UNKNOWN
    scales = {min(1, side / max(height, width)) for side in SIDES}  # small images have only one
    matrix = None  # linear part, and shift of the centre as fractions of the image's sides
    try:
        for scale in sorted(scales):
            size = (max(SMALLEST, round(width * scale)), max(SMALLEST, round(height * scale)))
            matrix = _refine(matrix, _band(image, size), _band(restored, size))
    except cv2.error:  # the optimisation did not converge
        return UNKNOWN
    if matrix is None:
        return UNKNOWN
    zoom = (matrix[0, 0] + matrix[1, 1]) / 2
    if not 1 / LARGEST_ZOOM < zoom < LARGEST_ZOOM:
        return UNKNOWN
    return Movement(float(matrix[0, 2] * width), float(matrix[1, 2] * height), float(100 * zoom))


def _band(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return an image's band-passed grey values at `size` (width, height): float32 (h, w)."""
    grey = cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), size, interpolation=cv2.INTER_AREA)
    grey = grey.astype(np.float32)
    coarse = min(COARSE, max(4 * FINE, min(size) / 20))  # smaller images: less influence of borders
    return cv2.GaussianBlur(grey, (0, 0), FINE) - cv2.GaussianBlur(grey, (0, 0), coarse)


def _refine(start: np.ndarray | None, image: np.ndarray, restored: np.ndarray) -> np.ndarray | None:
    """Find the affine map (2, 3) between two band-passed images (h, w), starting from a smaller scale's.

    Its last column is the shift of the centre as fractions of width and height. Returns None if there is too
    little texture or correlation.
    """
    if not (_has_texture(image) and _has_texture(restored)):
        return None
    image, restored = _equal_detail(image, restored)
    height, width = image.shape
    if start is None:
        window = cv2.createHanningWindow((width, height), cv2.CV_32F)
        shift, _ = cv2.phaseCorrelate(image, restored, window)
        start = np.array([[1, 0, shift[0] / width], [0, 1, shift[1] / height]])
    middle = np.array([width - 1, height - 1]) / 2
    warp = start.astype(np.float32)
    warp[:, 2] = start[:, 2] * (width, height) + middle - start[:, :2] @ middle
    margin = max(2, min(height, width) // 20)  # pixels that moved in at the borders have no counterpart
    mask = np.zeros((height, width), np.uint8)
    mask[margin:-margin, margin:-margin] = 255
    stop = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 40, 1e-5)
    correlation, warp = cv2.findTransformECC(image, restored, warp, cv2.MOTION_AFFINE, stop, mask, 1)
    if not correlation > LEAST_CORRELATION:
        return None
    found = warp.astype(np.float64)
    found[:, 2] = (found[:, 2] + found[:, :2] @ middle - middle) / (width, height)
    return found


def _equal_detail(image: np.ndarray, restored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Blur the more detailed image until both match: otherwise a difference in blur is measured as zoom."""
    if _detail(image) < _detail(restored):
        return _equal_detail(restored, image)[::-1]
    wanted, blurred = _detail(restored), image
    for sigma in BLURS:
        if _detail(blurred) <= wanted:
            break
        blurred = cv2.GaussianBlur(image, (0, 0), sigma)
    return blurred, restored


def _detail(band: np.ndarray) -> float:
    """Return the mean squared gradient of a band-passed image, relative to its mean square."""
    down, right = np.gradient(band)
    return float((down * down + right * right).mean() / (band * band).mean())


def _has_texture(band: np.ndarray) -> bool:
    """Return True if a band-passed image has edges in more than one direction."""
    if band.std() < LEAST_TEXTURE:
        return False
    down, right = np.gradient(band)
    energy = np.array([[(down * down).mean(), (down * right).mean()], [0, (right * right).mean()]])
    weak, strong = np.linalg.eigvalsh(energy, UPLO="U")
    return bool(weak > LEAST_SPREAD * strong)


def undo_movement(restored: np.ndarray, image: np.ndarray, movement: Movement) -> np.ndarray:
    """Move `restored`, uint8 (h, w, 3), back; pixels missing at the borders are taken from `image`.

    Uses Lanczos resampling. `movement` must be known.
    """
    height, width = image.shape[:2]
    zoom = movement.scale / 100
    x = movement.x + (1 - zoom) * (width - 1) / 2
    y = movement.y + (1 - zoom) * (height - 1) / 2
    warp, size = np.array([[zoom, 0, x], [0, zoom, y]]), (width, height)
    flags = cv2.INTER_LANCZOS4 | cv2.WARP_INVERSE_MAP
    moved = cv2.warpAffine(restored, warp, size, flags=flags, borderMode=cv2.BORDER_REFLECT)
    inside = np.ones((height, width), np.uint8)
    inside = cv2.warpAffine(inside, warp, size, flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP)
    return np.where(inside[..., None] > 0, moved, image)
