"""The worker pool against a real program that dies, hangs and shouts on command."""

import asyncio
import io
import os
import signal
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.src.backends import wire
from api.src.backends.workers import WorkerPool
from api.src.errors import NotReady, ShuttingDown, SynthesisFailed

PROGRAM = Path(__file__).with_name("fault_worker.py")
ROOT = Path(__file__).parents[2]


@asynccontextmanager
async def running(log: Path, size: int = 1, mode: str = "", **options):
    pool = make(log, size, mode, **options)
    await pool.start()
    try:
        yield pool
    finally:
        await pool.stop()


def make(log: Path, size: int = 1, mode: str = "", **options) -> WorkerPool:
    command = [sys.executable, str(PROGRAM), str(log), mode]
    return WorkerPool("fault", command, size, environment={"PYTHONPATH": str(ROOT)}, **options)


async def until(condition, seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - a process has no event to wait for
            await asyncio.sleep(0.01)


def exists(pid: int) -> bool:
    """Whether there is such a process, zombies included."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log"


@pytest.fixture
def go_on(tmp_path):
    """A file for which a worker can be told to wait."""
    return tmp_path / "go on"


@given(st.dictionaries(st.text(), st.one_of(st.integers(), st.text(), st.floats(allow_nan=False))), st.binary())
def test_messages_survive_the_pipe(header, payload):
    stream = io.BytesIO(wire.pack(header, payload) * 2)
    assert wire.read(stream) == wire.Message(header, payload)
    assert wire.read(stream) == wire.Message(header, payload)
    assert wire.read(stream) is None


@given(st.integers(1, 30))
def test_a_message_cut_short_is_the_end(missing):
    whole = wire.pack({"text": "hello"}, b"x" * 20)
    assert wire.read(io.BytesIO(whole[:-missing])) is None


async def test_jobs_are_shared_between_all_workers(log):
    async with running(log, 2) as pool:
        await until(lambda: len(pool.pids) == 2)
        jobs = (pool.run({"name": f"job {i}", "do": "sleep", "seconds": 0.02}) for i in range(8))
        answers = await asyncio.gather(*jobs)
        assert [answer.header["name"] for answer in answers] == [f"job {i}" for i in range(8)]
        assert {answer.header["pid"] for answer in answers} == set(pool.pids)


async def test_long_answers_arrive_whole(log):
    async with running(log) as pool:
        answer = await pool.run({"name": "long", "size": 5_000_000})
        assert answer.payload == b"\x01" * 5_000_000


async def test_a_job_that_crashed_a_worker_is_done_by_another(log):
    async with running(log, 2) as pool:
        answer = await pool.run({"name": "victim", "do": "die once"})
        assert answer.header["name"] == "victim"
        await until(lambda: len(pool.pids) == 2)
        assert pool.restarts == 1


async def test_a_job_that_crashes_two_workers_fails_and_the_pool_recovers(log):
    async with running(log, 2) as pool:
        with pytest.raises(SynthesisFailed):
            await pool.run({"name": "poison", "do": "die"})
        assert log.read_text().count("poison") == 2
        assert (await pool.run({"name": "next"})).header["name"] == "next"


async def test_workers_killed_while_idle_cost_no_request(log):
    async with running(log, 2) as pool:
        await until(lambda: len(pool.pids) == 2)
        for pid in pool.pids:
            os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(0.1)
        assert (await pool.run({"name": "next"})).header["name"] == "next"


async def test_a_program_that_cannot_start_is_reported_and_does_not_spin(log):
    pool = make(log, 2, "broken", delay_s=0.05, settled_s=1.0)
    try:
        with pytest.raises(NotReady):
            await pool.start()
        assert pool.failing
        with pytest.raises(NotReady):
            await pool.run({"name": "early"})
        starts, began = log.read_text().count("start"), time.monotonic()
        await asyncio.sleep(1.0)
        more = log.read_text().count("start") - starts
        assert more <= 6 * (time.monotonic() - began)
    finally:
        await pool.stop()


async def test_a_missing_program_is_reported():
    pool = WorkerPool("fault", ["/nonexistent/program"], 1, delay_s=0.01)
    with pytest.raises(NotReady):
        await pool.start()
    await pool.stop()


async def test_a_hung_worker_is_killed_and_replaced(log):
    async with running(log, timeout_s=0.2) as pool:
        (hung,) = pool.pids
        with pytest.raises(SynthesisFailed):
            await pool.run({"name": "hung", "do": "hang"})
        pool._timeout_s = 60
        assert (await pool.run({"name": "next"})).header["pid"] != hung
        assert not exists(hung)


async def test_an_error_answer_fails_the_job_alone(log):
    async with running(log) as pool:
        with pytest.raises(SynthesisFailed):
            await pool.run({"name": "odd", "do": "fail"})
        assert (await pool.run({"name": "next"})).header["name"] == "next"
        assert pool.restarts == 0


async def test_a_loud_worker_does_not_block(log):
    async with running(log) as pool:
        assert (await pool.run({"name": "loud", "do": "shout"})).header["name"] == "loud"


async def test_a_cancelled_wait_leaves_the_queue(log, go_on):
    async with running(log) as pool:
        first = asyncio.create_task(pool.run({"name": "first", "do": "wait", "for": str(go_on)}))
        await until(lambda: "first" in log.read_text())
        second, third = (asyncio.create_task(pool.run({"name": name})) for name in ("second", "third"))
        await asyncio.sleep(0.01)
        second.cancel()
        await asyncio.sleep(0)
        go_on.touch()
        assert (await third).header["name"] == "third"
        assert (await first).header["name"] == "first"
        assert "second" not in log.read_text()


async def test_a_worker_given_to_a_cancelled_wait_is_not_lost(log, go_on, monkeypatch):
    async with running(log) as pool:
        first = asyncio.create_task(pool.run({"name": "first", "do": "wait", "for": str(go_on)}))
        await until(lambda: "first" in log.read_text())
        second = asyncio.create_task(pool.run({"name": "second"}))
        await asyncio.sleep(0)
        release = pool._release

        def release_and_cancel(worker):
            release(worker)
            second.cancel()

        monkeypatch.setattr(pool, "_release", release_and_cancel)
        go_on.touch()
        await asyncio.wait([first, second])
        monkeypatch.undo()
        assert second.cancelled()
        async with asyncio.timeout(30):
            assert (await pool.run({"name": "next"})).header["name"] == "next"


async def test_a_cancelled_job_leaves_a_healthy_worker(log, go_on):
    async with running(log) as pool:
        job = asyncio.create_task(pool.run({"name": "left", "do": "wait", "for": str(go_on)}))
        await until(lambda: "left" in log.read_text())
        job.cancel()
        await asyncio.sleep(0)
        go_on.touch()
        with pytest.raises(asyncio.CancelledError):
            await job
        assert (await pool.run({"name": "next"})).header["name"] == "next"
        assert pool.restarts == 0


async def test_stop_ends_everything(log):
    files, tasks = len(os.listdir("/dev/fd")), asyncio.all_tasks()
    pool = make(log, 2, "stubborn")
    await pool.start()
    await until(lambda: len(pool.pids) == 2)
    pids = pool.pids
    jobs = [asyncio.create_task(pool.run({"name": f"{i}", "do": "hang"})) for i in range(4)]
    await until(lambda: log.read_text().count("\n") == 4)
    await asyncio.wait_for(pool.stop(), 30)
    results = await asyncio.gather(*jobs, return_exceptions=True)
    assert all(isinstance(result, ShuttingDown) for result in results)
    assert not any(map(exists, pids))
    assert len(os.listdir("/dev/fd")) <= files
    assert asyncio.all_tasks() == tasks
    with pytest.raises(ShuttingDown):
        await pool.run({"name": "late"})


async def test_stop_while_starting(log):
    pool = make(log, 2)
    start = asyncio.create_task(pool.start())
    await asyncio.sleep(0)
    await pool.stop()
    with pytest.raises(ShuttingDown):
        await start
