"""The options of every command besides `train` and `export`, and the function that runs each.

This module imports no torch, so that a command line is checked before torch is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from personalize.cli.checks import check_files, check_output, check_quickstart, check_studio
from personalize.cli.drag_options import DragConfig
from personalize.cli.edit_options import EditConfig, EditTableConfig, PhotoConfig
from personalize.errors import UserError
from personalize.io.image_metadata import IMAGE_SUFFIXES
from personalize.io.numbering import unused_folder
from personalize.io.output_folder import check_output_folder
from personalize.models.config import check_base_name


@dataclass(frozen=True)
class QuickstartConfig:
    """Train on one picture, save and verify the adapter, edit, and show all on one sheet; nothing is downloaded."""

    photo: Positional[Path | None] = None
    """Your picture; by default a bundled scene in an art style that the embedded model has never seen."""
    caption: str | None = None
    """What the picture shows, e.g. "a cat on the beach"; by default read from a .txt beside it."""
    output_dir: Path = field(default_factory=lambda: unused_folder("personalize-quickstart", "sheet.png"))
    """Folder for the adapter, the pictures and the contact sheet; by default one without a sheet."""
    scene: int = 0
    """Number of the bundled scene, from 0."""
    seed: int = 0
    """Seed of training and of the pictures."""
    max_train_steps: int | None = None
    """Optimiser updates; by default the embedded model's preset."""
    pretrained_model_name_or_path: str | None = None
    """Base model: a diffusers folder, hub id or single-file checkpoint; by default the one in the package."""

    def check(self) -> None:
        if self.pretrained_model_name_or_path is not None:
            check_base_name(self.pretrained_model_name_or_path)
        check_quickstart(self)


@dataclass(frozen=True)
class InspectConfig:
    """Show what a LoRA or embedding file is, what it changes, which programs read it, and what is wrong with it."""

    file: Positional[Path]
    """LoRA or textual-inversion file of any program, or a folder of such files: one line for each."""
    json: bool = False
    """Print everything as JSON."""
    picture: Path | None = None
    """Write a chart of the changed blocks, and by how much, to this .png file, which must not exist yet."""
    allow_pickle: bool = False
    """Read the tensors (and nothing else) of a .pt, .bin or .ckpt file; without it, pickles are refused."""

    def check(self) -> None:
        check_files(self.file)
        if self.picture is not None and self.file.suffix.lower() in IMAGE_SUFFIXES:
            raise UserError(f"{self.file} is a picture, --picture draws what an adapter changes: leave it out")
        if self.picture is not None:
            check_output(self.picture)


Family = Literal["sd1", "sd2", "sdxl", "flux1", "flux2", "z-image", "qwen-image", "krea2", "anima", "sd3", "chroma"]


@dataclass(frozen=True)
class ConvertConfig:
    """Convert a LoRA or embedding file for other programs, correct its keys, alphas and ranks, and verify the result.

    Alphas that differ are multiplied into the weights and ranks are padded, so that all programs compute the same.
    """

    file: Positional[Path]
    """LoRA or textual-inversion file of any program, or a folder of PEFT."""
    to: Literal["diffusers", "kohya", "peft"]
    """diffusers; kohya for A1111, Forge, ComfyUI, InvokeAI and sd-scripts; peft for PEFT's own folders."""
    output: Path
    """File to write, ending in .safetensors; with `--to peft` a folder.  Must not exist yet."""
    overwrite: bool = False
    """Replace an output that exists."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the numbers written."""
    family: Family | None = None
    """Family of the base model, if the file does not say it."""
    rank: int | None = None
    """A lower rank, reached by SVD; the relative error is printed."""
    unet_only: bool = False
    """Leave out the part for the text encoders."""
    token: str | None = None
    """Word for a learned token, e.g. `<my-cat>`; by default the file's own or its name."""
    allow_pickle: bool = False
    """Read the tensors (and nothing else) of a .pt, .bin or .ckpt file; without it, pickles are refused."""

    def check(self) -> None:
        check_files(self.file)


@dataclass(frozen=True)
class VerifyConfig:
    """Verify an adapter: compute every weight change from its files, through independent key names, and compare.

    Exits with 1 if something does not match, with 2 if the input cannot be read.
    """

    path: Positional[Path]
    """Adapter folder, or one LoRA file (.safetensors) of any origin."""
    base: str | None = None
    """Base model to check the names and shapes against; by default the one named in the adapter."""
    on_base: Literal["fp8", "nf4", "int8"] | None = None
    """Say how much of each weight change survives being merged into the base in this precision."""
    picture: Path | None = None
    """With `--on_base`: a chart of what survives in each block, as a .png file, which must not exist yet."""
    json: bool = False
    """With `--on_base`: print what survives of every module as JSON."""

    def check(self) -> None:
        check_files(self.path)
        if self.picture is not None:
            check_output(self.picture)
        if self.on_base is None and (self.picture is not None or self.json):
            raise UserError(
                "--picture and --json show what survives on a quantized base: add --on_base fp8, nf4 or int8"
            )


