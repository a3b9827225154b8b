# SPDX-License-Identifier: Apache-2.0
"""Databases under load on a volume that is cloned live: they start on the copy, and every transaction that was
acknowledged before the freeze is there."""
import os
import pwd
import sqlite3
import subprocess
import threading
from pathlib import Path

import pytest

from harness.live import LiveVolume
from harness.volumes import MiB, run
from harness.waiting import wait_until

POSTGRES = Path("/usr/lib/postgresql/15/bin")


class Acknowledged:
    """The numbers of the transactions that the database said were committed, in a file off the volume. The cutover
    command copies it while everything is frozen."""

    def __init__(self, volumes):
        self.path, self.frozen = volumes.path("acknowledged"), volumes.path("frozen")
        self.file = open(self.path, "a", buffering=1)
        self.command = f"cp {self.path} {self.frozen}"

    def add(self, number):
        self.file.write(f"{number}\n")

    def before_the_freeze(self):
        lines = self.frozen.read_text()
        return {int(line) for line in lines[:lines.rfind("\n")].split()}


class Writer(threading.Thread):
    """Commits numbers one after another until stopped."""

    def __init__(self, commit, acknowledged):
        super().__init__()
        self.commit, self.acknowledged = commit, acknowledged
        self.count, self.stopped, self.error = 0, threading.Event(), None
        self.start()

    def run(self):
        try:
            while not self.stopped.is_set():
                self.commit(self.count)
                self.acknowledged.add(self.count)
                self.count += 1
        except Exception as error:  # told by stop()
            self.error = error

    def stop(self):
        self.stopped.set()
        self.join(60)
        if self.error:
            raise self.error


def test_sqlite_in_wal_mode(ferryd, volumes):
    volume = LiveVolume(volumes, "loop512", "ext4", size=128 * MiB)
    acknowledged = Acknowledged(volumes)
    database = sqlite3.connect(volume.mount / "db", check_same_thread=False, isolation_level=None)
    database.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; CREATE TABLE log (number INTEGER, pad TEXT)")

    def commit(number):
        database.execute("INSERT INTO log VALUES (?, ?)", (number, "x" * (number % 900)))

    writer = Writer(commit, acknowledged)
    try:
        wait_until(lambda: writer.count > 200, 30, "some transactions")
        ferryd.clone(volume.source, volume.target, options=["--cutover-cmd", acknowledged.command])
        seen = writer.count
        wait_until(lambda: writer.count > seen + 20, 30, "transactions after the cutover")
    finally:
        writer.stop()
        database.close()
    copy = volumes.mount(volume.target, "ext4")
    with sqlite3.connect(copy / "db") as found:
        assert found.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        numbers = {number for number, in found.execute("SELECT number FROM log")}
    found.close()
    before = acknowledged.before_the_freeze()
    assert len(before) > 200 and before <= numbers, f"lost: {sorted(before - numbers)[:5]}"
    assert len(numbers) <= max(before) + 3, "the copy is of one moment"


class Postgres:
    """A cluster on a volume, run by the user postgres."""

    def __init__(self, volumes, directory, create):
        self.directory, self.socket = Path(directory, "cluster"), volumes.path("socket")
        self.socket.mkdir()
        user = pwd.getpwnam("postgres")
        self.demote = lambda: (os.setgid(user.pw_gid), os.setuid(user.pw_uid))
        os.chown(self.socket, user.pw_uid, user.pw_gid)
        os.chown(directory, user.pw_uid, user.pw_gid)
        if create:
            self.call("initdb", "--no-locale", "-A", "trust", "-D", self.directory)
        else:
            (self.directory / "postmaster.pid").unlink(missing_ok=True)
        self.call("pg_ctl", "-w", "-D", self.directory, "-l", self.socket / "log", "-o",
                  f"-k {self.socket} -c listen_addresses= -c shared_buffers=16MB -c checkpoint_timeout=30s "
                  "-c full_page_writes=on -c max_wal_size=64MB", "start")
        volumes.at_end(self.stop)
        self.running = True

    def call(self, program, *words):
        return run(POSTGRES / program, *words, preexec_fn=self.demote, cwd="/")

    def sql(self, text):
        return self.call("psql", "-h", self.socket, "-d", "postgres", "-Atqc", text)

    def stop(self):
        if self.running:
            self.running = False
            self.call("pg_ctl", "-D", self.directory, "-m", "immediate", "stop")


def test_postgresql_under_pgbench(ferryd, volumes):
    if not (POSTGRES / "pgbench").exists():
        pytest.skip("not installed: postgresql")
    volume = LiveVolume(volumes, "loop512", "ext4", size=400 * MiB)
    acknowledged = Acknowledged(volumes)
    cluster = Postgres(volumes, volume.mount, create=True)
    cluster.sql("CREATE TABLE log (number integer)")
    cluster.call("pgbench", "-q", "-i", "-s", "2", "-h", cluster.socket, "postgres")
    bench = subprocess.Popen([POSTGRES / "pgbench", "-c", "4", "-T", "300", "-h", cluster.socket, "postgres"],
                             preexec_fn=cluster.demote, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    session = subprocess.Popen([POSTGRES / "psql", "-h", cluster.socket, "-d", "postgres", "-Atq"], cwd="/",
                               preexec_fn=cluster.demote, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def commit(number):
        session.stdin.write(f"INSERT INTO log VALUES ({number}) RETURNING number;\n")
        session.stdin.flush()
        assert session.stdout.readline().strip() == str(number)

    writer = Writer(commit, acknowledged)
    try:
        wait_until(lambda: writer.count > 100, 30, "some transactions")
        shown = ferryd.clone(volume.source, volume.target, options=["--cutover-cmd", acknowledged.command])
        seen = writer.count
        wait_until(lambda: writer.count > seen + 20, 30, "transactions after the cutover")
    finally:
        writer.stop()
        session.stdin.close()
        session.wait(30)
        session.stdout.close()
        bench.terminate()
        bench.wait(30)
    cluster.stop()
    assert "checksum" not in [each["kind"] for each in shown["passes"]]
    twin = Postgres(volumes, volumes.mount(volume.target, "ext4"), create=False)
    numbers = {int(line) for line in twin.sql("SELECT number FROM log").split()}
    before = acknowledged.before_the_freeze()
    assert len(before) > 100 and before <= numbers, f"lost: {sorted(before - numbers)[:5]}"
    assert len(numbers) <= max(before) + 3, "the copy is of one moment"
    # pgbench's own invariant: every transaction changes the branches and the tellers by the same sum.
    branches, tellers = (int(twin.sql(f"SELECT sum({each[0]}balance) FROM pgbench_{each}")) for each in ("branches", "tellers"))
    assert branches == tellers
    twin.stop()
