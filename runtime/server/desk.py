"""Where requests are admitted: it keeps count, hands work to the writer, and brings tokens back to each request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from runtime.model import Model
from runtime.server.answers import Choice, Names
from runtime.server.dialect import Asked, Ids, encode
from runtime.server.errors import BUSY, Refused, ending
from runtime.server.limits import Bounds
from runtime.server.metrics import Metrics
from runtime.server.writer import Event, Job, Writer, Written, is_last

SIGN_OF_LIFE = 15.0  # seconds without a token after which a stream gets a comment, so that proxies keep it open


class Order:
    """One admitted request: its jobs, and the queue through which their events come."""

    def __init__(self, desk: Desk, asked: Asked, prompts: list[Ids]) -> None:
        self.desk, self.asked, self.prompts = desk, asked, prompts
        self.began = time.perf_counter()
        self.wrote = False  # whether a token has come
        self.events: asyncio.Queue[tuple[Job, Event] | None] = asyncio.Queue()
        wants = asked.limits.logprobs is not None
        self.choices = [
            Choice(desk.model, desk.names, index, wants) for index in range(len(prompts) * asked.n)
        ]  # those of a prompt are neighbours
        scoring = [self.job(n, n, True) for n in range(len(prompts))] if asked.scores else []
        self.jobs = [*scoring, *(self.job(i // asked.n, i, False) for i in range(len(self.choices)) if asked.writes)]
        self.open = {*self.jobs}  # jobs whose last event has not come
        self.gone = False  # whether the client has left

    def job(self, prompt: int, index: int, scoring: bool) -> Job:
        """index: of the choice. Each prompt's texts use the seeds from `seed` on, so a prompt gives the same alone."""
        seed = self.asked.sampling.seed
        which = index % self.asked.n
        sampling = self.asked.sampling if seed is None else replace(self.asked.sampling, seed=seed + which)
        return Job(self.prompts[prompt], sampling, self.asked.limits, index, scoring)

    @property
    def prompt_tokens(self) -> int:
        return sum(len(ids) for ids in self.prompts)

    @property
    def new_tokens(self) -> int:
        return sum(choice.tokens for choice in self.choices)

    async def come(self) -> AsyncIterator[list[tuple[Job, Event]]]:
        """What has come since, until all jobs have ended; nothing now and then; it ends early when the client goes."""
        waiting = len(self.jobs)
        while waiting:
            try:
                async with asyncio.timeout(SIGN_OF_LIFE):
                    events = [await self.events.get()]
            except TimeoutError:
                yield []
                continue
            while not self.events.empty():
                events.append(self.events.get_nowait())
            known = [event for event in events if event is not None]
            if self.gone:
                return
            waiting -= sum(is_last(event) for _, event in known)
            yield known

    def leave(self) -> None:
        """Nobody waits for this request any more: what is still being written is dropped at the next step."""
        self.gone = bool(self.open)
        for job in self.open:
            job.cancelled = True
        if self.open:
            self.desk.writer.wake()
        self.events.put_nowait(None)


class Desk:
    """All state of the server. Everything but the writer belongs to the event loop's thread."""

    def __init__(self, model: Model, name: str, bounds: Bounds) -> None:
        """name: what the API calls the model."""
        self.model, self.name, self.bounds = model, name, bounds
        self.created = int(time.time())
        self.metrics = Metrics()
        self.names = Names(model.codec)
        self.orders: dict[Job, Order] = {}  # jobs that are not finished
        self.draining = False
        self.bodies = 0  # bytes of requests that are being read
        self.requests = 0  # completions under way
        self.tokenising = ThreadPoolExecutor(1, "tokeniser")  # one: hostile texts may take one CPU, not all
        self.writer = Writer(model, bounds.parallel, bounds.exact, self.bring)
        self.loop: asyncio.AbstractEventLoop | None = None

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.writer.start()

    def close(self) -> None:
        self.writer.close()
        self.writer.join(5)
        self.tokenising.shutdown(wait=False, cancel_futures=True)

    def drain(self) -> None:
        """Take no more requests."""
        self.draining = True

    def cut_off(self) -> None:
        """End all texts where they are."""
        self.writer.cut_off = True
        self.writer.wake()

    async def admit(self, asked: Asked) -> Order:
        """Raises Refused: 429 where too many texts wait, 503 when the server ends, 400 for a bad prompt."""
        self.check_room(len(asked.prompts) * asked.n)
        assert self.loop is not None
        prompts = await self.loop.run_in_executor(self.tokenising, encode, self.model, asked)
        order = Order(self, asked, prompts)
        self.check_room(len(order.choices))  # others may have come meanwhile
        self.orders |= dict.fromkeys(order.jobs, order)
        self.metrics.prompt_tokens += order.prompt_tokens
        self.writer.submit(order.jobs)
        return order

    def check_room(self, texts: int) -> None:
        if self.draining:
            raise ending()
        most = self.bounds.parallel + self.bounds.queue
        if len(self.orders) + texts > most:
            raise Refused(
                429, f"the server is busy: {len(self.orders)} of at most {most} texts are under way, try again later",
                code="queue_full", kind=BUSY,
            )  # fmt: skip

    def bring(self, events: list[tuple[Job, Event]]) -> None:
        """From the writer's thread: let the event loop sort events into their requests."""
        assert self.loop is not None
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.sort, events)

    def sort(self, events: list[tuple[Job, Event]]) -> None:
        for job, event in events:
            order = self.orders[job]
            if isinstance(event, Written):
                self.metrics.new_tokens += 1
                if not order.wrote:
                    order.wrote = True
                    self.metrics.first_token.observe(time.perf_counter() - order.began)
            if is_last(event):
                del self.orders[job]
                order.open.discard(job)
                self.metrics.cancelled += job.cancelled
            order.events.put_nowait((job, event))

    def health(self) -> tuple[int, dict[str, Any]]:
        """Whether requests should be sent here."""
        if not self.writer.is_well:
            return 503, {"status": "the model does not answer"}
        return (503, {"status": "shutting down"}) if self.draining else (200, {"status": "ok"})

    def page(self) -> str:
        """For /metrics."""
        writer = self.writer
        running, waiting = len(writer.taken), len(writer.waiting)
        gauges = {
            "dmpt_texts_running": running, "dmpt_texts_waiting": waiting, "dmpt_requests_open": self.requests,
            "dmpt_draining": self.draining,
        }  # fmt: skip
        counters = {"dmpt_steps_total": writer.steps, "dmpt_step_seconds_total": writer.step_seconds}
        return self.metrics.text(gauges, counters)
