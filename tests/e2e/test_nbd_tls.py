# SPDX-License-Identifier: Apache-2.0
"""TLS to NBD servers, with X.509 certificates and with pre-shared keys; and servers that only pretend."""
import socket
import struct
import threading

import pytest

from harness import nbd
from harness.compare import assert_same
from harness.volumes import MiB, need

SIZE = 8 * MiB


@pytest.fixture(autouse=True)
def needed():
    need("nbdkit", "certtool", "psktool")


@pytest.fixture
def source(volumes):
    return volumes.file(SIZE)


@pytest.fixture
def pki(volumes):
    return nbd.make_certificates(volumes)


def test_certificates_by_option_by_uri_and_by_configuration(ferryds, volumes, source, pki):
    image = volumes.file(SIZE, data=False)
    server = nbd.nbdkit_tcp(volumes, "file", image, scheme="nbds", host="localhost",
                            options=["--tls=require", f"--tls-certificates={pki}", "--tls-verify-peer"])
    ferryd = ferryds()
    refused = ferryd.ctl("clone", source, server.uri, expect=4)
    assert "--tls-certificates" in refused.stderr, refused.stderr
    empty = volumes.path("empty")
    empty.mkdir()
    refused = ferryd.ctl("clone", source, server.uri, "--tls-certificates", empty, expect=4)
    assert "ca-cert.pem" in refused.stderr, refused.stderr
    ferryd.clone(source, server.uri, options=["--tls-certificates", pki])
    assert_same(source, image)
    back = volumes.path()
    ferryd.clone(f"{server.uri}/?tls-certificates={pki}", back)
    assert_same(source, back)
    configured, again = ferryds("--tls-certificates", pki), volumes.path()
    configured.clone(server.uri, again)
    assert_same(source, again)


def test_keys_by_option_and_by_uri(ferryd, volumes, source):
    psk, image = nbd.make_psk(volumes), volumes.file(SIZE, data=False)
    server = nbd.nbdkit(volumes, "file", image, options=["--tls=require", f"--tls-psk={psk}"])
    uri = server.uri.replace("nbd+unix:///", "nbds+unix://alice@/")
    shown = ferryd.clone(source, uri, options=["--tls-psk-file", psk])
    assert_same(source, image)
    key = psk.read_text().strip().split(":")[1]
    assert key not in str(shown) and key not in ferryd.stderr()
    back = volumes.path()
    ferryd.clone(f"{uri}&tls-psk-file={psk}", back)
    assert_same(source, back)
    assert ferryd.ctl("clone", uri.replace("alice", "mallory"), volumes.path(), "--tls-psk-file", psk,
                      expect=4).stderr


def test_an_unencrypted_name_for_an_encrypting_server_is_refused(ferryd, volumes, source, pki):
    server = nbd.nbdkit_tcp(volumes, "file", source, options=["--tls=require", f"--tls-certificates={pki}"])
    assert "TLS" in ferryd.ctl("clone", server.uri, volumes.path(), expect=4).stderr


def test_a_server_of_another_name_or_authority_is_refused(ferryd, volumes, source, pki):
    other = nbd.make_certificates(volumes)
    server = nbd.nbdkit_tcp(volumes, "file", source, scheme="nbds", host="localhost",
                            options=["--tls=require", f"--tls-certificates={other}"])
    refused = ferryd.ctl("clone", server.uri, volumes.path(), "--tls-certificates", pki, expect=4)
    assert "certificate" in refused.stderr.lower(), refused.stderr


class Pretender(threading.Thread):
    """Says yes to TLS and then goes on in the clear, as the NBD handshake would without it."""

    def __init__(self):
        super().__init__(daemon=True)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.uri = f"nbds://127.0.0.1:{self.listener.getsockname()[1]}"
        self.asked_for_tls = 0
        self.start()

    def run(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            with client:
                try:
                    self.pretend(client)
                except (OSError, struct.error):
                    pass

    def pretend(self, client):
        client.settimeout(10)
        client.sendall(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
        client.recv(4, socket.MSG_WAITALL)
        _, option, length = struct.unpack(">QII", client.recv(16, socket.MSG_WAITALL))
        if length:
            client.recv(length, socket.MSG_WAITALL)
        self.asked_for_tls += option == 5
        client.sendall(struct.pack(">QIII", 0x3e889045565a9, option, 1, 0))
        # As if TLS had been agreed upon: a plain acknowledgement of whatever comes.
        client.sendall(struct.pack(">QIII", 0x3e889045565a9, 7, 1, 0) * 4)
        client.recv(4096)


def test_certificates_prove_nothing_over_a_unix_socket(ferryd, volumes, source, pki):
    server = nbd.nbdkit(volumes, "file", source, scheme="nbds+unix",
                        options=["--tls=require", f"--tls-certificates={pki}"])
    refused = ferryd.ctl("clone", server.uri, volumes.path(), "--tls-certificates", pki, expect=4)
    assert "proves nothing" in refused.stderr, refused.stderr


def test_a_server_that_only_pretends_is_refused(ferryd, volumes, pki):
    pretender = Pretender()
    volumes.at_end(pretender.listener.close)
    refused = ferryd.ctl("clone", pretender.uri, volumes.path(), "--tls-certificates", pki, expect=4)
    assert pretender.asked_for_tls > 0
    assert "TLS" in refused.stderr or "gnutls" in refused.stderr.lower(), refused.stderr


def test_a_server_that_says_nothing_is_given_up_in_time(ferryd, volumes):
    silent = socket.create_server(("127.0.0.1", 0))
    volumes.at_end(silent.close)
    refused = ferryd.ctl("clone", f"nbd://127.0.0.1:{silent.getsockname()[1]}", volumes.path(), expect=4)
    assert "no answer within 10" in refused.stderr, refused.stderr
