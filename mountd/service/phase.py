"""The phases of a request, which the listener measures."""

from enum import IntEnum


class Phase(IntEnum):
    """What a worker is doing. Each but IDLE has a deadline that the listener holds it to.

    That of TRANSFER depends on the size of what is read, and is said when it is entered, as that of CONSENT
    is, in which somebody else is asked: a person, or only what answers for people.
    """

    IDLE = 0
    READ = 1
    VERIFY = 2
    MOUNT = 3
    REPLY = 4
    CLOSE = 5
    TRANSFER = 6
    CONSENT = 7  # the seven that the board has room for
