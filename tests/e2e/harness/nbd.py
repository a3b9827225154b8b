# SPDX-License-Identifier: Apache-2.0
"""NBD servers of the tests' own: nbdkit, qemu-nbd, qemu-storage-daemon, nbd-server. They end with their test."""
import json
import os
import signal
import socket
import subprocess
from pathlib import Path

from harness.volumes import run
from harness.waiting import wait_until


class Server:
    """One process that serves one export on a UNIX socket, or on a port of the loopback; it comes and goes."""

    def __init__(self, volumes, command, uri, ready):
        """`ready`: whether it takes connections."""
        self.command, self.uri, self.ready = [str(word) for word in command], uri, ready
        self.log = volumes.path("server-log")
        self.process = None
        volumes.at_end(self.kill)

    def start(self):
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

        def up():
            assert self.process.poll() is None, f"{self.command} ended:\n{self.log.read_text(errors='replace')}"
            return self.ready()
        wait_until(up, 20, f"{self.command[0]} to be ready")
        return self

    def kill(self):
        if self.process is None:
            return
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(20)
        self.process = None

    def restart(self):
        self.kill()
        return self.start()


class Daemon(Server):
    """One that goes into the background by itself, in a process group of its own, and leaves its number in `pid`."""

    def __init__(self, volumes, command, uri, ready, pid):
        super().__init__(volumes, command, uri, ready)
        self.pid = pid

    def start(self):
        with open(self.log, "ab") as log:
            subprocess.run(self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=True, timeout=20)
        wait_until(lambda: self.pid.exists() and self.ready(), 20, f"{self.command[0]} to be ready")
        return self

    def kill(self):
        if not self.pid.exists():
            return
        process = int(self.pid.read_text())
        self.pid.unlink()
        try:
            os.killpg(process, signal.SIGKILL)
        except ProcessLookupError:
            pass


def takes_connections(path):
    def ready():
        with socket.socket(socket.AF_UNIX) as client:
            try:
                client.connect(str(path))
            except OSError:
                return False
            return True
    return ready


def unix_uri(path, export="", scheme="nbd+unix", **parameters):
    more = "".join(f"&{name.replace('_', '-')}={value}" for name, value in parameters.items())
    return f"{scheme}:///{export}?socket={path}{more}"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def nbdkit(volumes, *words, options=(), scheme="nbd+unix", **parameters):
    """`words`: filters, plugin and parameters. A restart comes up on the same socket."""
    path, pid = volumes.path("nbd.sock"), volumes.path("nbd.pid")

    def command_ready():
        return pid.exists() and pid.read_text().strip() == str(server.process.pid)
    command = ["sh", "-c", 'rm -f "$0" "$1"; shift; exec nbdkit "$@"', pid, path, "-f", "--exit-with-parent", "-U", path,
               "-P", pid, *options, *words]
    server = Server(volumes, command, unix_uri(path, scheme=scheme, **parameters), command_ready)
    return server.start()


def nbdkit_tcp(volumes, *words, options=(), scheme="nbd", host="127.0.0.1"):
    port, pid = free_port(), volumes.path("nbd.pid")
    command = ["nbdkit", "-f", "--exit-with-parent", "-i", host, "-p", port, "-P", pid, *options, *words]
    return Server(volumes, command, f"{scheme}://{host}:{port}", pid.exists).start()


def qemu_nbd(volumes, image, form="raw", *options):
    path = volumes.path("qemu-nbd.sock")
    command = ["qemu-nbd", "--persistent", "--shared=8", "--discard=unmap", "--detect-zeroes=off", "-f", form, "-k", path,
               *options, image]
    return Server(volumes, command, unix_uri(path), takes_connections(path)).start()


def storage_daemon(volumes, image, form="raw", writable=True):
    path, pid = volumes.path("qsd.sock"), volumes.path("qsd.pid")
    node = json.dumps({"driver": form, "node-name": "disk", "discard": "unmap",
                       "file": {"driver": "file", "filename": str(image), "discard": "unmap"}})
    command = ["qemu-storage-daemon", "--blockdev", node, "--nbd-server", f"addr.type=unix,addr.path={path}", "--export",
               f"type=nbd,id=e,node-name=disk,name=disk,writable={'on' if writable else 'off'}", "--pidfile", pid]
    return Server(volumes, command, unix_uri(path, "disk"), pid.exists).start()


def nbd_server(volumes, image, flush=True):
    """The oldest of them, from a configuration file; over TCP."""
    port, configuration = free_port(), volumes.path("nbd-server.conf")
    configuration.write_text(f"[generic]\nuser=root\ngroup=root\nport={port}\nlistenaddr=127.0.0.1\n[disk]\n"
                             f"exportname={image}\nflush={str(flush).lower()}\ntrim=true\n")

    def ready():
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) == 0
    pid = volumes.path("nbd-server.pid")
    command = ["nbd-server", "-C", configuration, "-p", pid]
    return Daemon(volumes, command, f"nbd://127.0.0.1:{port}/disk", ready, pid).start()


def make_certificates(volumes):
    """A directory for both ends: an authority, a server "localhost" and a client, as certtool makes them."""
    directory = volumes.path("pki")
    directory.mkdir()
    for name in ("ca", "server", "client"):
        (directory / f"{name}-key.pem").write_text(run("certtool", "--generate-privkey", "--key-type=ecdsa"))
    texts = {"ca": "cn = authority\nca\ncert_signing_key\n",
             "server": "cn = localhost\ndns_name = localhost\nip_address = 127.0.0.1\ntls_www_server\nsigning_key\n",
             "client": "cn = client\ntls_www_client\nsigning_key\n"}
    for name, text in texts.items():
        template = directory / f"{name}.info"
        template.write_text(text)
        signed = ["--generate-self-signed"] if name == "ca" else [
            "--generate-certificate", "--load-ca-certificate", directory / "ca-cert.pem", "--load-ca-privkey",
            directory / "ca-key.pem"]
        run("certtool", *signed, "--template", template, "--load-privkey", directory / f"{name}-key.pem", "--outfile",
            directory / f"{name}-cert.pem")
    return directory


def make_psk(volumes, user="alice"):
    path = volumes.path("keys.psk")
    run("psktool", "-u", user, "-p", path)
    os.chmod(path, 0o600)
    return Path(path)
