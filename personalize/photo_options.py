"""The options of editing a photo by text, read before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction

from personalize.recipes import InferenceOptions


@dataclass(frozen=True)
class PhotoConfig(InferenceOptions):
    """Edit a photo by text: it is inverted, and sampled again with another prompt that looks where the old one looked.

    Say what the photo shows, and what it is to show: all of it (--target), or word for word (--swap), or how much of a
    word there is to be (--weight).  Inverting is done once; the next edit of the same photo begins where it ended.
    """

    photo: Positional[Path]
    """The picture."""
    source: str
    """What the photo shows, e.g. "a cat on the beach"."""
    target: str = ""
    """What it is to show, e.g. "a dog on the beach"."""
    swap: Annotated[tuple[str, ...], UseAppendAction] = ()
    """Instead of --target: old=new, a word or phrase of --source and what replaces it; may be given several times."""
    weight: Annotated[tuple[str, ...], UseAppendAction] = ()
    """word=factor: attention to a word of the target, above 1 more, below 1 less; may be given several times."""
    local: Annotated[tuple[str, ...], UseAppendAction] = ()
    """old=new: change the photo only where these words of source and target look; or a word that both say."""
    inversion: Literal["direct", "ddim", "negative", "null-text", "ddpm"] = "direct"
    """direct keeps the source exactly and is fast; null-text learns null embeddings, slowly; ddpm draws noise."""
    mode: Literal["auto", "replace", "refine"] = "auto"
    """replace: word for word; refine: words put in or taken out; auto: replace where there are equally many words."""
    cross_replace_steps: float = 0.8
    """Share of the steps in which words look where the source's words looked; less lets shapes change more."""
    self_replace_steps: float = 0.5
    """Share of the steps that keep the source's self-attention, its layout."""
    bind_adjectives: bool = True
    """A word put in before a noun looks where the noun looked."""
    controller: Literal["p2p", "mutual"] = "p2p"
    """p2p: Prompt-to-Prompt; mutual: the edit looks at the source's picture in self-attention (MasaCtrl)."""
    dpl: bool = False
    """Dynamic prompts: fit the nouns of --source until each looks at its own thing; slow.  See --report."""
    report: bool = False
    """Only say whether --dpl is needed: where the nouns look, and how far beside their things; nothing is edited."""
    nouns: tuple[str, ...] = ()
    """--dpl: nouns of --source, synonyms joined by =, e.g. cat kitten=cat; by default found in it."""
    background_mask: str = "auto"
    """--dpl: a picture, white where no noun belongs; or auto, from attention; or none."""
    region: Annotated[tuple[str, ...], UseAppendAction] = ()
    """--dpl: noun=mask.png or noun=left,top,right,bottom in pixels, where it belongs; may be given several times."""
    dpl_updates: int | None = None
    """--dpl: updates at each step, at most; by default 21, on the package's model 4."""
    dpl_balancing: float | None = None
    """--dpl: weight of every noun winning somewhere; by default 1, on the package's model 0.05."""
    dpl_disjoint: float | None = None
    """--dpl: weight of keeping nouns apart; depends on the photo, 0.005 to 0.2; by default 0.05, package's model 1."""
    dpl_background: float | None = None
    """--dpl: weight of keeping nouns off the background; by default 0.05, on the package's model 1."""
    dpl_words_only: bool = False
    """--dpl: padding does not compete with words; for base models whose attention goes to it."""
    uniform: bool = False
    """Uniform attention maps: a clean reconstruction of the photo where the edit changes nothing."""
    uniform_until: float = 0.2
    """--uniform: share of the schedule, its clean end, at which it acts; more keeps more of the photo."""
    uniform_quantile: float = 0.5
    """--uniform: share of the differences that are none, at the last step; less lets more change."""
    uniform_auxiliary: Literal["u", "stored", "z0"] = "u"
    """--uniform: its own reconstruction, the same begun late, or the photo itself."""
    mask: Path | None = None
    """--uniform: a picture, white where the photo may change, in place of the mask it finds."""
    strict_background: bool = False
    """--uniform: put the photo's own pixels back outside the mask."""
    num_inference_steps: int = 50
    """Denoising steps of the whole way."""
    guidance_scale: float | None = None
    """Classifier-free guidance of the edit; 1 is off; by default 7.5, with ddpm 15; on the package's model 4 and 6."""
    seed: int = 0
    """Seed of the noise of ddpm; the other inversions draw none."""
    null_text_iterations: int = 10
    """null-text: updates at each step, at most."""
    null_text_rate: float | None = None
    """null-text: learning rate of the first step; by default 0.01, on the package's model 0.1."""
    null_text_tolerance: float = 1e-5
    """null-text: a step is left when its loss is below this, and a little more at later steps."""
    fixed_point_iterations: int = 0
    """Predictions at each step of inverting that make sampling without guidance exact; not for ddpm."""
    attention_maps: bool = False
    """Draw where each word looks, in attention.png."""
    trajectory: Path | None = None
    """Folder in which the inversion is kept, and re-used if it fits; by default one for each photo in output_dir."""
    adapter: Annotated[tuple[Path, ...], UseAppendAction] = ()
    """Adapter folder or LoRA file to use, whose learned tokens prompts may say; may be given several times."""
    resolution: int | None = None
    """Larger photos are scaled down to about its square in pixels; by default the base model's own."""
    output_dir: Path = Path("personalize-edit")
    """Where the pictures, edit.json and the inversion go."""
