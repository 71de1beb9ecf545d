"""The commands besides `train` and `export`: the options of each, and where its work is done.

Only the options live here, so that a command line is checked before torch is imported.
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

    Given a photo instead of an adapter, `edit` does something else: see personalize edit photo.png --help.
    Several values of --alpha, --beta, --gamma or --forget make a grid: one picture per combination and seed.  With
    --auto they are searched instead, and the adapter remembers the best for this prompt.
    """

    adapter: Positional[Path]
    """Adapter folder, as written by `personalize train`, or a LoRA or textual-inversion file of any program."""
    prompt: str
    """What the edited picture should show; best worded like the adapter's caption, with the change put in."""
    negative_prompt: str = ""
    """What the picture should not show."""
    add: tuple[Path, ...] = ()
    """More adapter folders to use at once, such as those of other concepts; the prompt names each by its token."""
    auto: bool = False
    """Choose the strengths: draw --budget pictures, rank them by edit and identity, remember the best."""
    budget: int = 16
    """Pictures that --auto may draw."""
    clip_model: str | None = None
    """CLIP folder or hub id by which --auto sees the edit; only the embedded model can do without."""
    identity_model: str | None = None
    """How --auto measures identity beside CLIP: "alex" or "vgg" (LPIPS), or a DINOv2 folder or hub id; "alex"."""
    source_image: Path | None = None
    """The picture the adapter was trained on, for --auto; by default the one kept in its folder."""
    alpha: tuple[float, ...] = ()
    """Vector projection: how much of the learned source embedding to keep, about 0.7 to 1.1; 0.8 if not given."""
    beta: tuple[float, ...] = ()
    """Vector projection: how much of the edit to add, about 0.7 to 1.6; 1.2 if not given."""
    gamma: tuple[float, ...] = ()
    """Vector subtraction instead of projection: 0 is the source, 1 the prompt, more exaggerates; about 0.6 to 1.2."""
    forget: tuple[str, ...] = ()
    """Forgetting rules, e.g. `decoder=0.5` (half of what the decoder learned) or `encoderattn`; `none` keeps all."""
    strength: float | None = None
    """Strength of the whole adapter: 0 is the base model, 1 as trained."""
    seed: int | None = None
    """Seed of the first picture; the next ones take the next numbers.  0, or that of the remembered best."""
    seeds: tuple[int, ...] = ()
    """Seeds by name, in place of --seed and --num_images."""
    num_images: int = 1
    """Pictures (seeds) for each combination."""
    num_inference_steps: int = 50
    """Denoising steps."""
    guidance_scale: float | None = None
    """Classifier-free guidance; 1 is off; by default 7.5, with the package's model 4."""
    scheduler: str = "ddim"
    """Sampler, e.g. ddim, euler, euler_a, dpm++_2m, ddpm."""
    height: int | None = None
    """Height in pixels; by default that of the picture the adapter was trained on."""
    width: int | None = None
    """Width in pixels; by default that of the picture the adapter was trained on."""
    output_dir: Path = Path("personalize-edit")
    """Where the pictures and the labelled grid go."""


@dataclass(frozen=True)
class DragConfig(InferenceOptions):
    """Drag points of a picture: what lies at each --from goes to its --to; nothing is trained.

    Writes the picture, the mask of what moved, an overlay to check both, and where the points arrived.
    """

    photo: Positional[Path]
    """The picture."""
    from_: Annotated[tuple[str, ...], UseAppendAction, arg(name="from")]
    """Handle as x,y in pixels; give one for each point to drag."""
    to: Annotated[tuple[str, ...], UseAppendAction]
    """Target as x,y in pixels; the first belongs to the first handle, and so on."""
    mask: Path | None = None
    """Picture of the same size, white where things may move; by default attention finds what the handles lie on."""
    mode: Literal["move", "deform"] = "move"
    """move: the thing goes as a whole.  deform: it stretches, the less the less it belongs to the handle."""
    prompt: str | None = None
    """What the picture shows; by default what the adapter learned, or nothing."""
    adapter: Path | None = None
    """Adapter folder trained on this picture, if there is one."""
    mask_threshold: float = 0.3
    """Higher values, up to 1, move less of the picture."""
    displacement: Literal["attention", "stretch"] = "attention"
    """How far cells go in `deform`: by attention, or by distance as FastDrag has it."""
    fill: Literal["bnni", "attention", "attention_raw"] = "bnni"
    """What comes where something went away: its neighbours, what attention looks at there with noise, or without."""
    num_inference_steps: int = 50
    """Denoising steps of the whole way."""
    strength: float = 0.7
    """Share of the way that is inverted and sampled."""
    seed: int = 42
    """Seed of the noise of `--fill attention`."""
    resolution: int | None = None
    """Larger pictures are scaled down to about its square in pixels; by default the base model's own."""
    paste: bool = False
    """Put the picture's own pixels back where nothing was to change."""
    output_dir: Path = Path("personalize-drag")
    """Where the pictures and drag.json go."""


