"""The order in which queues give what was put in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_ray.scheduling.queues import OLDEST_EVERY, FairQueue, PriorityQueue

STEPS = st.lists(st.tuples(st.sampled_from(["push", "remove", "pop"]), st.integers(0, 9), st.integers(-3, 3)))


def fill(*items: tuple[str, int, int]) -> PriorityQueue[str]:
    queue: PriorityQueue[str] = PriorityQueue()
    for item in items:
        queue.push(*item)
    return queue


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
    with pytest.raises(ValueError, match="empty"):
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


def share(queue: FairQueue[str], inside: int, turns: int) -> list[str]:
    """Return the owners of what enters when each takes a second and so many are inside at once, oldest out first."""
    entered: list[str] = []
    for turn in range(turns):
        if turn >= inside:
            queue.credit(entered[turn - inside], 1.0)
        owner = queue.pop().split()[0]
        queue.charge(owner, 1.0)
        entered.append(owner)
    return entered


def fair(*crowds: tuple[str, int, int]) -> FairQueue[str]:
    queue: FairQueue[str] = FairQueue()
    for owner, number, priority in crowds:
        for sequence in range(number):
            queue.push(f"{owner} {sequence}", owner, priority, sequence)
    return queue


def test_owners_share_alike_however_much_each_brings():
    entered = share(fair(("greedy", 100, 0), ("modest", 10, 0), ("third", 10, 0)), inside=6, turns=30)
    assert {owner: entered.count(owner) for owner in set(entered)} == {"greedy": 10, "modest": 10, "third": 10}


def test_who_has_nothing_in_hand_comes_first_whatever_the_priority_of_others():
    queue = fair(("urgent", 20, 1000))
    share(queue, inside=8, turns=8)
    queue.push("late 0", "late", -1000, 99)
    assert queue.pop() == "late 0"


def test_ten_more_of_priority_is_twice_the_share():
    entered = share(fair(("plain", 100, 0), ("preferred", 100, 10)), inside=12, turns=120)
    assert entered.count("preferred") == pytest.approx(80, abs=4)


def test_seconds_in_hand_count_and_not_how_many_items():
    queue = fair(("long", 5, 0), ("short", 5, 0))
    queue.charge("long", 10.0)
    for _ in range(3):
        queue.charge("short", 1.0)
    assert queue.pop() == "short 0"


def test_an_owner_that_is_done_leaves_nothing_behind():
    queue = fair(("a", 2, 0), ("b", 1, 0))
    while queue:
        queue.charge(queue.pop().split()[0], 0.1)
    assert not queue.remove("a 0")
    for owner in "aab":
        queue.credit(owner, 0.1)
    assert not queue.owners
