"""CoIN and TRACE by name: files as they lie on disk are read, trained on and answered; missing ones are named."""

import json

import pytest

from cl_plugins.benchmark import run_benchmark
from cl_plugins.runs import read_runs
from cl_plugins.scenarios import InstructionStream, build_scenario, scenario_info
from cl_plugins.scenarios.text_benchmarks import COIN_TASKS, TRACE_TASKS


def _coin(root, tasks=COIN_TASKS):
    for task in tasks:
        (root / task).mkdir(parents=True)
        question = f"<image>\nWhat is in picture of {task}?\nAnswer with one word."
        train = [
            {"id": i, "image": f"{task}/{i}.jpg",
             "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "cat"}]}
            for i in range(8)
        ]  # fmt: skip
        test = [{"question_id": 0, "image": "t.jpg", "text": question.replace("<image>\n", ""), "answer": "cat"}]
        (root / task / "train.json").write_text(json.dumps(train))
        (root / task / "test.json").write_text(json.dumps(test))


def _trace(root, tasks=TRACE_TASKS):
    for task in tasks:
        (root / task).mkdir(parents=True)
        rows = [{"prompt": f"Judge the text of {task}.\nRates rise by {i}.", "answer": "A"} for i in range(8)]
        for split in ("train", "eval", "test"):
            (root / task / f"{split}.json").write_text(json.dumps(rows))


@pytest.mark.parametrize(("name", "write", "order"), [("coin", _coin, COIN_TASKS), ("trace", _trace, TRACE_TASKS)])
def test_files_are_read_in_the_published_order(name, write, order, tmp_path):
    write(tmp_path)
    (tmp_path / "0-other").mkdir()  # sorts first, and is none of the tasks
    stream = build_scenario(name, root=tmp_path)
    assert [t.name for t in stream.tasks] == list(order)
    assert stream.modality == scenario_info(name).modality == "text"
    assert stream.name == name
    assert len(stream.text_tasks[0].train) == 8
    assert len(stream.text_tasks[0].validation) == (8 if name == "trace" else 0)


def test_image_paths_of_coin_are_in_the_batches(tmp_path):
    _coin(tmp_path)
    batch = next(iter(build_scenario("coin", root=tmp_path, tasks=["GQA"]).train_dataloader()))
    assert set(batch["images"]) == {f"GQA/{i}.jpg" for i in range(8)}
    assert set(batch["instructions"]) == {"Answer with one word."}
    assert set(batch["inputs"]) == {"What is in picture of GQA?"}


@pytest.mark.parametrize("name", ["coin", "trace"])
def test_a_missing_root_or_task_is_named(name, tmp_path):
    assert "root=" in scenario_info(name).needs
    with pytest.raises(ValueError, match=rf"`root` must be the folder of {name}.*ScienceQA"):
        build_scenario(name)
    (_coin if name == "coin" else _trace)(tmp_path, ("ScienceQA",))
    with pytest.raises(ValueError, match="`names` must be folders of"):
        build_scenario(name, root=tmp_path)
    assert build_scenario(name, root=tmp_path, tasks=["ScienceQA"]).text_tasks[0].name == "ScienceQA"


def test_a_format_without_files_does_not_become_the_built_in_rules():
    with pytest.raises(ValueError, match="`root` must be a folder of files in format 'trace', got None"):
        InstructionStream(format="trace")


@pytest.mark.parametrize(("name", "write"), [("coin", _coin), ("trace", _trace)])
def test_cl_bench_trains_on_the_files(name, write, tmp_path):
    write(tmp_path / "files")
    tasks = ["ScienceQA", "GQA" if name == "coin" else "FOMC"]
    result = run_benchmark(
        "ema", name, epochs=1, data={"root": str(tmp_path / "files"), "tasks": tasks}, out=tmp_path / "runs" / "one",
        device="cpu", progress=False, options={"rule": "released", "active": "always"},
    )  # fmt: skip
    assert [t.name for t in result.tasks] == tasks
    (run,) = read_runs(tmp_path / "runs")
    weights = [e for e in run.plug if e["name"] == "BalancedEMA/weight"]
    assert [e["task"] for e in weights] == [0, 1]
    assert all(
        0 < low <= mid <= high <= 1
        for e in weights
        for low, mid, high in zip(e["q25"], e["median"], e["q75"], strict=True)
    )
    assert all(0 <= e["fallback_share"] <= 1 for e in weights)
