from __future__ import annotations

import torch
from torch import nn

from qaft.train.frozen import hide_frozen, show_frozen


def test_frozen_parameters_are_hidden_and_come_back_as_the_same_objects() -> None:
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 2), nn.Linear(3, 4, bias=False))
    model.requires_grad_(False)
    model[1].weight.requires_grad_(True)
    model[2].weight = model[0].weight  # tied
    before, state = dict(model.named_parameters(remove_duplicate=False)), set(model.state_dict())
    hidden = hide_frozen(model)
    assert [name for name, _ in model.named_parameters()] == ["1.weight"]
    assert set(model.state_dict()) == state
    assert model[2].weight.data_ptr() == model[0].weight.data_ptr()
    torch.testing.assert_close(model[0](torch.tensor([1])), before["0.weight"][1:2].detach())
    show_frozen(hidden)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert not dict(model.named_buffers())
