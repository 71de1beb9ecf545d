"""The model card of an adapter folder, its README.md: what it is, how each program uses it, and its limits."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol
from urllib.parse import quote

from personalize.adapters.captions import captions_of
from personalize.adapters.card_text import fenced, licence_of, merged_limit, plain_text
from personalize.formats.textual_inversion_files import token_file_names, token_file_stem
from personalize.formats.timestep_rank import rule_of, warning
from personalize.formats.training_notes import training_notes
from personalize.models.config import HUB_ID

TITLES = {"sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x", "sdxl": "Stable Diffusion XL"}
TAGS = {"sd1": "stable-diffusion", "sd2": "stable-diffusion", "sdxl": "stable-diffusion-xl"}


class CardSubject(Protocol):
    """What a card says of an adapter: the attributes of `Adapter` that it reads."""

    @property
    def rank(self) -> int: ...
    @property
    def alpha(self) -> float: ...
    @property
    def info(self) -> Mapping[str, Any]: ...
    @property
    def source(self) -> Mapping[str, Any] | None: ...
    @property
    def concepts(self) -> Mapping[str, Mapping[str, Any]]: ...
    @property
    def lora(self) -> Mapping[str, Any]: ...
    @property
    def base(self) -> Mapping[str, Any]: ...
    @property
    def family(self) -> str: ...


def model_card(*, name: str, kohya_file: str, adapter: CardSubject, pictures: Sequence[str]) -> str:
    """The card as Markdown: front matter for the hub, pictures, trigger words, code, other programs, limits, how
    to verify it, licence, consent. What users wrote stays text, whatever it looks like in Markdown or HTML.

    name: of the folder.  kohya_file: file name of the LoRA in kohya's names.  pictures: file names in the folder.
    """
    parts = [
        _front_matter(adapter, pictures),
        _summary(name, adapter),
        _pictures(pictures),
        _trigger(adapter),
        _tokens(adapter),
        _editing(adapter),
        _stock(adapter),
        _other_programs(kohya_file, adapter),
        _limits(adapter),
        _verify(),
        _licence(adapter),
        _consent(adapter),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _caption(adapter: CardSubject) -> str:
    return " ".join(str(adapter.info.get("caption", "")).split())


def _standalone(adapter: CardSubject) -> bool:
    """True if the adapter was trained to work without a source embedding, or has none."""
    return adapter.source is None or bool(adapter.info.get("standalone"))


def _base(adapter: CardSubject) -> str:
    """Name of the base model: a hub id, or of a local path its last part alone."""
    name = str(adapter.base.get("name") or "an unnamed base")
    return name if re.fullmatch(HUB_ID, name) else re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def _front_matter(adapter: CardSubject, pictures: Sequence[str]) -> str:
    """The YAML front matter; strings are written as JSON, which YAML reads as the same strings."""
    tags = ["text-to-image", "diffusers", "lora", "template:sd-lora", TAGS[adapter.family], "personalize"]
    lines = ["library_name: diffusers", "tags:", *(f"- {tag}" for tag in tags)]
    if re.fullmatch(HUB_ID, _base(adapter)):  # the hub refuses a card whose base_model is no hub id
        lines.append(f"base_model: {_base(adapter)}")
    if caption := _caption(adapter):
        lines.append(f"instance_prompt: {json.dumps(caption, ensure_ascii=False)}")
    lines.append(f"license: {json.dumps(_licence_name(adapter))}")
    if pictures:
        lines.append("widget:")
    for picture in pictures:
        text = json.dumps(_caption(adapter) or picture, ensure_ascii=False)
        lines += [f"- text: {text}", "  output:", f"    url: {json.dumps(quote(picture))}"]
    return "\n".join(["---", *lines, "---"])


def _summary(name: str, adapter: CardSubject) -> str:
    count = len(captions_of(adapter.info, adapter.source))
    fitted = "a fitted source embedding" if count == 1 else f"{count} fitted source embeddings, one for each caption"
    alone = "no source embedding" + ("" if adapter.info.get("merged_from") else " (standalone)")
    source = alone if _standalone(adapter) else fitted
    return (
        f"# {plain_text(name)}\n\n{_origin(adapter)} {TITLES[adapter.family]} (`{_base(adapter)}`): a LoRA of rank "
        f"{adapter.rank}, alpha {adapter.alpha:g}, on {len(adapter.lora) // 2} modules, and {source}. "
        "Both LoRA files were read back after writing, and every weight change in them was verified."
        + _fidelity(adapter)
    )


def _fidelity(adapter: CardSubject) -> str:
    """A sentence on how exactly the picture is reconstructed, or on why that is not known."""
    if failed := adapter.info.get("preview_failed"):
        return f" No preview was drawn: {plain_text(str(failed))}"
    replay, ceiling = (adapter.info.get(key) for key in ("reconstruction_db", "autoencoder_db"))
    if not isinstance(replay, int | float) or not isinstance(ceiling, int | float):
        return ""
    return (
        f" The reconstructed picture has a PSNR of {replay:.1f} dB to the source, {ceiling - replay:.1f} dB below what "
        "the base's autoencoder reaches."
    )


def _origin(adapter: CardSubject) -> str:
    """What the adapter was made from: pictures, or other adapters with their weights."""
    sources = adapter.info.get("merged_from") or ()
    if not sources:
        return f"{_count(adapter)}, learned by"
    return " + ".join(f"{source['weight']:g} × {plain_text(str(source['name']))}" for source in sources) + ", for"


def _count(adapter: CardSubject) -> str:
    count = adapter.info.get("pictures", "An unknown number of" if adapter.info.get("merged_from") else 1)
    return "One picture" if count == 1 else f"{count} pictures"


def _pictures(pictures: Sequence[str]) -> str:
    if not pictures:
        return ""
    titles = [picture.removesuffix(".png").replace("_", " ") for picture in pictures]
    rows = [f"| {title} | ![{title}]({quote(picture)}) |" for title, picture in zip(titles, pictures, strict=True)]
    return "\n".join(["## Pictures", "", "| | |", "|---|---|", *rows])


def _trigger(adapter: CardSubject) -> str:
    captions = [" ".join(caption.split()) for caption in captions_of(adapter.info, adapter.source)]
    if not captions[0]:
        return ""
    which = "the caption of the picture" if len(captions) == 1 else "one of the captions of the pictures"
    return f"## Trigger words\n\nWrite {which} in your prompt:\n\n{fenced(captions)}"


def _tokens(adapter: CardSubject) -> str:
    """The learned tokens: the word to write in each program, and the files to load."""
    if not adapter.concepts:
        return ""
    rows = ["| token | vectors | in A1111, Forge, InvokeAI | in ComfyUI |", "|---|---|---|---|"]
    for token, concept in adapter.concepts.items():
        word, count = token_file_stem(token), max(len(tensor) for tensor in concept.values())
        rows.append(f"| `{token}` | {count} | `{word}` | `embedding:{word}` |")
    lines = []
    for name, (_, encoder) in token_file_names(adapter.concepts, "diffusers").items():
        number = "_2" if encoder == "text_encoder_2" else ""
        extra = f", text_encoder=pipe.text_encoder{number}, tokenizer=pipe.tokenizer{number}"
        arguments = extra if adapter.family == "sdxl" else ""
        lines.append(f'pipe.load_textual_inversion("path/to/this/folder", weight_name={json.dumps(name)}{arguments})')
    code = "\n".join(lines)
    differs = ""
    if adapter.family == "sdxl":
        differs = (
            "\n\nWhere the second text encoder's configuration says `eos_token_id: 2`, plain diffusers takes SDXL's "
            "pooled vector at the learned token; personalize and the graphical programs take it at the prompt's end, "
            "as in training."
        )
    return (
        "## Learned tokens\n\nCopy the file named after the word to the program's embeddings folder.\n\n"
        + "\n".join(rows)
        + f"\n\nIn diffusers, besides the LoRA:\n\n```python\n{code}\n```{differs}"
    )


def _load(adapter: CardSubject) -> str:
    """Python code that makes `pipe`, the base model in plain diffusers."""
    name = "StableDiffusionXLPipeline" if adapter.family == "sdxl" else "StableDiffusionPipeline"
    base = _base(adapter)
    if base == "embedded":
        home, base = "from personalize.models.stable_diffusion import EMBEDDED\n", "EMBEDDED"
    else:
        home, base = "", json.dumps(base if re.fullmatch(HUB_ID, base) else f"path/to/{base}")
    return f"from diffusers import {name}\n{home}\npipe = {name}.from_pretrained({base})"


def _editing(adapter: CardSubject) -> str:
    if _standalone(adapter):
        return ""
    return f"""## Editing, in diffusers with personalize

