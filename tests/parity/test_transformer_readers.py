"""LoRA files for diffusion transformers through ComfyUI's own key map and arithmetic, ΔW compared.

PERSONALIZE_COMFYUI=… pytest -m peer tests/parity/test_transformer_readers.py -rs
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from personalize.formats.diffusion_transformers.factors import outputs_of
from personalize.formats.diffusion_transformers.names import original_layers
from personalize.formats.diffusion_transformers.readers import COMFYUI, through_comfyui
from personalize.formats.diffusion_transformers.reading import sort
from personalize.formats.diffusion_transformers.skeletons import shapes_of
from personalize.formats.diffusion_transformers.writing import fused, tensors_in
from personalize.io.tensor_files import TensorFile
from tests.support.checkouts import checkout, load
from tests.support.transformer_loras import FAMILIES, random_pairs, shapes, update

pytestmark = pytest.mark.peer
MODELS = {"flux1": "Flux", "flux2": "Flux", "qwen-image": "QwenImage", "sd3": "SD3", "chroma": "Chroma",
          "z-image": "Lumina2", "krea2": "Krea2", "anima": ""}  # fmt: skip
CONFIGS = {"sd3": {"depth": 2}, "z-image": {"n_layers": 2, "dim": 32, "n_refiner_layers": 1}, "krea2": {"layers": 2}}
FLUX = {"depth": 2, "depth_single_blocks": 2, "hidden_size": 32}
CLOSE = 1e-5


@pytest.fixture(scope="module")
def sizes():
    """The shapes of the tiny models' layers, made before ComfyUI's stand-ins for packages confuse diffusers."""
    return {family: shapes(family) for family in FAMILIES}


def weights(family, sizes):
    """Zeros under ComfyUI's names, in a model of ComfyUI's class for the family, or in a plain one if it has none."""
    layers = {f"transformer.{path}": shape for path, shape in sizes.items()}
    state = {}
    for layer in original_layers(family):
        own = [layers[name] for name in layer.layers if name in layers]
        if own:
            state[f"diffusion_model.{layer.path}.weight"] = torch.zeros(sum(one[0] for one in own), *own[0][1:])
    base = load("comfy.model_base")
    kind = getattr(base, MODELS[family], None) if MODELS[family] else None
    needed = {"flux2": hasattr(base, "Flux2"), "z-image": hasattr(load("comfy.utils"), "z_image_to_diffusers")}
    kind = kind if needed.get(family, True) else None  # a checkout from before this family
    model = SimpleNamespace() if kind is None else object.__new__(kind)
    object.__setattr__(model, "model_config", SimpleNamespace(unet_config=CONFIGS.get(family, FLUX)))
    object.__setattr__(model, "state_dict", lambda: state)
    return model, state, kind is not None


@pytest.mark.parametrize("scheme", ["ComfyUI", "kohya", "diffusers", "OneTrainer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_comfyui_patches_every_layer_with_the_same_change(sizes, monkeypatch, capsys, family, scheme):
    checkout("PERSONALIZE_COMFYUI", monkeypatch)
    load("comfy.cli_args").args.cpu = True
    comfy = load("comfy.lora")
    model, state, known = weights(family, sizes[family])
    if scheme not in ("ComfyUI", "kohya") and (not known or scheme not in COMFYUI[family]):
        pytest.skip("ComfyUI does not know these names, or this checkout does not know the model")
    pairs = random_pairs(sizes[family])
    tensors = tensors_in(pairs, family, scheme, torch.float32)
    keys = comfy.model_lora_keys_unet(model, {})
    patches = comfy.load_lora(dict(tensors), keys, log_missing=False)
    found = {key: weight.clone() for key, weight in state.items()}
    for target, patch in patches.items():
        key, offset, function = (*target, None, None)[:3] if isinstance(target, tuple) else (target, None, None)
        if key in found:
            found[key] = comfy.calculate_weight([(1.0, patch, 1.0, offset, function)], found[key], key)
    dropped = through_comfyui(sort(TensorFile(tensors, {}), family))
    assert not dropped.refused
    lost = {sort(TensorFile(tensors, {}), family).layer(stem).layers[0] for stem in dropped.dropped}
    kept = {name: pair for name, pair in pairs.items() if name not in lost}
    truth = {f"diffusion_model.{layer.path}.weight": update(pair) for layer, pair in fused(kept, family)}
    changed = {key for key, weight in found.items() if weight.any()}
    with capsys.disabled():
        print(f"\n{family}, {scheme}: {len(changed)} of {len(state)} weights changed, {len(lost)} dropped", end="")
    assert changed == truth.keys(), sorted(changed ^ truth.keys())[:6]
    for key, expected in truth.items():
        gap = (found[key].flatten(1) - expected).abs().max() / expected.abs().max()
        assert gap < CLOSE, (key, float(gap))


def test_the_parts_of_a_fused_layer_are_where_comfyui_has_them():
    """The outputs of FLUX's `linear1` are q, k, v of the model's width, then the feed-forward's."""
    names = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    parts = [shapes_of("flux1", f"transformer.single_transformer_blocks.0.{name}")[0] for name in names]
    assert outputs_of(parts, 3072, 21504, "linear1") == [3072, 3072, 3072, 12288]
