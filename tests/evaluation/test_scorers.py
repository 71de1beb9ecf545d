"""CLIP, DINO and LPIPS as scorers, on tiny random models in folders."""

from __future__ import annotations

import pytest
from PIL import Image

from personalize.errors import UserError
from personalize.evaluation.scorers import ClipScorer, find_scorer, identity_distance
from personalize.evaluation.scoring import Request
from tests.support.tiny_scorers import clip_folder, dino_folder

RED, GRADIENT = Image.new("RGB", (48, 40), "red"), Image.linear_gradient("L").convert("RGB")
REQUEST = Request("a dog in the snow", "a photo of a cat", RED)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("scorers")
    return clip_folder(place), dino_folder(place)


def test_clip_and_dino_read_pictures(folders):
    scorer = find_scorer("any", *map(str, folders))
    same, other = scorer([RED, GRADIENT], REQUEST)
    assert same.distance == pytest.approx(0, abs=1e-5) and same.identity == pytest.approx(1, abs=1e-5)
    assert other.distance > same.distance and 0 <= other.edit <= 1
    assert same.facts["clip_gain"] == pytest.approx(0, abs=1e-6), "the source gains nothing over itself"
    assert same.facts["clip_score"] == pytest.approx(2.5 * max(0.0, same.facts["clip_cosine"]), abs=1e-6)
    assert other.facts["clip_gain"] != 0 and "CLIP" in scorer.name and "DINO" in scorer.name


def test_the_edit_is_the_prompts_share_against_the_caption(folders):
    """With prompt and caption exchanged the two shares add up to one."""
    scorer = ClipScorer(folders[0], identity_distance(str(folders[1])))
    (there,) = scorer([GRADIENT], REQUEST)
    (back,) = scorer([GRADIENT], Request(REQUEST.caption, REQUEST.prompt, RED))
    assert there.edit + back.edit == pytest.approx(1, abs=1e-5)  # a softmax over two
    assert there.edit != back.edit


def test_forgedit_c32_lpips_of_a_picture_with_itself_is_zero(monkeypatch):
    """With a random backbone: the trained one is fetched, and the identity holds for any."""
    lpips = pytest.importorskip("lpips")
    original = lpips.LPIPS
    monkeypatch.setattr(lpips, "LPIPS", lambda **options: original(**options, pretrained=False, pnet_rand=True))
    same, other = identity_distance("alex")(GRADIENT, [GRADIENT, RED])
    assert same == 0 and other > 0


def test_what_cannot_be_loaded_is_said_in_one_line(folders, tmp_path):
    with pytest.raises(UserError, match="--clip_model .*nowhere cannot be loaded") as error:
        find_scorer("any", str(tmp_path / "nowhere"), str(folders[1]))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="--identity_model .* cannot be loaded"):
        find_scorer("any", str(folders[0]), str(tmp_path))
    with pytest.raises(UserError, match="need a CLIP model"):
        find_scorer("sd15")
    with pytest.raises(UserError, match="goes with --clip_model"):
        find_scorer("embedded", None, str(folders[1]))


def test_lpips_that_is_not_installed_is_said_in_one_line(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(UserError, match=r"pip install 'personalize\[metrics\]'"):
        identity_distance("vgg")
