"""Files of learned tokens (textual inversion): rows of a text encoder's embedding table, in the forms programs read.

A concept is `rows`: "text_encoder" → (n, d) and, for SDXL, "text_encoder_2" → (n, d₂), with one row per vector.

    form        keys                              read by
    ui          emb_params; SDXL: clip_l, clip_g  A1111, Forge, ComfyUI, InvokeAI, kohya; the file's name is the trigger
    diffusers   the token itself                  diffusers' `load_textual_inversion`; one file per text encoder

diffusers calls the further rows of a token `<cat>` `<cat>_1`, `<cat>_2`, … and puts them in by itself.

Reference: Gal et al., "An Image is Worth One Word", arXiv 2208.01618.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from personalize.errors import UserError
from personalize.files import TensorFile, read_tensors, tensor_bytes

ENCODERS = ("text_encoder", "text_encoder_2")
UI_KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
KNOWN_KEYS = {  # of files other than diffusers': those above, and OneTrainer's and cog-sdxl's
    "emb_params": "text_encoder", "emp_params": "text_encoder", "clip_l": "text_encoder", "clip_g": "text_encoder_2",
    "text_encoders_0": "text_encoder", "text_encoders_1": "text_encoder_2",
}  # fmt: skip
ENCODER_MARK = "personalize.text_encoder"  # in the header of a file in diffusers' form, which does not say it itself
MAX_ROWS = 75  # what fits between the start and end marks of CLIP's 77 positions
ARCHITECTURES = {
    "sd1": "stable-diffusion-v1", "sd2": "stable-diffusion-v2-512", "sdxl": "stable-diffusion-xl-v1-base"
}  # fmt: skip
Rows = Mapping[str, Tensor]


@dataclass(frozen=True)
class Concept:
    """A learned token and its rows, by text encoder."""

    token: str
    rows: dict[str, Tensor]


def checked(token: str, rows: Rows) -> dict[str, Tensor]:
    """`rows` as (n, d) in fp32, or UserError: of no known encoder, ill-shaped, unequal in n, or not finite."""
    if not token or len(token) > 100 or any(character.isspace() or ord(character) < 32 for character in token):
        raise UserError(f"{token[:100]!r} is no token: one word without spaces is expected, such as <my-cat>")
    if not rows or not set(rows) <= set(ENCODERS):
        raise UserError(f"token {token} has rows for {sorted(rows)}: expected {' and '.join(ENCODERS)}")
    found = {key: rows[key].detach().float().cpu() for key in ENCODERS if key in rows}
    found = {key: tensor[None] if tensor.ndim == 1 else tensor for key, tensor in found.items()}
    shapes = {key: tuple(tensor.shape) for key, tensor in found.items()}
    if any(len(shape) != 2 for shape in shapes.values()) or len({shape[0] for shape in shapes.values()}) != 1:
        raise UserError(f"token {token} has rows of shapes {shapes}: expected (n, d) with one n for all text encoders")
    if not all(0 < count <= MAX_ROWS and width for count, width in shapes.values()):
        raise UserError(f"token {token} has rows of shapes {shapes}: 1 to {MAX_ROWS} rows fit into a prompt")
    if not all(bool(tensor.isfinite().all()) for tensor in found.values()):
        raise UserError(f"token {token} holds a number that is not finite: it is spoilt, train it again")
    return found


def plain_token(token: str) -> str:
    """The token as a file name, which is the trigger in graphical programs: `<my-cat>` → "my-cat"."""
    return re.sub(r"[^\w.-]+", "_", token.strip("<>")).strip("._") or "token"


def family_of(rows: Rows) -> str | None:
    """ "sd1", "sd2" or "sdxl" by the rows' widths, None where they do not tell."""
    if "text_encoder_2" in rows:
        return "sdxl"
    return {768: "sd1", 1024: "sd2"}.get(rows["text_encoder"].shape[-1])


def ui_file(concept: Concept, *, family: str | None = None, dtype: torch.dtype = torch.float32) -> bytes:
    """The file for the graphical programs; its name, without the ending, becomes the trigger."""
    rows, family = _cast(concept, dtype), family or family_of(concept.rows)
    about = {"format": "pt", "modelspec.sai_model_spec": "1.0.1", "modelspec.title": plain_token(concept.token)}
    about["modelspec.trigger_phrase"] = plain_token(concept.token)
    if family is not None:
        about["modelspec.architecture"] = f"{ARCHITECTURES[family]}/textual-inversion"
    keys = UI_KEYS if family == "sdxl" else {"text_encoder": "emb_params"}
    if missing := set(rows) - set(keys):
        raise UserError(f"token {concept.token} has rows for {missing.pop()}, which {family} does not have")
    return tensor_bytes({keys[encoder]: tensor for encoder, tensor in rows.items()}, about)


