"""Success against identity of the arms of a bench: which arms another one beats in both, and a picture of all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

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


def summary(arms: Points) -> str:
    """Two lines: the arms on the frontier, the most obedient first, and those that are dominated, with by whom."""
    worse = dominated(arms)
    best = sorted((name for name in arms if name not in worse), key=lambda name: arms[name], reverse=True)
    on = ", ".join(f"{name} ({arms[name][0]:.0f} %, {arms[name][1]:.1f} dB)" for name in best)
    off = ", ".join(f"{name} (by {other})" for name, other in worse.items())
    return f"On the frontier of success and identity: {on}.\nDominated: {off or 'none'}.\n"


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
    for name, at in arms.items():
        x, y = place(*at)
        colour = "royalblue" if name in worse else "crimson"
        draw.ellipse(
            [x - 11, y - 11, x + 11, y + 11], outline=colour, fill="white" if name in worse else colour, width=4
        )
        left = x > size / 2
        draw.text((x - 20 if left else x + 20, y), name, fill=colour, font=font, anchor="rm" if left else "lm")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize((side, side), Image.Resampling.LANCZOS).save(path)
    return path
