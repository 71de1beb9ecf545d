"""Our one loop against diffusers' own pipelines, on the same weights and the same noise."""

import diffusers
import pytest
import torch

from personalize.randomness import generator
from personalize.sampling.denoise import Edit, ddim, denoise, initial_latents, sample
from personalize.sampling.schedule import SCHEDULERS, make_schedule
from tests.support.tiny import NAMES, tiny, tiny_sd1, tiny_sdxl

SEEDS = [3, 4]
PROMPTS = ["a cat on the beach", "my red dog"]
NEGATIVE = ["a blue fox", "snow"]


def stock_latents(model, noise, scheduler=None, **call):
    """What a stock pipeline makes of unit `noise`."""
    pipe = model.pipeline()
    pipe.scheduler = scheduler or diffusers.DDIMScheduler.from_config(model.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe(latents=noise.clone(), output_type="latent", **call).images


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("negative", [None, NEGATIVE], ids=["no_negative", "negative"])
def test_ddim_equals_the_stock_pipeline(name, negative):
    """1e-5 on latents of size up to 20: the same fp32 formulas; only the order of some sums differs."""
    model, size = tiny(name), (32, 32)
    noise = initial_latents(model, SEEDS, size)
    expected = stock_latents(
        model,
        noise,
        prompt=PROMPTS,
        negative_prompt=negative,
        num_inference_steps=4,
        guidance_scale=3.0,
        height=32,
        width=32,
    )
    edit = Edit(
        model.prompts(PROMPTS, size), None if negative is None else model.prompts(negative, size), guidance_scale=3.0
    )
    found = denoise(model, noise, edit, make_schedule(model, 4))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_ddim_without_guidance_and_off_square_equals_the_stock_pipeline(name):
    model = tiny(name)
    noise = initial_latents(model, SEEDS, (24, 32))
    call = {"prompt": PROMPTS, "num_inference_steps": 3, "guidance_scale": 1.0, "height": 24, "width": 32}
    expected = stock_latents(model, noise, **call)
    found = denoise(model, noise, Edit(model.prompts(PROMPTS, (24, 32)), guidance_scale=1.0), make_schedule(model, 3))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "spacing"),
    [*((name, "leading") for name in SCHEDULERS), ("ddim", "trailing"), ("heun", "linspace"),
     *(pytest.param(name, spacing, marks=pytest.mark.slow) for name, spacing in (
         ("euler", "trailing"), ("euler_a", "linspace"), ("dpm++_2m", "trailing"), ("unipc", "linspace")))],
)  # fmt: skip
def test_every_scheduler_equals_the_stock_pipeline(name, spacing):
    """1e-4 of the largest latent: stock schedulers keep latents up to 14 times larger, we rescale them at each step."""
    model, size = tiny_sd1(), (32, 32)
    model.scheduler.register_to_config(timestep_spacing=spacing)
    cls, settings = getattr(diffusers, SCHEDULERS[name][0]), SCHEDULERS[name][1]
    noise = initial_latents(model, SEEDS, size)
    expected = stock_latents(
        model, noise, cls.from_config(model.scheduler.config, **settings), prompt=PROMPTS, num_inference_steps=6,
        guidance_scale=2.0, generator=[generator(seed, "moves") for seed in SEEDS], height=32, width=32,
    )  # fmt: skip
    found = sample(model, Edit(model.prompts(PROMPTS), guidance_scale=2.0), SEEDS, make_schedule(model, 6, name), size)
    scale = float(expected.abs().max())
    torch.testing.assert_close(found / scale, expected / scale, atol=1e-4 if name != "ddim" else 1e-5, rtol=0)


def test_ddpm_noise_of_ddim_equals_the_stock_pipelines():
    model = tiny_sd1()
    noise = initial_latents(model, SEEDS, (32, 32))
    draws = [generator(seed, "moves") for seed in SEEDS]
    expected = stock_latents(
        model, noise, prompt=PROMPTS, num_inference_steps=4, guidance_scale=2.0, eta=0.7, generator=draws, height=32,
        width=32,
    )  # fmt: skip
    plan = make_schedule(model, 4, eta=0.7)
    found = denoise(model, noise, Edit(model.prompts(PROMPTS), guidance_scale=2.0), plan, seeds=SEEDS)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["ddim", "euler", "dpm++_2m", "heun", "pndm"])
def test_image_to_image_equals_the_stock_pipeline(name):
    """The stock pipeline draws posterior and noise itself: the same generator is handed to both."""
    model = tiny_sd1()
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(5)) * 2 - 1
    cls, settings = getattr(diffusers, SCHEDULERS[name][0]), SCHEDULERS[name][1]
    expected = _img2img(model, pixels, cls.from_config(model.scheduler.config, **settings))
    draw = torch.Generator().manual_seed(9)
    clean = model.encode(pixels, draw)
    noise = torch.randn(clean.shape, generator=draw)
    plan = make_schedule(model, 6, name, strength=0.6)
    found = denoise(model, plan.begin(noise, clean), Edit(model.prompts(PROMPTS[:1]), guidance_scale=2.0), plan)
    torch.testing.assert_close(found, expected, atol=1e-4 if name != "ddim" else 1e-5, rtol=0)


def _img2img(model, pixels, scheduler):
    pipe = model.pipeline(diffusers.StableDiffusionImg2ImgPipeline)
    pipe.scheduler = scheduler
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        image=pixels, strength=0.6, prompt=PROMPTS[:1], num_inference_steps=6, guidance_scale=2.0,
        generator=torch.Generator().manual_seed(9), output_type="latent",
    ).images  # fmt: skip


@pytest.mark.parametrize("name", ["euler", "dpm++_2m"])
def test_sdxl_schedulers_equal_the_stock_pipeline(name):
    model = tiny_sdxl()
    cls, settings = getattr(diffusers, SCHEDULERS[name][0]), SCHEDULERS[name][1]
    noise = initial_latents(model, SEEDS)
    stock = cls.from_config(model.scheduler.config, **settings)
    expected = stock_latents(model, noise, stock, prompt=PROMPTS, num_inference_steps=4, guidance_scale=2.0)
    found = sample(model, Edit(model.prompts(PROMPTS), guidance_scale=2.0), SEEDS, make_schedule(model, 4, name))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("steps", [10, 20, 50])
def test_inverse_moves_visit_the_stock_inverse_schedulers_levels(steps):
    """One inverse move each against `DDIMInverseScheduler`, with the same raw output; 1e-5: one step in fp32."""
    model = tiny_sd1()
    stock = diffusers.DDIMInverseScheduler.from_config(model.scheduler.config)
    stock.set_timesteps(steps)
    plan = make_schedule(model, steps, inverse=True)
    assert [int(move.timestep) for move in plan] == stock.timesteps.tolist()
    z, output = (torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    for move in plan:
        x0, eps = model.split(output, z, move.alpha)
        expected = stock.step(output, int(move.timestep), z).prev_sample
        torch.testing.assert_close(ddim(x0, eps, move.alpha_next), expected, atol=1e-5, rtol=1e-5)
