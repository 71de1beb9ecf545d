"""The drag as a whole, on random weights: what it asks of the model, leaves behind, keeps and refuses."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from personalize.editing.drag import drag as room
from personalize.editing.drag.attention import KeyValueInjection, QKVRecorder, self_attention_sites
from personalize.editing.drag.config import DragSettings
from personalize.editing.drag.drag import drag
from personalize.editing.drag.mask import dilated
from personalize.errors import UserError
from personalize.models.attention import attention_sites
from personalize.sampling.denoise import Edit, denoise, denoise_with_history
from personalize.sampling.schedule import make_schedule
from tests.support.tiny import NAMES, tiny, tiny_sd1

SETTINGS = DragSettings(method="latents", steps=3, strength=0.7)  # two steps up, two down
SIZE = (16, 16)
HANDLE, TARGET = (5.5, 6.5), (9.5, 7.5)  # four cells right, one down


def latents(seed=0):
    return torch.randn(1, 4, *SIZE, generator=torch.Generator().manual_seed(seed))


def block():
    """A user's mask around the handle: rows 5–8, columns 4–7."""
    mask = torch.zeros(SIZE, dtype=torch.bool)
    mask[5:9, 4:8] = True
    return mask


def conditioning_of(model):
    return model.prompts(["a cat"], (64, 64))


def dragged(model, settings=SETTINGS, *, mask=None, handles=(HANDLE,), targets=(TARGET,)):
    return drag(model, latents(), conditioning_of(model), handles, targets, settings, mask)


@pytest.mark.parametrize("name", NAMES)
def test_every_family_can_be_dragged(name):
    found = dragged(tiny(name), mask=block())
    assert found.latents.shape == (1, 4, *SIZE) and found.latents.isfinite().all()
    assert torch.equal(found.mask, block()) and found.thresholds == ()
    assert torch.equal(found.void, block())  # four cells right, one down: nothing of the block is covered again
    assert (found.source[6:10, 8:12] == torch.arange(256).view(SIZE)[5:9, 4:8]).all()


def test_attentiondrag_d4_a_drag_of_length_zero_is_inversion_and_sampling_with_its_keys_and_values():
    """1e-6 is asked; the same operations in the same order are equal to the bit."""
    model = tiny_sd1()
    settings = replace(SETTINGS, protect=False)
    found = dragged(model, settings, mask=block(), targets=(HANDLE,))
    sites = self_attention_sites(attention_sites(model.unet, SIZE), ("up",), None)
    carrying = QKVRecorder([site.name for site in sites], "kv")
    plain = Edit(conditioning_of(model), guidance_scale=1)
    noisy = denoise(
        model, latents(), replace(plain, hooks=(carrying,)), make_schedule(model, 3, strength=0.7, inverse=True)
    )
    again = denoise(
        model, noisy, replace(plain, hooks=(KeyValueInjection(carrying.kept),)), make_schedule(model, 3, strength=0.7)
    )
    torch.testing.assert_close(found.latents, again, atol=1e-6, rtol=0)
    assert not found.void.any()


@pytest.mark.parametrize("fill", ["attention", "attention_raw", "bnni"])
@pytest.mark.parametrize("mode", ["move", "deform"])
def test_attentiondrag_d6_nothing_is_left_empty(fill, mode, monkeypatch):
    """The latents at which sampling starts have contents everywhere."""
    starts, model = [], tiny_sd1()
    monkeypatch.setattr(
        room, "denoise", lambda model, start, *rest: starts.append(start) or denoise(model, start, *rest)
    )
    found = dragged(model, replace(SETTINGS, fill=fill, mode=mode, kv="off"), mask=block())
    cells = starts[0][0].abs().sum(0)
    assert found.void.any() and (cells > 0).all() and cells.isfinite().all()


