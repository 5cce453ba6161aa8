"""Images, the data sets made of them, and the layouts that they are read from."""

from ecul.data.dataset import Dataset, open_dataset
from ecul.data.decode import load_pixels
from ecul.data.images import Images

__all__ = ["Dataset", "Images", "load_pixels", "open_dataset"]
