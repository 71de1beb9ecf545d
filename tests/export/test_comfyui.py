"""The nodes for ComfyUI without ComfyUI: their copies of our rules and formulas, and the command that copies them.

Inside a real ComfyUI they are tested by `tests/parity/test_comfyui_nodes.py`.
"""

import ast
import importlib.util
import json
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from personalize.adapters.adapter import Adapter
from personalize.adapters.forgetting import ALIASES, RULES, degrees, parse_rule_sum
from personalize.adapters.lora import module_names
from personalize.cli.main import main
from personalize.editing.config import DEFAULT_STRENGTHS
from personalize.editing.vector_projection import project, worded
from personalize.errors import UserError
from personalize.formats.timestep_rank import TimestepRank
from personalize.models.blocks import module_roles
from personalize.models.prompts import align_prompt
from tests.support.lora_states import ATTENTION, paths, random_lora
from tests.support.tiny import NAMES, tiny

NODES = Path(__file__).parents[2] / "export" / "comfyui"
FILES = sorted(NODES.glob("*.py"))


def node_file(name):
    """One of the nodes' files that imports nothing of ComfyUI."""
    spec = importlib.util.spec_from_file_location(f"nodes_{name}", NODES / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_rules_are_ours():
    told = json.loads((NODES / "forgetting_rules.json").read_text(encoding="utf-8"))
    ours = {name: asdict(rule) for name, rule in RULES.items()}
    fields = ("sides", "only", "keep", "keep_level", "level")
    tables = {name: {key: rule[key] for key in fields} for name, rule in ours.items()}
    assert told == json.loads(json.dumps({"rules": tables, "aliases": ALIASES}))


@pytest.mark.parametrize("name", NAMES)
def test_factors_are_ours(name):
    """Every rule, and several at once, on every layer of each family's UNet: equal factors, or refused by both."""
    theirs, unet = node_file("forgetting"), tiny(name).unet
    blocks = len(unet.config.block_out_channels)
    for names in (module_names(unet, tiny(name).family), list(paths(unet)), list(paths(unet, ATTENTION))):
        roles = module_roles(unet, names)
        sums = ("decoder=0.5+noselfattn=0.25", "nodecoder=0.5+noencoder=0.25", "encoderattn + encoder1=0.5+nodecoder")
        for text in (*RULES, *ALIASES, "decoder=0.5", *sums, " NoKV = 0.3 "):
            try:
                ours = degrees(roles, parse_rule_sum(text.strip()))
            except UserError:
                with pytest.raises(ValueError, match="selects no layer"):
                    theirs.factors(names, text, blocks)
            else:
                assert theirs.factors(names, text, blocks) == ours, text


@pytest.mark.parametrize("text", ["nonsense", "decoder=2", "decoder=x", "decoder=nan", "decoder=0.5+"])
def test_wrong_rules_are_refused(text):
    with pytest.raises(ValueError, match="forgetting rule"):
        node_file("forgetting").factors(["up_blocks.0.attentions.0.proj_in"], text, 4)


@pytest.mark.parametrize(
    ("rank", "least", "alpha"), [(8, 1, 1.0), (8, 4, 2.0), (5, 2, 0.5), (4, 4, 1.5), (100, 1, 1.0)]
)
def test_masks_are_ours(rank, least, alpha):
    rule = TimestepRank(rank, least, alpha)
    mask = node_file("timestep_rank").TimestepMask(rule.values(), 2 * rank)  # 2: an orthogonal start, masked in pairs
    assert torch.equal(mask.table, torch.tensor(rule.masks()).repeat(1, 2))
    with pytest.raises(ValueError, match="mixed up"):
        node_file("timestep_rank").TimestepMask(rule.values(), 2 * rank + 1)
    for more in ({"timesteps": 10**9}, {"alpha": 1e300}, {"alpha": float("inf")}):
        with pytest.raises(ValueError, match="both go to 10000"):
            node_file("timestep_rank").TimestepMask(rule.values() | more, 2 * rank)


def test_masked_lora_of_linear_layers_and_convolutions():
    """At the highest noise one component takes part, each sample has its own mask, and none does without a timestep."""
    module = node_file("timestep_rank")
    mask = module.TimestepMask({"rank": 2, "min_rank": 1, "alpha": 1.0, "timesteps": 1000}, 2)
    for layer, shape in ((torch.nn.Linear(3, 5), (2, 7, 3)), (torch.nn.Conv2d(3, 5, 3, 2, 1), (2, 3, 8, 8))):
        ones = (1,) * (layer.weight.ndim - 2)
        down, up = torch.randn(2, *layer.weight.shape[1:]), torch.randn(5, 2, *ones)
        forward = module.MaskedLora(layer, down, up, 0.5, mask).added_to(layer.forward)
        x = torch.randn(shape)
        with pytest.raises(RuntimeError, match="outside"):
            forward(x)
        found = mask(lambda x, t, forward=forward: forward(x), x, torch.tensor([999.0, 0.0]))
        for row, active in ((0, 1), (1, 2)):
            merged = layer.weight + 0.5 * (up[:, :active].flatten(1) @ down[:active].flatten(1)).view(
                layer.weight.shape
            )
            stock = type(layer).forward
            with torch.no_grad():
                before = layer.weight.clone()
                layer.weight.copy_(merged)
                expected = stock(layer, x)[row]
                layer.weight.copy_(before)
            assert torch.allclose(found[row], expected, atol=1e-5)  # fp32 sums in another order


def test_projection_is_ours():
    s, p = torch.randn(2, 7, 5), torch.randn(2, 7, 5)
    s[0, 0] = 0
    assert torch.allclose(node_file("prompts").project(s, p, 0.7, 1.3), project(s, p, 0.7, 1.3), atol=1e-6)


def test_the_dials_start_where_an_edit_does(monkeypatch):
    for name in ("folder_paths", "comfy", "comfy.lora", "comfy.utils", "comfy.patcher_extension"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["comfy.patcher_extension"].WrappersMP = None
    spec = importlib.util.spec_from_file_location("nodes_without_comfyui", NODES / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    dials = module.NODE_CLASS_MAPPINGS["PersonalizeProjectedPrompt"].INPUT_TYPES()["required"]
    assert {name: dials[name][1]["default"] for name in ("alpha", "beta")} == {
        "alpha": DEFAULT_STRENGTHS.alpha, "beta": DEFAULT_STRENGTHS.beta,
    }  # fmt: skip


def test_an_adapter_folder_is_read(tmp_path):
    model = tiny("sd1")
    lora = random_lora(paths(model.unet, ATTENTION))
    rows = {"<cat>": {"text_encoder": torch.randn(2, 32)}, "<dog>": {"text_encoder": torch.randn(1, 32)}}
    rule = TimestepRank(4, 1).values()
    info = {"base": model.identity, "caption": "a cat", "timestep_rank": rule}
    Adapter(lora, 4, 6.0, {"embeds": torch.randn(1, 77, 32)}, info, rows).save(tmp_path / "cat")
    read = node_file("adapter_folder").read_adapter(tmp_path / "cat")
    assert (read.alpha, read.caption, read.timestep_rank) == (6.0, "a cat", rule)
    assert all(torch.equal(lora[f"{stem}.lora_{side}.weight"], part) for stem, pair in read.lora.items()
               for side, part in zip("AB", pair, strict=True)) and len(read.lora) == len(lora) // 2  # fmt: skip
    assert read.source.nearest("")[0]["embeds"].shape == (1, 77, 32)
    assert all(torch.equal(read.tokens[token]["text_encoder"], rows[token]["text_encoder"]) for token in rows)
    Adapter.load(tmp_path / "cat" / "cat_lora.safetensors").save(tmp_path / "again")  # with the rule in its header
    assert node_file("adapter_folder").read_adapter(tmp_path / "again").timestep_rank == rule
    with pytest.raises(ValueError, match="no adapter folder"):
        node_file("adapter_folder").read_adapter(tmp_path)


CAPTIONS = ("a cat", "a cat on the beach", "A dog in the snow", "a dog")


@pytest.mark.parametrize(
    "prompt", ["", "a CAT", "a red cat on the beach", "a dog in a hat", "the snow dog", "a", "a bird"]
)
def test_of_several_captions_the_one_nearest_to_the_prompt_is_taken_as_ours(tmp_path, prompt):
    model = tiny("sd1")
    info = {"base": model.identity, "caption": CAPTIONS[0], "captions": CAPTIONS}
    source = {"embeds": torch.randn(4, 77, 32), "pooled": torch.randn(4, 8)}
    adapter = Adapter(random_lora(paths(model.unet, ATTENTION)), 4, 6.0, source, info)
    read = node_file("adapter_folder").read_adapter(adapter.save(tmp_path / "cat"))
    found, said = read.source.nearest(prompt)
    ours = adapter.starting_from(prompt=prompt).source
    assert all(torch.equal(found[name], ours[name]) and len(found[name]) == 1 for name in ("embeds", "pooled"))
    assert said == worded(prompt, adapter)


@pytest.mark.parametrize(
    "prompt", ["a dog", "A photo of a dog", "a drawing of a dog", "a photo of a picture of it", ""]
)
@pytest.mark.parametrize("caption", ["a cat", "a photo of a cat", "The drawing of a cat", ""])
def test_a_prompt_is_worded_as_ours(prompt, caption):
    assert node_file("adapter_folder").worded(prompt, caption) == align_prompt(prompt, caption)


@pytest.mark.parametrize("chunks", [1, 2])
def test_a_prompt_of_any_length_is_projected_onto_one_caption(monkeypatch, chunks):
    """One row of conditioning comes of it; behind 75 tokens the source is continued by the empty text."""
    prompts, folder = node_file("prompts"), node_file("adapter_folder")
    weights = SimpleNamespace(get_input_embeddings=lambda: SimpleNamespace(weight=torch.zeros(10, 8)))
    clip = SimpleNamespace(cond_stage_model=SimpleNamespace(clip_l=SimpleNamespace(transformer=weights)))
    whole, empty, pooled = torch.randn(1, 77 * chunks, 8), torch.randn(1, 77, 8), torch.randn(1, 4)
    encoded = lambda clip, text: {"cond": whole if text else empty, "pooled_output": pooled}  # noqa: E731
    monkeypatch.setattr(prompts, "_encoded", encoded)
    rows = {"embeds": torch.randn(4, 77, 8), "pooled": torch.randn(4, 4)}
    [[embeds, about]] = prompts.projected(clip, folder.Source(rows, CAPTIONS), "a dog in the snow", 0.7, 1.3)
    source = torch.cat([rows["embeds"][2:3]] + [empty] * (chunks - 1), 1)
    assert embeds.shape == whole.shape and torch.allclose(embeds, project(source, whole, 0.7, 1.3), atol=1e-6)
    assert torch.allclose(about["pooled_output"], project(rows["pooled"][2:3], pooled, 0.7, 1.3), atol=1e-6)


def test_nodes_are_small_and_need_nothing_of_this_package():
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
        assert not {name for name in names if name.split(".")[0] in ("personalize", "diffusers", "peft")}, path
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name}"


def test_command_copies_the_nodes_and_touches_nothing_else(tmp_path, capsys):
    target = tmp_path / "custom_nodes" / "personalize"
    for _ in range(2):  # an older copy is replaced
        assert main(["export", "comfyui", str(target)]) == 0
        assert {path.name for path in target.iterdir()} >= {path.name for path in FILES} | {"forgetting_rules.json"}
        assert all((target / path.name).read_bytes() == path.read_bytes() for path in FILES)
        (target / "nodes.py").write_text("old")
        (target / "__pycache__").mkdir(exist_ok=True)
    assert main(["export", "comfyui", str(target.parent)]) == 2  # other people's nodes lie there
    assert "none of the nodes" in capsys.readouterr().err
    assert (target / "nodes.py").read_text() == "old"


def test_a_second_adapter_does_not_take_the_place_of_the_token_of_a_first():
    """The token meant the later one's subject in the whole prompt, silently."""

    class Clip(SimpleNamespace):
        def clone(self):
            return Clip(**vars(self))

    class Tokenizer(SimpleNamespace):
        pass

    prompts, rows, plain = node_file("prompts"), torch.ones(2, 4), Tokenizer(embedding_directory=None)
    clip = Clip(tokenizer=SimpleNamespace(clip_l=plain), cond_stage_model=SimpleNamespace(clip_l=None))
    one = prompts.with_tokens(clip, {"<cat>": {"text_encoder": rows}})
    both = prompts.with_tokens(one, {"<dog>": {"text_encoder": 2 * rows}})
    again = prompts.with_tokens(both, {"<Cat>": {"text_encoder": rows.clone()}})
    assert list(again.tokenizer.clip_l.learned) == ["<cat>", "<dog>"]
    with pytest.raises(ValueError, match="token <cat> of its own"):
        prompts.with_tokens(both, {"<Cat>": {"text_encoder": 3 * rows}})