The source embedding holds what the caption does not say about the picture. Only programs that accept prompt
embeddings can use it.

```python
import personalize
{_load(adapter)}
with personalize.attach(pipe, "path/to/this/folder") as picture:
    image = pipe(**picture.inputs("a new prompt")).images[0]
```

`inputs` takes `alpha`, how much of the picture is kept, and `beta`, how much of the prompt is added."""


def _stock(adapter: CardSubject) -> str:
    prompt = json.dumps(_caption(adapter) or "your prompt", ensure_ascii=False)
    return f"""## Plain diffusers

```python
{_load(adapter)}
pipe.load_lora_weights("path/to/this/folder", weight_name="pytorch_lora_weights.safetensors")
image = pipe({prompt}).images[0]
```"""


def _other_programs(kohya_file: str, adapter: CardSubject) -> str:
    if _base(adapter) == "embedded":
        return (
            f"## Other programs\n\n`{kohya_file}` is the same LoRA in the names that graphical programs read. The base "
            "is a small one of its own: this adapter fits no other checkpoint; train on one of yours to use it there."
        )
    stem = kohya_file.removesuffix(".safetensors")
    return f"""## Other programs

Use `{kohya_file}` with any {TITLES[adapter.family]} checkpoint close to the base; strength 1 is what was trained.

