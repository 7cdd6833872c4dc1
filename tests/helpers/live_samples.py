"""What the daemon answers to ``ipsecq top``: samples with as little in them as a test needs."""


def sa(spi, packets, octets, *, peer="198.51.100.1", direction="out", bad=0, problem=""):
    ends = ("192.0.2.1", peer) if direction == "out" else (peer, "192.0.2.1")
    return {
        "spi": f"0x{spi:08x}", "protocol": "esp", "mode": "tunnel", "src": ends[0], "dst": ends[1], "direction": direction,
        "state": "mature", "algorithms": "aes-gcm-16", "packets": packets, "bytes": octets, "bad": bad, "replays": 0,
        "drops": 0, "last_use": 0, "expires": None, "used": 0.0, "successor": False, "problem": problem,
    }  # fmt: skip


def worker(index, busy, packets, *, up=True, lost=0):
    return {
        "index": index, "pid": 100 + index, "up": up, "restarts": 0, "busy": busy, "in": packets, "out": 0, "waiting": 3,
        "lost": lost, "offloads": [],
    }  # fmt: skip


def sample(time=1000.0, *, packets=0, sas=(), workers=(), drops=(), tunnels=(), started=900.0, fail_open=0, success=True):
    peers = [
        {"peer": "198.51.100.1", "direction": "out", "packets": packets, "bytes": 100 * packets, "bad": 0, "replays": 0,
         "drops": 0, "sas": 1, "last_use": 0},
    ]  # fmt: skip
    return {
        "time": time, "version": "1.2", "host": "gw1.example.net", "started": started, "mechanism": "native", "devices": [],
        "fail_open": fail_open, "reload": {"success": success, "time": 0.0}, "policies": {"in": 1, "out": 2},
        "sa_count": len(sas), "tunnel_count": len(tunnels), "packets": {"in": packets, "out": 2 * packets},
        "bytes": {"in": 100 * packets, "out": 200 * packets},
        "drops": [{"reason": name, "count": count, "meaning": "why"} for name, count in drops],
        "workers": list(workers), "tunnels": list(tunnels), "peers": peers, "sas": list(sas),
    }  # fmt: skip
