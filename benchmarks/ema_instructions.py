r"""Plain tuning, fixed decays, balanced averaging and groups of tasks on the six tasks of `instructions`.

Every method sees the same tasks in the same order with the same data, so rows compare by seed. `plain` and `groups`
come from one training: where every task gets a group of its own and starts from the last weights, groups only decide
which weights answer. `groups unseen` asks the same models in paraphrases, and `own groups unseen` does so with every
prompt sent to its own group. Finished runs are kept in the folder and not repeated; a stopped one (SIGTERM) goes on
where it was.

    python benchmarks/ema_instructions.py
    python benchmarks/ema_instructions.py --seeds 0 1 --methods "groups@0.25" "groups@0.25 + released"
    python benchmarks/ema_instructions.py --seeds 7 --tuned lora --lr 0.005 --methods plain
    python benchmarks/ema_instructions.py --tasks first-letter last-letter count-vowels drop-vowels \
        --methods plain groups "groups + released" "groups + horizon 0.5"
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from ema_quality import pretrained

from cl_plugins import fit_stream
from cl_plugins.benchmark import quiet_lightning
from cl_plugins.callbacks import BalancedEMA, LoRA, StreamCheckpoint, TaskGroups
from cl_plugins.causal_lm import LanguageModule
from cl_plugins.checkpoint_files import checkpoint_files
from cl_plugins.evaluation import evaluate_tasks
from cl_plugins.instruction_groups import InstructionGroups
from cl_plugins.lm_bytes import LM_BYTES, create_lm_bytes
from cl_plugins.result import StreamResult
from cl_plugins.scenarios import InstructionStream

RULES: dict[str, dict[str, Any]] = {
    **{f"fixed {d}": {"rule": "fixed", "decay": d} for d in (0.9, 0.99, 0.995, 0.999)},
    **{f"horizon {k}": {"rule": "horizon", "keep": k} for k in (0.1, 0.25, 0.4, 0.5)},
    "released": {"rule": "released"},
    "dimension_free 0.05": {"rule": "dimension_free", "rho": 0.05},
}
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "mlp.0", "mlp.2"]


SHARED = ("plain", "groups", "groups unseen", "own groups unseen")


def routed_result(
    groups: TaskGroups, module: LanguageModule, stream: InstructionStream, trainer: pl.Trainer, own: bool = False
) -> StreamResult:
    """What routing answers after each task, from the weights and texts of the groups that were there then.

    With ``own`` every prompt meets its task's own group, whatever its words: what is lost then, the model loses itself.
    """
    task_of = {e.input + e.instruction: i for i, t in enumerate(stream.text_tasks) for e in t.test}

    def owner(batch: Any) -> list[int]:
        return [task_of[i + w] for i, w in zip(batch["inputs"], batch["instructions"], strict=True)]

    book, weights, result = groups.groups.groups, groups.weights, StreamResult.for_stream(stream)
    for index in range(len(stream.tasks)):  # every task made one group
        groups.groups.groups, groups.weights = book[: index + 1], weights[: index + 1]
        result.rows.append(
            evaluate_tasks(
                module, stream, index, trainer=trainer, predict=groups.routed(stream.predict, owner if own else None)
            )
        )
    return result


def record_of(result: StreamResult, groups: TaskGroups | None, stream: InstructionStream) -> dict[str, Any]:
    """Plain values."""
    return {
        "accuracy": result.average_accuracy,
        "forgetting": result.forgetting,
        "learning": result.learning_accuracy,
        "groups": None if groups is None else [h["group"] for h in groups.groups.history],
        "matrix": result.correct.tolist(),
        "tasks": [t.name for t in stream.tasks],
    }


def run(method: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One stream: `plain`, a rule, `groups`, or `groups + <rule>`; `groups@0.2` sets the groups' threshold."""
    a = arguments
    settings = "_".join([*a.tasks, f"{a.size}_{a.tuned}_{a.lr:g}_{a.train}x{a.epochs}_{a.batch}_{seed}"])
    shared = () if a.tasks else SHARED  # tasks that share a group do not end in the weights of plain tuning
    file = Path(a.out) / f"{settings}_{method.replace(' ', '')}.json"
    if file.exists():
        record: dict[str, Any] = json.loads(file.read_text())
        return record
    base = create_lm_bytes() if a.size == LM_BYTES["dim"] else pretrained(a.size, a.pretrain, Path(a.out), "cpu")
    stream = InstructionStream(
        n_train=a.train,
        n_test=a.test,
        order_seed=seed,
        data_seed=seed,
        batch_size=a.batch,
        eval_batch_size=a.test,
        tasks=a.tasks or None,
    )
    callbacks: list[Any] = []
    if a.tuned == "lora":
        callbacks.append(LoRA(rank=a.rank, targets=LAYERS, head=False))
    groups, rule = None, method
    if method in shared or method.startswith("groups"):
        kind, _, rule = method.partition(" + ")
        groups = TaskGroups(InstructionGroups(threshold=float(kind.partition("@")[2] or 0.3)))
        callbacks.append(groups)
    if rule in RULES:
        callbacks.append(BalancedEMA(**RULES[rule], active="after_first" if groups is None else "reused"))
    saver = StreamCheckpoint(Path(a.out) / f"{settings}_{'plain' if method in shared else method.replace(' ', '')}")
    callbacks.append(saver)
    pl.seed_everything(seed, verbose=False)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=a.epochs,
        callbacks=callbacks,
        gradient_clip_val=1.0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    started = time.process_time()
    module = LanguageModule(base, lr=a.lr)
    last = "last" if checkpoint_files(saver.folder) else None
    routed = (
        {} if method not in shared else {"predict": lambda m, batch: stream.predict(m, batch)}
    )  # ours is not routed
    result = fit_stream(trainer, module, stream, last, seed=seed, **routed)
    record = {**record_of(result, groups, stream), "cpu seconds": time.process_time() - started}
    if method not in shared:
        file.write_text(json.dumps(record))
        shutil.rmtree(saver.folder)
        return record
    assert groups is not None
    if not all(h["expanded"] for h in groups.groups.history):
        raise RuntimeError("`plain` shares its training with `groups` only where every task has a group of its own")
    reworded = InstructionStream(
        n_train=a.train, n_test=a.test, test_wordings="unseen", order_seed=seed, data_seed=seed, eval_batch_size=a.test
    )
    results = {
        "groups": routed_result(groups, module, stream, trainer),
        "groups unseen": routed_result(groups, module, reworded, trainer),
        "own groups unseen": routed_result(groups, module, reworded, trainer, own=True),
    }
    records = {"plain": record, **{name: record_of(r, groups, stream) for name, r in results.items()}}
    for name, values in records.items():
        (Path(a.out) / f"{settings}_{name.replace(' ', '')}.json").write_text(json.dumps(values))
    shutil.rmtree(saver.folder)
    return records[method]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=[*SHARED, *RULES])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--tasks", nargs="*", default=[], help="some of the tasks; without it all six")
    parser.add_argument("--size", type=int, default=LM_BYTES["dim"], help="width; the bundled model at its own")
    parser.add_argument("--pretrain", type=int, default=1500, help="steps of the base model of another width")
    parser.add_argument("--tuned", choices=["all", "lora"], default="all", help="which weights train")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--train", type=int, default=2000, help="examples per task")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--test", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("runs/ema_instructions"))
    arguments = parser.parse_args()
    for method in arguments.methods:
        kind, _, rule = method.partition(" + ")
        if not (method in (*SHARED, *RULES) or (kind.startswith(("plain", "groups")) and (not rule or rule in RULES))):
            parser.error(
                f"`--methods` takes {', '.join(SHARED)}, groups + RULE, RULE: {', '.join(RULES)}; got {method!r}"
            )
    arguments.out.mkdir(parents=True, exist_ok=True)
    quiet_lightning()
    print("| method | accuracy | forgetting | learning |\n|---|---|---|---|", flush=True)
    for method in arguments.methods:
        records = [run(method, seed, arguments) for seed in arguments.seeds]
        cells = []
        for key in ("accuracy", "forgetting", "learning"):
            values = [100 * r[key] for r in records]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        print(f"| {method} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
