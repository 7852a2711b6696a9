"""Domain streams, and streams from a user's own data."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from cl_plugins import fit_stream
from cl_plugins.scenarios import DomainIncremental, Joint, TensorSource, build_scenario, stream_from
from cl_plugins.scenarios.domains import concatenated
from cl_plugins.scenarios.glyph_domains import DEGRADATIONS, FAMILIES, common_classes, family_faces
from tests._helpers import PlainModule, image_data, quiet_trainer


def domain(value, labels=(0, 1, 0, 1, 2, 2)):
    return TensorSource(torch.full((len(labels), 2), float(value)), torch.tensor(labels))


def test_each_task_is_a_domain_with_all_classes():
    stream = DomainIncremental([(domain(k), domain(10 + k)) for k in range(3)], names=["a", "b", "c"], batch_size=4)
    assert [(t.name, t.classes) for t in stream.tasks] == [(n, (0, 1, 2)) for n in "abc"]
    assert stream.shared_classes
    for k in range(3):
        stream.task = k
        images = torch.cat([x for x, _ in stream.train_dataloader()])
        assert images.unique().tolist() == [k]
        assert len(images) == 6
        assert torch.cat([x for x, _ in stream.test_loader(k)]).unique().tolist() == [10 + k]


def test_domains_are_ordered_and_held_out_by_seeds():
    domains = [(domain(k, [0, 1] * 5), domain(k)) for k in range(4)]
    stream = DomainIncremental(domains, domain_order=[2, 0, 3, 1], validation_fraction=0.2, batch_size=8)
    first = torch.cat([x for x, _ in stream.train_dataloader()])
    assert first.unique().tolist() == [2]
    assert stream.provenance()["sizes"]["validation"] == [2] * 4
    assert sorted([*stream.train.indices, *stream.validation.indices]) == list(range(40))
    orders = {DomainIncremental(domains, order_seed=s).domain_order for s in range(5)}
    assert len(orders) > 1
    assert DomainIncremental(domains, seed=3).seeds == {"order": 3, "data": 3, "split": 0}


def test_joint_over_domains_mixes_them():
    joint = Joint(DomainIncremental([(domain(k), domain(k)) for k in range(3)], batch_size=18))
    images, labels = next(iter(joint.train_dataloader()))
    assert images.unique().tolist() == [0, 1, 2]
    assert len(labels) == 18


def test_concatenated_sources_read_in_the_asked_order():
    parts = [TensorSource(torch.arange(n)[:, None] + 100 * k, torch.zeros(n)) for k, n in enumerate((3, 1, 4))]
    source = concatenated(parts)
    asked = np.array([7, 0, 3, 2, 4])
    assert source.read_batch(asked).flatten().tolist() == [203, 0, 100, 2, 200]
    assert [source[int(i)][0].item() for i in asked] == [203, 0, 100, 2, 200]
    plain = concatenated([TensorDataset(torch.zeros(2, 1)), parts[0]])
    assert not hasattr(plain, "read_batch")
    assert len(plain) == 5


def test_folders_as_domains_share_their_numbers_by_name(tmp_path):
    for name, classes in (("photo", "ant bee cat"), ("sketch", "bee cat")):
        for part in ("train", "test"):
            for c in classes.split():
                folder = tmp_path / name / part / c
                folder.mkdir(parents=True)
                Image.new("RGB", (4, 4), (len(c), 0, 0)).save(folder / "0.png")
    stream = stream_from([tmp_path / "photo", tmp_path / "sketch"], scenario="domain-incremental")
    assert [t.classes for t in stream.tasks] == [(0, 1, 2), (1, 2)]
    assert [t.name for t in stream.tasks] == ["photo", "sketch"]
    assert stream.tasks[1].class_names == ("bee", "cat")


def test_each_domain_has_the_test_data_given_for_it():
    domains, tests = [domain(0), domain(1)], [domain(10), None]
    stream = stream_from(domains, test=tests, scenario="domain-incremental")
    assert stream.provenance()["sizes"] == {"train": [6, 3], "validation": [], "test": [6, 3]}  # None takes a part
    assert torch.cat([x for x, _ in stream.test_loader(0)]).unique().tolist() == [10]
    assert torch.cat([x for x, _ in stream.test_loader(1)]).unique().tolist() == [1]
    with pytest.raises(ValueError, match="`test` must hold 2 data sets, one per domain in the order of `data`, got 1"):
        stream_from(domains, test=tests[:1], scenario="domain-incremental")
    with pytest.raises(TypeError, match=r"`test` must be a list with one data set per domain, .* got TensorSource"):
        stream_from(domains, test=domain(10), scenario="domain-incremental")


@pytest.mark.parametrize(
    ("domains", "options", "text"),
    [
        ([], {}, r"`domains` must hold one \(train, test\) pair per domain, got \[\]"),
        ([(domain(0), domain(0))], {"names": ["a", "b"]}, "`names` must hold 1 texts, one per domain, got 2"),
        ([domain(0)], {}, r"every domain must have test data, got None; give each as a pair \(train, test\)"),
        ([(domain(0), domain(0))] * 2, {"domain_order": [0, 0]}, "`domain_order` must name each position from 0 to 1"),
        ([(domain(0), domain(0))], {"domain_order": [0], "order_seed": 1}, "`order_seed` must be None when"),
        ([(domain(0), domain(0))], {"validation_fraction": 1}, r"`validation_fraction` must be in \[0, 1\), got 1"),
    ],
)
def test_faulty_domains_are_refused(domains, options, text):
    with pytest.raises(ValueError, match=text):
        DomainIncremental(domains, **options)


def test_domain_glyphs():
    stream = build_scenario("domain-glyphs")
    assert [t.name for t in stream.tasks] == [*FAMILIES, *DEGRADATIONS]
    assert {len(t.classes) for t in stream.tasks} == {50}
    assert stream.provenance()["sizes"] == {"train": [1000] * 8, "validation": [], "test": [500] * 8}
    assert stream.name == "domain-glyphs"
    means = []
    for k in range(8):
        stream.task = k
        images, _ = next(iter(stream.train_dataloader()))
        assert images.shape == (32, 3, 32, 32)
        assert images.min() >= 0
        assert images.max() <= 1
        means.append(images.mean().item())
    assert means[4] > 0.6 > max(means[:4])  # inverted


def test_font_families_cover_every_split_without_overlap():
    for family in FAMILIES:
        train, test = family_faces("train", family), family_faces("test", family)
        assert train
        assert test
        assert not set(train) & set(test)
    assert sum(len(family_faces(s, f)) for s in ("train", "validation", "test") for f in FAMILIES) == 16
    with pytest.raises(ValueError, match="`n_classes` must be at most"):
        common_classes(5000)


def test_the_runner_trains_over_domains():
    stream = DomainIncremental([(image_data(8, seed=s), image_data(2, seed=9 + s)) for s in range(2)], batch_size=8)
    result = fit_stream(quiet_trainer(max_epochs=1), PlainModule(), stream)
    assert result.total.tolist() == [[12, -1], [12, 12]]


def test_a_stream_from_arrays():
    inputs, labels = np.random.default_rng(0).random((60, 3)).astype(np.float32), np.repeat(["ant", "bee", "cat"], 20)
    stream = stream_from((inputs, labels), n_tasks=3, test_fraction=0.25, validation_fraction=0.2)
    assert stream.label_mapping == {"ant": 0, "bee": 1, "cat": 2}
    assert stream.provenance()["sizes"] == {"train": [12] * 3, "validation": [3] * 3, "test": [5] * 3}
    used = np.concatenate([stream.train.indices, stream.validation.indices, stream.test.indices])
    assert sorted(used.tolist()) == list(range(60))
    x, y = next(iter(stream.train_dataloader()))
    assert x.shape == (12, 3)
    assert set(y.tolist()) == {0}
    again = stream_from(torch.from_numpy(inputs), labels, n_tasks=3, test_fraction=0.25, validation_fraction=0.2)
    assert again.test.indices.tolist() == stream.test.indices.tolist()
    other = stream_from(inputs, labels, n_tasks=3, test_fraction=0.25, split_seed=1)
    assert other.test.indices.tolist() != stream.test.indices.tolist()


def test_a_stream_from_data_with_own_test_data():
    train, test = image_data(6), image_data(2)
    stream = stream_from(train, test=test, n_tasks=2)
    assert stream.provenance()["sizes"] == {"train": [18, 18], "validation": [], "test": [6, 6]}
    arrays = stream_from(train.tensors[0], train.tensors[1], test=(test.tensors[0], test.tensors[1]), n_tasks=2)
    both = stream_from(train.tensors[0], (train.tensors[1], test.tensors[1]), test=test.tensors[0], n_tasks=2)
    for other in (arrays, both):
        assert other.provenance()["sizes"] == stream.provenance()["sizes"]


def validation_samples(stream):
    """Inputs and labels of each task's validation data."""
    given = []
    for task in range(len(stream.tasks)):
        stream.task = task
        loader = stream.val_dataloader()
        given.append([(x.item(), y.item()) for batch in loader or [] for x, y in zip(*batch, strict=True)])
    return given


