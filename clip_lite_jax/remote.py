"""Files that are not on this machine, ``s3://``, ``gs://`` and whatever else fsspec knows.

A `RemotePath` stands where a `Path` would.  What opens it (it is an ``os.PathLike``) gets a local
copy, made once of each version of the object; parts of it are read without one.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import io
import os
import posixpath
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, Generic, NamedTuple, TypeVar
from urllib.parse import quote, unquote

import fsspec
from fsspec.callbacks import TqdmCallback

from clip_lite_jax.errors import DataError
from clip_lite_jax.files import cache_folder, replacing
from clip_lite_jax.remote_errors import is_final, is_refusal, unhidden, words

Result = TypeVar("Result")

WAITS = (0.5, 2.0, 5.0)
"""Seconds before each further attempt at what may go better the next time."""
PATIENCE = 30.0
"""Seconds after which there is none: some packages try for longer by themselves."""
PART = 2**23
"""Bytes of a request where a file is read from end to end."""
SHOWN_BYTES = 2**26
"""A larger download shows how far it is."""

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
"""The extra of this package that a protocol needs."""

TAGS = (
    *("ETag", "etag", "md5Hash", "generation", "Content-MD5", "Digest", "sha", "blob_id"),
    *("mtime", "LastModified", "last_modified", "Last-Modified", "modified", "modify", "updated"),
    *("modificationTime", "created"),
)
"""What file systems call that which changes when an object does; the first that there is counts."""


class Known(NamedTuple):
    """What a file system says of an object."""

    type: str = "nothing"
    """``file``, ``directory``, or ``nothing`` where there is none."""
    size: int | None = None
    tag: str = ""

    @classmethod
    def of(cls, info: dict[str, Any]) -> Known:
        tag = next((info[name] for name in TAGS if info.get(name)), "")
        # A listing may give a time as a number, and a single answer as a date.
        tag = tag.timestamp() if hasattr(tag, "timestamp") else tag
        return cls(info["type"], info.get("size"), str(tag))


class _Once(Generic[Result]):
    """A ``cached_property`` without the lock that all instances share on Python 3.11.

    With 3.12 as the oldest Python it can be that.
    """

    def __init__(self, function: Callable[[Any], Result]) -> None:
        self.function = function

    def __get__(self, instance: Any, owner: type) -> Result:
        found = vars(instance)[self.function.__name__] = self.function(instance)
        return found


@dataclass(frozen=True)
class RemotePath(os.PathLike[str]):
    """A file or folder by its URL.

    What is not there is a ``FileNotFoundError``, as of a `Path`; all else that goes wrong, some of
    it after a few attempts, is a `DataError`.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    def __fspath__(self) -> str:
        return str(self.copy)

    def __truediv__(self, name: str) -> RemotePath:
        """What lies below; raises `DataError` for names that lead anywhere else."""
        plain = posixpath.normpath(name)
        parts = re.split(r"[/\\]", plain)
        if plain == ".":
            raise DataError(f"no path: {name!r}")
        if not parts[0] or ".." in parts or "://" in name or "\x00" in name:
            raise DataError(f"the path leaves {self}")
        if self._is_http and "?" in self.url:
            raise DataError(f"{self}: the address of a folder cannot have a query after it")
        if self._is_http:
            return self._child(quote(plain))
        # File systems may read more into a name: the version of an object, or line breaks to drop.
        child, kind = self._child(plain), _system_class(self.url)
        options = kind._get_kwargs_from_urls(self.url) == kind._get_kwargs_from_urls(child.url)
        if child._path != f"{self._path.rstrip('/')}/{plain}" or not options:
            raise DataError(f"a name that means something else in {self}: {name!r}")
        return child

    @property
    def name(self) -> str:
        return self._pure.name

    @property
    def stem(self) -> str:
        return self._pure.stem

    @property
    def suffix(self) -> str:
        return self._pure.suffix

    @property
    def parent(self) -> RemotePath:
        """The folder; of a bucket itself."""
        protocol, _, rest = self.url.partition("://")
        above = (rest.split("?")[0] if self._is_http else rest).rstrip("/").rpartition("/")[0]
        return RemotePath(f"{protocol}://{above}") if above.strip("/") else self

    def with_name(self, name: str) -> RemotePath:
        return self.parent._child(name)

    def with_suffix(self, suffix: str) -> RemotePath:
        return self.with_name(self.stem + suffix)

    def relative_to(self, folder: RemotePath) -> PurePosixPath:
        rest = self._path.removeprefix(folder._path).strip("/")
        return PurePosixPath(unquote(rest) if self._is_http else rest)

    @_Once
    def known(self) -> Known:
        try:
            return Known.of(self._ask(lambda system, path: system.info(path)))
        except FileNotFoundError:
            return Known()

    def is_file(self) -> bool:
        return self.known.type == "file"

    def is_dir(self) -> bool:
        return self.known.type == "directory"

    def resolve(self) -> RemotePath:
        return self

    def iterdir(self) -> Iterator[RemotePath]:
        """What lies in this folder, sorted; nothing where there is none."""
        try:
            yield from self._children(self._ask(lambda system, path: system.ls(path, detail=True)))
        except FileNotFoundError:
            return

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """What lies in this folder, not below, under such a name."""
        return (path for path in self.iterdir() if fnmatchcase(path.name, pattern))

    def matching(self) -> list[RemotePath]:
        """The files that this pattern with ``*``, ``?`` or ``[`` means, sorted."""
        root = self
        while glob.has_magic(root.url) and root.parent != root:
            root = root.parent
        found = self._ask(lambda system, path: system.glob(path, detail=True))
        return root._children(found.values())

    def forget_listings(self) -> None:
        """Folders are listed anew from now on."""
        self._ask(lambda system, _: system.invalidate_cache())

    def files(self) -> list[RemotePath]:
        """All files below, sorted."""
        found = self._ask(lambda system, path: system.find(path, detail=True))
        return self._children(found.values())

    def read(self, start: int, end: int) -> bytes:
        """The bytes of a part, fewer where the object ends."""

        def part(system: Any, path: str) -> bytes:
            if not self._is_http:
                return system.cat_file(path, start=start, end=end)
            # A server that gives whole files only would fill the memory with one.
            wanted = {"Range": f"bytes={start}-{end - 1}"}
            with system.open(path, block_size=0, size=1, headers=wanted) as file:  # a stream
                return _up_to(file, end - start + 1)

        try:
            data = self._ask(part)
        except DataError:
            if start == 0 and self.known.size == 0:  # no part of nothing: many servers refuse it
                return b""
            raise
        if start and len(data) > end - start:
            raise DataError(f"{self}: the server gives no parts of files, only whole ones")
        return data[: end - start]

    def read_bytes(self) -> bytes:
        return self._ask(lambda system, path: system.cat_file(path))

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """To be read from end to end without a copy."""
        assert mode == "rb"
        return io.BufferedReader(_Parts(self), PART)

    @_Once
    def copy(self) -> Path:
        """A local copy of what is there now."""
        if not self.is_file():
            raise FileNotFoundError(errno.ENOENT, "No such file", self.url)
        known = hashlib.sha256(repr((self.url, *self.known)).encode()).hexdigest()[:32]
        path = cache_folder() / "remote" / known
        if path.exists() and self.known.tag:  # without one nobody knows whether it has changed
            return path
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # buckets may be private
        self.download(path)
        return path

    def download(self, path: Path) -> None:
        """Writes what is there to a local file, whole or not at all."""
        size = self.known.size
        shown = {"desc": self.name, "unit": "B", "unit_scale": True, "leave": False}
        shown["disable"] = (size or 0) < SHOWN_BYTES
        with replacing(path) as temporary:
            with TqdmCallback(tqdm_kwargs=shown) as bar:
                self._ask(lambda system, path: system.get_file(path, str(temporary), callback=bar))
            found = temporary.stat().st_size if temporary.exists() else 0
            if size not in (None, found):
                raise DataError(f"{self}: {found:,} of {size:,} bytes came; start again")

    def upload(self, file: Path) -> None:
        self._ask(lambda system, path: system.put_file(str(file), path))

    def write_bytes(self, data: bytes) -> None:
        self._ask(lambda system, path: system.pipe_file(path, data))

    def changed(self) -> float | None:
        """When it was last written, in seconds since 1970, where the file system knows."""
        try:
            return float(self._ask(lambda system, path: system.modified(path)).timestamp())
        except (DataError, FileNotFoundError):
            return None

    def remove(self) -> None:
        """Deletes a file, or finds that there is none."""
        with contextlib.suppress(FileNotFoundError):
            self._ask(lambda system, path: system.rm_file(path))

    @property
    def _protocol(self) -> str:
        return self.url.partition("://")[0].lower()

    @property
    def _is_http(self) -> bool:
        return self._protocol in ("http", "https")

    @property
    def _pure(self) -> PurePosixPath:
        return PurePosixPath(self.url.split("?")[0] if self._is_http else self.url)

    @property
    def _path(self) -> str:
        """As the file system calls it."""
        return _system_class(self.url)._strip_protocol(self.url)

    def _child(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url.rstrip('/')}/{name}")

    def _children(self, infos: Iterable[dict[str, Any]]) -> list[RemotePath]:
        start = self._path.rstrip("/") + "/"
        found = []
        for info in sorted(infos, key=lambda info: info["name"]):
            name = info["name"].rstrip("/")
            if name.startswith(start):  # a folder may be listed in itself
                child = self._child(name.removeprefix(start))
                vars(child)["known"] = Known.of(info)  # saves a request for each
                found.append(child)
        return found

    def _ask(self, question: Callable[[Any, str], Any]) -> Any:
        """The answer of the file system to a question about this path."""
        kind, begun = _system_class(self.url), time.monotonic()
        for wait in (*WAITS, None):
            try:
                # Made anew: fsspec keeps one in each process, and where needed in each thread.
                options = _web_options() if self._is_http else {}
                system = kind(**kind._get_kwargs_from_urls(self.url), **options)
                return question(system, self._path)
            # Each package has errors of its own.
            except Exception as raised:
                error = unhidden(raised)
                if isinstance(error, FileNotFoundError):
                    raise FileNotFoundError(errno.ENOENT, "No such file", self.url) from error
                if is_refusal(error):
                    raise DataError(
                        f"{self}: access refused ({words(error)}): credentials that may do this "
                        "are needed, where the tools of its provider look for them"
                    ) from error
                late = time.monotonic() - begun > PATIENCE
                if wait is None or late or is_final(error):
                    raise DataError(f"{self}: {words(error)}") from error
                time.sleep(wait)
        raise AssertionError


