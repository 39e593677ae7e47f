"""Laws of conditions: where tokens are read, and that a dropped source says nothing."""

import dataclasses
from typing import Any

import pytest
import torch
from fields import block_of, condition, denoiser
from torch import Tensor

from model.attention import Condition, Source, TokenEncoder, TokenLookup, look_up

KEEPS: dict[Source, str] = {"tokens": "keep", "label": "keep_label", "vector": "keep_vector"}


def three_sources(batch: int = 3) -> Condition:
    generator = torch.Generator().manual_seed(4)
    kept = torch.ones(batch, dtype=torch.bool)
    return dataclasses.replace(
        condition(batch),
        labels=torch.arange(batch) % 4,
        keep_label=kept,
        vector=torch.randn(batch, 5, dtype=torch.float64, generator=generator),
        keep_vector=kept,
    )


def encoder(num_classes: int = 4, vector_dim: int = 5) -> TokenEncoder:
    torch.manual_seed(7)
    net = TokenEncoder(6, 8, num_classes, vector_dim).double().requires_grad_(False)
    for parameter in net.parameters():
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter)
    return net


def other(given: Condition, source: Source) -> dict[str, Any]:
    """Another content of one source."""
    if source == "tokens":
        return {"values": given.values + 1}
    assert given.labels is not None and given.vector is not None
    return {"labels": 3 - given.labels} if source == "label" else {"vector": given.vector + 1}


def test_look_up_is_exact_on_linear_lattices_and_not_transposed() -> None:
    """Tokens that grow along y and x are read as y and x, in pixels, from any first place."""
    gy, gx, pitch, first = 4, 7, 32.0, torch.tensor([[20.0, 5.0]], dtype=torch.float64)
    y = first[0, 0] + pitch * torch.arange(gy, dtype=torch.float64)
    x = first[0, 1] + pitch * torch.arange(gx, dtype=torch.float64)
    lattice = torch.stack(torch.meshgrid(y, x, indexing="ij"))[None]
    rows = torch.tensor([[20.0, 33.3, 77.0, 116.0]], dtype=torch.float64)
    columns = torch.tensor([[5.0, 6.5, 100.0, 197.0, 151.25]], dtype=torch.float64)
    pitches = torch.tensor([pitch], dtype=torch.float64)
    found = look_up(lattice, first, pitches, rows, columns)[0]
    torch.testing.assert_close(found[..., 0], rows[0][:, None].expand(4, 5))
    torch.testing.assert_close(found[..., 1], columns[0][None].expand(4, 5))


def test_look_up_is_constant_beyond_the_rim_and_with_one_token() -> None:
    lattice = torch.arange(6.0, dtype=torch.float64).reshape(1, 1, 2, 3)
    first, pitch = torch.zeros(1, 2).double(), torch.tensor([10.0]).double()
    far = torch.tensor([[-50.0, 90.0]], dtype=torch.float64)
    assert look_up(lattice, first, pitch, far, far)[0, ..., 0].tolist() == [[0, 2], [3, 5]]
    one = look_up(lattice[:, :, :1, :1], first, pitch, far, far)
    assert one.unique().tolist() == [0.0]


def test_a_dropped_condition_keeps_places_and_forgets_content() -> None:
    block, given = block_of(denoiser(), "T"), condition(2)
    other = dataclasses.replace(given, values=given.values + 3.0)
    dropped, dropped_other = block.encode(given.dropped()), block.encode(other.dropped())
    kept, kept_other = block.encode(given), block.encode(other)
    assert dropped and dropped_other and kept and kept_other
    assert torch.equal(dropped.attended, dropped_other.attended)
    assert torch.equal(dropped.lattice, dropped_other.lattice)
    assert not torch.allclose(kept.attended, kept_other.attended)
    assert not torch.allclose(dropped.attended[0, 0], dropped.attended[0, 1])


def test_tokens_encoded_where_they_are_looked_up_are_encoded_tokens_looked_up() -> None:
    """Interpolation and encoding are linear, so that a lookup need not encode all tokens."""
    torch.manual_seed(0)
    lookup, encoder = TokenLookup(6, 5, 3).double(), TokenEncoder(6, 5, 3).double()
    encoder.load_state_dict({**encoder.state_dict(), **lookup.state_dict()})
    given = dataclasses.replace(
        condition(2),
        keep=torch.tensor([True, False]),
        labels=torch.tensor([2, 1]),
        keep_label=torch.tensor([True, True]),
    )
    y_px, x_px = (torch.rand(2, n, dtype=torch.float64) * 120 - 20 for n in (4, 7))
    _, lattice = encoder(given)
    first, pitch = given.centres_px[:, 0], given.footprints_px[:, 0]
    expected = look_up(lattice, first, pitch, y_px, x_px).permute(0, 3, 1, 2)
    torch.testing.assert_close(lookup(given, y_px, x_px), expected)


