"""scikit-learn's handwritten digits: real, small, and part of the installed package."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits

from .base import BCE, Dataset

TRAIN_COUNT = 1500


def load() -> Dataset:
    """1,500 training and 297 test images of 8x8 pixels, split in the order of the file."""
    images, labels = load_digits(return_X_y=True)  # [1797, 64] in 0..16, [1797]
    rows = (images / 16).astype(np.float32)
    labels = labels.astype(np.int32)
    return Dataset(
        name="digits",
        train=rows[:TRAIN_COUNT],
        test=rows[TRAIN_COUNT:],
        train_labels=labels[:TRAIN_COUNT],
        test_labels=labels[TRAIN_COUNT:],
        loss=BCE,
        image_shape=(8, 8),
        description=(
            "scikit-learn's copy of the UCI handwritten digits, 8x8 gray levels divided by 16; "
            "the first 1,500 images for training, the other 297 for testing."
        ),
    )
