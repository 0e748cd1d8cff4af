"""Where the policy lies, the directory that has precedence first."""

from __future__ import annotations

from pathlib import Path

POLICY_DIRS = tuple(Path(each, "mountd/policy.d") for each in ("/etc", "/run", "/usr/local/lib", "/usr/lib"))