@dataclass(frozen=True)
class QuickstartConfig:
    """Train on one picture, save, verify, edit, and show it all on one contact sheet; nothing is downloaded."""

    photo: Positional[Path | None] = None
    """Your picture; without it a bundled scene in an art style that the embedded model has never seen."""
    caption: str | None = None
    """What the picture shows, e.g. "a cat on the beach"; by default read from a .txt beside it."""
    output_dir: Path = Path("personalize-quickstart")
    """Where the adapter, the pictures and the contact sheet go."""
    scene: int = 0
    """Which of the bundled scenes to take."""
    seed: int = 0
    """Seed of the training and of the pictures."""
    max_train_steps: int | None = None
    """Optimiser updates; by default the embedded model's preset."""
    pretrained_model_name_or_path: str | None = None
    """Base model: a diffusers folder, hub id or single-file checkpoint; by default the one in the package."""


@dataclass(frozen=True)
class InspectConfig:
    """Say what a LoRA or embedding file is, what it changes, who can read it, and what is wrong with it."""

    file: Positional[Path]
    """LoRA or textual-inversion file of any program."""
    json: bool = False
    """Print everything as JSON."""
    picture: Path | None = None
    """Draw which blocks are changed, and how much, into this .png file."""
    allow_pickle: bool = False
    """Read the tensors (and nothing else) of a .pt, .bin or .ckpt file; without it, pickles are refused."""


@dataclass(frozen=True)
class ConvertConfig:
    """Rewrite a LoRA or embedding file for other programs, mending names, alphas and ranks; checked before it appears.

    Alphas that differ are worked into the weights and ranks padded, so that every program computes the same.
    """

    file: Positional[Path]
    """LoRA or textual-inversion file of any program."""
    to: Literal["diffusers", "kohya", "peft"]
    """diffusers; kohya for A1111, Forge, ComfyUI, InvokeAI and sd-scripts; peft for PEFT's own folder of a UNet."""
    output: Path
    """File to write; with `--to peft` a folder."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the numbers written."""
    family: Literal["sd1", "sd2", "sdxl"] | None = None
    """Family of the base model, where the file does not tell."""
    unet_only: bool = False
    """Leave the text encoders' part out."""
    token: str | None = None
    """Word for a learned token, e.g. `<my-cat>`; by default the file's own or its name."""
    allow_pickle: bool = False
    """Read the tensors (and nothing else) of a .pt, .bin or .ckpt file; without it, pickles are refused."""


@dataclass(frozen=True)
class VerifyConfig:
    """Check an adapter: rebuild every weight change through an independent name map and compare.

    Exits with 1 if something does not match, with 2 if the input cannot be read.
    """

    path: Positional[Path]
    """Adapter folder, or one LoRA file (.safetensors) of any origin."""
    base: str | None = None
    """Base model to check the names and shapes against; by default the one named in the adapter."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure edited pictures by the conventions of PIE-Bench: background, structure, and the prompt.

    The benchmark is a folder of PIE-Bench (mapping_file.json), TEdBench (input_list.json) or DragBench
    (original_image.png in each folder).  Nothing is downloaded unless you name a hub id; what is not measured is said.
    """

    benchmark: Positional[Path]
    """Folder of the benchmark."""
    results: Path
    """Folder of the edited pictures, named like the benchmark's own."""
    output: Path = Path("evaluation.json")
    """Where every value and the summary go."""
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


PHOTO = "edit PHOTO"  # what `edit` is when it is given a picture, or what a picture shows
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
COMMANDS = {  # name: (options, "module:function" that takes them)
    "edit": (EditConfig, "personalize.edit_command:run"),
    PHOTO: (PhotoConfig, "personalize.photo_command:run"),
    "drag": (DragConfig, "personalize.drag_command:run"),
    "quickstart": (QuickstartConfig, "personalize.quickstart:run"),
    "inspect": (InspectConfig, "personalize.inspection:run"),
    "convert": (ConvertConfig, "personalize.conversion:run"),
    "verify": (VerifyConfig, "personalize.verify:run"),
    "evaluate": (EvaluateConfig, "personalize.evaluation:run"),
}


def form(command: str, words: Sequence[str]) -> str:
    """The name in COMMANDS of what is meant: `edit` of a picture file, or with --source, is another command."""
    pairs = zip(("", *words), words, strict=False)
    pictures = [word for before, word in pairs if before.replace("-", "_") != "__source_image"]
    photo = any(word.lower().endswith(PICTURES) or word.partition("=")[0] == "--source" for word in pictures)
    return PHOTO if command == "edit" and photo else command
