"""Tiny-ImageNet, CORe50, DomainNet and the few-shot benchmarks, each over a few images in the exact layout on disk."""

import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest
import torch
from torchvision.datasets.utils import calculate_md5

from cl_plugins import fit_stream
from cl_plugins.callbacks import ForgettingDashboard
from cl_plugins.cli import main
from cl_plugins.report._numbers import measures_of, task_numbers
from cl_plugins.runs import read_run
from cl_plugins.scenarios import ClassIncremental, TensorSource, build_scenario, load_data, scenario_info, tiny_imagenet
from cl_plugins.scenarios.core50 import NAMES, new_classes
from cl_plugins.scenarios.few_shot_benchmarks import PublishedFewShot
from tests._helpers import PlainModule, quiet_trainer, tiny_vit
from tests._image_folders import (
    without_checksums,
    write_cifar100,
    write_core50,
    write_cub,
    write_domain_net,
    write_image,
    write_lines,
    write_mini_imagenet,
    write_mnist,
    write_tiny_imagenet,
)


def brightness(loader):
    """Mean of each image in steps of a pixel's value, by label."""
    return {
        int(y): round(float(x.mean()) * 255) for images, labels in loader for x, y in zip(images, labels, strict=True)
    }


@pytest.fixture
def cifar100(tmp_path, monkeypatch):
    without_checksums(monkeypatch)
    return write_cifar100(tmp_path)


# Tiny-ImageNet


def test_tiny_imagenet_tests_on_the_validation_images(tmp_path):
    write_tiny_imagenet(tmp_path)
    stream = build_scenario("split-tiny-imagenet", root=str(tmp_path), data_options={"size": 16})
    assert [t.classes for t in stream.tasks] == [(k, k + 1) for k in range(0, 20, 2)]
    assert stream.tasks[1].class_names == ("thing 2", "thing 3")
    assert stream.provenance()["sizes"] == {"train": [4] * 10, "validation": [], "test": [2] * 10}
    assert brightness(stream.test_loader(1)) == {2: 102, 3: 103}
    assert brightness(stream.train_loader_for_features(9)) == {18: 18, 19: 19}
    assert next(iter(stream.train_dataloader()))[0].shape == (4, 3, 16, 16)
    own = str(tmp_path / "tiny-imagenet-200")
    assert load_data("tiny-imagenet", root=own).train.samples == stream.train.source.samples


def test_tiny_imagenet_names_what_is_missing(tmp_path):
    folder = write_tiny_imagenet(tmp_path) / "tiny-imagenet-200"

    def refused(error, match):
        with pytest.raises(error, match=match):
            load_data("tiny-imagenet", root=str(tmp_path))

    (folder / "val" / "images" / "val_20.JPEG").unlink()
    refused(FileNotFoundError, r"got no val/images/val_20.JPEG in '.*tiny-imagenet-200'; pass `download=True`")
    write_lines(folder / "val" / "val_annotations.txt", ["val_1.JPEG\tn123\t0\t0\t1\t1"])
    refused(ValueError, "val_annotations.txt must name classes of wnids.txt, got 'n123'")
    images = folder / "train" / "n00000007" / "images"
    for path in images.iterdir():
        path.unlink()
    refused(FileNotFoundError, "each class folder must hold images, got none in '.*n00000007/images'")
    images.rmdir()
    refused(FileNotFoundError, "must hold train/n00000007/images of Tiny-ImageNet")
    (folder / "words.txt").unlink()
    (folder / "wnids.txt").unlink()
    refused(FileNotFoundError, "must hold wnids.txt, words.txt of Tiny-ImageNet")


