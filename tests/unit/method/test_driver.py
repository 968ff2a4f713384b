"""How searches share an engine."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TypeVar

import pytest
from toy_engine import ToyEngine, prompt

from srccore.method.driver import Search, draw_all, drive
from srccore.method.engine import Draw, Prompt, Steps

T = TypeVar("T")


def asking(times: int, name: str) -> Search[str]:
    """A search that makes some draws, one after the other, and returns its name."""

    def steps(root: str) -> Steps[str]:
        for number in range(times):
            (drawn,) = yield [Draw(root, 1, seed=number, whole=True)]
            assert drawn.stop == "end"
        return name

    return Search(prompt(name), steps)


def names(count: int) -> list[str]:
    return [f"{number:02d}" for number in range(count)]


def in_batches(items: Sequence[T], size: int) -> list[Sequence[T]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def test_results_come_back_batch_by_batch_in_the_order_of_their_prompts() -> None:
    # Within a batch the later ones are done first.
    searches = [asking(3 - place % 3, name) for place, name in enumerate(names(7))]
    found = list(drive(ToyEngine(), in_batches(searches, 3)))
    assert found == [["00", "01", "02"], ["03", "04", "05"], ["06"]]


def test_a_batch_is_opened_only_while_the_engine_has_room() -> None:
    engine = ToyEngine(in_flight=2, shuffle=0)
    searches = [asking(2, name) for name in names(20)]
    for done, _ in enumerate(drive(engine, in_batches(searches, 2)), start=1):
        assert len(engine.opened) - done < 2
    assert engine.opened == in_batches(names(20), 2)


def test_a_search_that_draws_nothing_is_done_at_once() -> None:
    searches = [asking(0, "a"), asking(1, "b"), asking(0, "c")]
    assert list(drive(ToyEngine(), in_batches(searches, 1))) == [["a"], ["b"], ["c"]]
    assert list(drive(ToyEngine(), [])) == []


def test_prompts_are_prepared_ahead_in_another_thread_but_not_all_of_them() -> None:
    engine, threads = ToyEngine(), set()
    prepare = engine.prepare

    def noted(prompts: Sequence[Prompt]) -> list[str]:
        threads.add(threading.current_thread())
        return prepare(prompts)

    engine.prepare = noted  # type: ignore[method-assign]
    running = drive(engine, in_batches([asking(1, name) for name in names(99)], 8))
    next(running)
    running.close()
    assert len(engine.prepared) <= 6
    assert threading.main_thread() not in threads
    assert not any(thread.is_alive() for thread in threads)


def test_several_images_are_loaded_at_the_same_time() -> None:
    together = threading.Barrier(4)

    class Loading(ToyEngine):
        def prepare(self, prompts: Sequence[Prompt]) -> list[str]:
            for each in prompts:
                each.image()
            return super().prepare(prompts)

    def search(name: str) -> Search[str]:
        found = asking(1, name)
        # Passed by four threads together.
        return Search(Prompt(lambda: together.wait(60), "?", name), found.start)  # type: ignore[arg-type,return-value]

    found = list(drive(Loading(), [[search(name)] for name in names(8)]))
    assert found == [[name] for name in names(8)]


def test_draws_do_not_wait_for_the_image_of_another_prompt() -> None:
    loaded = threading.Event()
    done = []

    class Loading(ToyEngine):
        def prepare(self, prompts: Sequence[Prompt]) -> list[str]:
            for each in prompts:
                each.image()
            return super().prepare(prompts)

    def late() -> None:
        assert loaded.wait(60)

    first, second = asking(3, "first"), asking(1, "second")
    slow = Search(Prompt(late, "?", "second"), second.start)  # type: ignore[arg-type]
    for found in drive(Loading(in_flight=2), [[first], [slow]]):
        done += found
        # Nothing else would load it.
        loaded.set()
    assert done == ["first", "second"]


def test_an_error_in_the_preparation_reaches_the_caller() -> None:
    engine = ToyEngine()

    def fail(prompts: Sequence[Prompt]) -> list[str]:
        raise ValueError(prompts[0].key)

    engine.prepare = fail  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="only"):
        list(drive(engine, [[asking(1, "only")]]))


def test_draws_come_back_in_their_order() -> None:
    engine = ToyEngine(shuffle=3)
    (root,) = engine.open(["a"])
    draws = [Draw(root, 1, seed=seed) for seed in range(9)]
    together = draw_all(engine, draws)
    assert together == [draw_all(engine, [draw])[0] for draw in draws]
    assert len({each.text for each in together}) > 1
