"""Success against identity of the arms of a bench: which arms another one beats in both, and a picture of all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from personalize.evaluation.report import RESAMPLES

Points = dict[str, tuple[float, float]]  # for each arm its success in % and its identity in dB


def points(rows: Sequence[dict[str, Any]], arms: Sequence[str]) -> Points:
    """The mean success and the mean PSNR of each arm over all its rows."""
    found = {}
    for arm in arms:
        mine = [row for row in rows if row["arm"] == arm]
        found[arm] = (100 * float(np.mean([row["success"] for row in mine])), float(np.mean([r["psnr"] for r in mine])))
    return found


def dominated(arms: Points) -> dict[str, str]:
    """For each arm that another one beats in one figure and does not fall behind in the other: the best such one."""
    found = {}
    for name, (success, identity) in arms.items():
        better = [
            other for other, (s, i) in arms.items() if s >= success and i >= identity and (s, i) != (success, identity)
        ]
        if better:
            found[name] = max(better, key=lambda other: arms[other])
    return found


def at_identity(success: np.ndarray, identity: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The most success that arms reach at a `wanted` identity, alone or two of them in turn; −∞ if none is as good.

    Two arms in turn, the share λ of the edits by the first, reach λ s₁ + (1 − λ) s₂ at λ i₁ + (1 − λ) i₂.

    Args:
        success, identity: (r, arms), of r resamples.
        wanted: (r,).

    Returns:
        (r,), in the unit of `success`.
    """
    best = np.where(identity >= wanted[:, None], success, -np.inf).max(1)
    for above in range(identity.shape[1]):
        for below in range(identity.shape[1]):
            gap = identity[:, above] - identity[:, below]
            between = (identity[:, above] >= wanted) & (wanted > identity[:, below])
            share = np.divide(wanted - identity[:, below], gap, out=np.zeros_like(gap), where=between)
            mixed = share * success[:, above] + (1 - share) * success[:, below]
            best = np.where(between, np.maximum(best, mixed), best)
    return best


def above_mixtures(rows: Sequence[dict[str, Any]], arm: str, others: Sequence[str]) -> tuple[float, float, float, int]:
    """How far, in points, the success of `arm` lies above what `others` reach at its identity, and the 95 % interval.

    It is a percentile bootstrap over the scenes, whose edits are drawn together; all arms have the same scenes in each
    resample.  Returns value, low, high and the number of edits.
    """
    found = {(row["arm"], row["task"]): row for row in rows}
    tasks = sorted(row["task"] for row in rows if row["arm"] == arm)
    scenes = [[i for i, task in enumerate(tasks) if task.rpartition("/")[2] == scene]
              for scene in dict.fromkeys(task.rpartition("/")[2] for task in tasks)]  # fmt: skip
    success, identity = (
        np.array([[factor * found[one, task][name] for one in (arm, *others)] for task in tasks])
        for name, factor in (("success", 100.0), ("psnr", 1.0))
    )
    rng = np.random.default_rng(len(scenes))
    draws = [np.concatenate([scenes[i] for i in rng.integers(0, len(scenes), len(scenes))]) for _ in range(RESAMPLES)]
    picked = [np.arange(len(tasks)), *draws]
    s, i = (np.stack([values[one].mean(0) for one in picked]) for values in (success, identity))
    gains = s[:, 0] - at_identity(s[:, 1:], i[:, 1:], i[:, 0])
    low, high = np.quantile(gains[1:], [0.025, 0.975])
    return float(gains[0]), float(low), float(high), len(tasks)


def summary(arms: Points) -> str:
    """Two lines: the arms on the frontier, the most obedient first, and those that are dominated, with by whom."""
    worse = dominated(arms)
    best = sorted((name for name in arms if name not in worse), key=lambda name: arms[name], reverse=True)
    on = ", ".join(f"{name} ({arms[name][0]:.0f} %, {arms[name][1]:.1f} dB)" for name in best)
    off = ", ".join(f"{name} (by {other})" for name, other in worse.items())
    return f"On the frontier of success and identity: {on}.\nDominated: {off or 'none'}.\n"


def _overlap(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two boxes (left, top, right, bottom) overlap."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def plot(arms: Points, path: Path, side: int = 720) -> Path:
    """Save the arms as points, success (%) to the right and identity (dB) upwards; the frontier's are filled."""
    worse, size = dominated(arms), 2 * side  # drawn at twice the size, for smooth edges
    image = Image.new("RGB", (size, size), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(26)
    low, high = (np.array(list(arms.values())).min(0) - (5, 1), np.array(list(arms.values())).max(0) + (5, 1))
    margin, room = 130, size - 240

    def place(success: float, identity: float) -> tuple[float, float]:
        x, y = (np.array([success, identity]) - low) / (high - low)
        return margin + room * float(x), size - margin - room * float(y)

    for success in range(int(low[0] // 10 + 1) * 10, int(high[0]) + 1, 10):
        draw.line([place(success, low[1]), place(success, high[1])], fill="gainsboro", width=2)
        draw.text((place(success, 0)[0], size - margin + 14), f"{success} %", fill="black", font=font, anchor="mt")
    for identity in range(int(low[1] // 2 + 1) * 2, int(high[1]) + 1, 2):
        draw.line([place(low[0], identity), place(high[0], identity)], fill="gainsboro", width=2)
        draw.text((margin - 14, place(0, identity)[1]), f"{identity} dB", fill="black", font=font, anchor="rm")
    draw.text((size / 2, size - 40), "edits that succeed", fill="black", font=font, anchor="mm")
    draw.text((margin, 40), "identity (filled: no other arm is better in both)", fill="black", font=font)
    written = [(x - 15, y - 15, x + 15, y + 15) for x, y in (place(*at) for at in arms.values())]  # and the points
    for name, at in sorted(arms.items(), key=lambda one: one[1][1]):
        x, y = place(*at)
        colour = "royalblue" if name in worse else "crimson"
        draw.ellipse(
            [x - 11, y - 11, x + 11, y + 11], outline=colour, fill="white" if name in worse else colour, width=4
        )
        left = x > size / 2
        text, anchor = (x - 20 if left else x + 20, y), "rm" if left else "lm"
        while any(_overlap(box, draw.textbbox(text, name, font=font, anchor=anchor)) for box in written):
            text = (text[0], text[1] - 2)  # upwards: labels below are written already
        if text[1] < y:
            draw.line([(x, y - 11), text], fill=colour, width=2)
        written.append(draw.textbbox(text, name, font=font, anchor=anchor))
        draw.text(text, name, fill=colour, font=font, anchor=anchor)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize((side, side), Image.Resampling.LANCZOS).save(path)
    return path
