"""How far two pictures are apart, within a region: PSNR, colour, structure; and how much two masks overlap."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageFilter

PSNR_CAP = 60.0  # dB, of equal pictures


def identity(picture: np.ndarray, truth: np.ndarray, where: np.ndarray) -> dict[str, float]:
    """PSNR, colour and structure distance of two RGB uint8 pictures (H, W, 3) within boolean `where` (H, W)."""
    return {
        "psnr": psnr(picture, truth, where),
        "colour": colour_distance(picture, truth, where),
        "structure": structure_distance(picture, truth, where),
    }


def psnr(picture: np.ndarray, truth: np.ndarray, where: np.ndarray | None = None) -> float:
    """−10 log₁₀ of the mean squared error of colours in [0, 1], in dB, at most 60."""
    difference = (picture.astype(np.float64) - truth) / 255
    error = float(np.square(difference if where is None else difference[where]).mean())
    return min(PSNR_CAP, -10 * math.log10(max(error, 1e-12)))


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union, |a ∧ b| / |a ∨ b|, of boolean masks; 1 if both are empty."""
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 1.0


def colour_distance(picture: np.ndarray, truth: np.ndarray, where: np.ndarray) -> float:
    """Earth mover's distance between the two pictures' distributions of L*, a* and b*, averaged over the three, in ΔE.

    It is the mean |a − b| of sorted values, and does not depend on where in the region the pixels lie.
    """
    ours, theirs = (np.sort(lab(image[where]), axis=0) for image in (picture, truth))
    return float(np.abs(ours - theirs).mean())


def lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB uint8 (…, 3) → CIE L*a*b* under D65."""
    value = rgb.astype(np.float64) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    xyz = linear @ _XYZ.T / _XYZ.sum(1)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


_XYZ = np.array([[0.41246, 0.35758, 0.18044], [0.21267, 0.71515, 0.07218], [0.01933, 0.11919, 0.95030]])


def structure_distance(picture: np.ndarray, truth: np.ndarray, where: np.ndarray) -> float:
    """Relative difference of the gradients of luma, blurred by one pixel: 0 for equal pictures, at most 1.

        Σ|∇a − ∇b| / Σ(|∇a| + |∇b| + c)   over `where`,  c = 1 grey level a pixel

    c keeps noise in plain regions from counting as structure.
    """
    ours, theirs = (_gradient(image)[:, where] for image in (picture, truth))
    size = np.linalg.norm(ours, axis=0) + np.linalg.norm(theirs, axis=0) + 1.0
    return float(np.linalg.norm(ours - theirs, axis=0).sum() / size.sum())


def _gradient(image: np.ndarray) -> np.ndarray:
    """Vertical and horizontal slope (2, H, W) of the blurred luma, in grey levels a pixel."""
    luma = Image.fromarray(image).convert("L").filter(ImageFilter.GaussianBlur(1))
    return np.array(np.gradient(np.asarray(luma, np.float64)))
