"""Each of the eleven sets is read from a few images in torchvision's layout; X-TAIL and MTIL are built from them."""

from __future__ import annotations

import json
import pickle
import struct
import warnings

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import CIFAR100, Flowers102

from cl_plugins.benchmark import run_benchmark
from cl_plugins.recipes import load_recipe
from cl_plugins.scenarios import build_scenario, data_names, load_data, scenario_info
from cl_plugins.scenarios.transfer_sets import SETS, load_transfer_set
from cl_plugins.scenarios.transfer_streams import MTIL_SETS, XTAIL_SETS

named = pytest.mark.skipif(
    not getattr(Flowers102, "classes", None), reason="torchvision names the classes of Flowers102 from 0.21 on"
)


def image(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), (value, value, value)).save(path)


def text(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def aircraft(root):
    data = root / "fgvc-aircraft-2013b" / "data"
    names = ["707-320", "A340-300", "Cessna 172"]
    text(data / "variants.txt", names)
    for part, first in (("trainval", 0), ("test", 50)):
        lines = [f"{1000000 + first + i} {names[i % 3]}" for i in range(6)]
        text(data / f"images_variant_{part}.txt", lines)
        for i in range(6):
            image(data / "images" / f"{1000000 + first + i}.jpg", first + i)


def caltech101(root):
    folder = root / "caltech101" / "101_ObjectCategories"
    for name in ["BACKGROUND_Google", "Faces", "Faces_easy", *(f"thing_{i:02d}" for i in range(99))]:
        (folder / name).mkdir(parents=True)
        for i in range(1, 4):
            (folder / name / f"image_{i:04d}.jpg").touch()


def cifar100(root):
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    fine = list(range(100)) * 2
    for part in ("train", "test"):
        (folder / part).write_bytes(pickle.dumps({"data": np.zeros((200, 3072), np.uint8), "fine_labels": fine}))
    names = {"fine_label_names": ["aquarium_fish", *(f"thing_{i}" for i in range(99))]}
    (folder / "meta").write_bytes(pickle.dumps(names))


def dtd(root):
    folder = root / "dtd" / "dtd"
    for k, part in enumerate(("train", "val", "test")):
        files = [f"{name}/{name}_{k}{i}.jpg" for name in ("banded", "woven") for i in range(2)]
        text(folder / "labels" / f"{part}1.txt", files)
        for f in files:
            image(folder / "images" / f, 100 * k)


def eurosat(root):
    names = ["AnnualCrop", "Forest", "SeaLake", *(f"Land{c}" for c in "abcdefg")]
    for name in names:
        for i in range(5):
            image(root / "eurosat" / "2750" / name / f"{name}_{i + 1}.jpg", 10 * i)


def flowers102(root):
    folder = root / "flowers-102"
    for i in range(1, 10):
        image(folder / "jpg" / f"image_{i:05d}.jpg", i)
    savemat(folder / "imagelabels.mat", {"labels": np.array([[1, 2, 3, 1, 2, 3, 1, 2, 3]])})
    savemat(folder / "setid.mat", {"trnid": [[1, 2, 3]], "valid": [[4, 5, 6]], "tstid": [[9, 8, 7]]})


def food101(root):
    folder = root / "food-101"
    for part, first in (("train", 0), ("test", 50)):
        table = {n: [f"{n}/{first + i}" for i in range(3)] for n in ("waffles", "apple_pie")}
        text(folder / "meta" / f"{part}.json", [json.dumps(table)])
        for files in table.values():
            for f in files:
                image(folder / "images" / f"{f}.jpg", first)


def mnist(root):
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 20), ("t10k", 10)):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, n, 28, 28) + bytes(n * 784))
        labels = bytes(i % 10 for i in range(n))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, n) + labels)


def oxford_pets(root):
    folder = root / "oxford-iiit-pet"
    for part, first in (("trainval", 1), ("test", 8)):
        files = [(f"{n}_{first + i}", k) for k, n in enumerate(("Abyssinian", "american_bulldog"), 1) for i in range(2)]
        text(folder / "annotations" / f"{part}.txt", [f"{f} {k} {k} 1" for f, k in files])
        for f, _ in files:
            image(folder / "images" / f"{f}.jpg", first)


def stanford_cars(root):
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    names = np.array(["Audi TT Coupe 2011", "Ram C/V 2012"], dtype=object)
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": names})
    kinds = [("class", "u1"), ("fname", "O")]
    for part, where in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        rows = np.array([(1 + i % 2, f"{i + 1:05d}.jpg") for i in range(4)], dtype=kinds)
        savemat(folder / where, {"annotations": rows})
        for i in range(4):
            image(folder / f"cars_{part}" / f"{i + 1:05d}.jpg", i)


def sun397(root):
    folder = root / "SUN397"
    names = ["/a/abbey", "/c/church/indoor", "/c/church/outdoor"]
    text(folder / "ClassName.txt", names)
    for n in names:
        for i in range(3):
            image(folder / n[1:] / f"sun_a{i}.jpg", i)


