"""The options of every command besides `train` and `export`, and the function that runs each.

This module imports no torch, so that a command line is checked before torch is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

from personalize.photo_options import PhotoConfig
from personalize.recipes import InferenceOptions


@dataclass(frozen=True)
class EditConfig(InferenceOptions):
    """Edit the picture that an adapter was trained on.

    To edit a photo without an adapter, see personalize edit photo.png --help.  Several values of --alpha, --beta,
    --gamma or --forget make a grid: one picture per combination and seed.  With --auto these are searched, and the best
    values for this prompt are stored in the adapter.
    """

    adapter: Positional[Path]
    """Adapter folder, as written by `personalize train`, or a LoRA or textual-inversion file of any program."""
    prompt: str
    """What the edited picture should show; best the adapter's caption with the change put in."""
    negative_prompt: str = ""
    """What the picture should not show."""
    add: tuple[Path, ...] = ()
    """More adapter folders to use together with it, for example other concepts; prompts name each by its token."""
    auto: bool = False
    """Search the strengths: draw --budget pictures, rank them by edit and identity, store the best in the adapter."""
    budget: int = 16
    """Pictures that --auto may draw."""
    clip_model: str | None = None
    """CLIP folder or hub id with which --auto scores the edit; only the embedded model needs none."""
    identity_model: str | None = None
    """How --auto scores identity: "alex" (the default) or "vgg" for LPIPS, or a DINOv2 folder or hub id."""
    source_image: Path | None = None
    """The picture the adapter was trained on, for --auto; by default the one in its folder."""
    alpha: tuple[float, ...] = ()
    """Vector projection: how much of the learned source embedding is kept, about 0.7 to 1.1; by default 0.8."""
    beta: tuple[float, ...] = ()
    """Vector projection: how much of the edit is added, about 0.7 to 1.6; by default 1.2."""
    gamma: tuple[float, ...] = ()
    """Vector subtraction instead of projection: 0 is the source, 1 the prompt, more exaggerates; about 0.6 to 1.2."""
    forget: tuple[str, ...] = ()
    """Forgetting rules, e.g. `decoder=0.5` (half of what the decoder learned) or `encoderattn`; `none` keeps all."""
    strength: float | None = None
    """Strength of the whole adapter: 0 is the base model, 1 as trained."""
    seed: int | None = None
    """Seed of the first picture, the next ones have the next numbers; by default 0, or the seed that --auto stored."""
    seeds: tuple[int, ...] = ()
    """A list of seeds, instead of --seed and --num_images."""
    num_images: int = 1
    """Number of pictures, each with its own seed, for each combination."""
    num_inference_steps: int = 50
    """Denoising steps."""
    guidance_scale: float | None = None
    """Classifier-free guidance, 1 is off; by default 7.5, on the package's model 4."""
    scheduler: str = "ddim"
    """Sampler, e.g. ddim, euler, euler_a, dpm++_2m, ddpm."""
    height: int | None = None
    """Height in pixels; by default that of the picture the adapter was trained on."""
    width: int | None = None
    """Width in pixels; by default that of the picture the adapter was trained on."""
    output_dir: Path = Path("personalize-edit")
    """Folder for the pictures and the labelled grid."""


@dataclass(frozen=True)
class DragConfig(InferenceOptions):
    """Drag points of a picture: what is at each --from moves to its --to; nothing is trained.

    Writes the picture, the mask of what moved, an overlay with mask and points, and where the points arrived.
    """

    photo: Positional[Path]
    """The picture."""
    from_: Annotated[tuple[str, ...], UseAppendAction, arg(name="from")]
    """Point to drag as x,y in pixels; may be given several times."""
    to: Annotated[tuple[str, ...], UseAppendAction]
    """Target as x,y in pixels, the first for the first --from, and so on."""
    mask: Path | None = None
    """Picture of the same size, white where things may move; by default attention finds what is at the points."""
    mode: Literal["move", "deform"] = "move"
    """move: the thing moves as a whole.  deform: it stretches, each part as far as it belongs to the point."""
    prompt: str | None = None
    """What the picture shows; by default what the adapter has learned, or nothing."""
    adapter: Path | None = None
    """Adapter folder trained on this picture, if there is one."""
    mask_threshold: float = 0.3
    """Higher values, up to 1, move less of the picture."""
    displacement: Literal["attention", "stretch"] = "attention"
    """How far parts move in `deform`: by their attention, or by their distance as in FastDrag."""
    fill: Literal["bnni", "attention", "attention_raw"] = "bnni"
    """How the place it left is filled: from neighbours; by attention with corrected noise; or by attention alone."""
    num_inference_steps: int = 50
    """Denoising steps of the full schedule."""
    strength: float = 0.7
    """Fraction of the schedule that is inverted and sampled."""
    seed: int = 42
    """Seed of the noise of `--fill attention`."""
    resolution: int | None = None
    """Larger pictures are scaled down to about resolution² pixels; by default the base model's own."""
    paste: bool = False
    """Copy the picture's own pixels to where nothing was to change."""
    output_dir: Path = Path("personalize-drag")
    """Folder for the pictures and drag.json."""