def diffusers_file(concept: Concept, encoder: str, *, dtype: torch.dtype = torch.float32) -> bytes:
    """The rows for one text encoder as `load_textual_inversion` reads them, without being told the token."""
    if concept.token in KNOWN_KEYS:
        raise UserError(f"the token {concept.token} is a word of the file formats: give it another name")
    rows = _cast(concept, dtype)[encoder]
    return tensor_bytes({concept.token: rows}, {"format": "pt", ENCODER_MARK: encoder})


def named(concepts: Mapping[str, Iterable[str]], layout: str = "both") -> dict[str, tuple[str, str | None]]:
    """The files of several concepts, token → encoders: name → token and encoder (None: the UIs' form, with all).

    "my-cat.safetensors" is for the UIs, "my-cat_learned_embeds.safetensors" for diffusers, without "my-cat_" where
    there is only one concept; the file for a second text encoder ends in "_2".

    Raises:
        UserError: an unknown `layout`, or two names that are one on some file systems.
    """
    if layout not in ("ui", "diffusers", "both"):
        raise UserError(f"unknown layout {layout!r} of token files: choose ui, diffusers or both")
    found: dict[str, tuple[str, str | None]] = {}
    for token, rows in concepts.items():
        stem = "learned_embeds" if len(concepts) == 1 else f"{plain_token(token)}_learned_embeds"
        names: dict[str, tuple[str, str | None]] = {}
        if layout != "diffusers":
            names[f"{plain_token(token)}.safetensors"] = (token, None)
        if layout != "ui":
            endings = {encoder: "_2" if encoder == "text_encoder_2" else "" for encoder in rows}
            names |= {f"{stem}{ending}.safetensors": (token, encoder) for encoder, ending in endings.items()}
        used = {name.casefold() for name in found}
        if clash := next((name for name in names if name.casefold() in used), None):
            raise UserError(f"token {token} would be written to {clash}, which another token is: rename one of them")
        found |= names
    return found


def files_of(
    concepts: Mapping[str, Rows],
    *,
    layout: str = "both",
    family: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, bytes]:
    """The contents of all files that `named` lists; UserError for rows that cannot be written."""
    files = {}
    for name, (token, encoder) in named(concepts, layout).items():
        concept = Concept(token, checked(token, concepts[token]))
        if encoder is None:
            files[name] = ui_file(concept, family=family, dtype=dtype)
        else:
            files[name] = diffusers_file(concept, encoder, dtype=dtype)
    return files


def require_files(
    folder: Path, concepts: Mapping[str, Rows], layout: str = "both", dtype: torch.dtype = torch.float32
) -> None:
    """UserError unless every file that `named` lists is in `folder` and gives back the rows it was made of."""
    for name, (token, encoder) in named(concepts, layout).items():
        expected = checked(token, concepts[token])
        expected = expected if encoder is None else {encoder: expected[encoder]}
        found = read_concept(folder / name)
        same = found.rows.keys() == expected.keys() and found.token == (token if encoder else Path(name).stem)
        if not same or not all(torch.equal(found.rows[key], expected[key].to(dtype).float()) for key in expected):
            raise UserError(f"{name} does not give back the rows of token {token}: the disk or memory is faulty")


def read_concept(path: str | Path, token: str | None = None, content: TensorFile | None = None) -> Concept:
    """Read a token file of any of the forms; in the UIs' form the token is the file's name, unless `token` is given.

    `content` is what has already been read from `path`.

    Raises:
        UserError: damaged, a pickle, or no textual inversion.
    """
    path, content = Path(path), read_tensors(path) if content is None else content
    tensors = content.tensors
    if not tensors:
        raise UserError(f"{path} is empty: a file with learned token rows was expected")
    if set(tensors) <= set(KNOWN_KEYS):
        encoders = [KNOWN_KEYS[key] for key in tensors]
        if len(set(encoders)) != len(encoders):
            raise UserError(f"{path} holds {sorted(tensors)}, which are rows of one text encoder twice")
        token = token or path.stem
        return Concept(token, checked(token, {KNOWN_KEYS[key]: tensor for key, tensor in tensors.items()}))
    if len(tensors) != 1:
        raise UserError(f"{path} holds {len(tensors)} tensors, e.g. {min(tensors)[:80]!r}: is it a LoRA or a model?")
    key, rows = next(iter(tensors.items()))
    encoder = content.metadata.get(ENCODER_MARK, "text_encoder_2" if rows.shape[-1:] == (1280,) else "text_encoder")
    token = token or key
    return Concept(token, checked(token, {encoder: rows}))


def _cast(concept: Concept, dtype: torch.dtype) -> dict[str, Tensor]:
    rows = {encoder: tensor.to(dtype) for encoder, tensor in checked(concept.token, concept.rows).items()}
    if not all(bool(tensor.isfinite().all()) for tensor in rows.values()):
        raise UserError(f"token {concept.token} does not fit into {dtype}: write the file in torch.float32")
    return rows