def numbered(first, labels=("ant", "bee") * 3):
    return torch.arange(first, first + len(labels))[:, None], list(labels)


def test_classes_of_tasks_are_given_by_name_where_labels_are_text():
    data = (torch.rand(60, 3), np.repeat(["ant", "bee", "cat"], 20))
    stream = stream_from(data, classes=[["cat", "ant"], ["bee"]])
    assert [t.class_names for t in stream.tasks] == [("cat", "ant"), ("bee",)]
    assert stream.class_order == (2, 0, 1)
    assert stream_from(data, classes=[["cat", 0], ["bee"]]).class_order == (2, 0, 1)
    assert stream_from(data, n_tasks=3, class_order=["cat", "ant", "bee"]).class_order == (2, 0, 1)
    with pytest.raises(ValueError, match="`classes` must name classes of the data, got 'bees'; did you mean 'bee'"):
        stream_from(data, classes=[["ant"], ["bees"]])
    with pytest.raises(ValueError, match="`classes` must name a class once, got class 0 in task 0 and task 1"):
        stream_from(data, classes=[["ant"], [0]])
    with pytest.raises(ValueError, match="`classes` must hold one list per task, got 'ant' for task 0"):
        stream_from(data, classes=["ant", "bee"])
    with pytest.raises(ValueError, match="`class_order` must name classes of the data, got 'dog'; known: ant, bee"):
        stream_from(data, n_tasks=3, class_order=["dog", "ant", "bee"])
    with pytest.raises(ValueError, match="`classes` must name labels of the data, got 'a' in task 0"):
        stream_from(image_data(4), classes=[["a"], [1]])
    twice = image_data(4, n_classes=3)
    twice.classes = ["crane", "maillot", "crane"]
    with pytest.raises(ValueError, match=r"`classes` must name one class, got 'crane' for \[0, 2\]; pass its number"):
        stream_from(twice, classes=[["maillot"], ["crane"]])


