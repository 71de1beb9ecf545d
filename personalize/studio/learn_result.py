"""What the tab Learn shows while a training runs, and when it has ended."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from personalize.formats.adapter_folders import MANIFEST
from personalize.io.json_files import read_json
from personalize.studio.jobs import Job
from personalize.studio.parts import Markup, address, facts, links, strip


def live(job: Job) -> str:
    """Loss curve and replays of a training that runs, or that was cancelled or failed."""
    now = job.result or {}
    if not now.get("losses"):
        return '<div class="quiet">Preparing …</div>' if job.state == "running" else ""
    update, loss = now["losses"][-1]
    ceiling = "" if now["ceiling"] is None else f" The autoencoder's own limit is {now['ceiling']:.1f} dB."
    stopping = " Stops after this update, and keeps what it has." if job.stopping else ""
    line = f"Update {update} of {now['updates']}, loss {loss:.3f}.{ceiling}{stopping}"
    return f'<div class="quiet">{line}</div>{curve(now["losses"])}{strip(now["replays"])}'


def curve(losses: Sequence[tuple[int, float]]) -> str:
    """The loss of every update, and its mean over a tenth of them, as a line."""
    width, height = 600, 140
    top = max(value for _, value in losses) or 1.0
    span = max(10, len(losses) // 10)
    means = [sum(v for _, v in losses[max(0, k - span + 1) : k + 1]) / min(k + 1, span) for k in range(len(losses))]
    first, last = losses[0][0], max(losses[-1][0], losses[0][0] + 1)

    def path(values: Sequence[float]) -> str:
        places = zip(losses, values, strict=True)
        at = (
            f"{(n - first) / (last - first) * width:.1f},{height - v / top * (height - 8):.1f}" for (n, _), v in places
        )
        return "M" + "L".join(at)

    label = f"Loss from update {first} to {losses[-1][0]}: {losses[0][1]:.3f} to {losses[-1][1]:.3f}"
    return (
        f'<figure class="curve" role="img" aria-label="{label}"><svg viewBox="0 0 {width} {height}" '
        f'preserveAspectRatio="none"><line x1="0" x2="{width}" y1="{height}" y2="{height}"/>'
        f'<path d="{path([v for _, v in losses])}" opacity="0.35"/><path d="{path(means)}"/></svg></figure>'
    )


def result(job: Job) -> str:
    """The adapter that was learned: how near it comes, who can read it, and its files."""
    ended = job.result
    adapter = Path(ended["adapter"])
    info = read_json(adapter / MANIFEST)
    names = {
        "reconstruction_db": "PSNR of the replay",
        "autoencoder_db": "PSNR of the autoencoder, its limit",
    }
    rows: dict[str, Any] = {"Adapter": f"{adapter}, saved and verified"}
    if ended["stopped"]:
        rows["Stopped"] = f"after update {ended['losses'][-1][0]} of {ended['updates']}; “Go on” continues from there"
    rows |= {text: f"{info[name]:.1f} dB" for name, text in names.items() if name in info}
    rows["Read by"] = reader_table(ended["readers"])
    files = sorted(path for path in adapter.iterdir() if path.suffix in (".safetensors", ".json", ".md"))
    rows["Files"] = links(files)
    pictures = [
        (adapter / f"{name}.png", name) for name in ("source", "reconstruction") if (adapter / f"{name}.png").exists()
    ]
    maps = adapter / "attention.png"
    above = '<p class="quiet">Where each word looks, before and after</p>'
    sheet = f'{above}<img class="maps" src="{address(maps)}" alt="maps">' if maps.exists() else ""
    return facts(rows) + curve(ended["losses"]) * bool(ended["losses"]) + strip([*pictures, *ended["replays"]]) + sheet


def reader_table(readers: Mapping[str, tuple[str, str]]) -> Markup:
    """Programs, and how each reads the adapter."""
    rows = "".join(
        f'<tr><td>{html.escape(program)}</td><td class="{verdict}">{verdict}</td><td>{html.escape(reason)}</td></tr>'
        for program, (verdict, reason) in readers.items()
    )
    return Markup(f"<table>{rows}</table>")
