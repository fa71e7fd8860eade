"""The generator against its authors' vectors, and the laws that replay depends on."""

from __future__ import annotations

import pytest
import torch

from qaft.philox import hash64, key_of, pack_bits, philox, signs, unpack_bits, unpack_signs

CPU = torch.device("cpu")
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_words_are_those_that_the_authors_publish(counter, key, expected) -> None:
    assert philox(torch.tensor([counter]), key).tolist() == [list(expected)]


def test_signs_of_a_layer_do_not_depend_on_what_is_drawn_beside_it() -> None:
    shapes = {"a": torch.Size((7, 3)), "b": torch.Size((50, 9)), "c": torch.Size((1,))}
    together = signs(shapes, key=key_of(3, "probe"), step=5, device=CPU)
    for name, shape in shapes.items():
        alone = signs({name: shape}, key=key_of(3, "probe"), step=5, device=CPU)[name]
        assert torch.equal(alone, together[name])
        assert alone.abs().eq(1).all()


@pytest.mark.parametrize("other", [{"step": 6}, {"key": key_of(4, "probe")}, {"key": key_of(3, "update")}])
def test_another_step_seed_or_purpose_gives_independent_signs(other) -> None:
    size = {"layer": torch.Size((100, 100))}
    first = signs(size, **{"key": key_of(3, "probe"), "step": 5}, device=CPU)["layer"]
    second = signs(size, **{"key": key_of(3, "probe"), "step": 5, **other}, device=CPU)["layer"]
    # Means of 10^4 independent signs: standard deviation 0.01.
    assert abs(float((first * second).mean())) < 0.04
    assert abs(float(first.mean())) < 0.04


def test_drawn_signs_are_those_that_journals_were_written_with() -> None:
    drawn = signs({"model.layers.0.self_attn.q_proj": torch.Size((64,))}, key=key_of(0, "probe"), step=0, device=CPU)
    assert hash64(*drawn["model.layers.0.self_attn.q_proj"].int().tolist()) == 3037597306765943166


@pytest.mark.parametrize("width", [1, 8, 13])
def test_packed_bits_unpack_to_themselves(width: int, generator: torch.Generator) -> None:
    bits = torch.randint(0, 2, (5, width), generator=generator, dtype=torch.uint8)
    packed = pack_bits(bits)
    assert packed.shape == (5, -(-width // 8))
    assert torch.equal(unpack_bits(packed)[:, :width], bits)
    assert torch.equal(unpack_signs(packed, torch.float32)[:, :width], 2 * bits.float() - 1)
