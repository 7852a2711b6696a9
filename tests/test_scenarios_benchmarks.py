"""Each downloadable data set is read from a few images in its exact layout on disk."""

import pickle

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

from cl_plugins.scenarios import ClassIncremental, build_scenario, load_data
from cl_plugins.scenarios.benchmarks import load_class_folders
from cl_plugins.scenarios.image_files import ImageFiles
from tests._image_folders import without_checksums, write_cifar100, write_image


@pytest.fixture
def cifar100(tmp_path, monkeypatch):
    """The folder that torchvision unpacks, 200 training and 100 test images; its checksums do not hold for these."""
    without_checksums(monkeypatch)
    return write_cifar100(tmp_path, per_class=2, by_label=True)


def test_cifar100(cifar100):
    stream = build_scenario("split-cifar100", root=str(cifar100), batch_size=5, data_options={"size": 24})
    assert stream.name == "split-cifar100"
    assert [len(t.classes) for t in stream.tasks] == [10] * 10
    assert stream.tasks[3].class_names[0] == "thing 30"
    stream.task = 1
    images, labels = next(iter(stream.train_dataloader()))
    assert images.shape == (5, 3, 24, 24)
    assert torch.allclose(images[:, 0, 0, 0], labels / 255)
    tested = [y for _, y in stream.test_loader(9)]
    assert torch.cat(tested).tolist() == list(range(90, 100))


def test_cifar_that_is_not_there_says_how_to_get_it(tmp_path, cifar100):
    with pytest.raises(ValueError, match="`root` must be the folder with cifar100, got None; pass `download=True`"):
        build_scenario("split-cifar100")
    with pytest.raises(FileNotFoundError, match="`root` must hold cifar-10-batches-py, whole and undamaged"):
        ClassIncremental("cifar10", root=str(tmp_path))
    (cifar100 / "cifar-100-python" / "test").unlink()
    with pytest.raises(FileNotFoundError, match="`root` must hold cifar-100-python, whole and undamaged"):
        ClassIncremental("cifar100", root=str(cifar100))


def test_cifar10_reads_five_batches(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        entry = {"data": np.zeros((10, 3072), np.uint8), "labels": list(range(10))}
        (folder / name).write_bytes(pickle.dumps(entry))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"thing {i}" for i in range(10)]}))
    monkeypatch.setattr(CIFAR10, "train_list", [[f"data_batch_{i}", None] for i in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", None]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": None})
    stream = build_scenario("split-cifar10", root=str(tmp_path))
    assert stream.provenance()["sizes"]["train"] == [10] * 5


def fill(folder, n_classes=200, per_class=5, first=0):
    names = [f"n{i:08d}" for i in range(n_classes)]
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(first, first + per_class):
            (folder / name / f"art_{i}.jpg").touch()
    return names


def test_imagenet_r_without_lists_is_split_by_a_seed(tmp_path):
    names = fill(tmp_path)
    (tmp_path / "README.txt").touch()
    write_image(tmp_path / names[0] / "art_0.jpg", 50)
    data = load_data("imagenet-r", root=str(tmp_path))
    assert len(data.train) == 800
    assert len(data.test) == 200
    assert np.bincount(data.test.targets).tolist() == [1] * 200
    train, test = ({p for p, _ in part.samples} for part in (data.train, data.test))
    assert not train & test
    again, other = (load_class_folders(str(tmp_path), split_seed=s) for s in (0, 1))
    assert again.test.samples == data.test.samples
    assert other.test.samples != data.test.samples
    stream = build_scenario("split-imagenet-r", root=str(tmp_path))
    assert [len(t.classes) for t in stream.tasks] == [20] * 10


def test_imagenet_a_takes_prepared_folders_as_they_are(tmp_path):
    fill(tmp_path / "train", per_class=2)
    fill(tmp_path / "test", per_class=1, first=9)
    stream = build_scenario("split-imagenet-a", root=str(tmp_path))
    assert stream.provenance()["sizes"] == {"train": [40] * 10, "validation": [], "test": [20] * 10}


def test_lists_of_a_published_split_are_followed(tmp_path):
    names = fill(tmp_path, per_class=2)
    lists = {}
    for part, i in (("train", 1), ("test", 0)):
        lists[f"{part}_list"] = str(tmp_path / f"{part}.txt")
        (tmp_path / f"{part}.txt").write_text("".join(f"{n}/art_{i}.jpg\n" for n in names))
    stream = build_scenario("split-imagenet-r", root=str(tmp_path), data_options=lists)
    assert stream.train.source.samples[3] == (str(tmp_path / names[3] / "art_1.jpg"), 3)
    (tmp_path / "test.txt").write_text(f"{names[0]}/gone.jpg\n")
    with pytest.raises(FileNotFoundError, match=r"test\.txt names 'n00000000/gone\.jpg', which is not in"):
        build_scenario("split-imagenet-r", root=str(tmp_path), data_options=lists)
    (tmp_path / "test.txt").write_text("elsewhere/gone.jpg\n")
    with pytest.raises(ValueError, match=r"test\.txt must name files in class folders, got 'elsewhere/gone\.jpg'"):
        build_scenario("split-imagenet-r", root=str(tmp_path), data_options=lists)
    with pytest.raises(ValueError, match="`train_list` and `test_list` must be given together"):
        load_data("imagenet-r", root=str(tmp_path), train_list="x")


