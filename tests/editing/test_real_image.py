"""A photo edited by text, from picture to picture."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from personalize.adapters.adapter import Adapter
from personalize.adapters.apply import applied
from personalize.editing.config import DynamicSettings, UniformSettings
from personalize.editing.editor import Editor
from personalize.editing.photo_settings import PhotoSettings
from personalize.editing.prepared_photo import auxiliary_notes
from personalize.editing.real_image import edit_photo
from personalize.editing.real_image_settings import EditRequest
from personalize.editing.uniform_attention import UniformBlend
from personalize.errors import UserError
from personalize.io.images import psnr
from personalize.models.image_processor import PaddedImage
from personalize.sampling.config import NullTextSettings
from tests.support.lora_states import random_adapter
from tests.support.photos import SOURCE, TARGET, gentle, photo, relative, shared

SHORT = PhotoSettings(steps=2, null_text=NullTextSettings(iterations=1), resolution=32)


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
    assert found.latents.shape == (2, 4, 8, 16) and found.trajectory.method == method
    assert found.notes == ("edited at 39×26 px and scaled back to 30×20",)
    assert (array(found.image) != array(found.reconstruction)).any()
    assert (found.attention is None) == (method != "direct")


def test_null_text_without_guidance_fits_the_nouns_alone():
    dynamic = DynamicSettings(updates=1)
    unguided = replace(SHORT, inversion="null-text", guidance_scale=1.0, dynamic=dynamic)
    found = edited(EditRequest(TARGET), unguided)
    assert found.trajectory.method == "null-text" and len(found.trajectory.null) == 1
    by_ddim = edited(EditRequest(TARGET), replace(unguided, inversion="ddim"))
    assert torch.equal(found.latents, by_ddim.latents)


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
    ],
)
def test_mistakes_are_found_before_anything_is_inverted(monkeypatch, edit_request, says):
    monkeypatch.setattr("personalize.editing.prepared_photo.invert", lambda *_, **__: pytest.fail("it was inverted"))
    with pytest.raises(UserError, match=says) as caught:
        edited(edit_request)
    assert "\n" not in str(caught.value)


def test_mutual_control_looks_for_words_of_the_target_alone(monkeypatch):
    """The source row has the empty prompt there: `--local cat` of "cat" → "dog" says what to write instead."""
    monkeypatch.setattr("personalize.editing.prepared_photo.invert", lambda *_, **__: pytest.fail("it was inverted"))
    with pytest.raises(UserError, match="'cat' is no word of the target, .* such as cat=beach"):
        edited(EditRequest(TARGET, local=[("cat", "cat")]), replace(SHORT, controller="mutual"))


def test_a_small_photo_is_edited_at_the_bases_own_size():
    found = edited(EditRequest(TARGET), replace(SHORT, resolution=None), photo(40, 30))
    assert found.latents.shape[-2:] == (16, 24)  # 74×55 px, padded to 96×64
    assert found.image.size == (40, 30) and "edited at 74×55 px, the base's own size" in found.notes[0]


@pytest.mark.parametrize("choice", [{}, {"controller": "mutual"}, {"inversion": "ddpm"}, {"inversion": "none"}])
def test_outside_the_mask_every_method_returns_the_photos_own_pixels(choice):
    """In the photo's own resolution, six times that of the edit; the latents outside are the source's."""
    picture, settings = photo(192, 192), replace(SHORT, **choice)
    found = edited(EditRequest(TARGET, mask=(48, 48, 144, 144)), settings, picture)
    equal = (array(found.image) == array(picture)).all(-1)
    outside = np.ones((192, 192), bool)
    outside[48:144, 48:144] = False
    assert found.image.size == (192, 192) and equal[outside].all()
    assert 192 * 192 - 96 * 96 <= found.untouched[0] <= equal.sum() < 192 * 192
    cells = torch.zeros(8, 8, dtype=torch.bool)
    cells[2:6, 2:6] = True
    assert torch.equal(found.region, cells)
    assert torch.equal(found.latents[0][:, ~cells], found.latents[1][:, ~cells])
    assert not torch.equal(found.latents[0], found.latents[1])


def test_an_edit_with_uniform_maps_has_their_region_also_where_the_photos_pixels_do_not_come_back():
    settings = replace(SHORT, steps=4, uniform=UniformSettings())
    free, strict = (edited(EditRequest(TARGET, strict=choice), settings) for choice in (False, True))
    assert free.region is not None and torch.equal(free.region, strict.region)
    assert free.untouched == () and len(strict.untouched) == 1


def test_a_reconstruction_with_uniform_maps_that_is_another_picture_is_told():
    """Of 24 scenes one was inverted so badly without its caption that the edit's background lost 14 dB, silently."""
    model, frame = shared(), PaddedImage.of(shared(), photo(), 32)
    latents = torch.zeros_like(model.encode(frame.pixels))
    blend, drawn = UniformBlend({401.0: latents + 1, 201.0: latents}, UniformSettings()), model.decode(latents).cpu()
    assert auxiliary_notes(model, frame, blend, drawn) == auxiliary_notes(model, frame, None, drawn) == ()
    near = frame.pixels + 0.02  # 40 dB, and an untrained decoder's picture of nothing is far
    (found,) = auxiliary_notes(model, frame, blend, near)
    assert f"has a PSNR of {psnr(drawn, frame.pixels):.0f} dB from the photo, where the source has 40: compare" in found


