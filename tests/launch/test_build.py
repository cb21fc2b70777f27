"""What a model's writer is told: look-ups by name, and everything else with its traceback and the setting in front."""

import copy
from pathlib import Path
from typing import Any

import pytest

from longreach.launch.build import build
from longreach.models.language_model import LanguageModel
from longreach.models.mixer import PartError
from longreach.trainer.run import failure

MODULE = """
from torch import nn
from longreach.models.mixer import Mixer

class Plain(Mixer):
    def __init__(self, *, width: int, heads: int, scale: float | None = None):
        super().__init__()
        self.output = nn.Linear(width, width, bias=False)
    def forward(self, x, seq):
        return self.output(x)
    def mixing_flops(self, seq):
        return 0

class Misspelt(Plain):
    def __init__(self, *, width: int, heads: int):
        super().__init__(width=width, heads=heads)
        self.inner = nn.Linear(self.widht, heads)

class Unpacking(Plain):
    def __init__(self, *, width: int, heads: int):
        super().__init__(width=width, heads=heads)
        first, second = (1, 2, 3)

class Hidden(Plain):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)

class Early(Mixer):
    def __init__(self, *, width: int, heads: int):
        self.output = nn.Linear(width, width)

class Never(Plain):
    def __init__(self, *, width: int, heads: int):
        self.heads = heads

class NoFlops(Mixer):
    def __init__(self, *, width: int, heads: int):
        super().__init__()
    def forward(self, x, seq):
        return x

class NoForward(Plain):
    forward = Mixer.forward

class Module(nn.Module):
    def __init__(self, *, width: int, heads: int):
        super().__init__()

class OneName(Plain):
    publishes = ("values")

class Undecayed(Plain):
    no_weight_decay = ("outptu.weight",)

def text(width, heads):
    return "a text"
"""
MOBA = "longreach.models.mixers.sparse.block_sparse_attention.MoBA"
MODEL = {
    "_target_": "longreach.models.language_model.LanguageModel",
    "vocabulary": 61,
    "width": 32,
    "depth": 2,
    "pattern": ["mine"],
    "mixers": {"mine": {"_target_": "my_mixers.Plain", "_partial_": True, "heads": 4}},
    "feed_forward": {"_target_": "longreach.models.feed_forward.swiglu.SwiGLU", "_partial_": True, "hidden": 48},
}


