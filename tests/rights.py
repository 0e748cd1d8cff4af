"""The capabilities that the unit leaves the daemon, for a daemon that a test starts by hand."""

from __future__ import annotations

from mountd.kernel.libc import call
from tests.daemon import ROOT

CAPBSET_DROP, CAP_LAST = 24, 40  # linux/prctl.h
CAPABILITIES = {
    "CAP_CHOWN": 0,
    "CAP_DAC_OVERRIDE": 1,
    "CAP_DAC_READ_SEARCH": 2,
    "CAP_FOWNER": 3,
    "CAP_FSETID": 4,
    "CAP_KILL": 5,
    "CAP_SETGID": 6,
    "CAP_SETUID": 7,
    "CAP_SYS_CHROOT": 18,
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
    "CAP_SETFCAP": 31,
}
# Those that are in effect only while what takes them is done.
PUT_ASIDE = {
    CAPABILITIES[f"CAP_{name}"]
    for name in ("CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "SETFCAP")
}


def kept() -> set[int]:
    """The numbers of the capabilities that the unit leaves."""
    unit = (ROOT / "units/systemd/mountd.service").read_text()
    line = next(each for each in unit.splitlines() if each.startswith("CapabilityBoundingSet="))
    return {CAPABILITIES[name] for name in line.partition("=")[2].split()}


def in_effect() -> int:
    """Those that are in effect while nothing is done, as /proc shows them."""
    return sum(1 << each for each in kept() - PUT_ASIDE)


def drop_others() -> None:
    """Have no others, for good: what a daemon does before it is one."""
    left = kept()
    for number in range(CAP_LAST + 1):
        if number not in left:
            call("prctl", CAPBSET_DROP, number, 0, 0, 0)
