"""Random holes for inpainting: rectangles, brush strokes or both, of an area within given limits.

Masks are uint8 (height, width): 1 in the hole, 0 where the image is kept.
"""

import math

import cv2
import numpy as np

MASK_KINDS = ("rectangle", "irregular", "mixed")
ASPECT = 2.5  # largest ratio of a rectangle's longer to its shorter side
STROKE = (20 / 512, 200 / 512)  # width of a brush as a fraction of the shorter side
TRIES = 60  # largest number of strokes that are tried for one hole
RETRIES = 5  # holes that are drawn before the last one is grown or shrunk into the limits

Ratio = tuple[float, float]


def random_mask(
    height: int, width: int, rng: np.random.Generator, kind: str = "mixed", ratio: Ratio = (0.1, 0.3)
) -> np.ndarray:
    """Draw a random hole that covers between ratio[0] and ratio[1] of the image; it is never empty.

    "rectangle" is one rectangle, "irregular" are strokes of a brush (after Suvorov et al. 2022, sec. 2.3),
    "mixed" is one of these or both together. Raises ValueError for another kind or impossible ratios.
    """
    if kind not in MASK_KINDS:
        raise ValueError(f"mask kind must be one of {', '.join(MASK_KINDS)}, not {kind!r}")
    least, most = pixel_limits(height, width, ratio)
    for _ in range(RETRIES):
        mask = draw_hole(height, width, rng, kind, int(rng.integers(least, most + 1)), least, most)
        if least <= cv2.countNonZero(mask) <= most:
            return mask
    if not mask.any():  # every stroke was larger than the hole may be
        mask[rng.integers(height), rng.integers(width)] = 1
    return fit_area(mask, ratio)


def draw_hole(
    height: int, width: int, rng: np.random.Generator, kind: str, target: int, least: int, most: int
) -> np.ndarray:
    """Draw a hole of about `target` pixels, rarely fewer than `least` or more than `most`."""
    if kind == "mixed":
        kind = ("rectangle", "irregular", "both")[rng.integers(3)]
    mask = np.zeros((height, width), np.uint8)
    if kind != "irregular":
        part = 1.0 if kind == "rectangle" else rng.uniform(0.2, 0.8)
        draw_rectangle(mask, max(1, round(part * target)), rng, most)
    if kind != "rectangle":
        draw_strokes(mask, max(least, round(0.95 * target)), most, rng)
    return mask


def pixel_limits(height: int, width: int, ratio: Ratio) -> tuple[int, int]:
    """Return the fewest (at least 1) and most pixels of a hole. Raises ValueError for impossible ratios."""
    if len(ratio) != 2 or not 0 <= ratio[0] <= ratio[1] <= 1:
        raise ValueError(f"mask ratio must be two numbers with 0 <= low <= high <= 1, not {tuple(ratio)}")
    area = height * width
    least, most = max(1, math.ceil(ratio[0] * area)), math.floor(ratio[1] * area)
    if least > most:
        raise ValueError(f"no hole in an image of {width}x{height} pixels covers {ratio[0]} to {ratio[1]}")
    return least, most


def draw_rectangle(mask: np.ndarray, target: int, rng: np.random.Generator, most: int) -> None:
    """Fill a rectangle of about `target` pixels, at most `most`, of random aspect, anywhere inside."""
    height, width = mask.shape
    aspect = math.exp(rng.uniform(-math.log(ASPECT), math.log(ASPECT)))
    w = min(width, max(round(math.sqrt(target * aspect)), math.ceil(target / height)))
    h = min(height, max(1, round(target / w)))
    while h * w > most and h > 1:
        h -= 1
    y, x = rng.integers(height - h + 1), rng.integers(width - w + 1)
    mask[y : y + h, x : x + w] = 1


def draw_strokes(mask: np.ndarray, target: int, most: int, rng: np.random.Generator) -> None:
    """Draw strokes until `target` pixels are covered, leaving out any that would cover more than `most`."""
    side = min(mask.shape)
    area = cv2.countNonZero(mask)
    for _ in range(TRIES):
        if area >= target:
            return
        room = min(1.1 * target, most + 1) - area  # pixels that this stroke may cover
        thickness = min(rng.uniform(*STROKE) * side, 0.7 * math.sqrt(room))
        length = max(0.0, room - math.pi / 4 * thickness**2) / thickness
        trial = mask.copy()
        points = stroke(mask.shape, length, rng)
        cv2.polylines(trial, [points], isClosed=False, color=1, thickness=max(1, int(thickness)))
        covered = cv2.countNonZero(trial)
        if covered <= most:
            mask[:], area = trial, covered


def stroke(shape: tuple[int, int], length: float, rng: np.random.Generator) -> np.ndarray:
    """Return a polyline with random turns inside the image: int32 (n, 1, 2), x first."""
    height, width = shape
    pieces = int(rng.integers(2, 9))
    at = rng.uniform(0, [width - 1, height - 1])
    angle = rng.uniform(0, 2 * math.pi)
    points = [at]
    for turn, share in zip(rng.uniform(-2.0, 2.0, pieces), rng.dirichlet(np.ones(pieces)), strict=True):
        angle += turn
        step = share * length * np.array([math.cos(angle), math.sin(angle)])
        limit = np.array([width - 1, height - 1])
        beyond = (at + step < 0) | (at + step > limit)
        at = np.clip(at + np.where(beyond, -step, step), 0, limit)
        points.append(at)
    return np.rint(points).astype(np.int32)[:, None]


def fit_area(mask: np.ndarray, ratio: Ratio) -> np.ndarray:
    """Grow or shrink a hole evenly until its area is within the limits; it is unchanged if it already is.

    Raises ValueError for an empty mask, and for impossible ratios.
    """
    least, most = pixel_limits(*mask.shape, ratio)
    area = cv2.countNonZero(mask)
    if least <= area <= most:
        return mask
    if area == 0:
        raise ValueError("the mask has no hole that could be grown")
    outside = cv2.distanceTransform((mask == 0).astype(np.uint8), cv2.DIST_L2, 5)
    framed = np.pad(mask, 1)  # the image's border is an edge of the hole too
    inside = cv2.distanceTransform(framed, cv2.DIST_L2, 5)[1:-1, 1:-1]
    count = least if area < least else most
    order = np.argpartition((outside - inside).ravel(), count - 1)
    fitted = np.zeros(mask.size, np.uint8)
    fitted[order[:count]] = 1
    return fitted.reshape(mask.shape)
