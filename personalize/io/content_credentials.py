"""Content Credentials (C2PA): a signed statement in a picture that a model made it, by the library c2pa-python.

The extra `c2pa` installs the library. A certificate that programs trust comes from an authority on C2PA's trust list;
with any other the signature is read and reported as of an unknown signer.

Reference: C2PA Technical Specification 2.1, assertion c2pa.actions and digitalSourceType.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from personalize.errors import UserError

ALGORITHMS = ("es256", "ps256", "ed25519", "es384", "es512")
SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"


def check_signing(files: Sequence[Path], *, provenance: bool = True) -> None:
    """UserError unless `files` are none, or a certificate and its key, and the library is installed.

    provenance: whether the pictures say that a model made them, which is what a signature is of.
    """
    if not files:
        return
    if not provenance:
        raise UserError("--c2pa signs that a model made the pictures, --no_provenance keeps it out: give one of them")
    if len(files) != 2:
        raise UserError(f"--c2pa takes two files, the certificate chain and its private key, got {len(files)}")
    certificate, key = files
    if find_spec("c2pa") is None:
        raise UserError("--c2pa needs the package c2pa-python: pip install 'personalize[c2pa]'")
    for path, word in ((certificate, "CERTIFICATE"), (key, "PRIVATE KEY")):
        if not path.is_file():
            raise UserError(f"--c2pa: {path}: no such file; give a certificate chain and its private key, both PEM")
        if f"{word}-----" not in path.read_text(encoding="latin-1")[: 1 << 20]:
            raise UserError(f"--c2pa: {path} holds no PEM block of a {word.lower()}: give the certificate first")


def signed(content: bytes, certificate: Path, key: Path, source_type: str) -> bytes:
    """The PNG file `content` with a signed manifest: the picture was created, with IPTC's `source_type`.

    Raises:
        UserError: certificate and key do not belong together, or are of a kind that C2PA does not take.
    """
    import c2pa  # pyright: ignore[reportMissingImports]

    action = {"action": "c2pa.created", "digitalSourceType": SOURCE_TYPES + source_type}
    manifest = {
        "claim_generator_info": [{"name": "personalize"}], "format": "image/png",
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [action]}}],
    }  # fmt: skip
    reason = ""
    for algorithm in ALGORITHMS:  # the key's file does not say which it is for
        info = c2pa.C2paSignerInfo(algorithm, certificate.read_bytes(), key.read_bytes(), None)
        output = io.BytesIO()
        try:
            with c2pa.Signer.from_info(info) as signer, c2pa.Builder(json.dumps(manifest)) as builder:
                builder.sign(signer, "image/png", io.BytesIO(content), output)
            return output.getvalue()
        except c2pa.C2paError as error:
            reason = reason or " ".join(str(error).split())[:300] or type(error).__name__
    raise UserError(f"--c2pa: the picture cannot be signed with {certificate}: {reason}")
