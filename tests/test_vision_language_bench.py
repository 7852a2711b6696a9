"""cl-bench on streams of images and texts: the glyph blocks, the module, the three scores, what is refused."""

from __future__ import annotations

import json

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from cl_plugins import fit_stream
from cl_plugins.benchmark import build_callbacks, run_benchmark
from cl_plugins.clip_glyph import HELD_OUT
from cl_plugins.compare import table_rows
from cl_plugins.plugin import Row
from cl_plugins.recipes import load_recipe, recipe_names, with_options
from cl_plugins.result import StreamResult
from cl_plugins.scenarios import build_scenario, scenario_info
from cl_plugins.scenarios.glyph_blocks import BLOCKS, block_characters
from cl_plugins.scenarios.glyphs import glyph_name, pretraining_classes, stream_classes
from cl_plugins.summary import summary_table
from cl_plugins.task import Task
from cl_plugins.vision_language import TextClassifier
from cl_plugins.workloads import build_module, unfit

SMALL = {"n_classes": 3, "train_images": 4, "validation_images": 2, "test_images": 2}


def small_stream(name="xtail-glyphs", **options):
    return build_scenario(name, **{**SMALL, "batch_size": 12, **options})


# the stream


def test_characters_are_of_their_block_and_new_to_the_model():
    allowed = set(stream_classes(HELD_OUT)) - set(pretraining_classes())
    chosen = [block_characters(name, 20) for name in BLOCKS]
    assert len({c for block in chosen for c in block}) == 160
    for (ranges, _), block in zip(BLOCKS.values(), chosen, strict=True):
        assert set(block) <= allowed
        assert all(any(a <= c <= b for a, b in ranges) for c in block)
    with pytest.raises(
        ValueError, match="`n_classes` must be from 1 to 21, the held-out characters of Cyrillic, got 22"
    ):
        block_characters("Cyrillic", 22)


def test_blocks_are_drawn_in_different_styles_from_different_fonts():
    stream = build_scenario("xtail-glyphs", data_seed=0)
    assert (stream.n_classes, len(stream.tasks)) == (160, 8)
    assert [sum(stream.provenance()["sizes"][k]) for k in ("train", "validation", "test")] == [2560, 640, 1600]
    assert stream.class_texts[0] == glyph_name(block_characters("Latin-1 and Latin Extended-A", 1)[0])
    styles = [style for _, style in BLOCKS.values()]
    probe = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images = [style(probe) for style in styles]
    assert all(i.shape == probe.shape and i.min() >= 0 and i.max() <= 1 for i in images)
    assert all((a - b).abs().mean() > 0.01 for k, a in enumerate(images) for b in images[:k])


# the module


def test_the_module_encodes_the_streams_texts():
    stream = small_stream()
    module = build_module(load_recipe("finetune", "xtail-glyphs"), stream)
    assert isinstance(module.net, TextClassifier)
    assert module(torch.rand(2, 3, 32, 32)).shape == (2, 24)
    assert not module.net.model.logit_scale.requires_grad
    with pytest.raises(ValueError, match="`backbone` must name its weights"):
        build_module(with_options(load_recipe("finetune"), {"backbone": "ViT-B-16"}), stream)


def test_an_open_clip_model_brings_its_own_transforms():
    stream = small_stream()
    recipe = with_options(load_recipe("zero-shot"), {"backbone": "RN50", "pretrained": False})
    module = build_module(recipe, stream)
    assert module.net.tokens.shape == (24, 77)
    assert stream.train_transform is not None
    assert stream.eval_transform is not None


def trained(method, stream, epochs=1, **options):
    recipe = with_options(load_recipe(method, "xtail-glyphs"), options)
    pl.seed_everything(0, verbose=False)
    module = build_module(recipe, stream)
    before = {k: v.clone() for k, v in module.state_dict().items() if isinstance(v, torch.Tensor)}
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=build_callbacks(recipe), logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    result = fit_stream(trainer, module, stream, evaluate_initial=True, evaluate_future=True)
    return module, before, result


def test_plain_finetuning_is_told_the_tasks_classes():
    stream = small_stream()
    module, before, result = trained("finetune", stream)
    assert module.net.classes == stream.tasks[-1].classes
    assert set(module.net.seen) | set(module.net.classes) == set(range(24))
    after = module.state_dict()
    assert not torch.equal(before["net.model.visual.proj"], after["net.model.visual.proj"])
    assert torch.equal(before["net.model.logit_scale"], after["net.model.logit_scale"])
    assert result.initial is not None
    assert all(None not in row.correct for row in result.rows)


