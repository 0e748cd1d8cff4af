"""mountctl status, metrics and policy reload: the daemon itself, for root."""

from __future__ import annotations

import errno
import os
import time

from mountd.cli.image import size_of
from mountd.cli.report import EXIT_USAGE, printable, say, show_json
from mountd.cli.table import BOLD, RED, coloured, table, terminal_width, wants_colour
from mountd.client import Client
from mountd.errors import ADMIN_INTERFACE, ProtocolError
from mountd.fds import close_all

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Collection, Iterable, Mapping
    from typing import Any

COLLECTOR = "/var/lib/prometheus/node-exporter/mountd.prom"
DOCTOR = (
    "mountctl doctor",
    "mountctl doctor --json | jq '.checks[] | select(.state != \"ok\")'",
    "",
    "exit status: 0 if all is well, 1 if there are warnings, or for wrong usage, 2 if something fails",
)
RELOAD_EXAMPLES = ("mountctl policy check && mountctl policy reload",)
STATUS_EXAMPLES = ("mountctl status", "mountctl status --json | jq .policy.faults")
METRICS_EXAMPLES = (
    "mountctl metrics",
    "mountctl metrics --json",
    f"mountctl metrics --output {COLLECTOR}",
    "",
    "The last one is for the textfile collector of prometheus-node-exporter, from a timer or cron: the file",
    "is replaced as a whole, so that a half of it is never read.",
)


def add_admin_verbs(verbs: Any) -> None:
    """Add the verbs to those of mountctl."""
    from mountd.cli.manners import add_verb

    add = add_verb(verbs, "status", "say how the daemon does, for root", STATUS_EXAMPLES)
    add.add_argument("--json", action="store_true", help="print JSON, for errors as well")
    add = add_verb(
        verbs, "metrics", "print the daemon's counters for Prometheus, for root", METRICS_EXAMPLES
    )
    add.add_argument("--json", action="store_true", help="print JSON, for errors as well")
    add.add_argument("--output", metavar="FILE", help="replace a file with them, as a whole")
    add = add_verb(
        verbs, "doctor", "check whether everything is there that mountd needs, and say what to do", DOCTOR
    )
    add.add_argument("--json", action="store_true", help="print JSON, for errors as well")


def add_reload(verbs: Any) -> None:
    """Add the verb below “policy” that asks the daemon."""
    from mountd.cli.manners import add_verb

    add = add_verb(verbs, "reload", "have the daemon read the policy again, for root", RELOAD_EXAMPLES)
    add.add_argument("--json", action="store_true", help="print JSON, for errors as well")


def call(method: str) -> dict[str, Any]:
    """Call a method of io.mountd.Admin. Raises what `Client` and `Client.call` raise."""
    with Client() as client:
        reply, fds = client.call(f"{ADMIN_INTERFACE}.{method}", {}, [])
    close_all(fds)
    return reply


def status(options: argparse.Namespace) -> int:
    """Print what the daemon says of itself."""
    reply = call("Status")
    if options.json:
        show_json(reply)
        return 0
    try:
        text = describe(reply, width=terminal_width(), colour=wants_colour(), now=time.time())
    except (KeyError, TypeError, AttributeError):
        raise ProtocolError("the reply is not what Status returns") from None
    say(text)
    return 0


def describe(reply: Mapping[str, Any], *, width: int | None, colour: bool, now: float) -> str:
    """Return the reply of Status as text for people. Raises KeyError, TypeError for what is none."""
    pool, store, policy = reply["pool"], reply["store"], reply["policy"]
    lines = [
        f"mountd {reply['version']}, pid {reply['pid']}, for {span(now - reply['started'])}",
        f"sockets:  {', '.join(reply['sockets'])}",
        f"store:    {store_line(store)}",
        f"workers:  {pool['workers']} ({pool['idle']} idle, {pool['busy']} busy, {pool['stuck']} stuck); "
        f"{pool['forks']} started, {pool['killed']} killed",
        f"clients:  {pool['connections']} connected, {pool['queue']} waiting, {pool['accepted']} in all",
    ]
    if reply.get("liveMounts") is not None:
        lines.append(f"mounts:   {reply['liveMounts']} alive")
    state = "broken: everything is denied" if policy["broken"] else f"{policy['rules']} rules"
    lines.append(
        f"policy:   {state}, {policy['keys']} keys; in force for {span(now - policy['since'])}, "
        f"number {policy['generation']}"
    )
    lines = [printable(line) for line in lines]
    lines[0] = coloured(lines[0], BOLD, wanted=colour)
    for fault in policy["faults"]:
        lines.append(coloured(printable(f"  fault: {fault_line(fault)}"), RED, wanted=colour))
    if policy["faults"] and not policy["broken"]:
        lines.append("  The files have faults; the policy from before them is in force.")
    faulty = {each["file"] for each in policy["faults"]}
    files = [[each["path"], role(each, faulty)] for each in policy["files"]]
    parts = ["\n".join(lines)]
    if files:
        parts.append(table(files, ["POLICY FILE", "STATE"], width=width, colour=colour))
    parts.append(
        table(
            [[each["name"], maximum_of(each)] for each in reply["limits"]],
            ["LIMIT", "MAXIMUM"],
            width=width,
            colour=colour,
        )
    )
    kernel = [
        [each["name"], "yes" if each["available"] else "no", each.get("detail") or ""]
        for each in reply["kernel"]
    ]
    parts.append(table(kernel, ["KERNEL", "", "DETAIL"], width=width, colour=colour))
    return "\n\n".join(parts)