WRITERS = {
    "aircraft": aircraft,
    "caltech101": caltech101,
    "cifar100": cifar100,
    "dtd": dtd,
    "eurosat": eurosat,
    "flowers102": flowers102,
    "food101": food101,
    "mnist": mnist,
    "oxford-pets": oxford_pets,
    "stanford-cars": stanford_cars,
    "sun397": sun397,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """All sets; the checksums that torchvision asks of three files do not hold for these."""
    folder = tmp_path_factory.mktemp("sets")
    for write in WRITERS.values():
        write(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CIFAR100, "train_list", [["train", None]])
        patch.setattr(CIFAR100, "test_list", [["test", None]])
        patch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": None})
        patch.setattr(Flowers102, "_file_dict", {k: (n, None) for k, (n, _) in Flowers102._file_dict.items()})
        yield folder


EXPECTED = {  # training and test images, some class names, the text of the first class
    "aircraft": (6, 6, ["707-320", "A340-300", "Cessna 172"], "a photo of a 707-320, a type of aircraft."),
    "caltech101": (202, 101, ["Faces", "Faces easy", "thing 00"], "a photo of a Faces."),
    "cifar100": (200, 200, ["aquarium fish", "thing 0"], "a photo of a aquarium fish."),
    "dtd": (8, 4, ["banded", "woven"], "banded texture."),
    "eurosat": (40, 10, ["annual crop", "forest"], "a centered satellite photo of annual crop."),
    "flowers102": (
        6,
        3,
        ["pink primrose", "hard-leaved pocket orchid"],
        "a photo of a pink primrose, a type of flower.",
    ),
    "food101": (6, 6, ["apple pie", "waffles"], "a photo of apple pie, a type of food."),
    "mnist": (20, 10, [str(i) for i in range(10)], 'a photo of the number: "0".'),
    "oxford-pets": (4, 4, ["Abyssinian", "American Bulldog"], "a photo of a Abyssinian, a type of pet."),
    "stanford-cars": (4, 4, ["Audi TT Coupe 2011", "Ram C/V 2012"], "a photo of a Audi TT Coupe 2011."),
    "sun397": (6, 3, ["abbey", "indoor church", "outdoor church"], "a photo of a abbey."),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=named) if n == "flowers102" else n for n in SETS])
def test_each_set_is_read(name, root):
    data = load_transfer_set(str(root), name=name)
    train, test, names, first = EXPECTED[name]
    assert (len(data.train), len(data.test)) == (train, test)
    assert list(data.class_names[: len(names)]) == names
    assert data.template.format(data.class_names[0]) == first
    assert set(np.asarray(data.test.targets).tolist()) <= set(np.asarray(data.train.targets).tolist())
    if name != "caltech101":
        picture, label = data.test[0]
        assert picture.size in ((12, 10), (28, 28), (32, 32))
        assert label == int(data.test.targets[0])


@named
def test_labels_belong_to_their_images(root):
    flowers = load_transfer_set(str(root), name="flowers102")
    assert [(p[-6:-4], y) for p, y in flowers.test.samples] == [("09", 2), ("08", 1), ("07", 0)]
    cars = load_transfer_set(str(root), name="stanford-cars")
    assert [(p[-16:], y) for p, y in cars.train.samples[:2]] == [("_train/00001.jpg", 0), ("_train/00002.jpg", 1)]
    sun = load_transfer_set(str(root), name="sun397")
    assert all(("abbey", "indoor", "outdoor")[y] in p for p, y in sun.train.samples + sun.test.samples)
    assert not {p for p, _ in sun.train.samples} & {p for p, _ in sun.test.samples}


def test_every_set_has_a_name_in_the_catalog(root):
    assert set(SETS) <= set(data_names())
    assert load_data("dtd", root=str(root)).class_names == ("banded", "woven")
    assert set(WRITERS) == set(MTIL_SETS)
    assert set(MTIL_SETS) - set(XTAIL_SETS) == {"cifar100"}


@pytest.fixture
def streams(root):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # classes without test images, in sets of a few
        yield lambda name, **options: build_scenario(name, root=str(root), **options)


@named
def test_x_tail_is_ten_sets_and_a_union_of_classes(streams):
    stream = streams("x-tail")
    assert [t.name for t in stream.tasks] == list(XTAIL_SETS)
    assert stream.open_vocabulary
    assert stream.n_classes == 3 + 100 + 2 + 10 + 102 + 2 + 10 + 2 + 2 + 3
    assert "a photo of a Faces easy." not in stream.class_texts
    assert stream.class_texts[3:5] == ("a photo of a Faces.", "a photo of a thing 00.")
    few, other, again = (streams("x-tail", shots=1, split_seed=s) for s in (0, 1, 0))
    assert few.train.sizes() == [3, 100, 2, 10, 3, 2, 10, 2, 2, 3]
    assert few.train.indices.tolist() == again.train.indices.tolist() != other.train.indices.tolist()
    backwards = streams("x-tail", domain_order=list(range(10))[::-1])
    assert [t.name for t in backwards.tasks] == list(XTAIL_SETS)[::-1]
    assert backwards.class_texts == stream.class_texts


