"""diffusers' own converters at the released widths: whatever they read of a file has the changes that we read."""

from __future__ import annotations

import re

import pytest
import torch

from personalize.formats.diffusion_transformers import skeletons
from personalize.formats.diffusion_transformers.families import FAMILIES
from personalize.formats.diffusion_transformers.readers import through_diffusers
from personalize.formats.diffusion_transformers.reading import read
from personalize.formats.diffusion_transformers.writing import tensors_in
from personalize.io.tensor_files import TensorFile
from tests.support.transformer_loras import random_pairs

READ = {  # besides diffusers' own names: the naming schemes of which it reads at least a part
    "flux1": {"kohya", "OneTrainer"}, "flux2": {"kohya", "ComfyUI"}, "z-image": {"kohya", "ComfyUI"},
    "qwen-image": {"kohya", "ComfyUI"}, "krea2": {"ComfyUI"}, "anima": {"ComfyUI"}, "sd3": set(), "chroma": set(),
}  # fmt: skip
WRONG = {("flux2", "ComfyUI"): ("transformer.norm_out.linear",)}  # diffusers 0.42 does not swap its halves


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_converter_gives_our_changes(family):
    """The first block of each stack and all layers outside them, at rank 1."""
    shapes = next(iter(skeletons.models(family).values()))
    first = re.compile(r"transformer\.(?:[a-z_]+\.)*(?:0\.[\w.-]+|[\w.-]+)")
    chosen = {name: shape for name, shape in shapes.items() if name.startswith("transformer.") and first.fullmatch(name)
              and not re.search(r"(?:blocks|layers|refiner)\.[1-9]", name)}  # fmt: skip
    pairs = random_pairs({name.partition(".")[2]: torch.Size(shape) for name, shape in chosen.items()}, 1)
    for scheme in ("diffusers", "kohya", "ComfyUI", "OneTrainer"):
        content = TensorFile(tensors_in(pairs, family, scheme, torch.float32), {})
        reading = through_diffusers(content, read("file", content, family))
        assert bool(reading.refused) == (scheme not in {"diffusers"} | READ[family]), (scheme, reading.refused)
        assert reading.wrong == WRONG.get((family, scheme), ()), scheme
        assert scheme != "diffusers" or not reading.dropped
