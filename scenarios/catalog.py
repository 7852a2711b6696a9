"""The data sets and streams that come with the library."""

from __future__ import annotations

from .registry import DataInfo, ScenarioInfo, register_data, register_scenario

_GLYPHS = "characters rendered from the bundled fonts"
_A = {"name": "imagenet-a", "title": "ImageNet-A", "source": "https://github.com/hendrycks/natural-adv-examples"}

DATA: tuple[DataInfo, ...] = (
    DataInfo("digits", "1,797 real handwritten digits of scikit-learn", "digits:load_digits_data"),
    DataInfo("glyphs-100", f"100 {_GLYPHS}", "glyph_data:load_glyphs", {"n_classes": 100}),
    DataInfo(
        "glyphs-1000",
        f"1,000 {_GLYPHS}",
        "glyph_data:load_glyphs",
        {"n_classes": 1000, "train_images": 20, "validation_images": 4, "test_images": 10, "n_tasks": 100},
    ),
    DataInfo(
        "cifar10",
        "CIFAR-10, 60,000 small photos",
        "benchmarks:load_cifar",
        {"kind": "cifar10"},
        "root= with cifar-10-batches-py, or root= and download=True (170 MB)",
    ),
    DataInfo(
        "cifar100",
        "CIFAR-100, 60,000 small photos",
        "benchmarks:load_cifar",
        {"kind": "cifar100"},
        "root= with cifar-100-python, or root= and download=True (169 MB)",
    ),
    DataInfo(
        "imagenet-r",
        "ImageNet-R, 30,000 renditions of 200 classes",
        "benchmarks:load_class_folders",
        {},
        "root= with one folder per class",
    ),
    DataInfo(
        "imagenet-a",
        "ImageNet-A, 7,500 hard photos of 200 classes",
        "benchmarks:load_class_folders",
        _A,
        "root= with one folder per class",
    ),
    DataInfo("cub200", "CUB-200-2011, 11,788 photos of birds", "benchmarks:load_cub", {}, "root= with CUB_200_2011"),
)

_SPLITS = (
    (
        "digits",
        "real handwritten digits, two classes at a time",
        "5 tasks x 2 classes; 1,433 training and 364 test images",
    ),
    (
        "glyphs-100",
        f"{_GLYPHS}, ten classes at a time",
        "10 tasks x 10 classes; 6,000 training, 1,000 validation and 2,000 test images",
    ),
    (
        "glyphs-1000",
        f"{_GLYPHS}, a long stream",
        "100 tasks x 10 classes; 20,000 training, 4,000 validation and 10,000 test images",
    ),
    ("cifar10", "CIFAR-10, two classes at a time", "5 tasks x 2 classes; 50,000 training and 10,000 test images"),
    ("cifar100", "CIFAR-100, ten classes at a time", "10 tasks x 10 classes; 50,000 training and 10,000 test images"),
    (
        "imagenet-r",
        "ImageNet-R, twenty classes at a time",
        "10 tasks x 20 classes; 24,000 training and 6,000 test images",
    ),
    (
        "imagenet-a",
        "ImageNet-A, twenty classes at a time",
        "10 tasks x 20 classes; 6,000 training and 1,500 test images",
    ),
    ("cub200", "CUB-200-2011, twenty birds at a time", "10 tasks x 20 classes; 5,994 training and 5,788 test images"),
)
_NEEDS = {info.name: info.needs for info in DATA}

SCENARIOS = tuple(
    ScenarioInfo(
        f"split-{data}", description, "class_incremental:ClassIncremental", {"data": data}, sizes, _NEEDS[data], data
    )
    for data, description, sizes in _SPLITS
)

