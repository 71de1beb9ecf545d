"""Learn two concepts of one picture: python examples/two_concepts.py [photo.jpg "<cat1> cat" "<dog1> dog"]"""

import sys
from pathlib import Path

from PIL import Image

import personalize


def main(
    photo: str | None = None, *phrases: str, base: str | Path | None = None, output_dir: str | Path = "my-pets",
    config: personalize.MultiConceptConfig | None = None, steps: int = 30,
) -> Image.Image:  # fmt: skip
    model = personalize.StableDiffusion.load(base)
    image = personalize.load_image(photo or Path(__file__).parent / "pictures" / "pets.png")  # a cat and a dog
    subjects = tuple(personalize.Subject.of(phrase) for phrase in phrases or ("<cat1> cat", "<dog1> dog"))
    config = config or personalize.MultiConceptConfig(initializer_token="class")
    with personalize.multi_concept_run(model, personalize.ConceptPicture(image, subjects), config) as run:
        for report in run.steps():
            print(f"{report.update} of {run.updates}: loss {float(report.losses['loss']):.3f}", end="\r")
        adapter = run.adapter()
    adapter.save(output_dir)
    prompts = [f"a picture of a {subject.phrase} in the snow" for subject in subjects]
    with personalize.Editor(model, adapter) as editor:
        row = [image, *(editor.edit(prompt, sampling=personalize.Sampling(steps=steps))[0] for prompt in prompts)]
    personalize.grid([row], columns=["the picture", *prompts]).save(Path(output_dir) / "apart.png")
    return row[-1]


if __name__ == "__main__":
    main(*sys.argv[1:])
