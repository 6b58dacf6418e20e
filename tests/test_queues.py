"""Queues whose items can be moved and taken out anywhere."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_ray.queues import OLDEST_EVERY, Heap, PriorityQueue

STEPS = st.lists(st.tuples(st.sampled_from(["push", "remove", "pop"]), st.integers(0, 9), st.integers(-3, 3)))


def fill(*items: tuple[str, int, int]) -> PriorityQueue[str]:
    queue: PriorityQueue[str] = PriorityQueue()
    for item in items:
        queue.push(*item)
    return queue


@given(STEPS)
def test_a_heap_gives_the_least_key_however_items_are_moved_and_taken_out(steps):
    heap, keys = Heap(), {}
    for action, item, key in steps:
        if action == "push":
            heap.push(item, key)
            keys[item] = key
        elif action == "remove":
            assert heap.remove(item) == (keys.pop(item, None) is not None)
        elif keys:
            assert keys.pop(heap.peek()) == heap.least() == min([*keys.values(), heap.least()])
            heap.remove(heap.peek())
        assert len(heap) == len(keys)
    assert (heap.peek() is None) == (not keys)


def test_equal_keys_come_out_in_the_order_they_went_in():
    heap = Heap()
    for item in "cabc":  # c moves behind
        heap.push(item, 1.0)
    order = []
    while (item := heap.peek()) and heap.remove(item):
        order.append(item)
    assert order == ["a", "b", "c"]


def test_a_heap_that_moves_one_item_for_ever_does_not_grow():
    heap = Heap()
    for key in range(10_000):
        heap.push("item", -key)
    assert len(heap._heap) < 100
    assert (heap.peek(), heap.least()) == ("item", -9_999)


def test_highest_priority_comes_first_and_then_the_order_of_admission():
    queue = fill(("late", 0, 3), ("urgent", 5, 2), ("early", 0, 1), ("urgent too", 5, 4))
    assert [queue.pop() for _ in range(4)] == ["urgent", "urgent too", "early", "late"]


def test_an_item_that_comes_back_stands_where_it_stood():
    queue = fill(*((str(number), 0, number) for number in range(3)))
    first = queue.pop()
    queue.push(first, 0, 0)
    assert [queue.pop() for _ in range(3)] == ["0", "1", "2"]


def test_an_item_taken_out_does_not_come_and_taking_it_out_twice_is_nothing():
    queue = fill(("a", 0, 0), ("b", 0, 1))
    assert (queue.remove("a"), queue.remove("a"), len(queue)) == (True, False, 1)
    assert queue.pop() == "b"
    with pytest.raises(IndexError, match="empty"):
        queue.pop()


def test_an_endless_flow_of_urgent_items_does_not_starve_the_rest():
    queue = fill(*((f"patient {number}", 0, number) for number in range(3)))
    popped = []
    for number in range(3 * OLDEST_EVERY):
        queue.push(f"urgent {number}", 9, 100 + number)
        popped.append(queue.pop())
    assert [item for item in popped if item.startswith("patient")] == ["patient 0", "patient 1", "patient 2"]
    assert [place for place, item in enumerate(popped, 1) if item.startswith("patient")] == [8, 16, 24]


@given(STEPS)
def test_a_queue_agrees_with_a_sorted_list(steps):
    queue, items, num_popped = PriorityQueue(), {}, 0
    for sequence, (action, item, priority) in enumerate(steps):
        if action == "push":
            queue.push(item, priority, sequence)
            items[item] = (priority, sequence)
        elif action == "remove":
            assert queue.remove(item) == (items.pop(item, None) is not None)
        elif items:
            num_popped += 1
            oldest = num_popped % OLDEST_EVERY == 0
            expected = min(items, key=lambda i: items[i][1] if oldest else (-items[i][0], items[i][1]))
            assert queue.pop() == expected
            del items[expected]
        assert len(queue) == len(items)
