# SPDX-License-Identifier: Apache-2.0
"""What strangers and broken clients may send to the socket: refused, bounded, and nobody else notices."""
import json
import socket
import time

import pytest

from harness.compare import fingerprint
from harness.volumes import MiB
from harness.waiting import TIME_SCALE, Stopwatch, wait_until


def connect(ferryd, seconds=10):
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    peer.settimeout(seconds * TIME_SCALE)
    peer.connect(str(ferryd.socket))
    return peer


def read_all(peer):
    """Until the other side closes; a reset counts as that."""
    received = b""
    try:
        while piece := peer.recv(65536):
            received += piece
    except (ConnectionResetError, BrokenPipeError):
        pass
    return received


def status_line(answer):
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else None


def alive(ferryd):
    watch = Stopwatch()
    assert ferryd.ctl("list", "--json").json == []
    assert watch.seconds() < 2


MALFORMED = [
    b"\r\n\r\n", b"hello\r\n\r\n", b"GET\r\n\r\n", b"GET /v1/runs\r\n\r\n", b"GET /v1/runs HTTP/9.9\r\n\r\n",
    b"GET /v1/runs HTTP/1.1\r\nHost\r\n\r\n", b"GET v1/runs HTTP/1.1\r\n\r\n", b"\x00\x01\x02\x03" * 64 + b"\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),  # TLS
    b"POST /v1/runs HTTP/1.1\r\nContent-Length: -1\r\n\r\n", b"POST /v1/runs HTTP/1.1\r\nContent-Length: x\r\n\r\n",
    b"POST /v1/runs HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcde",
    b"POST /v1/runs HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /v1/runs HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n"]


@pytest.mark.parametrize("request_", MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_requests_are_refused(ferryd, request_):
    with connect(ferryd) as peer:
        peer.sendall(request_)
        peer.shutdown(socket.SHUT_WR)
        answer = read_all(peer)
    assert not answer or 400 <= status_line(answer) < 600
    alive(ferryd)


BODIES = [
    "", "null", "[]", "42", '"text"', "{", "{}", '{"source": 1}', '{"source": "/a"}', '{"source": "/a", "targets": []}',
    '{"source": "/a", "targets": "/b"}', '{"source": "/a", "targets": [1]}', '{"source": "a", "targets": ["b"]}',
    '{"source": "/a", "targets": ["/b"], "surprise": 1}', '{"source": "/a", "targets": ["/b"], "granule_bytes": 5000}',
    '{"source": "/a", "targets": ["/b"], "granule_bytes": -4096}',
    '{"source": "/a", "targets": ["/b"], "rate_bytes_per_second": 1e400}',
    '{"source": "/a", "targets": ["/b"], "queue_depth": 4294967296}',
    '{"source": "/a", "targets": ["/b"], "verify": "yes"}', '{"source": "/a\\u0000b", "targets": ["/b"]}',
    '{"source": "/a", "targets": ["/b"], "name": "../../etc"}', '{"source": "/a", "targets": ["/b"], "kind": "steal"}',
    '{"source": "/a", "source": "/b", "targets": ["/c"]} trailing', "[" * 100000, '{"a":' * 5000, "\xff\xfe"]


@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
def test_bodies_that_make_no_sense_are_refused(ferryd, body):
    content = body.encode("latin-1")
    with connect(ferryd) as peer:
        peer.sendall(b"POST /v1/runs HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
                     b"Content-Length: %d\r\n\r\n" % len(content) + content)
        answer = read_all(peer)
    assert status_line(answer) == 400
    error = json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]
    assert error["code"] == "invalid_argument"
    assert "\n" not in error["message"]
    alive(ferryd)


@pytest.mark.parametrize("method, path, status", [
    ("GET", "/", None), ("GET", "/nowhere", 404), ("GET", "/v1/runs/nosuchrun", 404), ("DELETE", "/v1/runs", 405),
    ("PUT", "/v1/runs/x", 405), ("GET", "/v1/runs/..%2f..%2fetc%2fpasswd", 404), ("GET", "/v1/runs/%00", 404),
    ("GET", "/v1/runs/%zz", 404), ("POST", "/v1/runs/x/explode", 404), ("GET", "/v1/runs?" + "x" * 2000, 400),
    ("GET", "/" + "a" * 100000, None), ("GET", "/v1/runs/x?wait_ms=-1", None)],
    ids=range(12))