def test_a_masks_transparency_is_black():
    """A white shape on a transparent layer, as drawing programs write it, was white everywhere: nothing was kept."""
    shape = Image.new("RGBA", (32, 32), (255, 255, 255, 0))
    shape.paste((255, 255, 255, 255), (8, 8, 16, 16))
    plain = edited(EditRequest(TARGET, mask=shape.getchannel("A")))
    found = edited(EditRequest(TARGET, mask=shape))
    assert found.untouched == plain.untouched and found.untouched[0] >= 32 * 32 - 8 * 8
    assert found.image.tobytes() == plain.image.tobytes()


@pytest.mark.parametrize("box", [(0.1, 0.1, 0.9, 0.9), (0.1, 0.1, 0.4, 0.4), (20, 0, 21, 30)])
def test_a_region_in_which_no_edit_could_be_seen_is_refused(monkeypatch, box):
    """Fractions of the sides, and a line: the edit fades in over a latent cell, so that all would be the photo's."""
    monkeypatch.setattr("personalize.editing.prepared_photo.invert", lambda *_, **__: pytest.fail("it was inverted"))
    with pytest.raises(UserError, match=r"the region that may change, \d+×\d+ px, is too small or thin to show an ed"):
        edited(EditRequest(TARGET, mask=box))


def test_each_target_has_its_own_region_of_uniform_maps():
    """Both targets' regions were the first one's: the second edit was undone where the first had changed nothing."""
    settings, other = replace(SHORT, steps=4, uniform=UniformSettings()), "two cats under a tree"
    alone = [edited(EditRequest(target, strict=True), settings) for target in (TARGET, other)]
    both = edited(EditRequest((TARGET, other), strict=True), settings)
    assert both.untouched == (alone[0].untouched[0], alone[1].untouched[0]) and len(set(both.untouched)) == 2
    assert all(np.abs(array(one) - array(by.image)).max() <= 1 for one, by in zip(both.images, alone, strict=True))
    assert both.masks is not None and alone[0].masks is not None and both.masks.height > alone[0].masks.height


def test_several_targets_that_change_nothing_stay_within_the_mask():
    found = edited(EditRequest((SOURCE, SOURCE.upper()), mask=(8, 8, 16, 16)))
    assert len(found.images) == len(found.untouched) == 2


@pytest.mark.parametrize("controller", ["p2p", "mutual"])
def test_local_words_keep_the_photos_own_pixels_too(controller):
    control = replace(SHORT.control, blend_start=0.0, blend_threshold=0.95)
    settings = replace(SHORT, control=control, controller=controller)
    found = edited(EditRequest(TARGET, local=[("cat", "dog")]), settings)
    equal = (array(found.image) == array(photo())).all(-1)
    assert 0 < found.untouched[0] <= equal.sum() < 32 * 32


