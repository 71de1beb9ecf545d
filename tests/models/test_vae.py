"""The autoencoder's precision."""

from __future__ import annotations

import torch

from tests.support.tiny import tiny


def test_an_fp16_vae_that_overflows_computes_in_fp32_and_is_given_back_as_it_was():
    """A decoder whose first layer leaves fp16's range, as later ones of SDXL's do: `force_upcast` says so."""
    model = tiny("sd1")
    with torch.no_grad():
        model.vae.decoder.conv_in.weight.mul_(100)
    model.vae.to(torch.float16)
    before = {name: weight.clone() for name, weight in model.vae.state_dict().items()}
    latents = torch.full((1, 4, 8, 8), 1e4)
    model.vae.register_to_config(force_upcast=False)
    assert not model.decode(latents).isfinite().all()
    model.vae.register_to_config(force_upcast=True)
    assert model.decode(latents).isfinite().all() and model.encode(torch.zeros(1, 3, 32, 32)).isfinite().all()
    after = model.vae.state_dict()
    assert all(after[name].dtype == torch.float16 and torch.equal(after[name], before[name]) for name in before)
