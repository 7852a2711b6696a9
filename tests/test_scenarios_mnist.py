"""MNIST streams over a few scans in the exact format on disk."""

import numpy as np
import pytest
import torch
import yaml
from torch.nn import functional as F

from cl_plugins.cli import main
from cl_plugins.scenarios import build_scenario, load_data
from cl_plugins.scenarios.mnist import ANGLES, GreyDigits, pixel_order
from tests._image_folders import write_mnist


@pytest.fixture
def root(tmp_path):
    return str(write_mnist(tmp_path))


def scans(part="train", n=40):
    return torch.from_numpy(np.random.default_rng(n).integers(0, 256, (n, 28, 28), np.uint8)).float() / 255


def first_images(stream, task):
    images, labels = next(iter(stream.train_loader_for_features(task)))
    return images, labels


def test_split_mnist(root):
    stream = build_scenario("split-mnist", root=root, data_options={"size": 28})
    assert [t.classes for t in stream.tasks] == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    assert stream.tasks[1].class_names == ("two", "three")
    assert stream.provenance()["sizes"] == {"train": [8] * 5, "validation": [], "test": [4] * 5}
    images, labels = first_images(stream, 1)
    assert labels.unique().tolist() == [2, 3]
    expected = scans()[[i for i in range(40) if i % 10 in (2, 3)]]
    assert torch.equal(images, expected[:, None].expand(-1, 3, -1, -1))
    assert load_data("mnist", root=root).train.read_batch(np.array([3])).shape == (1, 3, 32, 32)


def test_permuted_mnist_keeps_the_first_task_and_moves_the_same_pixels_of_all_images(root):
    stream = build_scenario("permuted-mnist", root=root, size=28, data_seed=5)
    assert stream.name == "permuted-mnist"
    assert len(stream.tasks) == 10
    assert all(t.classes == tuple(range(10)) for t in stream.tasks)
    assert stream.provenance()["sizes"] == {"train": [40] * 10, "validation": [], "test": [20] * 10}
    plain = scans().flatten(1)
    seen = []
    for task in range(10):
        images, labels = first_images(stream, task)
        assert labels.tolist() == [i % 10 for i in range(40)]
        flat = images[:, 0].flatten(1)
        assert torch.equal(flat.sort(1).values, plain.sort(1).values)
        # the column of pixel p holds one value per image: equal columns say where it went
        where = torch.cdist(flat.T, plain.T).argmin(1)
        assert torch.equal(flat, plain[:, where])
        tested = torch.cat([x for x, _ in stream.test_loader(task)])[:, 0].flatten(1)
        assert torch.equal(tested, scans("t10k", 20).flatten(1)[:, where])
        seen.append(tuple(where.tolist()))
    assert seen[0] == tuple(range(784))
    assert len(set(seen)) == 10


def test_permutations_follow_the_seed_of_the_stream(root):
    def order(**options):
        return first_images(build_scenario("permuted-mnist", root=root, size=28, n_tasks=2, **options), 1)[0]

    assert torch.equal(order(data_seed=1), order(seed=1))
    assert torch.equal(order(), order(data_seed=0))
    assert not torch.equal(order(data_seed=1), order(data_seed=2))
    assert torch.equal(order(data_seed=1, permutation_seed=3), order(data_seed=2, permutation_seed=3))
    state = torch.get_rng_state()
    stream = build_scenario("permuted-mnist", root=root, data_seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert stream.seeds == {"order": None, "data": 1, "split": 0, "permutation": 1}
    other = build_scenario("permuted-mnist", root=root, data_seed=1, permutation_seed=2)
    with pytest.raises(ValueError, match="whose seeds differ"):
        other.load_state_dict(stream.state_dict())
    assert pixel_order(0, 9) is None
    assert not np.array_equal(pixel_order(1, 9), pixel_order(2, 9))


def test_rotated_mnist_turns_by_the_angles(root):
    stream = build_scenario("rotated-mnist", root=root, size=28, angles=(0, 90, 180))
    assert [t.name for t in stream.tasks] == ["0 degrees", "90 degrees", "180 degrees"]
    for task in range(3):
        images, _ = first_images(stream, task)
        assert torch.allclose(images[:, 1], torch.rot90(scans(), task, (1, 2)), atol=1e-5)
    assert [t.name for t in build_scenario("rotated-mnist", root=root).tasks] == [f"{a:g} degrees" for a in ANGLES]
    assert len(ANGLES) == 10
    assert ANGLES[0] == 0


def test_scans_are_enlarged_and_grey(root):
    images = load_data("mnist", root=root, size=56).train.read_batch(np.arange(3))
    assert images.shape == (3, 3, 56, 56)
    assert torch.equal(images[:, 0], images[:, 2])
    assert torch.allclose(F.avg_pool2d(images, 56).mean(), scans()[:3].mean(), atol=0.01)
    with pytest.raises(ValueError, match="`size` must be an integer of 1 or more, got 0"):
        GreyDigits(torch.zeros(1, 28, 28), torch.zeros(1), size=0)


def test_what_is_missing_is_named(root, tmp_path):
    with pytest.raises(ValueError, match="`root` must be the folder with MNIST, got None; pass `download=True`"):
        build_scenario("permuted-mnist")
    raw = tmp_path / "MNIST" / "raw"
    images = raw / "t10k-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-5])
    with pytest.raises(FileNotFoundError, match=r"`root` must hold MNIST/raw, whole and undamaged, got .*; remove it"):
        build_scenario("split-mnist", root=root)
    images.unlink()
    (raw / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(
        FileNotFoundError,
        match="must hold MNIST/raw/train-labels-idx1-ubyte, MNIST/raw/t10k-images-idx3-ubyte of MNIST, got",
    ):
        build_scenario("rotated-mnist", root=root)


def test_faulty_options_are_refused(root):
    for wrong in ([], "90"):
        with pytest.raises(ValueError, match="`angles` must hold one angle in degrees per task"):
            build_scenario("rotated-mnist", root=root, angles=wrong)
    for wrong in ([float("nan")], ["x"], [True]):
        with pytest.raises(ValueError, match="`angles` must hold numbers of degrees"):
            build_scenario("rotated-mnist", root=root, angles=wrong)
    with pytest.raises(ValueError, match="`n_tasks` must be an integer of 1 or more, got 0"):
        build_scenario("permuted-mnist", root=root, n_tasks=0)
    with pytest.raises(ValueError, match="`permutation_seed` must be an integer of 0 or more, got -1"):
        build_scenario("permuted-mnist", root=root, permutation_seed=-1)


def test_cl_bench_runs_permuted_mnist(root, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["run", "--scenario", "permuted-mnist", "--method", "frozen-linear", "--seed", "3", "--device", "cpu"]
    options = ["--data", f"root={root}", "--data", "n_tasks=2", "--epochs", "1", "--out", str(out)]
    assert main([*arguments, *options]) == 0
    assert (out / "result.json").is_file()
    assert yaml.safe_load((out / "config.yaml").read_text())["data"] == {"root": root, "n_tasks": 2}
