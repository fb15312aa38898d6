"""Work in threads: in order, a bounded part of it under way, and no thread for what needs none."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flytekit_ckpt.pipeline import LITTLE, ahead, in_order


def named() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("flytekit_ckpt_")]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 10)), st.integers(1, 4), st.integers(1, 30))
def test_answers_come_in_order_of_the_items(sizes: list[int], threads: int, memory: int) -> None:
    items = list(enumerate(sizes))

    def work(item: tuple[int, int]) -> int:
        time.sleep(item[1] / 10_000)
        return item[0]

    # Some of it little, some not.
    sized = ((size * LITTLE // 5, (number, size)) for number, size in items)
    found = in_order(work, sized, threads=threads, memory=memory * LITTLE // 5)
    assert list(found) == [number for number, _ in items]
    assert list(ahead(iter(items), count=threads)) == items
    assert not named()


def test_one_item_alone_and_what_is_little_are_worked_on_without_a_thread() -> None:
    here = threading.get_ident()
    for sizes in ([1 << 30], [LITTLE // 4] * 4, [LITTLE, 1 << 30]):
        items = [(size, None) for size in sizes]
        assert list(in_order(lambda _: threading.get_ident(), items, threads=2, memory=1)) == [here] * len(items)
    many = [(LITTLE // 4, None)] * 20
    found = list(in_order(lambda _: threading.get_ident(), many, threads=2, memory=1 << 30))
    assert found[:4] == [here] * 4
    assert here not in found[4:]


@pytest.mark.parametrize("memory", [10, 35, 1000])
def test_only_so_much_is_under_way(memory: int) -> None:
    taken = 0

    def items() -> Iterator[tuple[int, None]]:
        nonlocal taken
        for _ in range(100):
            taken += 1
            yield 10 * LITTLE, None

    found = in_order(lambda item: item, items(), threads=2, memory=memory * LITTLE)
    next(found)
    # What is under way, the one that was handed on, and the one that has to wait.
    assert taken <= min(memory // 10, 4 * 2) + 2
    found.close()  # type: ignore[attr-defined]
    assert not named()


def test_only_so_much_is_run_ahead() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for number in range(100):
            taken += 1
            yield number

    found = ahead(items(), count=3)
    next(found)
    time.sleep(0.1)
    assert taken <= 3
    found.close()  # type: ignore[attr-defined]
    assert not named()


@pytest.mark.parametrize("failing", [0, 1, 7])
def test_an_error_comes_in_its_place_and_ends_the_work(failing: int) -> None:
    def work(number: int) -> int:
        if number == failing:
            raise KeyError(number)
        return number

    with pytest.raises(KeyError):
        list(in_order(work, ((LITTLE, number) for number in range(20)), threads=3, memory=100 * LITTLE))
    assert not named()
    with pytest.raises(KeyError):
        list(ahead(map(work, range(20)), count=3))
    assert not named()