_GLYPH_STREAMS = (
    ScenarioInfo(
        "task-glyphs-100",
        "split-glyphs-100, evaluated with the task known",
        "class_incremental:TaskIncremental",
        {"data": "glyphs-100"},
        "10 tasks x 10 classes; 6,000 training, 1,000 validation and 2,000 test images",
        data="glyphs-100",
    ),
    ScenarioInfo(
        "fewshot-glyphs",
        "60 base classes, then 5 classes with 5 images each at a time",
        "boundaries:FewShot",
        {"data": "glyphs-100", "base_classes": 60, "ways": 5, "shots": 5},
        "60 + 8 x 5 classes; 3,600 + 8 x 25 training, 1,000 validation and 2,000 test images",
        data="glyphs-100",
    ),
    ScenarioInfo(
        "online-glyphs",
        "split-glyphs-100, every training image once",
        "class_incremental:ClassIncremental",
        {"data": "glyphs-100", "single_pass": True, "batch_size": 10},
        "10 tasks x 10 classes; 6,000 training, 1,000 validation and 2,000 test images",
        data="glyphs-100",
    ),
    ScenarioInfo(
        "blurry-glyphs",
        "i-Blurry-50-10: half of the classes send a tenth of their images to other tasks; every training image once",
        "boundaries:Blurry",
        {"data": "glyphs-100", "disjoint": 50.0, "blurry": 10.0, "single_pass": True, "batch_size": 10},
        "10 tasks, 100 classes; 6,000 training, 1,000 validation and 2,000 test images",
        data="glyphs-100",
    ),
    ScenarioInfo(
        "repetition-glyphs",
        "classes come back in later tasks with probability 0.2",
        "boundaries:Repetition",
        {"data": "glyphs-100", "repeat": 0.2},
        "10 tasks, 100 classes; 6,000 training, 1,000 validation and 2,000 test images",
        data="glyphs-100",
    ),
    ScenarioInfo(
        "multilabel-glyphs",
        "one to three characters on an image; a task shows the labels of its own classes alone",
        "multi_label:multilabel_glyphs",
        {},
        "5 tasks x 4 classes; 2,000 training and 500 test images, each in every task that has one of its classes",
        modality="multi-label",
    ),
    ScenarioInfo(
        "domain-glyphs",
        "the same 50 classes in four font families and four degradations",
        "glyph_domains:domain_glyphs",
        {},
        "8 tasks x the same 50 classes; 8,000 training and 4,000 test images",
    ),
)
SCENARIOS += _GLYPH_STREAMS
_BLOCKS = "8 tasks x 20 classes; 2,560 training, 640 validation and 1,600 test images"
SCENARIOS += (
    ScenarioInfo(
        "xtail-glyphs",
        "Unicode blocks as domains with names as class texts, classified among the names of all blocks",
        "glyph_blocks:xtail_glyphs",
        {},
        _BLOCKS,
        modality="image-text",
    ),
    ScenarioInfo(
        "mtil-glyphs",
        "xtail-glyphs, classified among the names of the image's own block",
        "glyph_blocks:mtil_glyphs",
        {},
        _BLOCKS,
        modality="image-text",
    ),
    ScenarioInfo(
        "instructions",
        "six text tasks made from rules, in several wordings, scored by exact match",
        "instructions:InstructionStream",
        {},
        "6 tasks x 500 training and 100 test prompts",
        modality="text",
    ),
    ScenarioInfo(
        "coin",
        "CoIN, eight kinds of questions about images, texts alone (images are not read), scored by exact match",
        "text_benchmarks:coin",
        {},
        "8 tasks, as many prompts as the files hold",
        "root= with one folder per task, each with train.json and test.json",
        modality="text",
    ),
    ScenarioInfo(
        "trace",
        "TRACE, eight text tasks, scored by exact match",
        "text_benchmarks:trace",
        {},
        "8 tasks, as many prompts as the files hold",
        "root= with one folder per task, each with train.json and test.json",
        modality="text",
    ),
)

_MNIST = "root= with MNIST/raw, or root= and download=True (12 MB)"
_DIGITS = "the same 10 classes; 60,000 training and 10,000 test images each"
DATA += (DataInfo("mnist", "MNIST, 70,000 handwritten digits of 28 x 28 pixels", "mnist:load_mnist", {}, _MNIST),)
SCENARIOS += (
    ScenarioInfo(
        "split-mnist",
        "MNIST, two digits at a time",
        "class_incremental:ClassIncremental",
        {"data": "mnist"},
        "5 tasks x 2 classes; 60,000 training and 10,000 test images",
        _MNIST,
        "mnist",
    ),
    ScenarioInfo(
        "permuted-mnist",
        "MNIST with the pixels in another order in each task, drawn by the data seed; the first as they are",
        "mnist:permuted_mnist",
        {},
        f"10 tasks x {_DIGITS}",
        _MNIST,
    ),
    ScenarioInfo(
        "rotated-mnist",
        "MNIST turned by another angle in each task, 0 to 162 degrees",
        "mnist:rotated_mnist",
        {},
        f"10 tasks x {_DIGITS}",
        _MNIST,
    ),
)

