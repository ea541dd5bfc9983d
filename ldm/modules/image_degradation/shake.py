"""Camera shake that varies over the image: an exposure as the average of many warped frames.

A hand moves, turns and rolls the camera, so a real kernel varies over the image (Whyte, Sivic, Zisserman,
Ponce: Non-uniform Deblurring for Shaken Images, CVPR 2010). An object may move independently. The
sharp image is the frame in the middle of the exposure, as in the GoPro data set.
"""

import math

import cv2
import numpy as np
from numpy.random import Generator

from ldm.modules.image_degradation.blur import (
    Parameters,
    Range,
    check_image,
    motion_path,
    record,
    srgb_to_linear,
)

FEWEST_FRAMES, MOST_FRAMES = 9, 41  # odd, so that one frame is in the middle
CLIPPED = 0.99  # linear light above which (254 of 255 levels) values are assumed to be clipped


def camera_shake(
    image: np.ndarray,
    rng: Generator,
    length: Range = (4.0, 45.0),
    shake: Range = (0.0, 0.7),
    scale: float = 1.0,
    moving_object: float = 0.25,
    **camera: float | Range,
) -> tuple[np.ndarray, Parameters]:
    """Blur uint8 RGB (h, w, 3) by a shaking camera; return the blurred image and the sampled parameters.

    The mean path of the image's points is `scale * length` pixels long, sampled log-uniformly; for `shake`
    see `motion_path`. In the fraction `moving_object` of the images a soft-edged region moves independently.
    Half of the images are averaged in linear light, with clipped highlights raised so that lights leave
    streaks, the other half in sRGB, as in GoPro's `blur` folder. `camera` are the options of `record`.
    """
    check_image(image)
    pixels = scale * float(np.exp(rng.uniform(*np.log(length))))
    # During the short exposure of a video frame or a photo the camera moves smoothly: most paths are almost
    # straight lines, few are tangles.
    roughness = shake[0] + (shake[1] - shake[0]) * rng.random() ** 3
    in_linear_light = rng.random() < 0.5
    if in_linear_light:
        light = restore_highlights(srgb_to_linear(image), rng.uniform(1, 4))
    else:
        light = image.astype(np.float32) / 255

    views = shake_views(rng, pixels, roughness, image.shape[:2])
    if rng.random() < moving_object:
        object_views = shake_views(rng, pixels * rng.uniform(0.5, 2), roughness, image.shape[:2], len(views))
        blurred = expose_object(light, views, object_views, soft_mask(rng, image.shape[:2]))
    else:
        blurred = expose(light, views)
    if not in_linear_light:
        blurred = srgb_to_linear(np.rint(blurred * 255).astype(np.uint8))
    return record(blurred, rng, {"length": pixels, "shake": roughness}, **camera)


def shake_views(
    rng: Generator, length: float, shake: float, size: tuple[int, int], count: int | None = None
) -> np.ndarray:
    """Sample affine maps (n, 2, 3) from the middle frame's pixels to each frame's; n is odd.

    Each is a shift, a rotation and a zoom about a random point in or near the image. They are scaled so that
    the mean path of the corners and the centre is `length` pixels long. `count` sets n; by default longer
    paths get more frames.
    """
    height, width = size
    if count is None:
        count = int(np.clip(math.ceil(length), FEWEST_FRAMES, MOST_FRAMES)) // 2 * 2 + 1
    shifts = _centred(motion_path(rng, 1.0, shake), count)
    turns = _centred(motion_path(rng, 1.0, shake), count) * rng.uniform(0, 2) / max(size)
    zooms = turns[:, 1] * rng.uniform(0, 0.5)
    axis = np.array([rng.uniform(-0.5, 1.5) * width, rng.uniform(-0.5, 1.5) * height])

    points = np.array([[0, 0], [width, 0], [0, height], [width, height], [width / 2, height / 2]])
    places = _views(shifts, turns[:, 0], zooms, axis) @ _homogeneous(points)
    steps = np.diff(places, axis=0)  # (n - 1, 2, points)
    factor = length / max(float(np.linalg.norm(steps, axis=1).sum(axis=0).mean()), 1e-9)
    return _views(shifts * factor, turns[:, 0] * factor, zooms * factor, axis)


def _centred(path: np.ndarray, count: int) -> np.ndarray:
    """Return `count` points of a path at equal times, shifted so that the middle one is at the origin."""
    chosen = path[np.rint(np.linspace(0, len(path) - 1, count)).astype(int)]
    return chosen - chosen[count // 2]


def _views(shifts: np.ndarray, turns: np.ndarray, zooms: np.ndarray, axis: np.ndarray) -> np.ndarray:
    motions = zip(shifts, turns, zooms, strict=True)
    return np.stack([_affine(shift, turn, zoom, axis) for shift, turn, zoom in motions])


def _affine(shift: np.ndarray, turn: float, zoom: float, axis: np.ndarray) -> np.ndarray:
    """Return a rotation by `turn` radians and a zoom by 1 + `zoom` about `axis`, then a shift: (2, 3)."""
    cos = (1 + zoom) * math.cos(turn)
    sin = (1 + zoom) * math.sin(turn)
    linear = np.array([[cos, -sin], [sin, cos]])
    return np.hstack([linear, (axis - linear @ axis + shift)[:, None]])


def _homogeneous(points: np.ndarray) -> np.ndarray:
    return np.vstack([points.T, np.ones(len(points))])  # (n, 2) -> (3, n)


def expose(light: np.ndarray, views: np.ndarray) -> np.ndarray:
    """Average float32 `light` (h, w, c) warped by each of `views` (n, 2, 3), borders reflected."""
    total = np.zeros_like(light)
    for view in views:
        cv2.accumulate(_warp(light, view), total)
    return total / len(views)


def expose_object(
    light: np.ndarray, views: np.ndarray, object_views: np.ndarray, mask: np.ndarray
) -> np.ndarray:
    """Average like `expose`, but move the part under `mask` (h, w) in [0, 1] by `object_views`."""
    total = np.zeros_like(light)
    layer = np.dstack([light, mask])
    for view, object_view in zip(views, object_views, strict=True):
        moved = _warp(layer, object_view)
        cover = moved[..., 3:]
        background = _warp(light, view)
        cv2.accumulate(background + cover * (moved[..., :3] - background), total)
    return total / len(views)


def _warp(light: np.ndarray, view: np.ndarray) -> np.ndarray:
    h, w = light.shape[:2]
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(light, view, (w, h), flags=flags, borderMode=cv2.BORDER_REFLECT_101)


def soft_mask(rng: Generator, size: tuple[int, int]) -> np.ndarray:
    """Sample a blob with a soft edge: float32 (h, w) in [0, 1] that covers about a quarter to a half."""
    height, width = size
    cells = int(rng.integers(3, 6))
    field = cv2.resize(
        rng.random((cells, cells), dtype=np.float32), (width, height), interpolation=cv2.INTER_CUBIC
    )
    level = np.quantile(field[::8, ::8], rng.uniform(0.5, 0.75))
    softness = rng.uniform(0.01, 0.05)
    return np.clip(0.5 + (field - level) / softness, 0, 1).astype(np.float32)


def restore_highlights(light: np.ndarray, gain: float) -> np.ndarray:
    """Raise clipped values of linear light to `gain`, since files clip highlights at 1."""
    return np.where(light >= CLIPPED, np.float32(gain), light)
