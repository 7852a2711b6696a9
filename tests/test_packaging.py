"""What is installed: one top-level name, every folder, every data file."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def settings():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_folder_with_code_is_in_the_package_list(settings):
    mapped = {"callbacks": "cl_plugins.callbacks", "scenarios": "cl_plugins.scenarios", "cl_plugins": "cl_plugins"}
    found = set()
    for folder, package in mapped.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join([package, *init.parent.relative_to(ROOT / folder).parts]))
    assert found == set(settings["packages"])


def test_every_data_file_is_matched_by_a_pattern(settings):
    patterns = settings["package-data"]
    matched = {
        p for package, globs in patterns.items() for g in globs for p in (ROOT / package.replace(".", "/")).glob(g)
    }
    data = {
        p for p in (ROOT / "cl_plugins").rglob("*") if p.is_file() and p.suffix not in {".py", ".pyc"}
    }  # fmt: skip
    assert data == {p for p in matched if p.is_file()}


def test_an_uninstalled_checkout_imports(tmp_path):
    code = "import cl_plugins.callbacks, cl_plugins.scenarios; print(cl_plugins.callbacks.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip().endswith("__init__.py")


def test_a_stray_import_of_the_folder_says_what_to_import():
    for name in ("callbacks", "scenarios"):
        done = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode != 0
        assert f"import cl_plugins.{name} instead" in done.stderr


@pytest.mark.slow
def test_wheel_holds_one_top_level_name_and_editable_installs_work(tmp_path):
    import venv
    import zipfile

    subprocess.run(
        [sys.executable, "-m", "build", "--outdir", tmp_path / "dist", ROOT], check=True, capture_output=True
    )
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == {"cl_plugins"}
    assert "cl_plugins/weights/vit_glyph.safetensors" in names
    (sdist,) = (tmp_path / "dist").glob("*.tar.gz")
    code = (
        "import cl_plugins.callbacks, cl_plugins.scenarios, cl_plugins.recipes as r; assert 'ovor' in r.recipe_names()"
    )
    for number, target in enumerate(
        ([wheel], [sdist], ["-e", ROOT], ["-e", ROOT, "--config-settings", "editable_mode=strict"])
    ):
        environment = tmp_path / f"venv{number}"
        venv.create(environment, with_pip=True)
        python = environment / "bin" / "python"
        install = [python, "-m", "pip", "install", "-q", "--no-deps", *target]
        subprocess.run(install, check=True, capture_output=True, cwd=tmp_path)
        (own,) = environment.glob("lib/python*/site-packages")
        (own / "parent.pth").write_text(sysconfig.get_path("purelib"))  # the dependencies, not installed again
        subprocess.run([python, "-c", code], check=True, capture_output=True, cwd=tmp_path)


def test_the_command_line_answers_without_torch():
    code = (
        "import sys\nfrom cl_plugins.cli import build_parser\nbuild_parser()\n"
        "assert not {'torch', 'pytorch_lightning'} & set(sys.modules)\n"
        "import cl_plugins\nassert cl_plugins.fit_stream.__name__ in dir(cl_plugins)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
