"""The rules for stacks that can be written to."""

from __future__ import annotations

from tests.e2e.directories import rule

READER, ONE_TIME = 21_600, 21_601  # the uids of users with rules of their own
WRITABLE = ', access = "read-write"'
MEMORY_RULE = """
[[rule]]
name = "memory"
image = { kind = "tmpfs" }
caller = { any = true }
grant = { max-size = "4M", idmap = ["none", "namespace", "caller", "ranges"] }
verdict = "allow"
"""
LIMITED = f"""
[[rule]]
name = "no memory"
image = {{ kind = "tmpfs" }}
caller = {{ users = [{READER}] }}
verdict = "deny"
""" + rule("readers", '"caller"').replace("any = true", f"users = [{READER}]")
LIMITED += (
    MEMORY_RULE.replace("any = true", f"users = [{ONE_TIME}]")
    .replace('max-size = "4M"', 'max-size = "4M", max-mounts = 1')
    .replace('"memory"', '"one at a time"')
)
