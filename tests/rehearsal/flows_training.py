"""Training on the pretended device: the same losses as on the CPU, whose kernels these are."""

from dataclasses import replace

import pytest
import torch

from personalize.training import checkpoints
from personalize.training.batched_adapters import learn_batched
from personalize.training.config import SingleImageConfig
from personalize.training.finite import NonFiniteError
from personalize.training.memory_advice import check_fits
from personalize.training.memory_estimate import estimate
from personalize.training.single_image import single_image_run
from tests.rehearsal import support
from tests.rehearsal.support import CAPTION, MORE, base, class_image, concepts, difference, learned, on_cpu
from tests.support.runs import SMALL, pixels

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TWO = {"samples_per_update": 2, "train_batch_size": 1}
KINDS = {
    "plain": {}, "snr, clipped, two batches": {"snr_gamma": 5.0, "max_grad_norm": 1.0, **TWO},
    "checkpointing": {"gradient_checkpointing": True}, "text encoder": {"train_text_encoder": True},
    "standalone": {"standalone": True}, "average": {"use_ema": True}, "resampled": {"resample_latents": True},
    "orthogonal": {"orthogonal_start": True}, "timestep rank": {"min_rank": 1}, "flip": {"random_flip": True},
    "no caption": {"proportion_empty_prompts": 0.5}, "warm-up": {"lr_scheduler": "cosine", "lr_warmup_steps": 1},
}  # fmt: skip
# the same kernels in another order of memory: what differs is rounding, 1e-6 in fp32 and the 8 bits of bf16
TOLERANCE = {FP32: 1e-5, BF16: 2e-2}


@pytest.mark.parametrize("kind", KINDS)
def flow_learn(kind):
    config = replace(SMALL, **KINDS[kind])
    ours, theirs = learned(base(), config), on_cpu(learned, "sd1", config)
    assert ours[0] == pytest.approx(theirs[0], rel=TOLERANCE[FP32])
    # Adam turns a rounding of a gradient near 0 into a part of its rate: 5e-3, times the updates
    assert difference(ours[1], theirs[1]) < 5e-3


@pytest.mark.parametrize("name", ["sd1", "sd2v", "sdxl"])
def flow_families(name):
    ours, theirs = learned(base(name)), on_cpu(learned, name)
    assert ours[0] == pytest.approx(theirs[0], rel=TOLERANCE[FP32])


@pytest.mark.parametrize(
    "dtype, precision", [(BF16, "no"), (FP32, "bf16"), (FP32, "fp16"), (FP16, "fp16"), (FP16, "no")]
)
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def flow_precisions(name, dtype, precision):
    losses, _ = learned(base(name, dtype=dtype), precision=precision)
    assert losses == pytest.approx(on_cpu(learned, name)[0], rel=3e-2)  # bf16 has 8 bits


def flow_early_stop():
    assert (
        len(learned(base(), replace(SMALL, early_stop_loss=100.0, max_train_samples=360))[0]) == 351
    )  # after 350 samples


def flow_masks_and_class_pictures():
    extra = {"masks": torch.ones(1, 1, 64, 64), "class_images": (class_image(),)}
    assert learned(base(), **extra)[0] == pytest.approx(learned(base(device="cpu"), **extra)[0], rel=1e-5)


@pytest.mark.parametrize("changes", [{}, {"snr_gamma": 5.0, "max_grad_norm": 0.5, **TWO}, {"resample_latents": True}])
@pytest.mark.parametrize("name, dtype", [("sd1", FP32), ("sd1", BF16), ("sdxl", BF16), ("sd2v", FP32)])
def flow_graph(name, dtype, changes):
    """A captured update equals the loop's, to the bit: both run the same kernels."""
    config = replace(MORE, **changes)
    plain, graph = (
        learned(base(name, dtype=dtype), config),
        learned(base(name, dtype=dtype), replace(config, cuda_graph=True)),
    )
    assert graph[0] == pytest.approx(plain[0], rel=1e-6) and difference(graph[1], plain[1]) < 1e-6


def flow_graph_stops_at_nan():
    config, good = replace(MORE, cuda_graph=True), replace(MORE, max_train_samples=5)
    with single_image_run(base(), pixels(), CAPTION, config) as run:
        drawn = type(run.dataset)._drawn

        def poisoned(data, update, index, picture):
            row = drawn(data, update, index, picture)
            return row | {"noise": row["noise"] * float("nan")} if update == 5 else row

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(run.dataset), "_drawn", poisoned)
            with pytest.raises(NonFiniteError, match="update 6"):
                list(run.steps())
        assert difference(run.adapter(), learned(base(), good)[1]) < 1e-6


