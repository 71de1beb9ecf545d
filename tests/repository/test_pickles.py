"""Nothing here unpickles: weights are read as tensors alone, and what comes from the hub is safetensors."""

import ast
from pathlib import Path

import pytest

from personalize.models.config import safetensors_alone

ROOT = Path(__file__).parents[2]
ROOMS = ("personalize", "train", "export", "examples", "tests")
FILES = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
PRODUCT = [path for path in FILES if path.relative_to(ROOT).parts[0] not in ("tests", "examples")]
WITHOUT_WEIGHTS = ("Config", "Processor", "Tokenizer", "FeatureExtractor")  # what these read is JSON and text
UNPICKLERS = {"pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load", "dill.load", "cloudpickle.load"}
ALLOWED = {"personalize/evaluation/benchmarks.py": {"pickle.Unpickler"}}  # with a list of the names that it may call


def calls(path):
    """The calls in a file: what is called, as it is written, and the call."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def names(path):
    """The dotted names in a file, called or inherited from."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def option(call, name):
    """The value of a keyword as it is written; "**" where the keywords are a dictionary, None where it is not given."""
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    return given.get(name, "**" if None in given else None)


def test_torch_reads_tensors_alone():
    found = [(path, call) for path in FILES for name, call in calls(path) if name == "torch.load"]
    assert len(found) > 5
    assert not [f"{path}:{call.lineno}" for path, call in found if option(call, "weights_only") != "True"]


def test_nothing_is_unpickled():
    for path in PRODUCT:
        assert names(path) & UNPICKLERS <= ALLOWED.get(path.relative_to(ROOT).as_posix(), set()), path
    loads = [(path, call) for path in FILES for name, call in calls(path) if name in ("np.load", "numpy.load")]
    assert loads and not [path for path, call in loads if option(call, "allow_pickle") not in (None, "False")]


def test_weights_of_the_hub_are_safetensors():
    """Tests and benches load folders that they have written."""
    loads = [
        (path, name, call) for path in PRODUCT
        for name, call in calls(path) if name.endswith(".from_pretrained")
        and not name.removesuffix(".from_pretrained").endswith(WITHOUT_WEIGHTS)
    ]  # fmt: skip
    assert len(loads) > 4
    assert not [f"{path}:{call.lineno}" for path, _, call in loads if option(call, "use_safetensors") is None]


@pytest.mark.parametrize("place", ["openai/clip-vit-large-patch14", "facebook/dino-vitb8"])
def test_networks_and_captioners_of_the_hub_ask_for_safetensors(place, tmp_path, monkeypatch):
    import transformers

    from personalize.errors import UserError
    from personalize.evaluation import networks
    from personalize.training.data.captions import generate_caption

    asked = {}

    class Refusing:
        @staticmethod
        def from_pretrained(place, **settings):
            asked[place] = settings.get("use_safetensors")
            raise OSError("no such model here")

    monkeypatch.setattr(transformers, "AutoModelForImageTextToText", Refusing)
    with pytest.raises(networks.Unavailable):
        networks._load_network("clip_model", Refusing, place, "cpu")
    with pytest.raises(UserError, match="no captioning model"):
        generate_caption(None, "Salesforce/blip-image-captioning-base")
    assert asked == {place: True, "Salesforce/blip-image-captioning-base": True}
    assert safetensors_alone(tmp_path) is None, "what a person keeps in a folder may be of any kind"
