"""The loop of training: what moves, what is accumulated, clipped and refused, what stops it."""

from collections.abc import Iterator
from dataclasses import replace
from math import cos, pi
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from personalize.errors import UserError
from personalize.models.gradient_checkpointing import gradient_checkpointing
from personalize.randomness import generator
from personalize.training import checkpoints
from personalize.training.data.samples import SampleShard
from personalize.training.finite import NonFiniteError
from personalize.training.loop import EarlyStop, adamw, training_steps
from personalize.training.losses import LossTerms
from personalize.training.single_image import single_image_run
from tests.support.objectives import objective
from tests.support.runs import CAPTION, SMALL, pixels, same
from tests.support.samples import picture
from tests.support.tiny import tiny_sd1


class Line(nn.Module):
    """w·x with a chosen loss: the loop without a model."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.quiet = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(()))

    def forward(self, batch: dict[str, Tensor]) -> LossTerms:
        return LossTerms((self.w * batch["x"]).sum() + 0 * self.quiet, {"first": batch["x"][0]})


def run(line: nn.Module, xs: list[Tensor], accumulation: int = 1, **settings: Any) -> Iterator:
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.SGD(line.parameters(), lr=0.1)
    line, optimizer = accelerator.prepare(line, optimizer)
    updates = ([{"x": x} for x in xs[at : at + accumulation]] for at in range(0, len(xs), accumulation))
    return training_steps(line, updates, optimizer, accelerator=accelerator, **settings)


def test_forgedit_c18_c19_first_update_moves_each_group_by_its_rate_and_nothing_else() -> None:
    model = tiny_sd1()
    frozen = {key: value.clone() for key, value in model.unet.state_dict().items()}
    single = objective(model)
    parts = {f"text {key}": value.clone() for key, value in model.text_encoders[0].state_dict().items()}
    parts |= {f"vae {key}": value.clone() for key, value in model.vae.state_dict().items()}
    before = {name: parameter.detach().clone() for name, parameter in single.trainable().items()}
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.Adam(single.groups(5e-3, 1e-3))
    prepared, optimizer = accelerator.prepare(single, optimizer)
    updates, gradients = picture().updates(SampleShard(2), 0, 1), {}
    for name, parameter in single.trainable().items():
        parameter.register_hook(lambda grad, name=name: gradients.update({name: grad.clone()}))
    reports = list(training_steps(prepared, updates, optimizer, accelerator=accelerator))
    assert [report.learning_rates for report in reports] == [(5e-3, 1e-3)]
    for name, parameter in single.trainable().items():
        moved = (parameter.detach() - before[name]).abs()
        if "lora_A" in name:
            assert not moved.any()  # B is zero, so A has no gradient yet
            continue
        rate = 1e-3 if name == "embeds" else 5e-3
        clear = gradients[name].abs() > 1e-5  # far above Adam's ε = 1e-8
        assert clear.any() and torch.allclose(moved[clear], torch.full_like(moved[clear], rate), rtol=1e-2)
    for key, value in model.unet.state_dict().items():
        if "lora_" not in key:
            assert torch.equal(value, frozen[key.replace(".base_layer", "")])
    now = {f"text {key}": value for key, value in model.text_encoders[0].state_dict().items()}
    now |= {f"vae {key}": value for key, value in model.vae.state_dict().items()}
    assert all(torch.equal(value, parts[key]) for key, value in now.items())


def test_forgedit_c21_accumulated_update_equals_one_batch() -> None:
    """Adam hides a wrong scale of the gradient, so this is asked of plain SGD."""
    ends = []
    for share in (SampleShard(4), SampleShard(4, 1), SampleShard(4, 3)):
        single = objective(tiny_sd1())
        accelerator = Accelerator(cpu=True)
        prepared, optimizer = accelerator.prepare(single, torch.optim.SGD(single.groups(1.0, 1.0)))
        reports = list(training_steps(prepared, picture().updates(share, 0, 2), optimizer, accelerator=accelerator))
        assert [report.update for report in reports] == [1, 2]
        losses = [float(report.losses["loss"]) for report in reports]
        ends.append((losses, {name: parameter.detach() for name, parameter in single.trainable().items()}))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-5)  # the mean over the accumulated batches is reported
    for name, value in ends[0][1].items():
        assert (value - ends[1][1][name]).abs().max() <= 1e-4 * max(1.0, float(value.abs().max()))


def test_forgedit_c22_early_stop_comes_before_the_update() -> None:
    stop = EarlyStop(0.03, batch=10)
    assert not any(stop(update, torch.tensor(0.0)) for update in range(36))  # 35 · 10 = 350 is not above 350
    assert stop(36, torch.tensor(0.0)) and not stop(36, torch.tensor(0.031))
    line = Line()
    xs = [torch.full((3,), value) for value in (1.0, 1.0, -9.0, 1.0)]
    reports = list(run(line, xs, early_stop=EarlyStop(0.03, batch=10, samples=15)))
    assert len(reports) == 2 and torch.allclose(line.w, torch.full((3,), 0.8)) and line.w.grad is None


def test_forgedit_c25_the_optimiser_sees_plain_gradients() -> None:
    line = Line()
    list(run(line, [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 2.0, 1.0])], accumulation=2))
    assert torch.allclose(1 - line.w, torch.full((3,), 0.1 * 2))  # the mean of two gradients, once


def scaling(accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch, scale: float = 2.0**16) -> Accelerator:
    """What Accelerate does under fp16, which it refuses on a CPU: a loss scaler in each of its places."""
    monkeypatch.setattr(Accelerator, "mixed_precision", property(lambda _: "fp16"))
    accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=scale)  # pyright: ignore
    return accelerator


def test_forgedit_c25_gradients_are_unscaled_before_they_are_clipped_and_used(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for scaled_loss in (False, True):
        line, accelerator = Line(), Accelerator(cpu=True)
        if scaled_loss:
            scaling(accelerator, monkeypatch)
        prepared, optimizer = accelerator.prepare(line, torch.optim.SGD(line.parameters(), lr=0.1))
        updates = [[{"x": torch.tensor([3.0, 0.0, 4.0])}], [{"x": torch.tensor([0.3, 0.0, 0.4])}]]
        list(training_steps(prepared, updates, optimizer, accelerator=accelerator, max_grad_norm=1.0))
        ends.append(line.w.detach())
    assert torch.allclose(ends[0], ends[1], rtol=1e-3) and torch.allclose(1 - ends[0], torch.tensor([0.09, 0.0, 0.12]))
    naive = Line()  # as the released code has it: the loss is scaled, the raw optimiser stepped
    accelerator = scaling(Accelerator(cpu=True), monkeypatch)
    accelerator.backward(naive({"x": torch.tensor([3.0, 0.0, 4.0])}).total)
    torch.optim.SGD(naive.parameters(), lr=0.1).step()
    assert (1 - naive.w).abs().max() > 1e4


def test_an_update_that_overflows_under_a_scaler_is_made_again_at_half_the_scale(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = Line()
    line.w.register_hook(lambda grad: grad * torch.inf if float(grad.max()) > 1e5 else grad)
    accelerator = scaling(Accelerator(cpu=True), monkeypatch, scale=2.0**17)
    prepared, optimizer = accelerator.prepare(line, torch.optim.SGD(line.parameters(), lr=0.1))
    updates = [[{"x": torch.ones(3)}]] * 2
    ends = [line.w.detach().clone() for _ in training_steps(prepared, updates, optimizer, accelerator=accelerator)]
    assert torch.allclose(ends[0], torch.full((3,), 0.9)) and torch.allclose(ends[1], torch.full((3,), 0.8))
    assert accelerator.scaler is not None and accelerator.scaler.get_scale() == 2.0**16


def test_moments_of_8_bits_learn_nearly_the_same() -> None:
    pytest.importorskip("bitsandbytes")
    ends = []
    for use_8bit in (False, True):
        weight = nn.Parameter(torch.linspace(-1, 1, 8192))
        optimizer = adamw([{"params": [weight], "lr": 1e-2}], weight.device, use_8bit=use_8bit)
        for _ in range(20):
            (weight - 2).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append((weight.detach(), optimizer.state[weight]))
    assert {state.dtype for state in ends[1][1].values() if isinstance(state, Tensor)} >= {torch.uint8}
    assert ends[1][1]["state1"].dtype == ends[1][1]["state2"].dtype == torch.uint8
    assert (ends[0][0] - ends[1][0]).abs().max() < 0.1 * 0.2  # a tenth of the way both have gone


def test_speed_fused_adamw_equals_the_default() -> None:
    """1e-6 of a weight after 50 updates of gradients of all sizes: the same formula, its products in another order."""
    ends = []
    for fused in (True, False):
        weight = nn.Parameter(torch.linspace(-1, 1, 512))
        groups = [{"params": [weight], "lr": 1e-2}]
        optimizer = adamw(groups, weight.device) if fused else torch.optim.AdamW(groups, weight_decay=0.0, fused=False)
        assert optimizer.defaults["fused"] is fused
        for update in range(50):
            weight.grad = torch.randn(512, generator=generator(update, "gradients")) * 10.0 ** (update % 5 - 4)
            optimizer.step()
        ends.append(weight.detach())
    torch.testing.assert_close(*ends, atol=1e-6, rtol=0)
    assert (ends[0] - torch.linspace(-1, 1, 512)).abs().mean() > 0.01  # they did go somewhere


def test_checkpointing_gives_the_same_gradients_and_leaves_no_trace() -> None:
    model = tiny_sd1()
    single, batch = objective(model), next(picture().batches(SampleShard(2), 0, 1))
    learns = list(single.trainable().values())
    states = [dict(vars(module)) for module in model.unet.modules()]
    kept, gradients = [], []
    for wanted in (False, True):
        count = [0]

        def pack(tensor: Tensor, count: list[int] = count) -> Tensor:
            count[0] += tensor.numel()
            return tensor

        saved = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with gradient_checkpointing(model.unet, wanted), saved:
            total = single(batch).total
            gradients.append(torch.autograd.grad(total, learns, allow_unused=True))
        kept.append(count[0])
    assert kept[1] < 0.5 * kept[0]
    for plain, anew in zip(*gradients, strict=True):
        assert (plain is None) == (anew is None)
        assert plain is None or torch.equal(plain, anew)
    for module, state in zip(model.unet.modules(), states, strict=True):
        assert set(vars(module)) == set(state) and getattr(module, "gradient_checkpointing", False) is False


def test_clipping_scales_to_the_norm() -> None:
    line = Line()
    list(run(line, [torch.tensor([30.0, 0.0, 40.0])], max_grad_norm=1.0))
    assert torch.allclose(1 - line.w, torch.tensor([0.06, 0.0, 0.08]))


def test_non_finite_loss_stops_before_the_update() -> None:
    line = Line()
    steps = run(line, [torch.ones(3), torch.tensor([1.0, torch.nan, 1.0]), torch.ones(3)])
    next(steps)
    kept = line.w.detach().clone()
    with pytest.raises(NonFiniteError, match="update 2: the loss is nan, because the batch's x is not finite"):
        next(steps)
    assert torch.equal(line.w, kept)


def test_a_spoilt_weight_is_named_and_an_overflow_called_so() -> None:
    line = Line()
    with torch.no_grad():
        line.quiet.fill_(torch.inf)
    with pytest.raises(NonFiniteError, match="because quiet is not finite"):
        list(run(line, [torch.ones(3)]))
    with pytest.raises(NonFiniteError, match="the forward pass overflowed"):
        list(run(Line(), [torch.full((3,), 3e38)]))


def test_non_finite_gradient_stops_before_the_update_and_is_named() -> None:
    line = Line()
    line.w.register_hook(lambda grad: torch.where(torch.arange(3) == 1, torch.inf, grad))
    with pytest.raises(NonFiniteError, match="gradient of w is not finite"):
        list(run(line, [torch.ones(3)], max_grad_norm=1.0))
    assert torch.equal(line.w, torch.ones(3))
    broken = Line()  # the naive loop goes on, and one bad element spoils what clipping touches: all of it
    broken.w.register_hook(lambda grad: torch.where(torch.arange(3) == 1, torch.inf, grad))
    broken({"x": torch.ones(3)}).total.backward()
    nn.utils.clip_grad_norm_(broken.parameters(), 1.0)
    torch.optim.SGD(broken.parameters(), lr=0.1).step()
    assert broken.w.isnan().any()


def test_an_update_that_the_scaler_skips_is_made_again_on_the_same_batch() -> None:
    class Skipping(torch.optim.SGD):
        """Skips its second step, as a loss scaler does at an overflow."""

        steps, step_was_skipped = 0, False

        def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
            self.steps += 1
            self.step_was_skipped = self.steps == 2
            if not self.step_was_skipped:
                super().step(closure)

    seen: list[float] = []
    line = Line()
    line.register_forward_pre_hook(lambda _, args: seen.append(float(args[0]["x"][0])))
    xs = [torch.full((3,), value) for value in (1.0, 2.0, 3.0)]
    optimizer = Skipping(line.parameters(), lr=0.1)
    updates = [[{"x": x}] for x in xs]
    reports = list(training_steps(line, updates, optimizer, accelerator=Accelerator(cpu=True)))
    assert [report.update for report in reports] == [1, 2, 3] and seen == [1.0, 2.0, 2.0, 3.0]
    torch.testing.assert_close(line.w.detach(), torch.full((3,), 1 - 0.1 * 6))


def test_learning_rates_follow_diffusers_schedule_and_go_on_after_a_resumption(tmp_path: Path) -> None:
    settings = replace(SMALL, max_train_samples=8, samples_per_update=1, lr_scheduler="cosine", lr_warmup_steps=2)

    def rates(update: int) -> float:
        return 5e-3 * (update / 2 if update < 2 else 0.5 * (1 + cos(pi * (update - 2) / 6)))

    with single_image_run(tiny_sd1(), pixels(), CAPTION, settings) as whole:
        found = []
        for report in whole.steps():
            found.append(report.learning_rates[0])
            if report.update == 3:
                whole.save_checkpoint(tmp_path)
        adapter = whole.adapter()
    assert found == pytest.approx([rates(update) for update in range(8)])
    with single_image_run(tiny_sd1(), pixels(), CAPTION, settings) as run:
        checkpoint = checkpoints.find(tmp_path, "latest")
        assert checkpoint is not None
        run.resume(checkpoint)
        assert [report.learning_rates[0] for report in run.steps()] == pytest.approx(found[3:])
        assert same(run.adapter(), adapter)
    longer = replace(settings, max_train_samples=16)  # whose first three updates had other rates: it was gone on from
    with (
        single_image_run(tiny_sd1(), pixels(), CAPTION, longer) as run,
        pytest.raises(UserError, match=r"made with a schedule of another length \(8, this run has 16\)"),
    ):
        run.resume(checkpoint)
