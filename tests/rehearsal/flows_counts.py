"""How often the host waits for the device, held to what reports and decisions need.

Each job is recorded with two numbers of updates or steps: what they differ by is the cost of one more, whatever the
beginning and the end cost.
"""

from dataclasses import replace

import pytest
import torch

from personalize.editing.config import DynamicSettings, UniformSettings
from personalize.editing.drag.attention import QKVRecorder
from personalize.editing.editor import Editor
from personalize.editing.photo_settings import PhotoSettings
from personalize.editing.real_image import edit_photo
from personalize.editing.real_image_settings import EditRequest
from personalize.models.stable_diffusion import Conditioning, StableDiffusion
from personalize.sampling.config import SCHEDULERS, NullTextSettings
from personalize.sampling.denoise import Edit, sample
from personalize.sampling.schedule import make_schedule
from personalize.training.batched_adapters import learn_batched
from personalize.training.config import MultiConceptConfig
from personalize.training.data.concepts import ConceptPicture
from personalize.training.multi_concept import multi_concept_run
from personalize.training.single_image import single_image_run
from tests.rehearsal.record import blocking, table
from tests.rehearsal.support import CAPTION, SUBJECTS, base, class_image, dragged, learned, photo
from tests.support.runs import SMALL, pixels

SWAP = EditRequest("a photo of a dog on the beach", local=[("cat", "dog")], weights={"dog": 2.0})
ON_BEACH = EditRequest("a photo of a dog on the beach")
OTHER_SCHEDULERS = {  # which are not offered
    "lcm": ("LCMScheduler", {}), "tcd": ("TCDScheduler", {}), "deis": ("DEISMultistepScheduler", {}),
    "dpm++_s": ("DPMSolverSinglestepScheduler", {}), "kdpm2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "unipc_3": ("UniPCMultistepScheduler", {"solver_order": 3}), "sa": ("SASolverScheduler", {}),
}  # fmt: skip


def each(record, job, few=2, many=4):
    """The events for which the host waits, for each further step of `job(count)`, with their places."""
    found = []
    job(few)  # constants are copied to the device once in a process
    for count in (few, many):
        with record.of() as events:
            job(count)
        found.append(blocking(events))
    more = record.counts[record.flow] = (len(found[1]) - len(found[0])) / (many - few)
    print(f"{more:g} a step: {few} steps\n{table(found[0])}\n{many} steps\n{table(found[1])}")
    return more


def _updates(run):
    for _ in run.steps():
        pass


