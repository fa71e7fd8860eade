"""Gradient sources, by the name a recipe uses."""

from qaft.gradients.backprop import Backprop
from qaft.gradients.extragradient import Extragradient
from qaft.gradients.lozo import Lozo
from qaft.gradients.lozo_m import LozoM
from qaft.gradients.mezo import Mezo
from qaft.gradients.spsa import Spsa

SOURCES: dict[str, type] = {
    "backprop": Backprop,
    "extragradient": Extragradient,
    "lozo": Lozo,
    "lozo_m": LozoM,
    "mezo": Mezo,
    "spsa": Spsa,
}
