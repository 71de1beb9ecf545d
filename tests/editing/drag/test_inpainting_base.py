"""Inpainting models as bases: what they read beside the latents, what a drag draws with them, who refuses them."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from personalize.adapters.adapter import Adapter
from personalize.cli.main import main
from personalize.editing.drag.config import DragSettings
from personalize.editing.drag.image import drag_picture
from personalize.editing.drag.inpaint import cells_touching, fill_void, inpainting_inputs
from personalize.editing.editor import Editor
from personalize.errors import UserError
from personalize.models.stable_diffusion import StableDiffusion
from tests.support.drag_pictures import picture, square
from tests.support.lora_states import random_adapter
from tests.support.tiny import NAMES, tiny, tiny_inpainting_pipeline

SETTINGS = DragSettings(steps=4, strength=0.5)
POINTS = [(20, 24), (36, 28)]


@cache
def base(name: str = "sd1") -> StableDiffusion:
    return StableDiffusion.from_pipeline(tiny_inpainting_pipeline(name))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("inpainting") / "base"
    tiny_inpainting_pipeline("sd1").save_pretrained(place)
    return place


def read_by(model: StableDiffusion, what) -> torch.Tensor:
    """What the UNet's first convolution reads during the call `what`, one row for each prediction."""
    seen = []
    handle = model.unet.conv_in.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    try:
        what()
    finally:
        handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("name", NAMES)
def test_a_prediction_is_that_of_the_unet_with_mask_and_masked_picture_behind_the_latents(name):
    model, rng = base(name), torch.Generator().manual_seed(0)
    latents, known = torch.randn(2, 4, 16, 16, generator=rng), torch.randn(1, 4, 16, 16, generator=rng)
    void, prompted = torch.eye(16, dtype=torch.bool), model.prompts(["a cat", "a dog"])
    extra = None if prompted.pooled is None else {"text_embeds": prompted.pooled, "time_ids": prompted.time_ids}
    joined = torch.cat([latents, void.float().expand(2, 1, 16, 16), known.expand(2, 4, 16, 16)], 1)
    expected = model.unet(joined, torch.tensor(9), prompted.embeds, added_cond_kwargs=extra).sample
    with inpainting_inputs(model, void, known):
        torch.testing.assert_close(model.predict(latents, 9, prompted), expected)
    with pytest.raises(UserError, match="inpainting model .9 input channels., which only drags take"):
        model.predict(latents, 9, prompted)
    with pytest.raises(RuntimeError), inpainting_inputs(model, void, known):
        raise RuntimeError
    assert model.masked_picture is None


@pytest.mark.parametrize("name", NAMES)
def test_a_drag_reads_the_whole_picture_once_and_then_the_masked_one(name):
    model = base(name)
    results = []
    rows = read_by(model, lambda: results.append(
        drag_picture(model, picture(), POINTS, mask=square(), settings=SETTINGS)
    ))  # fmt: skip
    first, rest = rows[0], rows[1:]
    assert first[4].abs().max() == 0, "attention is read of a picture without a void"
    drag = results[0].preview.drag
    free = cells_touching(drag.void, (16, 16))
    assert len(rest) == 2 and torch.equal(rest[:, 4], free.float().expand(2, 16, 16))
    grey = torch.where(free.repeat_interleave(4, 0).repeat_interleave(4, 1), 0.0, drag.pixels)
    torch.testing.assert_close(rest[:, 5:], model.encode(grey[None]).expand(2, 4, 16, 16))
    image, source = np.asarray(results[0].image), np.asarray(picture())
    untouched = ~np.asarray(drag.mask | drag.covered | drag.void)
    assert np.array_equal(image[untouched], source[untouched])


def test_what_is_filled_depends_on_what_is_known_around_it_not_on_what_the_void_held():
    """From pure noise and without attention hooks a text-to-image UNet would see neither."""
    model, settings = base(), DragSettings(steps=2, strength=1.0, protect=False, fill_keys="all")
    void = torch.zeros(64, 64, dtype=torch.bool)
    void[16:40, 16:40] = True
    pixels = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def filled(pixels):
        rows = read_by(model, lambda: fill_void(model, pixels, void, void, None, settings))  # pyright: ignore
        return rows[0, 5:]

    same_outside = torch.where(void, torch.zeros(()), pixels)
    other_outside = torch.where(void, pixels, -pixels)
    torch.testing.assert_close(filled(pixels), filled(same_outside))
    assert (filled(pixels) - filled(other_outside)).abs().mean() > 0.05


def test_an_adapter_of_the_base_that_the_inpainting_model_was_made_of_is_taken(tmp_path):
    text_to_image, model = tiny("sd1"), base()
    adapter = Adapter.load(random_adapter(text_to_image).save(tmp_path / "adapter"))
    assert model.identity["sha256"] != text_to_image.identity["sha256"]
    editor = Editor(model, adapter)
    plain = Editor(model).drag(POINTS, picture(), mask=square(), settings=SETTINGS)
    with_adapter = editor.drag(POINTS, picture(), mask=square(), settings=SETTINGS)
    assert plain.image.tobytes() != with_adapter.image.tobytes()


def test_a_folder_is_loaded_for_drags_alone_and_refused_before_its_weights_are_read(folder, monkeypatch):
    model = StableDiffusion.load(folder, device="cpu", inpainting=True)
    assert model.inpainting and model.identity["sha256"] == base().identity["sha256"]
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "away")
    try:
        with pytest.raises(UserError, match="inpainting model") as caught:
            StableDiffusion.load(folder, device="cpu")
    finally:
        (folder / "away").rename(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert "\n" not in str(caught.value)


def test_the_command_drags_with_it(folder, tmp_path, capsys):
    for name, image in (("photo.png", picture()), ("mask.png", square())):
        image.save(tmp_path / name)
    words = ["--from", "20,24", "--to", "36,28", "--mask", "mask.png", "--num_inference_steps", "2"]
    words = [str(tmp_path / word) if word.endswith(".png") else word for word in words]
    options = ["--pretrained_model_name_or_path", str(folder), "--output_dir", str(tmp_path / "out")]
    assert main(["drag", str(tmp_path / "photo.png"), *words, *options]) == 0
    assert (tmp_path / "out" / "dragged.png").is_file()
    assert main(["drag", str(tmp_path / "photo.png"), *words, *options, "--method", "latents"]) == 2
    assert "inverts pictures, which inpainting models cannot" in capsys.readouterr().err


@pytest.mark.parametrize("command", [
    "edit ADAPTER --prompt x", "edit PHOTO --source cat --swap cat=dog", "train single_image PHOTO --caption x",
    "train multi_concept PHOTO --concepts CONCEPT", "quickstart", "export checkpoint ADAPTER --output OUT",
    "verify ADAPTER",
])  # fmt: skip
def test_every_other_command_refuses_it_in_one_line(command, folder, tmp_path, capsys):
    picture().save(tmp_path / "photo.png")
    random_adapter(tiny("sd1")).save(tmp_path / "adapter")
    places = {"PHOTO": "photo.png", "ADAPTER": "adapter", "OUT": "out.safetensors"}
    words = [str(tmp_path / places[word]) if word in places else word for word in command.split()]
    words = ["<cat1> cat" if word == "CONCEPT" else word for word in words]
    option = "--base" if words[0] == "verify" else "--pretrained_model_name_or_path"
    assert main([*words, option, str(folder)]) == 2
    text = capsys.readouterr().err
    assert "inpainting model (9 input channels), which only drags take" in text, text
    assert text.count("\n") == 1