def test_the_order_of_attended_tokens_does_not_matter() -> None:
    """Beyond the finest lattice, whose order is its geometry, tokens are a set."""
    block, given = block_of(denoiser(), "T"), condition(1)
    extra = torch.randn(1, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    places = torch.rand(1, 4, 2, dtype=torch.float64) * 64

    def estimate(order: list[int]) -> torch.Tensor:
        wide = dataclasses.replace(
            given,
            values=torch.cat([given.values, extra[:, order]], 1),
            centres_px=torch.cat([given.centres_px, places[:, order]], 1),
            footprints_px=torch.cat([given.footprints_px, torch.full((1, 4), 64.0).double()], 1),
        )
        y = torch.linspace(-1, 1, 2 * 8 * 12, dtype=torch.float64).reshape(1, 2, 8, 12)
        ones, log_snr = torch.ones(1, 1, 8, 12).double(), torch.zeros(1).double()
        return block.body(y, ones, block.encode(wide), log_snr)

    torch.testing.assert_close(estimate([0, 1, 2, 3]), estimate([2, 0, 3, 1]))
    assert not torch.allclose(estimate([0, 1, 2, 3]), estimate([0, 0, 0, 0]))


@pytest.mark.parametrize("source", KEEPS)
def test_a_dropped_source_says_nothing_and_changes_no_other(source: Source) -> None:
    """Its content no longer matters, that of the others does; images that keep it see no change,
    and neither do the tokens of the other sources.
    """
    net, given = encoder(), three_sources()
    changed = dataclasses.replace(given, **other(given, source))
    assert not torch.allclose(net(given)[1], net(changed)[1])
    dropped = net(given.without(source))
    for found, expected in zip(net(changed.without(source)), dropped, strict=True):
        assert torch.equal(found, expected)
    for rest in KEEPS:
        if rest != source:
            again = net(dataclasses.replace(given, **other(given, rest)).without(source))
            assert not torch.allclose(again[1], dropped[1])
    whole, places = net(given)[0], given.values.shape[1]
    own = {"tokens": slice(0, places), "label": places, "vector": places + 1}
    for rest, where in own.items():
        same = torch.equal(dropped[0][:, where], whole[:, where])
        assert same == (rest != source)
    once = torch.tensor([True, False, True])
    part = net(dataclasses.replace(given, **{KEEPS[source]: once}))
    for found, kept, none in zip(part, net(given), dropped, strict=True):
        torch.testing.assert_close(found[once], kept[once])
        torch.testing.assert_close(found[~once], none[~once])


def test_a_wholly_dropped_condition_is_one_that_has_nothing() -> None:
    """Labels and vectors that are not given are the same as dropped ones."""
    net, given = encoder(), three_sources()
    bare = dataclasses.replace(
        given, labels=None, keep_label=None, vector=None, keep_vector=None
    ).without("tokens")
    for found, expected in zip(net(given.dropped()), net(bare), strict=True):
        assert torch.equal(found, expected)


def test_a_label_and_a_vector_are_each_a_token_and_part_of_the_lattice() -> None:
    """A place reads them from the lattice, whatever else it reads; images know only their own."""
    net, given = encoder(), three_sources()
    plain = encoder(0, 0)
    assert set(plain.state_dict()) == {
        *("null", "content.weight", "content.bias", "place.weight", "place.bias")
    }
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if k in plain.state_dict()})
    bare = dataclasses.replace(given, labels=None, keep_label=None, vector=None, keep_vector=None)
    attended, lattice = net(given)
    attended_bare, lattice_bare = plain(bare)
    places = given.values.shape[1]
    assert torch.equal(attended[:, :places], attended_bare)
    added = attended[:, places:].sum(dim=1)[:, :, None, None].expand_as(lattice)
    torch.testing.assert_close(lattice - lattice_bare, added)

    def changed(name: str, number: int) -> Tensor:
        value = getattr(given, name).clone()
        value[number] = 3 if name == "labels" else 1.5
        difference = net(dataclasses.replace(given, **{name: value}))[1] - lattice
        return difference.flatten(1).abs().amax(dim=1) > 0

    assert changed("labels", 1).tolist() == [False, True, False]
    assert changed("vector", 2).tolist() == [False, False, True]


def test_sources_that_do_not_fit_get_a_sentence() -> None:
    given, ones = three_sources(), torch.ones(3, dtype=torch.bool)
    with pytest.raises(ValueError, match="given to a model that was trained without"):
        encoder(0, 5)(given)
    with pytest.raises(ValueError, match="global vectors were given to a model"):
        encoder(4, 0)(given)
    with pytest.raises(ValueError, match="a model of 2 classes, whose numbers are 0 to 1"):
        encoder(2, 5)(given)
    with pytest.raises(ValueError, match="5 numbers was given to a model that takes 6"):
        encoder(4, 6)(given)
    with pytest.raises(ValueError, match="given together or not at all"):
        dataclasses.replace(given, keep_vector=None)
    with pytest.raises(ValueError, match="3 images has 2 labels"):
        dataclasses.replace(given, labels=torch.zeros(2).long(), keep_label=ones)
