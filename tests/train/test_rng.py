from __future__ import annotations

import json
import random

import numpy as np
import torch

from qaft.train.encoding import decode, encode
from qaft.train.rng import capture_rng, restore_rng


def draws() -> tuple[object, ...]:
    return (
        random.random(),
        random.gauss(0, 1),
        np.random.standard_normal(3).tolist(),
        torch.rand(3).tolist(),
        torch.randn(3).tolist(),
    )


def test_generators_continue_after_a_round_trip_through_json() -> None:
    device = torch.device("cpu")
    draws()  # leaves half of a Gaussian pair in Python's and NumPy's generators
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(encode(capture_rng(device), "rng", tensors))
    expected = draws()
    draws()
    restore_rng(decode(json.loads(text), tensors), device)
    assert draws() == expected
