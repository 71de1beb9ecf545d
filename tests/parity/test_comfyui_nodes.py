"""The nodes for ComfyUI inside a real checkout of it: conditioning, patched weights and predictions equal ours.

PERSONALIZE_COMFYUI=… pytest -m peer tests/parity/test_comfyui_nodes.py -rs
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import personalize
from personalize.adapters.adapter import Adapter
from personalize.adapters.forgetting import parse_rules
from personalize.adapters.lora import module_names
from personalize.adapters.lora_scales import multipliers
from personalize.models.stable_diffusion import StableDiffusion
from personalize.randomness import generator
from tests.support.checkouts import checkout, load
from tests.support.comfyui_models import comfyui, pipeline
from tests.support.lora_states import paths, random_lora, text_lora

pytestmark = pytest.mark.peer
NODES = Path(__file__).parents[2] / "export" / "comfyui"
CLOSE = 1e-5  # the bound: fp32 sums in another order
NAMES = ("sd1", "sd2v", "sdxl")
RULE = {"rank": 4, "min_rank": 1, "alpha": 1.0, "timesteps": 1000}
LONG = "a photo of a red <cat1> and a <dog> sitting on the beach, " * 6  # over 75 tokens


def nodes(monkeypatch, folder):
    """The nodes, loaded as ComfyUI loads them, with `folder` as its only folder for LoRAs."""
    load("folder_paths").folder_names_and_paths["loras"] = ([str(folder)], {".safetensors"})
    spec = importlib.util.spec_from_file_location("nodes_of_personalize", NODES / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return {name.removeprefix("Personalize"): kind() for name, kind in module.NODE_CLASS_MAPPINGS.items()}


def adapter(pipe, *, rank_rule=None, chunks=1, tokens=True, captions=("a cat",)):
    """A LoRA on every layer that trainings choose and on the text encoders, source embeddings and two tokens."""
    model = StableDiffusion.from_pipeline(pipe)
    lora = random_lora(paths(model.unet, set(module_names(model.unet, model.family)).__contains__), spread=0.2)
    with torch.no_grad():
        more = " on the beach " + "and a red dog " * 20 * (chunks - 1)
        source = model.prompts([caption + more for caption in captions])
    widths = [encoder.config.hidden_size for encoder in model.text_encoders]
    words = {"<cat1>": 3, "<dog>": 1} if tokens else {}
    rows = {
        word: {
            key: torch.randn(count, width, generator=generator(0, f"{word}{key}"))
            for key, width in zip(("text_encoder", "text_encoder_2"), widths, strict=False)
        }
        for word, count in words.items()
    }
    parts = {"embeds": source.embeds} | ({} if source.pooled is None else {"pooled": source.pooled})
    info = {"base": model.identity, "caption": captions[0]} | ({"timestep_rank": rank_rule} if rank_rule else {})
    info |= {"captions": captions} if len(captions) > 1 else {}
    return Adapter(lora | text_lora(model, spread=0.2), 4, 6.0, parts, info, rows)


@pytest.fixture(params=NAMES)
def place(request, monkeypatch, tmp_path):
    """The family, a pipeline, and ComfyUI with a model of equal weights."""
    checkout("PERSONALIZE_COMFYUI", monkeypatch)
    pipe = pipeline(request.param)
    return request.param, pipe, *comfyui(pipe, request.param, tmp_path)


def conditioning(pipe, attached, text, dials):
    ours = attached.inputs(text, **dials)
    return ours["prompt_embeds"], ours.get("pooled_prompt_embeds")


@pytest.mark.parametrize("text", ["a photo of a dog", "a <cat1>, red <DOG>.", LONG, ""])
@pytest.mark.parametrize(("chunks", "captions"), [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_conditioning(place, tmp_path, monkeypatch, capsys, text, chunks, captions):
    name, pipe, _, model, clip = place
    learned = ("a cat", "a dog on the beach", "a photo of a red house")[:captions]
    adapter(pipe, chunks=chunks, captions=learned).save(tmp_path / "loras" / "sub" / "cat")
    ui = nodes(monkeypatch, tmp_path / "loras")
    _, clip, source, caption = ui["LoadAdapter"].load(model, clip, "sub/cat", 0.7, "none")
    assert caption == "a cat"
    for dials in ({"alpha": 1.0, "beta": 1.0}, {"alpha": 0.6, "beta": 1.7}, {"alpha": 0.0, "beta": 1.0}):
        ([[theirs, about]],) = ui["ProjectedPrompt"].encode(clip, text, source=source, **dials)
        with personalize.attach(pipe, tmp_path / "loras" / "sub" / "cat", strength=0.7) as attached:
            ours, pooled = conditioning(pipe, attached, text, dials)
        theirs = theirs[:, : ours.shape[1]]
        gap = float((theirs - ours).abs().max() / ours.abs().max())
        if pooled is not None:
            gap = max(gap, float((about["pooled_output"] - pooled).abs().max() / pooled.abs().max()))
        with capsys.disabled():
            print(f"\n{name}: conditioning of {text[:24]!r}, {ours.shape[1]} tokens, {dials}: {gap:.1e}", end="")
        assert gap < CLOSE


@pytest.mark.parametrize("forget", ["none", "decoder=0.5", "encoderattn+encoder1", "nokv+noselfattn=0.3"])
def test_patched_weights(place, tmp_path, monkeypatch, capsys, forget):
    name, pipe, comfy, model, clip = place
    saved = adapter(pipe)
    saved.save(tmp_path / "cat")
    before = {key: weight.clone() for key, weight in model.model.state_dict().items()}
    patched, patched_clip, *_ = nodes(monkeypatch, tmp_path)["LoadAdapter"].load(model, clip, "cat", 0.7, forget)
    unet = StableDiffusion.from_pipeline(pipe).unet
    stems = [key.removesuffix(".lora_A.weight") for key in saved.lora if key.endswith(".lora_A.weight")]
    rules = [] if forget == "none" else parse_rules([forget] if forget.startswith("encoder") else forget.split("+"))
    own = [stem.removeprefix("unet.") for stem in stems if stem.startswith("unet.")]
    scales = {f"unet.{path}": scale for path, scale in multipliers(unet, own, rules, 0.7).items()}
    where = {f"unet.{key}": f"diffusion_model.{value}"
             for key, value in comfy.utils.unet_to_diffusers(model.model.model_config.unet_config).items()}  # fmt: skip
    where |= {
        f"{key}.weight": value for key, value in comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {}).items()
    }
    worst, changed = 0.0, 0
    for stem in stems:
        a, b = (saved.lora[f"{stem}.lora_{side}.weight"].flatten(1) for side in "AB")
        patcher = patched if stem.startswith("unet.") else patched_clip.patcher
        key = where[f"{stem}.weight"]
        weight = patcher.model.state_dict()[key].clone()
        truth = weight + scales.get(stem, 0.7) * 1.5 * (b @ a).view(weight.shape)
        changed += key in patcher.patches
        found = comfy.lora.calculate_weight(patcher.patches.get(key, []), weight, key)
        worst = max(worst, float((found - truth).abs().max() / truth.abs().max()))
    expected = sum(scales.get(stem, 0.7) != 0 for stem in stems)
    with capsys.disabled():
        print(f"\n{name}: {changed} of {len(stems)} weights patched under {forget!r}: {worst:.1e}", end="")
    assert worst < CLOSE and changed == expected
    assert all(torch.equal(before[key], weight) for key, weight in model.model.state_dict().items())


@pytest.mark.parametrize(("rule", "forget"), [(None, "none"), (RULE, "none"), (RULE, "decoder=0.5")])
def test_sampling(place, tmp_path, monkeypatch, capsys, rule, forget):
    """Every prediction that ComfyUI's sampler asks for, at its own noise levels, with guidance, equals ours."""
    name, pipe, comfy, model, clip = place
    adapter(pipe, rank_rule=rule).save(tmp_path / "cat")
    ui = nodes(monkeypatch, tmp_path)
    patched, taught, source, _ = ui["LoadAdapter"].load(model, clip, "cat", 0.7, forget)
    (positive,) = ui["ProjectedPrompt"].encode(taught, "a red dog", 0.8, 1.2, source)
    (negative,) = ui["ProjectedPrompt"].encode(taught, "", 1.0, 1.0)
    sampler = comfy.samplers.KSampler(patched, steps=3, device=torch.device("cpu"), sampler="euler", scheduler="normal")
    noise, seen = torch.randn(1, 4, 16, 16, generator=generator(0, "noise")), []
    sampler.sample(
        noise, positive, negative, 3.0, latent_image=torch.zeros_like(noise), disable_pbar=True, seed=0,
        callback=lambda i, x0, x, n: seen.append((sampler.sigmas[i], x.clone(), x0.clone())),
    )  # fmt: skip
    with personalize.attach(pipe, tmp_path / "cat", strength=0.7, forget=None if forget == "none" else forget) as own:
        own.model.resolution = 128
        gaps = [_gap(own, model.model.model_sampling, *one) for one in seen]
    with capsys.disabled():
        print(f"\n{name}: {len(gaps)} steps, rule {rule is not None}, forget {forget}: {max(gaps):.1e}", end="")
    assert len(gaps) == 3 and max(gaps) < CLOSE


