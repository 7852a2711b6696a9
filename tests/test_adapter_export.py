"""What a method owns travels without the model, for every method."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cl_plugins import callbacks, fit_stream
from cl_plugins.adapter_export import export_adapters, load_adapters
from tests._helpers import PlainModule, image_data, quiet_trainer, tiny_stream, tiny_vit
from tests._side import PYRAMID

METHODS = {
    "FrozenBackbone": {},
    "HierarchicalSideTuning": PYRAMID,
    "LadderSideTuning": {"reduction": 2},
    "LeanHierarchicalSideTuning": PYRAMID,
    "LoRA": {"rank": 2},
    "MoRA": {"rank": 2},
    "NearestMean": {},
    "OVOR": {"head_epochs": 1, "outliers": {"neighbors": 5}, "lengths": {0: 4, 1: 4}},
    "OnePrompt": {"lengths": {0: 4, 1: 4}},
    "RanPAC": {"projection": 32},
    "Sherl": {},
    "SideTuning": {},
}


def _module(seed: int = 0) -> PlainModule:
    return PlainModule(tiny_vit(seed=seed, depth=4))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_adapters_of_every_method_fit_a_fresh_base_model(tmp_path, name):
    module, method = _module(), getattr(callbacks, name)(**METHODS[name])
    fit_stream(quiet_trainer(callbacks=[method]), module, tiny_stream())
    file = export_adapters(module, [method], tmp_path / "adapters.safetensors")
    fresh = _module()
    load_adapters(fresh, [getattr(callbacks, name)(**METHODS[name])], file)
    for key, value in module.state_dict().items():
        found = fresh.state_dict()[key]
        assert torch.equal(value, found) if isinstance(value, torch.Tensor) else value == found, key
    x = image_data(3).tensors[0]
    with torch.no_grad():
        assert torch.equal(module.eval()(x), fresh.eval()(x))
    with safe_open(str(file), framework="pt") as opened:
        assert not [k for k in list(opened.keys()) if "patch_embed" in k and not k.startswith("plugins.")]
    assert [p.name for p in tmp_path.iterdir()] == ["adapters.safetensors"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    module, method = _module(), callbacks.LoRA(rank=2)
    folder = tmp_path_factory.mktemp("lora")
    saver = callbacks.StreamCheckpoint(folder, adapters=True)
    fit_stream(quiet_trainer(callbacks=[method, saver], enable_checkpointing=True), module, tiny_stream())
    return module, folder / "adapters.safetensors"


def test_a_checkpoint_folder_holds_the_adapters_of_the_last_task(saved):
    module, file = saved
    fresh = _module()
    load_adapters(fresh, [callbacks.LoRA(rank=2), callbacks.ForgettingTracker()], file)
    assert all(torch.equal(v, fresh.state_dict()[k]) for k, v in module.state_dict().items())


def test_what_does_not_fit_is_refused_and_changes_no_weight(saved, tmp_path):
    _, file = saved
    cases = [
        (0, callbacks.OnePrompt({0: 2}), ValueError, r"`callbacks` must be those of the file, \['LoRA'\], got"),
        (1, callbacks.LoRA(rank=2), ValueError, "`module` must have the base weights"),
        (0, callbacks.LoRA(rank=3), RuntimeError, "rank"),
    ]
    for seed, method, kind, text in cases:
        module = _module(seed)
        before = {k: v.clone() for k, v in module.state_dict().items()}
        with pytest.raises(kind, match=text):
            load_adapters(module, [method], file)
        after = module.state_dict()
        assert all(torch.equal(v, after[k]) for k, v in before.items())
    with pytest.raises(FileNotFoundError, match="`path` must be a file written by `export_adapters`"):
        load_adapters(_module(), [callbacks.LoRA(rank=2)], tmp_path / "none.safetensors")
    save_file({"x": torch.zeros(1)}, str(tmp_path / "other.safetensors"))
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:500])
    for name, text in (("other", "without its header"), ("cut", "must be a whole safetensors file")):
        with pytest.raises(ValueError, match=text):
            load_adapters(_module(), [callbacks.LoRA(rank=2)], tmp_path / f"{name}.safetensors")


def test_a_method_that_trains_the_backbone_has_no_adapters(tmp_path):
    module, method = _module(), callbacks.MaskedHead()
    method.install(module)
    with pytest.raises(ValueError, match=r"`callbacks` must own everything that trains, got .* other parameters"):
        export_adapters(module, [method], tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="`callbacks` must own everything that trains"):
        fit_stream(
            quiet_trainer(
                callbacks=[method, callbacks.StreamCheckpoint(tmp_path, adapters=True)], enable_checkpointing=True
            ),
            module,
            tiny_stream(),
        )
    assert not list(tmp_path.glob("*.safetensors"))