class _Parts(io.RawIOBase):
    """An object as a file whose every read is a request."""

    def __init__(self, path: RemotePath) -> None:
        self._path, self._place = path, 0
        if path.known.size is None:
            raise DataError(f"{path}: the server does not say how long it is")
        self._size = path.known.size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        self._place = max(0, start + offset)
        return self._place

    def readinto(self, buffer: Any) -> int:
        end = min(self._place + len(buffer), self._size)
        data = self._path.read(self._place, end) if self._place < end else b""
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


def _up_to(file: Any, size: int) -> bytes:
    """What a stream has, up to so many bytes."""
    parts: list[bytes] = []
    while size and (part := file.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _web_options() -> dict[str, Any]:
    """No limit on the whole of a download, where aiohttp has five minutes, but on its pauses."""
    import aiohttp

    return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(sock_connect=30, sock_read=60)}}


def _system_class(url: str) -> Any:
    """The class of a URL's file system; raises `DataError` where there is none."""
    protocol, _, rest = url.partition("://")
    protocol = protocol.lower()
    if protocol in ("file", "local"):
        raise DataError(f"{url}: a file of this machine goes by its path: {rest}")
    try:
        return fsspec.get_filesystem_class(protocol)
    except ValueError as error:
        some = ", ".join(sorted(EXTRAS))
        raise DataError(f"{url}: no protocol {protocol!r}; there are {some} and more") from error
    except ImportError as error:
        needs = f"pip install 'clip_lite_jax[{EXTRAS[protocol]}]'" if protocol in EXTRAS else error
        raise DataError(f"{url}: the package for {protocol}:// is missing: {needs}") from error