@pytest.mark.parametrize("key", ["validation", "valid", "val"])
def test_validation_data_beside_test_data_are_validation_data(key):
    parts = {"train": numbered(0), key: numbered(50, ("bee", "ant", "bee")), "test": numbered(100)}
    stream = stream_from(parts, n_tasks=2)
    assert stream.provenance()["sizes"] == {"train": [3, 3], "validation": [1, 2], "test": [3, 3]}
    assert validation_samples(stream) == [[(51, 0)], [(50, 1), (52, 1)]]
    without = stream_from({k: v for k, v in parts.items() if k != "test"}, n_tasks=2)
    assert without.provenance()["sizes"] == {"train": [3, 3], "validation": [], "test": [1, 2]}
    own = stream_from(parts, test=numbered(200), n_tasks=2)
    assert validation_samples(own) == validation_samples(stream)
    assert torch.cat([x for x, _ in own.test_loader(0)]).flatten().tolist() == [200, 202, 204]


def test_validation_data_are_given_by_name():
    (x, y), (xv, yv) = numbered(0), numbered(50)
    expected = [[(50, 0), (52, 0), (54, 0)], [(51, 1), (53, 1), (55, 1)]]
    stream = stream_from(x, y, n_tasks=2, validation=(xv, yv))
    assert stream.provenance()["sizes"] == {"train": [2, 2], "validation": [3, 3], "test": [1, 1]}
    assert validation_samples(stream) == expected
    assert validation_samples(stream_from(x, (y, y, yv), n_tasks=2, test=x, validation=xv)) == expected
    with pytest.raises(ValueError, match="`validation_fraction` must be left out where there are validation data, got"):
        stream_from(x, y, n_tasks=2, validation=(xv, yv), validation_fraction=0.2)
    with pytest.raises(ValueError, match="`validation` must hold classes of the training data only, got fly as well"):
        stream_from(x, y, n_tasks=2, validation=(xv[:1], ["fly"]))


