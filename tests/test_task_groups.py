"""Weights per group of tasks, alone and with averaging."""

from __future__ import annotations

import copy

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn

from cl_plugins import Task, fit_stream
from cl_plugins.callbacks import BalancedEMA, MaskedHead, TaskGroups
from cl_plugins.causal_lm import CausalLM, LanguageModule
from cl_plugins.instruction_groups import InstructionGroups
from cl_plugins.scenarios import InstructionStream
from cl_plugins.scenarios.text_data import Example, TextTask
from tests._helpers import PlainModule, quiet_trainer, tiny_stream
from tests._regression import all_equal, weights_of

YES, YES_TOO, NO = "Answer yes to agree.", "Answer yes to approve.", "Deny everything now."


def _task(name: str, instruction: str, output: str) -> TextTask:
    rows = [Example(instruction, "", output)] * 16
    return TextTask(name, rows, rows[:4])


def _stream() -> InstructionStream:
    return InstructionStream([_task("a", YES, "yes"), _task("b", NO, "no"), _task("c", YES_TOO, "yes")], batch_size=4)


def _module(seed: int = 0) -> LanguageModule:
    return LanguageModule(CausalLM(dim=16, depth=1, heads=2, seed=seed), lr=5e-3)


class _Watch(pl.Callback):
    def __init__(self) -> None:
        self.starts: list[list[torch.Tensor]] = []

    def on_train_start(self, trainer, pl_module):
        self.starts.append(weights_of(pl_module))


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("order", [1, -1])
def test_the_whole_method(order, given):
    groups, watch = TaskGroups(InstructionGroups(threshold=0.3)), _Watch()
    ema = BalancedEMA("fixed", decay=0.5, active=groups.reused if given else "reused")
    module, stream = _module(), _stream()
    trainer = quiet_trainer(max_epochs=12, callbacks=[*[groups, ema][::order], watch])
    result = fit_stream(trainer, module, stream, **{"predict": groups.routed(stream.predict)} if given else {})
    assert [h["group"] for h in groups.groups.history] == [0, 1, 0]
    assert [e["task"] for e in ema.report_events(module)] == [2]  # an average for the reused group alone
    assert result.correct[-1].tolist() == [4, 4, 4]  # nothing is forgotten, since "no" has its own weights
    with groups.weights_of(module, 0):
        own = weights_of(module)
    assert not all_equal(own, list(groups.weights[1].values()))
    events = groups.report_events(module)
    reasons = [e["reason"].split(":")[0] for e in events if e["name"] == "TaskGroups/group"]
    assert reasons == ["new group 0", "new group 1", "reuse group 0"]
    assert [e["share"] for e in events if e["name"] == "TaskGroups/allocated"] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("start", ["last", "fresh"])
def test_start_of_a_new_group_and_of_a_reused_one(start):
    groups, watch = TaskGroups(InstructionGroups(threshold=0.3), start=start), _Watch()
    module = _module()
    fresh = weights_of(module)
    ended: list[list[torch.Tensor]] = []

    class Ends(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            ended.append(weights_of(pl_module))

    fit_stream(quiet_trainer(max_epochs=1, callbacks=[groups, watch, Ends()]), module, _stream())
    assert all_equal(watch.starts[1], fresh if start == "fresh" else ended[0])
    assert all_equal(watch.starts[2], ended[0])


def test_resume_inside_the_reused_task_is_bitwise(tmp_path):
    def build():
        groups = TaskGroups(InstructionGroups(threshold=0.3))
        keeper = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
        ema = BalancedEMA(active=groups.reused)
        return groups, quiet_trainer(callbacks=[groups, ema, keeper], enable_checkpointing=True)

    groups, trainer = build()
    whole = _module()
    fit_stream(trainer, whole, _stream())
    for step in (9, 18, 21):
        again, trainer = build()
        resumed = _module(seed=4)
        fit_stream(trainer, resumed, _stream(), ckpt_path=tmp_path / f"step={step}.ckpt")
        assert all_equal(weights_of(whole), weights_of(resumed))
        assert again.groups.state_dict() == groups.groups.state_dict()
        for mine, other in zip(again.weights, groups.weights, strict=True):
            assert all_equal(list(mine.values()), list(other.values()))


def test_samples_of_one_batch_meet_their_own_weights():
    groups, net = TaskGroups(InstructionGroups(threshold=0.3)), nn.Linear(1, 2, bias=False)
    for index, text in enumerate((YES, NO)):
        task = Task(index, (0, 1), name=text, description=text)
        groups.start_task(net, task)
        nn.init.constant_(net.weight, float(index + 1))
        groups.end_task(net, task)
    nn.init.constant_(net.weight, 9.0)
    predict = groups.routed(lambda module, batch: module(batch["x"]))
    logits = predict(net, {"x": torch.ones(3, 1), "instructions": [NO, YES, NO]})
    assert logits[:, 0].tolist() == [2.0, 1.0, 2.0]
    assert net.weight.unique().tolist() == [9.0]
    pairs = groups.routed(lambda module, batch: module(batch[0]), allocate=lambda batch: batch[1].tolist())
    assert pairs(net, (torch.ones(2, 1), torch.tensor([1, 0])))[:, 0].tolist() == [2.0, 1.0]


def test_weights_return_after_an_exception():
    groups, net = TaskGroups(), nn.Linear(1, 1)
    groups.start_task(net, Task(0, (0,), description=YES))
    groups.end_task(net, Task(0, (0,), description=YES))
    nn.init.constant_(net.weight, 5.0)
    before = weights_of(net)

    def fail() -> None:
        with groups.weights_of(net, 0):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert all_equal(before, weights_of(net))
    with pytest.raises(IndexError, match="`group` must be one of 1 groups, got 1"), groups.weights_of(net, 1):
        pass


def test_a_given_predict_is_left_alone():
    groups, module, stream = TaskGroups(InstructionGroups(threshold=0.3)), _module(), _stream()
    trainer = quiet_trainer(max_epochs=12, callbacks=[groups])
    result = fit_stream(trainer, module, stream, predict=lambda m, batch: stream.predict(m, batch))
    assert result.correct[1].tolist() == [0, 4, -1]  # the last weights answer, which know "no" alone


def test_reused_needs_one_codebook():
    module = _module()
    before = weights_of(module)
    with pytest.raises(ValueError, match="`active` must not be 'reused' without TaskGroups in the Trainer; add it"):
        fit_stream(quiet_trainer(callbacks=[BalancedEMA(active="reused")]), module, _stream())
    assert all_equal(before, weights_of(module))


def test_refusals():
    with pytest.raises(ValueError, match="`start` must be 'last' or 'fresh', got 'random'"):
        TaskGroups(start="random")
    groups, net = TaskGroups(), nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="`end_task` must follow `start_task`"):
        groups.end_task(net, Task(0, (0,)))
    before = weights_of(net)
    for text, error in (("What is it?", "no stop word"), (" ", "description or class names")):
        with pytest.raises(ValueError, match=error):
            groups.start_task(net, Task(0, (0,), description=text))
    assert all_equal(before, weights_of(net))
    groups.start_task(net, Task(0, (0,), description=YES))
    groups.end_task(net, Task(0, (0,), description=YES))
    before = weights_of(net)
    with pytest.raises(ValueError, match="`task` must have a name of its own, got 'task 0' a second time"):
        groups.start_task(net, Task(0, (0,), description=YES))
    assert all_equal(before, weights_of(net))
    with pytest.raises(RuntimeError, match="`weight` must keep its shape"):
        groups.start_task(nn.Linear(3, 2), Task(1, (0,), name="b", description=YES))
    copy.deepcopy(groups.state_dict())


