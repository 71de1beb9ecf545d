"""Training in half precision: the base's weights in it, adapters in fp32, and pictures drawn with the same weights."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from personalize.adapters.lora import lora_parameters
from personalize.adapters.subjects import Subject
from personalize.errors import UserError
from personalize.io.images import to_image
from personalize.models.stable_diffusion import StableDiffusion
from personalize.training import trainer
from personalize.training.batched_adapters import learn_batched
from personalize.training.config import MultiConceptConfig
from personalize.training.data.class_images import from_base
from personalize.training.data.concepts import ConceptPicture
from personalize.training.multi_concept import multi_concept_run
from personalize.training.single_image import single_image_run
from personalize.training.validation import draw, preview
from tests.support.runs import CAPTION, SMALL, pixels
from tests.support.tiny import NAMES, tiny, tiny_folder, tiny_sd1

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PETS = MultiConceptConfig(
    rank=2, max_train_steps=2, calibration_weight=0.0, initializer_token="class", samples_per_update=2
)
RUNS = ("single_image", "multi_concept")


@pytest.fixture
def accelerated(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make an Accelerator of a precision: fp16, which Accelerate refuses on a CPU, as it is on a GPU.

    Accelerate keeps one precision to a process; other tests of this process find their own again.
    """

    def make(precision: str) -> Accelerator:
        accelerator = Accelerator(cpu=True)
        monkeypatch.setitem(AcceleratorState._shared_state, "_mixed_precision", precision)
        accelerator.native_amp = precision != "no"
        accelerator.scaler = torch.amp.GradScaler("cpu") if precision == "fp16" else None  # pyright: ignore
        return accelerator

    return make


def options(folder: Path | str | None, **given: Any) -> SimpleNamespace:
    return SimpleNamespace(
        pretrained_model_name_or_path=folder, revision=None, variant=None, prediction_type=None,
        **{"load_in_4bit": False, **given},
    )  # fmt: skip


def run_of(kind: str, model: StableDiffusion, accelerator: Accelerator) -> AbstractContextManager[Any]:
    if kind == "single_image":
        config = replace(SMALL, max_train_samples=2)
        return single_image_run(model, pixels(), CAPTION, config, accelerator=accelerator)
    picture = ConceptPicture(to_image(pixels()), (Subject("<cat1>", "cat"),))
    return multi_concept_run(model, picture, PETS, accelerator=accelerator)


def spied(model: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtype of the UNet's weights at each of its predictions from now on."""
    seen: list[torch.dtype] = []
    predict = model.predict
    monkeypatch.setattr(model, "predict", lambda *args: (seen.append(model.dtype), predict(*args))[1])
    return seen


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize(
    "precision", [pytest.param("no", marks=pytest.mark.slow), pytest.param("bf16", marks=pytest.mark.slow), "fp16"]
)
def test_base_updates_and_pictures_are_in_one_precision_and_the_adapter_in_fp32(
    precision: str, kind: str, accelerated: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype, accelerator = DTYPES[precision], accelerated(precision)
    model = trainer.load_base(options(tiny_folder("sd1", tmp_path)), accelerator)
    assert {weight.dtype for weight in model.unet.parameters()} == {dtype}
    assert {weight.dtype for part in (model.vae, *model.text_encoders) for weight in part.parameters()} == {
        torch.float32
    }
    seen = spied(model, monkeypatch)
    from_base(model, "a cat", 1, size=(64, 64), steps=1, cache=tmp_path / "drawn", accelerator=accelerator)
    with run_of(kind, model, accelerator) as run:
        before = [parameter.detach().clone() for parameter in lora_parameters(model.unet)]
        reports = list(run.steps())
        draw(run, "a photo of a cat", count=1, steps=1)
        after, adapter = lora_parameters(model.unet), run.adapter()
        assert {parameter.dtype for parameter in after} == {torch.float32}
        assert not all(torch.equal(*pair) for pair in zip(before, after, strict=True))
        moments = [part for state in run.optimizer.state.values() for part in state.values()]
        assert {part.dtype for part in moments} == {torch.float32}
    assert len(reports) == 2 and all(torch.isfinite(report.losses["loss"]) for report in reports)
    preview(model, adapter, pixels(), steps=1)
    assert len(seen) >= 5 and set(seen) == {dtype}
    assert {part.dtype for part in adapter.lora.values()} == {torch.float32}


@pytest.mark.parametrize("name", [NAMES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])])
def test_half_of_the_weights_bytes_give_nearly_the_losses_of_fp32(name: str, accelerated: Any) -> None:
    """Losses of two updates may differ by fp16's 2⁻¹¹ = 5e-4 of their size, times the depth of a tiny UNet: 1e-2."""
    model, losses, settings = tiny(name), {}, replace(SMALL, max_train_samples=2)
    for precision in ("no", "fp16"):
        with single_image_run(model, pixels(), CAPTION, settings, accelerator=accelerated(precision)) as run:
            held = sum(weight.nbytes for weight in model.unet.parameters() if not weight.requires_grad)
            losses[precision] = [float(report.losses["loss"]) for report in run.steps()]
    assert losses["fp16"] == pytest.approx(losses["no"], rel=1e-2) and losses["fp16"] != losses["no"]
    assert held == sum(weight.nbytes for weight in tiny(name).unet.parameters()) // 2


