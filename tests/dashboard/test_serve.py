"""The live page's server: what it answers, to whom, and when it reads again."""

import http.client
import json
import shutil
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from steerscale.dashboard.runs import BrokenRun, find_directories
from steerscale.dashboard.serve import LiveRuns, make_server
from steerscale.errors import SteerscaleError
from steerscale.metrics import Recorder


@pytest.fixture
def live(runs: Path, tmp_path: Path) -> Path:
    """Three runs that may change."""
    for run in find_directories([runs])[:3]:
        shutil.copytree(run, tmp_path / run.name)
    return tmp_path


@pytest.fixture
def port(live: Path) -> Iterator[int]:
    """A server that serves them."""
    with make_server(LiveRuns([live]), port=0, refresh_s=1.0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def get(port: int, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers, body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    result = answer.status, dict(answer.headers), answer.read()
    connection.close()
    return result


def test_server_answers_news_only_once(live: Path, port: int) -> None:
    status, headers, body = get(port, "/data.json")
    assert status == 200
    names = [run["figures"]["run"] for run in json.loads(body)["runs"]]
    assert len(names) == 3
    tag = headers["ETag"]
    assert get(port, "/data.json", **{"If-None-Match": tag})[0] == 304

    changed = live / names[0]
    recorder = Recorder(changed, writes=True, tensorboard=False, step=600)
    recorder.write("train", 610, {"loss": 1.25})
    recorder.close()
    status, headers, body = get(port, "/data.json", **{"If-None-Match": tag})
    assert status == 200
    assert headers["ETag"] != tag
    assert json.loads(body)["runs"][0]["figures"]["loss"] == 1.25

    for path in list(live.iterdir()):
        shutil.rmtree(path)
    assert json.loads(get(port, "/data.json")[2])["runs"] == []


def test_only_changed_runs_are_read_again(live: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from steerscale.dashboard import serve

    read: list[Path] = []
    before = serve.read_or_broken
    monkeypatch.setattr(serve, "read_or_broken", lambda path: read.append(path) or before(path))
    runs = LiveRuns([live])
    runs.update()
    assert len(read) == 3
    runs.update()
    assert len(read) == 3
    (read[1] / "status.json").write_text("{", encoding="utf-8")
    _, text = runs.update()
    assert read[3:] == [read[1]]
    assert [entry["path"] for entry in json.loads(text)["broken"]] == [str(read[1])]


def test_what_could_not_be_read_for_a_moment_is_read_again(live: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from steerscale.dashboard import serve

    runs, before = LiveRuns([live]), serve.read_or_broken
    with monkeypatch.context() as away:
        away.setattr(serve, "read_or_broken", lambda path: BrokenRun(path, "Stale file handle"))
        tag, text = runs.update()
        assert len(json.loads(text)["broken"]) == 3
    assert serve.read_or_broken is before
    again, text = runs.update()
    assert again != tag
    assert len(json.loads(text)["runs"]) == 3


def test_page_asks_its_server_and_nobody_else(port: int) -> None:
    status, headers, body = get(port, "/")
    assert status == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert b"connect-src 'self'" in body
    assert b'"refresh_s":1.0' in body
    assert get(port, "/config.yaml")[0] == 404
    assert get(port, "/../../etc/passwd")[0] == 404


def test_other_names_for_this_address_are_refused(port: int) -> None:
    """A page elsewhere that points its name at 127.0.0.1 would otherwise read along."""
    assert get(port, "/data.json", Host=f"attacker.example:{port}")[0] == 403
    assert get(port, "/data.json", Host="localhost:9999")[0] == 200


def test_a_host_that_is_none_is_refused_and_a_closed_tab_is_no_news(
    port: int, capfd: pytest.CaptureFixture[str]
) -> None:
    assert get(port, "/data.json", Host="[")[0] == 403
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", port)) as tab:
            tab.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() resets
            tab.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            tab.recv(1)
    assert get(port, "/data.json")[0] == 200
    assert "Traceback" not in capfd.readouterr().err


def test_a_path_without_runs_hides_none_of_another(live: Path) -> None:
    gone, *others = sorted(live.iterdir())
    server = LiveRuns([gone, *others])
    shutil.rmtree(gone)
    assert len(json.loads(server.update()[1])["runs"]) == len(others)


def test_server_is_bound_to_loopback_and_a_taken_port_is_an_error(live: Path, port: int) -> None:
    with make_server(LiveRuns([live]), port=0, refresh_s=1.0) as server:
        assert server.server_address[0] == "127.0.0.1"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(SteerscaleError, match="cannot be used"):
            make_server(LiveRuns([live]), port=taken.getsockname()[1], refresh_s=1.0)
