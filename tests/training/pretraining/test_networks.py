"""The embedded model's architecture, tokenizer and trainer, in miniature."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from hashlib import sha256
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch import nn

from personalize.adapters.lora import module_names
from personalize.cli.launch import load_script, scripts_home
from personalize.embedded import scenes
from personalize.errors import UserError
from personalize.models.stable_diffusion import EMBEDDED
from personalize.training.pretraining import dataset, networks, objectives, stages


@pytest.fixture(scope="module")
def tokenizer():
    return networks.build_tokenizer(dataset.vocabulary())


def script():
    return load_script(scripts_home() / "train" / "embedded_model.py")


def test_every_word_of_the_world_is_one_token(tokenizer):
    for seed in range(200):
        for caption in scenes.captions(scenes.random_scene(seed, styles=tuple(scenes.STYLES))):
            assert tokenizer.tokenize(caption) == [f"{word}</w>" for word in caption.split()]


def test_the_tokenizer_is_byte_level_and_small(tokenizer):
    assert len(tokenizer) <= 2000
    symbols = networks.byte_symbols()
    assert len(set(symbols)) == 256
    assert all(symbol in tokenizer.get_vocab() and f"{symbol}</w>" in tokenizer.get_vocab() for symbol in symbols)
    ids = tokenizer("zyzzyva ünïcode 猫 🐱").input_ids
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in ids[1:-1], "an unknown word must fall back to bytes, not to the end mark"


def test_the_unet_has_the_topology_of_sd1():
    with torch.device("meta"):
        unet = networks.build_unet()
    assert len(module_names(unet, "sd1")) == 216
    assert len(module_names(unet, "sd1", "attention")) == 104
    parameters = sum(parameter.numel() for parameter in unet.parameters())
    assert 16e6 < parameters < 18e6, "the weights must stay under 45 MB in fp16"


def test_the_autoencoder_works_at_every_size():
    vae = networks.build_autoencoder()
    for height, width in ((64, 64), (128, 96)):
        latents = vae.encode(torch.zeros(1, 3, height, width)).latent_dist.mean
        assert latents.shape == (1, 4, height // 4, width // 4)
        assert vae.decode(latents).sample.shape == (1, 3, height, width)


def test_the_held_out_style_is_never_trained_on(tmp_path):
    """Every sprite that reaches a training picture is hashed; none is of the held-out style."""
    held_out = {file_hash(path) for path in (scenes.SPRITES / scenes.HELD_OUT_STYLE).glob("*.webp")}
    assert len(held_out) == len(scenes.NOUNS)
    module = script()
    config = module.Config(output_dir=tmp_path)
    drawn = [scenes.random_scene(seed, nouns=config.nouns, styles=config.styles) for seed in range(300)]
    drawn += [scenes.random_scene(seed, styles=scenes.TRAINING_STYLES) for seed in range(300)]
    used = {file_hash(scenes.sprite_path(thing.noun, thing.style)) for scene in drawn for thing in scene.objects}
    assert len(used) > 100 and not used & held_out
    with pytest.raises(ValueError, match="held out"):
        module.main(module.Config(output_dir=tmp_path, styles=("3d", scenes.HELD_OUT_STYLE)))


def file_hash(path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def test_the_autoencoder_objective_is_what_its_docstring_says():
    torch.manual_seed(0)
    vae = networks.build_autoencoder()
    pixels, noise = torch.rand(2, 3, 32, 32) * 2 - 1, torch.randn(2, 4, 8, 8)
    terms = objectives.AutoencoderObjective(vae)({"pixels": pixels, "noise": noise})
    posterior = vae.encode(pixels).latent_dist
    decoded = vae.decode(posterior.mean + posterior.std * noise).sample
    expected = (decoded - pixels).pow(2).mean() + 0.25 * (decoded - pixels).abs().mean()
    expected = expected + objectives.KL_WEIGHT * posterior.kl().mean() / (4 * 8 * 8)
    torch.testing.assert_close(terms.total, expected, rtol=1e-5, atol=1e-7)  # fp32 sums in another order


def test_training_resumes_exactly(tmp_path, monkeypatch):
    """Four updates in one run equal two, an interruption, and two more from the checkpoint: bit for bit."""
    module = script()
    monkeypatch.setattr(networks, "build_autoencoder", tiny_autoencoder)
    whole, parts = (config(tmp_path / name) for name in ("whole", "parts"))
    module.main(whole)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dataset.Crops, "batch", interrupted(dataset.Crops.batch, at=2))
        module.main(parts)
    assert torch.load(parts.output_dir / "autoencoder.pt", weights_only=True)["update"] == 2
    module.main(parts)
    states = [torch.load(run.output_dir / "autoencoder.pt", weights_only=True)["objective"] for run in (whole, parts)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def config(output_dir):
    common = dict(stages=("autoencoder",), steps=(4, 1, 1), batch_sizes=(2, 2, 2), checkpointing_steps=1)
    return script().Config(output_dir=output_dir, mixed_precision="no", **common)


def interrupted(real, at: int):
    def batch(self, update, samples):
        if update == at:
            raise KeyboardInterrupt
        return real(self, update, samples)

    return batch


def tiny_autoencoder():
    return networks.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 4, 4), layers_per_block=1, norm_num_groups=2, mid_block_add_attention=False,
    )  # fmt: skip


def test_a_third_of_the_scenes_is_of_hard_nouns_with_as_many_pairs_among_them(tmp_path):
    trainer, hard = script(), ("rocket", "house", "guitar")
    scene_list = trainer.training_scenes(trainer.Config(tmp_path, pairs=0.6, hard_nouns=hard), 600)
    is_hard = [{thing.noun for thing in scene.objects} <= set(hard) for scene in scene_list]
    assert all(is_hard[2::3]) and 0.5 < np.mean([len(scene.objects) == 2 for scene in scene_list[2::3]]) < 0.7
    assert np.mean(is_hard) < 0.4 and np.mean([len(scene.objects) == 2 for scene in scene_list]) == 0.6
    without = trainer.training_scenes(trainer.Config(tmp_path, pairs=0.6), 600)
    assert [s for i, s in enumerate(scene_list) if i % 3 < 2] == [s for i, s in enumerate(without) if i % 3 < 2]


def test_the_share_of_varied_scenes_is_the_one_asked_for_and_changes_nothing_else(tmp_path):
    trainer = script()
    plain = trainer.training_scenes(trainer.Config(tmp_path, pairs=0.5), 600)
    found = trainer.training_scenes(trainer.Config(tmp_path, pairs=0.5, variety=0.4), 600)
    varied = np.array([all(thing.variation for thing in scene.objects) for scene in found])
    pairs = np.array([len(scene.objects) == 2 for scene in found])
    assert abs(varied.mean() - 0.4) < 0.08  # four standard deviations of 600 draws
    assert 0.3 < varied[pairs].mean() < 0.5 and 0.3 < varied[~pairs].mean() < 0.5, "pairs and single things alike"
    bare = [replace(s, objects=tuple(replace(thing, variation=None) for thing in s.objects)) for s in found]
    assert bare == plain


def test_the_learning_rate_rises_stays_and_falls_to_zero():
    rate = partial(stages.learning_rate_factor, updates=1000, warmup=100, decay=True)
    assert [rate(update) for update in (0, 99, 500, 800)] == [0.01, 1.0, 1.0, 1.0]
    assert rate(900) == pytest.approx(0.5) and rate(999) == pytest.approx(0.005) and rate(1000) == rate(1200) == 0
    assert stages.learning_rate_factor(999, updates=1000, warmup=100, decay=False) == 1


def test_a_stage_begins_with_the_weights_of_another_and_averages_only_its_last_part(tmp_path):
    """Weights w = 1, 2, 3 … after the updates of the second stage: until `update_after_step` the average is w."""
    parts = {"objective": nn.Linear(1, 1, bias=False)}
    parts["objective"].weight.data.fill_(7)
    first = stages.Stage(tmp_path, "first", 6, 1, 1)
    second = replace(first, name="second", begin_with=first.checkpoint)
    stages._save(first, 6, parts | {"ema": EMAModel(parts["objective"].parameters())})
    net = nn.Linear(1, 1, bias=False)
    average = EMAModel(net.parameters(), decay=0.5, use_ema_warmup=True, power=0.75, update_after_step=3)
    assert stages._restore(second, {"objective": net, "ema": average}) == 0 and net.weight.item() == 7
    followed = []
    for value in range(1, 7):
        net.weight.data.fill_(value)
        average.step(net.parameters())
        followed.append(average.shadow_params[0].item())
    # from the fifth update on the decay is min(0.5, 1 − 2^−¾ = 0.405), then 0.5
    assert followed[:4] == [1, 2, 3, 4] and followed[4] == pytest.approx(5 - 0.4054, abs=1e-3)
    assert followed[5] == pytest.approx((followed[4] + 6) / 2)


def test_scenes_for_the_autoencoder_are_pixels():
    pixels = torch.stack([dataset.Crops(64, seed=0)[sample] for sample in range(8)])
    assert pixels.shape == (8, 3, 64, 64) and pixels.min() >= -1 and pixels.max() <= 1
    assert np.unique(pixels.numpy()).size > 100


def test_a_pool_says_where_the_nouns_of_a_caption_are(tokenizer):
    things = [scenes.SceneObject(noun, "3d", x, 0.5, 0.3) for noun, x in (("owl", 0.7), ("coffee_cup", 0.2))]
    scene = scenes.Scene("snow", tuple(things))
    pool = dataset.LatentPool(torch.zeros(1, 4, 4, 4), torch.zeros(1, 2, 4, 4), (scene,), tokenizer, 0, 0.0)
    text = "a picture of a coffee cup on the left and an owl on the right in the snow"
    pieces = ["<start>", *text.split()]
    assert [pieces[position] for position in pool.noun_positions(text, scene)] == ["owl", "cup"]
    assert pool.noun_positions("", scene) == [0, 0] and pool.noun_positions("an owl", scene) == [2, 0]


def test_samples_depend_on_their_number_alone(tokenizer):
    """The same samples whether drawn in one batch or in two: what makes several processes and resuming equal."""
    scene_list = [scenes.random_scene(index) for index in range(4)]
    masks = torch.randint(256, (4, 2, 4, 4), dtype=torch.uint8)
    pool = dataset.LatentPool(torch.randn(4, 4, 4, 4), masks, tuple(scene_list), tokenizer, seed=0, caption_dropout=0.5)
    whole, parts = pool.batch(7, range(64)), [pool.batch(7, range(32)), pool.batch(9, range(32, 64))]
    for name in whole:
        assert torch.equal(whole[name], torch.cat([part[name] for part in parts]))
    empty = tokenizer("").input_ids
    dropped = (whole["input_ids"][:, : len(empty)] == torch.tensor(empty)).all(1).float().mean()
    assert 0.25 < dropped < 0.75  # half of 64 in expectation; four standard deviations either way


@pytest.mark.slow  # compiles a UNet, forwards and backwards
@pytest.mark.timeout(1800)
def test_gradients_of_a_compiled_unet_are_the_eager_ones() -> None:
    """Of every parameter, in two updates on other samples; keys' biases get rounding alone, softmax ignoring them.

    Compiled with its upsampler this UNet, whose blocks lie as the embedded model's do, fails (torch 2.13, CPU).
    """
    torch.manual_seed(0)
    blocks: dict[str, Any] = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "layers_per_block": 1, "norm_num_groups": 8,
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "block_out_channels": (16, 16), "mid_block_type": None,
    }  # fmt: skip
    unet = UNet2DConditionModel(sample_size=16, cross_attention_dim=128, attention_head_dim=8, **blocks)
    encoder = networks.build_text_encoder(networks.build_tokenizer(["a", "cat"]))
    objective = objectives.TextToImageObjective(unet, encoder, networks.build_scheduler(), grounding_weight=0.1)
    parameters = {name: p for name, p in objective.named_parameters() if not name.endswith("k_proj.bias")}

    def gradients(seed: int) -> dict[str, torch.Tensor]:
        draw = torch.Generator().manual_seed(seed)
        batch = {name: torch.randn(2, 4, 16, 16, generator=draw) for name in ("latents", "noise")}
        batch |= {"timesteps": torch.tensor([10 + seed, 500]), "masks": torch.rand(2, 2, 16, 16, generator=draw)}
        batch |= {"input_ids": torch.randint(0, 256, (2, 77), generator=draw), "nouns": torch.tensor([[2, 5], [3, 0]])}
        values = torch.autograd.grad(objective(batch).total, [*parameters.values()], allow_unused=True)
        return {name: value for name, value in zip(parameters, values, strict=True) if value is not None}

    eager = [gradients(seed) for seed in (1, 2)]
    script().compile_unet(unet)
    compiled = [gradients(seed) for seed in (1, 2)]
    for expected, value in zip(eager, compiled, strict=True):
        assert expected.keys() == value.keys() and len(expected) > 150
        apart = {name: float((value[name] - g).norm() / g.norm().clamp_min(1e-6)) for name, g in expected.items()}
        assert max(apart.values()) < 1e-3, max(apart, key=lambda name: apart[name])  # fp32 sums in another order


def test_shapes_are_taken_in_turn_and_each_batch_has_one():
    """Objects of a band lie where the masks say; the sides must survive three halvings of the latents."""
    tokenizer = networks.build_tokenizer(dataset.vocabulary())
    scene = scenes.random_scene(3, objects=2)
    vae = networks.build_autoencoder()
    pools = []
    for shape in ((64, 64), (96, 64)):
        latents, masks = dataset.encode_scenes([scene], shape, vae)
        assert latents.shape == (1, 4, shape[1] // 4, shape[0] // 4) and masks.shape[-2:] == latents.shape[-2:]
        assert (masks[0].flatten(1).amax(1) > 200).all()  # both objects lie in the band
        pools.append(dataset.LatentPool(latents, masks, (scene,), tokenizer, seed=0, caption_dropout=0.0))
    turn = dataset.PoolsInTurn(tuple(pools))
    assert [turn.batch(update, range(2))["noise"].shape[-1] for update in range(3)] == [16, 24, 16]


@pytest.mark.parametrize("shape", ["128", "128x100", "0x64", "-32x64", "axb"])
def test_a_shape_that_the_unet_cannot_halve_is_refused(shape):
    with pytest.raises(UserError, match="multiples of 32"):
        dataset.check_shapes(["128x128", shape])


def test_a_frozen_text_encoder_stays_to_the_bit_while_the_unet_learns(tmp_path):
    """One update of the stage itself, on from the model that ships."""
    module = script()
    module.main(module.Config(
        tmp_path, stages=("diffusion_64",), init_from=EMBEDDED, steps=(0, 1, 0), batch_sizes=(1, 1, 1),
        scene_pools=(2, 2), lr_warmup_steps=0, freeze_text_encoder=True, torch_compile=False, mixed_precision="no",
    ))  # fmt: skip
    learned = torch.load(tmp_path / "diffusion_64.pt", weights_only=True)["objective"]
    before = module.networks(EMBEDDED).state_dict()
    changed = {name.split(".")[0] for name, tensor in before.items() if not torch.equal(tensor, learned[name])}
    assert changed == {"unet"}
