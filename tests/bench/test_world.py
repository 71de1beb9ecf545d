"""What stamps a bench's results."""

from __future__ import annotations

import torch

from tests.bench.world import weights_of
from tests.support.tiny import tiny_sd1


def test_the_stamp_of_weights_hangs_on_each_value_and_its_place_but_on_no_number_of_threads():
    model, threads = tiny_sd1(), torch.get_num_threads()
    before = weights_of(model)
    torch.set_num_threads(threads % 2 + 1)
    try:
        assert weights_of(model) == before
    finally:
        torch.set_num_threads(threads)
    with torch.no_grad():
        model.unet.conv_in.weight.copy_(model.unet.conv_in.weight.flip(0))
    assert [new == old for new, old in zip(weights_of(model), before, strict=True)] == [False, True, True]
