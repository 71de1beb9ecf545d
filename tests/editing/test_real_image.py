"""A photo edited by text, from picture to picture."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from personalize.adapters.adapter import Adapter
from personalize.adapters.apply import applied
from personalize.editing.editor import Editor
from personalize.editing.real_image import edit_photo
from personalize.editing.real_image_settings import EditRequest, PhotoSettings
from personalize.errors import UserError
from personalize.models.image_processor import PaddedImage
from personalize.sampling.null_text import NullTextSettings
from tests.support.lora_states import random_adapter
from tests.support.photos import SOURCE, TARGET, gentle, photo, relative, shared

SHORT = PhotoSettings(steps=2, null_text=NullTextSettings(iterations=1))


def array(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture, np.int16)


def edited(request, settings=SHORT, picture=None, **more):
    return edit_photo(shared(), picture or photo(), SOURCE, request, settings, **more)


def test_what_is_not_given_is_what_suits_the_base():
    plain = PhotoSettings("ddpm")
    assert [plain.guidance(base) for base in ("embedded", "another")] == [6, 15]
    assert (plain.null_text_settings("embedded").rate, plain.null_text_settings("another")) == (0.1, NullTextSettings())
    chosen = PhotoSettings(guidance_scale=2.5, null_text=NullTextSettings(rate=0.3))
    assert chosen.guidance("embedded") == 2.5 and chosen.null_text_settings("embedded").rate == 0.3


@pytest.mark.parametrize("method", ["direct", "null-text", "ddpm"])
def test_the_target_is_another_picture_of_the_photos_size(method):
    found = edited(EditRequest(TARGET), replace(SHORT, inversion=method), photo(30, 20), attention=method == "direct")
    assert found.image.size == found.reconstruction.size == (30, 20) and found.target == TARGET
    assert found.latents.shape == (2, 4, 8, 8) and found.trajectory.method == method and not found.notes
    assert (array(found.image) != array(found.reconstruction)).any()
    assert (found.attention is None) == (method != "direct")


def test_dpl_c67_an_identity_edit_is_the_vae_round_trip():
    model, picture = shared(), photo()
    once = PaddedImage.of(model, picture)
    trip = once.to_picture(model.decode(model.encode(once.pixels)))
    for request in (EditRequest(SOURCE.upper()), EditRequest(weights={"cat": 1.0})):
        found = edited(request)
        assert np.abs(array(found.image) - array(trip)).max() == 0
        assert found.notes == ("the target says what the source says: this is the reconstruction",)
    changed = edited(EditRequest(TARGET))
    assert (
        np.abs(array(changed.reconstruction) - array(trip)).max() <= 1
    )  # beside a target: two rows are summed otherwise


def test_swaps_are_a_target_and_weights_alone_are_an_edit():
    swapped, said = edited(EditRequest(swaps=[("cat", "dog")])), edited(EditRequest(TARGET))
    assert swapped.target == TARGET and torch.equal(swapped.latents, said.latents)
    more, less = (edited(EditRequest(weights={"cat": factor})) for factor in (4.0, 0.0))
    assert more.target == SOURCE and not more.notes
    assert relative(more.latents[1], less.latents[1]) > 0.01


def test_local_changes_stay_where_the_words_look():
    settings = replace(SHORT, control=replace(SHORT.control, blend_start=0.0, blend_threshold=0.95))
    found = edited(EditRequest(TARGET, local=[("cat", "dog")]), settings)
    same = (found.latents[0] == found.latents[1]).all(0)
    assert 0 < same.float().mean() < 1


def test_an_adapter_and_its_tokens_are_there_for_the_edit_and_gone_afterwards():
    model = gentle()
    rows = {"<cat1>": {"text_encoder": torch.randn(2, 32, generator=torch.Generator().manual_seed(0))}}
    adapter = random_adapter(model)
    adapter = Adapter(adapter.lora, adapter.rank, adapter.alpha, None, adapter.info, rows)
    before = set(model.unet.state_dict()), model.tokenizers
    found = Editor(model, adapter).photo(photo(), SOURCE, EditRequest("a red <cat1> cat on the beach"), SHORT)
    assert found.trajectory.about["adapter"] is not None
    assert (set(model.unet.state_dict()), model.tokenizers) == before
    plain = Editor(model).photo(photo(), SOURCE, EditRequest(TARGET), SHORT)
    assert plain.trajectory.about["adapter"] is None
    with Editor(model, adapter) as held:
        again = held.photo(photo(), SOURCE, EditRequest("a red <cat1> cat on the beach"), SHORT)
        assert set(model.unet.state_dict()) != before[0], "and there it is again"
    assert torch.equal(again.latents, found.latents)
    with pytest.raises(RuntimeError, match="in the body"), applied(model, adapter):
        raise RuntimeError("in the body")
    assert (set(model.unet.state_dict()), model.tokenizers) == before


@pytest.mark.parametrize(
    ("edit_request", "says"),
    [
        (EditRequest(), "nothing is to change: give a target prompt, words to swap, or weights"),
        (EditRequest(TARGET, [("cat", "dog")]), "two ways to say one thing"),
        (
            EditRequest(swaps=[("kat", "dog")]),
            "the word 'kat' is not in the prompt 'a red cat on the beach': did you mean cat?",
        ),
        (EditRequest(TARGET, weights={"cat": 2.0}), "the word 'cat' is not in the prompt 'a red dog on the beach'"),
        (EditRequest("cat " * 80), "the prompt has 82 tokens"),
    ],
)
def test_mistakes_are_found_before_anything_is_inverted(monkeypatch, edit_request, says):
    monkeypatch.setattr("personalize.editing.real_image.invert", lambda *_, **__: pytest.fail("it was inverted"))
    with pytest.raises(UserError, match=says) as caught:
        edited(edit_request)
    assert "\n" not in str(caught.value)
