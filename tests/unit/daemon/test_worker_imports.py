"""There are many workers, and each has its own copy of every module."""

import subprocess
import sys


def test_a_worker_loads_no_event_loop_and_no_web_server():
    code = "import sys, ipsecq.daemon.worker; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"asyncio", "ssl", "prometheus_client", "typer", "http.server"}.isdisjoint(loaded)
