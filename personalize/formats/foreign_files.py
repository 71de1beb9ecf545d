"""The one reader of adapter files that do not lie in a folder of ours: LoRA and embeddings of any program."""

from __future__ import annotations

from pathlib import Path

from personalize.formats import layouts, lora_files, textual_inversion_files
from personalize.io.tensor_files import TensorFile


def read_foreign_file(
    path: str | Path, content: TensorFile, token: str | None = None
) -> lora_files.LoraFile | textual_inversion_files.LearnedToken:
    """The LoRA or the learned token in a file of any program; the one reader of files that are no adapter folder.

    Args:
        path: the file's name, for messages and for tokens that the file does not name.
        content: what `read_tensors` or, where pickles are allowed, `read_any` has read from it.
        token: the word of a learned token, in place of the file's own.

    Raises:
        UserError: the file holds neither of the two, or more than that.
    """
    path = Path(path)
    if not layouts.classify_tensors(content.tensors).file_kind.startswith("textual inversion"):
        return lora_files.read_lora(path, content)
    tensors = {key: tensor for key, tensor in content.tensors.items() if not key.endswith("_out")}
    if set(tensors) == {"string_to_param.*"}:  # a pickle of A1111
        rows = {"text_encoder": tensors["string_to_param.*"].float()}
        token = token or content.metadata.get("name") or path.stem
        return textual_inversion_files.LearnedToken(token, textual_inversion_files.checked_rows(token, rows))
    return textual_inversion_files.read_concept(path, token, TensorFile(tensors, content.metadata))