@pytest.fixture(autouse=True)
def my_mixers(module_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (module_folder / "my_mixers.py").write_text(MODULE)
    (module_folder / "broken_module.py").write_text("def f(:\n")
    (module_folder / "lacking_module.py").write_text("import a_package_that_is_not_there\n")
    (module_folder / "raising_module.py").write_text("raise ValueError('this is no setting')\n")
    monkeypatch.chdir(module_folder)


def model(**mixer: Any) -> dict[str, Any]:
    settings = copy.deepcopy(MODEL)
    settings["mixers"]["mine"].update(mixer)
    return settings


def target(name: str) -> dict[str, Any]:
    return model(_target_=name)


def test_a_mixer_of_a_module_beside_the_data_is_built() -> None:
    assert isinstance(build(model()), LanguageModel)
    assert isinstance(build(model(scale=1)), LanguageModel)  # an int is a float


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (target("my_mixer.Plain"), "No module my_mixer was found. Did you mean my_mixers?"),
        (target("elsewhere.Plain"), "No module elsewhere was found. Start from its folder, or"),
        (target("my_mixers.Plian"), "my_mixers has no Plian. Did you mean Plain?"),
        (target("longreach.models.mixers.mamba3.Mamba"), "Did you mean longreach.models.mixers.state_space.mamba2?"),
        (target("longreach.models.mixers.softmax_attention.Softmax"), "mixers.softmax.softmax_attention?"),
        (target("longreach.models.feed_forward.swiglu.SwiGlu"), "Did you mean SwiGLU?"),
        (target("my_mixers"), "got 'my_mixers', a module. Name one of its classes, such as my_mixers.Plain"),
        (target("my_mixers..Plain"), "Write package.module.Class"),
        (target("my_mixers.text"), r"model.mixers.mine must make a torch.nn.Module; got a str"),
        (target("my_mixers.Hidden"), r"constructor names its settings; Hidden takes \*\*kwargs"),
        (target("my_mixers.NoFlops"), "model.mixers.mine must define mixing_flops"),
        (target("my_mixers.NoForward"), "model.mixers.mine must define forward"),
        (target("my_mixers.Module"), "model.mixers.mine must be a mixer or a feed-forward layer; got Module"),
        (target("my_mixers.Never"), r"calling super\(\).__init__\(\) first"),
        (target("my_mixers.OneName"), r"names in OneName.publishes; got 'values'. Write \('name',\)"),
        (target("my_mixers.Undecayed"), "got outptu.weight. Known: output.weight"),
        (model(haeds=3), "model.mixers.mine must use settings of Plain; got 'haeds'. Did you mean 'heads'?"),
        (model(heads=None), "model.mixers.mine.heads must be of type int; got None"),
        (model(heads="four"), "model.mixers.mine.heads must be of type int; got 'four'"),
        (model(heads=True), "model.mixers.mine.heads must be of type int; got True"),
        (model(scale="x"), "scale must be of type float or null; got 'x'. Change it, or leave it out: it is None then"),
        (model(_target_=MOBA, rope_bsae=1.0), "settings of MoBA; got 'rope_bsae'. Did you mean 'rope_base'?"),
        (model(_target_=MOBA, head_dim="8"), "model.mixers.mine.head_dim must be of type int or null; got '8'"),
        (model(_target_=MOBA, attention=1), "settings of MoBA; got 'attention'"),
        (model(_partial_=False), "model.mixers.mine._partial_ must be true"),
        ({**MODEL, "widht": 3}, "model must use settings of LanguageModel; got 'widht'. Did you mean 'width'?"),
        ({**MODEL, "width": None}, "model.width must be of type int; got None"),
        ({**MODEL, "pattern": "mine"}, "model.pattern must be of type list; got 'mine'"),
        ({**MODEL, "mixers": {}}, "model.mixers must name at least one mixer"),
        ({**MODEL, "mixers": {"mine": {"heads": 4}}}, "model.mixers.mine._target_ must be the dotted path of a class"),
        ({**MODEL, "_target_": "my_mixers.Plain"}, "must be a LanguageModel; got Plain. A mixer goes into"),
        ({**MODEL, "feed_forward": {**MODEL["feed_forward"], "hidden": None}}, "model.feed_forward.hidden must be of"),
    ],
)  # fmt: skip
def test_what_cannot_be_looked_up_or_does_not_fit_is_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(settings)


def test_a_missing_setting_is_named() -> None:
    settings = model()
    del settings["mixers"]["mine"]["heads"]
    with pytest.raises(ValueError, match=r"model.mixers.mine must give heads; got nothing. Plain has no default"):
        build(settings)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("my_mixers.Misspelt", AttributeError, "model.mixers.mine (Misspelt): AttributeError: 'Misspelt' object has"),
        ("my_mixers.Early", AttributeError, "model.mixers.mine (Early): AttributeError: cannot assign module before"),
        ("my_mixers.Unpacking", PartError, "PartError: model.mixers.mine (Unpacking): ValueError: too many values"),
        ("broken_module.Plain", SyntaxError, "model.mixers.mine._target_, importing broken_module: SyntaxError"),
        ("lacking_module.Plain", ModuleNotFoundError, "importing lacking_module: ModuleNotFoundError: No module named"),
        ("raising_module.Plain", PartError, "importing raising_module: ValueError: this is no setting"),
    ],
)  # fmt: skip
def test_what_a_writers_code_raises_keeps_its_traceback(name: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as error:
        build(target(name))
    shown = failure.message(error.value, started=False)
    assert "Traceback" in shown
    assert f"{name.partition('.')[0]}.py" in shown
    assert message in shown.splitlines()[-1]
    assert "InstantiationException" not in shown


def test_a_setting_that_a_mixer_of_ours_refuses_is_one_line_with_its_name() -> None:
    refused = target("longreach.models.mixers.softmax.softmax_attention.SoftmaxAttention")
    refused["mixers"]["mine"]["heads"] = 5
    with pytest.raises(ValueError, match=r"^model.mixers.mine \(SoftmaxAttention\): heads must divide width=32; got 5"):
        build(refused)