def test_a_domain_stream_says_how_text_labels_are_numbered():
    domains = [(numbered(0, t), numbered(9, t)) for t in (["bee", "ant"], ["cat", "bee"])]
    stream = stream_from([d for d, _ in domains], test=[t for _, t in domains], scenario="domain-incremental")
    assert stream.label_mapping == {"ant": 0, "bee": 1, "cat": 2}
    assert [t.class_names for t in stream.tasks] == [("ant", "bee"), ("bee", "cat")]
    assert DomainIncremental([(domain(0), domain(1))]).label_mapping is None


def test_each_domain_has_the_validation_data_given_for_it():
    kind = {"scenario": "domain-incremental"}
    stream = stream_from([numbered(0), numbered(10)], validation=[numbered(50, ["bee"]), None], **kind)
    assert validation_samples(stream) == [[(50, 1)], []]
    assert stream.provenance()["sizes"] == {"train": [4, 4], "validation": [1, 0], "test": [2, 2]}
    parts = [{"train": numbered(k), "val": numbered(50 + k, ["ant"]), "test": numbered(100)} for k in range(2)]
    assert validation_samples(stream_from(parts, **kind)) == [[(50, 0)], [(51, 0)]]
    with pytest.raises(ValueError, match="`validation` must hold 2 data sets, one per domain"):
        stream_from(parts, validation=[None], **kind)


def test_a_folder_with_three_parts_has_validation_data(tmp_path):
    for part, n in (("train", 3), ("val", 2), ("test", 1)):
        for c in ("ant", "bee"):
            (tmp_path / part / c).mkdir(parents=True)
            for i in range(n):
                Image.new("RGB", (4, 4)).save(tmp_path / part / c / f"{i}.png")
    sizes = stream_from(tmp_path, n_tasks=2).provenance()["sizes"]
    assert sizes == {"train": [3, 3], "validation": [2, 2], "test": [1, 1]}


@pytest.mark.parametrize(
    ("kind", "option"),
    [
        ("class-incremental", {"first_task_classes": 2, "n_tasks": 2}),
        ("task-incremental", {"order_seed": 1, "n_tasks": 2}),
        ("few-shot", {"shot_seed": 1, "base_classes": 4}),
        ("blurry", {"mixing_seed": 1, "n_tasks": 2}),
        ("repetition", {"repeat": 0.5, "n_tasks": 2}),
        ("online", {"drop_last": True, "n_tasks": 2}),
        ("domain-incremental", {"names": ["a"], "eval_batch_size": 2}),
    ],
)
def test_options_of_every_kind_of_stream_are_known(kind, option):
    data = [image_data(8)] if kind == "domain-incremental" else image_data(8)
    assert stream_from(data, scenario=kind, **option).tasks


