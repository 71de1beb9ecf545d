"""Model card: front matter the hub accepts, and nothing said that is not so."""

import re

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from personalize.adapters.adapter import Adapter
from personalize.adapters.model_card import model_card


def card(source=True, drawn=(), concepts=None, **info):
    base = {"name": "runwayml/stable-diffusion-v1-5", "family": "sd1", **info.pop("base", {})}
    lora = {"unet.conv_in.lora_A.weight": torch.ones(4, 3, 3, 3), "unet.conv_in.lora_B.weight": torch.ones(8, 4, 1, 1)}
    info = {"base": base, "caption": 'a "photo" of my cat: at home', **info}
    embeds = {"embeds": torch.zeros(1, 77, 8)} if source else None
    adapter = Adapter(lora, 4, 4.0, embeds, info, concepts or {})
    return model_card(name="my-cat", kohya_file="my-cat.safetensors", adapter=adapter, pictures=list(drawn))


def front(text):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.S)[1])


def test_front_matter():
    found = front(card(drawn=["source.png", "on the beach.png"]))
    assert {"text-to-image", "diffusers", "lora", "template:sd-lora", "stable-diffusion"} <= set(found["tags"])
    assert found["base_model"] == "runwayml/stable-diffusion-v1-5"
    assert found["instance_prompt"] == 'a "photo" of my cat: at home' and found["license"] == "creativeml-openrail-m"
    assert [entry["output"]["url"] for entry in found["widget"]] == ["source.png", "on%20the%20beach.png"]
    assert "stable-diffusion-xl" in front(card(base={"family": "sdxl"}))["tags"]


def test_front_matter_survives_what_a_caption_may_hold():
    for caption in ("---\nevil: true", "a\n\n# heading", "tab\there", "'quoted' #1", "été 猫"):
        found = front(card(caption=caption))
        assert found["instance_prompt"] == " ".join(caption.split()) and "evil" not in found


@pytest.mark.parametrize("name", ["embedded", "/home/ann/models/sd15", "C:\\models\\sd15", ""])
def test_a_base_that_is_no_hub_id_is_not_given_as_one_and_no_folder_leaks(name):
    text = card(base={"name": name})
    assert "base_model" not in front(text) and "ann" not in text and "C:" not in text


def test_sections():
    text = card(drawn=["source.png"], standalone_gap_db=4.25)
    for part in ("my-cat.safetensors", "load_lora_weights", "personalize.attach", "models/Lora", "ComfyUI", "InvokeAI"):
        assert part in text
    for part in ("## Trigger words", "## Limits", "## Consent", "4.2 dB", "![source](source.png)"):
        assert part in text
    assert "StableDiffusionXLPipeline" in card(base={"family": "sdxl"})


@pytest.mark.parametrize("text", [card(source=False), card(standalone=True)])
def test_standalone_says_so_and_offers_no_embedding(text):
    assert "standalone" in text and "without a source embedding" in text and "personalize.attach" not in text


def test_a_person_is_named_in_the_consent_section():
    assert "marked as showing a person" in card(person=True) and "marked as showing" not in card()


@pytest.mark.parametrize("name", ["embedded", "owner/name", "/models/sd15"])
def test_snippets_are_python(name):
    snippets = re.findall(r"```python\n(.*?)```", card(base={"name": name}), re.S)
    assert len(snippets) == 2
    for snippet in snippets:
        compile(snippet, "card", "exec")


def test_an_adapter_of_the_embedded_model_is_not_offered_to_programs_it_does_not_fit():
    text = card(base={"name": "embedded"})
    assert "EMBEDDED" in text and "fits no other checkpoint" in text and "models/Lora" not in text


def test_the_card_says_how_exactly_the_picture_comes_back():
    text = " ".join(card(source=False, reconstruction_db=21.04, autoencoder_db=31.5).split())
    assert "a PSNR of 21.0 dB to the source" in text and "10.5 dB below" in text
    assert "dB from the source" not in card(), "no figure is claimed that was not measured"


def test_learned_tokens_are_named_for_each_program():
    assert "## Learned tokens" not in card()
    text = card(source=False, concepts={"<my-cat>": {"text_encoder": torch.zeros(2, 8)}})
    assert "| `<my-cat>` | 2 | `my-cat` | `embedding:my-cat` |" in text
    assert 'load_textual_inversion("path/to/this/folder", weight_name="learned_embeds.safetensors")' in text
    rows = {"text_encoder": torch.zeros(1, 8), "text_encoder_2": torch.zeros(1, 9)}
    text = card(base={"family": "sdxl"}, concepts={"a": rows, "b": rows})
    assert 'weight_name="b_learned_embeds_2.safetensors", text_encoder=pipe.text_encoder_2' in text


def test_a_sum_of_adapters_says_of_what():
    parts = [{"name": "cat", "weight": 1.0}, {"name": "style", "weight": -0.5}]
    assert "1 × cat + -0.5 × style, for Stable Diffusion 1.x" in card(source=False, merged_from=parts)


def test_a_sum_of_adapters_says_what_it_lacks_and_of_how_many_pictures_it_is():
    parts = [{"name": "cat", "weight": 1.0, "left_out": ["source embedding"]}, {"name": "style", "weight": 1.0}]
    text = card(source=False, merged_from=parts, pictures=6)
    assert "Merged without the source embedding of cat: " in text and "Learned from 6 pictures" in text
    assert "standalone" not in text and "Trained for use without" not in text
    text = card(source=False, merged_from=parts[1:])
    assert "No source embedding belongs to it" in text and "Learned from an unknown number of pictures" in text


HOSTILE = (
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>",
    "``` \n# heading\n<b>bold</b>", "````", "---\nlicense: mit",
    "![x](javascript:alert(1)) [y](http://z)", "&lt;b&gt; | cell | **bold**", "a\n\n## Consent\n\nfreely given",
)  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_user_wrote_stays_text(text):
    """Rendered as the hub does, by CommonMark with HTML: no tag, link, heading or rule comes of it."""
    made = card(caption=text, preview_failed=text, merged_from=[{"name": text, "weight": 1.0}])
    plain = card(caption="a cat", preview_failed="no", merged_from=[{"name": "other", "weight": 1.0}])

    def tags(content):
        html = MarkdownIt("commonmark", {"html": True}).render(content.split("---\n", 2)[2])
        return re.findall(r"</?([a-z]\w*)", html)

    assert tags(made) == tags(plain) and front(made)["instance_prompt"] == " ".join(text.split())


def test_the_card_is_read_by_the_hubs_own_class():
    """Its fields as the hub's page shows them; the hub's validator itself answers on the network alone (below)."""
    data = ModelCard(card(drawn=["source.png"], person=True)).data
    assert data.base_model == "runwayml/stable-diffusion-v1-5" and data.library_name == "diffusers"
    assert data.license == "creativeml-openrail-m" and data.to_dict()["widget"][0]["output"]["url"] == "source.png"


@pytest.mark.hub
@pytest.mark.parametrize("text", ["a cat", *HOSTILE])
def test_the_hubs_validator_takes_the_card(text):
    ModelCard(card(caption=text, drawn=["source.png"])).validate(repo_type="model")


def test_licence_and_verification_are_said():
    assert "`openrail++`" in card(base={"name": "stabilityai/stable-diffusion-xl-base-1.0"})
    assert "not known here" in card(base={"name": "someone/base"}) and front(card(license="mit"))["license"] == "mit"
    assert "personalize verify" in card()