def maximum_of(limit: Mapping[str, Any]) -> str:
    """Return a limit for people."""
    name, maximum = limit["name"], limit["maximum"]
    return size_of(maximum) if name.startswith("bytes ") else str(maximum)


def store_line(store: Mapping[str, Any]) -> str:
    """Return one line about the store."""
    if store.get("reason") is not None:
        return f"{store['path']}: {store['reason']}"
    most = size_of(store.get("maximumBytes"))
    return f"{store['path']}: {store.get('images')} images, {size_of(store.get('bytes'))} of {most}"


def role(file: Mapping[str, Any], faulty: Collection[str]) -> str:
    """Return what a policy file is good for; `faulty` are those that were found to have faults."""
    if file.get("maskedBy") is not None:
        return f"masked by {file['maskedBy']}"
    if file["path"] in faulty:
        return "broken"
    return "only masks others" if file["mask"] else "counts"


def fault_line(fault: Mapping[str, Any]) -> str:
    """Return a fault as "FILE:LINE: KEY: REASON"."""
    where = f"{fault['file']}:{fault['line']}" if fault.get("line") is not None else fault["file"]
    return ": ".join(part for part in (where, fault["key"], fault["reason"]) if part)


def span(seconds: float) -> str:
    """Return a length of time for people, by its largest unit."""
    whole = max(0, int(seconds))
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if whole >= 2 * unit:
            return f"{whole // unit} {name}"
    return f"{whole} s"


def metrics(options: argparse.Namespace) -> int:
    """Print the counters, or write them into a file."""
    import json

    if options.output is not None:
        check_output(options.output)
    reply = call("Metrics")
    try:
        text = json.dumps(reply, ensure_ascii=False) + "\n" if options.json else exposition(reply)
    except (KeyError, TypeError, AttributeError):
        raise ProtocolError("the reply is not what Metrics returns") from None
    if options.output is None:
        say(text.removesuffix("\n"))
    else:
        replace_file(options.output, text)
    return 0


def exposition(reply: Mapping[str, Any]) -> str:
    """Return the reply of Metrics in Prometheus' text format, version 0.0.4."""
    pool = reply["pool"]
    lines = [
        *family("info", "gauge", "The version of mountd.", [({"version": reply["version"]}, 1)]),
        *single("start_time_seconds", "gauge", "When the daemon began.", reply["started"]),
        *family(
            "requests_total",
            "counter",
            "Requests by method and by what they were answered with: done, a verdict, or an error.",
            [
                ({"method": each["method"], "result": each["result"]}, each["count"])
                for each in reply["requests"]
            ],
        ),
        *histogram(reply["bounds"], reply["latencies"]),
        *family(
            "workers",
            "gauge",
            "Worker processes by what they do.",
            [({"state": state}, pool[state]) for state in ("idle", "busy", "stuck")],
        ),
        *single("workers_started_total", "counter", "Workers that were forked.", pool["forks"]),
        *single("workers_killed_total", "counter", "Workers that were past a deadline.", pool["killed"]),
        *single("fork_server_restarts_total", "counter", "Fork servers that ended.", pool["restarts"]),
        *single("connections", "gauge", "Connections of clients.", pool["connections"]),
        *single("connections_accepted_total", "counter", "Connections so far.", pool["accepted"]),
        *single("queue_length", "gauge", "Requests that wait for a worker.", pool["queue"]),
        *single("live_mounts", "gauge", "Delegated mounts that are alive.", reply.get("liveMounts")),
        *single("store_images", "gauge", "Images in the store.", reply.get("storeImages")),
        *single("store_bytes", "gauge", "Bytes of the images in the store.", reply.get("storeBytes")),
        *single("policy_generation", "gauge", "Policies read so far.", reply["policyGeneration"]),
        *single("policy_since_seconds", "gauge", "When the policy was read.", reply["policySince"]),
        *single(
            "policy_last_reload_seconds", "gauge", "When it was last tried anew.", reply.get("lastReload")
        ),
        *single(
            "policy_last_reload_successful", "gauge", "Whether that worked.", reply.get("lastReloadWorked")
        ),
    ]
    return "\n".join(lines) + "\n"


