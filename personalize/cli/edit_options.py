"""The options of `personalize edit`, for a photo, a table of photos and an adapter.  This module imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from tyro.conf import Positional, arg

from personalize.cli.checks import check_edit, check_edit_table, check_photo
from personalize.editing.config import CONTROL, DEFAULT_SAMPLING, DYNAMIC, UNIFORM
from personalize.editing.photo_settings import PHOTO_DEFAULTS as PHOTO
from personalize.models.config import InferenceOptions
from personalize.sampling.config import NULL_TEXT

COMBINATIONS = "Combinations"  # of strengths: the part of an edit that goes through them


@dataclass(frozen=True)
class PhotoConfig(InferenceOptions):
    """Edit a photo by text: it is inverted, and sampled again with a new prompt and the attention of the old one.

    Give --source, what the photo shows, and what it is to show: a whole prompt (--target), words to replace (--swap),
    or weights of words (--weight).  The inversion is kept: the next edit of the same photo takes less time.
    """

    photo: Positional[Path]
    """The picture."""
    source: str
    """What the photo shows, e.g. "a cat on the beach"."""
    target: tuple[str, ...] = ()
    """What the result is to show, e.g. "a dog on the beach"; several: as many edits from one inversion."""
    swap: tuple[str, ...] = ()
    """Instead of --target: old=new, a word or phrase of --source and its replacement; or several."""
    weight: tuple[str, ...] = ()
    """word=factor: factor on the attention to a word of the target; 0 leaves what other tokens say of it."""
    local: tuple[str, ...] = ()
    """old=new: change the photo only where these words of source and target attend; or one word, where it is said."""
    mask: str | None = None
    """The photo may change only here: a picture, white where it may, or left,top,right,bottom in pixels."""
    inversion: Literal["direct", "ddim", "negative", "null-text", "ddpm", "none"] = PHOTO.inversion
    """direct is exact and fast; null-text is slow; ddpm draws noise; none needs no inversion and 8 to 12 steps."""
    mode: Literal["auto", "replace", "refine"] = CONTROL.mode
    """replace: word for word; refine: words are added or removed; auto: replace if words were only exchanged."""
    cross_replace_steps: float = CONTROL.cross_replace_steps
    """Fraction of the steps that use the source's cross-attention; less lets shapes change more."""
    self_replace_steps: float = CONTROL.self_replace_steps
    """Fraction of the steps that use the source's self-attention, which keeps the layout."""
    bind_adjectives: bool = CONTROL.bind_adjectives
    """A word added before a noun gets the noun's attention."""
    controller: Literal["p2p", "mutual"] = PHOTO.controller
    """p2p: Prompt-to-Prompt; mutual: self-attention reads the source's keys and values (MasaCtrl)."""
    dpl: bool = False
    """Dynamic prompt learning: fit the nouns of --source until the attention of each is on its own thing; slow."""
    report: bool = False
    """Only report whether --dpl is needed, from the attention of the nouns; nothing is edited."""
    nouns: tuple[str, ...] = ()
    """--dpl: nouns of --source, synonyms joined by =, e.g. cat kitten=cat; by default found automatically."""
    background_mask: str = "auto"
    """--dpl: picture, white where no noun belongs; or auto, from the attention; or none."""
    region: tuple[str, ...] = ()
    """--dpl: where a noun belongs, noun=mask.png or noun=left,top,right,bottom in pixels; or several."""
    dpl_updates: int | None = None
    """--dpl: most updates at each step; by default 21, on the package's model 4."""
    dpl_balancing: float | None = None
    """--dpl: weight of the loss that gives every noun a place; by default 1, on the package's model 0.05."""
    dpl_disjoint: float | None = None
    """--dpl: weight of the loss that keeps nouns apart, 0.005 to 0.2; by default 0.05, on the package's model 1."""
    dpl_background: float | None = None
    """--dpl: weight of the loss against attention on the background; by default 0.05, on the package's model 1."""
    dpl_words_only: bool = DYNAMIC.words_only
    """--dpl: leave padding tokens out of the loss; for base models whose attention goes to the padding."""
    uniform: bool = False
    """Uniform attention maps: use a reconstruction of the photo wherever the edit changes nothing."""
    uniform_until: float = UNIFORM.until
    """--uniform: fraction of the schedule, at its clean end, in which it is used; more keeps more of the photo."""
    uniform_quantile: float = UNIFORM.quantile
    """--uniform: quantile of the differences that counts as no edit, at the last step; less lets more change."""
    uniform_auxiliary: Literal["u", "stored", "z0"] = UNIFORM.auxiliary
    """--uniform: what is used there: a reconstruction (u), one of the last steps only (stored), or the photo (z0)."""
    strict_background: bool = False
    """--uniform: keep the photo's own pixels outside the region that it computes; with --mask they are kept anyway."""
    num_inference_steps: int = PHOTO.steps
    """Denoising steps of the full schedule."""
    guidance_scale: float | None = PHOTO.guidance_scale
    """Guidance scale, 1 is off; by default 7.5, with ddpm 15; on the package's model 4 and 6; with none 2."""
    seed: int = PHOTO.seed
    """Seed of the noise that ddpm and none draw; the other inversions draw none."""
    null_text_iterations: int = NULL_TEXT.iterations
    """null-text: most updates at each step."""
    null_text_rate: float | None = None
    """null-text: learning rate of the first step; by default 0.01, on the package's model 0.1."""
    null_text_tolerance: float = NULL_TEXT.tolerance
    """null-text: a step ends when its loss is below this; later steps allow a little more."""
    gradient_checkpointing: bool = NULL_TEXT.gradient_checkpointing
    """null-text, --dpl: compute activations twice instead of keeping them: less memory, more time; for SDXL."""
    fixed_point_iterations: int = PHOTO.fixed_point
    """Fixed-point iterations at each inversion step, which make sampling without guidance exact; not for ddpm."""
    attention_maps: bool = False
    """Draw the attention of each word in attention.png."""
    trajectory: Path | None = None
    """Folder in which the inversion is kept for later edits; by default one for each photo in output_dir."""
    adapter: tuple[Path, ...] = ()
    """Adapter folder or LoRA file to use; prompts may name its learned tokens; or several."""
    add: tuple[Path, ...] = ()
    """More adapters or LoRA files, such as an LCM or Turbo LoRA for --inversion none at 4 to 8 steps."""
    resolution: int | None = PHOTO.resolution
    """The photo is edited at about resolution² pixels, by default the base model's own, and keeps its size."""
    keep_exif: bool = False
    """Keep the photo's EXIF data (place, camera, owner) in the result; by default none of it is written anywhere."""
    from_: Annotated[Path | None, arg(name="from")] = None
    """Picture that an earlier edit of this photo wrote: its options are taken where none are given here."""
    output_dir: Path = Path("personalize-edit")
    """Folder for the pictures, edit.json and the inversion."""

    @property
    def adapters(self) -> tuple[Path, ...]:
        """All adapters to use together."""
        return (*self.adapter, *self.add)

    def check(self) -> None:
        super().check()
        check_photo(self)


