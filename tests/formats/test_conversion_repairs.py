"""Convert, on files whose contents other programs take badly as they are: shapes, names of blocks, headers."""

import pytest
import torch

from tests.formats.test_conversion import assert_same, convert, deltas
from tests.support.foreign_files import delta, kohya, kohya_stem, modules, save
from tests.support.lora_predictions import CLOSE, difference, through_loader, with_merged
from tests.support.lora_states import ATTENTION, paths, random_lora
from tests.support.tiny import tiny


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_factors_as_1x1_convolutions_beside_biases_get_the_shape_of_their_layer(tmp_path, to):
    """A module with a changed bias is read by another way than plain LoRAs; diffusers raises on 4-D factors."""
    model = tiny("sdxl")
    state = random_lora(paths(model.unet, ATTENTION))
    tensors = {key: t[:, :, None, None] if t.ndim == 2 else t for key, t in kohya(state, "sdxl", 4.0).items()}
    biases = {module: torch.ones(len(b)) for module, (_, b) in modules(state).items() if module.endswith("to_out.0")}
    tensors |= {f"{kohya_stem(module, 'sdxl')}.diff_b": bias for module, bias in biases.items()}
    written = convert(save(tmp_path / "in.safetensors", tensors), to, tmp_path / "out.safetensors", family="sdxl")
    assert_same(deltas(written, "sdxl"), {module: delta(a, b) for module, (a, b) in modules(state).items()})
    assert difference(through_loader(model, written), with_merged(model, state, 1.0)) < CLOSE