* **AUTOMATIC1111, Forge**: copy it to `models/Lora`, write `<lora:{stem}:1>` and the trigger words in the prompt.
* **ComfyUI**: copy it to `models/loras`, put a *Load LoRA* node after the checkpoint.
* **InvokeAI**: add it in the model manager, then choose it under *Concepts*."""


def _limits(adapter: CardSubject) -> str:
    gap = adapter.info.get("standalone_gap_db")
    loss = f" Here that costs {float(gap):.1f} dB of reconstruction (PSNR)." if isinstance(gap, int | float) else ""
    if sources := adapter.info.get("merged_from"):
        first = merged_limit(sources)
    elif not _standalone(adapter):
        first = (
            "Without the source embedding (plain diffusers and the programs above) the picture comes back less "
            "exactly, because part of what was learned lives in that embedding." + loss
        )
    else:
        first = (
            "Trained for use without a source embedding: it works in every program, but reconstructs less exactly."
            + loss
        )
    return (
        f"## Limits\n\n* {first}\n* Learned from {_count(adapter).lower()}: pose, background and style may come back "
        "where they were not asked for.\n"
        f"{_timestep_rank(adapter)}"
        f"{''.join(f'* {note}.' + chr(10) for note in training_notes(adapter.info))}"
        "* The pictures are drawn anew from noise; nothing keeps unedited pixels as they were.\n"
        "* Made for the base named above; on other checkpoints the result differs."
    )


def _timestep_rank(adapter: CardSubject) -> str:
    """A line on the timestep-dependent rank, if the adapter has one."""
    rule = rule_of(adapter.info)
    return "" if rule is None else f"* The LoRA was {warning(rule)}.\n"


def _verify() -> str:
    return """## Verify

`personalize verify path/to/this/folder` compares every file with its SHA-256 in `adapter.json`, and both LoRA
files with the weight changes that were trained; `--base BASE` also loads them into the base."""


def _licence_name(adapter: CardSubject) -> str:
    """The licence that was given at training, or else that of the base, by its hub id; "other" if it is not known."""
    return str(adapter.info.get("license") or licence_of(_base(adapter)))


def _licence(adapter: CardSubject) -> str:
    name = _licence_name(adapter)
    which = "not known here: see its own card" if name == "other" else f"`{plain_text(name)}`"
    return f"## Licence\n\nAn adapter goes by the licence of its base: that of `{_base(adapter)}` is {which}."


def _consent(adapter: CardSubject) -> str:
    own = " This adapter was marked as showing a person." if adapter.info.get("person") else ""
    return (
        "## Consent\n\nDo not use, share or publish an adapter of a recognisable person without that person's consent, "
        "and do not present its pictures as photographs." + own
    )
