"""The teacher: what a server may do, with a fake client, and over HTTP with the real one."""

import asyncio
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from base64 import b64encode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tiny import question, write_rows

from srit.commands.demos import DemosConfig, connect, main
from srit.data.questions import read_demos
from srit.runtime import shutdown
from srit.runtime.files import InputError
from srit.runtime.jsonl import read_jsonl
from srit.runtime.outcome import STOPPED, Failed, Stopped
from srit.runtime.run_dir import read_run

KEY = "SRIT_TEST_KEY"


def completion(content, reason="stop", **message):
    message = {"role": "assistant", "content": content, **message}
    return json.dumps({"id": "x", "object": "chat.completion", "created": 0, "model": "big",
                       "choices": [{"index": 0, "message": message, "finish_reason": reason}]})


GOOD = completion("The answer is 7.")
NEVER = "never"


class StatusError(Exception):
    def __init__(self, status_code, message="no"):
        super().__init__(message)
        self.status_code = status_code


class FakeClient:
    """Gives these replies (or raises them), then good ones."""

    def __init__(self, *replies):
        self.replies, self.asked, self.together, self.most = list(replies), [], 0, 0

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        pass

    async def post(self, path, *, body, cast_to):
        self.asked.append(body)
        reply = self.replies.pop(0) if self.replies else GOOD
        self.together += 1
        self.most = max(self.most, self.together)
        try:
            await asyncio.sleep(3600 if reply is NEVER else 0)
        finally:
            self.together -= 1
        if isinstance(reply, Exception):
            raise reply
        return reply


