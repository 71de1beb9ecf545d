"""One adapter for each row of a table: python examples/catalogue.py [items.csv] (columns image, caption, name, …)"""

import sys
from pathlib import Path

from PIL import Image

import personalize
from personalize import Catalogue, Editor, ProcessGroup, Sampling, SingleImageConfig, StableDiffusion, bundled


def main(
    table: str | None = None, *, base: str | Path | None = None, output_dir: str | Path = "my-catalogue",
    config: SingleImageConfig | None = None, steps: int = 30,
) -> Image.Image:  # fmt: skip
    folder, config, model = Path(output_dir), config or SingleImageConfig(), StableDiffusion.load(base)
    items, refused = personalize.read_items(table or bundled_table(folder), config)
    catalogue = Catalogue(folder, config, model.name)
    rows = personalize.learn_catalogue(items, refused, catalogue, lambda: model, ProcessGroup())
    personalize.write_table(rows, folder / "results.csv")
    learned = [row for row in rows if row["status"] == "done"]
    return Editor.load(learned[-1]["adapter"], base).reconstruct(sampling=Sampling(steps=steps))[0]


def bundled_table(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in (0, 1):
        bundled(number).picture.save(folder / f"photo-{number}.png")
    rows = [f'photo-{number}.png,"{bundled(number).caption}",subject-{number}' for number in (0, 1)]
    (folder / "items.csv").write_text("\n".join(["image,caption,name", *rows]), encoding="utf-8")
    return folder / "items.csv"


if __name__ == "__main__":
    main(*sys.argv[1:]).save("my-catalogue/last.png")
