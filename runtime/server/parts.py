"""The answer to one admitted request, as it comes or whole."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

from runtime.server.answers import server_sent, usage
from runtime.server.desk import Order
from runtime.server.errors import Refused
from runtime.server.writer import Event, Job, Scores, Written

DONE = b"data: [DONE]\n\n"
WAITING = b": waiting\n\n"  # a comment, which clients skip


class Answer:
    """Sorts events by choice. A choice that echoes its prompt's log-probs starts when these have come."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.id, self.created = f"cmpl-{uuid4().hex}", int(time.time())
        self.written: list[list[Written]] = [[] for _ in order.choices]
        self.ended = [not order.asked.writes] * len(order.choices)  # cut off, or nothing was to be written
        self.ready = [not order.asked.scores] * len(order.choices)
        if order.asked.echo and not order.asked.scores:
            for prompt in range(len(order.prompts)):
                self.echo(prompt, None)

    def echo(self, prompt: int, scores: Scores | None) -> None:
        """Put a prompt in front of its texts."""
        asked, ids = self.order.asked, self.order.prompts[prompt].tolist()
        given, model = asked.prompts[prompt], self.order.desk.model
        text = given if isinstance(given, str) else "" if model.codec is None else model.codec.decode(ids)
        for index in range(prompt * asked.n, (prompt + 1) * asked.n):
            self.order.choices[index].prompt = (text, ids, scores)
            self.ready[index] = True

    def sort(self, job: Job, event: Event) -> None:
        if isinstance(event, Refused):
            raise event
        if isinstance(event, Scores):
            self.echo(job.index, event)
        elif isinstance(event, Written):
            self.written[job.index].append(event)
        elif job.scoring:  # the server ends before the prompt was scored
            self.echo(job.index, Scores([None] * len(job.prompt), [()] * len(job.prompt)))
        else:
            self.ended[job.index] = True

    def parts(self) -> list[dict[str, Any]]:
        """What is new in each choice."""
        new = []
        for choice in self.order.choices:
            written, ended = self.written[choice.index], self.ended[choice.index]
            if self.ready[choice.index] and not choice.done and (written or ended or choice.prompt):
                self.written[choice.index] = []
                new.append(choice.part(written, ended))
        return new

    @property
    def usage(self) -> dict[str, int]:
        return usage(self.order.prompt_tokens, self.order.new_tokens)

    def object(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        own = {"id": self.id, "object": "text_completion", "created": self.created, "model": self.order.desk.name}
        return {**own, "choices": choices, **more}

    async def whole(self) -> dict[str, Any] | None:
        """The complete answer; None when the client has gone. Raises Refused."""
        async for events in self.order.come():
            for job, event in events:
                self.sort(job, event)
        return None if self.order.gone else self.object(self.parts(), usage=self.usage)

    async def stream(self) -> AsyncIterator[bytes]:
        """Server-sent events. An error becomes the last one, since the status has been sent."""
        more: dict[str, Any] = {"usage": None} if self.order.asked.usage else {}
        try:
            async for events in self.order.come():
                for job, event in events:
                    self.sort(job, event)
                if chunks := self.chunks(more) if events else WAITING:
                    yield chunks
        except Refused as error:
            yield server_sent(error.body)
            return
        if not self.order.gone:
            last = server_sent(self.object([], usage=self.usage)) if self.order.asked.usage else b""
            yield self.chunks(more) + last + DONE

    def chunks(self, more: dict[str, Any]) -> bytes:
        """One event for each choice that has something new."""
        worth = [part for part in self.parts() if part["text"] or part["finish_reason"] or part["logprobs"]]
        return b"".join(server_sent(self.object([part], **more)) for part in worth)
