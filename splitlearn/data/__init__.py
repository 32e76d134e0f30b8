"""Data sets behind one interface, their disjoint parts, and their partitions among clients.

For example:

    splits = split(load("digits"), private=800, auxiliary=600, test=397)
    clients = [splits.private.subset(rows) for rows in dirichlet(splits.private.y, 5, alpha=0.5, seed=0)]
"""

from splitlearn.data.archives import load_npz
from splitlearn.data.catalogue import DATASETS, File, Source, load
from splitlearn.data.cifar import load_cifar10
from splitlearn.data.dataset import Dataset, Splits, split
from splitlearn.data.download import download
from splitlearn.data.idx import load_idx
from splitlearn.data.partition import by_group, dirichlet, iid, shards, vertical
from splitlearn.data.skew import device_noise, quantities
from splitlearn.data.standardise import standardise
from splitlearn.data.table import Schema, load_csv
from splitlearn.data.text import Tokenizer, load_lines

__all__ = [
    "DATASETS",
    "Dataset",
    "File",
    "Schema",
    "Source",
    "Splits",
    "Tokenizer",
    "by_group",
    "device_noise",
    "dirichlet",
    "download",
    "iid",
    "load",
    "load_cifar10",
    "load_csv",
    "load_idx",
    "load_lines",
    "load_npz",
    "quantities",
    "shards",
    "split",
    "standardise",
    "vertical",
]
