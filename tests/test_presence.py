"""Whether data are there: by names of files, in CL_DATA or in a folder of the stream's own."""

from __future__ import annotations

import json

import pytest

from cl_plugins.cli import main
from cl_plugins.commands._pairs import with_root
from cl_plugins.scenarios import scenario_info, scenario_names
from cl_plugins.scenarios.presence import FILES, availability, find_root
from tests._image_folders import (
    write_cifar100,
    write_core50,
    write_cub,
    write_domain_net,
    write_mini_imagenet,
    write_mnist,
    write_tiny_imagenet,
)


def fill(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_every_stream_that_needs_data_is_known():
    infos = [scenario_info(n) for n in scenario_names()]
    assert [i.name for i in infos if i.needs and not {i.name, i.data} & set(FILES)] == []
    assert not set(FILES) - {n for i in infos for n in (i.name, i.data)}


def test_the_own_folder_comes_first_and_the_first_missing_part_is_named(tmp_path):
    info = scenario_info("split-cifar100")
    assert availability(info, None) == "unknown"
    assert availability(info, tmp_path) == f"no: cifar-100-python/train not in {tmp_path}"
    fill(tmp_path, "cifar-100-python/train")
    assert find_root(info, tmp_path) is None
    fill(tmp_path, "cifar-100-python/test")
    assert availability(info, tmp_path) == f"yes: {tmp_path}"
    fill(tmp_path, "cifar100/cifar-100-python/train", "cifar100/cifar-100-python/test")
    assert find_root(info, tmp_path) == tmp_path / "cifar100"
    with pytest.raises(NotADirectoryError, match="`CL_DATA` must be a folder that exists"):
        find_root(info, tmp_path / "nowhere")


def test_alternatives(tmp_path):
    info = scenario_info("split-imagenet-r")
    assert "no: n* or train/n*" in availability(info, tmp_path)
    fill(tmp_path, "imagenet-r/train/n01/a.jpg")
    assert find_root(info, tmp_path) == tmp_path / "imagenet-r"


@pytest.mark.parametrize(
    ("name", "part", "rest"),
    [
        ("multilabel-voc", "VOCdevkit/readme", "VOCdevkit/VOC2012/Annotations/a.xml"),
        ("multilabel-voc", "readme", "VOC2007/Annotations/a.xml"),
        ("multilabel-coco", "annotations/instances_train2014.json", "annotations/instances_val2014.json"),
    ],
)
def test_a_part_is_not_the_whole(tmp_path, name, part, rest):
    fill(tmp_path, part)
    assert find_root(scenario_info(name), tmp_path) is None
    fill(tmp_path, rest)
    assert find_root(scenario_info(name), tmp_path) == tmp_path


WRITERS = {
    "split-cifar100": write_cifar100,
    "split-mnist": write_mnist,
    "core50-nc": write_core50,
    "split-cub200": write_cub,
    "domainnet": write_domain_net,
    "fewshot-mini-imagenet": write_mini_imagenet,
    "split-tiny-imagenet": write_tiny_imagenet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_the_layout_that_the_loader_reads_is_found(tmp_path, name):
    WRITERS[name](tmp_path)
    assert find_root(scenario_info(name), tmp_path) == tmp_path


def test_the_list_says_it(tmp_path, capsys):
    fill(tmp_path, "MNIST/raw/train-images-idx3-ubyte.gz")
    assert main(["list", "--json", "--root", str(tmp_path)]) == 0
    there = {s["name"]: s["there"] for s in json.loads(capsys.readouterr().out)["scenarios"]}
    assert there["split-mnist"] == there["rotated-mnist"] == f"yes: {tmp_path}"
    assert there["split-digits"] == "comes along"
    assert there["x-tail"].startswith("no: caltech101")
    assert main(["list", "--root", str(tmp_path)]) == 0
    assert f"there: yes: {tmp_path}; needs root= with MNIST/raw" in capsys.readouterr().out
    assert main(["list", "--root", str(tmp_path / "not")]) != 0
    assert "`--root` must be a folder that exists, got" in capsys.readouterr().err


def test_runs_take_the_root_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("CL_DATA", raising=False)
    assert with_root("split-mnist", {}) == {}
    monkeypatch.setenv("CL_DATA", str(tmp_path))
    fill(tmp_path, "mnist/MNIST/raw/train-images-idx3-ubyte")
    assert with_root("split-mnist", {"size": 32}) == {"size": 32, "root": str(tmp_path / "mnist")}
    assert with_root("split-mnist", {"root": "elsewhere"}) == {"root": "elsewhere"}
    assert with_root("split-digits", {}) == {}
    assert with_root("split-cub200", {}) == {"root": str(tmp_path)}  # whose loader says what is missing
