"""Which settings suit which base."""

from __future__ import annotations

from personalize.editing.config import DynamicSettings
from personalize.editing.defaults import EMBEDDED, guidance, settings_for, text_to_image_guidance
from personalize.editing.photo_settings import PhotoSettings
from personalize.sampling.config import NullTextSettings


def test_other_bases_have_the_published_settings():
    assert settings_for(DynamicSettings, "stable-diffusion-v1-5") == DynamicSettings()
    assert settings_for(NullTextSettings, "") == NullTextSettings()
    assert [guidance("stable-diffusion-v1-5", method) for method in ("direct", "ddpm")] == [7.5, 15]


def test_the_packages_model_has_calibrated_ones_and_what_is_given_wins():
    assert settings_for(NullTextSettings, "embedded") == NullTextSettings(rate=0.1)
    assert guidance("embedded", "direct") == 4 and guidance("embedded", "ddpm") == 6
    assert text_to_image_guidance("embedded") == 4
    assert text_to_image_guidance("stable-diffusion-v1-5") == text_to_image_guidance("") == 7.5
    found = settings_for(DynamicSettings, "embedded", updates=7, balancing=None, words_only=True)
    assert found == DynamicSettings(**{**EMBEDDED[DynamicSettings], "updates": 7, "words_only": True})


def test_resolved_settings_say_what_is_used_and_keep_what_is_given():
    found = PhotoSettings("ddpm").resolved("embedded", 128)
    assert (found.guidance_scale, found.strength, found.resolution) == (6.0, 0.64, 128)
    assert found.null_text == NullTextSettings(rate=0.1)
    given = PhotoSettings(guidance_scale=3.0, strength=0.5, resolution=96, null_text=NullTextSettings())
    assert given.resolved("embedded", 128) == given
