"""Bytes of a file, wherever it lies, patiently: what fails is tried again for a while, then the run stops in order.

Rate limits (429), server errors, resets, stalls and short answers pass; so may "not found" and "forbidden" on a Hub under
load (datasets issues 7440 and 7506, torchtitan pull request 4830). No sample is ever skipped instead.
"""
from __future__ import annotations

import logging
import math
import random
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

import fsspec

from lars.refusal import hidden

log = logging.getLogger("lars")
T = TypeVar("T")

_VERSION_KEYS = ("blob_id", "ETag", "etag", "Last-Modified", "LastModified", "mtime")  # of fsspec's file systems
_FIRST_WAIT, _LONGEST_WAIT, _BETWEEN_WARNINGS = 0.5, 30.0, 10.0  # seconds


class DataError(RuntimeError):
    """The data cannot be read any more, or are not those the run began with. What was trained so far is saved."""

    again = "; once the data are there, start the same command again to go on"

    def __str__(self) -> str:
        return hidden(super().__str__())


class BadImages(DataError):
    """More images are damaged than the recipe allows, which no second start can mend."""

    again = ""

    @classmethod
    def beyond(cls, bad: int, read: int, allowed: float) -> BadImages | None:
        """What is wrong with `bad` of `read` images, if that is a larger share than `allowed`."""
        least = math.ceil(bad / read * 1e4) / 1e4
        return None if bad <= allowed * read else cls(
            f"{bad} images could not be decoded (named above), more than data.max_bad_fraction={allowed:g} allows: "
            f"repair the data, or allow data.max_bad_fraction={least:g} or more; either is another run, so give another run_dir"
        )


class DecoderError(DataError):
    """A decoder failed, and not for what an image holds."""

    again = "; with that out of the way, start the same command again to go on"


class Source:
    """The file system on which `example`, one of a data set's files, lies."""

    def __init__(self, example: str, retry_seconds: float) -> None:
        self.retry_seconds, self.warned = retry_seconds, 0.0
        options: dict[str, Any] = {"skip_instance_cache": True}  # no connection is shared with the process that forked this one
        if example.startswith(("http://", "https://")):
            import aiohttp

            silent = min(30.0, retry_seconds / 4)  # aiohttp's own limit is five minutes for the whole answer
            options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=silent, sock_read=silent)}
        self.files, _ = fsspec.url_to_fs(example, **options)
        self.local = "file" in (self.files.protocol if isinstance(self.files.protocol, tuple) else (self.files.protocol,))

    def state(self, path: str) -> str:
        """Size and version (time of change, ETag) of a file; it is another one after any change."""
        return self._patiently(path, lambda: self._state(path))

    def read(self, path: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file.

        Raises:
            DataError: they cannot be had within `retry_seconds`.
        """

        def once() -> bytes:
            data = self.files.cat_file(path, start=start, end=stop)
            if len(data) != stop - start:
                raise OSError(f"{len(data)} bytes came instead of {stop - start}")
            return data

        return self._patiently(path, once)

    def _state(self, path: str) -> str:
        info = self.files.info(path)
        version = next((str(info[key]) for key in _VERSION_KEYS if info.get(key)), "")
        if info.get("size") is None:
            raise OSError("the server does not tell its size")
        return f"{info['size']} {version}".strip()

    def _patiently(self, path: str, action: Callable[[], T]) -> T:
        started, wait = time.monotonic(), _FIRST_WAIT
        while True:
            try:
                return action()
            except Exception as error:  # each file system has classes of its own for the same trouble
                now = time.monotonic()
                pause = min(max(wait * random.uniform(0.5, 1.5), _retry_after(error)), _LONGEST_WAIT)
                if now + pause - started > self.retry_seconds or self.local and isinstance(error, FileNotFoundError):
                    raise DataError(f"{_bare(path)} cannot be read{_explain(error)} (data.retry_seconds={self.retry_seconds:g})") from None
                if now - self.warned > _BETWEEN_WARNINGS:
                    self.warned = now
                    log.warning("%s cannot be read at present%s; trying again for %.0f s", _bare(path), _explain(error), self.retry_seconds)
                time.sleep(pause)
                wait *= 2


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error of aiohttp or of the Hub's client."""
    return getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)


def _retry_after(error: BaseException) -> float:
    headers = getattr(error, "headers", None) or getattr(getattr(error, "response", None), "headers", None) or {}
    value = str(headers.get("Retry-After", "0"))
    return float(value) if value.isdigit() else 0.0


def _explain(error: BaseException) -> str:
    status = _status(error)
    if status in (401, 403):
        return f": the server answers {status}, credentials are missing or have expired (`hf auth login`, or HF_TOKEN, on every node)"
    return f": {_bare(f'{type(error).__name__}: {error}')}"


def _bare(text: str) -> str:
    """Without what may be a signature or a token in an address, in one line."""
    return re.sub(r"\?[^\s'\")]*", "?…", re.sub(r"//[^/\s@]*@", "//…@", " ".join(text.split())))[:300]