@dataclass(frozen=True)
class QuickstartConfig:
    """Train on one picture, save and verify the adapter, edit, and show all on one sheet; nothing is downloaded."""

    photo: Positional[Path | None] = None
    """Your picture; by default a bundled scene in an art style that the embedded model has never seen."""
    caption: str | None = None
    """What the picture shows, e.g. "a cat on the beach"; by default read from a .txt beside it."""
    output_dir: Path = Path("personalize-quickstart")
    """Folder for the adapter, the pictures and the contact sheet."""
    scene: int = 0
    """Number of the bundled scene, from 0."""
    seed: int = 0
    """Seed of training and of the pictures."""
    max_train_steps: int | None = None
    """Optimiser updates; by default the embedded model's preset."""
    pretrained_model_name_or_path: str | None = None
    """Base model: a diffusers folder, hub id or single-file checkpoint; by default the one in the package."""


@dataclass(frozen=True)
class InspectConfig:
    """Show what a LoRA or embedding file is, what it changes, which programs read it, and what is wrong with it."""

    file: Positional[Path]
    """LoRA or textual-inversion file of any program."""
    json: bool = False
    """Print everything as JSON."""
    picture: Path | None = None
    """Write a chart of the changed blocks, and by how much, to this .png file."""
    allow_pickle: bool = False
    """Read the tensors (and nothing else) of a .pt, .bin or .ckpt file; without it, pickles are refused."""


@dataclass(frozen=True)
class ConvertConfig:
    """Convert a LoRA or embedding file for other programs, correct its keys, alphas and ranks, and verify the result.

    Alphas that differ are multiplied into the weights and ranks are padded, so that all programs compute the same.
    """

    file: Positional[Path]
    """LoRA or textual-inversion file of any program."""
    to: Literal["diffusers", "kohya", "peft"]
    """diffusers; kohya for A1111, Forge, ComfyUI, InvokeAI and sd-scripts; peft for PEFT's own folders."""
    output: Path
    """File to write; with `--to peft` a folder."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the numbers written."""
    family: Literal["sd1", "sd2", "sdxl"] | None = None
    """Family of the base model, if the file does not say it."""
    unet_only: bool = False
    """Leave out the part for the text encoders."""
    token: str | None = None
    """Word for a learned token, e.g. `<my-cat>`; by default the file's own or its name."""
    allow_pickle: bool = False
    """Read the tensors (and nothing else) of a .pt, .bin or .ckpt file; without it, pickles are refused."""


@dataclass(frozen=True)
class VerifyConfig:
    """Verify an adapter: compute every weight change from its files, through independent key names, and compare.

    Exits with 1 if something does not match, with 2 if the input cannot be read.
    """

    path: Positional[Path]
    """Adapter folder, or one LoRA file (.safetensors) of any origin."""
    base: str | None = None
    """Base model to check the names and shapes against; by default the one named in the adapter."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Score edited pictures as PIE-Bench does: background, structure, and agreement with the prompt.

    The benchmark is a folder of PIE-Bench (mapping_file.json), TEdBench (input_list.json) or DragBench
    (original_image.png in each folder).  Nothing is downloaded unless you name a hub id; scores left out are reported.
    """

    benchmark: Positional[Path]
    """Folder of the benchmark."""
    results: Path
    """Folder of the edited pictures, named like the benchmark's own."""
    output: Path = Path("evaluation.json")
    """File for all values and the summary."""
    structure_model: str | None = None
    """Structure distance: folder or hub id of a DINO ViT, published with facebook/dino-vitb8."""
    clip_model: str | None = None
    """CLIP scores: folder or hub id, published with openai/clip-vit-large-patch14."""
    lpips_backbone: Path | None = None
    """LPIPS: file of torchvision's squeezenet1_1 weights."""
    allow_pickle: bool = False
    """Read arrays and plain values of DragBench's meta_data.pkl; without it, pickles are refused."""
    cpu: bool = False
    """Run on the CPU even if there is an accelerator."""


EDIT_PHOTO = "edit PHOTO"  # the command that `edit` means for a picture, or with --source
# those of `images.IMAGE_SUFFIXES`, which cannot be imported here without torch; a test compares them
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
COMMANDS = {  # name: (options, "module:function" that is called with them)
    "edit": (EditConfig, "personalize.edit_command:run"),
    EDIT_PHOTO: (PhotoConfig, "personalize.photo_command:run"),
    "drag": (DragConfig, "personalize.drag_command:run"),
    "quickstart": (QuickstartConfig, "personalize.quickstart:run"),
    "inspect": (InspectConfig, "personalize.inspection:run"),
    "convert": (ConvertConfig, "personalize.conversion:run"),
    "verify": (VerifyConfig, "personalize.verify:run"),
    "evaluate": (EvaluateConfig, "personalize.evaluation:run"),
}


def resolve_command(command: str, words: Sequence[str]) -> str:
    """The name in COMMANDS that `command` means: `edit` with a picture file or with --source means `edit PHOTO`."""
    pairs = zip(("", *words), words, strict=False)
    pictures = [word for before, word in pairs if before.replace("-", "_") != "__source_image"]
    photo = any(word.lower().endswith(IMAGE_SUFFIXES) or word.partition("=")[0] == "--source" for word in pictures)
    return EDIT_PHOTO if command == "edit" and photo else command
