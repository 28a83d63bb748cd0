"""Values as bytes that messages carry."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from forgepar.backends.futures.message_arena import MessageArena
from forgepar.values.codec import decode, encode, is_segment


@pytest.fixture
def here():
    return MessageArena(1)


@pytest.fixture
def there():
    return MessageArena(2)


def test_a_value_travels_in_a_message(here, there):
    array = np.arange(100_000)
    wire = encode({"a": array, "b": "x" * 50_000}, here)
    assert is_segment(wire)
    there.take_in(pickle.loads(pickle.dumps(here.pack([wire[0]]))))
    found = decode(wire, there)
    np.testing.assert_array_equal(found["a"], array)
    with pytest.raises(ValueError, match="read-only"):
        found["a"][0] = 1


def test_what_is_written_is_a_copy(here):
    array = np.zeros(100_000)
    wire = encode(array, here)
    array[:] = 1
    assert decode(wire, here).sum() == 0


def test_names_of_two_makers_differ(here, there):
    assert encode(bytes(50_000), here)[0] != encode(bytes(50_000), there)[0]


def test_what_is_freed_is_gone_and_what_was_read_stays(here):
    wire = encode(np.ones(50_000), here)
    found = decode(wire, here)
    assert here.bytes_held >= 400_000
    here.free(wire)
    here.free(wire)
    assert (here.names(), here.bytes_held) == ([], 0)
    assert here.usage().peak >= 400_000
    here.reset_peak()
    assert here.usage().peak == 0
    assert found.sum() == 50_000
    with pytest.raises(KeyError):
        here.read(wire)


def test_emptying_gives_all_of_it(here, there):
    wire = encode(bytes(40_000), here)
    there.take_in(here.empty())
    assert here.names() == []
    assert len(decode(wire, there)) == 40_000
