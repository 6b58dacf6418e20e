"""Posts that wait for a replica, and stages that have none left."""

import asyncio

from disagg_ray.driver.outages import Outages, Vacancies
from disagg_ray.errors import DisaggError


def test_a_post_that_nobody_takes_is_closed_longer_each_time_until_all_are_reopened():
    async def run() -> list[float]:
        vacancies, pauses = Vacancies(), []
        with vacancies.filling("transformer-0"):
            assert list(vacancies) == ["transformer-0"]
            await vacancies.closed_time("transformer-0")
            for _ in range(9):
                vacancies.note_failure("transformer-0")
                pauses.append(vacancies.pause_s("transformer-0"))
            closed = asyncio.ensure_future(vacancies.closed_time("transformer-0"))
            await asyncio.sleep(0)
            assert not closed.done()
            vacancies.reopen()
            await closed
        assert not list(vacancies)
        return [*pauses, vacancies.pause_s("transformer-0")]

    assert asyncio.run(run()) == [1, 2, 4, 8, 16, 32, 60, 60, 60, 0]


def test_a_stage_without_a_replica_fails_by_name_after_its_time_and_serves_again_when_one_comes():
    told: list[DisaggError | None] = []

    async def run() -> None:
        outages = Outages(["encoder", "transformer"], told.append)
        outages.end("encoder")
        outages.begin("transformer")
        outages.reasons["transformer"] = "no memory"
        await outages.limit("encoder", 0.01)
        assert not told
        await outages.limit("transformer", 0.01)
        outages.give_up("transformer", "again")
        outages.end("transformer")

    asyncio.run(run())
    assert [str(reason) for reason in told] == [
        "no replica of transformer is left and none started within cluster.start_timeout_s=0.01 s: no memory", "None",
    ]  # fmt: skip
