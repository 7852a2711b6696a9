"""Archives of the transfer sets, fetched so that an interrupted download goes on; torchvision then finds them whole.

Addresses and MD5 sums are torchvision's own. Caltech101 lies behind Google Drive and FGVC-Aircraft has no sum there, so
those two are left to torchvision, which starts an interrupted archive again.
"""

from __future__ import annotations

from pathlib import Path

from .fetch import fetch

_EUROSAT = (
    "https://huggingface.co/datasets/torchgeo/eurosat/resolve/c877bcd43f099cd0196738f714544e355477f3fd/EuroSAT.zip",
    "c8fa014336c82ac7804f0398fcb19387",
)


def archives(name: str) -> list[tuple[str, str, str]]:
    """Address, folder below ``root`` and MD5 sum of each archive of a set; none for those left to torchvision.

    Example:
        >>> [folder for _, folder, _ in archives("oxford-pets")]
        ['oxford-iiit-pet', 'oxford-iiit-pet']
    """
    from torchvision import datasets

    if name == "dtd":
        return [(datasets.DTD._URL, "dtd", datasets.DTD._MD5)]
    if name == "eurosat":
        return [(_EUROSAT[0], "eurosat", _EUROSAT[1])]
    if name == "flowers102":
        prefix = datasets.Flowers102._download_url_prefix
        return [(prefix + file, "flowers-102", md5) for file, md5 in datasets.Flowers102._file_dict.values()]
    if name == "food101":
        return [(datasets.Food101._URL, "", datasets.Food101._MD5)]
    if name == "oxford-pets":
        return [(url, "oxford-iiit-pet", md5) for url, md5 in datasets.OxfordIIITPet._RESOURCES]
    if name == "sun397":
        return [(datasets.SUN397._DATASET_URL, "", datasets.SUN397._DATASET_MD5)]
    return []


def get_archives(name: str, root: Path) -> None:
    """Fetch the archives of a set to where torchvision looks for them before it downloads.

    Raises:
        ConnectionError: when a download breaks; what has arrived is kept, and the next call goes on from there.
        ValueError: when a sum is wrong.
    """
    if name == "cifar100":
        from .benchmarks import load_cifar

        load_cifar(str(root), download=True)
    elif name == "mnist":
        from .mnist import load_mnist

        load_mnist(str(root), download=True)
    for url, folder, md5 in archives(name):
        fetch(url, root / folder / url.rpartition("/")[2], md5)