def flow_graph_warms_up_on_one_stream():
    from tests.rehearsal.streams import Stream

    Stream.used.clear()
    learned(base(device="cuda:1"), replace(MORE, cuda_graph=True))
    assert len(set(Stream.used)) == 1 and Stream.used[0].device == torch.device("cuda:1")


@pytest.mark.parametrize("precision", ["no", "fp16"])
def flow_several_in_one_batch(precision, recwarn):
    from accelerate import Accelerator

    accelerator = None if precision == "no" else Accelerator(mixed_precision=precision)
    pair = learn_batched(
        base(), [(pixels(), CAPTION), (pixels().flip(-1), "a red dog")], SMALL, accelerator=accelerator
    )
    alone = learned(base(), SMALL)[1]
    assert difference(pair[0][0], alone) < (1e-4 if precision == "no" else 2e-2)
    assert not [warning for warning in recwarn if "one at a time" in str(warning.message)]


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def flow_concepts(name, precision):
    losses, adapter = concepts(base(name), precision)
    assert losses == pytest.approx(on_cpu(concepts, name)[0], rel=3e-2) and set(adapter.concepts) == {
        "<cat1>",
        "<dog1>",
    }


def flow_concepts_full_kv():
    assert concepts(base(), full_kv=True)[0] == pytest.approx(concepts(base(device="cpu"), full_kv=True)[0], rel=1e-4)


@pytest.mark.parametrize("changes", [{}, {"use_8bit_adam": True, "rank": 128}, {"cuda_graph": True}])
def flow_checkpoints(tmp_path, changes):
    config = replace(MORE, **changes)
    with single_image_run(base(), pixels(), CAPTION, config) as run:
        reports = run.steps()
        for _ in range(5):
            next(reports)
        run.save_checkpoint(tmp_path)
        rest = [float(report.losses["loss"]) for report in reports]
    with single_image_run(base(), pixels(), CAPTION, config) as run:
        run.resume(checkpoints.find(tmp_path, "latest"))
        assert [float(report.losses["loss"]) for report in run.steps()] == pytest.approx(rest, rel=1e-6)


@pytest.mark.parametrize("begun, ended", [("cpu", support.KIND), (support.KIND, "cpu")])
def flow_checkpoint_on_another_device(tmp_path, begun, ended):
    losses = learned(base(device=ended), MORE)[0]
    with single_image_run(base(device=begun), pixels(), CAPTION, MORE) as run:
        reports = run.steps()
        for _ in range(4):
            next(reports)
        run.save_checkpoint(tmp_path)
    with single_image_run(base(device=ended), pixels(), CAPTION, MORE) as run:
        run.resume(checkpoints.find(tmp_path, "latest"))
        assert [float(report.losses["loss"]) for report in run.steps()] == pytest.approx(losses[4:], rel=1e-4)


@pytest.mark.parametrize("room, fits", [(1.2, True), (1.6, True), (0.8, False)])
def flow_memory_kept_by_the_allocator_is_free(room, fits, held, monkeypatch):
    """The trial's blocks stay reserved: a run with more room than it needs is not refused."""
    with single_image_run(base(), pixels(), CAPTION, SMALL) as run:
        torch.cuda.reset_peak_memory_stats()
        expected, here = estimate(run), held(0)
        most = max(expected.updates, expected.decoding)
        kept, needed = torch.cuda.max_memory_allocated(), most - expected.base - expected.adapter
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: kept)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (int(room * needed) - (kept - here), 0))
        assert (check_fits(expected, run) is None) == fits


@pytest.mark.parametrize("dtype, precision", [(BF16, "bf16"), (BF16, "fp16")])
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def flow_four_bits(name, dtype, precision):
    model = base(name, dtype=dtype)
    model.quantize()
    losses, _ = learned(model, precision=precision)
    assert losses == pytest.approx(on_cpu(learned, name)[0], rel=0.2)  # weights of 4 bits


def flow_eight_bit_adam():
    config = replace(SMALL, use_8bit_adam=True, rank=64)
    assert learned(base(), config)[0] == pytest.approx(
        learned(base(device="cpu"), replace(config, use_8bit_adam=False))[0], rel=1e-2
    )


def flow_overflow_of_fp16_makes_the_update_again():
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="fp16")
    accelerator.scaler._init_scale = 2.0**40
    config: SingleImageConfig = replace(SMALL, max_train_samples=6, max_grad_norm=1.0)
    with single_image_run(base(), pixels(), CAPTION, config, accelerator=accelerator) as run:
        losses = [float(report.losses["loss"]) for report in run.steps()]
        assert any(bool(tensor.any()) for key, tensor in run.adapter().lora.items() if ".lora_B." in key)
    assert accelerator.scaler.get_scale() < 2.0**40
    assert losses == pytest.approx(on_cpu(learned, "sd1", config)[0], rel=3e-2)