class Server(ThreadingHTTPServer):
    """Gives these replies, each a body, a status with a body, or where to drip; then good ones."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.keys, self.replies, self.closing = [], [], [], threading.Event()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        self.server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.server.keys.append(self.headers["Authorization"])
        reply = self.server.replies.pop(0) if self.server.replies else GOOD
        if reply in DRIPS:
            self.drip(DRIPS[reply])
            return
        status, text = reply if isinstance(reply, tuple) else (200, reply)
        payload = text.replace("ECHO", self.headers["Authorization"]).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.send_header("Retry-After", "0.01")
        self.end_headers()
        self.wfile.write(payload)

    def drip(self, start):
        """Send a byte every 20 ms, for ever; without a start, none."""
        self.close_connection = True
        try:
            self.wfile.write(start)
            while not self.server.closing.wait(0.02):
                self.wfile.write(b" " if start else b"")
        except OSError:  # the client has gone
            pass

    def log_message(self, *args):
        pass


DRIPS = {"no byte": b"", "headers": b"HTTP/1.1 200 OK\r\nX-Drip:",
         "body": b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{"}


@pytest.fixture
def server(monkeypatch):
    pytest.importorskip("openai")
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv(KEY, "secret-1")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def config(tmp_path, server=None, rows=3, **changes):
    file = write_rows(tmp_path / "questions.jsonl", [question(i, 3 + i, 4) for i in range(rows)])
    url = f"http://127.0.0.1:{server.server_port}/v1" if server else None
    values = {"train_file": [str(file)], "output_dir": str(tmp_path / "out"), "model": "big",
              "base_url": url, "api_key_variable": KEY, "max_retries": 0, "concurrency": 1, **changes}
    return DemosConfig(**values)


def output(tmp_path, name="demos.jsonl"):
    return tmp_path / "out" / name


def files(tmp_path):
    return "".join(file.read_text() for file in (tmp_path / "out").iterdir())


# With a fake client


def test_every_question_is_asked_once_with_the_cot_prompt(tmp_path, capsys):
    client = FakeClient()
    main(config(tmp_path), client)
    demos = read_demos(output(tmp_path))
    assert [d["id"] for d in demos] == ["q0", "q1", "q2"]
    assert {d["teacher"] for d in demos} == {"big"}
    assert demos[0]["completion"] == "The answer is 7."
    contents = [body["messages"][0]["content"] for body in client.asked]
    assert len(contents) == 3
    assert all(c.endswith("Answer: Let's think step by step") for c in contents)
    printed = capsys.readouterr().out
    assert "answers: 3 rows in = 3 used" in printed and "right answers: 1 of 3" in printed
    assert read_run(tmp_path / "out")["finished"]


def test_as_many_requests_run_together_as_concurrency_says(tmp_path):
    client = FakeClient()
    main(config(tmp_path, rows=20, concurrency=4), client)
    assert client.most == 4 and len(client.asked) == 20


@pytest.mark.parametrize("error", [StatusError(503), StatusError(429), OSError("connection lost")])
def test_a_busy_server_is_asked_again_up_to_max_retries(tmp_path, error, monkeypatch):
    pauses, sleep = [], asyncio.sleep
    monkeypatch.setattr("srit.commands.demos.asyncio.sleep",
                        lambda seconds: (pauses.append(seconds), sleep(0))[1])
    error.response = type("Response", (), {"headers": {"retry-after": "3"}})
    client = FakeClient(error, error)
    main(config(tmp_path, rows=1, max_retries=2), client)
    assert len(client.asked) == 3 and [p for p in pauses if p] == [3, 3]
    assert len(read_demos(output(tmp_path))) == 1


def test_a_second_run_asks_only_what_is_missing(tmp_path):
    client = FakeClient(StatusError(500))
    cfg = config(tmp_path)
    with pytest.raises(Failed, match="1 of 3 questions have no answer"):
        main(cfg, client)
    journal = output(tmp_path, "answers.jsonl")
    assert len(read_jsonl(journal)) == 2
    with open(journal, "a") as handle:
        handle.write('{"id": "q0", "comple')  # as a killed process leaves it
    main(cfg, client)
    assert len(client.asked) == 4
    assert len(read_demos(output(tmp_path))) == 3


def test_an_error_that_all_questions_share_ends_the_run_at_once(tmp_path):
    client = FakeClient(*[StatusError(401)] * 50)
    with pytest.raises(InputError, match="refuses: StatusError"):
        main(config(tmp_path, rows=50), client)
    assert len(client.asked) == 1


@pytest.mark.parametrize(("reply", "reason"), [
    (completion("3 + 4 = ", "length"), "cut at max_new_tokens"),
    (completion("  "), "empty"),
])
def test_unusable_answers_are_counted(tmp_path, reply, reason):
    with pytest.raises(InputError, match=f"answers: 2 rows in = 0 used, 2 {reason}"):
        main(config(tmp_path, rows=2), FakeClient(reply, reply))


@pytest.mark.parametrize(("reply", "reason"), [
    (StatusError(400, "context too long"), "StatusError: context too long"),
    (StatusError(413), "StatusError: no"),
    (StatusError(422), "StatusError: no"),
    (completion("I", "content_filter"), '"content_filter"'),
    (completion(None, refusal="I will not."), '"refusal": "I will not."'),
    (completion(None), '"content": null'),
    (completion(7), '"content": 7'),
    (completion([{"type": "text", "text": "7"}]), '"content": [{'),
    (completion("7", reason=["stop"]), '"finish_reason": ["stop"]'),
    (completion("half a pair: \ud83d"), "half of a surrogate pair"),
    ('{"choices": []}', 'not a chat completion: {"choices": []}'),
    ('{"choices": {}}', "not a chat completion"),
    ('{"choices": "x"}', "not a chat completion"),
    ('{"choices": [{"finish_reason": "stop"}]}', "not a chat completion"),
    ('{"choices": [{"message": null}]}', "not a chat completion"),
    ('{"choices": [{"message": "x"}]}', "not a chat completion"),
    ('{"choices": [null]}', "not a chat completion"),
    ("null", "not a chat completion"),
    ("<html>", "the reply: not JSON"),
    ("", "the reply: not JSON"),
    ("[" * 100_000, "the reply: not JSON"),
    ('{"choices": [%s]}' % ("9" * 5000), "an integer has more than 4,300 digits"),
    (completion("x" * 2**21), "the reply has 2,097,3"),
])
def test_a_rejection_is_shown_and_stored_with_its_reason_and_asked_again(tmp_path, reply, reason,
                                                                        capsys):
    client, cfg = FakeClient(reply), config(tmp_path)
    main(cfg, client)
    printed = capsys.readouterr().out
    assert "3 rows in = 2 used, 1 rejected" in printed
    assert re.search(f"1 rejected, to be asked again .*{re.escape(reason)}", printed)
    assert [d["id"] for d in read_demos(output(tmp_path))] == ["q1", "q2"]
    first = read_jsonl(output(tmp_path, "answers.jsonl"))[0]
    assert first["finish_reason"] == "rejected" and first["completion"] == ""
    assert reason in first["error"] and len(first["error"]) <= 300

    main(cfg, client)  # good replies now
    assert len(client.asked) == 4
    assert [d["id"] for d in read_demos(output(tmp_path))] == ["q0", "q1", "q2"]
    assert "rejected" not in capsys.readouterr().out


def test_concurrency_and_patience_may_change_between_runs(tmp_path):
    with pytest.raises(Failed):
        main(config(tmp_path), FakeClient(StatusError(500)))
    main(config(tmp_path, concurrency=3, timeout=7.0, max_retries=1, max_time=5.0), FakeClient())
    with pytest.raises(InputError, match="max_new_tokens was 512, now 9"):
        main(config(tmp_path, max_new_tokens=9), FakeClient())


def test_a_request_that_never_ends_fails_after_timeout(tmp_path):
    started, client = time.monotonic(), FakeClient(NEVER)
    with pytest.raises(Failed, match=r"no whole answer within 0.2 seconds \(--timeout\)"):
        main(config(tmp_path, timeout=0.2), client)
    assert time.monotonic() - started < 2
    assert len(read_jsonl(output(tmp_path, "answers.jsonl"))) == 2


def test_max_time_stops_and_the_same_command_goes_on(tmp_path):
    client = FakeClient(GOOD, NEVER)
    with shutdown.listening(max_time=0.3 / 60), pytest.raises(Stopped, match="asks the rest"):
        main(config(tmp_path), client)
    assert [row["id"] for row in read_jsonl(output(tmp_path, "answers.jsonl"))] == ["q0"]
    main(config(tmp_path), client)
    assert len(client.asked) == 4 and len(read_demos(output(tmp_path))) == 3


def test_a_key_in_an_error_is_masked_in_messages_and_files(tmp_path, capsys):
    echo = "key secret-1 \ud800 is not mine\n"
    main(config(tmp_path), FakeClient(StatusError(400, echo)))
    with pytest.raises(Failed) as failed:
        main(config(tmp_path), FakeClient(StatusError(500, "x" * 280 + echo)))  # cut after masking
    with pytest.raises(InputError) as refused:
        main(config(tmp_path), FakeClient(StatusError(401, echo)))
    assert "key *** ? is not mine" in str(refused.value)
    shown = capsys.readouterr().out + str(failed.value) + str(refused.value) + files(tmp_path)
    assert "secret" not in shown and "key *** ? is not mine" in files(tmp_path)


@pytest.mark.parametrize(("url", "secrets"), [
    ("https://ann:pa%2Fss@host/v1", ["pa%2Fss", "pa/ss", "YW5uOnBhL3Nz"]),
    ("https://ann:p/a@ss@host/v1", ["p/a@ss"]),
    ("https://token-7@host/v1", ["token-7"]),
])
def test_credentials_in_the_address_are_masked_and_not_recorded(tmp_path, capsys, monkeypatch, url,
                                                               secrets):
    monkeypatch.setattr(sys, "argv", ["srit", "demos", f"--base_url={url}"])
    main(config(tmp_path, base_url=url), FakeClient(StatusError(400, f"{url} {' '.join(secrets)}")))
    assert read_run(tmp_path / "out")["config"]["base_url"] == "https://host/v1"
    shown = capsys.readouterr().out + files(tmp_path)
    assert "rejected" in shown and not any(secret in shown for secret in secrets)
    main(config(tmp_path, base_url="https://bob:new@host/v1"), FakeClient())  # the same run


@pytest.mark.parametrize("finished", [False, True])
def test_a_file_that_another_wrote_or_changed_is_not_overwritten(tmp_path, finished):
    if finished:
        main(config(tmp_path), FakeClient(StatusError(400)))
        output(tmp_path).write_text(output(tmp_path).read_text().replace("7", "8"))
    else:
        (tmp_path / "out").mkdir()
        output(tmp_path).write_text('{"id": "mine"}\n')
    before, client = output(tmp_path).read_text(), FakeClient()
    with pytest.raises(InputError, match="demos.jsonl"):
        main(config(tmp_path), client)
    assert output(tmp_path).read_text() == before and not client.asked
    output(tmp_path).unlink()
    main(config(tmp_path), client)
    assert len(read_demos(output(tmp_path))) == 3


def test_a_run_killed_between_its_two_last_files_finishes(tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("srit.commands.demos.Run.finish", interrupt)
        main(config(tmp_path), FakeClient())
    assert output(tmp_path).exists() and not read_run(tmp_path / "out")["finished"]
    main(config(tmp_path), FakeClient())
    assert read_run(tmp_path / "out")["finished"]


def test_errors_say_what_to_do(tmp_path, monkeypatch):
    cfg = config(tmp_path)
    if importlib.util.find_spec("openai"):
        for url in ("localhost:8000/v1", "ann:pass@host/v1", "http://ann:p/ss@host", "http://[::1"):
            with pytest.raises(InputError, match="address must look like") as error:
                connect(config(tmp_path, base_url=url))
            assert "ann" not in str(error.value)
        monkeypatch.delenv(KEY)
        with pytest.raises(InputError, match=KEY):
            connect(cfg)
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(InputError, match=r"pip install 'srit\[teacher\]'"):
        connect(cfg)
    for setting in ({"concurrency": 0}, {"limit": -1}, {"timeout": 0.0}, {"timeout": float("nan")},
                    {"max_retries": -1}, {"temperature": float("nan")}, {"temperature": float("inf")}):
        with pytest.raises(InputError, match=next(iter(setting))):
            config(tmp_path, **setting)
    cfg.train_file *= 2
    with pytest.raises(InputError, match="duplicate id 'q0', also in another file"):
        main(cfg, client=FakeClient())


# Over HTTP, with the openai package


def test_http_answers_retries_rejections_and_the_key(tmp_path, server):
    server.replies = [(503, "{}"), (429, "{}"), (400, '{"error": {"message": "ECHO is too long"}}')]
    main(config(tmp_path, server, max_retries=2), None)
    assert len(server.asked) == 5 and set(server.keys) == {"Bearer secret-1"}
    assert server.asked[0]["model"] == "big" and server.asked[0]["max_tokens"] == 512
    assert len(read_demos(output(tmp_path))) == 2
    assert "Bearer *** is too long" in files(tmp_path) and "secret" not in files(tmp_path)


def test_http_credentials_in_the_address_are_used(tmp_path, server):
    server.replies = [(422, '{"error": {"message": "no ECHO here"}}')]
    cfg = config(tmp_path, server)
    cfg.base_url = cfg.base_url.replace("//", "//ann:pass@")
    main(cfg)
    basic = b64encode(b"ann:pass").decode()
    assert set(server.keys) == {f"Basic {basic}"}
    assert "Basic ***" in files(tmp_path)
    assert not re.search(f"ann|pass|{basic}", files(tmp_path))


def test_http_errors_name_their_cause(tmp_path, server):
    server.replies = [(401, '{"error": {"message": "bad key ECHO"}}')]
    with pytest.raises(InputError, match=r"refuses: AuthenticationError: .*bad key Bearer \*\*\*"):
        main(config(tmp_path, server))
    server.server_close()
    with pytest.raises(Failed, match="APIConnectionError: .*connection"):
        main(config(tmp_path, server))


@pytest.mark.parametrize("where", DRIPS)
def test_timeout_bounds_the_whole_answer_of_a_dripping_server(tmp_path, server, where):
    server.replies = [where, where]
    started = time.monotonic()
    with pytest.raises(Failed, match="1 of 3 .*no whole answer within 0.3 seconds"):
        main(config(tmp_path, server, timeout=0.3, max_retries=1))
    assert 0.6 < time.monotonic() - started < 4
    assert len(read_jsonl(output(tmp_path, "answers.jsonl"))) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_within_two_seconds_on_a_dripping_server(tmp_path, server, number):
    server.replies = [GOOD, "body", "headers", "no byte"]
    cfg = config(tmp_path, server, rows=8)
    cfg.base_url = cfg.base_url.replace("//", "//ann:pass@")
    command = [sys.executable, "-m", "srit.commands.cli", "demos", "--train_file", cfg.train_file[0],
               "--output_dir", cfg.output_dir, "--model", "big", "--base_url", cfg.base_url,
               "--api_key_variable", KEY, "--concurrency", "3"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env={**os.environ, "PYTHONUNBUFFERED": "1"})
    killer = threading.Timer(90, process.kill)
    killer.start()
    try:
        while len(server.asked) < 4 and process.poll() is None:
            time.sleep(0.02)
        assert len(server.asked) == 4
        process.send_signal(number)
        started, printed, line = time.monotonic(), "", "-"
        while "stopped" not in printed and line:
            printed += (line := process.stdout.readline())
        assert time.monotonic() - started < 2  # unloading torch takes another second
        printed += process.communicate()[0]
    finally:
        killer.cancel()
        process.kill()
    assert process.returncode == STOPPED and "Traceback" not in printed
    assert len(read_jsonl(output(tmp_path, "answers.jsonl"))) == 1
    assert not re.search("ann:|pass", files(tmp_path) + printed)
