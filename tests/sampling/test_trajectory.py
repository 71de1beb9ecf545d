"""Trajectories are kept whole, found again, and refused where they do not belong."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from personalize.adapters.adapter import Adapter
from personalize.errors import UserError
from personalize.models.stable_diffusion import StableDiffusion
from personalize.sampling.denoise import denoise
from personalize.sampling.inversion import invert
from personalize.sampling.trajectory import MANIFEST, TENSORS, Trajectory, fingerprint_hash, model_fingerprint
from tests.support.adapter_kinds import loha
from tests.support.lora_states import random_adapter
from tests.support.photos import SOURCE, gentle, shared, smooth


def made(model, method="direct", **more):
    return invert(model, smooth(), SOURCE, method, steps=2, **more)


@pytest.fixture
def asked(monkeypatch):
    """How often the network was asked."""
    seen, keep = [], StableDiffusion.predict
    monkeypatch.setattr(StableDiffusion, "predict", lambda self, *words: seen.append(1) or keep(self, *words))
    return seen


@pytest.mark.parametrize(("name", "method"), [("sdxl", "negative"), ("sd1", "ddpm")])
def test_what_is_saved_is_what_is_read(tmp_path, name, method):
    model = shared(name)
    found = made(model, method)
    assert found.save(tmp_path / "kept") == tmp_path / "kept"
    again = Trajectory.load(tmp_path / "kept")
    assert torch.equal(again.latents, found.latents) and again.about == found.about and again.key == found.key
    assert torch.equal(again.null.embeds, found.null.embeds)
    if method == "ddpm":
        assert torch.equal(again.noise, found.noise)
    else:
        assert torch.equal(again.conditioning.time_ids, found.conditioning.time_ids)
    assert torch.equal(again.replay(model), found.replay(model))
    again.check(model)


@pytest.mark.parametrize("method", ["direct", "ddpm"])
def test_guidance_below_one_is_off_after_every_inversion(method):
    """After ddpm, whose source row has a scale of its own, 0 left the target's prompt out and asked the null one."""
    model = shared()
    found, target = made(model, method), model.prompts(["a red dog on the beach"], (32, 32))

    def sampled(scale):
        edit = found.edit(target, guidance_scale=scale)
        return denoise(model, found.start(2), edit, found.schedule(model))

    torch.testing.assert_close(sampled(0.0), sampled(1.0), rtol=0, atol=1e-6)
    assert not torch.allclose(sampled(1.0)[1], sampled(1.0)[0], atol=1e-3), "the prompt counts"


def test_it_is_found_again_by_its_content(tmp_path, asked):
    model = shared()
    first = made(model, cache=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [first.key[:16]]
    count = len(asked)
    assert torch.equal(made(model, cache=tmp_path).latents, first.latents) and len(asked) == count
    others = [
        invert(model, smooth() * 0.9, SOURCE, steps=2, cache=tmp_path),
        invert(model, smooth(), "a dog", steps=2, cache=tmp_path),
        invert(model, smooth(), SOURCE, steps=3, cache=tmp_path),
        made(model, "ddim", cache=tmp_path),
        made(model, "ddpm", cache=tmp_path),
        made(model, "ddpm", cache=tmp_path, seed=1),
        made(model, "direct", cache=tmp_path, strength=0.5),
    ]
    assert len({first.key, *(one.key for one in others)}) == len(list(tmp_path.iterdir())) == 8


def test_an_adapter_makes_another_trajectory(tmp_path):
    model = gentle()
    plain = made(model, folder=tmp_path / "kept")
    with random_adapter(model).apply(model):
        now = model_fingerprint(model)
        assert now["base"] == plain.about["base"] and now["adapter"] is not None
        with pytest.raises(UserError, match="made with another adapter"):
            made(model, folder=tmp_path / "kept")
        learned = made(model)
        assert not torch.equal(learned.latents, plain.latents)
    with pytest.raises(UserError, match="another adapter"):
        learned.check(model)


def test_changes_that_are_no_lora_make_another_trajectory_and_leave_the_base_what_it_is(tmp_path):
    """LoHa is written into the weights: its trajectory was taken for that of the plain base, and the reverse."""
    model = gentle()
    base = model.identity
    save_file(loha().tensors, tmp_path / "loha.safetensors")
    adapter = Adapter.load(tmp_path / "loha.safetensors")
    plain = made(model)
    with adapter.apply(model, any_base=True):
        assert model.identity == base and model_fingerprint(model)["adapter"] is not None
        with pytest.raises(UserError, match="made with another adapter"):
            plain.check(model)
    other = gentle()
    with adapter.apply(other, any_base=True):  # the first hash is asked for while the weights are changed
        assert other.identity == base
    assert made(model).key == plain.key and other.identity == model.identity == base


def another_spacing():
    model = gentle()
    model.scheduler = type(model.scheduler).from_config(model.scheduler.config, timestep_spacing="trailing")
    return model


def another_autoencoder():
    model = gentle()
    with torch.no_grad():
        model.vae.encoder.conv_in.weight.mul_(1.1)
    return model


def another_schedule():
    model = gentle()
    model.alphas_cumprod = model.alphas_cumprod**2
    return model


@pytest.mark.parametrize(
    ("model", "arguments", "says"),
    [
        (lambda: shared("sd2v"), {}, "made with another base model"),
        (another_schedule, {}, "made with another noise schedule"),
        (another_spacing, {}, "made with another noise schedule"),
        (another_autoencoder, {}, "made with another autoencoder"),
        (shared, {"prompt": "a dog"}, r'another prompt \("a red cat on the beach", now "a dog"\)'),
        (shared, {"image": smooth() * 0.5}, "another image"),
        (shared, {"steps": 3}, r"another steps \(2, now 3\)"),
        (shared, {"method": "negative"}, r'another method \("direct", now "negative"\)'),
    ],
)
def test_what_belongs_to_something_else_is_refused(tmp_path, model, arguments, says):
    kept = made(shared(), folder=tmp_path / "kept")
    asked = {"image": smooth(), "prompt": SOURCE, "steps": 2, "method": "direct"} | arguments
    before = (tmp_path / "kept" / TENSORS).read_bytes()
    with pytest.raises(UserError, match=says) as caught:
        invert(model(), folder=tmp_path / "kept", **asked)
    assert "\n" not in str(caught.value) and "invert the picture again" in str(caught.value)
    assert (tmp_path / "kept" / TENSORS).read_bytes() == before
    if not arguments:
        with pytest.raises(UserError, match=says):
            kept.check(model())


def test_damage_is_one_sentence(tmp_path):
    folder = made(shared()).save(tmp_path / "kept")
    manifest = json.loads((folder / MANIFEST).read_text())
    with pytest.raises(UserError, match="holds no trajectory"):
        Trajectory.load(tmp_path)
    (folder / MANIFEST).write_text(json.dumps(manifest | {"schema": 99}))
    with pytest.raises(UserError, match="another version"):
        Trajectory.load(folder)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    content = bytearray((folder / TENSORS).read_bytes())
    content[-1] ^= 1
    (folder / TENSORS).write_bytes(content)
    with pytest.raises(UserError, match="is not what was saved"):
        Trajectory.load(folder)


def test_the_key_does_not_depend_on_where_the_base_lies():
    about = dict(made(shared()).about)
    renamed, other = about | {"name": "elsewhere"}, about | {"steps": 4}
    assert fingerprint_hash(about) == fingerprint_hash(renamed) != fingerprint_hash(other)
