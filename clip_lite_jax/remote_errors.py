"""What the packages of fsspec raise, each of them in its own way."""

from clip_lite_jax.errors import DataError


def unhidden(error: Exception) -> Exception:
    """The error itself, or what fsspec calls a missing file because a web server did not answer."""
    cause = error.__cause__
    if not isinstance(cause, Exception) or not isinstance(error, FileNotFoundError):
        return error
    of_the_web = type(cause).__module__.startswith("aiohttp")
    return cause if of_the_web and getattr(cause, "status", 0) != 404 else error


def is_refusal(error: Exception) -> bool:
    status = getattr(error, "status", getattr(error, "code", None))
    words = "Credential" in type(error).__name__ or str(error).startswith("Forbidden")  # gcsfs
    return isinstance(error, PermissionError) or words or status in (401, 403)


def is_final(error: Exception) -> bool:
    """Whether another attempt would fare no better."""
    never = (DataError, NotImplementedError, ValueError, TypeError, IsADirectoryError)
    return isinstance(error, never) or "not satisfiable" in str(error).lower()


def words(error: Exception) -> str:
    return str(error) or type(error).__name__
