"""Limits of every value that comes from outside, each with its reason, and the checks that apply them.

Every check raises InputError with one line that names the file, and the row or key.
"""

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

from srit.runtime.files import InputError

# A row or a record
ROW_BYTES = 4 * 2**20  # tokenizing takes up to 200 bytes of memory for each byte of text
DIGITS = 4300  # of an integer in JSON: Python refuses longer ones, which take quadratic time
NESTING = 100  # Python's own limit depends on how deep the caller stands
CHOICES = 26  # one letter each

# A model directory
JSON_BYTES = 256 * 2**20  # the largest tokenizer.json in use has about 40 MiB
TEMPLATE_CHARACTERS = 2**20  # real templates have up to 20,000
TOKEN_ID = 2**31 - 1  # the tokenizers library keeps 32 bits

# A GGUF file. Its own counts have 64 bits.
GGUF_KEYS = 2**16
GGUF_TENSORS = 2**16
GGUF_STRING_BYTES = 16 * 2**20  # the longest one is a chat template
GGUF_ITEMS = 2**24  # the longest arrays are vocabulary and merges
GGUF_TOKEN_CHARACTERS = 1024  # a token's merges are found by cutting it in all places

# A setting
YAML_VALUES = 2**16  # of a recipe: aliases of aliases multiply them
SEED = 2**63 - 1  # torch takes 64 bits; adding small numbers must not overflow
INTEGER = 2**31 - 1
NUMBER = 1e30  # keeps products with step counts and bytes finite
SECONDS = 1e9  # of a timedelta; its own limit is a little higher

SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(data: bytes, where: str) -> Any:
    """The JSON value of the bytes: UTF-8, nested at most NESTING deep, every text valid Unicode, no key
    twice in an object (Python would take the last)."""
    def no_key_twice(pairs: list[tuple[str, Any]]) -> dict:
        value = dict(pairs)
        if len(value) < len(pairs):
            (twice, _), = Counter(key for key, _ in pairs).most_common(1)
            raise InputError(f"{where}: the key {twice!r:.80} stands twice in one object")
        return value

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=no_key_twice)
        # Escapes are the only way to write half of a surrogate pair, brackets the only way to nest.
        if SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        if data.count(b"[") + data.count(b"{") > NESTING and _depth(value) > NESTING:
            raise RecursionError
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 ({error.reason})") from None
    except UnicodeEncodeError:
        raise InputError(f"{where}: not valid Unicode (half of a surrogate pair)") from None
    except RecursionError:
        raise InputError(f"{where}: not JSON (nested more than {NESTING} deep)") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error})") from None
    except ValueError:
        raise InputError(f"{where}: an integer has more than {DIGITS:,} digits") from None
    return value


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [item for v in level if isinstance(v, dict | list)
                    for item in (v.values() if isinstance(v, dict) else v)]:
        depth += 1
    return depth


def read_bytes(path: Path, limit: int = JSON_BYTES) -> bytes:
    """The bytes of a regular file. A directory, a pipe (reading it may never end) and a file of more
    than `limit` bytes are refused."""
    if not path.exists():
        raise InputError(f"{path}: no such file; is {path.parent} a model directory?")
    if not path.is_file():
        raise InputError(f"{path}: not a regular file")
    with open(path, "rb") as handle:
        data = handle.read(limit + 1)
    if len(data) > limit:
        raise InputError(f"{path}: more than {limit:,} bytes")
    return data


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    value = parse_json(read_bytes(path), str(path))
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def check(ok: bool, where: str, name: str, value: Any, rule: str) -> None:
    if not ok:
        raise InputError(f"{where}: {name} must be {rule}, got {value!r:.80}")


def is_integer(value: Any, low: int, high: int) -> bool:
    """Whether the value is an integer (bool is none) within the bounds."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_number(value: Any) -> bool:
    """Whether the value is finite and not beyond NUMBER in size."""
    return math.isfinite(value) and abs(value) <= NUMBER
