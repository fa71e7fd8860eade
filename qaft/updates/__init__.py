"""Updates, by the name a recipe uses: adding a method is one file and one line here."""

from qaft.updates.bank import Bank
from qaft.updates.base import Update
from qaft.updates.dense import DenseDelta
from qaft.updates.gsoft import GSOFT
from qaft.updates.ia3 import IA3
from qaft.updates.linchain import LinChain
from qaft.updates.lowrank import LowRank
from qaft.updates.roco import RoCo
from qaft.updates.sift import Sift
from qaft.updates.ssb import SSB
from qaft.updates.ssl import SSL

UPDATES: dict[str, type[Update]] = {
    "bank": Bank,
    "dense": DenseDelta,
    "gsoft": GSOFT,
    "ia3": IA3,
    "linchain": LinChain,
    "lowrank": LowRank,
    "roco": RoCo,
    "sift": Sift,
    "ssb": SSB,
    "ssl": SSL,
}
