from __future__ import annotations

import asyncio

import pytest
from edgetune_runtime import BusyError
from edgetune_runtime.server.answer_queue import AnswerQueue


async def hold(queue: AnswerQueue, order: list[int], number: int, limit_s: float = 10) -> None:
    async with queue.place(limit_s):
        order.append(number)
        await asyncio.sleep(0.01)


def test_places_are_given_in_the_order_of_asking() -> None:
    async def main() -> list[int]:
        queue, order = AnswerQueue(2, 10), []
        tasks = [asyncio.create_task(hold(queue, order, number)) for number in range(6)]
        await asyncio.sleep(0)
        assert (queue.running, queue.waiting) == (2, 4)
        await asyncio.gather(*tasks)
        assert (queue.running, queue.waiting) == (0, 0)
        return order

    assert asyncio.run(main()) == [0, 1, 2, 3, 4, 5]


def test_one_that_computes_nothing_lets_another_run() -> None:
    async def main() -> list[int]:
        queue, order = AnswerQueue(1, 10), []
        tasks = [asyncio.create_task(hold(queue, order, number, 10)) for number in range(3)]
        await asyncio.sleep(0)
        assert (queue.running, queue.waiting) == (1, 2)
        with queue.elsewhere():
            await asyncio.sleep(0)
            assert (queue.running, queue.waiting) == (2, 1)
        await asyncio.sleep(0)
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        assert queue.places == 1
        await asyncio.gather(*tasks)
        return order

    assert asyncio.run(main()) == [0, 1, 2]
    with AnswerQueue(1, 1).elsewhere():
        pass


def test_a_request_that_waits_too_long_is_refused_and_forgotten() -> None:
    async def main() -> None:
        queue = AnswerQueue(1, 10)
        async with queue.place(1):
            with pytest.raises(BusyError, match=r"no place was free within 0.01 s"):
                await hold(queue, [], 1, limit_s=0.01)
            assert queue.waiting == 0
        await hold(queue, [], 2)
        assert queue.running == 0

    asyncio.run(main())


def test_one_that_is_cancelled_when_its_turn_comes_passes_it_on() -> None:
    async def main() -> None:
        queue, order = AnswerQueue(1, 10), []
        async with queue.place(1):
            first, second = (asyncio.create_task(hold(queue, order, number)) for number in (1, 2))
            await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait([first, second])
        assert order == [2]
        assert queue.running == 0

    asyncio.run(main())


def test_a_queue_that_stops_refuses_those_that_wait_and_all_others() -> None:
    async def main() -> None:
        queue = AnswerQueue(1, 1)
        async with queue.place(1):
            waits = asyncio.create_task(hold(queue, [], 1))
            await asyncio.sleep(0)
            with pytest.raises(BusyError, match="1 requests are already waiting"):
                await hold(queue, [], 2)
            queue.stop()
            with pytest.raises(BusyError, match="stopping"):
                await waits
        with pytest.raises(BusyError, match="stopping"):
            await hold(queue, [], 3)
        assert (queue.running, queue.waiting) == (0, 0)

    asyncio.run(main())


def test_a_full_queue_makes_room_from_the_client_with_most_waiting() -> None:
    async def main() -> list[int]:
        queue, order = AnswerQueue(1, 3), []

        async def ask(number: int, client: str) -> None:
            async with queue.place(10, client):
                order.append(number)

        async with queue.place(1, "crowd"):
            tasks = [asyncio.create_task(ask(number, "crowd")) for number in range(3)]
            await asyncio.sleep(0)
            tasks.append(asyncio.create_task(ask(3, "other")))
            await asyncio.sleep(0)
            with pytest.raises(BusyError, match="3 requests are already waiting"):
                await tasks[2]
            # The crowd has 2 of 3: one more of the other client would not make it fairer.
            with pytest.raises(BusyError, match="3 requests are already waiting"):
                await ask(4, "other")
            with pytest.raises(BusyError, match="3 requests are already waiting"):
                await ask(5, "crowd")
        await asyncio.gather(*tasks[:2], tasks[3])
        return order

    assert asyncio.run(main()) == [0, 1, 3]


def test_a_client_with_fewer_running_answers_is_next() -> None:
    async def main() -> list[str]:
        queue, order = AnswerQueue(2, 9), []

        async def ask(client: str) -> None:
            async with queue.place(10, client):
                order.append(client)
                await asyncio.sleep(0.01)

        clients = ["crowd", "crowd", "crowd", "crowd", "other", "other"]
        await asyncio.gather(*map(ask, clients))
        return order

    assert asyncio.run(main()) == ["crowd", "crowd", "other", "crowd", "other", "crowd"]
