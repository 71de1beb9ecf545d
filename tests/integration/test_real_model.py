"""Real sizes: random weights (slow), or a checkpoint (`pytest -m hub --base FOLDER tests/integration`)."""

from __future__ import annotations

import json
import resource
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from personalize.adapters.lora import load_lora, remove_lora
from personalize.editing.config import Sampling
from personalize.editing.editor import Editor
from personalize.embedded.samples import bundled
from personalize.io.images import fitted_pixels, psnr, to_pixels
from personalize.models.loading import CONFIGS, clip_tokenizer
from personalize.models.stable_diffusion import Conditioning, StableDiffusion
from personalize.randomness import generator
from personalize.training.config import SingleImageConfig
from personalize.training.memory_estimate import estimate
from personalize.training.single_image import learn, single_image_run
from tests.support.children import in_child

SAMPLING = Sampling(steps=20)


def random_sd15() -> StableDiffusion:
    """Stable Diffusion 1.5 in shape, with random weights, its UNet in bf16."""
    configs = {part: json.loads((CONFIGS / "sd15" / part / "config.json").read_text()) for part in ("unet", "vae")}
    text = json.loads((CONFIGS / "sd15" / "text_encoder" / "config.json").read_text())
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    unet = UNet2DConditionModel.from_config(configs["unet"])
    torch.set_default_dtype(torch.float32)
    schedule = json.loads((CONFIGS / "sd15" / "scheduler" / "scheduler_config.json").read_text())
    pipe: Any = StableDiffusionPipeline(
        vae=AutoencoderKL.from_config(configs["vae"]), unet=unet, scheduler=DDIMScheduler.from_config(schedule),
        text_encoder=CLIPTextModel(CLIPTextConfig.from_dict(text)), tokenizer=clip_tokenizer(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False).eval()
    return StableDiffusion.from_pipeline(pipe, "random-sd15")


@pytest.mark.slow  # minutes, and gigabytes: 860 million weights at 512 px
@pytest.mark.timeout(1800)
def test_two_updates_of_sd15_take_at_most_12_gb() -> None:
    def two_updates() -> dict[str, Any]:
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        model = random_sd15()
        config = SingleImageConfig(max_train_samples=2, samples_per_update=1)
        pixels, _ = fitted_pixels(bundled(0).picture, 512, 64)
        with single_image_run(model, pixels, "a photo of a cat", config, accelerator=accelerator) as run:
            expected = estimate(run)
            reports = list(run.steps())
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
            weights = sum(p.numel() for name, p in model.unet.named_parameters() if ".lora_" not in name)
            learns = sum(p.numel() for p in run.objective.adapter_parameters())
            return {"updates": len(reports), "weights": weights, "learns": learns, "peak": peak,
                    "expected": expected.total / 1024**3, "said": str(expected)}  # fmt: skip

    outcome, _ = in_child(two_updates, seconds=1700)
    print(outcome)
    assert (outcome["updates"], outcome["weights"], outcome["learns"]) == (2, 859_520_964, 12_254_208)
    assert outcome["peak"] <= 12  # GiB, with Python and its libraries


@pytest.fixture(scope="module")
def real(request: pytest.FixtureRequest) -> StableDiffusion:
    folder = request.config.getoption("--base")
    if folder is None:
        pytest.skip("name a checkpoint: pytest -m hub --base FOLDER")
    return StableDiffusion.load(folder)


def probe(model: StableDiffusion, pixels: torch.Tensor, conditioning: Conditioning) -> list[float]:
    """Mean squared error in each quarter of the timesteps, on 64 fixed (t, noise) pairs never used in training."""
    latents, t = model.encode(pixels), torch.arange(64, device=model.device) * 1000 // 64 + 7
    noise = torch.randn(64, *latents.shape[1:], generator=generator(99, "probe")).to(latents)
    errors = []
    with torch.no_grad():
        for n in range(64):
            z, e, s = latents, noise[n : n + 1], t[n : n + 1]
            predicted = model.predict(model.noised(z, e, s), s, conditioning)
            errors.append(float((predicted - model.target(z, e, s)).pow(2).mean()))
    return [sum(errors[16 * q : 16 * q + 16]) / 16 for q in range(4)]


@pytest.mark.hub
@pytest.mark.timeout(3600)
def test_forgedit_c20_the_probe_loss_falls_in_every_quarter_of_the_timesteps(real: StableDiffusion) -> None:
    pixels, size = fitted_pixels(bundled(0).picture, real.resolution, 8 * real.factor)
    with torch.no_grad():
        before = probe(real, pixels, real.prompts([bundled(0).caption], size))
    adapter = learn(real, pixels, bundled(0).caption, SingleImageConfig(train_batch_size=1))
    source = dict(adapter.source or {})
    load_lora(real.unet, adapter.lora, adapter.rank, adapter.alpha)
    try:
        times = None if "pooled" not in source else real.time_ids(1, size)
        conditioning = Conditioning(source["embeds"], source.get("pooled"), times).to(real.device)
        after = probe(real, pixels, conditioning)
    finally:
        remove_lora(real.unet)
    print("probe loss, after / before:", [round(b / a, 3) for a, b in zip(before, after, strict=True)])
    assert all(b < a for a, b in zip(before, after, strict=True))


@pytest.mark.hub
@pytest.mark.timeout(7200)
def test_forgedit_c28_strengths_pull_the_way_their_names_say(real: StableDiffusion) -> None:
    """Away from the source (in dB, means over four seeds): with beta, against alpha, and with every forgetting."""
    pixels, size = fitted_pixels(bundled(0).picture, real.resolution, 8 * real.factor)
    adapter = learn(real, pixels, bundled(0).caption, SingleImageConfig(train_batch_size=1))
    editor, prompt = Editor(real, adapter), bundled(0).edits[0].prompt

    def near(**strengths: Any) -> float:
        drawn = editor.edit(prompt, seeds=range(4), sampling=SAMPLING, **strengths)
        return sum(psnr(to_pixels(image), pixels.cpu()) for image in drawn) / 4

    tie = 0.3  # dB: what four seeds do not tell apart
    assert near(beta=0.4) + tie >= near(beta=0.8) and near(beta=0.8) + tie >= near(beta=1.4)
    assert near(alpha=1.1) + tie >= near(alpha=0.8) and near(alpha=0.8) + tie >= near(alpha=0.5)
    whole = near()
    for rule in ("noencoder", "nodecoder", "encoderattn", "decoderattn"):
        assert near(forget=rule) <= whole + tie, rule