@pytest.mark.parametrize("kind", RUNS)
def test_a_base_in_fp16_is_trained_in_fp32_where_nothing_scales_the_loss(kind: str, accelerated: Any) -> None:
    """In fp16 gradients below 6e-8 are zero without a word: only the loss scaler of fp16 training keeps them."""
    model = tiny_sd1()
    model.unet.half()
    with run_of(kind, model, accelerated("no")) as run:
        assert model.dtype == torch.float32 and len(list(run.steps())) == 2
    assert model.dtype == torch.float16


def test_several_adapters_in_one_batch_learn_in_fp16(accelerated: Any) -> None:
    pictures, accelerator = [([*pixels()], [CAPTION]), ([*(-pixels())], [CAPTION])], accelerated("fp16")
    rows = [(torch.stack(images), captions) for images, captions in pictures]
    (adapter, loss), _ = learn_batched(tiny_sd1(), rows, SMALL, accelerator=accelerator)
    assert loss == loss and any(bool(part.any()) for key, part in adapter.lora.items() if "lora_B" in key)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_what_is_not_in_4_bits_has_the_runs_half_precision(precision: str, accelerated: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    config = options(tiny_folder("sd1", tmp_path), load_in_4bit=True)
    model = trainer.load_base(config, accelerated(precision))
    assert model.dtype == (torch.float16 if precision == "fp16" else torch.bfloat16)


def test_trained_base_weights_stay_fp32(accelerated: Any, tmp_path: Path) -> None:
    for precision in DTYPES:
        model = trainer.load_base(options(tiny_folder("sd1", tmp_path)), accelerated(precision), full_weights=True)
        assert model.dtype == torch.float32


def test_no_trainer_loads_a_base_in_fp16_where_there_is_no_autocast(accelerated: Any, tmp_path: Path) -> None:
    """`catalogue` too, which makes its own Accelerator: there fp16 on a CPU was fp32 without a word."""
    accelerator = accelerated("fp16")
    accelerator.native_amp = False
    with pytest.raises(UserError, match="--mixed_precision fp16 does not work on this cpu: use bf16 or no"):
        trainer.load_base(options(tiny_folder("sd1", tmp_path)), accelerator)


def test_class_pictures_of_another_precision_are_not_reused(tmp_path: Path) -> None:
    model, wishes = tiny_sd1(), {"size": (64, 64), "steps": 1, "cache": tmp_path}
    (full,) = from_base(model, "a cat", 1, **wishes)
    model.unet.bfloat16()
    (half,) = from_base(model, "a cat", 1, **wishes)
    assert full.picture != half.picture
