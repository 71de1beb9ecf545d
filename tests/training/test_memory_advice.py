"""What is advised if a training needs more memory than is free: the cheapest options that are enough."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from personalize.models.quantization import saved_by_quantizing
from personalize.training import memory_advice, memory_estimate
from personalize.training.config import SingleImageConfig
from personalize.training.memory_advice import check_fits
from personalize.training.memory_estimate import MemoryEstimate, estimate, unused_savings
from personalize.training.single_image import single_image_run
from tests.support.runs import CAPTION, pixels
from tests.support.tiny import tiny, tiny_sd1

SMALL = SingleImageConfig(rank=2, max_train_samples=4, samples_per_update=2, targets="attention")
ALL = replace(SMALL, samples_per_update=1, gradient_checkpointing=True, use_8bit_adam=True, offload=True)
GB = 10**9


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Say how many bytes are free on the device."""
    return lambda count: monkeypatch.setattr(memory_advice, "free_bytes", lambda device: count)


def advice(expected: MemoryEstimate, config: SingleImageConfig = SMALL) -> str:
    with single_image_run(tiny_sd1(), pixels(), CAPTION, config) as run:
        return check_fits(expected, run) or ""


def test_what_is_there_already_counts_as_there(free: Any) -> None:
    free(GB)
    assert advice(MemoryEstimate(9 * GB, 0, 0, 0, GB // 10, 2)) == ""


def test_the_cheapest_option_that_is_enough_is_advised_alone(free: Any) -> None:
    free(GB)
    said = advice(MemoryEstimate(0, 0, 0, 0, GB, 2))
    assert said.startswith("about 2.0 GB are needed and 1.0 GB are there: add --train_batch_size 1, with which 1.0 GB")
    previews = MemoryEstimate(0, 0, 0, 0, GB // 10, 1, decoding_picture=2 * GB)
    assert ": add --offload, with which" in advice(previews, replace(ALL, offload=False))


def test_options_are_added_until_it_fits_and_none_that_is_not_needed(free: Any) -> None:
    """Measured on the tiny base: a sample takes 4.0 MB, checkpointed 1.9; moments 0.1 MB in 8 bits."""
    free(25 * 10**5)
    said = advice(MemoryEstimate(0, 0, 0, 0, 4 * 10**6, 2))
    assert re.search(r": add --train_batch_size 1 --gradient_checkpointing, with which \d\.\d MB are needed", said), (
        said
    )
    free(10**6)
    said = advice(MemoryEstimate(0, 10**5, 10**5, 8 * 10**6, 10, 1))
    assert ": add --use_8bit_adam, with which" in said


def test_where_options_are_not_enough_a_resolution_is_or_a_larger_device(free: Any) -> None:
    """The tiny base is trained at 64 px, in steps of 32: 32² px are a quarter of 64²."""
    free(GB * 6 // 10)
    assert advice(MemoryEstimate(0, 0, 0, 0, GB, 1), ALL).endswith("add --load_in_4bit --resolution 32")
    free(GB // 10)
    said = advice(MemoryEstimate(0, 0, 0, 0, GB, 1), ALL)
    assert said.endswith("with --load_in_4bit: it takes a device with more memory") and "0.1 GB are there" in said


def test_only_options_that_are_not_given_are_advised() -> None:
    with single_image_run(tiny_sd1(), pixels(), CAPTION, ALL) as run:
        assert unused_savings(run) == ["--load_in_4bit"]
    with single_image_run(tiny_sd1(), pixels(), CAPTION, SMALL) as run:
        options = ["--offload", "--train_batch_size 1", "--use_8bit_adam", "--gradient_checkpointing", "--load_in_4bit"]
        assert unused_savings(run) == options  # no --mixed_precision: on a CPU it saves no memory


def test_lower_precision_is_the_unets_alone() -> None:
    """Half of text encoders, autoencoder and its pictures was promised too, 3 GB too much on SDXL: they stay fp32."""
    for config in (SMALL, replace(SMALL, offload=True), replace(SMALL, offload=True, train_text_encoder=True)):
        with single_image_run(tiny_sd1(), pixels(), CAPTION, config) as run:
            promised = memory_advice._halved(run)(estimate(run))
        lower = tiny_sd1()
        lower.unet.to(torch.bfloat16)
        with single_image_run(lower, pixels(), CAPTION, config) as run:
            real = estimate(run)
        assert replace(promised, sample=0) == replace(real, sample=0)


def test_four_bits_take_the_same_from_fp32_and_after_lower_precision() -> None:
    """Together they were promised what fp32 takes, less once half of it and once all but 4 bits of it: twice."""
    bare = tiny_sd1()
    both = sum(weight.numel() for weight in bare.unet.parameters()) * 2 - saved_by_quantizing(bare.unet, 2)
    with single_image_run(bare, pixels(), CAPTION, SMALL) as run:
        plain, halved, quantized = estimate(run), memory_advice._halved(run), memory_advice._quantized(run)
    for found in (quantized(plain), quantized(halved(plain))):
        assert (found.unet, plain.base - found.base) == (both, plain.unet - both)  # and no layer of the adapter's


@pytest.mark.parametrize(("native", "precision"), [(True, "bf16"), (False, "fp16")])
def test_the_precision_advised_is_one_that_the_device_has(
    native: bool, precision: str, free: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A T4 was told to use bf16, which is then refused there."""
    free(GB)
    monkeypatch.setattr(memory_estimate, "has_bf16", lambda device: native)
    with single_image_run(tiny_sd1(), pixels(), CAPTION, ALL) as run:
        monkeypatch.setattr(type(run.model), "device", torch.device("cuda"))
        assert unused_savings(run)[0] == f"--mixed_precision {precision}"
        said = check_fits(MemoryEstimate(0, 0, 0, 0, 3 * GB // 2, 1), run)
        monkeypatch.undo()
    assert said is not None and f": add --mixed_precision {precision}, with which 0.8 GB" in said


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_what_four_bits_save_is_known_beforehand(name: str) -> None:
    """1 % is for the means of scales, of which there are few in layers as small as these."""
    pytest.importorskip("bitsandbytes")
    model = tiny(name)
    expected = saved_by_quantizing(model.unet)
    before, after = model.quantize()
    assert before - after == pytest.approx(expected, rel=0.1)


@pytest.mark.slow
def test_what_offload_and_checkpointing_will_need_is_what_they_need() -> None:
    with single_image_run(tiny_sd1(), pixels(), CAPTION, SMALL) as run:
        plain = estimate(run)
        offloaded, checkpointed = memory_advice._offloaded(run)(plain), memory_advice._checkpointed(run)(plain)
        eight_bit = memory_advice._eight_bits(run)(plain)
    found = {}
    for name in ("offload", "gradient_checkpointing", "use_8bit_adam"):
        with single_image_run(tiny_sd1(), pixels(), CAPTION, replace(SMALL, **{name: True})) as run:
            found[name] = estimate(run)
    assert offloaded.base == found["offload"].base and offloaded.idle == found["offload"].idle
    assert checkpointed.sample == found["gradient_checkpointing"].sample < plain.sample
    assert eight_bit.optimizer == found["use_8bit_adam"].optimizer


def test_too_little_for_a_single_sample_names_all_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    from personalize.errors import UserError

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    with single_image_run(tiny_sd1(), pixels(), CAPTION, replace(ALL, gradient_checkpointing=False)) as run:
        monkeypatch.setattr(torch.autograd, "grad", full)
        with pytest.raises(UserError, match="add --gradient_checkpointing, then --load_in_4bit, then a lower --resol"):
            estimate(run)
