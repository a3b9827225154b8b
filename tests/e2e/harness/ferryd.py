# SPDX-License-Identifier: Apache-2.0
"""A ferryd of the test's own, and ferryctl to talk to it."""
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from pathlib import Path

from harness.waiting import TIME_SCALE, Stopwatch, wait_until

ENDED = ("completed", "failed", "cancelled", "rolled-back")

# What show RUN --json holds at least.
RUN_MEMBERS = {"id", "name", "state", "mode", "tracker", "source", "targets", "granule_bytes", "bytes_total",
               "bytes_copied", "bytes_zeroed", "bytes_read", "passes", "downtime_ms",
               "throughput_bytes_per_second", "eta_seconds", "verify", "bad_ranges", "restarts", "error"}


def binary(name):
    directory = os.environ.get("BLOCKFERRY_BIN") or Path(__file__).parents[3] / "build" / "bin"
    path = Path(directory, name)
    assert path.exists(), f"{path} is not built; BLOCKFERRY_BIN names the directory of the programs"
    return str(path)


def ask_for_cutover(ferryd, run):
    """By somebody who may be told nothing, since ferryd is killed meanwhile."""
    def ask():
        try:
            ferryd.request("POST", f"/v1/runs/{run}/cutover")
        except OSError:
            pass
    thread = threading.Thread(target=ask)
    thread.start()
    return thread


class CtlResult:
    def __init__(self, words, status, stdout, stderr):
        self.words, self.status, self.stdout, self.stderr = words, status, stdout, stderr

    @property
    def json(self):
        return json.loads(self.stdout)

    @property
    def error(self):
        """The message of a failed command, given with or without --json."""
        line = self.stderr.strip()
        return json.loads(line)["error"]["message"] if line.startswith("{") else line

    def __repr__(self):
        return (f"ferryctl {' '.join(self.words)}: exit {self.status}\n--- stdout\n{self.stdout}\n"
                f"--- stderr\n{self.stderr}")


class UnixConnection(http.client.HTTPConnection):
    """HTTP on the control socket."""

    def __init__(self, path, timeout=30):
        super().__init__("localhost", timeout=timeout)
        self.socket_path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self.socket_path))