def test_adapters_leave_the_model_as_it_was():
    module, before, _ = trained("lora", small_stream(), rank=2)
    after = module.state_dict()
    kept = [k for k in before if k.startswith("net.model.")]
    assert len(kept) > 100
    assert all(torch.equal(before[k], after[k]) for k in kept)


def test_zero_shot_trains_nothing_and_stays_the_same():
    module, _, result = trained("zero-shot", small_stream())
    assert result.trainable_parameters == 0
    assert {row.correct for row in result.rows} == {result.initial.correct}
    scores = result.domain_scores
    assert scores["transfer"] == pytest.approx(scores["zero_shot"])
    assert scores["last"] > 3 / 24  # far above chance, 1/24
    assert not any(p.requires_grad for p in module.parameters())


def test_the_classifiers_position_is_part_of_its_state():
    def classifier():
        model = nn.Module()
        model.encode_image = model.encode_text = lambda x: x
        model.logit_scale = torch.zeros(())
        return TextClassifier(model, lambda texts: torch.arange(len(texts))[:, None], "abcdef", template="{}")

    first = classifier()
    for k in range(2):
        first.start_task(Task(k, (2 * k, 2 * k + 1)))
    second = classifier()
    second.load_state_dict(first.state_dict())
    assert (second.seen, second.classes) == ((0, 1), (2, 3))
    assert second.current.flatten().tolist() == [2, 3]
    assert second.row.tolist() == [-1, -1, 0, 1, -1, -1]


