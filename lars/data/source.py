"""Bytes of a file, wherever it lies, patiently: what fails is tried again for a while, then the run stops in order.

Rate limits (429), server errors, resets, stalls and short answers pass; so may "not found" and "forbidden" on a Hub
under load (datasets issues 7440 and 7506, torchtitan pull request 4830). No sample is ever skipped instead.
"""

from __future__ import annotations

import logging
import math
import random
import re
import time
from base64 import b64encode
from collections.abc import Callable
from typing import Any, TypeVar

import fsspec
from fsspec.config import conf
from fsspec.implementations.local import LocalFileSystem

from lars.recipe.refusal import hidden

log = logging.getLogger("lars")
T = TypeVar("T")

_VERSION_KEYS = ("blob_id", "ETag", "etag", "Last-Modified", "LastModified", "mtime")  # of fsspec's file systems
_OURS = {"range", "if-match", "accept", "accept-encoding", "user-agent"}  # headers that any server may see
_FIRST_WAIT, _LONGEST_WAIT, _BETWEEN_WARNINGS = 0.5, 30.0, 10.0  # seconds


def size_in(state: str) -> int:
    """Bytes of a file, from its `Source.state`."""
    return int(state.split()[0])


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
        if bad <= allowed * read:
            return None
        return cls(
            f"{bad} images could not be decoded (named above), more than data.max_bad_fraction={allowed:g} allows: "
            f"repair the data, or allow data.max_bad_fraction={least:g}"
            " or more; either is another run, so give another run_dir"
        )


class DecoderError(DataError):
    """A decoder failed, and not for what an image holds."""

    again = "; with that out of the way, start the same command again to go on"


class Source:
    """The file system on which `example`, one of a data set's files, lies."""

    def __init__(self, example: str, retry_seconds: float) -> None:
        self.retry_seconds, self.warned = retry_seconds, 0.0
        # No connection is shared with the process that forked this one.
        options: dict[str, Any] = {"skip_instance_cache": True}
        self.http = example.startswith(("http://", "https://"))
        self.at_commit = example.startswith("hf://datasets/") and "@" in example  # what `datasets` gives for a Hub id
        if self.http:
            options["client_kwargs"] = _client(min(30.0, retry_seconds / 4))
        self.files, _ = fsspec.url_to_fs(example, **options)
        self.local = isinstance(self.files, LocalFileSystem)

    def state(self, path: str) -> str:
        """Size and version (time of change, ETag) of a file; it is another one after any change."""
        return self._patiently(path, lambda: self._state(path))

    def settled(self, state: str) -> bool:
        """Whether a read can only give the file of this state: its state need not be asked for again."""
        return self.at_commit or bool(self._condition(state))

    def read(self, path: str, start: int, stop: int, state: str = "") -> bytes:
        """Bytes [start, stop) of a file; of the file of this state where the server can tell.

        Raises:
            DataError: they cannot be had within `retry_seconds`, or never.
        """
        how = {}
        if etag := self._condition(state):
            how = {"headers": {**self.files.kwargs.get("headers", {}), "If-Match": etag}}

        def once() -> bytes:
            data = self.files.cat_file(path, start=start, end=stop, **how)
            if len(data) < stop - start and self.local:
                raise DataError(f"{path} ends {stop - start - len(data):,} bytes before byte {stop:,}: it is cut off")
            if len(data) != stop - start:
                raise OSError(f"{len(data)} bytes came instead of {stop - start}")
            return data

        return self._patiently(path, once)

    def _condition(self, state: str) -> str:
        """A strong ETag. It goes into If-Match: where If-Range does not hold, a server sends the whole file instead."""
        version = state.partition(" ")[2]
        return version if self.http and version.startswith('"') else ""

    def _state(self, path: str) -> str:
        if not self.at_commit:
            self.files.invalidate_cache()  # of listings
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
                if hopeless := next((e for e in causes(error) if isinstance(e, DataError)), None):
                    raise DataError(str(hopeless)) from None
                if _status(error) == 412:
                    remedy = "put it back, or give this run its own run_dir=..."
                    raise DataError(f"{_bare(path)} has changed since the run began: {remedy}") from None
                now = time.monotonic()
                pause = min(max(wait * random.uniform(0.5, 1.5), _retry_after(error)), _LONGEST_WAIT)
                if now + pause - started > self.retry_seconds or self.local and isinstance(error, FileNotFoundError):
                    raise DataError(
                        f"{_bare(path)} cannot be read{_explain(error)} (data.retry_seconds={self.retry_seconds:g})"
                    ) from None
                if now - self.warned > _BETWEEN_WARNINGS:
                    self.warned = now
                    log.warning(
                        "%s cannot be read at present%s; trying again for %.0f s",
                        _bare(path),
                        _explain(error),
                        self.retry_seconds,
                    )
                time.sleep(pause)
                wait *= 2


