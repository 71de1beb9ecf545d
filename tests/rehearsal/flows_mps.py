"""A Mac's GPU: no float64, no generators of other devices, no fused optimisers that were not asked for."""

from dataclasses import replace

import pytest
import torch

from personalize.editing.config import DynamicSettings, Sampling, UniformSettings
from personalize.editing.drag.config import DragSettings
from personalize.editing.drag.image import drag_picture
from personalize.editing.editor import Editor
from personalize.sampling.config import SCHEDULERS
from personalize.sampling.inversion import METHODS
from tests.rehearsal.flows_editing import ON_BEACH
from tests.rehearsal.flows_training import KINDS
from tests.rehearsal.support import apart, base, concepts, edited, learned, mask, on_cpu, photo
from tests.support.runs import SMALL


def flow_the_device_refuses_what_mps_refuses():
    with pytest.raises(TypeError, match="float64"):
        torch.zeros(2, device="mps").double()
    with pytest.raises(RuntimeError, match="Expected a 'mps' device type for generator"):
        torch.randn(2, device="mps", generator=torch.Generator())
    with pytest.raises(RuntimeError, match="same device"):
        torch.zeros(2, device="mps") + torch.zeros(2)


@pytest.mark.parametrize("kind", KINDS)
def flow_learn(kind):
    config = replace(SMALL, **KINDS[kind])
    assert learned(base(), config)[0] == pytest.approx(on_cpu(learned, "sd1", config)[0], rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"full_kv": True}, {"mask_weight": 0.1}], ids=str)
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def flow_concepts(name, settings):
    ours, theirs = (concepts(base(name, device), **settings) for device in ("mps", "cpu"))
    assert ours[0] == pytest.approx(theirs[0], rel=1e-4) and set(ours[1].lora) == set(theirs[1].lora)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def flow_schedulers(scheduler):
    adapter, sampling = on_cpu(learned)[1], Sampling(steps=4, scheduler=scheduler)
    ours, theirs = (Editor(base(device=device), adapter).edit("a dog", sampling=sampling) for device in ("mps", "cpu"))
    assert apart(ours[0], theirs[0]) < 0.5


@pytest.mark.parametrize("method", METHODS)
def flow_photo(method):
    request = ON_BEACH if method == "none" else None
    assert apart(edited(base(), method, request), on_cpu(edited, "sd1", method, request)) < 2


METHODS_OF_PHOTOS = ({"dynamic": DynamicSettings()}, {"uniform": UniformSettings()}, {"controller": "mutual"})


@pytest.mark.parametrize("settings", METHODS_OF_PHOTOS, ids=lambda settings: next(iter(settings)))
def flow_photo_methods(settings):
    request = None if "dynamic" in settings else ON_BEACH
    ours, theirs = (edited(base(device=device), request=request, **settings) for device in ("mps", "cpu"))
    assert apart(ours, theirs) < 2


@pytest.mark.parametrize("method", ["pixels", "latents"])
def flow_drag(method):
    settings = DragSettings(method=method, steps=4)
    assert drag_picture(base(), photo(), [(20, 24), (36, 28)], mask=mask(), settings=settings).image.size == (64, 64)
