"""What a picture that a model made says of itself: that a model made it, and with which settings.

Three marks, each where other programs look for it:

    XMP           Iptc4xmpExt:DigitalSourceType, IPTC's word for how the picture came about
    parameters    the text of A1111's web UI: prompt, settings, model, LoRA hashes (PNG text; EXIF in JPEG and WebP)
    personalize   JSON with the settings; of edits, all that draws the picture again (PNG text; XMP in JPEG and WebP)

The first is public, the other two are the user's: prompt, names of files and their hashes, never a path.

References: IPTC Photo Metadata Standard 2023.2, "Digital Source Type"; XMP specification, part 3, for the places in
PNG, JPEG and WebP.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

from PIL import Image, PngImagePlugin

from personalize.errors import UserError, first_line
from personalize.io.content_credentials import SOURCE_TYPES
from personalize.io.image_files import DAMAGED, header
from personalize.io.json_files import SURROGATE, parse_json
from personalize.io.plain_files import opened

NAMESPACES = {
    "x": "adobe:ns:meta/",
    "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "Iptc4xmpExt": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
    "xmp": "http://ns.adobe.com/xap/1.0/",
    "personalize": "urn:personalize:1.0:",
}
XMP_KEY, PARAMETERS, DETAILS = "XML:com.adobe.xmp", "parameters", "personalize"
ABOUT_THE_PHOTO = {0x010F, 0x0110, 0x0131, 0x0132, 0x013B, 0x8298, 0x8769, 0x8825}  # make to copyright, EXIF, GPS
USER_COMMENT, EXIF_IFD, ORIENTATION = 0x9286, 0x8769, 0x0112
PACKET = ('<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n', '\n<?xpacket end="w"?>')
MAX_DETAILS = 1 << 20  # bytes of JSON that are read from a picture
SourceType = Literal["trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"]

for prefix, uri in NAMESPACES.items():
    ElementTree.register_namespace(prefix, uri)


@dataclass(frozen=True)
class Provenance:
    """The marks of one picture.

    source_type: made by a model from text, or by a model out of a photo; None leaves the mark out.
    details: the JSON that draws the picture again, None for none; the text for A1111 is made of it.
    exif: EXIF data of the photo, to be kept; None for none.
    """

    source_type: SourceType | None = "trainedAlgorithmicMedia"
    details: Mapping[str, Any] | None = None
    exif: bytes | None = None

    @property
    def parameters(self) -> str:
        """The text of A1111's web UI, "" without details."""
        return "" if self.details is None else SURROGATE.sub("\ufffd", parameters_text(self.details))

    def xmp(self, *, with_details: bool) -> bytes:
        """The XMP packet; with the JSON in it for files that have no place of their own for it. b"" if it is empty."""
        words: dict[str, str] = {}
        if self.source_type is not None:
            words["Iptc4xmpExt:DigitalSourceType"] = SOURCE_TYPES + self.source_type
            words["xmp:CreatorTool"] = "personalize"
        if with_details and self.details is not None:
            words["personalize:details"] = json.dumps(self.details, sort_keys=True)
        return _packet(words) if words else b""


GENERATED = Provenance()
EDITED_PHOTO = Provenance("compositeWithTrainedAlgorithmicMedia")


