"""Worker process of chat_template.py: renders chat templates, which are untrusted programs.

Started with `python -I`; imports nothing from this project. Reads lines of JSON, {"template",
"variables"}, and answers each with a line, {"text"} or {"error"}. Jinja's sandbox denies access to
attributes, files and the interpreter; the memory limit protects the machine.
"""

import json
import resource
import sys
from datetime import datetime
from functools import lru_cache

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _Generation(jinja2.ext.Extension):
    """Accept and ignore `{% generation %}`, which marks assistant turns in some templates."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _fail(message: str) -> None:
    raise jinja2.TemplateError(message)


@lru_cache
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation])
    environment.globals["raise_exception"] = _fail
    # Jinja's own tojson escapes HTML.
    environment.filters["tojson"] = lambda value, ensure_ascii=False, **options: json.dumps(
        value, ensure_ascii=ensure_ascii, **options)
    return environment.from_string(template)


def answer(request: dict, max_characters: int) -> dict[str, str]:
    try:
        text = _compile(request["template"]).render(
            request["variables"], strftime_now=datetime.fromisoformat(request["today"]).strftime)
    except jinja2.TemplateError as error:
        return {"error": f"chat template: {error}"}
    except MemoryError:
        return {"error": "chat template failed: it needs too much memory"}
    except Exception as error:  # any error in the template's code is the checkpoint's fault
        return {"error": f"chat template failed: {error!r}"[:1000]}
    if len(text) > max_characters:
        return {"error": f"chat template: {len(text):,} characters, the limit is {max_characters:,}"}
    return {"text": text}


def main(memory: int, max_characters: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line), max_characters)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