@pytest.mark.parametrize(
    "changes",
    [{}, {"max_grad_norm": 1.0, "snr_gamma": 5.0}, {"resample_latents": True}, {"proportion_empty_prompts": 0.5},
     {"min_rank": 1}, {"gradient_checkpointing": True}, {"lr_scheduler": "cosine"}, {"train_text_encoder": True},
     {"orthogonal_start": True}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def flow_single_image(record, changes, name):
    def job(updates):
        config = replace(SMALL, max_train_samples=2 * updates, samples_per_update=2, **changes)
        with single_image_run(base(name), pixels(), CAPTION, config) as run:
            _updates(run)

    assert each(record, job) == 0


def flow_single_image_with_class_pictures(record):
    def job(updates):
        config = replace(SMALL, max_train_samples=updates)
        with single_image_run(base(), pixels(), CAPTION, config, class_images=(class_image(),)) as run:
            _updates(run)

    assert each(record, job) == 0


def flow_a_shown_loss_is_one_read(record):
    def job(updates):
        with single_image_run(base(), pixels(), CAPTION, replace(SMALL, max_train_samples=updates)) as run:
            for report in run.steps():
                report.values()

    assert each(record, job) == 1


def flow_graph(record):
    """The flag by which the run stops is read after each update."""

    def job(updates):
        config = replace(SMALL, max_train_samples=updates, cuda_graph=True)
        with single_image_run(base(), pixels(), CAPTION, config) as run:
            _updates(run)

    assert each(record, job, 5, 8) <= 1


def flow_several_adapters(record):
    def job(updates):
        pair = [(pixels(), CAPTION), (pixels().flip(-1), "a red dog")]
        learn_batched(base(), pair, replace(SMALL, max_train_samples=updates))

    assert each(record, job) == 0


@pytest.mark.parametrize("masks", [(), (photo(7, 72).convert("L"), photo(8, 72).convert("L"))], ids=["plain", "masks"])
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def flow_several_concepts(record, name, masks):
    def job(updates):
        config = MultiConceptConfig(rank=2, max_train_steps=updates, samples_per_update=2)
        with multi_concept_run(base(name), ConceptPicture(photo(1, 72), SUBJECTS, "", masks), config) as run:
            _updates(run)

    assert each(record, job) == 0


def drawn_latents(model, scheduler, steps):
    prompt: Conditioning = model.prompts(["a dog"])
    return sample(model, Edit(prompt, None, 7.5), [0, 1], make_schedule(model, steps, scheduler), (64, 64)).cpu()


@pytest.mark.parametrize("scheduler", [*SCHEDULERS, *OTHER_SCHEDULERS])
@pytest.mark.parametrize("name", ["sd1", "sd2v", "sdxl"])
def flow_denoising(record, name, scheduler, monkeypatch):
    """With any scheduler of diffusers."""
    monkeypatch.setitem(SCHEDULERS, scheduler, (SCHEDULERS | OTHER_SCHEDULERS)[scheduler])
    model = base(name)
    assert each(record, lambda steps: drawn_latents(model, scheduler, steps)) == 0


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", ["sd1", "sd2v"])
def flow_schedulers_compute_the_same(name, scheduler, monkeypatch):
    """From equal predictions, the latents of the CPU bit for bit, though single numbers stay on the host."""
    monkeypatch.setattr(StableDiffusion, "predict", lambda self, latents, timestep, conditioning: 0.3 * latents.sin())
    assert torch.equal(drawn_latents(base(name), scheduler, 5), drawn_latents(base(name, "cpu"), scheduler, 5))


def _photo(record, limit, request=SWAP, name="sd1", **settings):
    model = base(name)

    def job(steps):
        chosen = PhotoSettings(steps=steps, **settings)
        edit_photo(model, photo(), "a photo of a cat on the beach", request, chosen)

    assert each(record, job, 4, 8) <= limit


@pytest.mark.parametrize("method", ["direct", "ddim", "negative", "ddpm", "none"])
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def flow_prompt_to_prompt(record, name, method):
    _photo(record, 0, name=name, inversion=method)


@pytest.mark.parametrize("tolerance, reads", [(1e-12, 2), (0.0, 0)])
def flow_null_text(record, tolerance, reads):
    """A read of the loss before each of two updates, if it can decide that the update is not made."""
    fitted = NullTextSettings(iterations=2, tolerance=tolerance, growth=0.0)
    _photo(record, reads, inversion="null-text", null_text=fitted)


def flow_dynamic_prompts(record):
    """A read of the losses before each of at most two updates, which decides whether it is made."""
    _photo(record, 2, dynamic=DynamicSettings(updates=2))


def flow_uniform_maps(record):
    _photo(record, 0, request=ON_BEACH, uniform=UniformSettings(until=1.0))


def flow_a_region_of_the_user(record):
    _photo(record, 0, request=replace(SWAP, mask=(8, 8, 40, 40)))


def flow_mutual_self_attention(record):
    _photo(record, 0, request=ON_BEACH, controller="mutual")


DRAGS = [
    {"method": "pixels"}, {"method": "pixels", "fill": "attention", "fill_keys": "all"}, {"method": "latents"},
    {"method": "latents", "mode": "deform", "fill": "attention", "kv": "concat", "user_mask": "intersect"},
]  # fmt: skip


@pytest.mark.parametrize("settings", DRAGS, ids=lambda one: "-".join(one.values()))
def flow_drag(record, settings):
    model = base()
    assert each(record, lambda steps: dragged(model, steps, **settings), 4, 8) == 0


@pytest.mark.parametrize("settings", DRAGS[2:], ids=lambda one: "-".join(one.values()))
def flow_drag_where_the_device_has_no_room(monkeypatch, settings):
    """What is recorded during the inversion then is on the CPU; the picture is the same."""
    model, kept = base(), []
    roomy = dragged(model, **settings)
    recorded = QKVRecorder._copied
    monkeypatch.setattr(QKVRecorder, "_copied", lambda self, part: kept.append(recorded(self, part)) or kept[-1])
    monkeypatch.setattr("personalize.editing.drag.attention.free_bytes", lambda device: 1000)
    assert roomy.tobytes() == dragged(model, **settings).tobytes()
    assert {part.device.type for part in kept} == {"cpu"}


def flow_editor_copies_an_adapter_once(record):
    """Outside `with Editor` too: no copy for each module, and no hash of the base in each call."""
    model = base()
    editor = Editor(model, learned(model)[1])
    from tests.rehearsal.support import STEPS

    editor.edit("a dog", sampling=STEPS)
    with record.of() as events:
        editor.edit("a dog", sampling=STEPS)
    print(table(blocking(events)))
    assert len(blocking(events)) < 16  # the prompt's and the picture's own; there are 104 modules
    assert not [event for event in events if "identity" in event.place]
