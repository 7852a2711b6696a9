"""COCO and VOC from a few images in their layouts on disk; what is damaged or missing is named."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from cl_plugins.benchmark import run_benchmark
from cl_plugins.scenarios import build_scenario
from cl_plugins.scenarios.multi_label_benchmarks import VOC_CLASSES, LabelledFiles, tasks_of, voc_objects

KINDS = ["zebra", "apple", "cat", "dog"]  # not in order, with gaps in the numbers, as COCO's
IDS = [90, 1, 13, 17]


def image(path, size=(12, 10), value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)


def write_coco(root, year="2014"):
    """Eight images a part; the classes of image i are KINDS[i % 4] and, every other one, the next."""
    for part in ("train", "val"):
        images, annotations = [], []
        for i in range(9):
            name = f"COCO_{part}{year}_{i:012d}.jpg"
            image(root / f"{part}{year}" / name, value=i)
            images.append({"id": 500 - i, "file_name": name, "height": 10, "width": 12})
            for k in [i % 4, (i + 1) % 4][: 1 + i % 2] if i < 8 else []:  # the last has no object
                annotations += [{"id": len(annotations), "image_id": 500 - i, "category_id": IDS[k], "iscrowd": i % 2}]
        categories = [{"id": i, "name": n, "supercategory": "thing"} for i, n in zip(IDS, KINDS, strict=True)]
        path = root / "annotations" / f"instances_{part}{year}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def write_voc(root, year="2007", parts=("trainval", "test"), n=20):
    folder = root / "VOCdevkit" / f"VOC{year}"
    for folder_name in ("ImageSets/Main", "Annotations"):
        (folder / folder_name).mkdir(parents=True)
    for k, part in enumerate(parts):
        numbers = [f"{1000 * k + i:06d}" for i in range(n)]
        (folder / "ImageSets" / "Main" / f"{part}.txt").write_text("".join(f"{m}\n" for m in numbers))
        for i, number in enumerate(numbers):
            image(folder / "JPEGImages" / f"{number}.jpg", value=i)
            objects = [(VOC_CLASSES[i % 20], 0), (VOC_CLASSES[i % 20], 0), (VOC_CLASSES[(i + 3) % 20], 1)]
            inner = "".join(
                f"<object><name>{c}</name><pose>Left</pose><difficult>{d}</difficult></object>" for c, d in objects
            )
            (folder / "Annotations" / f"{number}.xml").write_text(
                f"<annotation><folder>VOC{year}</folder><filename>{number}.jpg</filename>{inner}</annotation>"
            )
    return folder


def test_coco_is_read_with_classes_in_the_order_of_their_names(tmp_path):
    write_coco(tmp_path)
    stream = build_scenario("multilabel-coco", root=str(tmp_path), protocol="B2-C1", size=16, batch_size=9)
    assert stream.class_names == ("apple", "cat", "dog", "zebra")
    assert [t.classes for t in stream.tasks] == [(0, 1), (2,), (3,)]
    assert stream.tasks[2].class_names == ("zebra",)
    assert len(stream.train.source) == 8  # the image without an object is left out
    for i, path in enumerate(stream.test.source.paths[::-1]):  # in the order of their numbers
        assert path.name == f"COCO_val2014_{i:012d}.jpg"
        own = {KINDS[k] for k in [i % 4, (i + 1) % 4][: 1 + i % 2]}
        assert {stream.class_names[c] for c in np.flatnonzero(stream.test.source.targets[7 - i])} == own
    stream.task = 1
    images, targets = next(iter(stream.train_dataloader()))
    assert images.shape[1:] == (3, 16, 16)
    assert (targets[:, [0, 1, 3]] == -1).all()
    assert (targets[:, 2] == 1).all()


def test_coco_2017_and_own_tasks(tmp_path):
    write_coco(tmp_path, "2017")
    stream = build_scenario("multilabel-coco", root=str(tmp_path), year="2017", n_tasks=4)
    assert [t.classes for t in stream.tasks] == [(0,), (1,), (2,), (3,)]
    with pytest.raises(FileNotFoundError, match=r"annotations/instances_train2014\.json, .* of COCO"):
        build_scenario("multilabel-coco", root=str(tmp_path))
    with pytest.raises(ValueError, match="`year` must be '2014' or '2017', got 2015"):
        build_scenario("multilabel-coco", root=str(tmp_path), year=2015)
    with pytest.raises(ValueError, match="`download` must be False for COCO"):
        build_scenario("multilabel-coco", root=str(tmp_path), download=True)
    with pytest.raises(ValueError, match="`protocol` must divide the 4 classes evenly, got 'B40-C10'"):
        build_scenario("multilabel-coco", root=str(tmp_path), year="2017")


def test_damaged_coco_is_refused(tmp_path):
    write_coco(tmp_path)
    path = tmp_path / "annotations" / "instances_val2014.json"
    good = json.loads(path.read_text())

    def refused(error, match, **change):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(error, match=match):
            build_scenario("multilabel-coco", root=str(tmp_path), protocol="B2-C1")

    refused(ValueError, "must be COCO's JSON with images, annotations and categories, got", images=None)
    stray = [{"image_id": 7, "category_id": 1}]
    refused(ValueError, "must list every image and category that it uses, got image 7", annotations=stray)
    outside = [{**good["images"][0], "file_name": "../x.jpg"}]
    refused(ValueError, r"must name files by their plain name, got '\.\./x\.jpg'", images=outside)
    gone = [{**i, "file_name": "gone.jpg"} for i in good["images"]]
    refused(FileNotFoundError, r"every listed image of COCO, got no gone\.jpg", images=gone)
    other = [{**c, "name": c["name"] + "s"} for c in good["categories"]]
    refused(ValueError, "must have the same categories", categories=other)


def test_voc_is_read_from_its_annotations(tmp_path):
    write_voc(tmp_path)
    stream = build_scenario("multilabel-voc", root=str(tmp_path), size=16)
    assert [len(t.classes) for t in stream.tasks] == [10, 2, 2, 2, 2, 2]
    assert stream.tasks[0].class_names[:2] == ("aeroplane", "bicycle")
    assert np.flatnonzero(stream.train.source.targets[0]).tolist() == [0, 3]
    assert stream.test.source.paths[2].name == "001002.jpg"
    assert [len(t.classes) for t in build_scenario("multilabel-voc", root=str(tmp_path), protocol="B4-C2").tasks] == [
        4,
        *[2] * 8,
    ]
    easy = build_scenario("multilabel-voc", root=str(tmp_path), difficult=False)
    assert np.flatnonzero(easy.train.source.targets[0]).tolist() == [0]
    images, targets = next(iter(stream.test_loader(0)))
    assert images.shape[1:] == (3, 16, 16)
    assert set(targets.unique().tolist()) == {0.0, 1.0}


def test_voc_2012_trains_on_train_and_lies_without_devkit(tmp_path):
    folder = write_voc(tmp_path, "2012", ("train", "val"))
    folder.rename(tmp_path / "VOC2012")
    stream = build_scenario("multilabel-voc", root=str(tmp_path), year="2012")
    assert stream.test.source.paths[0].name == "001000.jpg"
    with pytest.raises(FileNotFoundError, match=r"`root` must hold VOCdevkit/VOC2007, got .* without; pass"):
        build_scenario("multilabel-voc", root=str(tmp_path))
    (tmp_path / "VOC2012/JPEGImages/001003.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"every listed image of VOC, got no 001003\.jpg"):
        build_scenario("multilabel-voc", root=str(tmp_path), year="2012")
    (tmp_path / "VOC2012/Annotations/000004.xml").unlink()
    with pytest.raises(FileNotFoundError, match=r"every listed image of VOC, got no 000004\.xml"):
        build_scenario("multilabel-voc", root=str(tmp_path), year="2012")
    (tmp_path / "VOC2012/ImageSets/Main/val.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold ImageSets/Main/val\.txt of VOC"):
        build_scenario("multilabel-voc", root=str(tmp_path), year="2012")


BOMB = '<!DOCTYPE a [<!ENTITY b "cat">]><annotation><object><name>&b;</name></object></annotation>'
FILE = '<!DOCTYPE a SYSTEM "file:///x"><annotation/>'


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (BOMB, "it has a document type definition"),
        (FILE, "it has a document type definition"),
        ("<annotation><object>", "no element found|mismatched|unclosed"),
        ("<annotation><object><name>unicorn</name></object></annotation>", "must name classes of VOC, got 'unicorn'"),
    ],
)
def test_annotations_that_are_not_plain_are_refused(content, reason, tmp_path):
    path = tmp_path / "000001.xml"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"000001\.xml .*({reason})"):
        voc_objects(path)


def test_protocols():
    assert tasks_of("B10-C2", 20) == {"n_tasks": 6, "first_task_classes": 10}
    assert tasks_of("B4-C2", 20) == {"n_tasks": 9, "first_task_classes": 4}
    for wrong in ("B10", "B20-C2", "B5-C2", "B0-C0", 7):
        with pytest.raises(ValueError, match="`protocol` must"):
            tasks_of(wrong, 20)
    with pytest.raises(ValueError, match=r"`targets` must be \(1, 2\), got shape \(2, 2\)"):
        LabelledFiles(["a"], np.zeros((2, 2), bool), ["x", "y"])


def test_bench_trains_on_voc_and_records_the_scores(tmp_path):
    write_voc(tmp_path, n=20)
    result = run_benchmark(
        "frozen-linear",
        "multilabel-voc",
        epochs=1,
        data={"root": str(tmp_path), "size": 32, "n_tasks": 2},
        out=tmp_path / "run",
        device="cpu",
        progress=False,
    )
    assert [len(row.labels.classes) for row in result.rows] == [10, 20]
    assert result.rows[1].labels.present == (2,) * 20
    assert 0 < result.label_scores["map"] <= 1
    assert torch.isfinite(result.accuracy_matrix[-1]).all()