class Ferryd:
    """One state directory and socket; the process behind them comes and goes."""

    def __init__(self, *options, environment=None, preexec=None, state_dir=None):
        self.directory = Path(tempfile.mkdtemp(prefix="blockferry-ferryd-"))
        self.directory.chmod(0o755)
        self.state_dir = Path(state_dir or self.directory / "state")
        self.socket = self.directory / "control.sock"
        self.log = self.directory / "stderr"
        self.options = [str(option) for option in options]
        self.environment = environment or {}
        self.preexec = preexec
        self.process = None
        self.killed = False

    # The process

    def command(self):
        metrics = [] if "--metrics-listen" in self.options else ["--metrics-listen", "none"]
        return [binary("ferryd"), "--state-dir", str(self.state_dir), "--socket", str(self.socket), *metrics,
                *self.options]

    def spawn(self):
        """Starts the process without waiting for it."""
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(self.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                            env={**os.environ, **self.environment}, preexec_fn=self.preexec)
        return self

    def start(self, seconds=20):
        self.spawn()
        self.wait_ready(seconds)
        return self

    def wait_ready(self, seconds=20):
        def answers():
            assert self.process.poll() is None, f"ferryd ended with {self.process.returncode}:\n{self.stderr()}"
            try:
                return self.request("GET", "/v1/runs")[0] == 200
            except (OSError, http.client.HTTPException):
                return False
        wait_until(answers, seconds, "ferryd's first answer")

    def stop(self, seconds=10):
        """SIGTERM; how long the process took to end, which must be of its own will and with status 0."""
        watch = Stopwatch()
        self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(seconds * TIME_SCALE)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"ferryd did not end within {seconds} s of SIGTERM:\n{self.stderr()}") from None
        self.process = None
        assert status == 0, f"ferryd ended with {status}:\n{self.stderr()}"
        return watch.seconds()

    def kill(self):
        self.killed = True
        self.process.kill()
        self.process.wait(60)
        self.process = None

    def restart(self):
        self.stop()
        return self.start()

    def close(self):
        try:
            if self.process is not None:
                print(f"--- ferryd's stderr\n{self.stderr()}")
                self.stop(20)
            elif self.log.exists():
                print(f"--- ferryd's stderr\n{self.stderr()}")
        finally:
            if self.process is not None:
                self.kill()
            self.remove_pins()
            shutil.rmtree(self.directory, ignore_errors=True)

    def remove_pins(self):
        """Trackers of runs that had not ended outlive every process; with their state directory they are nobody's."""
        try:
            name = (self.state_dir / "tracker-id").read_text()
        except OSError:
            return
        shutil.rmtree(Path("/sys/fs/bpf/blockferry", name), ignore_errors=True)

    def stderr(self):
        return self.log.read_text(errors="replace")

    def status_kib(self, field):
        """A line of /proc/PID/status, such as VmHWM."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1])
        raise AssertionError(f"no {field}")

    # Talking to it

    def request(self, method, path, body=None, timeout=30):
        """(status, parsed answer) of one request to the API."""
        connection = UnixConnection(self.socket, timeout)
        try:
            content = None if body is None else json.dumps(body)
            connection.request(method, path, content, {"Content-Type": "application/json"} if content else {})
            answer = connection.getresponse()
            text = answer.read()
            return answer.status, json.loads(text) if text else None
        finally:
            connection.close()

    def show(self, run):
        """The run's object, straight from the API: what `show RUN --json` prints, without a process a poll."""
        status, answer = self.request("GET", f"/v1/runs/{run}")
        assert status == 200, answer
        return answer

    def spawn_ctl(self, *words, **options):
        words = [str(word) for word in words]
        return subprocess.Popen([binary("ferryctl"), "--socket", str(self.socket), *words], text=True,
                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)

    def ctl(self, *words, expect=0, timeout=60, **options):
        """Runs ferryctl and checks what holds for every command: its exit status, and one line for an error."""
        words = [str(word) for word in words]
        process = self.spawn_ctl(*words, **options)
        try:
            stdout, stderr = process.communicate(timeout=timeout * TIME_SCALE)
        except subprocess.TimeoutExpired:
            process.kill()
            stdout, stderr = process.communicate()
            raise AssertionError(f"ferryctl {' '.join(words)} did not end within {timeout} s\n{stdout}\n{stderr}\n"
                                 f"ferryd: {self.stderr()}") from None
        result = CtlResult(words, process.returncode, stdout, stderr)
        if expect is not None:
            assert result.status == expect, repr(result)
        if result.status != 0 and "check" not in words:  # whose answer is a report
            assert len(result.stderr.strip().splitlines()) == 1, repr(result)
        if "--json" in words and "check" not in words:
            if result.status != 0:
                assert json.loads(result.stderr)["error"]["code"], repr(result)
            if result.stdout and "watch" not in words:
                json.loads(result.stdout)
        return result

    def clone(self, source, *targets, options=(), expect=0, timeout=60):
        """`clone --json` to its end: the run's object."""
        result = self.ctl("clone", source, *targets, "--json", *options, expect=expect, timeout=timeout)
        return result.json if result.stdout else None

    def start_clone(self, source, *targets, options=()):
        """`clone --detach`: the run's id."""
        return self.clone(source, *targets, options=("--detach", *options))["id"]

    def wait_for_first_run(self):
        """The id of the only run, as soon as there is one."""
        return wait_until(lambda: self.request("GET", "/v1/runs")[1], what="the run")[0]["id"]

    def wait_for(self, run, condition, seconds=30, what="the awaited state"):
        """Polls until condition(object) holds; the object."""
        last = {}

        def holds():
            last.update(self.show(run))
            return condition(last)
        try:
            wait_until(holds, seconds, what)
        except AssertionError as error:
            raise AssertionError(f"{error}: {json.dumps(last)}") from None
        return last

    def wait_state(self, run, *states, seconds=30):
        """Waits for one of the states; fails at once where the run ended in another."""
        reached = self.wait_for(run, lambda shown: shown["state"] in states + ENDED, seconds,
                                f"state {' or '.join(states)}")
        assert reached["state"] in states, json.dumps(reached)
        return reached

    def wait_end(self, run, state="completed", seconds=60):
        return self.wait_state(run, state, seconds=seconds)
