"""Learn one picture and edit it: python examples/train_and_edit.py [photo.jpg "what it shows" "what it should show"]"""

import sys
from pathlib import Path

from PIL import Image

from personalize import Editor, Sampling, SingleImageConfig, StableDiffusion, bundled, fit, learn, load_image


def main(
    photo: str | None = None,
    caption: str = bundled(0).caption,
    prompt: str = "a picture of a cat in the snow",
    *,
    base: str | Path | None = None,  # the embedded model; or a folder, a hub id, a .safetensors checkpoint
    output_dir: str | Path = "my-subject",
    config: SingleImageConfig | None = None,
    steps: int = 30,
) -> Image.Image:
    model = StableDiffusion.load(base)
    picture = load_image(photo) if photo else bundled(0).picture
    whole = fit(picture, None, model.resolution, 8 * model.factor)  # padded where its shape is not the bucket's
    adapter = learn(model, [whole], caption, config)
    adapter.save(output_dir)
    edited = Editor(model, adapter).edit(prompt, beta=1.2, forget="decoder=0.5", sampling=Sampling(steps=steps))[0]
    edited.save(Path(output_dir) / "edited.png")
    return edited


if __name__ == "__main__":
    main(*sys.argv[1:4])
