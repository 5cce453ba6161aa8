"""The clustering with scikit-learn's interface: the same labels as `emcc`, from any kind of table."""

import numpy as np
import pytest
import torch
from sklearn.base import clone, is_clusterer
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer

from ecul import EMCC, emcc

SIZES = {"k1": 6, "k2": 3, "k3": 8, "eps": 0.5, "min_samples": 3}


@pytest.fixture(scope="module")
def points():
    rng = np.random.default_rng(0)
    return np.repeat(rng.normal(size=(5, 16)), 9, axis=0) + 0.2 * rng.normal(size=(45, 16))


def test_every_kind_of_table_gives_the_same_numpy_labels(points):
    class Frame:
        """As pandas and polars are read: by `__array__`."""

        def __array__(self, dtype=None, copy=None):
            return np.asarray(points, dtype)

    cameras = np.arange(45) % 3
    expected = emcc(points, cameras, **SIZES)
    assert len(set(expected)) == 5
    for table in (points, points.tolist(), torch.as_tensor(points), Frame()):
        for codes in (cameras, cameras.tolist(), torch.as_tensor(cameras), cameras.astype(np.int32)):
            labels = EMCC(**SIZES).fit_predict(table, cameras=codes)
            assert isinstance(labels, np.ndarray) and labels.dtype == np.int64
            assert len(set(labels)) == 5  # as published trainers count clusters
            np.testing.assert_array_equal(labels, expected)
    whole = np.eye(6, dtype=np.int64).repeat(4, 0)  # whole numbers are points too
    assert (EMCC(k1=4, k2=2, k3=4, min_samples=3).fit_predict(whole) == np.arange(24) // 4).all()


def labelled(model, x, y=None):
    return (model.fit_predict(x) >= 0).sum()


def test_settings_are_scikit_learns(points):
    model = EMCC(**SIZES)
    assert model.get_params() == SIZES and repr(model) == "EMCC(k1=6, k2=3, k3=8, eps=0.5, min_samples=3)"
    again = clone(model).set_params(k3=None)
    assert again.get_params() == {**SIZES, "k3": None} and not hasattr(again, "labels_")
    np.testing.assert_array_equal(again.fit(points).labels_, emcc(points, **{**SIZES, "k3": None}))
    assert again.n_features_in_ == 16
    whole = make_pipeline(Normalizer(), EMCC(**SIZES))
    np.testing.assert_array_equal(whole.fit_predict(points), emcc(points, **SIZES))
    assert "EMCC" in whole._repr_html_() and is_clusterer(whole)
    search = GridSearchCV(whole, {"emcc__min_samples": [40, 3]}, scoring=labelled)
    assert search.fit(points).best_params_ == {"emcc__min_samples": 3}
    with pytest.raises(ValueError, match="EMCC has no setting 'k4'; its settings are k1"):
        model.set_params(k4=1)
    with pytest.raises(ValueError, match="eps must be a number in"):
        EMCC(eps=2).fit(points)
    with pytest.raises(ValueError, match="matrix of distances; EMCC takes the features"):
        EMCC().fit(np.ones((9, 9)) - np.eye(9))
