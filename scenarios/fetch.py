"""Downloads that are checked by MD5 sum, show their progress and go on where they were interrupted."""

from __future__ import annotations

import hashlib
import http.client
import urllib.error
import urllib.request
from pathlib import Path

from tqdm.auto import tqdm

_CHUNK = 1 << 20
_ATTEMPTS = 5
_SECONDS = 60


def md5_of(path: Path) -> str:
    """MD5 sum of a file, as hexadecimal text."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def fetch(url: str, path: Path, md5: str) -> Path:
    """Get a file unless it is there and whole.

    What has arrived is kept in ``<path>.part``. When the connection breaks, the rest is asked for a few times, and
    again by the next call, also of another process. The file gets its name when its sum is right.

    Args:
        url: where it is.
        path: where it goes; its folder is made.
        md5: the sum it must have, hexadecimal.

    Returns:
        ``path``.

    Raises:
        ConnectionError: when the connection breaks again and again.
        ValueError: when the sum is wrong; what arrived is removed then.
    """
    if path.is_file() and md5_of(path) == md5:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            _rest(url, part)
            break
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            refused = isinstance(error, urllib.error.HTTPError) and 400 <= error.code < 500
            if attempt == _ATTEMPTS or refused or not part.exists():
                kept = f"; what has arrived is kept in {str(part)!r}, and the next attempt goes on from there"
                raise ConnectionError(
                    f"`download` must reach {url}, got {type(error).__name__}: {error}{kept if part.exists() else ''}"
                ) from error
    got = md5_of(part)
    if got != md5:
        part.unlink()
        raise ValueError(f"{url} must have the MD5 sum {md5}, got {got}; what arrived is removed, try again")
    part.replace(path)
    return path


def _rest(url: str, part: Path) -> None:
    """Append what is missing; a server that cannot send a range sends all of it."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and have:
            return  # nothing is missing
        raise
    with response:
        goes_on = response.status == http.client.PARTIAL_CONTENT
        start = have if goes_on else 0
        length = response.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        with (
            part.open("ab" if goes_on else "wb") as file,
            tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=part.stem) as bar,
        ):
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    arrived = part.stat().st_size
    if total is not None and arrived < total:
        raise ConnectionError(f"the connection ended after {arrived:,} of {total:,} bytes")
