"""System call numbers, as asm-generic/unistd.h has them: from 424 on the same everywhere but on alpha."""

AT_FDCWD = -100  # linux/fcntl.h

NUMBERS = {
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "fspick": 433,
    "pidfd_open": 434,
    "openat2": 437,
    "mount_setattr": 442,
    "statmount": 457,
    "listmount": 458,
    "open_tree_attr": 467,
}
