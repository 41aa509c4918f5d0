"""A model repository on the Hub at one commit: its checksums, parts of its files, and whole files, continued.

Addresses and authentication are huggingface_hub's. The bytes are read here, because a shard is to be continued after a
kill and to get its name only when its checksum is the one that the Hub names. The token goes to the Hub alone, never to
the servers of its storage that the Hub redirects to, and messages hold no address, of which some are signed.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import random
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

from qconv.errors import CheckpointError, OutputError

T = TypeVar("T")

READ_BYTES = 2**20
TIMEOUT_SECONDS = 60.0
"""Without a byte for so long a connection is given up."""
ATTEMPTS = 8
"""In a row that bring nothing new, before a file is given up."""
BODIES = 3
"""With a wrong checksum, before a file is given up."""
_LONGEST_PAUSE = 30.0
_PASSING = (408, 425, 429, 500, 502, 503, 504)
_FAILURES = (OSError, http.client.HTTPException)


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository.

    Attributes:
        name: Relative to the repository.
        size: In bytes.
        sha256: Of a file in the Hub's large storage, hexadecimal; None for one that Git holds.
        blob: Git's name of a file that Git holds: the SHA-1 of a header and its bytes.
    """

    name: str
    size: int
    sha256: str | None
    blob: str | None

    def is_sound(self, path: Path) -> bool:
        """Whether a local file is this one, to the byte.

        Raises:
            OSError: it cannot be read.
        """
        if path.stat().st_size != self.size:
            return False
        digest = hashlib.sha256()
        if self.sha256 is None:
            digest = hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        with path.open("rb") as file:
            while block := file.read(READ_BYTES):
                digest.update(block)
        return digest.hexdigest() == (self.sha256 or self.blob)


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository at one commit.

    Attributes:
        name: ``owner/name``, as the Hub spells it.
        commit: The commit's full name.
        files: What it holds, by name.
        endpoint: The Hub's address; None for huggingface_hub's own.
        pause: Seconds before the first repetition; each one after it waits twice as long, at most 30 s.
    """

    name: str
    commit: str
    files: Mapping[str, RemoteFile]
    endpoint: str | None = None
    pause: float = 0.5

    @classmethod
    def open(cls, model: str, *, endpoint: str | None = None, pause: float = 0.5) -> Self:
        """Resolve ``owner/name[@revision]`` once, and list its files with their checksums: one request.

        Raises:
            CheckpointError: the Hub cannot be reached, or has no such repository for this token.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        name, _, revision = model.partition("@")
        try:
            info = HfApi(endpoint=endpoint).model_info(name, revision=revision or None, files_metadata=True)
        except (HfHubHTTPError, *_FAILURES) as error:
            raise CheckpointError(
                f"{model}: its files cannot be listed on the Hub: {_said(error)}.",
                hint="Check the spelling, the network and HF_TOKEN.",
            ) from None  # the client's own error holds addresses
        files = {
            one.rfilename: RemoteFile(
                one.rfilename, one.size, None if one.lfs is None else one.lfs["sha256"], one.blob_id
            )
            for one in info.siblings or ()
            if one.size is not None
        }
        if info.sha is None or not files:
            raise CheckpointError(f"{model}: the Hub lists no files.", hint="Check the spelling and the revision.")
        return cls(info.id, info.sha, files, endpoint, pause)

    def locate(self, name: str) -> str:
        """Where a file's bytes are served, redirects followed once, so that many parts of it cost a request each.

        Raises:
            CheckpointError: as :meth:`part`.
        """
        return self._retried(name, lambda: self._ask(name, self._address(name), 0, 1)[1])

    def part(self, name: str, start: int, count: int, where: str | None = None) -> bytes:
        """Some bytes of a file.

        Args:
            name: The file's.
            start: Their offset.
            count: How many; fewer at the file's end.
            where: What :meth:`locate` gave.

        Raises:
            CheckpointError: they cannot be had.
        """
        count = min(count, self.files[name].size - start)
        if count <= 0:
            return b""

        def ask() -> bytes:
            found = self._ask(name, where or self._address(name), start, count)[0]
            if len(found) != count:
                raise ConnectionError("the answer ended early")
            return found

        return self._retried(name, ask)

    def fetch(self, name: str, partial: Path, path: Path, stopped: threading.Event) -> bool:
        """Bring a whole file, going on with what an earlier call or process left of it.

        Args:
            name: The file's.
            partial: Where its bytes are collected.
            path: What it is called once its checksum is right.
            stopped: Ends the call early.

        Returns:
            Whether it is there; False if it was stopped.

        Raises:
            CheckpointError: the Hub does not give it, or gives other bytes than it names.
            OutputError: the disk is full or failed.
        """
        file = self.files[name]
        for _ in range(BODIES):
            if not self._complete(file, partial, stopped):
                return False
            if file.is_sound(partial):
                with partial.open("rb") as done:
                    os.fsync(done.fileno())
                partial.replace(path)
                return True
            partial.unlink()
        raise CheckpointError(
            f"{self.name}: {name} came {BODIES} times with a checksum that is not the Hub's.",
            hint="Something between here and the Hub damages what it carries; the same command continues.",
        )

    def _complete(self, file: RemoteFile, partial: Path, stopped: threading.Event) -> bool:
        """Append to a partial file until it has the file's size."""
        failed, pause = 0, self.pause
        partial.touch()
        while (have := partial.stat().st_size) != file.size:
            if stopped.is_set():
                return False
            if have > file.size:
                os.truncate(partial, 0)
                continue
            try:
                self._append(file, partial, have, stopped)
            except OutputError:
                raise
            except _FAILURES as error:
                self._require_passing(file.name, error)
                grew = partial.stat().st_size > have
                failed, pause = (0, self.pause) if grew else (failed + 1, min(2 * pause, _LONGEST_PAUSE))
                if failed == ATTEMPTS:
                    raise self._given_up(file.name, error) from None
                stopped.wait(pause * random.uniform(0.5, 1.0))
        return True

    def _append(self, file: RemoteFile, partial: Path, have: int, stopped: threading.Event) -> None:
        """One answer's bytes, from where the partial file ends."""
        with self._opened(self._address(file.name), have, None) as answer:
            if answer.status != 206 or _first(answer) != have:
                # The whole file, though a part was asked for.
                if answer.status == 206:
                    raise ConnectionError("the answer is another part of the file")
                have = 0
            with partial.open("r+b") as target:
                target.truncate(have)
                target.seek(have)
                while have < file.size and not stopped.is_set():
                    block = answer.read1(min(READ_BYTES, file.size - have))
                    if not block:
                        raise ConnectionError("the answer ended early")
                    try:
                        target.write(block)
                    except OSError as error:
                        raise OutputError(f"{partial}: {error.strerror}.", hint="Free some space.") from error
                    have += len(block)

    def _ask(self, name: str, address: str, start: int, count: int) -> tuple[bytes, str]:
        """Some bytes, and from where they came in the end."""
        with self._opened(address, start, count) as answer:
            if answer.status == 206 and _first(answer) != start:
                raise ConnectionError("the answer is another part of the file")
            if answer.status != 206 and start:
                answer.read(start)  # a server without ranges gives the whole
            return answer.read(count), answer.geturl()

    def _opened(self, address: str, start: int, count: int | None) -> http.client.HTTPResponse:
        from huggingface_hub.utils._headers import build_hf_headers

        stop = "" if count is None else str(start + count - 1)
        request = urllib.request.Request(address, headers={"Range": f"bytes={start}-{stop}"})
        for key, value in build_hf_headers(library_name="qconv").items():
            if key.lower() != "authorization":
                request.add_header(key, value)
            elif address.startswith(self._base()):
                request.add_unredirected_header(key, value)
        try:
            answer: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
        except urllib.error.HTTPError as error:
            error.close()  # which holds the connection
            raise
        return answer

    def _retried(self, name: str, ask: Callable[[], T]) -> T:
        """What a request gives, made again where its failure may pass."""
        pause = self.pause
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return ask()
            except _FAILURES as error:
                self._require_passing(name, error)
                if attempt == ATTEMPTS:
                    raise self._given_up(name, error) from None
                time.sleep(pause * random.uniform(0.5, 1.0))
                pause = min(2 * pause, _LONGEST_PAUSE)
        raise AssertionError("unreachable")

    def _require_passing(self, name: str, error: Exception) -> None:
        """Raise at once what repeating does not mend."""
        if isinstance(error, urllib.error.HTTPError) and error.code not in _PASSING:
            raise CheckpointError(
                f"{self.name}: {name}: the Hub refuses it: {_said(error)}.",
                hint="Check HF_TOKEN, and that the model's licence is accepted on its page.",
            ) from None

    def _given_up(self, name: str, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{self.name}: {name} cannot be had from the Hub: {_said(error)}, {ATTEMPTS} times in a row.",
            hint="Check the network; the same command continues inside the file.",
        )

    def _base(self) -> str:
        from huggingface_hub import constants

        return (self.endpoint or constants.ENDPOINT).rstrip("/") + "/"

    def _address(self, name: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.name, name, revision=self.commit, endpoint=self.endpoint)


def _first(answer: http.client.HTTPResponse) -> int:
    """The offset of a partial answer's first byte; -1 if it does not say."""
    found = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
    return int(found[1]) if found else -1


def _said(error: Exception) -> str:
    """An error in words that hold no address: those of the Hub's storage are signed."""
    status = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "code", None)
    if status is not None:
        return f"HTTP status {status}"
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None)
    return str(reason) if isinstance(reason, (str, OSError)) else type(error).__name__
