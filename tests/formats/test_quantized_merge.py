"""What a merge into a quantized base leaves of a LoRA: by hand, against bitsandbytes, and as the command."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from personalize.adapters.adapter import Adapter
from personalize.cli.main import main
from personalize.formats.quantized_merge import LARGEST_ERROR, survival, survivals
from personalize.models.rounding import NF4, ROUNDINGS, fp8, int8, nf4
from personalize.models.stable_diffusion import EMBEDDED, StableDiffusion
from tests.support.lora_states import paths, random_lora

OUT, IN, RANK = 48, 64, 4


def noise(*size, seed=0, spread=1.0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)) * spread


def test_a_change_below_half_a_step_is_gone_and_one_of_whole_steps_is_kept():
    """Between 1 and 2, float8_e4m3fn has steps of 1/8."""
    weight = torch.full((OUT, IN), 1.5)
    a, b = torch.ones(1, IN), torch.full((OUT, 1), 0.06)
    gone = survival("m", a, b, weight, fp8)
    assert (gone.kept, gone.rank, gone.components) == (0.0, 0, 1) and abs(gone.error - 1) < 1e-6
    whole = survival("m", a, b / 0.06 * 0.125, weight, fp8)
    assert abs(whole.kept - 1) < 1e-6 and whole.error < 1e-6 and (whole.strength, whole.rank) == (1, 1)


@pytest.mark.parametrize("base", ROUNDINGS)
def test_the_strength_said_is_the_lowest_at_which_the_noise_is_small_enough(base):
    weight = noise(OUT, IN, spread=0.05)
    a, b = noise(RANK, IN, seed=1), noise(OUT, RANK, seed=2, spread={"int8": 5e-5}.get(base, 4e-4))
    found = survival("m", a, b, weight, ROUNDINGS[base])
    assert found.strength is not None and found.strength > 1 and found.error > LARGEST_ERROR
    stronger = survival("m", a, b * found.strength, weight, ROUNDINGS[base])
    weaker = survival("m", a, b * (found.strength / 2), weight, ROUNDINGS[base])
    assert stronger.error <= LARGEST_ERROR < weaker.error and stronger.error < found.error


def test_the_rank_said_is_that_of_the_components_above_the_noise():
    """One component of 40 times the noise's size, and one far below it."""
    weight = noise(OUT, IN, spread=0.05)
    a, b = torch.linalg.qr(noise(IN, 2, seed=1))[0].T, torch.linalg.qr(noise(OUT, 2, seed=2))[0]
    found = survival("m", a, b * torch.tensor([4.0, 1e-4]), weight, nf4)
    assert (found.rank, found.components) == (1, 2)


def test_convolutions_stay_as_they_are_where_there_are_no_quantized_ones():
    factors = {"unet.conv": (noise(2, 4, 3, 3), noise(8, 2, 1, 1, seed=1, spread=1e-4), 1.0)}
    weights = {"unet.conv": noise(8, 4, 3, 3, seed=2)}
    assert survivals(factors, weights, "nf4")[0].error < 1e-3  # of sums in float32
    assert survivals(factors, weights, "fp8")[0].error > LARGEST_ERROR
    zero = survival("m", torch.zeros(1, IN), torch.zeros(OUT, 1), noise(OUT, IN), int8)
    assert (zero.kept, zero.error, zero.components) == (1.0, 0.0, 0)


def test_nf4_and_int8_are_bitsandbytes_own():
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = noise(OUT, IN, spread=0.05)
    data, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=False)
    torch.testing.assert_close(nf4(weight), functional.dequantize_4bit(data, state), atol=1e-6, rtol=1e-5)
    assert len(NF4) == 16 and torch.equal(nf4(nf4(weight)), nf4(weight))
    steps = int8(weight) / (weight.abs().amax(1, keepdim=True) / 127)
    assert (steps - steps.round()).abs().max() < 1e-4 and float((int8(weight) - weight).abs().max()) < 1e-3
    odd = noise(3, 7)  # no whole block
    assert nf4(odd).shape == odd.shape and float((nf4(odd) - odd).abs().max()) < 0.4


def test_verify_says_and_draws_what_survives(tmp_path, capsys):
    model = StableDiffusion.load(EMBEDDED)
    lora = random_lora(paths(model.unet, lambda path: path.endswith(("attn1.to_q", "attn2.to_k"))), spread=1e-3)
    Adapter(lora, 4, 4.0, None, {"base": model.identity, "standalone": True}).save(tmp_path / "mine")
    capsys.readouterr()
    picture = tmp_path / "kept.png"
    assert main(["verify", str(tmp_path / "mine"), "--on_base", "fp8", "--picture", str(picture)]) == 0
    text = capsys.readouterr().out
    assert "merged into a base in fp8" in text and "attn1.to_q" in text and "verified" in text
    with Image.open(picture) as image:
        assert image.width > 300
    assert main(["verify", str(tmp_path / "mine"), "--on_base", "int8", "--json"]) == 0
    printed = capsys.readouterr()
    rows = json.loads(printed.out)
    assert "verified" in printed.err, "beside JSON, the report is on the standard error"
    assert len(rows) == len(lora) // 2 and {"module", "kept", "error", "strength", "rank", "components"} == set(rows[0])


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--json"], "add --on_base"), (["--on_base", "nf4"], "needs the weights of the base")],
)
def test_what_is_missing_is_said_before_the_work(tmp_path, capsys, words, said):
    from tests.formats.diffusion_transformers.test_files import write

    file = tmp_path / "a.safetensors"
    file.write_bytes(b"")
    if "--on_base" in words:
        state = {f"lora_unet_mid_block_attentions_0_proj_in.lora_{side}.weight": torch.ones(4, 4, 1, 1)
                 for side in ("down", "up")}  # fmt: skip
        from safetensors.torch import save_file

        save_file(state, file)
    assert main(["verify", str(file), *words]) == 2
    assert said in capsys.readouterr().err
    assert main(["verify", str(write(tmp_path / "t.safetensors")[0]), "--on_base", "fp8"]) == 2
    assert "diffusion transformer" in capsys.readouterr().err