@named
def test_mtil_is_eleven_sets_with_the_task_known(streams):
    stream = streams("mtil")
    assert [t.name for t in stream.tasks] == list(MTIL_SETS)
    assert stream.task_known
    assert "a photo of a Faces easy." in stream.class_texts
    assert stream.train.sizes()[:3] == [6, 202, 200]
    assert streams("mtil", sets=["dtd", "mnist"], shots=1).train.sizes() == [2, 10]
    assert "1,201 classes" in scenario_info("mtil").sizes


def test_missing_sets_are_named_at_once(tmp_path):
    dtd(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        build_scenario("x-tail", root=str(tmp_path))
    message = str(caught.value)
    assert "without 9 of 10" in message
    assert "DTD" not in message
    for line in (
        "FGVC-Aircraft: put images, variants.txt, images_variant_trainval.txt, images_variant_test.txt in"
        " fgvc-aircraft-2013b/data there, or pass `download=True`",
        "Stanford Cars: put cars_train, cars_test, cars_test_annos_withlabels.mat,",
        "SUN397: put ClassName.txt in SUN397 there",
    ):
        assert line in message
    with pytest.raises(FileNotFoundError, match="without 1 of 2:\n  Stanford Cars: put cars_train"):
        build_scenario("mtil", root=str(tmp_path), download=True, sets=["dtd", "stanford-cars"])
    with pytest.raises(ValueError, match="`root` must be the folder with the 10 sets of X-TAIL, got None"):
        build_scenario("x-tail")
    with pytest.raises(ValueError, match=r"`sets` must name some of aircraft, .*got \['pets'\]"):
        build_scenario("x-tail", root=str(tmp_path), sets=["pets"])


def test_parts_that_are_missing_are_named(tmp_path, monkeypatch):
    dtd(tmp_path)
    (tmp_path / "dtd/dtd/images/woven/woven_21.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"every listed image of DTD, got no '.*woven_21\.jpg'"):
        load_data("dtd", root=str(tmp_path))
    (tmp_path / "dtd/dtd/labels/val1.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold labels/val1\.txt of DTD"):
        load_data("dtd", root=str(tmp_path))
    (tmp_path / "eurosat" / "2750" / "Forest").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="must hold the 10 class folders of EuroSAT, got 1"):
        load_data("eurosat", root=str(tmp_path))
    flowers102(tmp_path)
    monkeypatch.setattr(Flowers102, "_file_dict", {k: (f"{k}.mat", "0" * 32) for k in ("label", "setid")})
    with pytest.raises(FileNotFoundError, match="`root` must hold Flowers102 undamaged, got Dataset not found or corr"):
        load_data("flowers102", root=str(tmp_path))
    with pytest.raises(ValueError, match="`name` must be one of aircraft,"):
        load_transfer_set(str(tmp_path), name="pets")


def test_a_coop_list_replaces_the_split(tmp_path):
    eurosat(tmp_path)
    listing = {p: [[f"Forest/Forest_{k}.jpg", 0, "Forest"]] for k, p in enumerate(("train", "val", "test"), 1)}
    path = tmp_path / "eurosat" / "split_zhou_EuroSAT.json"
    path.write_text(json.dumps(listing))
    data = load_data("eurosat", root=str(tmp_path))
    assert [len(d) for d in (data.train, data.validation, data.test)] == [1, 1, 1]
    assert data.test.samples[0][0].endswith("Forest_3.jpg")
    for wrong, reason in (
        ([["../x.jpg", 0, "Forest"]], r"must name files below eurosat, got '\.\./x\.jpg'"),
        ([["Forest/Forest_1.jpg", 0, "Wood"]], "must name each label once, got 'Forest' and 'Wood'"),
        ([["Forest/Forest_1.jpg", 4, "Sea"]], r"must number its classes from 0 without a gap, got \[0, 4\]"),
    ):
        path.write_text(json.dumps({**listing, "test": wrong}))
        with pytest.raises(ValueError, match=reason):
            load_data("eurosat", root=str(tmp_path))


def test_bench_runs_mora_on_them(root, tmp_path):
    """The recipe as it is, but for the model, which would have to be downloaded, and the number of steps."""
    sets = ["dtd", "mnist", "oxford-pets"]
    result = run_benchmark(
        "mora",
        "x-tail",
        data={"root": str(root), "sets": sets, "size": 32},
        options={"backbone": "clip_glyph", "steps": 2, "batch_size": 4},
        out=tmp_path,
        device="cpu",
        progress=False,
    )
    assert [t.name for t in result.tasks] == sets
    assert not bool(result.accuracy_matrix.isnan().any())  # evaluated before they are learned, too
    assert {"transfer", "average", "last", "zero_shot"} <= set(result.metrics())


@named
@pytest.mark.parametrize("name", ["x-tail", "mtil"])
@pytest.mark.parametrize("method", ["mora", "lora", "zero-shot"])
def test_recipes_fit_the_streams(method, name, streams):
    recipe = load_recipe(method, name)
    assert recipe.backbone == "ViT-B-16-quickgelu/openai"
    assert streams(name, **recipe.data).train.sizes()[1] == (200 if name == "x-tail" else 202)