def _shares(groups, stream):
    """The share of each task's test prompts that find its group, at the end of the stream."""
    module = nn.Linear(1, 1)
    groups.on_stream_start(None, None, stream)
    for task in stream.tasks:
        groups.start_task(module, task)
        groups.end_task(module, task)
    return [e["share"] for e in groups.report_events(module) if e["name"] == "TaskGroups/allocated"]


def test_share_of_test_prompts_that_find_their_group():
    """A paraphrase without the task's words goes astray, and the share says so."""
    mixed = [Example(YES, "", "yes"), Example("Deny nothing, approve.", "", "yes")]
    stream = InstructionStream([TextTask("a", [Example(YES, "", "yes")] * 4, mixed * 2), _task("b", NO, "no")])
    assert _shares(TaskGroups(threshold=0.9), stream) == [0.5, 1.0]


def test_the_share_of_many_test_prompts_is_that_of_an_even_sample():
    asked = []

    class Counting(InstructionGroups):
        def share_allocated(self, texts, group):
            asked.append(len(texts))
            return super().share_allocated(texts, group)

    rows = [Example(YES, "", "yes")] * 600 + [Example("Deny nothing, approve.", "", "yes")] * 600
    stream = InstructionStream([TextTask("a", rows[:4], rows), _task("b", NO, "no")])
    assert _shares(TaskGroups(Counting(threshold=0.9)), stream) == [0.5, 1.0]
    assert asked == [400, 4]


def test_options_of_the_codebook_by_name():
    groups = TaskGroups(threshold="strict", reduce="max", unmatched="last").groups
    assert (groups.threshold, groups.reduce, groups.unmatched) == (0.9, "max", "last")
    with pytest.raises(ValueError, match="`groups` is a codebook and holds its options, got threshold beside it"):
        TaskGroups(InstructionGroups(), threshold=0.5)


@pytest.mark.parametrize(
    ("instruction", "text"),
    [
        ("What is it?", "task 'bad': `texts` must hold a word that is no stop word, got 'What is it\\?'"),
        (" ", "task 'bad': `texts` must hold texts with at least one word, got an empty one"),
    ],
)
def test_a_later_task_that_cannot_be_compared_stops_the_stream_before_it_begins(instruction, text):
    module, groups = _module(), TaskGroups()
    before = weights_of(module)
    stream = InstructionStream([_task("a", YES, "yes"), _task("bad", instruction, "no")], batch_size=4)
    with pytest.raises(ValueError, match=text):
        fit_stream(quiet_trainer(callbacks=[groups]), module, stream)
    assert all_equal(before, weights_of(module))
    assert groups.groups.history == []


def test_two_tasks_of_one_name_stop_the_stream_before_it_begins():
    module, stream = PlainModule(), tiny_stream()
    stream.tasks = [Task(t.index, t.classes, "same", "Sort the letters") for t in stream.tasks]
    before = weights_of(module)
    with pytest.raises(ValueError, match="`stream` must have tasks with names of their own, got 'same' twice"):
        fit_stream(quiet_trainer(callbacks=[MaskedHead(), TaskGroups()]), module, stream)
    assert all_equal(before, weights_of(module))
