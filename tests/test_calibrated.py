"""Which settings suit which base."""

from __future__ import annotations

from personalize.calibrated import EMBEDDED, drawing, guidance, suited
from personalize.dynamic_prompts import DynamicSettings
from personalize.null_text import NullText


def test_other_bases_have_the_published_settings():
    assert suited(DynamicSettings, "stable-diffusion-v1-5") == DynamicSettings()
    assert suited(NullText, "") == NullText()
    assert [guidance("stable-diffusion-v1-5", method) for method in ("direct", "ddpm")] == [7.5, 15]


def test_the_packages_model_has_calibrated_ones_and_what_is_given_wins():
    assert suited(NullText, "embedded") == NullText(rate=0.1)
    assert guidance("embedded", "direct") == 4 and guidance("embedded", "ddpm") == 6
    assert drawing("embedded") == 4 and drawing("stable-diffusion-v1-5") == drawing("") == 7.5
    found = suited(DynamicSettings, "embedded", updates=7, balancing=None, words_only=True)
    assert found == DynamicSettings(**{**EMBEDDED[DynamicSettings], "updates": 7, "words_only": True})
