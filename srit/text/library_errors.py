"""Errors of the tokenizers library as InputErrors."""

from collections.abc import Iterator
from contextlib import contextmanager

from srit.runtime.files import InputError


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Turn the library's errors inside the block into an InputError that begins with `what`.

    It raises bare Exception for bad files, and PanicException, a BaseException that cannot be imported,
    when its Rust code panics: for a regex that passes 10,000,000 retries of one match, for example.
    """
    try:
        yield
    except BaseException as error:
        ours = isinstance(error, InputError)
        if not ours and (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise InputError(f"{what} ({error!s:.200})") from None
        raise