def test_tiny_imagenet_is_fetched_and_checked_on_request_alone(tmp_path, monkeypatch):
    archive = tmp_path / "source" / "tiny-imagenet-200.zip"
    write_tiny_imagenet(tmp_path / "source", n_classes=10)
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted((tmp_path / "source" / "tiny-imagenet-200").rglob("*")):
            file.write(path, path.relative_to(tmp_path / "source"))
    handler = partial(QuietHandler, directory=str(archive.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(tiny_imagenet, "URL", f"http://127.0.0.1:{server.server_port}/{archive.name}")
        fetch_and_check(tmp_path / "root", archive, monkeypatch)
        server.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *texts):
        pass


def fetch_and_check(root, archive, monkeypatch):
    root.mkdir()
    with pytest.raises(FileNotFoundError, match="pass `download=True` to get it"):
        load_data("tiny-imagenet", root=str(root))
    with pytest.raises(ValueError, match=r"must have the MD5 sum \w+, got \w+; what arrived is removed"):
        load_data("tiny-imagenet", root=str(root), download=True)
    monkeypatch.setattr(tiny_imagenet, "MD5", calculate_md5(archive))
    assert len(load_data("tiny-imagenet", root=str(root), download=True).train) == 20


# CORe50


def test_core50_nc_brings_objects_in_the_published_order(tmp_path):
    write_core50(tmp_path)
    stream = build_scenario("core50-nc", root=str(tmp_path), size=8)
    assert stream.tasks[0].classes == tuple(range(0, 50, 5))
    assert [t.classes for t in stream.tasks[1:3]] == [(1, 6, 11, 16, 21), (26, 31, 36, 41, 46)]
    assert stream.tasks[8].classes == (29, 34, 39, 44, 49)
    assert sorted(stream.class_order) == list(range(50))
    assert stream.provenance()["sizes"] == {"train": [80, *[40] * 8], "validation": [], "test": [30, *[15] * 8]}
    assert stream.tasks[1].class_names[:2] == ("plug adapter 2", "mobile phone 2")
    assert brightness(stream.train_loader_for_features(2))[26] == 4 * 27 + 11  # the last frame that was read
    assert brightness(stream.test_loader(2))[26] == 4 * 27 + 10
    orders = [build_scenario("core50-nc", root=str(tmp_path), order_seed=s).tasks for s in (1, 2)]
    assert all(tasks[0].classes == stream.tasks[0].classes for tasks in orders)
    for tasks in orders:
        assert sorted(t.classes for t in tasks) == sorted(t.classes for t in stream.tasks)
    assert [t.classes for t in orders[0]] != [t.classes for t in orders[1]]
    assert build_scenario("core50-nc", root=str(tmp_path), seed=1).seeds == {"order": 1, "data": 1, "split": 0}
    with pytest.raises(ValueError, match="`n_tasks` must be 9 for core50-nc, whose tasks are fixed, got 5"):
        build_scenario("core50-nc", root=str(tmp_path), n_tasks=5)


def test_core50_ni_has_one_test_set(tmp_path):
    write_core50(tmp_path)
    stream = build_scenario("core50-ni", root=str(tmp_path / "core50_128x128"), size=8)
    assert [t.name for t in stream.tasks] == [f"session {s}" for s in (1, 2, 4, 5, 6, 8, 9, 11)]
    assert all(t.classes == tuple(range(50)) for t in stream.tasks)
    assert stream.provenance()["sizes"] == {"train": [50] * 8, "validation": [], "test": [150]}
    for task, session in enumerate((1, 2, 4, 5, 6, 8, 9, 11)):
        assert brightness(stream.train_loader_for_features(task)) == {k: 4 * (k + 1) + session for k in range(50)}
    tested = [round(float(x.mean()) * 255) for images, _ in stream.test_loader(0) for x in images]
    assert sorted(tested) == sorted(4 * k + s for k in range(1, 51) for s in (3, 7, 10))
    assert [t.class_names for t in stream.evaluation_tasks] == [NAMES]
    assert [stream.learned_after(k) for k in range(8)] == [1] * 8
    drawn = build_scenario("core50-ni", root=str(tmp_path), order_seed=4, size=8)
    assert sorted(t.name for t in drawn.tasks) == sorted(t.name for t in stream.tasks)
    assert len(drawn.test.indices) == 150


def test_the_fixed_test_set_is_measured_after_each_session(tmp_path):
    stream = build_scenario("core50-ni", root=str(write_core50(tmp_path)), size=8)
    module = PlainModule(tiny_vit(50))
    dashboard = ForgettingDashboard(tmp_path / "runs", run_id="one")
    trainer = quiet_trainer(max_epochs=1, limit_train_batches=1, callbacks=[dashboard])
    result = fit_stream(trainer, module, stream, seed=0)
    assert result.accuracy_matrix.shape == (8, 1)
    assert result.total.flatten().tolist() == [150] * 8
    assert result.average_accuracy == result.accuracy_matrix[-1, 0]
    assert result.average_incremental_accuracy == pytest.approx(float(result.accuracy_matrix.mean()))
    run = read_run(tmp_path / "runs" / "one")
    assert measures_of(run)["average_incremental_accuracy"] == pytest.approx(result.average_incremental_accuracy)
    numbers = task_numbers(run)
    assert numbers.curve == pytest.approx(result.accuracy_matrix[:, 0].tolist())
    assert numbers.curve_rows == list(range(8))


def test_core50_names_what_is_missing(tmp_path):
    folder = write_core50(tmp_path) / "core50_128x128"
    (folder / "s5" / "o7" / "C_05_07_000.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"each object's folder must hold images, got none in '.*s5/o7'"):
        build_scenario("core50-ni", root=str(tmp_path))
    (folder / "s5" / "o7").rmdir()
    with pytest.raises(FileNotFoundError, match="must hold s5/o7 of CORe50"):
        build_scenario("core50-nc", root=str(tmp_path))
    (folder / "s9").rename(folder / "other")
    with pytest.raises(FileNotFoundError, match="must hold s9 of CORe50"):
        load_data("core50", root=str(tmp_path))
    with pytest.raises(ValueError, match="`download` must be False for CORe50, which has no checksummed source; get"):
        build_scenario("core50-nc", root=str(tmp_path), download=True)


def test_objects_are_divided_as_published():
    lists = new_classes()
    assert sorted(c for own in lists for c in own) == list(range(50))
    for own in lists[1:]:
        assert len({c // 5 for c in own}) == len(own)  # no two of one category
        assert len({c % 5 for c in own}) == 1
    assert [own[0] for own in lists] == [0, 1, 26, 2, 27, 3, 28, 4, 29]


# DomainNet


def test_domainnet_follows_the_lists(tmp_path):
    stream = build_scenario("domainnet", root=str(write_domain_net(tmp_path)), size=14, n_classes=3)
    assert [t.name for t in stream.tasks] == ["real", "quickdraw", "painting", "sketch", "infograph", "clipart"]
    assert stream.tasks[5].class_names == ("aircraft carrier", "zebra", "zigzag")
    assert stream.provenance()["sizes"] == {"train": [6] * 6, "validation": [], "test": [3] * 6}
    for task, k in enumerate((4, 3, 2, 5, 1, 0)):
        assert brightness(stream.test_loader(task)) == {y: 20 * k + y for y in range(3)}
        paths = [stream.train.source.parts[task].samples[i][0] for i in range(6)]
        assert all(p.endswith(("1.jpg", "3.jpg")) for p in paths)
    few = build_scenario("domainnet", root=str(tmp_path), n_classes=3, domains=["sketch", "real"])
    assert [t.name for t in few.tasks] == ["sketch", "real"]
    (tmp_path / "splits").mkdir()
    for path in tmp_path.glob("*.txt"):
        path.rename(tmp_path / "splits" / path.name)
    again = build_scenario("domainnet", root=str(tmp_path), n_classes=3)
    assert again.train.source.parts[0].samples == stream.train.source.parts[0].samples


def test_domainnet_names_what_is_missing_or_wrong(tmp_path):
    write_domain_net(tmp_path)

    def refused(error, match, **options):
        with pytest.raises(error, match=match):
            build_scenario("domainnet", root=str(tmp_path), **{"n_classes": 3, **options})

    refused(ValueError, "the lists must name 345 classes, labels 0 to 344, got 3 labels from 0 to 2", n_classes=345)
    for wrong in ([], "real", ["real", "real"], ["photo"]):
        refused(ValueError, "`domains` must name some of real, quickdraw, .*, each once, got", domains=wrong)
    refused(ValueError, "`download` must be False for DomainNet", download=True)
    (tmp_path / "sketch" / "zebra" / "sketch_002_000002.jpg").unlink()
    refused(FileNotFoundError, r"got no sketch/zebra/sketch_002_000002.jpg in .* the first of 1 that sketch_test.txt")
    good = (tmp_path / "real_test.txt").read_text()
    for line in ("real/zebra/x.jpg", "clipart/zebra/x.jpg 1", "real/../x.jpg 1", "real/zebra/x.jpg one"):
        write_lines(tmp_path / "real_test.txt", [good.splitlines()[0], line])
        refused(ValueError, "real_test.txt must hold lines `real/<class>/<image> <label>`, got .* in line 2")
    write_lines(tmp_path / "real_test.txt", ["real/zebra/real_002_000002.jpg 2"])
    refused(ValueError, "must give label 2 to one class alone, got 'zebra' after 'zigzag'")
    write_lines(tmp_path / "real_test.txt", [])
    refused(ValueError, "real_test.txt must list images, got none")
    (tmp_path / "real_test.txt").unlink()
    refused(FileNotFoundError, "must hold real_test.txt of DomainNet")


# few shots


def write_sessions(folder, sessions):
    for k, lines in enumerate(sessions, 2):
        write_lines(folder / f"session_{k}.txt", lines)
    return str(folder)


def test_fewshot_cifar100_draws_shots_by_a_seed(cifar100):
    stream = build_scenario("fewshot-cifar100", root=str(cifar100))
    assert [len(t.classes) for t in stream.tasks] == [60, *[5] * 8]
    assert stream.provenance()["sizes"] == {"train": [360, *[25] * 8], "validation": [], "test": [60, *[5] * 8]}
    assert stream.provenance()["shots"] == "seeded"
    assert next(iter(stream.train_dataloader()))[0].shape[1:] == (3, 32, 32)
    other = build_scenario("fewshot-cifar100", root=str(cifar100), shot_seed=1)
    assert not np.array_equal(other.train.indices, stream.train.indices)
    with pytest.raises(ValueError, match="`ways` must be an integer of 1 or more, got 0"):
        build_scenario("fewshot-cifar100", root=str(cifar100), ways=0, lists="x")


def test_fewshot_cifar100_takes_the_published_shots(cifar100, tmp_path):
    # sample i has class i % 100: the shots of class c are c + 100, c + 200, ...
    wanted = [[c + 100 * i for c in range(60 + 5 * k, 65 + 5 * k) for i in range(1, 6)] for k in range(8)]
    lists = write_sessions(tmp_path / "lists", wanted)
    stream = build_scenario("fewshot-cifar100", root=str(cifar100), lists=lists)
    assert [sorted(stream.train.of(k + 1).tolist()) for k in range(8)] == [sorted(own) for own in wanted]
    assert stream.provenance()["sizes"]["train"] == [360, *[25] * 8]
    assert stream.provenance()["shots"] == "listed"

    def refused(error, match, **options):
        with pytest.raises(error, match=match):
            build_scenario("fewshot-cifar100", root=str(cifar100), lists=lists, **options)

    refused(ValueError, "the list of task 1 must name 5 training samples of each of its classes", order_seed=3)
    refused(ValueError, "`validation_fraction` must be 0 with listed shots", validation_fraction=0.5)
    write_lines(tmp_path / "lists" / "session_4.txt", [*wanted[2][:-1], wanted[2][0]])
    refused(ValueError, "the list of task 3 must name 5 training samples of each of its classes")
    write_lines(tmp_path / "lists" / "session_4.txt", ["600"])
    refused(ValueError, "session_4.txt must name training samples, got '600', which is none")
    (tmp_path / "lists" / "session_9.txt").unlink()
    refused(FileNotFoundError, "`lists` must be the folder with session_2.txt to session_9.txt, got .* session_9.txt")


def test_fewshot_mini_imagenet_takes_the_published_shots(tmp_path):
    write_mini_imagenet(tmp_path)
    ids = [f"n{1000 - c:08d}" for c in range(100)]
    wanted = [
        [f"MINI-ImageNet/train/{ids[c]}/{ids[c]}{i:08d}.jpg" for c in range(60 + 5 * k, 65 + 5 * k) for i in range(5)]
        for k in range(8)
    ]
    lists = write_sessions(tmp_path / "lists", wanted)
    stream = build_scenario("fewshot-mini-imagenet", root=str(tmp_path), lists=lists, size=8)
    assert stream.provenance()["sizes"] == {"train": [360, *[25] * 8], "validation": [], "test": [60, *[5] * 8]}
    named = {stream.train.source.samples[i][0].rpartition("/")[2] for i in stream.train.of(2)}
    assert named == {line.rpartition("/")[2] for line in wanted[1]}
    assert brightness(stream.test_loader(8)) == {c: c for c in range(95, 100)}
    seeded = build_scenario("fewshot-mini-imagenet", root=str(tmp_path))
    assert next(iter(seeded.train_dataloader()))[0].shape[1:] == (3, 84, 84)
    assert seeded.test_loader(0).dataset[0][0].shape == (3, 84, 84)
    write_lines(tmp_path / "lists" / "session_2.txt", ["MINI-ImageNet/train/n1/elsewhere.jpg"])
    with pytest.raises(ValueError, match=r"session_2.txt must name training samples, got 'MINI-.*elsewhere.jpg'"):
        build_scenario("fewshot-mini-imagenet", root=str(tmp_path), lists=lists)


def test_mini_imagenet_names_what_is_missing_or_wrong(tmp_path):
    folder = write_mini_imagenet(tmp_path, n_classes=4, per_class=1) / "miniimagenet"

    def refused(error, match, **options):
        with pytest.raises(error, match=match):
            load_data("mini-imagenet", root=str(tmp_path), **{"n_classes": 4, **options})

    refused(ValueError, "split/train.csv must name 100 classes, got 4; the split of few-shot", n_classes=100)
    refused(ValueError, "`download` must be False for mini-ImageNet", download=True)
    next((folder / "images").glob("n00001000*500.jpg")).unlink()
    refused(FileNotFoundError, r"got no images/n0000100000000500.jpg in")
    write_lines(folder / "split" / "test.csv", ["filename,label", "a.jpg,n5"])
    refused(ValueError, "split/test.csv must name classes of split/train.csv, got 'n5'")
    (folder / "split" / "test.csv").unlink()
    refused(FileNotFoundError, "must hold split/test.csv of mini-ImageNet")


def test_fewshot_cub200_takes_the_published_shots(tmp_path):
    folder = write_cub(tmp_path, n_classes=6, per_class=4) / "CUB_200_2011"
    options = {"base_classes": 2, "ways": 2, "shots": 2, "root": str(tmp_path), "size": 8}
    images = [line.split()[1] for line in (folder / "images.txt").read_text().splitlines()]
    wanted = [[f"CUB_200_2011/images/{images[4 * c + i]}" for c in own for i in (0, 3)] for own in ((2, 3), (4, 5))]
    stream = build_scenario("fewshot-cub200", lists=write_sessions(tmp_path / "lists", wanted), **options)
    assert [t.classes for t in stream.tasks] == [(0, 1), (2, 3), (4, 5)]
    assert stream.provenance()["sizes"] == {"train": [6, 4, 4], "validation": [], "test": [2, 2, 2]}
    for task in (1, 2):
        named = {stream.train.source.samples[i][0] for i in stream.train.of(task)}
        assert named == {str(tmp_path / line) for line in wanted[task - 1]}
    assert build_scenario("fewshot-cub200", **options).provenance()["shots"] == "seeded"
    info = scenario_info("fewshot-cub200")
    assert "drawn by a seed" in info.description


def test_listed_shots_must_fit_the_tasks():
    some = TensorSource(torch.zeros(6, 3), torch.tensor([0, 0, 1, 1, 2, 2]))
    with pytest.raises(ValueError, match="`listed` must hold one list for each of the 2 tasks behind the first, got 1"):
        PublishedFewShot((some, some), listed=[[2]], base_classes=1, ways=1, shots=1)
    for wrong in ([[0], [4]], [[2, 3], [4]], [[2], [5, 5]]):
        with pytest.raises(ValueError, match=r"the list of task [12] must name 1 training samples of each"):
            PublishedFewShot((some, some), listed=wrong, base_classes=1, ways=1, shots=1)


# all of them


WRITERS = {
    "split-tiny-imagenet": (write_tiny_imagenet, {"data_options": {"size": 8}}),
    "split-mnist": (write_mnist, {"data_options": {"size": 8}}),
    "permuted-mnist": (write_mnist, {"size": 8, "n_tasks": 3}),
    "rotated-mnist": (write_mnist, {"size": 8, "angles": [0, 30]}),
    "core50-nc": (write_core50, {"size": 8}),
    "core50-ni": (write_core50, {"size": 8}),
    "domainnet": (write_domain_net, {"size": 8, "n_classes": 3}),
    "fewshot-cifar100": (None, {"size": 8}),
    "fewshot-mini-imagenet": (lambda p: write_mini_imagenet(p, 8), {"n_classes": 8, "base_classes": 4, "ways": 2}),
    "fewshot-cub200": (lambda p: write_cub(p, 6, 4), {"base_classes": 2, "ways": 2, "shots": 2, "size": 8}),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_benchmark_trains(name, cifar100):
    write, options = WRITERS[name]
    if write is not None:
        write(cifar100)
    if name == "fewshot-mini-imagenet":
        options = {**options, "size": 8}
    stream = build_scenario(name, root=str(cifar100), batch_size=4, **options)
    assert scenario_info(name).needs
    module = PlainModule(tiny_vit(stream.n_classes, depth=1))
    result = fit_stream(quiet_trainer(max_epochs=1, limit_train_batches=1), module, stream, seed=0)
    assert len(result.rows) == len(stream.tasks)
    assert result.total[-1].tolist() == stream.provenance()["sizes"]["test"]


def test_the_size_of_the_images_must_be_that_of_the_backbone(tmp_path, capsys):
    write_tiny_imagenet(tmp_path)
    run = ["run", "--scenario", "split-tiny-imagenet", "--method", "frozen-linear", "--data", f"root={tmp_path}"]
    run += ["--epochs", "1", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert main(run) != 0
    told = capsys.readouterr().err
    assert "`size` of the images must be that of the backbone, 32 x 32, got 224 x 224 of 'split-tiny-imagenet'" in told
    assert "give --data size=32 to cl-bench" in told
    assert not (tmp_path / "run").exists()
    assert main([*run, "--data", "size=32", "--data", "n_tasks=2"]) == 0
    with pytest.raises(ValueError, match=r"`sise` must be an option of 'mnist', which takes .*; did you mean 'size'"):
        load_data("mnist", sise=3)
    with pytest.raises(ValueError, match="`size` must be an option of 'digits', which takes none"):
        build_scenario("split-digits", size=16)


def test_images_of_real_sizes_are_brought_to_one_size(tmp_path):
    write_domain_net(tmp_path)
    write_image(tmp_path / "real" / "zebra" / "real_002_000001.jpg", 7, (31, 9))
    stream = build_scenario("domainnet", root=str(tmp_path), n_classes=3, size=16)
    assert next(iter(stream.train_dataloader()))[0].shape == (6, 3, 16, 16)
    assert isinstance(ClassIncremental("mnist", root=str(write_mnist(tmp_path))), ClassIncremental)