@torch.no_grad()
def _gap(own, sampling, sigma, x, x0):
    """The deviation of ComfyUI's guided x0 from ours for the same noisy latents."""
    timestep, scale = sampling.timestep(sigma), (sigma**2 + 1) ** 0.5
    said = own._conditioning("a red dog", 0.8, 1.2, None), own._encode("")
    with_text, without = (own.model.predict(x / scale, int(timestep), one) for one in said)
    output = without + 3.0 * (with_text - without)
    ours = x - sigma * output if own.model.prediction_type == "epsilon" else x / scale**2 - sigma / scale * output
    return float((x0 - ours).abs().max() / ours.abs().max())


def test_two_adapters_with_timestep_rank_add_up(place, tmp_path, monkeypatch):
    """A second loader keeps what the first has added: the change is the sum of both at the same timestep."""
    name, pipe, comfy, model, clip = place
    adapter(pipe, rank_rule=RULE, tokens=False).save(tmp_path / "cat")
    ui = nodes(monkeypatch, tmp_path)
    x, t = torch.randn(1, 4, 16, 16, generator=generator(0, "x")), torch.tensor([600.0])
    context = torch.randn(1, 77, pipe.unet.config.cross_attention_dim, generator=generator(0, "c"))
    y = None if name != "sdxl" else torch.zeros(1, 40 + 6 * 256)

    def output(*strengths):
        patcher = model
        for strength in strengths:
            patcher, *_ = ui["LoadAdapter"].load(patcher, clip, "cat", strength, "none")
        patcher.patch_model(device_to=torch.device("cpu"))
        wrappers = {"diffusion_model": patcher.wrappers.get("diffusion_model", {})}
        try:
            with torch.no_grad():
                return model.model.diffusion_model(
                    x, t, context=context, y=y, transformer_options={"wrappers": wrappers}
                )
        finally:
            patcher.unpatch_model(device_to=torch.device("cpu"))

    assert torch.allclose(output(0.3, 0.4), output(0.7), atol=1e-5)
    assert not torch.allclose(output(0.3), output(0.7), atol=1e-3)
    assert torch.equal(output(), output())  # and nothing stays behind


def test_a_base_of_another_family_is_refused(monkeypatch, tmp_path):
    checkout("PERSONALIZE_COMFYUI", monkeypatch)
    adapter(pipeline("sdxl")).save(tmp_path / "loras" / "cat")
    _, model, clip = comfyui(pipeline("sd1"), "sd1", tmp_path)
    ui = nodes(monkeypatch, tmp_path / "loras")
    with pytest.raises(ValueError, match="load a base of its family"):
        ui["LoadAdapter"].load(model, clip, "cat", 1.0, "none")
    with pytest.raises(ValueError, match="no adapter folder"):
        ui["LoadAdapter"].load(model, clip, "../cat", 1.0, "none")