@pytest.mark.parametrize("kind", ["task-incremental", "few-shot", "blurry", "repetition", "online"])
def test_every_kind_of_stream_from_the_same_data(kind):
    options = {"base_classes": 2, "ways": 2, "shots": 3} if kind == "few-shot" else {"n_tasks": 3}
    stream = stream_from(image_data(20), scenario=kind, **options)
    assert len(stream.tasks) == 3
    assert stream.single_pass == (kind == "online")
    assert stream.task_known == (kind == "task-incremental")


def test_a_stream_from_a_folder_of_class_folders(tmp_path):
    for c in ("ant", "bee"):
        (tmp_path / c).mkdir()
        for i in range(5):
            Image.new("RGB", (6, 5), (0, 255 if c == "bee" else 0, 0)).save(tmp_path / c / f"{i}.png")
    stream = stream_from(str(tmp_path), n_tasks=2)
    assert [t.class_names for t in stream.tasks] == [("ant",), ("bee",)]
    stream.task = 1
    images, labels = next(iter(stream.train_dataloader()))
    assert images.shape == (4, 3, 5, 6)  # images become tensors without a transform
    assert images[:, 1].unique().tolist() == [1.0]
    assert labels.tolist() == [1] * 4


def test_a_stream_from_lines_of_json(tmp_path):
    path = tmp_path / "intents.jsonl"
    rows = [{"text": f"{w} {i}", "intent": w} for i in range(5) for w in ("play", "stop")]
    path.write_text("\n".join(json.dumps(r) for r in rows) + "\n")
    stream = stream_from(path, "intent", n_tasks=2, batch_size=8)
    texts, labels = next(iter(stream.train_dataloader()))
    assert all(t.startswith("play") for t in texts)
    assert labels.tolist() == [0] * 4
    whole = stream_from(path, "intent", n_tasks=2, inputs="intent")
    assert next(iter(whole.train_dataloader()))[0] == ("play",) * 4
    with pytest.raises(ValueError, match="`inputs` must be a column, got 'words'; there are intent, text"):
        stream_from(path, "intent", n_tasks=2, inputs="words")
    path.write_text('{"text": 1}\n{"text"\n')
    with pytest.raises(ValueError, match=r"line 2 of '.*intents.jsonl' must be JSON, got"):
        stream_from(path, "text", n_tasks=1)
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match=r"line 1 of '.*' must be a JSON object, got list"):
        stream_from(path, "text", n_tasks=1)


@pytest.mark.parametrize("kind", [int, str, torch.tensor, np.int64])
def test_a_stream_from_a_list_of_samples(kind):
    samples = [(torch.full((2,), float(i)), kind(i % 2)) for i in range(10)]
    stream = stream_from(samples, test=samples[:4], n_tasks=2, batch_size=10)
    x, y = next(iter(stream.test_loader(1)))
    assert (x.tolist(), y.tolist()) == ([[1, 1], [3, 3]], [1, 1])
    assert sorted(next(iter(stream.train_dataloader()))[0][:, 0].tolist()) == [0, 2, 4, 6, 8]
    domains = stream_from([samples, samples[:4]], scenario="domain-incremental")
    assert domains.provenance()["sizes"] == {"train": [8, 2], "validation": [], "test": [2, 2]}


@pytest.mark.parametrize(
    "data", [[(torch.zeros(6, 2), torch.arange(6))] * 2, [[0.1, 1], [0.2, 0]], [(0.1, 1.5), (0.2, 0.5)]]
)
def test_other_lists_are_not_taken_for_samples(data):
    with pytest.raises(ValueError, match=r"`labels` must be given .* a list of data sets, one per domain, is for"):
        stream_from(data, n_tasks=2)


