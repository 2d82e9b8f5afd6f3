"""Decoding: reads newcomers piece by piece, and lets all running answers take their steps as one batch."""

import asyncio
import contextlib
import copy
import logging
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, TemperatureLogitsWarper, TopPLogitsWarper

from modeling_constattn import split_cache, stack_caches

log = logging.getLogger("uvicorn.error")


@dataclass(eq=False)
class Job:
    """An answer in the making. `pieces` gets its text as it comes and None at its end, or what went wrong."""

    unread: list[int]  # tokens that the model has not read
    cache: Cache | None  # what it has; the session's own at first, and again a cache of its own when `finish` is set
    max_tokens: int
    temperature: float
    top_p: float
    generator: torch.Generator
    stop: list[str]
    is_owner: bool = False  # of the cache
    has_left: bool = False  # the client
    answer: list[int] = field(default_factory=list)  # tokens, without the end token
    shown: tuple[int, int] = (0, 0)  # answer[:shown[1]] is text; answer[shown[0]:] is decoded next, to see what it adds
    held: str = ""  # text that may be the beginning of a stop string
    finish: str | None = None  # OpenAI's finish_reason
    pending: list[int] = field(default_factory=list)  # at the end: the last token, where the model has not read it
    pieces: asyncio.Queue[str | Exception | None] = field(default_factory=asyncio.Queue)


class Engine:
    """Owns the model: reads newcomers piece by piece, and lets all running jobs take their steps as one batch."""

    def __init__(self, model: Any, tokenizer: Any, max_running: int, chunk_size: int):
        self.model, self.tokenizer, self.max_running, self.chunk_size = model, tokenizer, max_running, chunk_size
        ends = model.generation_config.eos_token_id
        self.ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.batch: Cache | None = None  # row i is that of running[i]
        self.wake = asyncio.Event()

    def submit(self, job: Job) -> None:
        self.waiting.append(job)
        self.wake.set()

    def leave(self, job: Job) -> None:
        """For jobs that nobody waits for any more: those that wait go at once, those that run after the step."""
        job.has_left = True
        with contextlib.suppress(ValueError):
            self.waiting.remove(job)

    async def run(self) -> None:
        with ThreadPoolExecutor(1, "model") as thread:
            while True:
                await self.wake.wait()
                while self.waiting or self.running:
                    try:
                        pieces: Any = await asyncio.get_running_loop().run_in_executor(thread, self.step)
                    except Exception as error:  # out of memory, say: these requests fail, the next ones need not
                        log.exception("a step of the model failed")
                        pieces = [(job, error) for job in (*self.running, *self.waiting)]
                        self.waiting.clear()
                        self.running, self.batch = [], None
                    for job, piece in pieces:
                        job.pieces.put_nowait(piece)
                self.wake.clear()

    @torch.no_grad()
    def step(self) -> list[tuple[Job, str | None]]:
        """Reads up to chunk_size tokens of newcomers, then one token for each running job. Returns what that gave."""
        pieces: list[tuple[Job, str | None]] = []
        joining: list[Job] = []
        budget = self.chunk_size
        while self.waiting and budget and len(self.running) + len(joining) < self.max_running:
            job = self.waiting.popleft()
            if job.has_left:
                continue
            if not job.is_owner:
                job.cache, job.is_owner = copy.deepcopy(job.cache), True
            chunk, job.unread = job.unread[:budget], job.unread[budget:]
            budget -= len(chunk)
            output = self._forward([chunk], job.cache)
            job.cache = output.past_key_values
            if job.unread:
                self.waiting.append(job)  # its turn comes again after the others'
            else:
                pieces += self._write(job, output.logits[0, -1])
                joining.append(job)
        pieces += self._regroup(joining)
        if self.running:
            logits = self._forward([job.answer[-1:] for job in self.running], self.batch).logits[:, -1]
            for job, row in zip(self.running, logits, strict=True):
                pieces += self._write(job, row)
            pieces += self._regroup([])
        return pieces

    def _forward(self, ids: list[list[int]], cache: Cache | None) -> Any:
        inputs = torch.tensor(ids, device=self.model.device)
        return self.model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def _regroup(self, joining: list[Job]) -> list[tuple[Job, None]]:
        """Lets jobs join and those that are finished or left go, each with its row of the batch."""
        if not joining and not any(job.finish or job.has_left for job in self.running):
            return []
        for job, row in zip(self.running, split_cache(self.batch) if self.batch else [], strict=True):
            job.cache = row
        everyone = self.running + joining
        self.running = [job for job in everyone if not job.finish and not job.has_left]
        self.batch = stack_caches([job.cache for job in self.running]) if self.running else None
        for job in self.running:
            job.cache = None  # it is in the batch
        return [(job, None) for job in everyone if job.finish]

    def _write(self, job: Job, logits: Tensor) -> list[tuple[Job, str]]:
        """Chooses the next token and returns the text that is certain by now; sets `finish` where it is the last."""
        scores = logits[None].float()
        if job.temperature == 0:
            token = int(scores.argmax())
        else:
            scores = TemperatureLogitsWarper(job.temperature)(None, scores)
            if job.top_p < 1:
                scores = TopPLogitsWarper(job.top_p)(None, scores)
            token = int(torch.multinomial(scores.softmax(-1), 1, generator=job.generator))
        if token in self.ends:
            job.finish, job.pending = "stop", []
        else:
            job.answer.append(token)
            job.pending = [token]
            if len(job.answer) == job.max_tokens:
                job.finish = "length"

        start, end = job.shown
        old, new = self._decode(job.answer[start:end]), self._decode(job.answer[start:])
        if job.finish or not new.endswith("\N{REPLACEMENT CHARACTER}"):  # otherwise the rest of a character is to come
            job.held += new[len(old) :]
            job.shown = (end, len(job.answer))
        found = [job.held.find(stop) for stop in job.stop if stop in job.held]
        if found:
            text, job.held, job.finish = job.held[: min(found)], "", "stop"
        else:
            sizes = (size for stop in job.stop for size in range(1, len(stop)) if job.held.endswith(stop[:size]))
            certain = len(job.held) if job.finish else len(job.held) - max(sizes, default=0)
            text, job.held = job.held[:certain], job.held[certain:]
        return [(job, text)] if text else []

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)