def test_attentiondrag_d7_buffers_are_released_and_processors_restored(monkeypatch):
    model, alive, counts = tiny_sd1(), [], []
    before = dict(model.unet.attn_processors)

    class Watched(QKVRecorder):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            alive.append(weakref.ref(self))

    class Counted(KeyValueInjection):
        def __init__(self, kept, *args):
            super().__init__(kept, *args)
            counts.append(len(kept))
            alive.append(weakref.ref(next(iter(kept.values()))[0]))

    monkeypatch.setattr(room, "QKVRecorder", Watched)
    monkeypatch.setattr(room, "KeyValueInjection", Counted)
    found = dragged(model, mask=block())
    gc.collect()
    assert counts == [9 * 2] and len(alive) == 3 and all(reference() is None for reference in alive)
    after = model.unet.attn_processors
    assert all(after[name] is processor for name, processor in before.items()) and found is not None


def test_attentiondrag_d8_same_seed_same_output_and_the_model_is_as_before():
    model, drawn = tiny_sd1(), replace(SETTINGS, fill="attention")  # the fill that draws something
    before = {name: tensor.clone() for name, tensor in model.unet.state_dict().items()}
    first, second = (dragged(model, drawn, mask=block()).latents for _ in range(2))
    other = dragged(model, replace(drawn, seed=7), mask=block())
    assert torch.equal(first, second) and (first - other.latents).abs().max() > 1e-3
    state = model.unet.state_dict()
    assert list(state) == list(before) and all(torch.equal(state[name], before[name]) for name in before)


def test_a_drag_is_inversion_and_sampling_steps_without_gradients(monkeypatch):
    """Even where the caller has them switched on and the weights ask for them."""
    model, asked = tiny_sd1(), []
    model.unet.requires_grad_(True)
    predict = type(model).predict

    def counted(self, latents, timestep, conditioning):
        asked.append((int(timestep), torch.is_grad_enabled()))
        return predict(self, latents, timestep, conditioning)

    def forbidden(*args, **kwargs):
        raise AssertionError("a gradient was asked for")

    monkeypatch.setattr(type(model), "predict", counted)
    monkeypatch.setattr(torch.autograd, "backward", forbidden)
    monkeypatch.setattr(torch.autograd, "grad", forbidden)
    with torch.enable_grad():
        found = dragged(model)
    assert asked == [(1, False), (334, False), (334, False), (1, False)]
    assert not found.latents.requires_grad


def test_outside_the_region_the_latents_are_the_pictures_own():
    model = tiny_sd1()
    found = dragged(model, mask=block())
    reach = block()
    reach[6:10, 8:12] = True
    assert torch.equal(found.region, dilated(reach, 2))
    assert torch.equal(found.latents[..., ~found.region], latents()[..., ~found.region])
    free = dragged(model, replace(SETTINGS, protect=False), mask=block())
    assert (free.latents - latents())[..., ~found.region].abs().max() > 1e-3


def test_the_automatic_mask_holds_the_handle_in_one_part_of_limited_size():
    found = dragged(tiny_sd1())
    assert found.mask[6, 5] and len(found.thresholds) == 1
    assert 9 <= found.mask.sum() <= 0.4 * 256 and found.ratios.shape == (1, *SIZE) and found.ratios[0, 6, 5] == 1


def test_attentiondrag_d5_a_users_mask_replaces_or_narrows_the_automatic_one():
    model = tiny_sd1()
    own = dragged(model).mask
    wide = torch.zeros(SIZE, dtype=torch.bool)
    wide[:, :8] = True
    assert torch.equal(dragged(model, mask=wide).mask, wide)
    narrowed = dragged(model, replace(SETTINGS, user_mask="intersect"), mask=wide)
    assert torch.equal(narrowed.mask, own & wide) and narrowed.thresholds


def test_padding_does_not_move():
    model, visible = tiny_sd1(), torch.zeros(SIZE, dtype=torch.bool)
    visible[:, :7] = True
    found = drag(model, latents(), conditioning_of(model), [HANDLE], [TARGET], SETTINGS, block(), visible)
    assert torch.equal(found.mask, block() & visible)


