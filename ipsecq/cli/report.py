"""What commands print for people: tables and reports, 80 columns where they fit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ipsecq.doctor.finding import Finding


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns as wide as their widest cell; numbers to the right."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max([len(name), *(len(row[at]) for row in texts)]) for at, name in enumerate(head)]
    right = [bool(texts) and all(row[at].replace(".", "").isdigit() for row in texts) for at in range(len(head))]
    lines = [
        "  ".join(cell.rjust(width) if to_right else cell.ljust(width)
                  for cell, width, to_right in zip(row, widths, right, strict=True)).rstrip()
        for row in [list(head), *texts]
    ]  # fmt: skip
    return "\n".join(lines)


def octets(number: int) -> str:
    """``1.5 MB``: powers of 1000, as ``ip -s`` has with -h."""
    value = float(number)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            return f"{number} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return ""


def findings(found: Iterable[Finding]) -> str:
    """The report of ``ipsecq doctor``: a line each, and below it how to mend what is not well."""
    lines = []
    for finding in found:
        lines.append(f"{finding.grade.value:4}  {finding.subject}: {finding.message}")
        if finding.mend:
            lines.append(f"        -> {finding.mend}")
    return "\n".join(lines)


def findings_json(found: Iterable[Finding]) -> list[dict[str, str]]:
    """The same for programs."""
    return [
        {"grade": each.grade.value, "subject": each.subject, "message": each.message, "mend": each.mend}
        for each in found
    ]


def status(answer: dict[str, Any]) -> str:
    """The report of ``ipsecq status``."""
    lines = [
        f"ipsecq {answer['version']}, up {duration(answer['uptime'])}, queues by {answer['mechanism']}, "
        f"devices {' '.join(answer['devices']) or 'none'}"
    ]
    lines += [f"FAIL OPEN: {what}" for what in answer["fail_open"]]
    lines += [f"STATE LOST: {what}" for what in answer["state"]]
    if not answer["reload"]["success"]:
        lines.append("the last reload was refused: the files differ from what is in force")
    lines += ["", "Workers"]
    lines.append(
        table(
            ("worker", "pid", "state", "restarts", "queue", "waiting", "lost", "in", "out", "busy s"),
            [
                (
                    worker["index"], worker["pid"], "up" if worker["up"] else "DOWN", worker["restarts"],
                    worker["queue"], worker["queue_length"], worker["kernel_drops"], worker["packets_in"],
                    worker["packets_out"], f"{worker['busy_seconds']:.1f}",
                )
                for worker in answer["workers"]
            ],
        )
    )  # fmt: skip
    lines += ["", "Offloads", offloads(answer["offloads"])]
    if answer["interfaces"]:
        lines += ["", "Interfaces", interfaces(answer["interfaces"])]
    lines += ["", f"SAs ({answer['sa_count']})"]
    for sa in answer["sas"]:
        algorithms = " ".join(filter(None, (sa["encryption"], sa["authentication"], sa["compression"])))
        extra = "".join([" esn" if sa["esn"] else "", f" udp {sa['natt'][0]}>{sa['natt'][1]}" if sa["natt"] else ""])
        lines.append(
            f"{sa['direction']:3} {sa['protocol']}/{sa['mode']} {sa['spi']} {sa['src']} > {sa['dst']}"
            f"  {algorithms}{extra}  {sa['state']}"
        )
        lines.append(
            f"      {sa['packets']} packets, {octets(sa['bytes'])}, sequence {sa['sequence']}, "
            f"ICV failures {sa['icv_failures']}, replays {sa['replays']}, other drops {sa['drops']}"
        )
        if sa["problem"]:
            lines.append(f"      DOES NOT SEND: {sa['problem']}")
    lines += ["", f"Policies ({answer['policy_count']})"]
    lines += [f"{policy['id']:4}  {policy['policy']}" for policy in answer["policies"]]
    if answer["sockets"]:
        lines += ["", f"Policies of sockets ({len(answer['sockets'])})"]
        for pair in answer["sockets"]:
            count = "from before the daemon's start" if pair["inherited"] else f"{pair['sockets']} open"
            extra = "" if pair["privileged"] else ", behind the SPD"
            lines += [f"mark {pair['mark']}, {count}{extra}", f"      {pair['out']}", f"      {pair['in']}"]
    lines += ["", "Counters"]
    lines.append(table(("name", "count"), sorted(answer["counters"].items())))
    return "\n".join(lines)


def offloads(found: Iterable[dict[str, Any]]) -> str:
    """What makes packets cheaper: in use, or why not."""
    rows = []
    for each in found:
        state = "in use" if each["active"] else "off"
        if each["workers"] and not each["active"]:
            state = "in worker " + " ".join(map(str, each["workers"]))
        rows.append((each["name"], state, each["why"]))
    return table(("offload", "state", "why not"), rows)


def interfaces(found: Iterable[dict[str, Any]]) -> str:
    """The table of ``ipsecq interface``."""
    rows = []
    for each in found:
        state = ", ".join(filter(None, ("up" if each["up"] else "DOWN", each["problem"])))
        rows.append((
            each["name"], each["local"], each["remote"], each["reqid"], each["mtu"], state, each["packets_in"],
            octets(each["bytes_in"]), each["packets_out"], octets(each["bytes_out"]),
            each["drops_in"] + each["drops_out"],
        ))  # fmt: skip
    return table(
        ("name", "local", "remote", "reqid", "mtu", "state", "in", "", "out", "", "dropped"), rows
    )  # fmt: skip


def duration(seconds: float) -> str:
    """``3 d 04:05:06``."""
    days, rest = divmod(int(seconds), 86400)
    clock = f"{rest // 3600:02}:{rest // 60 % 60:02}:{rest % 60:02}"
    return f"{days} d {clock}" if days else clock
