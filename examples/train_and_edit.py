"""Learn one picture and edit it, in a dozen lines: python examples/train_and_edit.py [photo.jpg "what it shows"]"""

import sys
from pathlib import Path

from PIL import Image

from personalize import Editor, StableDiffusion
from personalize.bundled import bundled
from personalize.images import fit, load_image
from personalize.learning import Recipe, learn


def main(
    output_dir: str | Path = "my-subject", photo: str | None = None, caption: str = "", base: str | Path | None = None,
    recipe: Recipe = Recipe(), steps: int = 30,
) -> list[Image.Image]:  # fmt: skip
    from personalize.editor import Sampling

    model = StableDiffusion.load(base)  # None is the embedded model; or a folder, a hub id, a .safetensors checkpoint
    picture, caption = (load_image(photo), caption) if photo else (bundled(0).picture, bundled(0).caption)
    pixels, _ = fit(picture, model.resolution, 8 * model.factor)
    adapter = learn(model, pixels, caption, recipe)
    adapter.save(output_dir)
    editor = Editor(model, adapter)
    edited = editor.edit(f"{caption} in the snow", beta=1.2, forget="decoder=0.5", sampling=Sampling(steps=steps))
    edited[0].save(Path(output_dir) / "edited.png")
    return edited


if __name__ == "__main__":
    main(photo=sys.argv[1] if len(sys.argv) > 1 else None, caption=sys.argv[2] if len(sys.argv) > 2 else "")