def _client(silent: float) -> dict[str, Any]:
    """How HTTP is spoken: as the user configured for fsspec, at most `silent` seconds without a byte, and two refusals.

    aiohttp follows redirects from https to http, and takes along all credentials but a request's Authorization and
    Cookie headers: cookies and `auth` of the session, and headers like X-Api-Key. So all are made headers, and dropped.
    """
    import aiohttp
    from yarl import URL

    async def redirected(session: Any, context: Any, asked: Any) -> None:
        target = asked.url.join(URL(asked.response.headers.get("Location", "")))
        if target.scheme != asked.url.scheme:
            places = f"{_bare(str(asked.url))} redirects to another scheme, {_bare(str(target))}"
            raise DataError(f"{places}: give that as data.path if you trust it")
        if target.origin() != asked.url.origin():
            for name in {name for name in asked.headers if name.lower() not in _OURS}:
                asked.headers.popall(name)

    async def answered(session: Any, context: Any, asked: Any) -> None:
        if "Range" in asked.headers and asked.response.status == 200:
            asked.response.close()  # it may be as large as it likes
            remedy = "copy them into a folder and give that as data.path"
            raise DataError(f"{_bare(str(asked.url))}: the server ignores ranges and sends whole files; {remedy}")

    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(redirected)
    trace.on_request_end.append(answered)
    client = dict({**conf.get("http", {}), **conf.get("https", {})}.get("client_kwargs", {}))
    headers = dict(client.pop("headers", {}))
    if cookies := client.pop("cookies", None):
        headers["Cookie"] = "; ".join(f"{name}={value}" for name, value in cookies.items())
    if auth := client.pop("auth", None):
        headers["Authorization"] = f"Basic {b64encode(':'.join(auth).encode()).decode()}"
    # aiohttp's own is five minutes for an answer.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=silent, sock_read=silent)
    return {**client, "headers": headers, "timeout": timeout, "trace_configs": [trace]}


def causes(error: BaseException | None) -> list[BaseException]:
    """An error and what it came from."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error of aiohttp or of the Hub's client."""
    statuses = (
        getattr(e, "status", None) or getattr(getattr(e, "response", None), "status_code", None) for e in causes(error)
    )
    return next(filter(None, statuses), None)


def _retry_after(error: BaseException) -> float:
    headers = getattr(error, "headers", None) or getattr(getattr(error, "response", None), "headers", None) or {}
    value = str(headers.get("Retry-After", "0"))
    return float(value) if value.isdigit() else 0.0


def _explain(error: BaseException) -> str:
    status = _status(error)
    if status in (401, 403):
        why = "credentials are missing or have expired (`hf auth login`, or HF_TOKEN, on every node)"
        return f": the server answers {status}, {why}"
    return f": {_bare(f'{type(error).__name__}: {error}')}"


def _bare(text: str) -> str:
    """Without what may be a signature or a token in an address, in one line."""
    return re.sub(r"\?[^\s'\")]*", "?…", re.sub(r"//[^/\s@]*@", "//…@", " ".join(text.split())))[:300]
