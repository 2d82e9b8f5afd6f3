"""Decoding: reads newcomers piece by piece, and lets all running answers take their steps as one batch.

A fault stays with the job that caused it. Each token is chosen for its own job. Where to read some newcomers together fails, each
is read by itself. When the step that all take together fails, nobody can say whose fault it was, nor what it has left of the
states: so each of these jobs is read once more from where it began, and goes on by itself to its end.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, TopPLogitsWarper

from lib.serving.protocol import RequestError
from modeling_constattn import cache_nbytes, split_cache, stack_caches

log = logging.getLogger("uvicorn.error")


class StopStrings:
    """Finds the first of some strings in a text that comes in pieces, in a time that does not hang on their lengths."""

    def __init__(self, strings: list[str]):
        self.strings, self.matched = strings, [0] * len(strings)  # characters of each that the text ends with
        self.borders = [self._borders(string) for string in strings]  # Knuth, Morris & Pratt 1977
        self.held = ""  # text that may be the beginning of one

    @staticmethod
    def _borders(string: str) -> list[int]:
        """For each prefix, the longest shorter one that it ends with."""
        borders, size = [0], 0
        for character in string[1:]:
            while size and string[size] != character:
                size = borders[size - 1]
            size += string[size] == character
            borders.append(size)
        return borders

    def read(self, text: str) -> tuple[str, bool]:
        """The text that is certain by now, and whether a stop string has ended it."""
        for position, character in enumerate(text):
            for number, (string, borders) in enumerate(zip(self.strings, self.borders, strict=True)):
                size = self.matched[number]
                while size and string[size] != character:
                    size = borders[size - 1]
                size += string[size] == character
                self.matched[number] = size
                if size == len(string):
                    whole = self.held + text[: position + 1]
                    return whole[: len(whole) - size], True
        whole = self.held + text
        certain = len(whole) - max(self.matched, default=0)
        self.held = whole[certain:]
        return whole[:certain], False


@dataclass(eq=False)
class Job:
    """An answer in the making. `pieces` gets its text as it comes and None at its end, or what went wrong."""

    prompt: list[int]  # tokens that the model has not read
    start: Cache | None  # what it has: the session's own, never written to
    max_tokens: int
    temperature: float
    top_p: float
    generator: torch.Generator
    stop: StopStrings
    answer: list[int] = field(default_factory=list)  # tokens, without the end token
    finish: str | None = None  # OpenAI's finish_reason, or "error"
    pending: list[int] = field(default_factory=list)  # at the end: the last token, where the model has not read it
    pieces: asyncio.Queue[str | Exception | None] = field(default_factory=asyncio.Queue)
    has_left: bool = False  # the client

    cache: Cache | None = None  # its own; None before it is read and while it is a row of the batch
    unread: list[int] = field(default_factory=list)
    is_alone: bool = False  # after a step with others that failed
    shown: tuple[int, int] = (0, 0)  # answer[:shown[1]] is text; answer[shown[0]:] is decoded next, to see what it adds
    written: int = 0  # characters of it that have been given out

    def __post_init__(self) -> None:
        self.unread = self.prompt


class Engine:
    """Owns the model."""

    def __init__(self, model: Any, tokenizer: Any, max_running: int, chunk_size: int):
        self.model, self.tokenizer, self.max_running, self.chunk_size = model, tokenizer, max_running, chunk_size
        ends = model.generation_config.eos_token_id
        self.ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
        self.jobs: set[Job] = set()  # all that have not got their end yet
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.batch: Cache | None = None  # row i is that of running[i]
        self.row_nbytes = 0  # of the batch
        self.alone: list[Job] = []  # running too, each with a cache of its own
        self.pieces: list[tuple[Job, str | Exception | None]] = []  # what a step has given so far
        self.wake = asyncio.Event()
        self.observe_step: Callable[[float], None] = lambda seconds: None

    def submit(self, job: Job) -> None:
        self.jobs.add(job)
        self.waiting.append(job)
        self.wake.set()

    def leave(self, job: Job) -> None:
        """For jobs that nobody waits for any more: those that wait go at once, those that run after the step."""
        job.has_left = True
        self.jobs.discard(job)
        with contextlib.suppress(ValueError):
            self.waiting.remove(job)

    def stop(self) -> None:
        """Ends all jobs with an error."""
        for job in list(self.jobs):
            job.pieces.put_nowait(RequestError(503, "the server is shutting down"))
            self.leave(job)

    async def run(self) -> None:
        """Takes steps in a thread of its own for as long as there are jobs, until it is cancelled."""
        with ThreadPoolExecutor(1, "model") as thread:
            while True:
                await self.wake.wait()
                while self.waiting or self.running or self.alone:
                    began = time.perf_counter()
                    try:
                        await asyncio.get_running_loop().run_in_executor(thread, self.step)
                    except Exception as error:  # none is known that gets here; but nobody is to wait for ever
                        log.exception("decoding failed")
                        self.pieces += [(job, error) for job in self.jobs]
                        self.waiting.clear()
                        self.running, self.batch, self.alone = [], None, []
                    self.observe_step(time.perf_counter() - began)
                    pieces, self.pieces = self.pieces, []
                    for job, piece in pieces:
                        if job in self.jobs:
                            job.pieces.put_nowait(piece)
                        if not isinstance(piece, str):
                            self.jobs.discard(job)
                    # Who waits for a piece wakes, and sends it, before the next step takes the processors.
                    await asyncio.sleep(0)
                    await asyncio.sleep(0)
                self.wake.clear()

    @torch.no_grad()
    def step(self) -> None:
        """Reads up to chunk_size tokens of newcomers, then one token for each running job."""
        newcomers: dict[object, list[tuple[Job, list[int]]]] = {}
        budget = self.chunk_size
        room = self.max_running - len(self.running) - len(self.alone)
        while self.waiting and budget and room:
            job = self.waiting.popleft()
            if job.has_left:
                continue
            piece, job.unread = job.unread[:budget], job.unread[budget:]
            budget -= len(piece)
            room -= 1
            # Together are read those that begin a state, or go on with one, and of these pieces of about one length: so less than
            # half of what the model reads is padding.
            alike = job if job.is_alone else (job.cache or job.start) is None, len(piece).bit_length()
            newcomers.setdefault(alike, []).append((job, piece))
        joining = [job for group in newcomers.values() for job in self._read(group)]
        try:
            self._regroup(joining)
            if self.running:
                output = self._forward([job.answer[-1:] for job in self.running], self.batch)
                self._choose(self.running, output.logits[:, -1])
                self._regroup([])
        except Exception:
            jobs = self.running + [job for job in joining if job not in self.running]
            log.exception("a step of %d answers failed; each goes on by itself", len(jobs))
            self._separate(jobs)
        for job in self.alone:
            if not job.finish and not job.has_left:
                try:
                    output = self._forward([job.answer[-1:]], job.cache)
                except Exception as error:
                    self._fail(job, error)
                else:
                    self._choose([job], output.logits[:, -1])
        self.pieces += [(job, None) for job in self.alone if job.finish not in (None, "error")]
        self.alone = [job for job in self.alone if not job.finish and not job.has_left]

    def _read(self, newcomers: list[tuple[Job, list[int]]]) -> list[Job]:
        """Reads a piece of each; those that are to join the running ones."""
        jobs, pieces = zip(*newcomers, strict=True)
        try:
            starts = [job.cache or job.start for job in jobs]  # all or none: these are not written to
            output = self._forward(pieces, None if starts[0] is None else stack_caches(starts))
            rows = split_cache(output.past_key_values)
        except Exception as error:
            if len(jobs) > 1:
                return [job for newcomer in newcomers for job in self._read([newcomer])]
            self._fail(jobs[0], error)
            return []
        for job, row in zip(jobs, rows, strict=True):
            job.cache = row
        self._choose(jobs, output.logits[:, -1])
        self.waiting += [job for job in jobs if job.unread]  # their turn comes again after the others'
        read = [job for job in jobs if not job.unread and job.finish != "error"]
        self.alone += [job for job in read if job.is_alone]
        return [job for job in read if not job.is_alone]

    def _separate(self, jobs: list[Job]) -> None:
        """Has each read again what it has read and written."""
        self.running, self.batch = [], None
        for job in reversed(jobs):
            if job.finish == "error" or job.has_left:
                continue
            job.cache, job.is_alone = None, True
            read = job.answer[: -len(job.pending)] if job.finish and job.pending else job.answer
            job.unread = job.prompt + read
            self.waiting.appendleft(job)

    def _fail(self, job: Job, error: Exception) -> None:
        log.error("an answer failed", exc_info=error)
        job.finish = "error"
        self.pieces.append((job, error))

    def _forward(self, ids: Sequence[list[int]], cache: Cache | None) -> Any:
        """Shorter rows are padded on the left: the logits kept are those after the last token of each."""
        lengths = torch.tensor([len(row) for row in ids])
        longest = int(lengths.max())
        inputs = torch.tensor([[0] * (longest - len(row)) + row for row in ids], device=self.model.device)
        mask = None
        if lengths.min() < longest:
            mask = (torch.arange(longest) >= longest - lengths[:, None]).to(self.model.device)
        return self.model(inputs, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def _regroup(self, joining: list[Job]) -> None:
        """Lets jobs join and those that are finished or left go, each with its row of the batch."""
        if not joining and not any(job.finish or job.has_left for job in self.running):
            return
        for job, row in zip(self.running, split_cache(self.batch) if self.batch else [], strict=True):
            job.cache = row
        everyone = self.running + joining
        staying = [job for job in everyone if not job.finish and not job.has_left]
        self.batch = stack_caches([job.cache for job in staying]) if staying else None
        self.running = staying
        if staying:
            self.row_nbytes = cache_nbytes(self.batch) // len(staying)
        for job in staying:
            job.cache = None  # it is in the batch
        self.pieces += [(job, None) for job in everyone if job.finish not in (None, "error")]

    def _choose(self, jobs: Sequence[Job], logits: Tensor) -> None:
        """Writes the next token of each job that has been read and is not finished, by its row of [n,vocabulary]."""
        logits = logits.float()
        likeliest, is_finite = logits.argmax(-1).tolist(), logits.isfinite().all(-1).tolist()
        for row, job in enumerate(jobs):
            if job.unread or job.finish:
                continue
            try:
                if not is_finite[row]:
                    raise ValueError("the model gave no finite numbers")
                self._write(job, likeliest[row] if job.temperature == 0 else self._draw(job, logits[row]))
            except Exception as error:
                self._fail(job, error)

    def _draw(self, job: Job, scores: Tensor) -> int:
        # from the largest down, and by no less than that: so the smallest temperature gives no inf − inf
        scores = (scores - scores.max()) / max(job.temperature, 1e-30)
        if job.top_p < 1:
            scores = TopPLogitsWarper(job.top_p)(None, scores[None])[0]
        return int(torch.multinomial(scores.softmax(-1), 1, generator=job.generator))

    def _write(self, job: Job, token: int) -> None:
        """Gives out the text that is certain by now; sets `finish` where the token is the last."""
        if token in self.ends:
            job.finish, job.pending = "stop", []
        else:
            job.answer.append(token)
            job.pending = [token]
            if len(job.answer) == job.max_tokens:
                job.finish = "length"
        text, is_stopped = job.stop.read(self._new_text(job))
        if is_stopped:
            job.finish = "stop"
        elif job.finish:
            text += job.stop.held
        if text:
            self.pieces.append((job, text))

    def _new_text(self, job: Job) -> str:
        """What the last tokens add; of a character that may come in pieces, the bytes are held back until it is complete."""
        start, end = job.shown
        text = self._decode(job.answer[start:])
        broken = len(text) - len(text.rstrip("\N{REPLACEMENT CHARACTER}"))
        held = 0 if job.finish else min(broken, 3)  # a character has four bytes at most
        new = text[job.written : len(text) - held]
        job.written = max(job.written, len(text) - held)
        if (
            not broken or len(job.answer) - start > 16
        ):  # what is decoded again stays short, and begins where a character does
            job.shown = (end, len(job.answer)) if not broken else (len(job.answer) - 4,) * 2
            job.written = len(self._decode(job.answer[job.shown[0] :])) - held
        return new

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)
