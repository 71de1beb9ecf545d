"""Peak memory of SDXL-shaped updates under `low_memory` on a CPU, with text encoders and VAE kept in memory or not.

    python -m tests.bench.memory                         # 128, 256 and 512 px, two updates of one sample; needs 12 GB
    python -m tests.bench.memory --sides 768 --arms offload

Each arm runs in a process of its own, whose resident size is read from Linux; what the process had before the base was
there, with all libraries loaded, is taken off.  Freed memory is returned, as by the command line with `--offload`.
Weights are random.  The estimate is that which trainers print.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

ARMS = {"in memory": False, "offload": True}


@dataclass(frozen=True)
class Options:
    sides: tuple[int, ...] = (128, 256, 512)
    """Sides of the picture in pixels, one after the other."""
    updates: int = 2
    """Updates of one sample each."""
    arms: tuple[Literal["in memory", "offload"], ...] = ("in memory", "offload")
    """With text encoders and VAE in memory, or not."""
    child: bool = False
    """Measure the one arm in this process, and print JSON."""


def main(options: Options) -> None:
    if options.child:
        measure(options)
        return
    for arm in options.arms:
        command = [sys.executable, "-m", "tests.bench.memory", "--child", "--arms", arm]
        subprocess.run([*command, "--sides", *map(str, options.sides), "--updates", str(options.updates)], check=True)


def measure(options: Options) -> None:
    """Print, for each side, the peaks of resident memory in GB above that of the libraries, and their estimates."""
    from personalize.cli.pages import return_freed_memory
    from personalize.models.memory import return_free_blocks
    from tests.support.tiny import tiny

    return_freed_memory()
    (arm,) = options.arms
    warm = tiny("sdxl")
    warm.quantize()
    measured(warm, 64, ARMS[arm], 1, 0)
    del warm
    start = resident("VmRSS")
    model = random_sdxl()
    model.quantize()
    return_free_blocks()
    for side in options.sides:
        began = time.monotonic()
        result = measured(model, side, ARMS[arm], options.updates, start)
        print(json.dumps({"arm": arm, "side": side, "seconds": round(time.monotonic() - began), **result}), flush=True)


def measured(model: Any, side: int, offload: bool, updates: int, start: int) -> dict[str, dict[str, float]]:
    """The peaks of a run on one picture, and the estimates of the same, in GB."""
    import torch
    from accelerate import Accelerator

    from personalize.training.config import SingleImageConfig
    from personalize.training.memory_estimate import estimate
    from personalize.training.single_image import idle_parts, single_image_run

    config = SingleImageConfig(
        gradient_checkpointing=True, use_8bit_adam=True, offload=offload, train_batch_size=1, samples_per_update=1,
        max_train_samples=updates,
    )  # fmt: skip
    pixels = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    peaks, accelerator = {}, Accelerator(cpu=True, mixed_precision="bf16")
    _peak(start)
    with (
        model.offload.idle(idle_parts(model, config), sparing=config.offload),
        single_image_run(model, pixels, "a photo of a cat", config, accelerator=accelerator) as run,
    ):
        peaks["encoding"] = _peak(start)
        expected = estimate(run)
        _peak(start)
        assert len([*run.steps()]) == updates
        peaks["updates"] = _peak(start)
        with torch.no_grad():
            model.prompts(["a photo of a cat"])  # of a preview only the UNet's passes are left out, which take less
        model.decode(torch.zeros(1, 4, side // 8, side // 8))
        peaks["preview"] = _peak(start)
    estimates = {"encoding": expected.encoding, "updates": expected.updates, "preview": expected.decoding}
    return {
        kind: {name: round(value / 1e9, 2) for name, value in values.items()}
        for kind, values in {"peak": peaks, "estimate": estimates}.items()
    }


def random_sdxl() -> Any:
    """SDXL's shapes: the UNet's blocks in 4 bits, the rest of it in bf16, the other parts in fp32.

    It is made block by block, so that less memory is used before the measurement than in it.
    """
    import torch
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
    from diffusers.models.attention import BasicTransformerBlock
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    from personalize.models.empty import CONFIGS
    from personalize.models.loading import clip_tokenizer
    from personalize.models.quantization import quantize
    from personalize.models.stable_diffusion import StableDiffusion
    from tests.bench.speed import bases

    folder = CONFIGS / "sdxl"
    first, second = clip_tokenizer(), clip_tokenizer("!")
    with torch.device("meta"):
        parts: dict[str, Any] = {
            "unet": UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet")),  # pyright: ignore
            "vae": AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae")),  # pyright: ignore
            "text_encoder": CLIPTextModel(bases.text_config(first, 768, 12)),
            "text_encoder_2": CLIPTextModelWithProjection(bases.text_config(second, 1280, 32)),
        }
    for name, part in parts.items():
        part.to(torch.bfloat16 if name == "unet" else torch.float32).requires_grad_(False).eval().to_empty(device="cpu")
        if name == "unet":
            for block in [one for one in part.modules() if isinstance(one, BasicTransformerBlock)]:
                _fill(block)
                quantize(block)
        _fill(part)
    parts |= {"scheduler": bases.scheduler(), "tokenizer": first, "tokenizer_2": second}
    pipe = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    return StableDiffusion.from_pipeline(pipe, "random-sdxl")


def _fill(part: Any) -> None:
    """Small random weights, the same million over and over, for drawing billions takes long."""
    import torch

    drawn = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0)) * 0.02
    for weight in (one for one in part.parameters() if one.dtype.is_floating_point):
        flat, drawn = weight.data.view(-1), drawn.to(weight.dtype)
        for begin in range(0, len(flat), len(drawn)):
            flat[begin : begin + len(drawn)] = drawn[: len(flat) - begin]
    for name, buffer in part.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.numel()).view(buffer.shape))


def resident(what: str) -> int:
    """Bytes: VmRSS, now resident, or VmHWM, the most since it was reset."""
    match = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def _peak(start: int) -> int:
    """The most resident bytes since the last call, above `start`; begins anew."""
    most = resident("VmHWM") - start
    Path("/proc/self/clear_refs").write_text("5")
    return most


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
