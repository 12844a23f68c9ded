"""Hidden states and their gradients on their way between the stages of one pipeline, point to point.

The schedule is data that every rank knows, so every rank knows what its neighbours send and when. Receives are posted
ahead in the sender's order, and a send never waits: an action that has its input there begins at once. Each pair of
ranks has a channel for each direction, whose messages are numbered (the tag, where the backend has tags).

With a virtual clock every message carries its sender's time; see virtual_clock.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from r1mega.parallel.schedule import Schedule, Task

AHEAD = 3
"""Receives posted beyond what a channel has delivered: bounds the memory for what nobody reads yet."""
CLOCK_TAG = 1 << 20
"""Tags of clock readings begin here."""


class Message(NamedTuple):
    kind: str
    """"F": the input of a stage's forward. "B": the gradient of a stage's output."""
    task: Task
    """Of the receiver."""


def outgoing(schedule: Schedule, rank: int) -> list[tuple[int, Message]]:
    """(receiver, message) in the order in which `rank` sends them."""
    sent = []
    for action in schedule.orders[rank]:
        for kind, task, neighbours in (
            ("F", action.forward, schedule.following),
            ("B", action.input_gradient, schedule.previous),
        ):
            if task and task.stage in neighbours:
                stage = neighbours[task.stage]
                if schedule.rank_of[stage] != rank:
                    sent.append((schedule.rank_of[stage], Message(kind, Task(stage, task.micro_batch))))
    return sent


Group = Callable[[int, int], Any]
"""(sending, receiving pipeline rank) -> the process group that carries it."""


class Messages:
    """Of one run of a schedule in one rank."""

    def __init__(
        self,
        schedule: Schedule,
        rank: int,
        group_of: Group,
        global_rank_of: Callable[[int], int],
        buffer_for: Callable[[int], Tensor],
        *,
        clock: Any = None,
    ) -> None:
        """rank: in the pipeline. buffer_for: micro-batch -> memory for one message of it."""
        self._schedule, self._rank = schedule, rank
        self._group_of, self._global_rank_of, self._buffer_for = group_of, global_rank_of, buffer_for
        self._clock = clock
        self._numbers = {
            (receiver, message): number
            for receiver in range(schedule.ranks)
            for number, message in enumerate(m for to, m in outgoing(schedule, rank) if to == receiver)
        }
        self._incoming = {
            sender: deque(enumerate(m for to, m in outgoing(schedule, sender) if to == rank))
            for sender in range(schedule.ranks)
            if sender != rank
        }
        self._posted: dict[Message, tuple[int, Tensor, Any, Tensor | None, Any]] = {}
        self._unread = dict.fromkeys(self._incoming, 0)
        self._sent: deque[tuple[Any, Tensor]] = deque()
        for sender in self._incoming:
            self._post(sender)

    def send(self, message: Message, tensor: Tensor) -> None:
        """Returns at once; the tensor must not change until `finish`."""
        receiver = self._schedule.rank_of[message.task.stage]
        number = self._numbers[receiver, message]
        group, to = self._group_of(self._rank, receiver), self._global_rank_of(receiver)
        tensor = tensor.contiguous()
        self._sent.append((dist.isend(tensor, to, group=group, tag=number), tensor))
        if self._clock:
            now = torch.tensor([self._clock.sent_at], dtype=torch.float64)
            self._sent.append((dist.isend(now, to, group=group, tag=CLOCK_TAG + number), now))
        while self._sent and self._sent[0][0].is_completed():
            self._sent.popleft()

    def receive(self, message: Message, source: int) -> Tensor:
        """Waits for it. source: the sending stage."""
        sender = self._schedule.rank_of[source]
        while message not in self._posted:  # read in another order than sent
            self._post(sender, beyond=1)
        _, tensor, work, reading, clock_work = self._posted.pop(message)
        work.wait()
        if self._clock:
            clock_work.wait()
            assert reading is not None
            self._clock.arrived(float(reading))
        self._unread[sender] -= 1
        self._post(sender)
        return tensor

    def finish(self) -> None:
        """Waits until all that was sent has left. AssertionError if anything was not read."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()
        left = [message for messages in self._incoming.values() for _, message in messages]
        assert not left, f"messages nobody read: {left[:3]}"
        assert not self._posted, f"messages nobody read: {list(self._posted)[:3]}"

    def _post(self, sender: int, beyond: int = 0) -> None:
        """Posts receives until AHEAD are unread, and `beyond` more."""
        waiting = self._incoming[sender]
        group, source = self._group_of(sender, self._rank), self._global_rank_of(sender)
        while waiting and (self._unread[sender] < AHEAD or beyond > 0):
            beyond -= self._unread[sender] >= AHEAD
            number, message = waiting.popleft()
            tensor = self._buffer_for(message.task.micro_batch)
            work = dist.irecv(tensor, source, group=group, tag=number)
            reading = clock_work = None
            if self._clock:
                reading = torch.empty(1, dtype=torch.float64)
                clock_work = dist.irecv(reading, source, group=group, tag=CLOCK_TAG + number)
            self._posted[message] = (number, tensor, work, reading, clock_work)
            self._unread[sender] += 1
