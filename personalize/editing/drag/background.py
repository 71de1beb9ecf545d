"""The background behind an object that moves away, guessed from the rest of the picture without a model.

`smoothly_filled` continues the colours around the void.  `cloned` also continues a texture: it looks for the shift s at
which the picture looks most like the surroundings R of the void, copies the void's content from there, and corrects the
copy by the smooth continuation of the difference at its border:

    s = argmin Σ_{p∈R} ‖I[p + s] − I[p]‖² / |R|          I′[p] = I[p + s] + smooth(I − I[· + s])[p]

References: Gortler et al., "The Lumigraph", SIGGRAPH 1996, for pull-push; Pérez et al., "Poisson Image Editing",
SIGGRAPH 2003, for correcting a copy by its difference at the border.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, pad

from personalize.editing.drag.mask import dilated
from personalize.errors import UserError

SEARCHED = 128  # longest side in pixels of the picture in which shifts are searched; larger ones are scaled down
SURROUNDINGS = 1 / 20  # width of R, as a share of the picture's shorter side
SHARE = 0.5  # of R, that must show background at the shift
COMPARED = 400  # pixels of R by which the shift is made exact in the larger picture
UNLIKE = 2.0  # largest difference of the surroundings, in their variances: that of unrelated places of one texture


def smoothly_filled(pixels: Tensor, known: Tensor) -> Tensor:
    """`pixels` (c, H, W) where `known` (H, W), and smooth interpolation of the nearest known ones elsewhere.

    Pull-push: the known pixels are averaged down, level by level, until none is missing, and the averages are
    interpolated back up.

    Raises:
        UserError: nothing is known.
    """
    _require_any(known)
    return _pull_push(pixels, known.float())


def cloned(pixels: Tensor, void: Tensor, known: Tensor) -> Tensor:
    """`pixels` (c, H, W) with the pixels `void` (H, W) copied from where the picture looks most like around them.

    Args:
        known: the pixels (H, W) that show background and may be copied.  If no shift of the void lies within them, or
            nothing looks like its surroundings, the void is filled smoothly.

    Raises:
        UserError: nothing is known.
    """
    _require_any(known)
    if not bool(void.any()):
        return pixels
    reach = max(2, round(SURROUNDINGS * min(void.shape)))
    around = dilated(void, reach) & known & ~void
    shift = best_shift(pixels, void, around, known)
    if shift is None or not bool((border := around & _shifted(known[None].float(), shift)[0].bool()).any()):
        return torch.where(void, smoothly_filled(pixels, known), pixels)
    copied = _shifted(pixels, shift)
    return torch.where(void, (copied + _pull_push(pixels - copied, border.float())).clamp(-1, 1), pixels)


def _require_any(known: Tensor) -> None:
    if not bool(known.any()):
        raise UserError("the mask covers the whole picture, so that nothing is left to fill from: give a smaller mask")


def best_shift(pixels: Tensor, void: Tensor, around: Tensor, known: Tensor) -> tuple[int, int] | None:
    """The shift s (rows, columns) at which the picture resembles `around` (H, W) most and the void is `known`.

    It is searched over all shifts in a small copy of the picture, by the Fourier transform, and then made exact.
    None if there is none, or if all differ too much.
    """
    factor = max(1, math.ceil(max(void.shape) / SEARCHED))
    coarse = _coarse_shift(*(_smaller(part, factor) for part in (pixels, void, around, known)))
    if coarse is None or factor == 1:
        return coarse
    steps = torch.arange(-factor, factor + 1)
    nearby = torch.cartesian_prod(coarse[0] * factor + steps, coarse[1] * factor + steps)
    places = around.nonzero()
    places = places[torch.linspace(0, len(places) - 1, min(len(places), COMPARED)).long()]
    row, column = nearby[int(_differences(pixels, known, places, nearby).argmin())].tolist()
    return row, column


def _coarse_shift(pixels: Tensor, void: Tensor, around: Tensor, known: Tensor) -> tuple[int, int] | None:
    if int(around.sum()) < 2:  # as in a picture of a few pixels' height: nothing to compare
        return None
    height, width = void.shape
    size = (2 * height, 2 * width)  # so that shifts beyond a border do not come back at the other one

    def spectrum(values: Tensor) -> Tensor:
        return torch.fft.rfft2(values.double(), s=size)

    compared, ring = spectrum(known), spectrum(around).conj()
    covered = torch.fft.irfft2(compared * spectrum(void).conj(), s=size)
    count = torch.fft.irfft2(compared * ring, s=size)
    total = torch.zeros_like(compared)
    for channel in pixels * known:
        total += spectrum(channel**2) * ring - 2 * spectrum(channel) * spectrum(channel * around).conj()
        total += compared * spectrum(channel**2 * around).conj()
    error = torch.fft.irfft2(total, s=size) / count.clamp(min=1)
    allowed = (covered > float(void.sum()) - 0.5) & (count > max(1.0, SHARE * float(around.sum())))
    least, place = error.masked_fill(~allowed, torch.inf).flatten().min(0)
    if not float(least) <= UNLIKE * float(pixels[:, around].var(1).sum()) + 1e-4:
        return None
    row, column = divmod(int(place), size[1])
    return (row - size[0] if row >= height else row), (column - size[1] if column >= width else column)


def _differences(pixels: Tensor, known: Tensor, places: Tensor, shifts: Tensor) -> Tensor:
    """Mean squared difference (k,) of the pixels at `places` (m, 2) from those at `places` + each of `shifts` (k, 2).

    Places that are not `known` at a shift do not count; ∞ where none is.
    """
    there = places + shifts[:, None]
    inside = ((there >= 0) & (there < torch.tensor(known.shape))).all(-1)
    rows, columns = (part.clamp(0, side - 1) for part, side in zip(there.unbind(-1), known.shape, strict=True))
    counted = (inside & known[rows, columns]).float()
    apart = (pixels[:, places[:, 0], places[:, 1]][:, None] - pixels[:, rows, columns]).square().mean(0)
    return torch.where(counted.any(1), (apart * counted).sum(1) / counted.sum(1).clamp(min=1), torch.inf)


def _smaller(values: Tensor, factor: int) -> Tensor:
    """Pixels (c, H, W) scaled down by `factor`; a mask (H, W) likewise, True where at least half is."""
    if factor == 1:
        return values
    size = [math.ceil(side / factor) for side in values.shape[-2:]]
    if values.ndim == 3:
        return interpolate(values[None], size, mode="area")[0]
    return interpolate(values[None, None].float(), size, mode="area")[0, 0] >= 0.5


def _shifted(values: Tensor, shift: tuple[int, int]) -> Tensor:
    """values[p + shift] of `values` (c, H, W), 0 outside."""
    (rows, columns), (height, width) = shift, values.shape[-2:]
    wide = pad(values, (max(0, -columns), max(0, columns), max(0, -rows), max(0, rows)))
    top, left = max(0, rows), max(0, columns)
    return wide[:, top : top + height, left : left + width]


def _pull_push(pixels: Tensor, known: Tensor) -> Tensor:
    if bool((known > 0).all()):
        return pixels
    height, width = known.shape
    extra = (0, width % 2, 0, height % 2)
    weight = avg_pool2d(pad(known[None, None], extra), 2)[0, 0]
    total = avg_pool2d(pad((pixels * known)[None], extra), 2)[0]
    coarse = _pull_push(total / weight.clamp(min=1e-6), (weight > 0).float())
    fine = interpolate(coarse[None], (height + height % 2, width + width % 2), mode="bilinear")[0, :, :height, :width]
    return torch.where(known > 0, pixels, fine)
