"""Text encoders and autoencoder off the device while nothing uses them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from personalize.models.idle_parts import OffloadedPart
from personalize.models.stable_diffusion import StableDiffusion
from personalize.models.vae import tiled_vae
from tests.support.tiny import tiny


def results(model: StableDiffusion) -> list[torch.Tensor]:
    latents = torch.linspace(-1, 1, 4 * 8 * 8).view(1, 4, 8, 8)
    conditioning = model.prompts(["a cat", "my red dog"])
    pooled = [] if conditioning.pooled is None else [conditioning.pooled]
    return [conditioning.embeds, *pooled, model.decode(latents), model.encode(torch.zeros(1, 3, 32, 32))]


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_parts_come_back_whenever_they_are_used_and_for_good_afterwards(name: str) -> None:
    """Bit for bit, also after an error; contexts may be nested."""
    model = tiny(name)
    before, parts = results(model), [model.vae, *model.text_encoders]
    kept = [parameter.clone() for part in parts for parameter in part.parameters()]
    with pytest.raises(RuntimeError), model.offload.idle(parts, sparing=True):
        assert all(part in model.offload for part in parts)
        with model.offload.idle([model.vae], sparing=True):
            assert all(map(torch.equal, results(model), before))
        assert model.vae in model.offload and all(map(torch.equal, results(model), before))
        raise RuntimeError
    assert not any(part in model.offload for part in parts) and all(map(torch.equal, results(model), before))
    after = [parameter for part in parts for parameter in part.parameters()]
    assert all(map(torch.equal, after, kept))
    after[0].data.add_(1)  # ordinary memory again


def test_a_cpu_keeps_its_parts_unless_memory_is_to_be_spared() -> None:
    model = tiny("sd1")
    with model.offload.idle([model.vae]):
        assert model.vae not in model.offload and not model.offload.tiled


MEASURE = """
import re, torch
from pathlib import Path
from personalize.models.idle_parts import OffloadedPart
def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
torch.empty(7 * 2**20).fill_(1)  # once it is freed, glibc takes blocks of up to its 28 MiB from the heap
layers, between = [], []
for _ in range(16):
    layers.append(torch.nn.Linear(2048, 2048, bias=False))
    between.append(torch.ones(100))  # so that freed blocks are not at the heap's end
layer = torch.nn.Sequential(*layers).requires_grad_(False)
with torch.no_grad():
    expected = layer(torch.ones(1, 2048))
    inside = resident()
    part = OffloadedPart(layer, torch.device("cpu"))
    away = resident()
    with part.awake():
        assert torch.equal(layer(torch.ones(1, 2048)), expected)
        awake = resident()
    again = resident()
    part.end()
    assert torch.equal(layer(torch.ones(1, 2048)), expected)
print(inside - away, awake - away, again - away)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the resident size is read from Linux")
def test_on_a_cpu_the_memory_is_given_back() -> None:
    """Of 256 MB at least 240; they are there while used, and gone again afterwards."""
    child = subprocess.run([sys.executable, "-c", MEASURE], stdout=subprocess.PIPE, check=True)
    left, used, after = map(float, child.stdout.split())
    assert left > 240 and used > 240 and after < 16


def test_decoding_in_tiles_is_nearly_decoding_whole() -> None:
    """Two tiles a side; a tile's normalisation does not see the rest: 0.25 of 2 is what random weights show."""
    model = tiny("sd1")
    latents = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    whole = model.decode(latents)
    with tiled_vae(model.vae, 64):
        tiled = model.decode(latents)
    assert tiled.shape == whole.shape and not torch.equal(tiled, whole) and (tiled - whole).abs().mean() < 0.25
    assert torch.equal(model.decode(latents), whole)


def test_pictures_that_do_not_fit_are_decoded_one_by_one_or_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    from personalize.models import vae

    model, latents, device = tiny("sd1"), torch.zeros(3, 4, 16, 16), torch.device("cpu")
    each = vae.decoding_bytes(model.vae, (64, 64))
    for free, plan in ((None, (3, None)), (3 * each, (3, None)), (2 * each, (1, None)), (each // 2, (1, vae.TILE))):
        monkeypatch.setattr(vae, "free_bytes", lambda device, free=free: free)
        assert vae.decoding_plan(model.vae, latents, device, tiled=False) == plan
    assert vae.decoding_plan(model.vae, latents, device, tiled=True) == (1, vae.TILE)


def test_weights_of_any_shape_and_type_are_kept() -> None:
    part = torch.nn.Module()
    part.a = torch.nn.Parameter(torch.arange(3.0), requires_grad=False)
    part.b = torch.nn.Parameter(torch.ones(2, 0), requires_grad=False)
    part.c = torch.nn.Parameter(torch.arange(5, dtype=torch.bfloat16).view(5, 1), requires_grad=False)
    off = OffloadedPart(part, torch.device("cpu"))
    assert part.a.tolist() == [0, 1, 2] and part.b.shape == (2, 0) and part.c.flatten().tolist() == [0, 1, 2, 3, 4]
    off.end()
    assert part.c.dtype == torch.bfloat16 and part.c.shape == (5, 1)
