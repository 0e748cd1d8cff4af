"""The numbers that bound what clients can make the daemon do."""

from __future__ import annotations

from mountd.service.phase import Phase

# Seconds that a request may spend in each phase, all in all. A transfer says its own, by the size of what it
# reads (service/images); this is for one that has not.
DEADLINES = {
    Phase.READ: 10,
    Phase.VERIFY: 30,
    Phase.MOUNT: 10,
    Phase.REPLY: 5,
    Phase.CLOSE: 5,
    Phase.TRANSFER: 30,
    Phase.CONSENT: 120,
}
# What the listener adds to them: a worker that can end the phase by itself does, and need not be killed.
GRACE_SECONDS = 0.5

MINIMUM_WORKERS = 2  # ready before anybody asks
MAXIMUM_WORKERS = 8  # serving at the same time, but for the first request of an owner
MAXIMUM_RUNNING_PER_OWNER = 4  # so that one owner cannot have all of them
MAXIMUM_STUCK_PER_OWNER = 4
# Of all owners; beyond it there is room for the first request of owners that have nothing that hangs.
MAXIMUM_STUCK = 32
SLOTS = MAXIMUM_WORKERS + MAXIMUM_STUCK

# Live mounts of one owner; a rule may allow fewer.
MAXIMUM_MOUNTS = 1024
MOST_MOUNTS = 65536  # that can be allowed

REQUESTS_PER_WORKER = 1024  # then it is replaced: what leaks, leaks no further
SECONDS_OF_WORKER = 300
# How long a worker stays with a connection that it has just answered, and for how many requests.
LINGER_MILLISECONDS = 1
REQUESTS_IN_A_ROW = 64
REAPING_SECONDS = 5.0  # until an idle worker looks again which of its children that hung have ended
MAXIMUM_SHARED_SECONDS = 3600
SHARED_SECONDS = 5  # that a mount is kept for whoever asks for the same again
IDLE_WORKER_SECONDS = 30  # above the minimum
HANGS_SECONDS = 1.0  # within a phase and asleep in the kernel: too long for a daemon that is to end
PAUSE_SECONDS = 0.1  # without what it takes for another connection or another worker
SECONDS_TO_DIE = 1.0  # after SIGKILL; who takes longer hangs in the kernel

MAXIMUM_CONNECTIONS = 10_000
MAXIMUM_CONNECTIONS_PER_OWNER = 128
SPARE_DESCRIPTORS = 256  # for everything but connections
IDLE_CONNECTION_SECONDS = 30
DRAIN_SECONDS = 10
