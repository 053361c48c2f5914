"""Makes the codebooks of the vector grid: k-means of pairs of standard normal numbers, without any random number.

    python tests/grids/make_pairs.py

The numbers are a fine lattice weighted with their density. Lloyd's rounds start from a sunflower: points along a spiral
at the golden angle, as dense as is best for many points, ``density^(1/2)`` in two dimensions (Zador), which is a normal
of variance 2. What is written is rounded to float16: codes of stored models must not depend on how a machine adds up.
"""

from pathlib import Path

import numpy as np
from scipy.spatial import cKDTree

PAIRS = Path(__file__).resolve().parents[2] / "src" / "mezzotint" / "grids" / "pairs.npy"
INDEX_BITS = range(3, 13)


def lattice(step, reach=6.0):
    """Points and the probability of each; what is less likely than 1e-9 of the most likely is left out."""
    axis = np.arange(-reach + step / 2, reach, step)
    points = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    density = np.exp(-(points**2).sum(1) / 2)
    likely = density > 1e-9
    return points[likely], density[likely] / density[likely].sum()


def sunflower(entries):
    place = np.arange(entries) + 0.5
    radius, angle = 2 * np.sqrt(-np.log(1 - place / entries)), place * np.pi * (3 - np.sqrt(5))
    return np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=1)


def lloyd_round(entries, points, probability):
    """The means of the cells of all entries, and the mean squared error per number before that."""
    distance, nearest = cKDTree(entries).query(points)
    mass = np.bincount(nearest, probability, len(entries))
    means = [np.bincount(nearest, probability * points[:, axis], len(entries)) / mass for axis in (0, 1)]
    return np.stack(means, axis=1), float((distance**2 * probability).sum()) / 2


def codebook(index_bits):
    """Rounds until one gains less than two millionths."""
    entries, before = sunflower(2**index_bits), np.inf
    points, probability = lattice(0.02 if index_bits < 10 else 0.0125)
    while True:
        means, error = lloyd_round(entries, points, probability)
        if error > before * (1 - 2e-6):
            return entries
        entries, before = means, error


if __name__ == "__main__":
    np.save(PAIRS, np.concatenate([codebook(bits) for bits in INDEX_BITS]).astype(np.float16))