_OF_THE_TABLE = {"photo", "output_dir", "trajectory", "report", "adapter", "add", "from_"} | {
    field.name for field in fields(InferenceOptions)
}  # options of `edit PHOTO` that no row sets
ROW_OPTIONS = tuple(field.name.rstrip("_") for field in fields(PhotoConfig) if field.name not in _OF_THE_TABLE)


@dataclass(frozen=True)
class EditTableConfig(InferenceOptions):
    """Edit the photos of a CSV table, one row each, on one base model; run it again to go on where it stopped.

    Columns: file (relative to the table), source, target, name (of the row's folder), and any option of
    personalize edit PHOTO; ";" separates the values of options that may be repeated.  A bad row costs one line.
    """

    refused: ClassVar[dict[str, str]] = {
        name: f"each row of the table has its own, in a column {name}" for name in ROW_OPTIONS
    }
    table: Positional[Path]
    """The table, a UTF-8 CSV file."""
    adapter: tuple[Path, ...] = ()
    """Adapter folder or LoRA file to use for every row; or several."""
    add: tuple[Path, ...] = ()
    """More adapters or LoRA files, such as an LCM or Turbo LoRA."""
    output_dir: Path = Path("personalize-edit")
    """Folder for a folder of each row, results.jsonl and the inversions."""

    @property
    def adapters(self) -> tuple[Path, ...]:
        """All adapters to use together."""
        return (*self.adapter, *self.add)

    def check(self) -> None:
        super().check()
        check_edit_table(self)


@dataclass(frozen=True)
class EditConfig(InferenceOptions):
    """Edit the picture that an adapter was trained on.

    To edit a photo without an adapter, see personalize edit photo.png --help.  Several values of --alpha, --beta,
    --gamma, --forget or --strength make a grid: one picture per combination and seed.  With --auto these are searched,
    and the best values for this prompt are stored in the adapter.
    """

    adapter: Positional[Path]
    """Adapter folder, as written by `personalize train`, or a LoRA or learned token of any program, file or folder."""
    prompt: str
    """What the edited picture should show; best the adapter's caption with the change put in."""
    negative_prompt: str = ""
    """What the picture should not show."""
    add: tuple[Path, ...] = ()
    """More adapter folders to use together with it, for example other concepts; prompts name each by its token."""
    source_caption: str | None = None
    """Start from the source embedding of this caption, if pictures of several were learned; by default the nearest."""
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
    """Forgetting rules, e.g. `decoder=0.5` (half is kept) or `decoder=0.5+encoderattn` (both); `none`: nothing."""
    strength: tuple[float, ...] = ()
    """Strength of the LoRA: 0 leaves it out, 1 is as trained; a source embedding is weighed by the options above."""
    seed: int | None = None
    """Seed of the first picture, the next ones have the next numbers; by default 0, or the seed that --auto stored."""
    seeds: tuple[int, ...] = ()
    """A list of seeds, instead of --seed and --num_images."""
    num_images: int = 1
    """Number of pictures, each with its own seed, for each combination."""
    num_inference_steps: int = DEFAULT_SAMPLING.steps
    """Denoising steps."""
    guidance_scale: float | None = DEFAULT_SAMPLING.guidance_scale
    """Classifier-free guidance, 1 is off; by default 7.5, on the package's model 4."""
    scheduler: str = DEFAULT_SAMPLING.scheduler
    """Sampler, e.g. ddim, euler, euler_a, dpm++_2m, ddpm."""
    height: int | None = None
    """Height in pixels; by default that of the picture that the edit starts from."""
    width: int | None = None
    """Width in pixels; by default as for the height."""
    torch_compile: bool = DEFAULT_SAMPLING.torch_compile
    """Compile the UNet, which takes a minute and pays for many pictures; these differ by rounding."""
    cuda_graph: bool = DEFAULT_SAMPLING.cuda_graph
    """On CUDA: replay the steps from one graph: the same picture in less time; not with --torch_compile."""
    from_: Annotated[Path | None, arg(name="from")] = None
    """Picture that an earlier edit wrote: it is drawn again; options that are given here take the place of its own."""
    output_dir: Path = Path("personalize-edit")
    """Folder for the pictures and the labelled grid."""

    @property
    def adapters(self) -> tuple[Path, ...]:
        """All adapters to use together."""
        return (self.adapter, *self.add)

    def check(self) -> None:
        super().check()
        check_edit(self)
