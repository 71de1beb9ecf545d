"""Small folders laid out like the published benchmarks, and the command that measures results for them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from personalize.cli.main import main
from personalize.embedded.scenes import captions, random_scene, render


def noise(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def evaluated(folder, results, tmp_path, *more):
    """The exit code of `personalize evaluate`, and what it wrote if that is 0."""
    output = tmp_path / "out.json"
    output.unlink(missing_ok=True)
    code = main(["evaluate", str(folder), "--results", str(results), "--output", str(output), *more])
    strict = {"parse_constant": lambda word: pytest.fail(f"{word} is no JSON")}
    return code, json.loads(output.read_text(), **strict) if code == 0 else None


def scene_folder(folder, kind: str):
    """A benchmark of two pictures of the embedded model's world, in the layout of `kind`."""
    originals = {"pie": folder / "annotation_images", "ted": folder / "originals", "drag": folder}[kind]
    originals.mkdir(parents=True)
    entries, sides = {}, {"one": (128, 128), "two": (160, 96)}
    for name, size in sides.items():
        scene = random_scene(1, split="benchmark-test", objects=1)
        picture = Image.fromarray(render(scene, 160)[0]).resize(size)
        if kind == "drag":
            (folder / name).mkdir()
            picture.save(folder / name / "original_image.png")
            about = {"prompt": captions(scene)[0], "points": [[64, 48], [74, 48]]}
            (folder / name / "meta_data.json").write_text(json.dumps(about))
        else:
            picture.save(originals / f"{name}.png")
        entries[name] = {"image_path": f"{name}.png", "original_prompt": captions(scene)[0],
                         "editing_prompt": "a picture of a dog on the grass", "mask": [0, 9]}  # fmt: skip
    listed = [[f"{name}.png", "a picture of a dog on the grass"] for name in sides]
    if kind != "drag":
        name = {"pie": "mapping_file.json", "ted": "input_list.json"}[kind]
        (folder / name).write_text(json.dumps(entries if kind == "pie" else listed))
    return folder
