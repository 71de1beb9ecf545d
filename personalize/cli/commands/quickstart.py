"""`personalize quickstart`: train on one picture, save and verify the adapter, edit, and show all on one sheet."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from PIL import Image

from personalize.cli.launch import presets
from personalize.cli.parser import read_yaml
from personalize.cli.terminal import PlainConsole
from personalize.editing.config import EditStrengths, Sampling
from personalize.editing.editor import Editor
from personalize.embedded.samples import SampleEdit, SampleImage, bundled
from personalize.errors import said_if_stopped, typed
from personalize.io.figures import grid, png
from personalize.io.image_files import load_image
from personalize.io.image_folders import only_picture
from personalize.io.images import psnr, to_image, to_pixels
from personalize.io.numbering import add_files
from personalize.io.provenance import GENERATED
from personalize.models.stable_diffusion import StableDiffusion
from personalize.training.config import SingleImageConfig
from personalize.training.data.buckets import FittedImage, fit
from personalize.training.data.captions import find_caption
from personalize.training.saving import save_trained
from personalize.training.single_image import single_image_run

if TYPE_CHECKING:
    from personalize.cli.options import QuickstartConfig

SHEET = "sheet.png"  # in the output folder
MIN_ROUND_TRIP = 24.0  # dB PSNR: below it the base's autoencoder cannot represent the picture
VARIANTS = {  # one keeps more of the picture, one follows the prompt more: see tests/bench/results/quickstart.md
    "all that was learned": EditStrengths(1.0, 1.2),
    "half of the decoder forgotten": EditStrengths(1.0, 1.2, forget="decoder=0.5"),
}
CHOSEN = "strengths chosen for each edit, as --auto does"  # a row of the embedded model's sheet, for it has a scorer
BUDGET = 4  # pictures to choose from, for each edit: see tests/bench/results/quickstart.md
# the place that a caption ends with, as "in the park" or "on a blue background"
PLACE = re.compile(r"\s+(in|on|at|against|under|near)\s+(the|a|an|my|our|his|her|their)\s[^.,]*[.]?$", re.IGNORECASE)
SAMPLING = Sampling(15, "dpm++_2m")  # as good on the five bundled scenes as 25 steps of DDIM


@dataclass(frozen=True)
class Outcome:
    """All pictures of a quickstart; tensors are pixels (1, 3, H, W).

    picture: the picture, whole, in its training size.  round_trip: it, encoded and decoded by the VAE.
    replay: the adapter's reconstruction.
    base: a sample of the base model for the caption.
    edits: for each of `VARIANTS`, and for `CHOSEN` on the embedded model, a picture for each edit prompt.
    chosen: the strengths of the pictures of `CHOSEN`, by prompt.
    """

    picture: FittedImage
    round_trip: torch.Tensor
    replay: torch.Tensor
    base: torch.Tensor
    edits: dict[str, list[Image.Image]]
    chosen: dict[str, EditStrengths] = field(default_factory=dict)

    @property
    def source(self) -> torch.Tensor:
        return self.picture.pixels

    def likeness(self, a: torch.Tensor, b: torch.Tensor | None = None) -> float:
        """The PSNR of two of these pictures, by default to the source, in dB; the padding does not count."""
        return psnr(self.picture.own_part(a), self.picture.own_part(self.source if b is None else b))

    def singles(self) -> dict[str, Image.Image]:
        """The sheet's pictures by name; the edits of all rows are numbered from 000."""
        edits = enumerate(picture for row in self.edits.values() for picture in row)
        named = {"source": self.source, "replay": self.replay, "base": self.base}
        return {name: to_image(one) for name, one in named.items()} | {f"edit-{k:03d}": one for k, one in edits}


@said_if_stopped("stopped: the same command begins anew, in the same folder")
def run(config: QuickstartConfig) -> Path:
    """Train, save, verify, edit, write the sheet, and print the results; returns the output folder."""
    console, started = PlainConsole(soft_wrap=True), time.monotonic()
    example = bundled(config.scene) if config.photo is None else own_example(config.photo, config.caption)
    model = StableDiffusion.load(config.pretrained_model_name_or_path)
    picture = fit(example.picture, None, model.resolution, 8 * model.factor)
    round_trip = model.decode(model.encode(picture.pixels)).cpu()
    ceiling = psnr(picture.own_part(round_trip), picture.own_part(picture.pixels))
    embedded = config.pretrained_model_name_or_path is None  # its pictures alone have a scorer in the package
    report_round_trip(console, ceiling, embedded=embedded)
    begun = time.monotonic()
    training = training_config(config)
    with single_image_run(model, [picture], example.caption, training, accelerator=accelerator(model)) as run:
        console.print(f"Learning “{example.caption}”, {run.updates} updates.")
        for _ in run.steps():
            pass
        adapter = run.adapter()
    seconds = time.monotonic() - begun
    outcome = sample_outcome(Editor(model, adapter), example, picture, round_trip, config.seed, choose=embedded)
    pictures = {"source": to_image(outcome.source), "reconstruction": to_image(outcome.replay)}
    figures = {"autoencoder_db": ceiling, "reconstruction_db": outcome.likeness(outcome.replay)}
    adapter = replace(adapter, info={**adapter.info, **{name: round(value, 2) for name, value in figures.items()}})
    folder = save_trained(adapter, config.output_dir / "adapter", pictures=pictures)
    files = {SHEET: png(sheet(outcome, example), GENERATED)}
    for name, one in outcome.singles().items():
        files[f"pictures/{name}.png"] = png(one, None if name == "source" else GENERATED)
    written = add_files(config.output_dir, files)  # the folder may hold pictures of the user's own, the learned one too
    report(console, outcome, example, folder, config.output_dir / written[SHEET])
    console.print(f"Learned in {seconds:.0f} s; {time.monotonic() - started:.0f} s in all.")
    return config.output_dir


