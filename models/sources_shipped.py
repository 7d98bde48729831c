"""The sources that need no file of the user's: `digits`, `iris`, `wine`, `breast-cancer` (files of scikit-learn, which
is found but never imported: an import costs a second and 80 MB) and `xor` (generated)."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gossipml.errors import UserError
from gossipml.models.dataset import Dataset, Labelled
from gossipml.models.sources_table import SEED, divide

REMEDY = "install it again: pip install --force-reinstall scikit-learn"
IRIS = ("sepal_length", "sepal_width", "petal_length", "petal_width")  # cm
WINE = (
    *("alcohol", "malic_acid", "ash", "alcalinity_of_ash", "magnesium", "total_phenols", "flavanoids"),
    *("nonflavanoid_phenols", "proanthocyanins", "color_intensity", "hue", "od280_od315_of_diluted_wines", "proline"),
)
_CELL = (
    *("radius", "texture", "perimeter", "area", "smoothness", "compactness", "concavity", "concave_points", "symmetry"),
    "fractal_dimension",
)
BREAST_CANCER = (  # of the cell nuclei in one picture
    *(f"mean_{name}" for name in _CELL),
    *(f"{name}_error" for name in _CELL),
    *(f"worst_{name}" for name in _CELL),
)


def load_digits() -> Dataset:
    """1,797 pictures of 8x8 in 17 shades (UCI ML hand-written digits); every fifth of a class is for testing."""
    table = _table("digits", "digits.csv.gz", (1797, 65))
    samples, targets = table[:, :64].astype(np.uint8), table[:, 64].astype(np.int64)
    test = np.zeros(len(targets), dtype=bool)
    for label in range(10):
        test[np.flatnonzero(targets == label)[::5]] = True  # stratified: 20 % of each class
    whole = Labelled(samples, targets)
    return Dataset("digits", whole.at(~test), whole.at(test), tuple(map(str, range(10))))


def load_iris() -> Dataset:
    """150 flowers of three kinds, four measures each (Fisher 1936)."""
    return _flowers_and_the_like("iris", "iris.csv", 150, IRIS, ("setosa", "versicolor", "virginica"))


def load_wine() -> Dataset:
    """178 wines of three growers, 13 chemical measures each (UCI ML Wine)."""
    return _flowers_and_the_like("wine", "wine_data.csv", 178, WINE, ("class_0", "class_1", "class_2"))


def load_breast_cancer() -> Dataset:
    """569 tumours, 30 measures each (Breast Cancer Wisconsin, diagnostic)."""
    labels = ("malignant", "benign")
    return _flowers_and_the_like("breast-cancer", "breast_cancer.csv", 569, BREAST_CANCER, labels)


def generate_xor() -> Dataset:
    """400 points near the corners of the unit square, each corner 100 times; the four corners for testing."""
    corners = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], dtype=np.float32)
    targets = np.array([0, 1, 1, 0], dtype=np.int64)
    noise = np.random.RandomState(SEED).normal(scale=0.1, size=(400, 2)).astype(np.float32)
    train = Labelled(np.tile(corners, (100, 1)) + noise, np.tile(targets, 100))
    return Dataset("xor", train, Labelled(corners, targets), ("0", "1"), ("a", "b"))


def _flowers_and_the_like(
    name: str, file: str, count: int, features: tuple[str, ...], labels: tuple[str, ...]
) -> Dataset:
    table = _table(name, file, (count, len(features) + 1), header=True)
    return divide(name, table[:, :-1].copy(), table[:, -1].astype(np.int64), labels, features, name)


def _table(source: str, name: str, shape: tuple[int, int], *, header: bool = False) -> NDArray[np.float32]:
    found = importlib.util.find_spec("sklearn")
    folder = Path(found.origin).parent if found is not None and found.origin else None
    file = folder / "datasets" / "data" / name if folder else None
    if file is None or not file.is_file():
        raise UserError(f"the data source {source!r} is a file of scikit-learn, which is not installed whole; {REMEDY}")
    try:
        with gzip.open(file, "rt", encoding="ascii") if name.endswith(".gz") else file.open(encoding="ascii") as lines:
            table = np.loadtxt(lines, delimiter=",", dtype=np.float32, skiprows=1 if header else 0)
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}; {REMEDY}") from None
    if table.shape != shape:
        raise UserError(f"{file} has {table.shape} values instead of {shape[0]} lines of {shape[1]}; {REMEDY}")
    return table