def test_of_words_and_another_region_the_photo_changes_only_where_both_say_so():
    """Beside --mask the words kept no pixel, and beside --local the region of uniform maps kept none."""
    control = replace(SHORT.control, blend_start=0.0, blend_threshold=0.95)
    settings, local = replace(SHORT, steps=4, control=control), [("cat", "dog")]
    masked = edited(EditRequest(TARGET, mask=(8, 4, 32, 32)), settings)
    both = edited(EditRequest(TARGET, local=local, mask=(8, 4, 32, 32)), settings)
    assert masked.region is not None and both.region is not None
    assert not (both.region & ~masked.region).any() and 0 < both.region.sum() < masked.region.sum()
    outside = ~both.region.repeat_interleave(4, 0).repeat_interleave(4, 1).numpy()
    assert (array(both.image) == array(photo())).all(-1)[outside].all() and both.untouched[0] >= outside.sum()
    nowhere = replace(settings, uniform=UniformSettings(quantile=1.0))  # no difference is above twice the largest
    strict, by_words = (edited(EditRequest(TARGET, local=local, strict=one), nowhere) for one in (True, False))
    assert strict.untouched == (32 * 32,) and by_words.untouched[0] < 32 * 32


def test_what_a_weight_leaves_is_said_of_negative_ones_too():
    notes = edited(EditRequest(weights={"cat": -2.0, "red": 0.0})).notes
    said = "a weight of 0 or less is for cat, red itself, but the end and padding tokens still tell of it"
    assert any(note.startswith(said) for note in notes)


def test_several_targets_share_one_inversion_and_one_batch(tmp_path):
    """Each row as on its own, but for the rounding of other batch sizes."""
    targets = (TARGET, "a red fox on the beach")
    found = edited(EditRequest(targets), cache=tmp_path)
    assert found.targets == targets and len(found.images) == 2 and len(found.latents) == 3
    for index, target in enumerate(targets):
        alone = edited(EditRequest(target), cache=tmp_path)
        torch.testing.assert_close(found.latents[1 + index], alone.latents[1], rtol=0, atol=1e-4)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_target_that_changes_nothing_is_the_reconstruction_beside_others_too():
    """It was sampled with guidance like the others, which drifts away from the photo."""
    found, alone = edited(EditRequest((TARGET, SOURCE.upper()))), edited(EditRequest(SOURCE))
    assert torch.equal(found.latents[2], found.latents[0]) and not torch.equal(found.latents[1], found.latents[0])
    assert np.abs(array(found.images[1]) - array(alone.image)).max() <= 1
    assert found.notes == ("target 2 says what the source says: its picture is the reconstruction",)
    weighted = edited(EditRequest((TARGET.replace("dog", "cat"), "a red cat on a beach"), weights={"cat": 3.0}))
    assert not torch.equal(weighted.latents[1], weighted.latents[0]), "a weight is an edit"


def test_targets_that_share_a_source_that_they_change_are_told():
    mutual = replace(SHORT, controller="mutual", uniform=UniformSettings(until=0.9, blend_source=True))
    both, one = (edited(EditRequest(targets), mutual).notes for targets in ((TARGET, "a fox"), TARGET))
    assert [note for note in both if note not in one] == [
        "with mutual attention and uniform maps the targets share one source, which each of them changes: alone they "
        "may come out a little different"
    ]


def test_maps_of_prompts_without_a_word_to_show_are_left_out():
    """The sheet ended the edit in a fault of ours, after all was drawn."""
    found = edit_photo(shared(), photo(), "the", EditRequest("in"), SHORT, attention=True)
    assert found.attention is None and found.image.size == (32, 32)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_infedit_without_inversion_an_unchanged_prompt_gives_the_photo(scale):
    """And another prompt another picture; guidance 1 is one pass, as few-step LoRAs want."""
    settings = replace(SHORT, inversion="none", guidance_scale=scale, steps=4)
    found = edited(EditRequest((SOURCE, TARGET)), settings)
    clean = found.trajectory.latents[0]
    torch.testing.assert_close(found.latents[:1], clean, rtol=0, atol=0)
    torch.testing.assert_close(found.latents[1:2], clean, rtol=0, atol=1e-4)  # rows of one batch are rounded otherwise
    assert relative(found.latents[2], clean[0]) > 1e-3


def test_what_needs_an_inversion_is_refused_without_one():
    for wrong in ({"dynamic": DynamicSettings()}, {"uniform": UniformSettings()}):
        with pytest.raises(UserError, match="work along an inversion"):
            PhotoSettings("none", **wrong)
