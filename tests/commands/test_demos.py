"""The teacher's client against a local server."""

import importlib.util
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tiny import question, write_rows

from srit.commands.demos import DemosConfig, connect, main
from srit.data.questions import read_demos
from srit.runtime.files import InputError
from srit.runtime.jsonl import read_jsonl
from srit.runtime.run_dir import read_run

KEY = "SRIT_TEST_KEY"


class Server(ThreadingHTTPServer):
    """Answers like a chat-completions server, after failing with the status codes in `troubles`."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.keys, self.troubles = [], [], []
        self.reply = ("The answer is 7.", "stop")


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        self.server.keys.append(self.headers["Authorization"])
        status = self.server.troubles.pop(0) if self.server.troubles else 200
        text, reason = self.server.reply
        message = {"role": "assistant", "content": text}
        answer = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"],
                  "choices": [{"index": 0, "message": message, "finish_reason": reason}]}
        payload = json.dumps(answer if status == 200 else {"error": {"message": "no"}}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.send_header("Retry-After", "0.01")
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    pytest.importorskip("openai")
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    server = Server()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}).start()
    yield server
    server.shutdown()
    server.server_close()


def config(tmp_path, server=None, rows=3, **changes):
    file = write_rows(tmp_path / "questions.jsonl", [question(i, 3 + i, 4) for i in range(rows)])
    url = f"http://127.0.0.1:{server.server_port}/v1" if server else None
    values = {"train_file": [str(file)], "output_dir": str(tmp_path / "out"), "model": "big",
              "base_url": url, "api_key_variable": KEY, "max_retries": 2, **changes}
    return DemosConfig(**values)


def test_every_question_is_asked_once_with_the_cot_prompt(tmp_path, server, monkeypatch, capsys):
    monkeypatch.setenv(KEY, "secret-1")
    main(config(tmp_path, server))
    demos = read_demos(tmp_path / "out" / "demos.jsonl")
    assert [d["id"] for d in demos] == ["q0", "q1", "q2"]
    assert {d["teacher"] for d in demos} == {"big"}
    assert demos[0]["completion"] == "The answer is 7."
    assert len(server.asked) == 3
    contents = [body["messages"][0]["content"] for body in server.asked]
    assert all(c.endswith("Answer: Let's think step by step") for c in contents)
    assert set(server.keys) == {"Bearer secret-1"}
    output = capsys.readouterr().out
    assert "answers: 3 rows in = 3 used" in output and "right answers: 1 of 3" in output
    assert read_run(tmp_path / "out")["finished"]
    for file in (tmp_path / "out").iterdir():
        assert "secret-1" not in file.read_text()


def test_an_overloaded_server_is_asked_again(tmp_path, server):
    server.troubles = [503, 429]
    main(config(tmp_path, server, rows=1))
    assert len(server.asked) == 3
    assert len(read_demos(tmp_path / "out" / "demos.jsonl")) == 1


def test_a_second_run_asks_only_what_is_missing(tmp_path, server):
    server.troubles = [500]
    cfg = config(tmp_path, server, max_retries=0, concurrency=1)
    with pytest.raises(InputError, match="1 of 3 questions have no answer"):
        main(cfg)
    journal = tmp_path / "out" / "answers.jsonl"
    assert len(read_jsonl(journal)) == 2
    with open(journal, "a") as handle:
        handle.write('{"id": "q0", "comple')  # as a killed process leaves it
    main(cfg)
    assert len(server.asked) == 4
    assert len(read_demos(tmp_path / "out" / "demos.jsonl")) == 3


def test_a_wrong_key_ends_the_run_at_once(tmp_path, server):
    server.troubles = [401] * 50
    with pytest.raises(InputError, match="refuses: AuthenticationError"):
        main(config(tmp_path, server, rows=50, concurrency=1))
    assert len(server.asked) < 50


@pytest.mark.parametrize(("reply", "reason"), [
    (("3 + 4 = ", "length"), "cut at max_new_tokens"),
    (("  ", "stop"), "empty"),
])
def test_unusable_answers_are_counted(tmp_path, server, reply, reason):
    server.reply = reply
    with pytest.raises(InputError, match=f"answers: 2 rows in = 0 used, 2 {reason}"):
        main(config(tmp_path, server, rows=2))


def test_a_question_that_the_server_rejects_is_counted(tmp_path, server, capsys):
    server.troubles = [400]
    main(config(tmp_path, server, concurrency=1))
    assert "3 rows in = 2 used, 1 rejected by the server" in capsys.readouterr().out


def test_errors_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.delenv(KEY, raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    cfg = config(tmp_path)
    if importlib.util.find_spec("openai"):
        with pytest.raises(InputError, match=KEY):
            connect(cfg)
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(InputError, match=r"pip install 'srit\[teacher\]'"):
        connect(cfg)
    with pytest.raises(InputError, match="concurrency"):
        config(tmp_path, concurrency=0)
    cfg.train_file *= 2
    with pytest.raises(InputError, match="duplicate id 'q0', also in another file"):
        main(cfg, client=object())
