"""What two finished runs do not share: weights, states, results, rows, cached features; times of the clock aside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from cl_plugins import checkpoint_files
from cl_plugins.run_writer import event_files
from cl_plugins.runs import read_run

_TIMES = ("seconds", "spent", ".time")


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}.{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for n, item in enumerate(value) for k, v in _flat(item, f"{prefix}.{n}").items()}
    return {prefix: value}


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    return bool(a == b) or (a != a and b != b)


def _unlike(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Keys of flat values that are not the same in both; times of the clock aside."""
    keys = (k for k in dict.fromkeys([*ours, *theirs]) if not any(word in k for word in _TIMES))
    return [k for k in keys if k not in ours or k not in theirs or not _equal(ours[k], theirs[k])]


def _by_name(events: list[dict[str, Any]]) -> dict[str, Any]:
    """What methods and observers told, by name and task; the order of resumed segments is another."""
    return {f"{e.get('name')} {e.get('task')}": e for e in events}


def _result(folder: Path) -> dict[str, Any]:
    """The run's result; the folder in it, as of a cache, has the same name for every run."""
    text = (folder / "result.json").read_text(encoding="utf-8").replace(json.dumps(str(folder))[1:-1], "FOLDER")
    result: dict[str, Any] = json.loads(text)
    return result


def _cached(folder: Path) -> dict[str, Any]:
    """The checksums of the cached arrays in a folder, by entry."""
    manifests = {p.name: json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.json"))}
    return {name: [(s["name"], s["crc32"]) for s in m["segments"]] for name, m in manifests.items()}


def differences(folder: Path, expected: Path) -> list[str]:
    """What of a finished run is not as in another; times of the clock aside."""
    found = []
    newest = [checkpoint_files.newest_intact(f / "checkpoints") for f in (folder, expected)]
    if None in newest:
        return ["a run has no checkpoint"]
    loaded = [torch.load(str(p), weights_only=True) for p in newest]
    for part in ("state_dict", "callbacks", "global_step"):
        ours, theirs = (_flat(c[part], part) for c in loaded)
        found += [f"{key} differs" for key in _unlike(ours, theirs)]
    results = [_flat(_result(f)) for f in (folder, expected)]
    found += [f"{key[1:]} of result.json differs" for key in _unlike(*results)]
    runs = [read_run(f) for f in (folder, expected)]
    if runs[0].correct.tolist() != runs[1].correct.tolist() or runs[0].total.tolist() != runs[1].total.tolist():
        found.append("rows of the run store differ")
    told = [{"inside": [row.to_dict() for row in r.inside], "plug": _by_name(r.plug)} for r in runs]
    found += [f"{key[1:]} of the run store differs" for key in _unlike(*map(_flat, told))]
    if runs[0].ended != "finished" or runs[0].problems:
        found.append(f"the run store says {runs[0].ended!r}, {runs[0].problems!r}")
    for _, _, path in event_files(folder):
        rows = [e["after"] for e in map(json.loads, path.read_text().splitlines()) if e["kind"] == "row"]
        if len(rows) != len(set(rows)):
            found.append(f"{path.name} holds a row twice")
    if not (folder / "report.html").read_text(encoding="utf-8").rstrip().endswith("</html>"):
        found.append("report.html is not whole")
    theirs, ours = _cached(expected / "cache"), _cached(folder / "cache")
    found += [f"cached features {name} differ" for name in theirs if theirs[name] != ours.get(name)]
    left = [p.name for p in (*folder.rglob("*.tmp"), *folder.glob("previous-*"))]
    return found + ([f"left behind: {', '.join(left)}"] if any("ckpt" in n or ".bin" in n for n in left) else [])