class Rows:
    """A data set of dicts that does not name its columns."""

    targets = (0, 1, 0, 1)

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"pixel_values": torch.full((2,), float(index)), "mask": torch.ones(2), "label": index % 2}


def test_the_input_is_named_for_samples_that_are_dicts():
    stream = stream_from(Rows(), test=Rows(), n_tasks=2, inputs="pixel_values")
    x, y = next(iter(stream.test_loader(1)))
    assert (x.tolist(), y.tolist()) == ([[1, 1], [3, 3]], [1, 1])
    assert set(next(iter(stream_from(Rows(), n_tasks=2).test_loader(1)))) == {"pixel_values", "mask", "label"}
    wrong = stream_from(Rows(), n_tasks=2, inputs="pixels")
    with pytest.raises(ValueError, match=r"`inputs` must be a key of .* 'pixels' for sample \d, .* dict with pixel_va"):
        next(iter(wrong.train_dataloader()))
    tuples = stream_from(image_data(4), n_tasks=2, inputs="pixels")
    with pytest.raises(ValueError, match=r"`inputs` must be a key of .* got 'pixels' for sample \d+, which is a tuple"):
        next(iter(tuples.train_dataloader()))


def test_a_stream_from_hugging_face_data():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"]), "id": datasets.Value("int64")}
    )
    rows = {"image": [Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(10)], "label": [0, 1] * 5, "id": range(10)}
    table = datasets.Dataset.from_dict({k: list(v) for k, v in rows.items()}, features=features)
    stream = stream_from(datasets.DatasetDict({"train": table, "test": table.select(range(4))}), n_tasks=2)
    assert [t.class_names for t in stream.tasks] == [("ant",), ("bee",)]
    assert stream.provenance()["sizes"] == {"train": [5, 5], "validation": [], "test": [2, 2]}
    parts = {"train": table, "validation": table.select(range(3)), "test": table.select(range(4))}
    three = stream_from(datasets.DatasetDict(parts), n_tasks=2)
    assert three.provenance()["sizes"] == {"train": [5, 5], "validation": [2, 1], "test": [2, 2]}
    images, labels = next(iter(stream.train_dataloader()))
    assert images.shape == (5, 3, 4, 4)
    assert labels.tolist() == [0] * 5


@pytest.mark.parametrize(
    ("data", "options", "error", "text"),
    [
        (image_data(4), {"scenario": "blury"}, ValueError, "known kind of stream, got 'blury'; did you mean 'blurry'"),
        (image_data(4), {"batchsize": 3}, TypeError, "`batchsize` must be an option of .*; did you mean 'batch_size'"),
        (image_data(4), {"senario": "blurry"}, TypeError, "`senario` must be an option of .*; did you mean 'scenario'"),
        (image_data(4), {"seeds": {"data": 1}}, TypeError, "`seeds` must be an option of .*; did you mean 'seed'"),
        (image_data(4), {"zzz": 1}, TypeError, "of `ClassIncremental`, got 1, which neither takes; known: batch_size"),
        ([image_data(4)], {"scenario": "domain-incremental"}, TypeError, "`n_tasks` must be .* of `DomainIncremental`"),
        (image_data(4), {"test_fraction": 0}, ValueError, r"`test_fraction` must be in \(0, 1\), got 0"),
        (image_data(4), {"scenario": "domain-incremental"}, TypeError, "`data` must be a list with one data set per"),
        (torch.zeros(3, 2), {}, ValueError, "`labels` must be given for inputs without any, got None"),
        ("nowhere", {}, TypeError, "`data` must be a folder of class folders or a .jsonl file, got 'nowhere'"),
        ({"training": 1}, {}, ValueError, "`data` must have the key 'train', got training"),
        (3, {}, TypeError, "`data` must have a length and items by index, got int"),
    ],
)  # fmt: skip
def test_data_that_make_no_stream_are_refused(data, options, error, text):
    with pytest.raises(error, match=text):
        stream_from(data, n_tasks=2, **options)
