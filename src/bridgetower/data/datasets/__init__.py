"""The published sets, one module each: what a set is called, what its files hold, how they are read."""

from collections.abc import Mapping

from bridgetower.data.datasets.karpathy import COCO, FLICKR30K
from bridgetower.data.datasets.links import CC3M, SBU
from bridgetower.data.datasets.nlvr2 import NLVR2
from bridgetower.data.datasets.snli_ve import SNLI_VE
from bridgetower.data.datasets.spec import DatasetSpec
from bridgetower.data.datasets.vg import VG, VGQA, VGQA_COCO
from bridgetower.data.datasets.vqav2 import VQAV2

DATASETS: Mapping[str, DatasetSpec] = {
    each.name: each for each in (COCO, FLICKR30K, VG, CC3M, SBU, VQAV2, VGQA, VGQA_COCO, SNLI_VE, NLVR2)
}
"""Every published set, by name."""
