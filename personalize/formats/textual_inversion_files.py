"""Files of learned tokens (textual inversion): new rows of a text encoder's embedding table.

The rows of a token are a dictionary from "text_encoder" to a tensor (n, d) and, for SDXL, from "text_encoder_2" to a
tensor (n, d₂): a token may stand for n > 1 vectors.  Programs read one of two layouts:

    layout      keys                              read by
    ui          emb_params; SDXL: clip_l, clip_g  A1111, Forge, ComfyUI, InvokeAI, kohya; the file's name is the trigger
    diffusers   the token itself                  diffusers' `load_textual_inversion`; one file per text encoder

For the second and later rows of a token `<cat>`, diffusers adds tokens `<cat>_1`, `<cat>_2`, … on loading.

Reference: Gal et al., "An Image is Worth One Word", arXiv 2208.01618.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from personalize.errors import Notice, UserError
from personalize.io.tensor_files import TensorFile, read_tensors, tensor_bytes
from personalize.models.config import TEXT_ENCODERS

UI_KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
KNOWN_KEYS = {  # keys of every layout except diffusers': the graphical programs', OneTrainer's and cog-sdxl's
    "emb_params": "text_encoder", "emp_params": "text_encoder", "clip_l": "text_encoder", "clip_g": "text_encoder_2",
    "text_encoders_0": "text_encoder", "text_encoders_1": "text_encoder_2",
}  # fmt: skip
OUTPUT_KEYS = {f"{key}_out" for key in KNOWN_KEYS}  # OneTrainer's rows for the output of a text encoder
ENCODER_METADATA_KEY = "personalize.text_encoder"  # since diffusers' layout does not say which encoder the rows are for
BUNDLE = "bundle_emb."  # the start of the keys of embeddings inside a LoRA file: bundle_emb.<token>.<key>
BUNDLED_KEY = re.compile(rf"(.+)\.((?:{'|'.join(KNOWN_KEYS)})(?:_out)?|string_to_(?:param|token)\..+)")
MAX_ROWS = 75  # CLIP has 77 positions, two of which are the start and end tokens
ARCHITECTURES = {
    "sd1": "stable-diffusion-v1", "sd2": "stable-diffusion-v2-512", "sdxl": "stable-diffusion-xl-v1-base"
}  # fmt: skip
Rows = Mapping[str, Tensor]


@dataclass(frozen=True)
class LearnedToken:
    """A token, and its learned rows for each text encoder."""

    token: str
    rows: dict[str, Tensor]


def checked_rows(token: str, rows: Rows) -> dict[str, Tensor]:
    """The rows as tensors (n, d) in fp32 on the CPU, after checking that they can be a token's.

    Raises:
        UserError: a token with spaces or over 100 characters; rows for an unknown text encoder, of a wrong shape, of
            different n for two text encoders, more than `MAX_ROWS`, or not finite.
    """
    if not token or len(token) > 100 or any(character.isspace() or ord(character) < 32 for character in token):
        raise UserError(f"{token[:100]!r} is no token: one word without spaces is expected, such as <my-cat>")
    if not rows or not set(rows) <= set(TEXT_ENCODERS):
        raise UserError(f"token {token} has rows for {sorted(rows)}: expected {' and '.join(TEXT_ENCODERS)}")
    tensors = {key: rows[key].detach().float().cpu() for key in TEXT_ENCODERS if key in rows}
    tensors = {key: tensor[None] if tensor.ndim == 1 else tensor for key, tensor in tensors.items()}
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if any(len(shape) != 2 for shape in shapes.values()) or len({shape[0] for shape in shapes.values()}) != 1:
        raise UserError(f"token {token} has rows of shapes {shapes}: expected (n, d) with one n for all text encoders")
    if not all(0 < count <= MAX_ROWS and width for count, width in shapes.values()):
        raise UserError(f"token {token} has rows of shapes {shapes}: 1 to {MAX_ROWS} rows fit into a prompt")
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise UserError(f"token {token} holds a number that is not finite: train it again")
    return tensors


def token_file_stem(token: str) -> str:
    """The name of a token's file without ending, the trigger in graphical programs: `<my-cat>` → "my-cat"."""
    return re.sub(r"[^\w.-]+", "_", token.strip("<>")).strip("._") or "token"


def family_of(rows: Rows) -> str | None:
    """The model family ("sd1", "sd2", "sdxl") by the rows' width d; None if it is the width of no family."""
    if "text_encoder_2" in rows:
        return "sdxl"
    return {768: "sd1", 1024: "sd2"}.get(rows["text_encoder"].shape[-1])


