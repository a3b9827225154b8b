# SPDX-License-Identifier: Apache-2.0
"""What systemd expects of a service: readiness, the watchdog, socket activation, and a clean end."""
import os
import signal
import socket
import subprocess

import pytest

from harness.ferryd import Ferryd
from harness.volumes import MiB, need
from harness.waiting import TIME_SCALE, wait_until


class NotifySocket:
    """Stands in for systemd's end of $NOTIFY_SOCKET."""

    def __init__(self, path):
        self.path = str(path)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.path)
        self.messages = []

    def wait_for(self, line, seconds=10):
        self.socket.settimeout(0.1)

        def came():
            if line in self.messages:
                return True
            try:
                self.messages += self.socket.recv(4096).decode().split("\n")
            except socket.timeout:
                pass
            return line in self.messages
        wait_until(came, seconds, line)
        self.messages.remove(line)


@pytest.fixture
def notify(volumes):
    made = NotifySocket(volumes.path("notify"))
    yield made
    made.socket.close()


def test_readiness_is_told_once_the_socket_answers(ferryds, notify):
    ferryd = Ferryd(environment={"NOTIFY_SOCKET": notify.path})
    ferryds.made.append(ferryd)
    ferryd.spawn()
    notify.wait_for("READY=1")
    assert ferryd.request("GET", "/v1/runs")[0] == 200


def test_the_end_is_told(ferryds, notify):
    ferryd = ferryds(environment={"NOTIFY_SOCKET": notify.path})
    notify.wait_for("READY=1")
    ferryd.stop()
    notify.wait_for("STOPPING=1")


def test_the_watchdog_is_fed(ferryds, notify):
    ferryds(environment={"NOTIFY_SOCKET": notify.path, "WATCHDOG_USEC": "600000"})
    for _ in range(3):
        notify.wait_for("WATCHDOG=1", 0.6)


def test_the_watchdog_is_fed_while_a_run_is_busy(ferryds, notify, volumes):
    ferryd = ferryds(environment={"NOTIFY_SOCKET": notify.path, "WATCHDOG_USEC": "600000"})
    run = ferryd.start_clone(volumes.file(64 * MiB), volumes.path(), options=["--rate", "32M"])
    for _ in range(3):
        notify.wait_for("WATCHDOG=1", 0.6)
    ferryd.ctl("cancel", run)


def test_without_systemd_nothing_is_told_and_nothing_is_missed(ferryd, volumes):
    ferryd.clone(volumes.file(MiB), volumes.path())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_both_signals_end_it_cleanly(ferryd, number):
    ferryd.process.send_signal(number)
    assert ferryd.process.wait(10 * TIME_SCALE) == 0
    ferryd.process = None
    assert not ferryd.socket.exists()


def test_a_closed_terminal_and_a_broken_pipe_do_not_kill_it(ferryd):
    ferryd.process.send_signal(signal.SIGPIPE)
    assert ferryd.ctl("list", "--json").json == []


@pytest.fixture
def activated(ferryds):
    """A ferryd that systemd-socket-activate starts at the first connection."""
    need("systemd-socket-activate")
    ferryd = Ferryd()
    ferryds.made.append(ferryd)
    with open(ferryd.log, "ab") as log:
        ferryd.process = subprocess.Popen(
            ["systemd-socket-activate", f"--listen={ferryd.socket}", *ferryd.command()], stdin=subprocess.DEVNULL,
            stdout=log, stderr=log)
    wait_until(ferryd.socket.exists, what="the socket")
    return ferryd


def test_the_first_connection_starts_it(activated, volumes):
    assert activated.ctl("list", "--json").json == []
    activated.clone(volumes.file(MiB), volumes.path())


def test_an_activated_socket_is_left_to_its_owner(activated):
    activated.ctl("list", "--json")
    activated.stop()
    assert activated.socket.exists()


def test_descriptors_do_not_leak_into_it(ferryd):
    """Only what it needs: nothing of the parent's."""
    names = [os.readlink(f"/proc/{ferryd.process.pid}/fd/{number}")
             for number in os.listdir(f"/proc/{ferryd.process.pid}/fd")]
    assert len(names) < 40, names
