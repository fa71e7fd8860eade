"""Updates, by the name a recipe uses: adding a method is one file and one line here."""

from qaft.updates.base import Update
from qaft.updates.dense import DenseDelta
from qaft.updates.lowrank import LowRank
from qaft.updates.roco import RoCo

UPDATES: dict[str, type[Update]] = {
    "dense": DenseDelta,
    "lowrank": LowRank,
    "roco": RoCo,
}
