# SPDX-License-Identifier: Apache-2.0
"""/metrics: well-formed, scraped by a real Prometheus, and in agreement with show --json."""
import json
import os
import socket
import subprocess
import urllib.parse
import urllib.request

import pytest

from harness.metrics import metrics_address, samples, scrape
from harness.volumes import MiB, need
from harness.waiting import wait_until

SIZE = 24 * MiB


@pytest.fixture
def measured(ferryds):
    return ferryds("--metrics-listen", "127.0.0.1:0")


def value(ferryd, series):
    return samples(scrape(ferryd))[series]


def promtool(text):
    """What promtool has to say about it: nothing, where all is well."""
    need("promtool")
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=30)
    return done.returncode, done.stdout + done.stderr


def test_promtool_has_nothing_to_say_at_the_start(measured):
    assert promtool(scrape(measured)) == (0, "")


def test_promtool_has_nothing_to_say_while_runs_go_on_and_after(measured, volumes):
    measured.clone(volumes.file(MiB), volumes.path(), options=["--name", "first"])
    run = measured.start_clone(volumes.loop(SIZE, data=True), volumes.path(), options=["--rate", "4M"])
    measured.wait_for(run, lambda shown: shown["bytes_copied"] > 0)
    text = scrape(measured)
    assert run in text
    assert promtool(text) == (0, "")
    measured.ctl("cancel", run)
    assert promtool(scrape(measured)) == (0, "")


def test_counters_agree_with_the_runs(measured, volumes):
    source = volumes.path()
    source.write_bytes(volumes.data(4 * MiB) + bytes(8 * MiB) + volumes.data(4 * MiB + 77))
    runs = [measured.clone(source, volumes.path()), measured.clone(volumes.loop(SIZE, data=True), volumes.loop(SIZE))]
    found = samples(scrape(measured))
    copied = sum(run["bytes_copied"] for run in runs)
    zeroed = sum(run["bytes_zeroed"] for run in runs)
    assert zeroed == 8 * MiB
    assert found["blockferry_zeroed_bytes_total"] == zeroed
    assert found["blockferry_written_bytes_total"] == copied - zeroed
    assert found["blockferry_read_bytes_total"] == sum(run["bytes_read"] for run in runs)
    assert found["blockferry_verified_bytes_total"] == copied
    assert found["blockferry_checksum_mismatches_total"] == 0
    assert found['blockferry_passes_total{kind="full"}'] == 2
    assert found['blockferry_runs_ended_total{state="completed"}'] == 2
    assert found['blockferry_runs{state="completed"}'] == 2
    assert found['blockferry_io_latency_seconds_count{operation="write"}'] > 0
    assert found['blockferry_io_latency_seconds_sum{operation="read"}'] > 0


def test_two_targets_are_counted_as_the_writes_they_are(measured, volumes):
    measured.clone(volumes.file(SIZE), volumes.path(), volumes.path())
    assert value(measured, "blockferry_written_bytes_total") == 2 * SIZE
    assert value(measured, "blockferry_verified_bytes_total") == 2 * SIZE


def test_mismatches_are_counted(measured, volumes):
    target = volumes.path()
    run = measured.clone(volumes.file(SIZE), target)["id"]
    volumes.write(target, MiB, volumes.data(8192))
    measured.ctl("verify", run, expect=1)
    assert value(measured, "blockferry_checksum_mismatches_total") == 2


def test_errors_are_counted(measured, volumes):
    source = volumes.loop(SIZE, data=True)
    run = measured.start_clone(source, volumes.path(), options=["--rate", "16M"])
    measured.wait_for(run, lambda shown: shown["bytes_copied"] > MiB)
    os.truncate(source.file, SIZE // 2)
    measured.ctl("set", run, "--rate", "0")
    measured.wait_end(run, "failed")
    found = samples(scrape(measured))
    assert found['blockferry_io_errors_total{operation="read"}'] > 0
    assert found['blockferry_runs_ended_total{state="failed"}'] == 1


def test_gauges_of_a_run_go_with_it(measured, volumes):
    run = measured.start_clone(volumes.file(SIZE), volumes.path(), options=["--rate", "4M"])
    shown = measured.wait_for(run, lambda shown: shown["bytes_copied"] > 0)
    text = scrape(measured)
    dirty = next(number for series, number in samples(text).items()
                 if series.startswith("blockferry_run_dirty_granules") and run in series)
    assert 0 < dirty <= SIZE // shown["granule_bytes"]
    measured.ctl("cancel", run)
    measured.wait_end(run, "cancelled")
    assert run not in scrape(measured)


def test_none_listens_nowhere(ferryd):
    listening = [f"socket:[{line.split()[9]}]" for table in ("tcp", "tcp6")
                 for line in open(f"/proc/net/{table}").read().splitlines()[1:] if line.split()[3] == "0A"]
    held = {os.readlink(f"/proc/{ferryd.process.pid}/fd/{number}")
            for number in os.listdir(f"/proc/{ferryd.process.pid}/fd")}
    assert not held & set(listening)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Prometheus:
    def __init__(self, directory, target):
        need("prometheus")
        self.address = f"127.0.0.1:{free_port()}"
        config = directory / "prometheus.yml"
        config.write_text(json.dumps({
            "global": {"scrape_interval": "200ms", "scrape_timeout": "200ms"},
            "scrape_configs": [{"job_name": "blockferry", "static_configs": [{"targets": [target]}]}]}))
        self.log = open(directory / "prometheus.log", "w+")
        self.process = subprocess.Popen(
            ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={directory / 'tsdb'}",
             f"--web.listen-address={self.address}"], stdout=self.log, stderr=self.log)

    def stop(self):
        self.process.terminate()
        self.process.wait(30)
        self.log.seek(0)
        print(self.log.read())
        self.log.close()

    def query(self, expression):
        """[(labels, value)]; nothing while it is not up yet."""
        try:
            with urllib.request.urlopen(f"http://{self.address}/api/v1/query?" +
                                        urllib.parse.urlencode({"query": expression}), timeout=5) as answer:
                parsed = json.load(answer)
        except OSError:
            return []
        assert parsed["status"] == "success"
        return [(each["metric"], float(each["value"][1])) for each in parsed["data"]["result"]]


@pytest.fixture
def prometheus(measured, volumes):
    made = Prometheus(volumes.directory, metrics_address(measured))
    yield made
    made.stop()


def test_a_real_prometheus_scrapes_it(measured, volumes, prometheus):
    wait_until(lambda: prometheus.query('up{job="blockferry"} == 1'), 30, "the first scrape")
    run = measured.start_clone(volumes.file(SIZE), volumes.path(), options=["--rate", "8M"])
    found = wait_until(lambda: prometheus.query(f'blockferry_run_progress_ratio{{run="{run}"}} > 0'), 10, "progress")
    assert 0 < found[0][1] <= 1
    measured.wait_end(run)
    shown = measured.show(run)
    wait_until(lambda: [each[1] for each in prometheus.query("blockferry_read_bytes_total")] == [shown["bytes_read"]],
               10, "the final count")
    assert prometheus.query('blockferry_runs{state="completed"}')[0][1] == 1
    assert prometheus.query('histogram_quantile(0.99, blockferry_io_latency_seconds_bucket{operation="write"})')
    assert prometheus.query('count({__name__=~"blockferry_.*"})')[0][1] > 20