def test_paths_that_lead_nowhere(ferryd, method, path, status):
    with connect(ferryd) as peer:
        try:
            peer.sendall(f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        except (BrokenPipeError, ConnectionResetError):
            pass
        answer = read_all(peer)
    assert status is None or status_line(answer) == status
    alive(ferryd)


def test_an_oversized_body_is_refused_unread(ferryd):
    before = ferryd.status_kib("VmRSS")
    with connect(ferryd) as peer:
        peer.sendall(b"POST /v1/runs HTTP/1.1\r\nHost: x\r\nContent-Length: 10000000000\r\n\r\n")
        answer = read_all(peer)
    assert status_line(answer) == 413
    assert ferryd.status_kib("VmRSS") - before < 8 * 1024
    alive(ferryd)


def endless(ferryd, head, piece, bytes_max=256 * MiB):
    """Sends until ferryd has had enough; how much it took."""
    sent = 0
    with connect(ferryd, 20) as peer:
        try:
            peer.sendall(head)
            while sent < bytes_max:
                peer.sendall(piece)
                sent += len(piece)
        except (BrokenPipeError, ConnectionResetError, socket.timeout):
            pass
    return sent


@pytest.mark.parametrize("head, piece", [
    (b"GET /", b"a" * 65536), (b"GET / HTTP/1.1\r\n", b"X-Header: more\r\n" * 4096),
    (b"POST /v1/runs HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + b"a" * 65536 + b"\r\n"),
    (b"", b"\r\n" * 32768)],
    ids=["target", "headers", "chunks", "empty lines"])
def test_an_endless_request_is_cut_off(ferryd, head, piece):
    before = ferryd.status_kib("VmRSS")
    assert endless(ferryd, head, piece) < 64 * MiB
    assert ferryd.status_kib("VmRSS") - before < 16 * 1024
    alive(ferryd)


def test_a_request_in_single_bytes_is_answered(ferryd):
    with connect(ferryd) as peer:
        for byte in b"GET /v1/runs HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n":
            peer.sendall(bytes([byte]))
        assert status_line(read_all(peer)) == 200


def test_pipelined_requests_are_each_answered(ferryd):
    one = b"GET /v1/runs HTTP/1.1\r\nHost: x\r\n\r\n"
    last = b"GET /v1/runs HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    with connect(ferryd) as peer:
        peer.sendall(one * 20 + last)
        assert read_all(peer).count(b"HTTP/1.1 200") == 21


def test_a_client_that_never_reads_its_answers_stops_nobody(ferryd):
    with connect(ferryd) as peer:
        peer.setblocking(False)
        request_ = b"GET /v1/openapi HTTP/1.1\r\nHost: x\r\n\r\n" * 100
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            try:
                peer.send(request_)
            except BlockingIOError:
                break
            except (BrokenPipeError, ConnectionResetError):
                break
        alive(ferryd)


def test_a_hundred_idle_connections_stop_nobody(ferryd, volumes):
    idle = [connect(ferryd) for _ in range(100)]
    try:
        for peer in idle[::2]:
            peer.sendall(b"GET /v1/ru")
        alive(ferryd)
        ferryd.clone(volumes.file(MiB), volumes.path())
    finally:
        for peer in idle:
            peer.close()


def test_more_connections_than_allowed_are_turned_away_and_room_comes_back(ferryd):
    many = []
    try:
        for _ in range(700):
            try:
                many.append(connect(ferryd, 2))
            except OSError:
                break
    finally:
        for peer in many:
            peer.close()

    def answered():
        return ferryd.ctl("list", "--json", expect=None).status == 0
    wait_until(answered, 5, "an answer")


def test_clients_that_vanish_amid_everything(ferryd, volumes):
    for at in range(60):
        with connect(ferryd) as peer:
            peer.sendall(b"GET /v1/runs HTTP/1.1\r\nHost: x\r\n\r\n"[:volumes.random.randrange(1, 38)])
    alive(ferryd)


def test_requests_of_random_bytes(ferryd, volumes):
    for _ in range(100):
        with connect(ferryd) as peer:
            try:
                peer.sendall(volumes.random.randbytes(volumes.random.randrange(1, 2000)))
                peer.shutdown(socket.SHUT_WR)
            except OSError:
                pass
            read_all(peer)
    alive(ferryd)


def test_the_api_checks_paths_as_ferryctl_does(ferryd, volumes):
    """A relative path means nothing to a daemon."""
    target = volumes.loop(MiB)
    before = fingerprint(target)
    status, answer = ferryd.request("POST", "/v1/runs", {"source": "relative", "targets": [str(target)]})
    assert status in (400, 412)
    assert answer["error"]["code"] in ("invalid_argument", "refused")
    assert fingerprint(target) == before


def test_the_description_of_the_api_is_served(ferryd):
    status, description = ferryd.request("GET", "/v1/openapi")
    assert status == 200
    assert description["openapi"].startswith("3.")
    assert {"/v1/runs", "/v1/runs/{id}", "/v1/check", "/v1/devices"} <= description["paths"].keys()
