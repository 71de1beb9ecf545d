"""Use an adapter inside a stock diffusers pipeline: python examples/stock_pipeline.py my-subject ["a prompt" [base]]"""

import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image

import personalize
from personalize import EMBEDDED


def main(
    adapter: str | Path, prompt: str = "a picture of a cat on the beach", base: str | Path = EMBEDDED, steps: int = 30
) -> Image.Image:
    pipe = DiffusionPipeline.from_pretrained(base)
    with personalize.attach(pipe, adapter) as mine:
        inputs = mine.inputs(prompt, alpha=0.8, beta=1.2)
        image = pipe(**inputs, num_inference_steps=steps, generator=torch.manual_seed(0)).images[0]
    # the pipeline is as it was
    plain = pipe(prompt, num_inference_steps=steps, generator=torch.manual_seed(0)).images[0]
    image.save("attached.png"), plain.save("plain.png")
    return image


if __name__ == "__main__":
    main(*sys.argv[1:4])