def picture_bytes(picture: Image.Image, mark: Provenance | None = None, kind: str = "PNG") -> bytes:
    """The bytes of `picture` as a file of `kind` (PNG, JPEG or WEBP) with the marks of `mark`.

    Of `picture.info` nothing is written, and EXIF only if `mark.exif` holds it. Equal arguments give equal bytes.
    """
    mark, buffer = mark or Provenance(None), BytesIO()
    bare = picture.copy()
    bare.info = {}
    options: dict[str, Any] = {"PNG": _png_options, "JPEG": _exif_options, "WEBP": _exif_options}[kind](mark)
    bare.save(buffer, kind, **options, **{"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(kind, {}))
    return buffer.getvalue()


def _png_options(mark: Provenance) -> dict[str, Any]:
    texts = PngImagePlugin.PngInfo()
    if packet := mark.xmp(with_details=False):
        texts.add_itxt(XMP_KEY, packet.decode())
    if mark.details is not None:
        texts.add_itxt(PARAMETERS, mark.parameters)
        texts.add_itxt(DETAILS, json.dumps(mark.details, sort_keys=True))
    return {"pnginfo": texts} | ({} if mark.exif is None else {"exif": mark.exif})


def _exif_options(mark: Provenance) -> dict[str, Any]:
    exif = Image.Exif()
    if mark.exif is not None:
        exif.load(mark.exif)
    if mark.details is not None:
        exif.get_ifd(EXIF_IFD)[USER_COMMENT] = b"UNICODE\0" + mark.parameters.encode("utf-16-be")
    options: dict[str, Any] = {"exif": exif} if len(exif) or mark.details is not None else {}
    if packet := mark.xmp(with_details=True):
        options["xmp"] = packet
    return options


def _packet(words: Mapping[str, str]) -> bytes:
    """An XMP packet with one simple property for each of `words`, named prefix:name."""
    root = ElementTree.Element(_full("x:xmpmeta"))
    about = ElementTree.SubElement(ElementTree.SubElement(root, _full("rdf:RDF")), _full("rdf:Description"))
    about.set(_full("rdf:about"), "")
    for name, value in words.items():
        ElementTree.SubElement(about, _full(name)).text = value
    return (PACKET[0] + ElementTree.tostring(root, encoding="unicode") + PACKET[1]).encode()


def _full(name: str) -> str:
    prefix, _, local = name.partition(":")
    return f"{{{NAMESPACES[prefix]}}}{local}"


def parameters_text(details: Mapping[str, Any]) -> str:
    """The text that A1111's web UI writes: the prompt, the negative prompt, and a line of settings."""
    prompt, negative = (" ".join(str(details.get(key) or "").split()) for key in ("prompt", "negative_prompt"))
    base = details.get("base") or {}
    settings = {
        "Steps": details.get("steps"), "Sampler": details.get("scheduler"), "CFG scale": details.get("guidance_scale"),
        "Seed": details.get("seed"), "Size": details.get("size"),
        "Model": _unquoted(str(base.get("name") or "")),
    }  # fmt: skip
    hashes = ", ".join(
        f"{_unquoted(one['name'])}: {one['lora_hash'][:12]}"
        for one in details.get("adapters", ())
        if one.get("lora_hash")
    )
    settings |= {"Lora hashes": f'"{hashes}"' if hashes else None, "Version": f"personalize {details.get('version')}"}
    line = ", ".join(f"{name}: {value}" for name, value in settings.items() if value not in (None, ""))
    return "\n".join([prompt, *([f"Negative prompt: {negative}"] if negative else []), line])


def _unquoted(name: str) -> str:
    """`name` without the characters that end an entry of "Lora hashes"."""
    return "".join("_" if character in '",:' else character for character in name)


@dataclass(frozen=True)
class Marks:
    """What a picture file says of itself: `source_type` (IPTC's URI), `parameters`, `details`; each None if absent."""

    source_type: str | None = None
    parameters: str | None = None
    details: dict[str, Any] | None = None

    def __bool__(self) -> bool:
        return any(value is not None for value in vars(self).values())


def read_marks(path: str | Path) -> Marks:
    """The marks in the picture file `path`, whoever wrote them.

    Raises:
        UserError: the file is no picture, or its personalize JSON is damaged.
    """
    with opened(path) as stream:
        try:
            with Image.open(stream) as picture:
                texts = {key: value for key, value in picture.info.items() if isinstance(value, (str, bytes))}
                comment = picture.getexif().get_ifd(EXIF_IFD).get(USER_COMMENT)
        except (*DAMAGED, Image.DecompressionBombError) as error:
            raise UserError(f"{path} cannot be read as a picture: {first_line(error)}") from None
    packet = texts.get(XMP_KEY) or texts.get("xmp") or ""
    words = _packet_words(packet.encode() if isinstance(packet, str) else packet)
    parameters, details = texts.get(PARAMETERS), texts.get(DETAILS) or words.get("personalize:details")
    if parameters is None and isinstance(comment, bytes) and comment.startswith(b"UNICODE\0"):
        parameters = comment[8:].decode("utf-16-be", "replace")
    return Marks(words.get("Iptc4xmpExt:DigitalSourceType"), _text(parameters), _details(path, _text(details)))


def photo_exif(path: str | Path) -> bytes | None:
    """The EXIF data of the photo `path` without its orientation, which is applied when it is read; None if none.

    Raises:
        UserError: the file is no picture that `load_image` reads, or its EXIF data is damaged.
    """
    with header(path) as picture:
        try:
            exif = picture.getexif()
            exif.pop(ORIENTATION, None)
            if picture.format == "TIFF":  # whose other tags say how its own pixels lie
                for tag in set(exif) - ABOUT_THE_PHOTO:
                    del exif[tag]
            return exif.tobytes() if len(exif) else None
        except DAMAGED as error:
            raise UserError(f"{path}: its EXIF data is damaged ({first_line(error)}): leave --keep_exif out") from None


def _text(value: str | bytes | None) -> str | None:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _packet_words(packet: bytes) -> dict[str, str]:
    """The properties of our namespaces in an XMP packet, as elements or attributes; {} if there is none, or no XML."""
    start, end = packet.find(b"<x:xmpmeta"), packet.rfind(b"</x:xmpmeta>")
    if start < 0 or end < 0 or b"<!" in packet:  # a document type could define entities
        return {}
    try:
        root = ElementTree.fromstring(packet[start : end + len(b"</x:xmpmeta>")])
    except ElementTree.ParseError:
        return {}
    known = {_full(f"{prefix}:{name}"): f"{prefix}:{name}" for prefix, name in (
        ("Iptc4xmpExt", "DigitalSourceType"), ("personalize", "details"))}  # fmt: skip
    found = {known[element.tag]: element.text or "" for element in root.iter() if element.tag in known}
    attributes = {known[key]: value for element in root.iter() for key, value in element.attrib.items() if key in known}
    return attributes | found


def _details(path: str | Path, text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        value = parse_json(text, path) if len(text) <= MAX_DETAILS else None
    except UserError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path}: its settings are damaged, expected the JSON that personalize writes into pictures")
    return value
