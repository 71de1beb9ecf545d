"""LoRAs of lower rank, as `convert --rank` makes them."""

from __future__ import annotations

import pytest
import torch

from personalize.cli.commands import convert
from personalize.cli.options import ConvertConfig
from personalize.errors import UserError
from personalize.formats.foreign_files import read_adapter_file
from personalize.formats.lora_files import factor_pairs
from tests.support.foreign_files import kohya, save, small_state

CLOSE = 1e-4  # of 4: two factors and a product in single precision


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_a_lower_rank_is_the_nearest_one_and_its_error_is_said(tmp_path, capsys, to):
    """Singular values 3 and 4 on every module: cut to rank 1, 3/5 of the size is lost, and the largest part is kept."""
    state = {}
    for key, tensor in small_state("sd1", rank=2, want=lambda path: ".attn1" in path).items():
        state[key] = torch.zeros_like(tensor)
        for index, size in enumerate((3.0, 4.0)):
            state[key][index, index] = size if ".lora_B." in key else 1.0
    file = save(tmp_path / "a.safetensors", kohya(state, "sd1", 2.0), {"ss_base_model_version": "sd_v1"})
    convert.run(ConvertConfig(file, to, tmp_path / "b.safetensors", rank=1))
    text = capsys.readouterr().out
    assert "rank 1" in text and "60.00%" in text
    found = read_adapter_file(tmp_path / "b.safetensors")
    for a, b in factor_pairs(found.state).values():
        update = b.flatten(1) @ a.flatten(1) * (found.alpha / found.rank)
        assert abs(float(update.norm()) - 4) < CLOSE and abs(float(update.abs().max()) - 4) < CLOSE
    with pytest.raises(UserError, match="--rank must be lower"):
        convert.run(ConvertConfig(file, to, tmp_path / "c.safetensors", rank=2))