def own_example(photo: Path, caption: str | None) -> SampleImage:
    """The user's picture, with edits that suit any caption: other places than the one that it may end with."""
    path = only_picture(photo)
    caption = find_caption(path, caption)
    places = ("on the beach", "in the snow", "on a red background")
    changes = tuple(SampleEdit("background", f"{PLACE.sub('', caption)} {place}") for place in places)
    return SampleImage(load_image(path), caption, changes)


def training_config(config: QuickstartConfig) -> SingleImageConfig:
    """The embedded model's preset, or on another base the defaults, with the command's seed and number of updates."""
    embedded = config.pretrained_model_name_or_path is None
    values: dict[str, Any] = read_yaml(presets("single_image")["embedded"], SingleImageConfig) if embedded else {}
    values["seed"] = config.seed
    chosen = SingleImageConfig(**values)
    if config.max_train_steps is None:
        return chosen
    return replace(chosen, max_train_samples=config.max_train_steps * chosen.update_samples())


def accelerator(model: StableDiffusion) -> Accelerator:
    """An Accelerator in bf16 if the processor has bf16 products, which takes two thirds of the time; else in fp32."""
    on_cpu = model.device.type == "cpu"
    bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported() if on_cpu else model.dtype == torch.bfloat16
    return Accelerator(cpu=on_cpu, mixed_precision="bf16" if bf16 else "no")


def report_round_trip(console: PlainConsole, ceiling: float, *, embedded: bool) -> None:
    """Print the PSNR of the autoencoder's round trip, and below `MIN_ROUND_TRIP` what to do."""
    console.print(f"Autoencoder round trip: {ceiling:.1f} dB.")
    if ceiling < MIN_ROUND_TRIP:
        which = "the embedded model, which was trained on emoji art only," if embedded else "this base model"
        console.print(
            f"That is below {MIN_ROUND_TRIP:g} dB: {which} cannot represent this picture, whatever is learned. "
            "Name a real base: --pretrained_model_name_or_path FOLDER, a .safetensors checkpoint or a hub id."
        )


def sample_outcome(
    editor: Editor, example: SampleImage, picture: FittedImage, round_trip: torch.Tensor, seed: int, *, choose: bool
) -> Outcome:
    """Sample all pictures of the sheet from the noise of `seed`; those to choose from, of the seeds from `seed` on."""
    with editor:
        replay = to_pixels(editor.reconstruct(seeds=[seed], sampling=SAMPLING)[0])
        base = to_pixels(editor.base(example.caption, seeds=[seed], sampling=SAMPLING)[0])
        edits = {
            name: [editor.edit(one.prompt, setting, seeds=[seed], sampling=SAMPLING)[0] for one in example.edits]
            for name, setting in VARIANTS.items()
        }
        found = {}
        if choose:
            source = to_image(picture.pixels)
            found = {
                one.prompt: editor.choose(one.prompt, source, budget=BUDGET, seed=seed, sampling=SAMPLING)[0]
                for one in example.edits
            }
            edits[CHOSEN] = [best.picture for best in found.values()]
    chosen = {prompt: best.strengths for prompt, best in found.items()}
    return Outcome(picture, round_trip, replay, base, edits, chosen)


def sheet(outcome: Outcome, example: SampleImage) -> Image.Image:
    """The labelled contact sheet: source, reconstruction and base model, and below them a row for each variant."""
    top = [to_image(outcome.source), to_image(outcome.replay), to_image(outcome.base)]
    head = grid(
        [top],
        columns=["source", "reconstructed by the adapter", "the base model alone"],
        labels=["learned"],
        title=example.caption,
    )
    prompts = [change.prompt for change in example.edits]
    body = grid(list(outcome.edits.values()), columns=prompts, labels=list(outcome.edits))
    page = Image.new("RGB", (max(head.width, body.width), head.height + body.height), (255, 255, 255))
    page.paste(head, (0, 0))
    page.paste(body, (0, head.height))
    return page


def report(console: PlainConsole, outcome: Outcome, example: SampleImage, folder: Path, sheet_path: Path) -> None:
    """Print the PSNR values, where the files are, and what to try next."""
    ceiling, replay, base = (outcome.likeness(p) for p in (outcome.round_trip, outcome.replay, outcome.base))
    console.print(f"Reconstruction: {replay:.1f} dB (autoencoder ceiling {ceiling:.1f}, base model alone {base:.1f}).")
    for name, pictures in outcome.edits.items():
        values = [outcome.likeness(to_pixels(picture), outcome.replay) for picture in pictures]
        console.print(f"Edits to reconstruction, {name}: " + ", ".join(f"{value:.1f} dB" for value in values))
    for prompt, strengths in outcome.chosen.items():
        console.print(f"Chosen for “{prompt}”: {strengths}")
    console.print(f"Adapter, verified: {folder}\nContact sheet:     {sheet_path}")
    console.print("Next, try:", style="bold")
    edit = typed("personalize", "edit", folder, "--prompt", example.edits[0].prompt)
    console.print(f"  {edit} --beta 0.8 1.2 1.6 --num_images 4")
    console.print('  personalize quickstart YOUR_PICTURE.png --caption "what it shows"')
