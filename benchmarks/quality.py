"""Quality of the methods on the bundled streams by the recipes of ``cl-bench``: mean and 95 % t interval over seeds.

Seed r draws the initialization, the order of the samples and the order of the classes; every method sees the same ones.
Finished runs are kept and not repeated.

    python benchmarks/quality.py --out runs/quality --seeds 5 --jobs 2
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

SCENARIOS = ("split-digits", "split-glyphs-100")


def run(method: str, scenario: str, seed: int, out: Path, threads: int) -> str:
    import torch

    from cl_plugins.benchmark import run_benchmark

    torch.set_num_threads(threads)
    folder = out / f"{scenario}_{method}_{seed}"
    result = run_benchmark(method, scenario, seed=seed, order_seed=seed, device="cpu", out=folder, progress=False)
    numbers = f"accuracy {result.average_accuracy:.4f}  forgetting {result.forgetting:.4f}"
    numbers += "".join(f"  {name} {value:.4f}" for name, value in result.domain_scores.items())
    return f"{scenario:<18}{method:<20}seed {seed}  {numbers}"


def main() -> int:
    from cl_plugins.compare import collect_results, methods_table
    from cl_plugins.recipes import load_recipe, recipe_names
    from cl_plugins.scenarios import scenario_info
    from cl_plugins.workloads import unfit

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=recipe_names())
    parser.add_argument("--scenarios", nargs="*", default=list(SCENARIOS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 1))
    parser.add_argument("--threads", type=int, default=1, help="per job")
    args = parser.parse_args()

    fits = {
        (m, s): unfit(load_recipe(m, s), scenario_info(s).modality) is None
        for s in args.scenarios
        for m in args.methods
    }
    jobs = [(m, s, r) for r in range(args.seeds) for s in args.scenarios for m in args.methods if fits[m, s]]
    jobs = [(m, s, r) for m, s, r in jobs if not (args.out / f"{s}_{m}_{r}" / "result.json").exists()]
    failed = 0
    with ProcessPoolExecutor(args.jobs) as pool:
        waiting = {pool.submit(run, *job, args.out, args.threads): job for job in jobs}
        for done, future in enumerate(as_completed(waiting), 1):
            error = future.exception()
            if error is not None:
                failed += 1
                print(f"[{done}/{len(jobs)}] {waiting[future]} failed", file=sys.stderr)
                traceback.print_exception(error)
            else:
                print(f"[{done}/{len(jobs)}] {future.result()}", flush=True)
    print(methods_table(collect_results([args.out]), "markdown"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
