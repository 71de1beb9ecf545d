"""Nouns of a photo, surveyed and made dynamic; edits with them and with uniform maps, whole, on tiny bases."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image

from personalize.editing.config import DynamicSettings, UniformSettings
from personalize.editing.defaults import settings_for
from personalize.editing.dynamic_prompt_learning import stored_fit
from personalize.editing.dynamic_prompt_learning.leakage import (
    NounRegions,
    mean_noun_maps,
    record_maps,
    report_attention,
)
from personalize.editing.dynamic_prompt_learning.stored_fit import fit_dynamic_prompt
from personalize.editing.photo_settings import PhotoSettings
from personalize.editing.real_image import edit_photo, report_photo
from personalize.editing.real_image_settings import EditRequest
from personalize.errors import UserError
from personalize.io.images import to_image
from personalize.models.image_processor import PaddedImage
from personalize.sampling.config import NullTextSettings
from personalize.sampling.inversion import invert
from tests.support.lora_states import random_adapter
from tests.support.tiny import NAMES, tiny, tiny_sd1

SOURCE, TARGET = "a cat and a dog", "a fox and a dog"
FEW = DynamicSettings(updates=1, rate=1e-2)


@cache
def photo() -> Image.Image:
    return to_image(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1)


def half() -> Image.Image:
    """White on the left half."""
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    return mask


def settings(**more) -> PhotoSettings:
    return PhotoSettings(steps=2, **more)


def surveyed(model, things: NounRegions | None = None, method: str = "direct"):
    things = things or NounRegions(background=half())
    frame = PaddedImage.of(model, photo())
    trajectory = invert(model, frame.pixels, SOURCE, method, steps=2)
    return frame, trajectory, report_attention(model, frame, trajectory, SOURCE, things)


def test_dpl_c02_users_masks_and_boxes_override():
    model = tiny_sd1()
    frame, trajectory, found = surveyed(model)
    assert found.background.shape == (16, 16) and found.background[:, :8].all() and not found.background[:, 8:].any()
    regions = NounRegions(regions={"cat": half(), "Dog": (32, 0, 64, 64)})
    found = report_attention(model, frame, trajectory, SOURCE, regions)
    assert found.background.shape == (2, 16, 16)
    assert torch.equal(found.background[0], ~found.background[1]) and not found.background[0, :, :8].any()
    assert report_attention(model, frame, trajectory, SOURCE, NounRegions(background="none")).background is None
    synonyms = NounRegions(("cat=dog",), regions={"cat": half(), "dog": (32, 0, 64, 32)})  # the first was forgotten
    found = report_attention(model, frame, trajectory, SOURCE, synonyms)
    assert not found.background[0, :, :8].any() and not found.background[0, :8].any()
    assert found.background[0, 8:, 8:].all()
    for wrong, words in (
        ({"fox": half()}, "none of the nouns"),
        ({"cat": (0, 0, 99, 9)}, "does not lie in the picture"),
    ):
        with pytest.raises(UserError, match=words):
            report_attention(model, frame, trajectory, SOURCE, NounRegions(regions=wrong))


def test_dpl_c02_a_kept_trajectory_gives_the_same_report_fit_and_picture(tmp_path):
    """To the bit: the second run reads both folders and writes none."""
    model, request = tiny_sd1(), EditRequest(TARGET)
    once, again = (edit_photo(model, photo(), SOURCE, request, settings(dynamic=FEW), cache=tmp_path) for _ in range(2))
    assert len(list(tmp_path.iterdir())) == 2, "one trajectory and one dynamic prompt"
    assert torch.equal(once.latents, again.latents)
    _, trajectory, found = surveyed(model)
    maps = record_maps(model, trajectory)
    assert torch.equal(maps.cross_attention().flip(0), found.attention)
    assert maps.self_attention().shape == (16, 16, 256)
    plain = mean_noun_maps(model, trajectory, found.groups, [trajectory.conditioning] * 2)
    torch.testing.assert_close(plain, found.maps, rtol=0, atol=1e-6)  # another order of the sums


def test_the_balancing_limit_of_the_embedded_model_is_used_by_report_and_fit():
    """Published, 0.04 at the last step, its nouns would always be "likely to need" dynamic prompts."""
    found = surveyed(tiny_sd1())[2]
    shares = torch.zeros(3, 16, 16, 77)
    shares[:, 2:8, 10:14, found.groups[0].positions[0]] = 0.048  # e^4.8 against 74 others: 0.62, smoothed 0.6
    shares[:, 9:14, 10:14, found.groups[1].positions[0]] = 0.048
    for limit, needed in ((None, True), (0.8, False)):
        assert replace(found, attention=shares, balancing_limit=limit).needed is needed
    assert settings_for(DynamicSettings, "embedded").balancing_limit == 0.8
    assert settings_for(DynamicSettings, "other").balancing_limit is None


def test_with_negative_prompt_inversion_the_null_row_is_dynamic_too():
    """Guidance cancels in the source row, so that it is the same at every scale; a static null row gave 27 to 23 dB."""
    model, request = tiny_sd1(), EditRequest(TARGET, regions=NounRegions(background="none"))
    rows = [
        edit_photo(
            model, photo(), SOURCE, request, settings(inversion="negative", dynamic=FEW, guidance_scale=scale)
        ).latents[0]
        for scale in (1.0, 2.0, 7.5)
    ]
    for row in rows[1:]:
        torch.testing.assert_close(row, rows[0], rtol=0, atol=1e-3)  # 7.5 times the rounding of a difference


def test_dpl_c06_report_says_beforehand_whether_it_is_needed():
    model = tiny_sd1()
    found, sheet = report_photo(model, photo(), SOURCE, NounRegions(background=half()), settings())
    assert sheet.width > 100 and set(found.exceeded()) == {"balancing", "disjoint", "background"}
    text = "\n".join(found.sentences())
    assert "cat, dog" in text and found.needed and "likely to help" in text  # random maps are nearly uniform
    clean = torch.zeros(3, 16, 16, 77)
    clean[:, 2:8, 10:14, found.groups[0].positions[0]] = 1
    clean[:, 9:14, 10:14, found.groups[1].positions[0]] = 1
    good = replace(found, attention=clean)
    assert not good.needed and "not needed" in good.sentences()[-1]
    assert "unknown" in "\n".join(replace(good, background=None).sentences())


@pytest.mark.parametrize("name", NAMES)
def test_dpl_c72_on_the_trajectory_it_costs_no_null_text(name: str):
    """§7.2: at most 63 units a step beside the inversion, a backward pass counted as two."""
    model = tiny(name)
    _, trajectory, found = surveyed(model, NounRegions(background="none"))
    size = (64, 64)
    rows, same = fit_dynamic_prompt(model, trajectory, SOURCE, found, FEW, size=size)
    assert same is trajectory and rows.forward_passes + 2 * rows.backward_passes <= 2 * 3 * FEW.updates
    full = DynamicSettings()
    assert 50 + 50 * 3 * full.updates == 3200
    conditioning = rows.conditionings(model, [SOURCE], size)
    after = mean_noun_maps(model, trajectory, found.groups, conditioning)
    before = mean_noun_maps(model, trajectory, found.groups, [trajectory.conditioning] * 2)
    assert after.shape == found.maps.shape and not torch.equal(after, before)


def test_dpl_c72_the_rows_change_the_edit_and_not_the_pinned_source():
    model, request = tiny_sd1(), EditRequest(TARGET, regions=NounRegions(background="none"))
    plain, dynamic = (edit_photo(model, photo(), SOURCE, request, settings(dynamic=choice)) for choice in (None, FEW))
    assert not torch.equal(plain.latents[1], dynamic.latents[1])
    assert torch.equal(plain.latents[0], dynamic.latents[0])


def test_dpl_c72_beside_null_text_both_are_fitted_at_each_step():
    model = tiny_sd1()
    few = NullTextSettings(iterations=1)
    request = EditRequest(TARGET, regions=NounRegions(background="none"))
    found = edit_photo(model, photo(), SOURCE, request, settings(inversion="null-text", null_text=few, dynamic=FEW))
    assert found.trajectory.method == "null-text" and len(found.trajectory.null) == 2
    assert not torch.equal(found.trajectory.null.embeds[0], found.trajectory.null.embeds[1])
    other = edit_photo(model, photo(), SOURCE, request, settings(inversion="null-text", null_text=few))
    assert not torch.equal(found.latents, other.latents)


def test_what_was_found_is_kept_and_read_back(tmp_path, monkeypatch):
    model = tiny_sd1()
    _, trajectory, found = surveyed(model, method="ddim")
    few = NullTextSettings(iterations=1)
    once = fit_dynamic_prompt(model, trajectory, SOURCE, found, FEW, null_text=few, cache=tmp_path)
    monkeypatch.setattr(stored_fit, "DynamicFit", None)  # nothing is fitted again
    again = fit_dynamic_prompt(model, trajectory, SOURCE, found, FEW, null_text=few, cache=tmp_path)
    assert all(
        torch.equal(*pair) for a, b in zip(once[0].rows, again[0].rows, strict=True) for pair in zip(a, b, strict=True)
    )
    assert torch.equal(once[1].null.embeds, again[1].null.embeds) and again[1].method == "null-text"
    assert once[0].first_losses == again[0].first_losses
    place = next(tmp_path.iterdir())
    (place / "dynamic.safetensors").write_bytes((place / "dynamic.safetensors").read_bytes()[:-4] + b"\1\1\1\1")
    with pytest.raises(UserError, match="damaged"):
        fit_dynamic_prompt(model, trajectory, SOURCE, found, FEW, null_text=few, cache=tmp_path)
    monkeypatch.undo()
    other = replace(FEW, disjoint=0.1)
    fit_dynamic_prompt(model, trajectory, SOURCE, found, other, null_text=few, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_fit_on_the_direct_trajectory_serves_every_guidance(tmp_path):
    model = tiny_sd1()
    _, trajectory, found = surveyed(model)
    for scale in (7.5, 5.0):
        fit_dynamic_prompt(model, trajectory, SOURCE, found, FEW, guidance_scale=scale, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_uniform_u12_outside_the_region_strict_is_the_photo_to_the_bit():
    """With quantile 1 at the last step, the only one blended, nothing counts as edited.

    Companion: without `strict` hardly a pixel is the photo's, for the autoencoder blurs all.
    """
    model = tiny_sd1()
    uniform = UniformSettings(until=0.3, quantile=1.0)
    for strict in (True, False):
        found = edit_photo(model, photo(), SOURCE, EditRequest(TARGET, strict=strict), settings(uniform=uniform))
        equal = int((np.asarray(found.image) == np.asarray(photo())).all(-1).sum())
        assert found.masks is not None and found.untouched == ((64 * 64,) if strict else ())
        assert equal == 64 * 64 if strict else equal < 64 * 64 / 10


@pytest.mark.parametrize(
    ("controller", "inversion"), [("p2p", "ddim"), pytest.param("mutual", "direct", marks=pytest.mark.slow)]
)
def test_uniform_maps_go_with_both_controllers(controller: str, inversion: str):
    model = tiny_sd1()
    processors = dict(model.unet.attn_processors)
    settings_without = settings(controller=controller, inversion=inversion)
    plain = edit_photo(model, photo(), SOURCE, EditRequest(TARGET), settings_without)
    uniform = UniformSettings(until=0.5, blend_source=controller == "mutual")
    chosen = settings(controller=controller, inversion=inversion, uniform=uniform)
    found = edit_photo(model, photo(), SOURCE, EditRequest(TARGET), chosen)
    assert not torch.equal(plain.latents[1], found.latents[1]) and found.latents.isfinite().all()
    assert all(model.unet.attn_processors[name] is processor for name, processor in processors.items())


def test_everything_at_once_with_an_adapter(tmp_path):
    """A LoRA and a learned token that is itself the dynamic noun."""
    model = tiny_sd1()
    rows = {"text_encoder": torch.ones(1, model.text_encoders[0].config.hidden_size)}
    adapter = replace(random_adapter(model), concepts={"<cat1>": rows})
    found = edit_photo(
        model, photo(), "a <cat1> and a dog",
        EditRequest(swaps=[("dog", "fox")], regions=NounRegions(("<cat1>",), "none")),
        settings(dynamic=FEW, uniform=UniformSettings(until=0.5)), adapter=adapter, attention=True, cache=tmp_path,
    )  # fmt: skip
    assert found.nouns is not None and found.masks is not None and found.attention is not None
    assert found.targets == ("a <cat1> and a fox",) and found.latents.isfinite().all()
    assert not torch.equal(found.latents[0], found.latents[1])
    assert "<cat1>" not in model.tokenizers[0].get_vocab()  # the token is gone again


def test_what_does_not_go_together_is_refused(monkeypatch):
    model = tiny_sd1()
    monkeypatch.setattr("personalize.editing.prepared_photo.invert", None)  # before anything is inverted
    with pytest.raises(UserError, match="no source prompt"):
        settings(controller="mutual", dynamic=FEW)
    with pytest.raises(UserError, match="belong to the controller p2p"):
        edit_photo(model, photo(), SOURCE, EditRequest(TARGET, weights={"dog": 2}), settings(controller="mutual"))
    with pytest.raises(UserError, match="no step is below"):
        edit_photo(model, photo(), SOURCE, EditRequest(TARGET), settings(uniform=UniformSettings(until=0.0)))


def test_wrong_nouns_and_masks_are_found_before_anything_is_inverted(monkeypatch):
    model = tiny_sd1()
    monkeypatch.setattr("personalize.editing.prepared_photo.invert", None)
    with pytest.raises(UserError, match="did you mean dog"):
        edit_photo(model, photo(), SOURCE, EditRequest(TARGET, regions=NounRegions(("dogg",))), settings(dynamic=FEW))
    monkeypatch.setattr("personalize.editing.real_image.invert", None)
    for regions, says in (
        (NounRegions(regions={"cat": (50, 50, 90, 60)}), "does not lie in the picture"),
        (NounRegions(regions={"fish": half()}), "a region for 'fish', which is none of the nouns"),
        (NounRegions(regions={"cat": Image.new("L", (32, 32), 255)}), "32×32"),
        (NounRegions(background=Image.new("L", (32, 32), 255)), "32×32"),
    ):
        with pytest.raises(UserError, match=says):
            edit_photo(model, photo(), SOURCE, EditRequest(TARGET, regions=regions), settings(dynamic=FEW))
        with pytest.raises(UserError, match=says):
            report_photo(model, photo(), SOURCE, regions, settings())
    with pytest.raises(UserError, match="the mask is 32×32 px"):
        request = EditRequest(TARGET, mask=Image.new("L", (32, 32), 255))
        edit_photo(model, photo(), SOURCE, request, settings(uniform=UniformSettings()))