def family(
    name: str, kind: str, help: str, samples: Iterable[tuple[Mapping[str, object], float]]
) -> list[str]:
    """Return the lines of a metric; none without a sample."""
    lines = [f"mountd_{name}{labels(label)} {number(value)}" for label, value in samples]
    return [f"# HELP mountd_{name} {help}", f"# TYPE mountd_{name} {kind}", *lines] if lines else []


def single(name: str, kind: str, help: str, value: float | None) -> list[str]:
    """Return the lines of a metric without labels; none if it is not known."""
    return family(name, kind, help, [] if value is None else [({}, value)])


def histogram(bounds: list[float], latencies: list[Mapping[str, Any]]) -> list[str]:
    """Return the lines of the latencies, each count with those below it."""
    name = "mountd_request_duration_seconds"
    lines = []
    for each in latencies:
        method, at = {"method": each["method"]}, each["at"]
        lines += [
            f"{name}_bucket{labels({**method, 'le': number(bound)})} {count}"
            for bound, count in zip([*bounds, float("inf")], at, strict=True)
        ]
        lines.append(f"{name}_sum{labels(method)} {number(each['sum'])}")
        lines.append(f"{name}_count{labels(method)} {at[-1]}")
    if not lines:
        return []
    return [f"# HELP {name} How long requests took to be answered.", f"# TYPE {name} histogram", *lines]


def labels(values: Mapping[str, object]) -> str:
    """Return labels as the format has them."""
    if not values:
        return ""
    escaped = {
        name: str(value).replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
        for name, value in values.items()
    }
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped.items()) + "}"


def number(value: float) -> str:
    """Return a number as the format has it."""
    if value == float("inf"):
        return "+Inf"
    return str(int(value)) if isinstance(value, bool | int) else repr(value)


def replace_file(path: str, text: str) -> None:
    """Write a file that everybody may read, as a whole or not at all. Raises OSError, which names `path`."""
    try:
        replace_whole(path, text)
    except OSError as error:
        # Of the file that it is written to first, nobody has heard.
        raise OSError(error.errno, error.strerror, path) from None


def check_output(path: str) -> None:
    """Refuse what no file can be called or is a directory, before anything is done. Raises OSError."""
    if not path:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    if path.endswith("/") or os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)


def replace_whole(path: str, text: str) -> None:
    """Write another file, and have it take the place of that one. Raises OSError."""
    directory, name = os.path.split(os.path.abspath(path))
    # The collector reads what ends in .prom.
    made = os.path.join(directory, f".{name}.{os.getpid()}.new")
    fd = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        with open(fd, "w", encoding="utf-8") as file:
            os.fchmod(fd, 0o644)
            file.write(text)
        os.rename(made, path)
    except BaseException:
        os.unlink(made)
        raise


def reload(options: argparse.Namespace) -> int:
    """Have the policy read again, and say what is wrong with it; the exit status is 1 for faults."""
    reply = call("Reload")
    faults = reply.get("faults")
    if options.json:
        show_json(reply)
    else:
        try:
            lines = [fault_line(each) for each in faults or ()]
        except (KeyError, TypeError):
            raise ProtocolError("the reply is not what Reload returns") from None
        if reply.get("reloaded"):
            lines.append(f"{reply.get('rules')} rules are in force")
        else:
            lines.append("the policy from before is still in force")
        say("\n".join(printable(line) for line in lines))
    return 0 if reply.get("reloaded") else EXIT_USAGE


VERBS: dict[str, Callable[[argparse.Namespace], int]] = {"status": status, "metrics": metrics}
