"""Regularizers, by the name a recipe uses."""

from qaft.regularizers.base import Regularizer
from qaft.regularizers.kl import KLToBase
from qaft.regularizers.mpc import MPC
from qaft.regularizers.pace import Pace
from qaft.regularizers.proximal import Proximal

REGULARIZERS: dict[str, type[Regularizer]] = {
    "kl": KLToBase,
    "mpc": MPC,
    "pace": Pace,
    "proximal": Proximal,
}