def test_a_resumed_stream_ends_as_the_whole_one(tmp_path):
    def run(ckpt_path=None):
        recipe = with_options(load_recipe("mora", "xtail-glyphs"), {"rank": 2})
        pl.seed_everything(0, verbose=False)
        stream = small_stream()
        module = build_module(recipe, stream)
        keep = pl.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1, filename="{step}")
        trainer = pl.Trainer(
            max_epochs=2, accelerator="cpu", callbacks=[*build_callbacks(recipe), keep], logger=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        result = fit_stream(trainer, module, stream, ckpt_path, evaluate_initial=True, evaluate_future=True)
        return module, result

    whole, told = run()
    middle = tmp_path / "step=11.ckpt"  # one step an epoch, two epochs a task: in the middle of task 5
    resumed, again = run(middle)
    assert torch.load(middle, weights_only=True)["state_dict"]["net._extra_state"]["classes"] == [15, 16, 17]
    assert resumed.net.seen == whole.net.seen
    assert [r.correct for r in again.rows] == [r.correct for r in told.rows]
    assert again.initial.correct == told.initial.correct


# the numbers


def row(after, correct, in_task=None):
    return Row(after, correct, (10,) * len(correct), in_task or correct, (), 0.0)


def test_scores_by_their_definitions():
    tasks = [Task(k, (k,)) for k in range(3)]
    rows = [row(0, (9, 3, 2), (9, 9, 9)), row(1, (7, 8, 4), (9, 9, 9)), row(2, (5, 6, 9), (9, 9, 8))]
    result = StreamResult(tasks, rows, row(-1, (1, 4, 5)), {"open_vocabulary": True}, learned_at=[0, 1, 2])
    scores = result.domain_scores
    assert scores["transfer"] == pytest.approx((0.3 + (0.2 + 0.4) / 2) / 2)
    assert scores["average"] == pytest.approx((9 + 3 + 2 + 7 + 8 + 4 + 5 + 6 + 9) / 90)
    assert scores["last"] == pytest.approx((5 + 6 + 9) / 30)
    assert scores["zero_shot"] == pytest.approx((0.4 + 0.5) / 2)
    assert set(result.to_dict()["definitions"]) >= set(scores)
    result.stream["task_known"] = True
    assert result.domain_scores["last"] == pytest.approx((9 + 9 + 8) / 30)
    result.stream["open_vocabulary"] = False
    assert result.domain_scores == {}
    assert "transfer" not in result.metrics()


@pytest.mark.parametrize(("scenario", "matrix"), [("xtail-glyphs", ""), ("mtil-glyphs", "_task_known")])
def test_the_command_writes_all_three_scores(tmp_path, scenario, matrix):
    result = run_benchmark("zero-shot", scenario, device="cpu", out=tmp_path, data=SMALL, progress=False)
    told = json.loads((tmp_path / "result.json").read_text())
    cells = torch.tensor(told[f"accuracy_matrix{matrix}"])
    assert told["last"] == pytest.approx(float(cells[-1].mean()))
    assert told["average"] == pytest.approx(float(cells.mean()))
    assert told["transfer"] == pytest.approx(float(cells[0, 1:].mean()))  # the same before every task
    table = summary_table(result)
    for words in ("transfer (before learning)", "average (all cells)", "last (last row", "zero-shot (before any"):
        assert words in table
    assert (tmp_path / "report.html").is_file()


def test_tables_have_the_scores_where_a_result_has_them():
    plain = {"scenario": "split", "method": "a", "accuracy_matrix": [], "average_accuracy": 0.5}
    domains = {**plain, "scenario": "x-tail", "transfer": 0.25, "average": 0.5, "last": 0.75}
    assert "transfer" not in table_rows([plain])[0]
    rows = table_rows([plain, domains])
    assert [r["transfer"] for r in rows] == ["undefined", "0.250"]
    assert (rows[1]["average (all cells)"], rows[1]["last"]) == ("0.500", "0.750")


def test_scenarios_say_what_their_samples_are():
    for name in ("xtail-glyphs", "mtil-glyphs", "split-digits"):
        assert build_scenario(name).modality == scenario_info(name).modality


# refusals


@pytest.mark.parametrize("method", ["oneprompt", "ovor", "nearest-mean", "lst", "masked-finetune"])
def test_methods_that_need_a_linear_classifier_are_refused(tmp_path, method):
    reason = r"\w+ works on image (and multi-label )?data alone, because it acts on a linear"
    with pytest.raises(ValueError, match=f"got '{method}': {reason}"):
        run_benchmark(method, "xtail-glyphs", device="cpu", out=tmp_path / "run", data=SMALL, progress=False)
    assert not (tmp_path / "run").exists()


def test_zero_shot_needs_texts(tmp_path):
    with pytest.raises(
        ValueError, match="ZeroShot works on image-text and text data alone, because it needs the texts"
    ):
        run_benchmark("zero-shot", "split-digits", device="cpu", out=tmp_path / "run", progress=False)


def test_every_recipe_fits_some_kind_of_stream():
    kinds = {
        name: [m for m in ("image", "image-text") if unfit(load_recipe(name), m) is None] for name in recipe_names()
    }
    assert all(kinds.values())
    assert kinds["mora"] == kinds["finetune"] == ["image", "image-text"]


# published settings


def test_published_settings_of_x_tail_and_trace():
    xtail, trace = load_recipe("mora", "x-tail"), load_recipe("mora", "trace")
    assert (xtail.steps, xtail.batch_size, xtail.lr, xtail.schedule, xtail.weight_decay) == (
        500,
        64,
        5e-4,
        "cosine",
        0.0,
    )
    assert (xtail.optimizer, xtail.betas, dict(xtail.data)) == ("adamw", (0.9, 0.9999), {"shots": 16})
    assert xtail.callbacks[0]["init"] == {"rank": 16, "temperature": 0.01, "threshold": 0.2}
    assert load_recipe("mora", "mtil") == xtail
    same = ("steps", "batch_size", "lr", "schedule", "betas", "backbone", "data")
    assert all(getattr(load_recipe("lora", "x-tail"), k) == getattr(xtail, k) for k in same)
    assert (trace.optimizer, trace.betas, trace.lr, trace.schedule) == ("adam", (0.9, 0.95), 5e-4, "constant")
    assert (trace.epochs_per_task, trace.batch_size, trace.gradient_clip) == ((2, 1, 3, 2, 1, 2, 2, 3), 32, 1.0)
    init = dict(trace.callbacks[0]["init"])
    assert (init.pop("rank"), init.pop("temperature"), init.pop("threshold")) == (8, 0.03, 0.2)
    assert (init.pop("scaling"), init.pop("dropout")) == (2.0, 0.1)  # lora_alpha = 2 r in the release


def test_a_recipe_may_count_steps(tmp_path):
    result = run_benchmark(
        "mora", "xtail-glyphs", device="cpu", out=tmp_path, data=SMALL, progress=False,
        options={"steps": 2, "rank": 2, "schedule": "cosine", "gradient_clip": 1.0},
    )  # fmt: skip
    told = json.loads((tmp_path / "result.json").read_text())
    assert told["recipe"]["steps"] == 2
    assert result.domain_scores["last"] > 1 / 24
    events = [json.loads(line) for file in tmp_path.glob("events.*.jsonl") for line in file.open()]
    use = [e for e in events if e.get("name") == "mora/mass_per_layer"]
    assert len(use) == 8
    for event in use:  # both towers, although texts are kept between batches
        assert len(event["rows"]) == (6 + 3) * 4
        assert all(sum(values) == pytest.approx(1, abs=1e-3) for values in event["value"])
