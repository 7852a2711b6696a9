"""The command line as a person meets it: in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from cl_plugins.benchmark import build_callbacks
from cl_plugins.check import describe_table, read_table
from cl_plugins.cli import main
from cl_plugins.commands._pairs import pair
from cl_plugins.recipes import Recipe, load_recipe, recipe_names, with_options

OVOR_RUN = ["run", "--method", "ovor", "--scenario", "split-digits"]
FAST = ["--scenario", "split-digits", "--epochs", "1", "--device", "cpu", "--quiet"]


def _bench(*words, **options):
    command = [sys.executable, "-m", "cl_plugins.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_run_writes_a_result_a_report_and_its_configuration(tmp_path, capsys):
    assert main(["run", "--method", "nearest-mean", *FAST, "--out", str(tmp_path / "a"), "--seed", "3"]) == 0
    printed = capsys.readouterr().out
    assert "average accuracy (last row)" in printed
    assert "forgetting (peak since learned)" in printed
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    needed = "method scenario seed class_order accuracy_matrix average_accuracy average_incremental_accuracy forgetting"
    needed += " backward_transfer learning_accuracy trainable_parameters train_seconds eval_seconds"
    assert set(needed.split()) <= set(result)
    assert (result["method"], result["scenario"], result["seed"]) == ("nearest-mean", "split-digits", 3)
    assert 0.85 < result["average_accuracy"] <= 1
    assert f"{result['average_accuracy']:.4f}" in printed
    assert (tmp_path / "a" / "report.html").read_text().startswith("<!")
    assert yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())["method"] == "nearest-mean"


def test_an_earlier_run_in_the_folder_is_kept(tmp_path):
    for seed in (0, 1):
        assert main(["run", "--method", "nearest-mean", *FAST, "--out", str(tmp_path), "--seed", str(seed)]) == 0
    assert json.loads((tmp_path / "result.json").read_text())["seed"] == 1
    assert json.loads((tmp_path / "previous-1" / "result.json").read_text())["seed"] == 0


def test_a_configuration_file_and_flags_give_the_same_run(tmp_path):
    settings = {
        "method": "ranpac",
        "scenario": "split-digits",
        "quiet": True,
        "device": "cpu",
        "set": ["projection=64"],
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**settings, "out": str(tmp_path / "a")}))
    assert main(["run", "--config", str(tmp_path / "c.yaml")]) == 0
    words = ["run", "--method", "ranpac", *FAST, "--set", "projection=64", "--out", str(tmp_path / "b")]
    assert main(words) == 0
    a, b = (json.loads((tmp_path / x / "result.json").read_text()) for x in "ab")
    assert a["correct"] == b["correct"]
    assert a["recipe"]["callbacks"][0]["init"]["projection"] == 64


def test_compare_gives_mean_and_interval_over_seeds(tmp_path, capsys):
    for seed in range(3):
        main(
            [
                "run",
                "--method",
                "ranpac",
                *FAST,
                "--set",
                "projection=64",  # drawn anew by each seed
                "--seed",
                str(seed),
                "--order-seed",
                str(seed),
                "--out",
                str(tmp_path / str(seed)),
            ]
        )
    capsys.readouterr()
    assert main(["compare", str(tmp_path), "--format", "json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["methods"]
    values = [json.loads((tmp_path / str(s) / "result.json").read_text())["average_accuracy"] for s in range(3)]
    mean = sum(values) / 3
    half = 4.302652729911275 * (sum((v - mean) ** 2 for v in values) / 2) ** 0.5 / 3**0.5
    assert row["average accuracy"] == f"{mean:.3f} ± {half:.3f}"
    assert row["runs"] == "3"
    for style in ("text", "markdown", "csv", "latex"):
        assert main(["compare", str(tmp_path), "--format", style]) == 0
        assert "ranpac" in capsys.readouterr().out


def test_report_is_written_for_a_folder_of_runs(tmp_path, capsys):
    main(["run", "--method", "nearest-mean", *FAST, "--out", str(tmp_path / "runs" / "x")])
    assert main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "r.html")]) == 0
    assert "nearest-mean" in (tmp_path / "r.html").read_text()


def test_list_names_every_method_and_scenario(capsys):
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    for name in [*recipe_names(), "split-digits", "split-glyphs-100", "split-glyphs-1000", "split-cifar100"]:
        assert f"  {name} " in printed


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["run", "--method", "ovro", *FAST], "`method` must be a known method, got 'ovro'; did you mean 'ovor'?"),
        (["run", "--method", "ovor", "--scenario", "split-digit"], "did you mean 'split-digits'?"),
        (["run", "--method", "ovor", *FAST, "--set", "lenght=3"], "`--set lenght` must name an option of 'ovor'"),
        (["run", "--method", "ovor", *FAST, "--set", "oops"], "`--set` must be KEY=VALUE, got 'oops'"),
        (["run", "--method", "ovor", *FAST, "--set", "lr=!!x"], "the value of `--set lr` must be YAML, got '!!x'"),
        (["run", "--method", "ovor", *FAST, "--set", "lr=2020-99-99"], "got '2020-99-99' (month must be in 1..12)"),
        (["run", "--method", "ovor", *FAST, "--data", "size=\t"], "the value of `--data size` must be YAML, got '\\t'"),
        (["run", "--method", "ovor", *FAST, "--set", "schedule=linear"], "`schedule` must be one of"),
        ([*OVOR_RUN, "--epochs", "0"], "`epochs` must be a whole number of 1 or more"),
        ([*OVOR_RUN, "--device", "tpu"], "`device` must be auto, cpu, cuda or mps"),
        (["report", "/nonexistent-folder"], "nonexistent-folder"),
        (["compare", "/nonexistent-folder"], "must hold result.json files"),
    ],
)  # fmt: skip
def test_mistakes_get_one_clear_line(words, text, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) != 0
    error = capsys.readouterr().err
    assert text in error
    assert "Traceback" not in error


def test_unknown_commands_suggest_the_nearest():
    done = _bench("rum")
    assert done.returncode != 0
    assert "unknown command 'rum'; did you mean 'run'?" in done.stderr


def test_ctrl_c_keeps_what_was_recorded_and_exits_with_130(tmp_path):
    words = ["run", "--method", "finetune", "--scenario", "split-digits", "--epochs", "60", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "cl_plugins.cli", *words, "--out", str(tmp_path / "x")],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a job in the background has it ignored
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not list((tmp_path / "x").glob("events.*")):
        time.sleep(0.1)
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 130, error
    assert "stopped; finished tasks are recorded" in error
    assert "Traceback" not in error
    (events,) = (tmp_path / "x").glob("events.*.jsonl")
    assert [json.loads(line) for line in events.read_text().splitlines()]
    assert not (tmp_path / "x" / "result.json").exists()


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_output_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["run", "--method", "ranpac", *FAST, "--out", str(tmp_path / "file")]) != 0
    assert "`out` must be a folder, got the file" in capsys.readouterr().err


def test_recipes_load_for_every_scenario_they_name():
    folder = Path(load_recipe.__globals__["_FOLDER"])
    for name in recipe_names():
        content = yaml.safe_load((folder / f"{name}.yaml").read_text())
        for scenario in [None, *(content.get("scenarios") or {})]:
            with_options(load_recipe(name, scenario), {})


def test_options_reach_the_callbacks_that_take_them():
    recipe = with_options(load_recipe("ranpac"), {"projection": 7, "lr": 0.5})
    assert recipe.callbacks[0]["init"]["projection"] == 7
    assert recipe.lr == 0.5
    assert load_recipe("ranpac").callbacks[0].get("init", {}).get("projection") != 7
    assert with_options(load_recipe("ranpac"), {"RanPAC.seed": 4}).callbacks[0]["init"]["seed"] == 4
    with pytest.raises(ValueError, match=r"`--set Other.seed` must name an option"):
        with_options(load_recipe("ranpac"), {"Other.seed": 4})


def test_the_seed_of_a_run_reaches_what_callbacks_draw():
    def projection(run, **options):
        (callback,) = build_callbacks(with_options(load_recipe("ranpac"), options), run)
        return callback.seed

    assert [projection(run) for run in (None, 0, 3)] == [0, 0, 3]
    assert projection(3, seed=7) == 7  # what the user sets stands
    assert all(build_callbacks(load_recipe(name), 5) is not None for name in recipe_names())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=1", ("a", 1)),
        ("a=1e-3", ("a", 1e-3)),
        ("a=true", ("a", True)),
        ("a=x=y", ("a", "x=y")),
        ("a=null", ("a", None)),
    ],
)
def test_values_on_the_command_line_have_types(text, expected):
    assert pair(text) == expected


def test_settings_are_checked():
    with pytest.raises(ValueError, match="`lr` must be a number above 0, got '1e-3'"):
        Recipe("m", "d", lr="1e-3")
    with pytest.raises(
        ValueError, match="`optimizer` must be one of adam, adamw, sgd, got 'adan'; did you mean 'adam'"
    ):
        Recipe("m", "d", optimizer="adan")


def test_check_says_which_definition_a_number_follows(tmp_path, capsys):
    (tmp_path / "m.csv").write_text(",task 0,task 1,task 2\nafter 0,90,,\nafter 1,70,80,\nafter 2,80,60,95\n")
    assert main(["check", str(tmp_path / "m.csv"), "--value", "F=0.15", "--value", "x=0.999"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("3 evaluations x 3 tasks, in percent\n")
    assert "F = 0.1500 is\n    forgetting[peak,since=learned]\n" in printed
    assert "avalanche: " in printed
    assert "x = 0.9990: no known definition gives this; nearest is " in printed
    (tmp_path / "bad.csv").write_text("0.9,0.1\n0.8,oops\n")
    assert main(["check", str(tmp_path / "bad.csv"), "--value", "F=0.1"]) == 1
    assert "must hold numbers, got 'oops' in row 2, column 2" in capsys.readouterr().err
    assert main(["check", str(tmp_path / "m.csv")]) == 1
    assert "`--value` must give at least one published number" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        ",0,1,2\n0,0.9,,\n1,0.7,0.8,\n2,0.8,0.6,0.95\n",  # pd.DataFrame(matrix).to_csv(...)
        "0,1,2\n0.9,,\n0.7,0.8,\n0.8,0.6,0.95\n",  # with index=False
        "step,1,2,3\n1,0.9,,\n2,0.7,0.8,\n3,0.8,0.6,0.95\n",  # with index_label="step"
        "step,a,b,c\n0,0.9,,\n1,0.7,0.8,\n2,0.8,0.6,0.95\n",
        ",0,1,2\nafter 0,0.9,,\nafter 1,0.7,0.8,\nafter 2,0.8,0.6,0.95\n",
        "a,b,c\n0.9,,\n0.7,0.8,\n0.8,0.6,0.95\n",
        "0.9,,\n0.7,0.8,\n0.8,0.6,0.95\n",
        "90,,\n70,80,\n80,60,95\n",
    ],
)
def test_check_leaves_out_names_and_numbers_of_rows_and_columns(tmp_path, text):
    (tmp_path / "m.csv").write_text(text)
    matrix, percent = read_table(tmp_path / "m.csv")
    nan = float("nan")
    expected = torch.tensor([[0.9, nan, nan], [0.7, 0.8, nan], [0.8, 0.6, 0.95]], dtype=torch.float64)
    torch.testing.assert_close(matrix, expected, equal_nan=True)
    assert describe_table(matrix, percent) == f"3 evaluations x 3 tasks, {'in percent' if percent else 'as fractions'}"
    assert percent == text.startswith("90")


@pytest.mark.parametrize("text", ["a,b\n1,0.5\n", "0,1\n1,0\n", "0,0.1\n1,0.2\n2,0.3\n", ",0.3\n0,0.5\n"])
def test_check_keeps_rows_and_columns_that_may_be_measured(tmp_path, text):
    (tmp_path / "m.csv").write_text(text)
    n_rows = text.count("\n") - text.startswith("a")
    assert read_table(tmp_path / "m.csv")[0].shape == (n_rows, 2)


@pytest.mark.parametrize(
    ("text", "sign"),
    [(";a;b\nx;0.9;\ny;0.8;0.7\n", "';'"), ("0,9;0,8\n0,7;0,6\n", "';'"), ("0.9\t0.8\n0.7\t0.6\n", r"'\\t'")],
)
def test_check_names_another_delimiter(tmp_path, text, sign):
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(ValueError, match=f"must be separated by commas, got {sign} between the cells; save it with"):
        read_table(tmp_path / "m.csv")
