"""CoIN and TRACE by name: files as they lie on disk are read, trained on and answered; missing ones are named."""

import json

import pytest
from torch import nn

from cl_plugins.benchmark import build_callbacks, run_benchmark
from cl_plugins.callbacks import TaskGroups
from cl_plugins.recipes import load_recipe
from cl_plugins.runs import read_runs
from cl_plugins.scenarios import InstructionStream, build_scenario, scenario_info
from cl_plugins.scenarios.text_benchmarks import COIN_TASKS, TRACE_TASKS

SHORT = "Answer the question using a single word or phrase."
COIN_QUESTIONS = {
    "ScienceQA": "Which one is it?\nA. cat\nB. dog\nAnswer with the option's letter from the given choices directly.",
    "ImageNet": f"What is the object in the image?\n{SHORT}",
    "Grounding": "Please provide the bounding box coordinate of the region this sentence describes: cat {0}.",
}
"""As in CoIN's files; the other tasks ask a question and end in SHORT. Their groups are those of arXiv 2410.10868."""

TRACE_PROMPTS = {
    "C-STANCE": "判断以下文本对指定对象的态度。\n文本：{0}",
    "FOMC": "What is the monetary policy stance for the following text?\nText: Rates rise by {0}.",
    "MeetingBank": "Write a summary of the following meeting transcripts.\nMeeting transcripts:\nItem {0}.",
    "Py150": "<s> import module{0} <EOL> a . b = <NUM_LIT:{0}> <EOL>",
    "ScienceQA": "Choose an answer for the following question and give your reasons.\n\nQuestion: {0}?",
    "NumGLUE-cm": "Solve the following math problem.\nQuestion: {0} + 1?",
    "NumGLUE-ds": "Solve the following math problem.\nQuestion: {0} - 1?",
    "20Minuten": "Provide a simplified version of the following paragraph in German.\n\nParagraph:\nTag {0}.",
}


def _coin(root, tasks=COIN_TASKS):
    for task in tasks:
        (root / task).mkdir(parents=True)
        questions = [
            COIN_QUESTIONS.get(task, f"What is in picture {{0}} of {task}?\n{SHORT}").format(i) for i in range(8)
        ]
        answers = [
            {"gpt": "cat", "test": {"answer": "cat"}},
            {"gpt": "[0.1, 0.2]", "test": {"answer_bbox": "[0.1, 0.2]"}},
        ]
        answer = answers[task == "Grounding"]
        train = [
            {"id": i, "image": f"{task}/{i}.jpg",
             "conversations": [{"from": "human", "value": f"<image>\n{q}"}, {"from": "gpt", "value": answer["gpt"]}]}
            for i, q in enumerate(questions)
        ]  # fmt: skip
        test = [{"question_id": 0, "image": "t.jpg", "text": questions[0], **answer["test"]}]
        (root / task / "train.json").write_text(json.dumps(train))
        (root / task / "test.json").write_text(json.dumps(test))


def _trace(root, tasks=TRACE_TASKS):
    for task in tasks:
        (root / task).mkdir(parents=True)
        rows = [{"prompt": TRACE_PROMPTS[task].format(i), "answer": "A"} for i in range(8)]
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
    assert set(batch["instructions"]) == {SHORT}
    assert set(batch["inputs"]) == {f"What is in picture {i} of GQA?" for i in range(8)}


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


COIN_GROUPS = [0, 1, 2, 1, 1, 3, 1, 1]
TRACE_GROUPS = [0, 1, 2, 3, 4, 5, 5, 6]


@pytest.mark.parametrize(("name", "write", "expected"), [("coin", _coin, COIN_GROUPS), ("trace", _trace, TRACE_GROUPS)])
def test_the_recipe_groups_tasks_as_published(name, write, expected, tmp_path):
    write(tmp_path)
    stream, module = build_scenario(name, root=tmp_path), nn.Linear(1, 1)
    (groups,) = (c for c in build_callbacks(load_recipe("ema", name)) if isinstance(c, TaskGroups))
    groups.on_stream_start(None, None, stream)
    for task in stream.tasks:
        groups.start_task(module, task)
        groups.end_task(module, task)
    assert [h["group"] for h in groups.groups.history] == expected
    shares = [e["share"] for e in groups.report_events(module) if e["name"] == "TaskGroups/allocated"]
    assert shares == [1.0] * 8  # every test prompt finds its group
    assert groups.groups.allocate(["Paint the wall green"]).group == max(expected)  # the last one, as released


def test_files_as_published_give_instruction_and_answer(tmp_path):
    _coin(tmp_path / "coin", ("Grounding", "ImageNet"))
    grounding, imagenet = build_scenario("coin", root=tmp_path / "coin", tasks=["Grounding", "ImageNet"]).text_tasks
    assert grounding.train[0].output == grounding.test[0].output == "[0.1, 0.2]"
    assert grounding.instructions == [COIN_QUESTIONS["Grounding"].split(":")[0]]
    assert grounding.test[0].input == "cat 0."
    assert imagenet.instructions == ["What is the object in the image?"]
    assert imagenet.test[0].input == imagenet.train[0].input == SHORT
    _trace(tmp_path / "trace", ("Py150",))
    (code,) = build_scenario("trace", root=tmp_path / "trace", tasks=["Py150"]).text_tasks
    assert code.instructions == ["Continue the code."]
    assert code.test[1].input == TRACE_PROMPTS["Py150"].format(1)


@pytest.mark.parametrize(
    ("name", "write", "tasks", "expected"),
    [
        ("coin", _coin, ["ScienceQA", "TextVQA", "GQA"], [0, 1, 1]),
        ("trace", _trace, ["FOMC", "NumGLUE-cm", "NumGLUE-ds"], [0, 1, 1]),
    ],
)
def test_cl_bench_trains_by_the_whole_method(name, write, tasks, expected, tmp_path):
    write(tmp_path / "files")
    result = run_benchmark(
        "ema", name, data={"root": str(tmp_path / "files"), "tasks": tasks}, out=tmp_path / "runs" / "one",
        device="cpu", progress=False,
    )  # fmt: skip
    assert [t.name for t in result.tasks] == tasks
    (run,) = read_runs(tmp_path / "runs")
    assert [e["group"] for e in run.plug if e["name"] == "TaskGroups/group"] == expected
    (weights,) = (e for e in run.plug if e["name"] == "BalancedEMA/weight")  # of the task that trains on in a group
    assert weights["task"] == 2
    parts = zip(weights["q25"], weights["median"], weights["q75"], strict=True)
    assert all(0 < low <= mid <= high <= 1 for low, mid, high in parts)
    assert 0 <= weights["fallback_share"] <= 1


def test_cl_bench_asks_in_unseen_words(tmp_path):
    data = {"tasks": ["reverse", "add"], "n_train": 16, "n_test": 8, "test_wordings": "unseen"}
    run_benchmark("ema", "instructions", epochs=1, data=data, out=tmp_path / "one", device="cpu", progress=False)
    (run,) = read_runs(tmp_path)
    shares = [e["share"] for e in run.plug if e["name"] == "TaskGroups/allocated"]
    assert shares[0] == 1.0  # "word", "letters" and "reverse" are in no wording of the other task
    assert 0 <= shares[1] <= 1
