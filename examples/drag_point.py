"""Drag a point of a picture, nothing trained: python examples/drag_point.py [photo.jpg x,y x,y]"""

import sys
from pathlib import Path

from PIL import Image

from personalize import DragSettings, Editor, StableDiffusion, bundled


def main(
    photo: str | Path | None = None,
    handle: str = "64,68",  # the middle of the bundled cat, in pixels
    target: str = "80,60",
    *,
    base: str | Path | None = None,  # the embedded model; or a folder, a hub id, a .safetensors checkpoint
    output_dir: str | Path = "dragged",
    steps: int = 10,
    mask: str | Path | None = None,  # white where things may move; by default found by attention and colour
) -> Image.Image:
    points = [tuple(map(float, text.split(","))) for text in (handle, target)]
    prompt = bundled(0).caption if photo is None else None
    editor = Editor(StableDiffusion.load(base))
    about = {"prompt": prompt, "settings": DragSettings(steps=steps), "mask": mask}
    result = editor.drag(points, photo or bundled(0).picture, **about)
    Path(output_dir).mkdir(exist_ok=True)
    result.image.save(Path(output_dir) / "dragged.png")
    result.overlay.save(Path(output_dir) / "overlay.png")  # mask, handle, target, and a ring where the handle went
    print(f"{result.missed[0]:.1f} px from the target, {result.seconds:.1f} s", *result.notes, sep="\n")
    return result.image


if __name__ == "__main__":
    main(*sys.argv[1:4])
