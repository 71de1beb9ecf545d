"""The modules that `inspect` says diffusers takes wrongly are those whose strength is another in diffusers' loader."""

import pytest

from personalize.formats.inspection import inspect_file
from personalize.formats.layouts import classify_tensors
from personalize.formats.peft_settings import scaling
from personalize.io.tensor_files import read_tensors
from tests.support.adapter_kinds import KINDS
from tests.support.foreign_files import kohya, modules, save
from tests.support.lora_states import paths, random_lora
from tests.support.tiny import tiny, tiny_pipeline

PARTS = {"unet": "unet.", "text_encoder": "text_encoder.text_model.", "text_encoder_2": "text_encoder_2.text_model."}


def state(base):
    """A LoRA on some attentions, more convolutions, feed-forward layers, and the text encoders."""

    def want(path):
        attention = path.startswith("mid_block.") and path.endswith((".to_q", ".to_v"))
        return attention or path.endswith(("conv1", "conv2", "ff.net.2"))

    model = tiny(base)
    made = random_lora(paths(model.unet, want))
    for part, encoder in zip(("text_encoder", "text_encoder_2"), model.text_encoders, strict=False):
        made |= random_lora(paths(encoder, lambda path: ".layers.0." in path), part)
    return made


CASES = {  # by module and its number, alpha (None: without) and rank
    "one alpha, one rank": lambda module, number: (2.0, 4),
    "one alpha, ranks of their own": lambda module, number: (2.0, 1 + number % 4),
    "no alpha, ranks of their own": lambda module, number: (None, 1 + number % 4),
    "alpha is the rank, ranks of their own": lambda module, number: (1.0 + number % 4, 1 + number % 4),
    "convolutions of another alpha": lambda module, number: (1.0 if "conv" in module else 2.0, 4),
    "feed-forward layers of another alpha": lambda module, number: (
        3.0 if "ff" in module or "mlp" in module else 2.0,
        4,
    ),
    "attention without alpha": lambda module, number: (None if ".attn" in module else 2.0, 4),
    "alpha 0": lambda module, number: (0.0, 4),
}


@pytest.mark.parametrize("base", ["sd1", "sdxl"])
@pytest.mark.parametrize("name", CASES)
def test_strengths_that_diffusers_takes_wrongly_are_those_that_are_said(tmp_path, name, base):
    """Files without alphas were said to be wrong, which are right; those with few attentions right, which are wrong."""
    alphas, cut = {}, {}
    for number, (module, (a, b)) in enumerate(modules(state(base)).items()):
        alpha, rank = CASES[name](module, number)
        alphas |= {} if alpha is None else {module: alpha}
        cut |= {f"{module}.lora_A.weight": a[:rank], f"{module}.lora_B.weight": b[:, :rank]}
    file = save(tmp_path / "x.safetensors", kohya(cut, base, alphas))
    right = {m: scaling(m, parts, {}) for m, parts in classify_tensors(read_tensors(file).tensors).modules.items()}
    pipe, taken = tiny_pipeline(base), {}
    pipe.load_lora_weights(str(file))
    for part, prefix in PARTS.items():
        layers = getattr(pipe, part).named_modules() if hasattr(pipe, part) else ()
        taken |= {prefix + path.removeprefix("text_model."): layer.scaling["default_0"] for path, layer in layers
                  if getattr(layer, "lora_A", None)}  # fmt: skip
    assert taken.keys() == right.keys()
    wrong = {module for module, strength in right.items() if abs(taken[module] - strength) > 1e-6}
    found = inspect_file(file)
    assert set(found.dropped.get("diffusers", [])) == wrong
    assert (found.readers["diffusers"][0] == "no") == bool(wrong)


def test_factors_of_other_dimensions_than_their_layer_are_said_to_be_refused_by_diffusers(tmp_path):
    made = KINDS["factors as 1×1 convolutions"]()
    file = save(tmp_path / "x.safetensors", made.tensors, made.metadata)
    with pytest.raises(RuntimeError, match="size mismatch"):
        tiny_pipeline("sd1").load_lora_weights(str(file))
    readers = inspect_file(file).readers
    assert (readers["diffusers"][0], readers["ComfyUI"][0], readers["personalize"][0]) == ("no", "yes", "yes")
