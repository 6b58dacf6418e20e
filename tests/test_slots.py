"""Where slots lie in a pool."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_ray.transfer.slots import ALIGNMENT, HEADER_BYTES, SlotAllocator, Span, align, slot_bytes

CAPACITY = 64 * ALIGNMENT
SIZES = st.integers(0, CAPACITY // 3)


def assert_apart(spans: list[Span]) -> None:
    spans = sorted(spans, key=lambda span: span.offset)
    assert all(span.offset >= 0 and span.offset + span.nbytes <= CAPACITY for span in spans)
    assert all(a.offset + a.nbytes <= b.offset for a, b in pairwise(spans))


@given(st.lists(SIZES | st.tuples(st.just("at end"), SIZES) | st.tuples(st.just("free"), st.integers(0)), max_size=80))
def test_slots_never_overlap_or_leak_in_any_order_of_allocate_and_free(steps):
    allocator, held = SlotAllocator(CAPACITY), []
    for step in steps:
        if isinstance(step, int) or step[0] == "at end":
            span = allocator.allocate(step) if isinstance(step, int) else allocator.allocate(step[1], at_end=True)
            held += [span] if span else []
        elif held:
            allocator.free(held.pop(step[1] % len(held)))
        assert_apart(held)
        assert allocator.bytes_in_use == sum(span.nbytes for span in held)
    for span in held:
        allocator.free(span)
    assert (allocator.bytes_in_use, allocator.num_gaps) == (0, 1)
    assert allocator.allocate(CAPACITY) == Span(0, CAPACITY)


@given(st.permutations(range(16)))
def test_slots_freed_in_any_order_become_one_gap(order):
    allocator = SlotAllocator(16 * ALIGNMENT)
    spans = [allocator.allocate(ALIGNMENT) for _ in range(16)]
    assert (allocator.num_gaps, allocator.allocate(1)) == (0, None)
    for index in order:
        allocator.free(spans[index])
    assert allocator.allocate(16 * ALIGNMENT) == Span(0, 16 * ALIGNMENT)


def test_a_slot_may_lie_at_the_end_of_the_last_gap():
    allocator = SlotAllocator(16 * ALIGNMENT)
    first, last = allocator.allocate(ALIGNMENT), allocator.allocate(2 * ALIGNMENT, at_end=True)
    assert (first, last) == (Span(0, ALIGNMENT), Span(14 * ALIGNMENT, 2 * ALIGNMENT))
    assert allocator.allocate(13 * ALIGNMENT, at_end=True) == Span(ALIGNMENT, 13 * ALIGNMENT)
    assert (allocator.num_gaps, allocator.allocate(1, at_end=True)) == (0, None)


@given(st.sets(st.integers(0, 31), min_size=1, max_size=31))
def test_neighbouring_gaps_are_always_joined(freed):
    allocator = SlotAllocator(32 * ALIGNMENT)
    spans = [allocator.allocate(ALIGNMENT) for _ in range(32)]
    for index in freed:
        allocator.free(spans[index])
    assert allocator.num_gaps == sum(index + 1 not in freed for index in freed)


@given(st.lists(SIZES, min_size=1, max_size=20))
def test_slots_are_aligned_and_large_enough(sizes):
    allocator = SlotAllocator(CAPACITY)
    for size in sizes:
        span = allocator.allocate(size)
        if span is not None:
            assert span.offset % ALIGNMENT == span.nbytes % ALIGNMENT == 0
            assert max(size, 1) <= span.nbytes < size + ALIGNMENT + (size == 0)


@given(SIZES, SIZES)
def test_allocation_fails_only_when_no_gap_is_large_enough(first, second):
    allocator = SlotAllocator(16 * ALIGNMENT)
    taken = allocator.allocate(first)
    left = 16 * ALIGNMENT - (taken.nbytes if taken else 0)
    assert (allocator.allocate(second) is None) == (align(second) > left)


@pytest.mark.parametrize(("nbytes", "taken"), [(0, 256), (1, 256), (256, 256), (257, 512)])
def test_a_slot_holds_its_header_and_whole_units(nbytes, taken):
    assert align(nbytes) == taken
    assert slot_bytes(nbytes) == HEADER_BYTES + taken


def test_capacity_is_whole_units():
    assert SlotAllocator(ALIGNMENT * 2 + 255).capacity == ALIGNMENT * 2
    assert SlotAllocator(255).allocate(1) is None