@dataclass(frozen=True)
class EvaluateConfig:
    """Score edited pictures as PIE-Bench does: background, structure, agreement with the prompt; drags as DragBench.

    The benchmark is a folder of PIE-Bench (mapping_file.json), TEdBench (input_list.json) or DragBench
    (original_image.png in each folder).  Nothing is downloaded unless you name a hub id; scores left out are reported.
    """

    benchmark: Positional[Path]
    """Folder of the benchmark."""
    results: Path
    """Folder of the edited pictures, named like the benchmark's own."""
    run: str | None = None
    """First make the results that are missing, with options of `personalize edit PHOTO` (of `personalize drag` for
    DragBench) that decide the pictures, e.g. --run="--inversion direct --num_inference_steps 50"; an empty text takes
    the defaults."""
    output: Path | None = None
    """File for all values and the summary, which must not exist yet; by default evaluation.json, numbered if taken."""
    structure_model: str | None = None
    """Structure distance: folder or hub id of a DINO ViT, published with facebook/dino-vitb8."""
    clip_model: str | None = None
    """CLIP scores: folder or hub id, published with openai/clip-vit-large-patch14."""
    lpips_backbone: Path | None = None
    """LPIPS: file of torchvision's squeezenet1_1 weights."""
    lpips_net: Literal["squeeze", "alex", "vgg"] = "squeeze"
    """LPIPS network: squeeze as in PIE-Bench, alex as in DragBench; torchvision downloads the weights of the others."""
    point_model: str | None = None
    """DragBench's mean distance: base model whose features find the points, published with Stable Diffusion 2.1."""
    allow_pickle: bool = False
    """Read arrays and plain values of DragBench's meta_data.pkl; without it, pickles are refused."""
    cpu: bool = False
    """Run on the CPU even if there is an accelerator."""

    def check(self) -> None:
        check_files(self.benchmark, *(() if self.run is not None else (self.results,)))
        if self.output is None:
            check_output_folder(Path())
        else:
            check_output(self.output)
        if self.run is not None:
            check_output_folder(self.results)


@dataclass(frozen=True)
class StudioConfig:
    """Learn, edit, drag and convert in a browser: a page on this machine, for the folder it is started in.

    It reads and writes only in this folder, and loads nothing from elsewhere.  At another address than the machine's
    own, --auth or the token that is printed is asked for.
    """

    start: Positional[Path | None] = None
    """Adapter folder or picture to begin with, in this folder."""
    base: str | None = None
    """Base: a diffusers folder, hub id or single-file checkpoint; by default the adapter's own, or the package's."""
    port: int | None = None
    """Port; by default the first free one from 7860."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 is all of this machine's, for others in its network."""
    auth: str | None = None
    """user:password that the page asks for."""
    open: bool = True
    """Open the page in the browser."""

    def check(self) -> None:
        check_studio(self)


@dataclass(frozen=True)
class DoctorConfig:
    """Say what is installed and what is missing: versions, devices, memory, and folders that can be written.

    Exits with 1 if something keeps this installation from working, and says what to do.
    """

    json: bool = False
    """Print everything as JSON."""


EDIT_PHOTO = "edit PHOTO"  # the command that `edit` means for a picture, or with --source
EDIT_TABLE = "edit TABLE"  # the command that `edit` means for a .csv file
COMMANDS = {  # name: (options, "module:function" that is called with them)
    "edit": (EditConfig, "personalize.cli.commands.edit:run"),
    EDIT_PHOTO: (PhotoConfig, "personalize.cli.commands.edit_image:run"),
    EDIT_TABLE: (EditTableConfig, "personalize.cli.commands.edit_table:run"),
    "drag": (DragConfig, "personalize.cli.commands.drag:run"),
    "quickstart": (QuickstartConfig, "personalize.cli.commands.quickstart:run"),
    "inspect": (InspectConfig, "personalize.cli.commands.inspect:run"),
    "convert": (ConvertConfig, "personalize.cli.commands.convert:run"),
    "verify": (VerifyConfig, "personalize.cli.commands.verify:run"),
    "evaluate": (EvaluateConfig, "personalize.cli.commands.evaluate:run"),
    "studio": (StudioConfig, "personalize.studio.server:run"),
    "doctor": (DoctorConfig, "personalize.cli.commands.doctor:run"),
}


def resolve_command(command: str, words: Sequence[str]) -> str:
    """The name in COMMANDS that `command` means.

    `edit` with a .csv file means `edit TABLE`, with a picture file or with --source `edit PHOTO`.
    """
    pairs = list(zip(("", *words), words, strict=False))
    switches = {field.name for field in fields(EditTableConfig) if field.type == "bool"}
    free = (
        word for before, word in pairs
        if not before.startswith("--") or before[2:].replace("-", "_").removeprefix("no_") in switches
    )  # fmt: skip
    if command == "edit" and any(word.lower().endswith(".csv") and not word.startswith("--") for word in free):
        return EDIT_TABLE
    # their values are no photo, whatever they are called
    others = ("__source_image", "__output_dir", "__from", "__prompt", "__negative_prompt")
    named = [word for before, word in pairs if before.replace("-", "_") not in others]
    pictures = [word for word in named if not word.startswith("--") and word.lower().endswith(IMAGE_SUFFIXES)]
    photo = pictures or any(word.partition("=")[0] == "--source" for word in named)
    return EDIT_PHOTO if command == "edit" and photo else command