@pytest.mark.parametrize(
    "change",
    [{"mode": "deform", "displacement": "stretch"}, {"fill": "attention_raw"}, {"fill": "attention"},
     {"fill": "attention", "fill_noise": "source"}, {"fill": "attention", "top_k": 1}, {"kv": "off"}, {"kv": "concat"},
     {"kv_start": 1}, {"kv_levels": (0,)}, {"protect": False}, {"margin": 0}, {"strength": 1.0}],
    ids=str,
)  # fmt: skip
def test_every_parameter_does_something(change, usual):
    found = dragged(usual[0], replace(SETTINGS, **change), mask=block())
    assert found.latents.isfinite().all() and (found.latents - usual[1]).abs().max() > 1e-4


@pytest.fixture(scope="module")
def usual():
    model = tiny_sd1()
    return model, dragged(model, mask=block()).latents


def test_what_reads_attention_decides_the_ratios():
    model = tiny_sd1()
    usual = dragged(model, mask=block()).ratios
    for change in ({"map_places": ("down",)}, {"map_levels": (1,)}, {"map_timesteps": (300, 400)}, {"window": 1}):
        assert (dragged(model, replace(SETTINGS, **change), mask=block()).ratios - usual).abs().max() > 1e-4


def test_several_handles():
    far = block().roll(7, 1)  # columns 11–14
    handles, targets = [HANDLE, (12.5, 6.5)], [(5.5, 3.5), (12.5, 9.5)]
    found = dragged(tiny_sd1(), mask=block() | far, handles=handles, targets=targets)
    numbers = torch.arange(256).view(SIZE)
    assert torch.equal(found.source[2:6, 4:8], numbers[5:9, 4:8])
    assert torch.equal(found.source[8:12, 11:15], numbers[5:9, 11:15])
    assert found.ratios.shape[0] == len(found.arrived) == 2


def test_the_fill_splits_noise_from_picture_as_inversion_joined_them():
    """z_T = √ᾱ x̂0 + √(1−ᾱ) ε̂ of inversion's last move, so no further prediction is needed. 1e-5: fp32."""
    model = tiny_sd1()
    plan = make_schedule(model, 3, strength=0.7, inverse=True)
    run = denoise_with_history(model, latents(), Edit(conditioning_of(model), guidance_scale=1), plan)
    last = plan.steps[-1]
    output = model.predict(run.latents[-2], last.timestep, conditioning_of(model))
    _, eps = model.split(output, run.latents[-2], last.alpha)
    joined = last.alpha_next**0.5 * run.clean[-1] + (1 - last.alpha_next) ** 0.5 * eps.detach()
    torch.testing.assert_close(run.latents[-1], joined, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "shift"}, "mode is 'shift': choose one of move, deform"),
        ({"fill": "zeros"}, "choose one of clone, smooth, bnni, attention, attention_raw"),
        ({"strength": 0.0}, "strength is 0.0: give a fraction above 0"),
        ({"window": 2}, "window is 2"),
        ({"mask_threshold": 1.5}, "mask_threshold is 1.5"),
    ],
)
def test_settings_out_of_range_are_refused_at_once(change, message):
    with pytest.raises(UserError, match=message):
        DragSettings(**change)


def test_drags_that_cannot_be_done_say_why():
    model = tiny_sd1()
    everything = torch.ones(SIZE, dtype=torch.bool)
    with pytest.raises(UserError, match="mask is empty"):
        dragged(model, mask=~everything)
    with pytest.raises(UserError, match="covers the whole picture"):
        dragged(model, mask=everything)
    with pytest.raises(UserError, match="no self-attention at places .'up',., levels .7,."):
        dragged(model, replace(SETTINGS, map_levels=(7,)))
    with pytest.raises(UserError, match="no self-attention at levels"):
        dragged(model, replace(SETTINGS, kv_levels=(7,)))
    with pytest.raises(UserError, match="no step has a timestep in 700 to 800.*the steps are 1, 334"):
        dragged(model, replace(SETTINGS, map_timesteps=(700, 800)))