_TINY = "root= with tiny-imagenet-200, or root= and download=True (248 MB)"
_CORE50 = "root= with core50_128x128"
_MINI = "root= with miniimagenet (images, split/train.csv, split/test.csv)"
_SHOTS = "the shots drawn by a seed, or the published ones with lists="
DATA += (
    DataInfo("tiny-imagenet", "Tiny-ImageNet, 110,000 small photos", "tiny_imagenet:load_tiny_imagenet", {}, _TINY),
    DataInfo("core50", "CORe50, 164,866 frames of 50 objects in 11 sessions", "core50:load_core50", {}, _CORE50),
    DataInfo(
        "mini-imagenet",
        "mini-ImageNet, 60,000 small photos of 100 classes",
        "few_shot_benchmarks:load_mini_imagenet",
        {},
        _MINI,
    ),
)
SCENARIOS += (
    ScenarioInfo(
        "split-tiny-imagenet",
        "Tiny-ImageNet, twenty classes at a time",
        "class_incremental:ClassIncremental",
        {"data": "tiny-imagenet"},
        "10 tasks x 20 classes; 100,000 training and 10,000 test images",
        _TINY,
        "tiny-imagenet",
    ),
    ScenarioInfo(
        "core50-nc",
        "CORe50 NC, new objects in each task",
        "core50:core50_nc",
        {},
        "9 tasks, 10 + 8 x 5 classes, eight sessions to train and three to test",
        _CORE50,
    ),
    ScenarioInfo(
        "core50-ni",
        "CORe50 NI, the same 50 objects in another session in each task, tested on three sessions that are in none",
        "core50:core50_ni",
        {},
        "8 tasks x the same 50 classes, a session each, and three sessions to test",
        _CORE50,
    ),
    ScenarioInfo(
        "domainnet",
        "DomainNet, the same classes in six styles from photos to drawings",
        "domain_net:domainnet",
        {},
        "6 tasks x the same 345 classes",
        "root= with the six domains and the lists <domain>_train.txt and <domain>_test.txt",
    ),
    ScenarioInfo(
        "fewshot-cifar100",
        f"CIFAR-100, 60 base classes, then 5 classes with 5 images each at a time, {_SHOTS}",
        "few_shot_benchmarks:fewshot_cifar100",
        {},
        "60 + 8 x 5 classes; 30,000 + 8 x 25 training and 10,000 test images",
        _NEEDS["cifar100"],
    ),
    ScenarioInfo(
        "fewshot-mini-imagenet",
        f"mini-ImageNet, 60 base classes, then 5 classes with 5 images each at a time, {_SHOTS}",
        "few_shot_benchmarks:fewshot_mini_imagenet",
        {},
        "60 + 8 x 5 classes; 30,000 + 8 x 25 training and 10,000 test images",
        _MINI,
    ),
    ScenarioInfo(
        "fewshot-cub200",
        f"CUB-200-2011, 100 base classes, then 10 classes with 5 images each at a time, {_SHOTS}",
        "few_shot_benchmarks:fewshot_cub200",
        {},
        "100 + 10 x 10 classes; all images of the base classes + 10 x 50 training and 5,788 test images",
        _NEEDS["cub200"],
    ),
)

_TRANSFER = {
    "aircraft": ("FGVC-Aircraft, 10,000 photos of 100 variants", "fgvc-aircraft-2013b"),
    "caltech101": ("Caltech101, 8,677 images of 101 kinds of objects", "caltech101"),
    "dtd": ("DTD, 5,640 photos of 47 textures", "dtd"),
    "eurosat": ("EuroSAT, 27,000 satellite images of 10 kinds of land", "eurosat"),
    "flowers102": ("Flowers102, 8,189 photos of 102 flowers", "flowers-102"),
    "food101": ("Food-101, 101,000 photos of 101 dishes", "food-101"),
    "oxford-pets": ("Oxford-IIIT Pet, 7,349 photos of 37 breeds", "oxford-iiit-pet"),
    "stanford-cars": ("Stanford Cars, 16,185 photos of 196 models", "stanford_cars"),
    "sun397": ("SUN397, 108,754 photos of 397 scenes", "SUN397"),
}
DATA += tuple(
    DataInfo(
        _name,
        _line,
        "transfer_sets:load_transfer_set",
        {"name": _name},
        f"root= with {_folder}" + ("" if _name == "stanford-cars" else ", or root= and download=True"),
    )
    for _name, (_line, _folder) in _TRANSFER.items()
)
_ALL_SETS = "root= with the folders of the sets as torchvision has them; download=True gets all but Stanford Cars"
SCENARIOS += (
    ScenarioInfo(
        "x-tail",
        "X-TAIL, ten image sets with 16 images a class, classified among the classes of all sets",
        "transfer_streams:x_tail",
        {},
        "10 tasks, 1,100 classes; 17,600 training images",
        _ALL_SETS,
        modality="image-text",
    ),
    ScenarioInfo(
        "mtil",
        "MTIL, eleven image sets, classified among the classes of the image's own set",
        "transfer_streams:mtil",
        {},
        "11 tasks, 1,201 classes; all training images, or shots= of each class",
        _ALL_SETS,
        modality="image-text",
    ),
)

SCENARIOS += (
    ScenarioInfo(
        "multilabel-coco",
        "COCO, several labels an image; B40-C10, with protocol= B0-C10 as well, and year= 2014 or 2017",
        "multi_label_benchmarks:multilabel_coco",
        {},
        "5 tasks, 40 + 4 x 10 classes; trained on the training and tested on the validation images",
        "root= with annotations/instances_{train,val}2014.json, train2014 and val2014",
        modality="multi-label",
    ),
    ScenarioInfo(
        "multilabel-voc",
        "Pascal VOC, several labels an image; B10-C2, with protocol= B4-C2 as well, and year= 2007 or 2012",
        "multi_label_benchmarks:multilabel_voc",
        {},
        "6 tasks, 10 + 5 x 2 classes; 5,011 training and 4,952 test images",
        "root= with VOCdevkit/VOC2007, or root= and download=True",
        modality="multi-label",
    ),
)

for _data in DATA:
    register_data(_data)
for _scenario in SCENARIOS:
    register_scenario(_scenario)
