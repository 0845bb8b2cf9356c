"""GrabCut: two colour models and a graph cut, seeded by what is taken for background and foreground.

Rother, Kolmogorov, Blake, GrabCut, SIGGRAPH 2004; the implementation is OpenCV's, an extra of this package.
"""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from fettle.errors import UsageError

_ITERATIONS = 5
_PEAK_SHARE = 0.5  # of a component's peak: above it a pixel is probable foreground


def have_opencv() -> bool:
    return find_spec("cv2") is not None


def grabcut(
    picture: NDArray[np.uint8],
    sure_background: NDArray[np.bool_],
    probable_foreground: NDArray[np.bool_],
) -> NDArray[np.bool_] | None:
    """Foreground (H, W), never in the sure background. The same seeds give the same answer.

    Args:
        picture: (H, W, 3).
        sure_background: (H, W), True where nothing is foreground.
        probable_foreground: (H, W); what is neither is probable background.

    Returns:
        None where the seeds leave nothing to the foreground or nothing to the background.

    Raises:
        UsageError: OpenCV is not installed.
    """
    if not have_opencv():
        raise UsageError("GrabCut needs OpenCV, which is not installed.", "Run pip install 'fettle[refine]'.")
    foreground = probable_foreground & ~sure_background
    if not foreground.any() or foreground.all():
        return None

    import cv2

    labels = np.full(foreground.shape, cv2.GC_PR_BGD, np.uint8)
    labels[sure_background] = cv2.GC_BGD
    labels[foreground] = cv2.GC_PR_FGD
    cv2.setRNGSeed(0)  # the colour models start from a random clustering
    unused = (0, 0, 1, 1)  # the rectangle of another mode
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.grabCut(
        np.ascontiguousarray(picture),
        labels,
        unused,
        models[0],
        models[1],
        _ITERATIONS,
        cv2.GC_INIT_WITH_MASK,
    )
    return np.isin(labels, (cv2.GC_FGD, cv2.GC_PR_FGD))


def grabcut_of_map(
    picture: NDArray[np.uint8], pixel_z: NDArray[np.float32], roi: NDArray[np.bool_]
) -> NDArray[np.bool_] | None:
    """GrabCut from a method's map alone, with no optimisation: what F2PAD is compared with.

    Args:
        picture: (H, W, 3). pixel_z: (H, W), the raw map up-sampled.
        roi: (H, W); outside is sure background. In each of its components (8 neighbours) what is above half
            of the component's peak is probable foreground.

    Returns, raises: as `grabcut`.
    """
    from scipy import ndimage

    labels, count = ndimage.label(roi, structure=np.ones((3, 3), dtype=bool))
    peaks = np.zeros(count + 1)
    peaks[1:] = ndimage.maximum(pixel_z, labels, np.arange(1, count + 1)) if count else ()
    return grabcut(picture, ~roi, roi & (pixel_z > _PEAK_SHARE * peaks[labels]))