def ui_file(
    learned: LearnedToken, *, family: str | None = None, dtype: torch.dtype = torch.float32, trigger: str | None = None
) -> bytes:
    """The bytes of a token's file for graphical programs, which take the file's name without ending as the `trigger`.

    Raises:
        UserError: rows that are no token's (see `checked_rows`), too large for `dtype`, or for a text encoder that
            `family` does not have.
    """
    rows, family = _cast(learned, dtype), family or family_of(learned.rows)
    trigger = token_file_stem(learned.token) if trigger is None else trigger
    metadata = {"format": "pt", "modelspec.sai_model_spec": "1.0.1", "modelspec.title": trigger}
    metadata["modelspec.trigger_phrase"] = trigger
    if family is not None:
        metadata["modelspec.architecture"] = f"{ARCHITECTURES[family]}/textual-inversion"
    keys = UI_KEYS if family == "sdxl" else {"text_encoder": "emb_params"}
    if missing := set(rows) - set(keys):
        raise UserError(f"token {learned.token} has rows for {missing.pop()}, which {family} does not have")
    return tensor_bytes({keys[encoder]: tensor for encoder, tensor in rows.items()}, metadata)


def diffusers_file(learned: LearnedToken, encoder: str, *, dtype: torch.dtype = torch.float32) -> bytes:
    """The bytes of a token's file for one text encoder, from which `load_textual_inversion` learns the token too.

    Raises:
        UserError: as `ui_file`, and a token that is a key of another layout.
    """
    return diffusers_tokens({learned.token: {encoder: learned.rows[encoder]}}, dtype=dtype)


def diffusers_tokens(concepts: Mapping[str, Rows], *, dtype: torch.dtype = torch.float32) -> bytes:
    """The bytes of a file in diffusers' layout with every token's rows for one and the same text encoder.

    Raises:
        UserError: as `diffusers_file`, and rows for several text encoders.
    """
    encoders = {encoder for rows in concepts.values() for encoder in rows}
    if len(encoders) != 1:
        raise UserError("rows for two text encoders need two files in diffusers' layout: use `export tokens`")
    if known := set(concepts) & set(KNOWN_KEYS):
        raise UserError(f"the token {known.pop()} is a word of the file formats: give it another name")
    (encoder,) = encoders
    rows = {token: _cast(LearnedToken(token, dict(own)), dtype)[encoder] for token, own in concepts.items()}
    return tensor_bytes(rows, {"format": "pt", ENCODER_METADATA_KEY: encoder})


def token_file_names(concepts: Mapping[str, Iterable[str]], layout: str = "both") -> dict[str, tuple[str, str | None]]:
    """The names of the files for several tokens, and what each file holds.

    "my-cat.safetensors" is for graphical programs, "my-cat_learned_embeds.safetensors" for diffusers; the latter is
    "learned_embeds.safetensors" if there is only one token, and ends in "_2" for a second text encoder.

    Args:
        concepts: for each token, the text encoders that it has rows for.
        layout: "ui" (for graphical programs), "diffusers", or "both".

    Returns:
        For each file name: the token, and the text encoder whose rows the file holds, or None if it holds all.

    Raises:
        UserError: an unknown `layout`, or two names that differ only in case.
    """
    if layout not in ("ui", "diffusers", "both"):
        raise UserError(f"unknown layout {layout!r} of token files: choose ui, diffusers or both")
    names: dict[str, tuple[str, str | None]] = {}
    for token, encoders in concepts.items():
        stem = "learned_embeds" if len(concepts) == 1 else f"{token_file_stem(token)}_learned_embeds"
        added: dict[str, tuple[str, str | None]] = {}
        if layout != "diffusers":
            added[f"{token_file_stem(token)}.safetensors"] = (token, None)
        if layout != "ui":
            endings = {encoder: "_2" if encoder == "text_encoder_2" else "" for encoder in encoders}
            added |= {f"{stem}{ending}.safetensors": (token, encoder) for encoder, ending in endings.items()}
        used = {name.casefold() for name in names}
        if clash := next((name for name in added if name.casefold() in used), None):
            raise UserError(f"token {token} would be written to {clash}, as another token is: rename one of them")
        names |= added
    return names


def token_file_contents(
    concepts: Mapping[str, Rows],
    *,
    layout: str = "both",
    family: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, bytes]:
    """The bytes of every file that `token_file_names` lists; UserError for rows that cannot be written."""
    files = {}
    for name, (token, encoder) in token_file_names(concepts, layout).items():
        learned = LearnedToken(token, checked_rows(token, concepts[token]))
        if encoder is None:
            files[name] = ui_file(learned, family=family, dtype=dtype)
        else:
            files[name] = diffusers_file(learned, encoder, dtype=dtype)
    return files


def require_token_files(
    folder: Path, concepts: Mapping[str, Rows], layout: str = "both", dtype: torch.dtype = torch.float32
) -> None:
    """UserError unless every file that `token_file_names` lists is in `folder` and holds the rows of its token."""
    for name, (token, encoder) in token_file_names(concepts, layout).items():
        expected = checked_rows(token, concepts[token])
        expected = expected if encoder is None else {encoder: expected[encoder]}
        saved = read_concept(folder / name)
        same = saved.rows.keys() == expected.keys() and saved.token == (token if encoder else Path(name).stem)
        if not same or not all(torch.equal(saved.rows[key], expected[key].to(dtype).float()) for key in expected):
            raise UserError(f"{name} does not give back the rows of token {token}: the disk or memory is faulty")


