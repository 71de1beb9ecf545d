"""LoRAs of diffusion transformers in every spelling: read back with equal ΔW, and loaded by diffusers' own loader."""

from __future__ import annotations

import re
from typing import get_args

import pytest
import torch

from personalize.cli.options import Family
from personalize.formats.diffusion_transformers import make_skeletons, names, skeletons
from personalize.formats.diffusion_transformers.families import FAMILIES as TABLE
from personalize.formats.diffusion_transformers.reading import identify, model_of, read, sort
from personalize.formats.diffusion_transformers.writing import diffusers_file, tensors_in
from personalize.io.tensor_files import TensorFile
from tests.support.transformer_loras import FAMILIES, merged, prediction, random_pairs, shapes, tiny_transformer, update

SCHEMES = ("diffusers", "PEFT folder", "kohya", "ComfyUI", "OneTrainer")
EXACT = 1e-6  # of the largest entry: sums of two products in another order


def same(found, pairs):
    assert found.keys() == pairs.keys(), sorted(found.keys() ^ pairs.keys())[:4]
    for name, pair in pairs.items():
        gap = (update(found[name]) - update(pair)).abs().max() / update(pair).abs().max()
        assert gap < EXACT, (name, float(gap))


def test_every_family_of_the_table_is_tried():
    assert set(FAMILIES) == set(TABLE)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_spelling_says_the_same_and_goes_into_every_other(family):
    pairs = random_pairs(shapes(family))
    files = {scheme: TensorFile(tensors_in(pairs, family, scheme, torch.float32), {}) for scheme in SCHEMES}
    for scheme, content in files.items():
        assert identify(content, family) is not None, scheme
        lora = read(f"{scheme}.safetensors", content, family)
        same(lora.pairs, pairs)
        assert {len(a) for a, _ in lora.pairs.values()} == {2}  # no rank grows on the way
        for other in SCHEMES:
            again = TensorFile(tensors_in(lora.pairs, family, other, torch.float32), {})
            same(read("again", again, family).pairs, pairs)


RELEASED = [(family, title) for family in TABLE for title in skeletons.models(family)]


@pytest.mark.parametrize("scheme", ["diffusers", "kohya"])
@pytest.mark.parametrize(("family", "title"), RELEASED)
def test_a_released_models_lora_is_recognised_by_names_and_shapes(family, title, scheme):
    """Shapes alone, as of a file whose numbers are not read; the text encoders' layers are left out."""
    known, tensors = skeletons.models(family)[title], {}
    singles = [names.Layer(name.partition(".")[2], (name,)) for name in known if name.startswith("transformer.")]
    for layer in singles if scheme == "diffusers" else names.original_layers(family):
        own = [known[name] for name in layer.layers if name in known]
        if own and layer.layers[0].startswith("transformer."):
            stem = names.spelled(layer, family, scheme)
            tensors[f"{stem}.lora_down.weight"] = torch.empty(4, *own[0][1:], device="meta")
            sides = sum(one[0] for one in own), 4, *(1 for _ in own[0][2:])
            tensors[f"{stem}.lora_up.weight"] = torch.empty(*sides, device="meta")
    content = TensorFile(tensors, {})
    found = identify(content)
    assert found is not None and found[0] == family and "too" not in found[1]
    assert model_of(sort(content, family)) == (title, [])


def test_the_options_name_every_family():
    assert set(get_args(Family)) == {"sd1", "sd2", "sdxl", *TABLE}


@pytest.mark.slow
def test_the_skeletons_are_those_of_the_installed_diffusers():
    for family, models in make_skeletons.MODELS.items():
        for title, made in models.items():
            built = make_skeletons.layers("transformer", make_skeletons.transformer(*made))
            known = {n: shape for n, shape in skeletons.models(family)[title].items() if n.startswith("transformer.")}
            assert built == known, (family, title)


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_projections_are_the_stacked_changes(family):
    """The truth by hand: what a fused layer changes is what its parts change, one below the other."""
    pairs = random_pairs(shapes(family))
    tensors = tensors_in(pairs, family, "ComfyUI", torch.float32)
    for layer in names.original_layers(family):
        own = [update(pairs[name]) for name in layer.layers if name in pairs]
        if own and not layer.layers[0].startswith("text_"):
            stem = f"diffusion_model.{layer.path}"
            found = tensors[f"{stem}.lora_B.weight"].flatten(1) @ tensors[f"{stem}.lora_A.weight"].flatten(1)
            if layer.swapped and own[0].shape[0] == 2 * own[0].shape[1]:
                own = [torch.cat(own[0].chunk(2)[::-1])]
            torch.testing.assert_close(found, torch.cat(own), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_predicts_the_same_as_the_merged_weights(family, tmp_path):
    from diffusers.loaders import lora_pipeline

    pairs = random_pairs(shapes(family), rank=3)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    file.write_bytes(diffusers_file(pairs, family, torch.float32))
    loader = getattr(lora_pipeline, TABLE[family].loader)
    state, *_, metadata = loader.lora_state_dict(tmp_path, return_lora_metadata=True)
    model = tiny_transformer(family)
    before = prediction(family, model)
    loader.load_lora_into_transformer(state, **_alphas(loader), transformer=model, metadata=metadata)
    after, truth = prediction(family, model), prediction(family, merged(family, pairs))
    assert (truth - before).abs().max() > 0.01 * truth.abs().max()
    torch.testing.assert_close(after, truth, atol=1e-4 * float(truth.abs().max()), rtol=1e-4)


def _alphas(loader):
    return {"network_alphas": None} if "Flux" in loader.__name__ and "2" not in loader.__name__ else {}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_skeleton_is_that_of_diffusers(family):
    """Every layer of the tiny transformer is in the skeleton, and the table names only layers that exist."""
    known = skeletons.layer_names(family)
    assert {f"transformer.{path}" for path in shapes(family)} <= known
    rows = [row for rows in (TABLE[family].rows, TABLE[family].also) for row in rows]
    for theirs, ours, text in rows:
        for _, _, layers in names.ROW.findall(text):
            for layer in layers.split("+"):
                pattern = re.escape(".".join(p for p in ("transformer", ours, layer) if p)).replace(r"\{n\}", r"\d+")
                assert any(re.fullmatch(pattern, name) for name in known), (theirs, layer)
