"""The checksum that travels in handoffs."""

import random
from unittest.mock import patch

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from disagg_ray.transfer import checksum as module
from disagg_ray.transfer.checksum import checksum

WORDS = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=40)


def of_words(words: list[int]) -> int:
    return checksum(torch.tensor(list(b"".join(word.to_bytes(8, "little") for word in words)), dtype=torch.uint8))


def mix(number: int, place: int) -> int:
    mixed = (number + place * 0x9E3779B97F4A7C15) % 2**64
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
    return mixed ^ (mixed >> 31)


def defined(words: list[int], row: int) -> int:
    rows = [sum(words[start : start + row]) % 2**64 for start in range(0, len(words) + 1, row)]
    columns = [sum(words[start::row]) % 2**64 for start in range(row)]
    mixed = [mix(number, place) for place, number in enumerate([*rows, *columns])]
    upper, lower = sum(mixed[: len(rows)]) + len(words), sum(mixed[len(rows) :])
    return upper % 2**64 << 64 | lower % 2**64


@given(WORDS, st.sampled_from([1, 2, 3, 7, 8, 1024]), st.sampled_from([1, 2, 5]))
def test_checksum_is_as_defined_whatever_the_chunk(words, row, chunk):
    with patch.object(module, "_ROW", row), patch.object(module, "_CHUNK_ROWS", chunk):
        assert of_words(words) == defined(words, row)


def test_checksum_is_as_defined_over_several_chunks():
    words = [random.Random(7).getrandbits(64) for _ in range(1000)] * 300
    assert len(words) > 2 * module._CHUNK_ROWS * module._ROW
    data = torch.tensor([word - 2**63 for word in words])
    assert checksum(data.view(torch.uint8)) == defined([(word - 2**63) % 2**64 for word in words], module._ROW)


@given(WORDS, st.data())
def test_any_flipped_bit_changes_the_checksum(words, data):
    place, bit = data.draw(st.integers(0, len(words) - 1)), data.draw(st.integers(0, 63))
    flipped = [word ^ (1 << bit) if i == place else word for i, word in enumerate(words)]
    assert of_words(flipped) != of_words(words)


@given(WORDS, st.data())
def test_any_changed_word_changes_the_checksum(words, data):
    place, word = data.draw(st.integers(0, len(words) - 1)), data.draw(st.integers(0, 2**64 - 1))
    assume(word != words[place])
    assert of_words([*words[:place], word, *words[place + 1 :]]) != of_words(words)


@given(WORDS, st.sampled_from([2, 3, 1024]), st.data())
def test_swapped_words_change_the_checksum(words, row, data):
    i, j = data.draw(st.integers(0, len(words) - 1)), data.draw(st.integers(0, len(words) - 1))
    assume(words[i] != words[j])
    swapped = list(words)
    swapped[i], swapped[j] = words[j], words[i]
    with patch.object(module, "_ROW", row):
        assert of_words(swapped) != of_words(words)


@given(WORDS, st.integers(0, 63), st.sampled_from([2, 3, 1024]), st.data())
def test_one_bit_flipped_in_two_words_changes_the_checksum(words, bit, row, data):
    words = [*words, 0]
    places = data.draw(st.sets(st.integers(0, len(words) - 1), min_size=2, max_size=2))
    flipped = [word ^ (1 << bit) if i in places else word for i, word in enumerate(words)]
    with patch.object(module, "_ROW", row):
        assert of_words(flipped) != of_words(words)


def test_swapped_signs_of_neighbouring_floats_change_the_checksum():
    data = torch.tensor([1.0, 2.0, 1.0, -2.0])
    assert checksum(data.view(torch.uint8)) != checksum(data[[2, 3, 0, 1]].view(torch.uint8))


def test_checksum_sees_length():
    assert len({of_words([0] * count) for count in range(20)}) == 20