def read_concept(path: str | Path, token: str | None = None, content: TensorFile | None = None) -> LearnedToken:
    """Read the token in a file of any program that holds one; see `read_concepts`.

    Raises:
        UserError: as `read_concepts`, and a file with several tokens.
    """
    content = read_tensors(path) if content is None else content
    if len(content.tensors) > 1 and not any(
        key in KNOWN_KEYS or key in OUTPUT_KEYS or key.startswith("string_to_") for key in content.tensors
    ):
        raise UserError(
            f"{path} holds {len(content.tensors)} tensors, e.g. {min(content.tensors)[:80]!r}: is it a LoRA?"
        )
    concepts = read_concepts(path, content, token)
    if len(concepts) != 1:
        raise UserError(f"{path} holds {len(concepts)} tokens, {', '.join(concepts)[:120]}: one was expected")
    return LearnedToken(*next(iter(concepts.items())))


def read_concepts(path: str | Path, content: TensorFile, token: str | None = None) -> dict[str, dict[str, Tensor]]:
    """The learned tokens of a file of any program, and the rows of each for every text encoder.

    A token is called `token` if there is only one and that is given, else by the word that the file has for it (spaces
    become "_"), else by the file's name without ending.  A Notice says which rows are not read (see `unread_rows`).

    Raises:
        UserError: the file is no textual inversion and no LoRA with one, rows that cannot be a token's, or two tokens
            of one name.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in content.tensors.items():
        if (place := _place(key, tensor, Path(path).stem, content)) is None:
            continue
        name, encoder = place
        if encoder in found.setdefault(name, {}):
            raise UserError(f"{path} holds {sorted(content.tensors)[:4]}, which are rows of one text encoder twice")
        found[name][encoder] = tensor
    unread = unread_rows(content)
    if not found:
        raise UserError(
            f"{path} {'holds nothing else: ' + unread if unread else 'is empty'}: learned rows were expected"
        )
    if unread:
        warnings.warn(f"{path}: {unread}", Notice, stacklevel=2)
    if token is not None and len(found) > 1:
        raise UserError(f"{path} holds {len(found)} tokens, {', '.join(found)[:120]}: --token renames a single one")
    named = {token or word_of(name): rows for name, rows in found.items()}
    if len(named) < len(found):
        raise UserError(
            f"{path} holds tokens that differ in spaces alone, {', '.join(sorted(found))[:120]}: rename one"
        )
    return {name: checked_rows(name, rows) for name, rows in named.items()}


def unread_rows(content: TensorFile) -> str:
    """A sentence on OneTrainer's rows for the output of a text encoder, unless there are none or they are zero."""
    keys = sorted(key for key, tensor in content.tensors.items() if _is_output(key) and bool(tensor.float().any()))
    return f"{', '.join(keys)[:120]} (rows for a text encoder's output, OneTrainer's alone) is not read" if keys else ""


def _is_output(key: str) -> bool:
    return (bundled_token(key)[1] if key.startswith(BUNDLE) else key) in OUTPUT_KEYS


def word_of(name: str) -> str:
    """The token that a file's name, or the name in a file, stands for: one word, spaces become "_"."""
    return re.sub(r"\s+", "_", name.strip())


def bundled_token(key: str) -> tuple[str, str]:
    """The token, which may have dots, and the rest of a key "bundle_emb.<token>.<key>" of a LoRA file."""
    rest = key.removeprefix(BUNDLE)
    name, _, part = rest.partition(".") if (match := BUNDLED_KEY.fullmatch(rest)) is None else (match[1], "", match[2])
    return name, part


def _place(key: str, tensor: Tensor, stem: str, content: TensorFile) -> tuple[str, str] | None:
    """The token and the text encoder of one tensor; None if it holds no rows of the encoders' input table."""
    bundled = any(name.startswith(BUNDLE) for name in content.tensors)
    if _is_output(key) or key.startswith("string_to_token.") or (bundled and not key.startswith(BUNDLE)):
        return None
    name = content.metadata.get("name") or stem
    if bundled:
        name, key = bundled_token(key)
        if key.startswith("string_to_token."):
            return None
    if key.startswith("string_to_param."):
        several = sum(other.startswith("string_to_param.") for other in content.tensors) > 1
        return (key.removeprefix("string_to_param.") if several and not bundled else name), "text_encoder"
    if key in KNOWN_KEYS:
        return name, KNOWN_KEYS[key]
    default = "text_encoder_2" if tensor.shape[-1:] == (1280,) else "text_encoder"
    return (name if bundled else key), content.metadata.get(ENCODER_METADATA_KEY, default)


def _cast(learned: LearnedToken, dtype: torch.dtype) -> dict[str, Tensor]:
    """The checked rows of a token in `dtype`; UserError if a number is too large for it."""
    rows = {encoder: tensor.to(dtype) for encoder, tensor in checked_rows(learned.token, learned.rows).items()}
    if not all(bool(tensor.isfinite().all()) for tensor in rows.values()):
        raise UserError(f"token {learned.token} does not fit into {dtype}: write the file in torch.float32")
    return rows
