# SPDX-License-Identifier: Apache-2.0
"""ferryd's metrics, read as Prometheus reads them."""
import http.client
import re


def metrics_address(ferryd):
    """The address that a ferryd with --metrics-listen 127.0.0.1:0 was given, from its log."""
    return re.findall(r"metrics on (127\.0\.0\.1:\d+)", ferryd.stderr())[-1]


def scrape(ferryd):
    """The text of /metrics."""
    connection = http.client.HTTPConnection(metrics_address(ferryd), timeout=10)
    try:
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        assert answer.status == 200
        assert answer.getheader("Content-Type").startswith("text/plain; version=0.0.4")
        return answer.read().decode()
    finally:
        connection.close()


def samples(text):
    """{'name{labels}': value} of all series."""
    found = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            series, value = line.rsplit(" ", 1)
            found[series] = float(value)
    return found
