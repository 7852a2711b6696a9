"""What SECURITY.md claims."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from cl_plugins import cli, fit_stream
from cl_plugins._cache_files import read_manifest
from cl_plugins.adapters.adapter_set import read_adapters
from cl_plugins.callbacks import ForgettingDashboard, LoRA
from cl_plugins.recipes import load_recipe
from cl_plugins.run_writer import RunWriter
from cl_plugins.scenarios import registry
from cl_plugins.scenarios.image_files import listed_images
from tests._helpers import PlainModule, quiet_trainer, tiny_stream

ROOT = Path(__file__).parent.parent


class Payload:
    """What runs code when a pickle with it is opened."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_the_payload_works(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("place", ["state_dict", "callbacks", "hyper_parameters", None])
def test_a_checkpoint_with_code_is_refused_and_not_run(tmp_path, place):
    save = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    fit_stream(
        quiet_trainer(callbacks=[LoRA(2), save], enable_checkpointing=True, max_epochs=1), PlainModule(), tiny_stream(2)
    )
    path = tmp_path / "last.ckpt"
    whole = torch.load(path, weights_only=True)
    if place is None:
        path.write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    else:
        whole.setdefault(place, {})["x"] = Payload(tmp_path / "ran")
        torch.save(whole, path)
    module = PlainModule()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(ValueError, match="must be a whole checkpoint of tensors and plain values"):
        fit_stream(quiet_trainer(callbacks=[LoRA(2)]), module, tiny_stream(2), ckpt_path=path)
    assert not (tmp_path / "ran").exists()
    assert all(torch.equal(v, module.state_dict()[k]) for k, v in before.items())


def test_an_adapter_file_with_a_pickle_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        read_adapters(path, "lora")
    torch.save({"x": Payload(tmp_path / "ran")}, path)
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        read_adapters(path, "lora")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../x", "..", "a/b", "/tmp/x", "a\\b", ".hidden", "a\x00b", "a\nb"])
def test_names_never_leave_their_folder(tmp_path, name):
    inside = tmp_path / "runs"
    for make in (lambda: RunWriter(inside, name), lambda: ForgettingDashboard(inside, run_id=name)):
        with pytest.raises(ValueError, match="`run_id` must be"):
            make()
    assert list(tmp_path.rglob("*")) in ([], [inside])


@pytest.mark.parametrize("name", ["../report.html", "/tmp/x.html", "a/b.html", ""])
def test_a_report_stays_in_its_run(tmp_path, name):
    with pytest.raises(ValueError, match="`report` must be a file name"):
        ForgettingDashboard(tmp_path, report=name)


@pytest.mark.parametrize("name", ["../recipes/ovor", "ovor.yaml", "/etc/passwd", "ovor/../ovor"])
def test_methods_are_looked_up_and_not_opened(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="`method` must be a known method"):
        load_recipe(name)
    with pytest.raises(ValueError, match="must be a"):
        registry.load_data(name)
    assert cli.main(["run", "--method", "ovor", "--scenario", name]) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        "method: !!python/object/apply:os.system ['touch {marker}']",
        "!!python/object/new:os.system ['touch {marker}']",
        "set: [!!python/name:os.system '']",
    ],
)
def test_yaml_makes_no_objects(tmp_path, text, capsys):
    path = tmp_path / "c.yaml"
    path.write_text(text.format(marker=tmp_path / "ran"))
    for words in (
        ["run", "--config", str(path), "--method", "ovor", "--scenario", "none"],
        [
            "run",
            "--method",
            "ovor",
            "--scenario",
            "split-digits",
            "--device",
            "none",
            "--set",
            f"lr={path.read_text()}",
        ],
    ):
        try:
            status = cli.main(words)
        except SystemExit as end:
            status = end.code
        assert status in (1, 2)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../data.bin", "/etc/passwd", "x/../../data.bin"])
def test_a_cache_manifest_names_files_of_its_folder_alone(tmp_path, name):
    folder = tmp_path / "cache"
    folder.mkdir()
    (tmp_path / "data.bin").write_bytes(bytes(64))
    segment = {"name": "feature", "shape": [2, 4], "dtype": "float32", "computed": "float32", "offset": 0, "nbytes": 32}
    path = folder / "entry.json"
    for data, refused in (("data.bin", "missing or short"), (name, "cannot be read")):
        path.write_text(json.dumps({"format": 1, "key": {}, "data": data, "segments": [segment]}))
        with pytest.raises(ValueError, match=refused):
            read_manifest(path)


@pytest.mark.parametrize("line", ["../outside/a/1.png", "/etc/a/1.png", "a/../../outside/a/1.png"])
def test_a_list_of_images_stays_in_its_folder(tmp_path, line):
    for place in ("data/a", "outside/a"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "1.png").write_bytes(b"")
    listing = tmp_path / "list.txt"
    listing.write_text(f"a/1.png\n{line}\n")
    with pytest.raises(ValueError, match="must name files below"):
        listed_images(tmp_path / "data", listing, ["a"])
    listing.write_text("a/1.png\n")
    assert len(listed_images(tmp_path / "data", listing, ["a"])) == 1


def test_a_changed_cifar_batch_is_refused_and_not_run(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        with (folder / name).open("wb") as file:
            pickle.dump(Payload(tmp_path / "ran"), file)
    with pytest.raises((FileNotFoundError, RuntimeError, ValueError)):
        registry.load_data("cifar10", root=str(tmp_path))
    assert not (tmp_path / "ran").exists()


def _sources():
    for part in ("cl_plugins", "callbacks", "scenarios"):
        yield from ((p, ast.parse(p.read_text(encoding="utf-8"))) for p in (ROOT / part).rglob("*.py"))


def test_the_library_unpacks_nothing():
    banned = {"tarfile", "zipfile", "pickle", "marshal", "shelve", "dill"}
    for path, tree in _sources():
        imports = [n for n in ast.walk(tree) if isinstance(n, ast.Import)]
        imported = {a.name.split(".")[0] for n in imports for a in n.names}
        froms = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level]
        imported |= {(n.module or "").split(".")[0] for n in froms}
        assert not imported & banned, f"{path.name} imports {imported & banned}"


def test_the_library_runs_no_text_and_loads_weights_only():
    for path, tree in _sources():
        for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
            name = ast.unparse(call.func)
            assert name not in ("eval", "exec", "compile", "os.system", "yaml.load", "np.load", "numpy.load"), path
            if name == "torch.load":
                given = {k.arg: ast.unparse(k.value) for k in call.keywords}
                assert given.get("weights_only") == "True", f"{path.name}: torch.load without weights_only=True"


def test_a_stream_of_bytes_is_no_checkpoint_for_torch_either(tmp_path):
    file = io.BytesIO(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=True)
    assert not (tmp_path / "ran").exists()
