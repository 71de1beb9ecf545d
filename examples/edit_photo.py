"""Edit a photo by text, nothing trained: python examples/edit_photo.py [photo.jpg "a cat on the beach" "a dog …"]"""

import sys
from pathlib import Path

from PIL import Image

from personalize import Editor, EditRequest, PhotoSettings, StableDiffusion, bundled


def main(
    photo: str | Path | None = None,
    source: str | None = None,  # what the photo shows
    target: str | None = None,  # what it is to show
    *,
    base: str | Path | None = None,  # the embedded model; or a folder, a hub id, a .safetensors checkpoint
    output_dir: str | Path = "edited",
    steps: int = 50,
) -> Image.Image:
    source = source or bundled(0).caption
    request = EditRequest(target) if target else EditRequest(swaps=[("cat", "dog")], local=[("cat", "dog")])
    editor = Editor(StableDiffusion.load(base))
    result = editor.photo(
        photo or bundled(0).picture, source, request, PhotoSettings(steps=steps), attention=True,
        cache=Path(output_dir) / "trajectories",  # the next edit of this photo begins where this one ended
    )  # fmt: skip
    for name, picture in (("edited", result.image), ("before-after", result.sheet), ("attention", result.attention)):
        if picture is not None:
            picture.save(Path(output_dir) / f"{name}.png")
    print(f"{result.target}: {result.seconds:.1f} s", *result.notes, sep="\n")
    return result.image


if __name__ == "__main__":
    main(*sys.argv[1:4])
