"""MoRA: the experts, their growth and what survives it, the callbacks, files of adapters, classification by text."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F

from cl_plugins import Task, fit_stream
from cl_plugins.adapters.lora import LowRank
from cl_plugins.adapters.rank_experts import ExpertOptions, ExpertUsage, RankExperts
from cl_plugins.callbacks import LoRA, MoRA
from cl_plugins.vision_language import TextClassifier, contrastive_loss
from tests._helpers import PlainModule, quiet_trainer, tiny_stream, tiny_vit
from tests.test_targets import fill_values, tiny_clip

DIM, OUT = 12, 5


def _bank(tasks: int = 3, rank: int = 4, groups: int = 1, dtype: torch.dtype = torch.float64, **options) -> RankExperts:
    """A bank after some growths, with random values throughout."""
    options = {"rank": rank, "temperature": 0.1, "evaluation": "dense", **options}
    parts, of = tuple(range(groups)), groups
    bank = RankExperts(DIM, OUT, ExpertOptions(**options), parts=parts, of=of, dtype=dtype)
    for task in range(tasks):
        bank.grow(task)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for values in (bank.old_values, bank.new_values):
            values.copy_(torch.randn(values.shape, generator=generator))
    return bank


def _x(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(7)).to(dtype)


def _plain(bank: RankExperts, x: torch.Tensor) -> torch.Tensor:
    """The formula for one group after the other, with full masks and autograd."""
    o, out = bank.options, []
    for g in range(bank.groups):
        keys = torch.cat([bank.old_keys[g], bank.new_keys[g]])
        values = torch.cat([bank.old_values[g], bank.new_values[g]])
        z = x @ keys.T
        s = {
            "bank_l2": lambda z, k: F.normalize(z, dim=-1),
            "cosine": lambda z, k: F.normalize(x, dim=-1) @ F.normalize(k, dim=-1).T,
            "none": lambda z, k: z,
        }[o.score_norm](z, keys)
        kth = s.topk(bank.top_k, dim=-1).values[..., -1:]
        w = (s / o.temperature).masked_fill(s < kth, -math.inf).softmax(-1)
        if not bank.training and bank.threshold > 0:
            w = w * (s >= bank.threshold)
        out.append(o.scaling * (w * z) @ values)
    return torch.cat(out, -1)


OPTIONS = [
    {}, {"threshold": 0.0}, {"scaling": 2.0}, {"score_norm": "cosine"}, {"score_norm": "none"}, {"top_k": 1},
    {"top_k": 99}, {"k_schedule": "per_task", "top_k": 2}, {"delta_mode": "sqrt_r"}, {"min_active": 3, "top_k": 1},
]  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("evaluation", ["dense", "bag"])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_output_and_gradients_equal_the_plain_formula(options, groups, evaluation, training):
    bank = _bank(groups=groups, evaluation=evaluation, **options).train(training)
    x = _x(2, 7).requires_grad_()
    cotangent = torch.randn(2, 7, groups * OUT, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    own, plain = bank(x), _plain(bank, x)
    torch.testing.assert_close(own, plain)
    wanted = (x, bank.new_keys, bank.new_values)
    for a, b in zip(torch.autograd.grad((own * cotangent).sum(), wanted),
                    torch.autograd.grad((plain * cotangent).sum(), wanted), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("score_norm", ["bank_l2", "cosine", "none"])
def test_gradients_equal_finite_differences(score_norm):
    bank = _bank(score_norm=score_norm, temperature=0.5)

    def function(x, keys, values):
        return torch.func.functional_call(bank, {"new_keys": keys, "new_values": values}, (x,))

    inputs = tuple(t.detach().clone().requires_grad_() for t in (_x(3), bank.new_keys, bank.new_values))
    assert torch.autograd.gradcheck(function, inputs)


def test_identity_at_the_first_task():
    layer = nn.Sequential(nn.Linear(DIM, OUT))
    x = _x(6, dtype=torch.float32)
    before = layer(x)
    method = MoRA(rank=4, targets=["0"], head=False)
    method.install(layer)
    assert torch.equal(layer(x), before)
    method.start_task(layer, Task(0, (0,)))
    assert torch.equal(layer(x), before)


def test_gradients_of_the_first_step():
    for tasks, moves in ((1, False), (2, True)):
        bank = _bank(tasks)
        with torch.no_grad():
            bank.new_values.zero_()
        bank(_x(6)).sum().backward()
        assert (bank.new_keys.grad.abs().max() > 0) == moves
        assert bank.new_values.grad.abs().max() > 0


def test_keys_that_are_not_chosen_get_gradient_through_the_norm():
    bank = _bank(1, rank=8, top_k=2)
    x = _x(1)
    index, _, _ = bank.select(x)
    bank(x).sum().backward()
    rest = [i for i in range(8) if i not in index.flatten().tolist()]
    assert bank.new_keys.grad[0, rest].abs().min() > 0
    assert bank.new_values.grad[0, rest].abs().max() == 0


def test_all_experts_at_high_temperature_are_a_lora():
    bank = _bank(top_k=99, temperature=1e9, threshold=0.0)
    lora = LowRank(DIM, OUT, rank=12, dtype=torch.float64, scaling=1 / 12)
    with torch.no_grad():
        lora.down.copy_(torch.cat([bank.old_keys, bank.new_keys], 1))
        lora.up.copy_(torch.cat([bank.old_values, bank.new_values], 1))
    x = _x(6)
    torch.testing.assert_close(bank(x), lora(x), atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(lora(x), x @ lora.merged().T)


def test_training_and_evaluation_differ_by_the_threshold_alone():
    bank, x = _bank(threshold=0.5), _x(40)
    train, evaluation = bank.train()(x), bank.eval()(x)
    assert not torch.allclose(train, evaluation)
    _, score, weight = bank.train().select(x)
    _, _, kept = bank.eval().select(x)
    torch.testing.assert_close(kept, weight * (score >= 0.5), atol=0, rtol=0)
    free = _bank(threshold=0.0)
    torch.testing.assert_close(free.train()(x), free.eval()(x), atol=0, rtol=0)
    torch.testing.assert_close(free(x), train)


def test_a_token_that_no_expert_answers_keeps_the_pretrained_output():
    bank = _bank(threshold=0.99).eval()
    assert bank(_x(6)).abs().max() == 0
    assert bank.train()(_x(6)).abs().min() > 0


def test_growth_is_not_function_preserving_but_changes_no_old_expert():
    bank, x = _bank(2), _x(20)
    before = bank(x)
    old = torch.cat([bank.old_values, bank.new_values], 1).clone(), torch.cat([bank.old_keys, bank.new_keys], 1).clone()
    bank.grow(2)
    assert not torch.allclose(bank(x), before)
    assert torch.equal(bank.old_values, old[0])
    assert torch.equal(bank.old_keys, old[1])
    assert [p.requires_grad for p in (bank.old_keys, bank.old_values, bank.new_keys, bank.new_values)] == [
        False
    ] * 2 + [True] * 2
    assert bank.tasks == [(0, 4), (1, 4), (2, 4)]
    assert bank.new_keys.abs().max() <= 1 / math.sqrt(DIM)


def test_new_keys_orthogonal_to_old_ones():
    bank = _bank(2, new_key_init="orthogonal_to_old")
    products = bank.new_keys[0] @ bank.old_keys[0].T
    assert products.abs().max() < 1e-6
    bank.grow(2)
    with pytest.raises(RuntimeError, match="needs room for 12 old and 4 new keys in 12 dimensions; use 'kaiming'"):
        bank.grow(3)
    assert bank.experts == 12


def test_growth_that_one_layer_cannot_do_changes_none():
    module, method = _grown(4, rank=4, new_key_init="orthogonal_to_old", targets=["fc2", "fc1"])
    before = _weights(module)
    with pytest.raises(RuntimeError, match="in 16 dimensions"):
        method.start_task(module, Task(4, (4,)))
    assert _same(module, before)


def test_number_of_experts_and_threshold_as_the_bank_grows():
    assert [_bank(t, top_k=2).top_k for t in (1, 2, 3)] == [2, 2, 2]
    assert [_bank(t, top_k=2, k_schedule="per_task").top_k for t in (1, 2, 3)] == [2, 4, 6]
    assert _bank(1, top_k=1).top_k == 2
    assert _bank(1, top_k=9).top_k == 4
    thresholds = [_bank(t, delta_mode="sqrt_r").threshold for t in (1, 2, 4)]
    assert thresholds == pytest.approx([0.2, 0.2 / math.sqrt(2), 0.1])


def test_routing_is_float32_under_autocast():
    bank, x = _bank(dtype=torch.float32, temperature=0.01, threshold=0.0), _x(200, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = bank(x)
        index, score, weight = bank.select(x)
    assert low.dtype == torch.bfloat16
    assert score.dtype == weight.dtype == torch.float32
    # from the same rounded responses, routing in float32 gives these weights; in bfloat16 it would not
    keys = torch.cat([bank.old_keys, bank.new_keys], 1)[0].bfloat16()
    z = (x.bfloat16() @ keys.T).float()
    expected = (F.normalize(z, dim=-1) / 0.01).gather(1, index[:, 0]).softmax(-1)
    torch.testing.assert_close(weight[:, 0], expected)
    low.float().sum().backward()
    assert torch.isfinite(bank.new_keys.grad).all()


def test_half_precision_layers_and_tokens_of_zeros():
    layer = nn.Sequential(nn.Linear(DIM, OUT)).bfloat16()
    method = MoRA(rank=4, targets=["0"], head=False)
    method.install(layer)
    method.start_task(layer, Task(0, (0,)))
    x = _x(3, dtype=torch.bfloat16)
    x[0] = 0
    y = layer(x)
    y.float().sum().backward()
    bank = method.banks(layer)["0"]
    assert y.dtype == torch.bfloat16
    assert bank.new_keys.dtype == torch.float32
    assert all(torch.isfinite(p.grad).all() for p in (bank.new_keys, bank.new_values))


def _saved_bytes(function) -> int:
    seen: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = function()
    assert result.requires_grad
    return sum(seen.values())


@pytest.mark.parametrize("total", [160, 256])
def test_saved_bytes_are_at_most_1_3_times_those_of_lora(total):
    x = torch.randn(512, 768, requires_grad=True)
    lora = LowRank(768, 768, total)
    bank = RankExperts(768, 768)
    for task in range(total // 16):
        bank.grow(task)
    assert _saved_bytes(lambda: bank(x)) <= 1.3 * _saved_bytes(lambda: lora(x))


@pytest.mark.parametrize("evaluation", ["dense", pytest.param("bag", marks=pytest.mark.slow)])
def test_compiles_without_graph_breaks_through_many_tasks(evaluation):
    module = nn.Sequential(tiny_vit())
    method = MoRA(rank=2, seed=0, evaluation=evaluation)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 3, 8, 8)
    for task in range(10 if evaluation == "dense" else 2):
        method.install(module)
        method.start_task(module, Task(task, (0,)))
        fill_values(module)
        if task in (0, 9) or evaluation == "bag":
            torch.testing.assert_close(compiled(x), module(x))
            compiled(x).sum().backward()
        method.end_task(module, Task(task, (0,)))


# training


class Recorder(pl.Callback):
    """Copies of the frozen experts at the start of each fit."""

    def on_fit_start(self, trainer, pl_module):
        self.old = {n: p.detach().clone() for n, p in pl_module.named_parameters() if ".old_" in n}
        self.base = {
            n: p.detach().clone() for n, p in pl_module.named_parameters() if "plugins" not in n and "head" not in n
        }

    def on_fit_end(self, trainer, pl_module):
        now = dict(pl_module.named_parameters())
        for name, value in {**self.old, **self.base}.items():
            assert torch.equal(now[name], value), name


def test_old_experts_and_the_model_stay_bitwise_under_weight_decay():
    module = PlainModule(weight_decay=0.1)
    method = MoRA(rank=2, seed=0)
    fit_stream(quiet_trainer(callbacks=[method, Recorder()]), module, tiny_stream())
    bank = method.banks(module)["model.blocks.0.attn.qkv"]
    assert bank.old_values.abs().min() > 0
    assert bank.new_values.abs().max() > 0
    assert [t for t, _ in bank.tasks] == [0, 1, 2]


def test_adding_tasks_changes_no_base_key():
    module, base = PlainModule(), set(PlainModule().state_dict())
    method = MoRA(rank=2)
    for task in range(3):
        method.install(module)
        method.start_task(module, Task(task, (task,)))
        assert {k for k in module.state_dict() if not k.startswith("plugins.")} == base
        method.end_task(module, Task(task, (task,)))
    assert module.load_state_dict(PlainModule().state_dict(), strict=False).unexpected_keys == []


def _grown(tasks: int, **options) -> tuple[PlainModule, MoRA]:
    module, method = PlainModule(), MoRA(**{"rank": 2, "seed": 0, "temperature": 0.1, **options})
    method.install(module)
    for task in range(tasks):
        method.start_task(module, Task(task, (task,)))
        fill_values(module)
        method.end_task(module, Task(task, (task,)))
    return module.eval(), method


@pytest.mark.parametrize("own_tasks", [0, 1, 3, 5])
def test_a_state_brings_its_number_of_tasks(own_tasks):
    saved, _ = _grown(3)
    fresh, method = _grown(own_tasks)
    fresh.load_state_dict(saved.state_dict())
    x = torch.randn(2, 3, 8, 8)
    fresh.eval()
    assert torch.equal(fresh(x), saved(x))
    bank = method.banks(fresh)["model.blocks.0.mlp.fc1"]
    assert bank.tasks == [(0, 2), (1, 2), (2, 2)]
    assert not bank.old_keys.requires_grad
    assert bank.new_keys.requires_grad
    method.start_task(fresh, Task(3, (3,)))
    assert bank.experts == 8


def test_resume_inside_a_task_is_bit_equal(tmp_path):
    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.datamodule.task == 1 and trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    straight = PlainModule()
    result = fit_stream(quiet_trainer(callbacks=[MoRA(rank=2), Stop()]), straight, tiny_stream(), seed=3)
    resumed = PlainModule()
    again = fit_stream(
        quiet_trainer(callbacks=[MoRA(rank=2)]), resumed, tiny_stream(), ckpt_path=tmp_path / "middle.ckpt", seed=3
    )
    assert [row.correct for row in result.rows] == [row.correct for row in again.rows]
    for (name, a), (_, b) in zip(straight.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_the_seed_of_the_stream_decides_the_keys():
    keys = []
    for seed in (0, 0, 1):
        module, method = PlainModule(), MoRA(rank=2)
        fit_stream(quiet_trainer(callbacks=[method], max_epochs=1), module, tiny_stream(n_per_class=2), seed=seed)
        keys.append(method.banks(module)["model.blocks.1.mlp.fc2"].old_keys.clone())
    assert torch.equal(keys[0], keys[1])
    assert not torch.equal(keys[0], keys[2])


def test_checkpoint_and_parameters_grow_linearly():
    sizes = []
    for tasks in (1, 2, 3):
        module, _ = _grown(tasks)
        sizes.append(sum(v.numel() for k, v in module.state_dict().items() if ".old_" in k or ".new_" in k))
        assert sum(p.numel() for n, p in module.named_parameters() if "plugins" in n and p.requires_grad) == sizes[0]
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0] == sizes[0]


def test_growth_in_the_middle_of_a_task_is_refused():
    module, method = _grown(1)
    method.start_task(module, Task(1, (1,)))
    method.start_task(module, Task(1, (1,)))  # the same task again adds nothing
    assert method.banks(module)["model.blocks.0.attn.proj"].experts == 4
    with pytest.raises(RuntimeError, match="experts of task 2 cannot be added in the middle of task 1"):
        method.start_task(module, Task(2, (2,)))
    assert method.banks(module)["model.blocks.0.attn.proj"].experts == 4

    class Greedy(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            method.start_task(pl_module, Task(1, (1,)))

    method = MoRA(rank=2)
    with pytest.raises(RuntimeError, match="in the middle of task 0"):
        fit_stream(quiet_trainer(callbacks=[method, Greedy()]), PlainModule(), tiny_stream())
    fit_stream(quiet_trainer(callbacks=[method], max_epochs=1), PlainModule(), tiny_stream())  # works again


def test_lightning_alone_names_the_task_through_the_data_module():
    module, method, stream = PlainModule(), MoRA(rank=2), tiny_stream()
    for index in range(2):
        stream.task = index
        quiet_trainer(callbacks=[method], max_epochs=1).fit(module, datamodule=stream)
    assert [t for t, _ in method.banks(module)["model.blocks.0.attn.qkv"].tasks] == [0, 1]


def test_a_hand_written_loop():
    model, method = tiny_vit(), MoRA(rank=2, seed=0)
    x = torch.randn(8, 3, 8, 8)
    method.install(model)
    for task in (Task(0, (0, 1)), Task(1, (2, 3))):
        method.start_task(model, task)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        y = torch.tensor(task.classes).repeat(4)
        losses = []
        for _ in range(5):
            loss = F.cross_entropy(model.train()(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        method.end_task(model, task)
        assert losses[-1] < losses[0]


def test_a_backbone_in_eval_mode_trains_its_experts_without_the_threshold():
    module, method = PlainModule().eval(), MoRA(rank=2)
    method.install(module)
    method.start_task(module, Task(0, (0,)))
    assert all(bank.training for bank in method.banks(module).values())
    assert not module.model.training


# settings, files and refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "`rank` must be an integer of 1 or more, got 0"),
        ({"top_k": 0}, "`top_k` must be an integer of 1 or more, got 0"),
        ({"rank": 2.0}, "`rank` must be an integer"),
        ({"min_active": -1}, "`min_active`"),
        ({"threshold": 1.0}, r"`threshold` must be in \[0, 1\), got 1.0"),
        ({"threshold": -0.1}, r"`threshold` must be in \[0, 1\), got -0.1"),
        ({"threshold": math.nan}, "`threshold`"),
        ({"temperature": 0.0}, "`temperature` must be above 0, got 0.0"),
        ({"scaling": math.inf}, "`scaling` must be finite"),
        ({"dropout": 1.0}, r"`dropout` must be in \[0, 1\)"),
        ({"score_norm": "l1"}, "`score_norm` must be one of bank_l2, cosine, none, got 'l1'"),
        ({"evaluation": "fast"}, "`evaluation` must be one of dense, bag, auto"),
        ({"qkv_mode": "both"}, "`qkv_mode` must be 'split' or 'fused'"),
        ({"probe": -1}, "`probe` must be a number of batches, got -1"),
    ],
)
def test_settings_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        MoRA(**options)


@pytest.mark.parametrize(("options", "message"), [({"rank": 0}, "`rank`"), ({"dropout": 1.5}, "`dropout`")])
def test_settings_of_lora_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        LoRA(**options)


def _weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def _same(module: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    now = module.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[k], v) for k, v in before.items())


def test_export_and_load(tmp_path):
    saved, method = _grown(3)
    method.export_adapters(saved, tmp_path / "mora.safetensors")
    fresh = PlainModule()
    fresh.model.head.load_state_dict(saved.model.head.state_dict())  # the file holds adapters alone
    other = MoRA(rank=2, temperature=0.1)
    other.load_adapters(fresh, tmp_path / "mora.safetensors")
    x = torch.randn(2, 3, 8, 8)
    features = saved.model.forward_features(x)
    assert torch.equal(fresh.eval().model.forward_features(x), features)
    assert [t for t, _ in other.banks(fresh)["model.blocks.0.attn.qkv"].tasks] == [0, 1, 2]

    bare, third = tiny_vit(), MoRA(rank=2, temperature=0.1)  # the same model outside of a LightningModule
    third.load_adapters(bare, tmp_path / "mora.safetensors")
    assert torch.equal(bare.eval().forward_features(x), features)
    from safetensors import safe_open

    with safe_open(str(tmp_path / "mora.safetensors"), "pt") as file:
        assert all(".old_" in k or ".new_" in k for k in list(file.keys()))
        assert '"rank": 2' in file.metadata()["cl_plugins"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 4}, "the saved adapter of 'model.blocks.0.attn.qkv' does not fit: its rank is 2, here `rank` is 4"),
        ({"targets": ["qkv"]}, "on other layers, only saved: model.blocks.0.attn.proj, .*; use the same `targets`"),
        ({"qkv_mode": "fused"}, r"'model.blocks.0.attn.qkv' does not fit: its `old_keys` has shape \(3, 4, 16\)"),
    ],
)
@pytest.mark.parametrize("how", ["file", "state"])
def test_adapters_of_another_rank_or_other_layers_are_refused(tmp_path, options, message, how):
    saved, method = _grown(3)
    with torch.no_grad():
        for p in saved.parameters():
            p.add_(0.1)
    method.export_adapters(saved, tmp_path / "mora.safetensors")
    module, other = _grown(1, **options)
    before = _weights(module)
    from_file = partial(other.load_adapters, module, tmp_path / "mora.safetensors")
    load = from_file if how == "file" else partial(module.load_state_dict, saved.state_dict())
    with pytest.raises(RuntimeError, match=message):
        load()
    assert _same(module, before)


def test_other_settings_of_a_file_are_said(tmp_path):
    saved, method = _grown(1)
    method.export_adapters(saved, tmp_path / "mora.safetensors")
    with pytest.warns(UserWarning, match="trained with other settings: `temperature` 0.1 \\(here 0.5\\)"):
        MoRA(rank=2, temperature=0.5, threshold=0.1).load_adapters(PlainModule(), tmp_path / "mora.safetensors")


def test_files_of_something_else_are_refused(tmp_path):
    from safetensors.torch import save_file

    module, method = _grown(1)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="must be a file written by `export_adapters`"):
        method.load_adapters(module, tmp_path / "other.safetensors")
    method.export_adapters(module, tmp_path / "mora.safetensors")
    with pytest.raises(ValueError, match=r"must hold adapters of 'lora' .* got 'mora'"):
        LoRA(rank=2).load_adapters(module, tmp_path / "mora.safetensors")


def test_lora_files(tmp_path):
    module, method = PlainModule(), LoRA(rank=2, seed=0)
    method.install(module)
    fill_values(module, "lora")
    method.export_adapters(module, tmp_path / "lora.safetensors")
    fresh, x = PlainModule(), torch.randn(2, 3, 8, 8)
    LoRA(rank=2).load_adapters(fresh, tmp_path / "lora.safetensors")
    assert torch.equal(fresh.eval()(x), module.eval()(x))
    with pytest.raises(RuntimeError, match="its rank is 2, here `rank` is 3"):
        LoRA(rank=3).load_adapters(PlainModule(), tmp_path / "lora.safetensors")


def test_merging_is_refused_with_the_reason():
    module, method = _grown(1)
    before = _weights(module)
    with pytest.raises(RuntimeError, match=r"cannot be merged .* depends on each token"):
        method.merge(module)
    assert _same(module, before)


def test_installing_comes_first():
    with pytest.raises(RuntimeError, match="call `install"):
        MoRA().banks(PlainModule())
    with pytest.raises(ValueError, match="`head=False` trains adapters alone"):
        MoRA().install(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))


def test_lora_trains_the_same_layers():
    module, method = PlainModule(), LoRA(rank=2, seed=0)
    fit_stream(quiet_trainer(callbacks=[method, Recorder()]), module, tiny_stream())
    mora, other = _grown(1)
    assert list(method.adapter_modules(module)) == list(other.adapter_modules(mora))
    budgets = [
        sum(p.numel() for n, p in m.named_parameters() if n.startswith("plugins.") and p.requires_grad)
        for m in (module, mora)
    ]
    assert budgets[0] == budgets[1]
    assert all(a.up.abs().max() > 0 for a in method.adapter_modules(module).values())


# what is reported


def test_usage_counts():
    bank, x = _bank(threshold=0.5, dtype=torch.float32).eval(), _x(30, dtype=torch.float32)
    usage = ExpertUsage(bank)
    usage.update(bank, x[:10])
    usage.update(bank, x[10:])
    read = usage.read()
    index, score, _ = bank.select(x)
    weight = (score / 0.1).softmax(-1)
    mass = [weight[index // 4 == t].sum().item() / 30 for t in range(3)]
    assert read["mass"] == pytest.approx(mass, rel=1e-4)
    assert sum(read["mass"]) == pytest.approx(1, rel=1e-5)
    assert read["empty"] == pytest.approx((score < 0.5).all(-1).float().mean().item())
    entropy = -(weight * weight.log()).sum(-1)
    assert read["effective"] == pytest.approx(entropy.exp().mean().item(), rel=1e-4)


def test_a_long_stream_is_reported_fifty_times_with_fifty_tasks():
    from cl_plugins.callbacks.mora import _spread

    assert _spread(0) == []
    for n in (1, 7, 50, 51, 99, 1000):
        told = _spread(n)
        assert len(told) == len(set(told)) == min(n, 50)
        assert (min(told) >= 0, told[-1]) == (True, n - 1)
        assert max(b - a for a, b in zip([-1, *told], told, strict=False)) <= -(-n // 50)


def test_report_events_look_at_the_tasks_that_are_evaluated():
    stream = tiny_stream()
    batch = next(iter(stream.test_loader(0)))
    stream.evaluation_tasks = (Task(0, (0, 1, 2, 3, 4, 5)),)  # one column behind all three tasks
    stream.learned_after = lambda task: int(task == 2)
    stream.test_loader = lambda index: [[batch][index]]
    method = MoRA(rank=2)
    fit_stream(quiet_trainer(callbacks=[method], max_epochs=1), module := PlainModule(), stream)
    events = {e["name"]: e for e in method.report_events(module)}
    assert events["mora/mass_per_task"]["task"] == 2
    assert [len(row) for row in events["mora/mass_per_task"]["value"]] == [3]  # one column, three growths


def test_report_events():
    module, method = PlainModule(), MoRA(rank=2)
    fit_stream(quiet_trainer(callbacks=[method], max_epochs=1), module, tiny_stream())
    module.train()
    method.banks(module)["model.blocks.0.attn.qkv"].eval()
    modes = [m.training for m in module.modules()]
    events = {e["name"]: e for e in method.report_events(module)}
    assert [m.training for m in module.modules()] == modes
    assert set(events) == {
        f"mora/{n}" for n in ("mass_per_layer", "mass_per_task", "tokens_without_expert", "effective_experts")
    }
    for event in events.values():
        assert len(event["value"]) == len(event["rows"])
        assert all(len(row) == len(event["columns"]) for row in event["value"])
        assert event["task"] == 2
    assert len(events["mora/mass_per_layer"]["rows"]) == 8
    assert all(sum(row) == pytest.approx(1, abs=1e-4) for row in events["mora/mass_per_task"]["value"])
    assert all(0 <= v <= 1 for row in events["mora/tokens_without_expert"]["value"] for v in row)
    assert all(1 <= v <= 2.001 for row in events["mora/effective_experts"]["value"] for v in row)
    assert all(bank.usage is None for bank in method.banks(module).values())
    assert MoRA(rank=2, probe=0).report_events(_grown(1)[0]) == []


# classification by text


def _tokenize(texts: list[str]) -> torch.Tensor:
    return torch.stack([torch.tensor([1, *[3 + ord(c) % 40 for c in t], 49, 0, 0, 0]) for t in texts])


NAMES = ["ant", "bee", "cat", "dog", "elk", "fox"]


class TextModule(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = TextClassifier(tiny_clip(), _tokenize, NAMES, template="{}")

    def forward(self, x):
        return self.net(F.interpolate(x, 16))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.net.loss(F.interpolate(x, 16), y)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def test_both_towers_train_and_nothing_else_does():
    module, method = TextModule(), MoRA(rank=2, temperature=0.1)
    assert not method.has_head(module)
    fit_stream(quiet_trainer(callbacks=[method, Recorder()]), module, tiny_stream())
    banks = method.banks(module)
    assert len(banks) == 16
    # the last block's MLP sees one token per text that counts, which may stay with the first task's experts
    assert all(bank.old_values.abs().max() > 0 for bank in banks.values())
    assert all(n.startswith("plugins.") for n, p in module.named_parameters() if p.requires_grad)


def test_texts_of_the_current_classes_in_training_and_kept_texts_in_evaluation():
    net = TextClassifier(tiny_clip(), _tokenize, NAMES, template="{}", chunk=4)
    sizes: list[int] = []
    encode = net.model.encode_text
    net.model.encode_text = lambda tokens: (sizes.append(len(tokens)), encode(tokens))[1]
    images = torch.randn(2, 3, 16, 16)
    with pytest.raises(RuntimeError, match="`start_task\\(task\\)` must be called"):
        net.loss(images, torch.tensor([0, 1]))
    net.start_task(Task(0, (0, 1, 2)))
    net.start_task(Task(1, (5, 3)))
    loss = net.train().loss(images, torch.tensor([3, 5]))
    assert sizes == [2]
    texts = encode(net.tokens[[5, 3]])
    expected = contrastive_loss(net.model.encode_image(images), texts, torch.tensor([1, 0]), net.scale, n_seen=3).total
    torch.testing.assert_close(loss, expected)
    sizes.clear()
    net.eval()
    with torch.no_grad():
        first = net(images)
        assert first.shape == (2, 6)
        net(images)
        assert sizes == [4, 2]  # all six names once, in chunks
        net.model.text_projection.mul_(-1)
        net.train()
        assert not torch.allclose(net.eval()(images), first)
    assert sizes == [4, 2] * 2


def test_the_loss_shrinks_with_the_number_of_classes_seen():
    f = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    t = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 2, 2, 1])
    none, nine = (contrastive_loss(f, t, labels, 10.0, n) for n in (0, 9))
    torch.testing.assert_close(none.text_to_image / 4, nine.text_to_image)
    torch.testing.assert_close(none.image_to_text, nine.image_to_text)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"template": "a photo"}, ValueError, "`template` must hold {}"),
        ({"class_names": []}, ValueError, "`class_names` must hold at least one name"),
        ({"model": nn.Linear(2, 2)}, TypeError, "`model` must have encode_image, encode_text, logit_scale, got Linear"),
    ],
)
def test_text_classifier_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        TextClassifier(**{"model": tiny_clip(), "tokenize": _tokenize, "class_names": NAMES, **arguments})


def test_text_classifier_needs_a_name_for_every_class():
    with pytest.raises(ValueError, match="`class_names` must cover class 6, got 6 names"):
        TextClassifier(tiny_clip(), _tokenize, NAMES).start_task(Task(0, (5, 6)))


def test_copies_train_apart():
    module, method = _grown(1)
    twin = copy.deepcopy(module)
    method.start_task(module, Task(1, (1,)))
    assert method.banks(twin)["model.blocks.0.attn.qkv"].experts == 2
    assert method.banks(module)["model.blocks.0.attn.qkv"].experts == 4