def test_incomplete_folders_are_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"must be the folder with ImageNet-R, got '.*nowhere', which is none; get"
    ):
        load_data("imagenet-r", root=str(tmp_path / "nowhere"))
    fill(tmp_path, n_classes=3)
    with pytest.raises(FileNotFoundError, match="`root` must hold 200 class folders of ImageNet-R, got 3"):
        load_data("imagenet-r", root=str(tmp_path))
    (tmp_path / "n00000003").mkdir()
    with pytest.raises(FileNotFoundError, match=r"each class folder must hold images, got none in '.*n00000003'"):
        load_data("imagenet-r", root=str(tmp_path), n_classes=4)


@pytest.fixture
def cub(tmp_path):
    """``CUB_200_2011`` with three birds: training, test, training image each."""
    folder = tmp_path / "CUB_200_2011"
    lines = {"images.txt": [], "image_class_labels.txt": [], "train_test_split.txt": []}
    birds = ["001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross"]
    number = 0
    for label, bird in enumerate(birds, 1):
        for i in range(3):
            number += 1
            name = f"{bird}/{bird[4:]}_{i:04d}_{number}.jpg"
            write_image(folder / "images" / name, 40 * label)
            lines["images.txt"].append(f"{number} {name}")
            lines["image_class_labels.txt"].append(f"{number} {label}")
            lines["train_test_split.txt"].append(f"{number} {int(i != 1)}")
    for name, text in lines.items():
        (folder / name).write_text("\n".join(text) + "\n")
    (folder / "classes.txt").write_text("".join(f"{i} {b}\n" for i, b in enumerate(birds, 1)))
    return tmp_path


def test_cub_uses_the_official_split(cub):
    stream = build_scenario("split-cub200", root=str(cub), n_tasks=3, data_options={"size": 14})
    assert stream.tasks[0].class_names == ("Black footed Albatross",)
    assert stream.provenance()["sizes"] == {"train": [2, 2, 2], "validation": [], "test": [1, 1, 1]}
    (images, labels), *_ = stream.test_loader(2)
    assert images.shape == (1, 3, 14, 14)
    assert labels.tolist() == [2]
    assert images.mean().item() == pytest.approx(120 / 255, abs=0.01)
    assert stream.test.source.samples[1][0].endswith("Laysan_Albatross_0001_5.jpg")


def test_cub_with_missing_parts_names_them(cub):
    folder = cub / "CUB_200_2011"
    image = next((folder / "images").rglob("*.jpg"))
    image.unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold every listed image, got no images/\d+\.\w+/\w+\.jpg in"):
        load_data("cub200", root=str(cub))
    (folder / "classes.txt").unlink()
    (folder / "images.txt").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"must hold images.txt, classes.txt of CUB-200-2011, got .*; get CUB_200"
    ):
        load_data("cub200", root=str(folder))


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "a.jpg").write_text("no image")
    write_image(tmp_path / "b.jpg")
    files = ImageFiles([tmp_path / "b.jpg", tmp_path / "a.jpg"], [0, 1], ["x", "y"])
    stream = ClassIncremental((files, files), n_tasks=2)
    stream.task = 1
    with pytest.raises(RuntimeError, match=r"sample 1 \(.*a.jpg\) must be readable, got UnidentifiedImageError"):
        next(iter(stream.train_dataloader()))
    nothing_left = r"a.jpg\) must be readable.*repair or remove the file; none of the 1 samples of this batch"
    with pytest.raises(RuntimeError, match=nothing_left):
        next(iter(ClassIncremental((files, files), n_tasks=2, unreadable="skip").test_loader(1)))
    skipping = ClassIncremental((files, files), n_tasks=1, unreadable="skip")
    with pytest.warns(UserWarning, match=r"skipped: sample 1 \(.*a.jpg\) must be readable"):
        (_, labels), *_ = skipping.train_dataloader()
    assert labels.tolist() == [0]
    with pytest.raises(ValueError, match="`unreadable` must be 'stop' or 'skip', got 'ignore'"):
        ClassIncremental((files, files), n_tasks=1, unreadable="ignore")
    with pytest.raises(ValueError, match="`labels` must be one for each of the 2 `paths`, got 1"):
        ImageFiles([tmp_path, tmp_path], [0], ["x"])
