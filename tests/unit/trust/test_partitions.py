"""Which partitions are used, for each policy that a request may come with."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mountd.errors import DeniedByPolicy, InvalidImage, MountdError, NotImmutable, UnsupportedFileSystem
from mountd.source.model import Disk, FileSystem, Luks, Partition, PartitionVerity, VeritySuperblock, Window
from mountd.trust import image_policy
from mountd.trust.decide import decide
from mountd.trust.partitions import uses
from mountd.trust.policy import ImageMatch, Policy, Require, Verdict
from tests.policies import LOCATED, USER, WISHES, image, rule
from tests.policies import policy as with_keys

WINDOW = Window(1 << 20, 1 << 20)
VERITY = PartitionVerity(VeritySuperblock(4096, 4096, 1, 1, "sha256", b"", None), bytes(32), WINDOW, WINDOW)


def partition(designator: str, type: str | None = "ext4", **fields: object) -> Partition:
    file_system = None if type is None else FileSystem(type, 1, 1, None, None, False)
    made = Partition(designator, 1, "", "", None, WINDOW, False, False, file_system)
    return replace(made, **fields)  # type: ignore[arg-type]


ROOT = partition("root", "erofs", verity=VERITY, read_only=True)
PLAIN = partition("root", "erofs")
HOME = partition("home", grow=True)
HASHES = [partition(f"root-verity{end}", None, read_only=True) for end in ("", "-sig")]
ALL = [ROOT, HOME, partition("esp", None, contents="vfat"), *HASHES]
SIGNED = frozenset({"root"})
NOBODY: frozenset[str] = frozenset()


def used(
    parts: list[Partition],
    policy: str | None = None,
    signed: frozenset[str] = SIGNED,
    *,
    only_verity: bool = False,
    read_only: bool = True,
) -> str:
    """What is used, in short: through dm-verity with an asterisk, writable with a plus sign."""
    disk = Disk(512, "", tuple(parts), only_verity)
    wished = None if policy is None else image_policy.parse(policy)
    found = uses(disk, wished, signed, read_only=read_only)
    return " ".join(
        each.partition.designator + "*" * each.verity + "+" * (not each.read_only) for each in found
    )


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (None, "root home"),
        ("*", "root home"),
        ("root=open", "root"),
        ("root=verity", "root*"),
        ("root=signed", "root*"),
        ("root=verity+signed:home=open", "root* home"),
        ("root=signed+unprotected:=open", "root home"),
        ("root=unused:home=unprotected", "home"),
        ("root=encrypted+unused:home=open", "home"),
        ("root=signed+read-only-on+growfs-off+erofs:home=growfs-on+read-only-off+ext4", "root* home"),
        ("root=signed:root-verity=unprotected:root-verity-sig=unprotected:=unused+absent", "root*"),
        ("root=unprotected:usr=absent:swap=absent:=unused+absent", "root"),
    ],
)
def test_what_a_policy_has_used(policy: str | None, expected: str) -> None:
    assert used(ALL, policy) == expected


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        ("~", "allows no use|to be unused|no partition"),
        ("-", "no partition of the disk image is used"),
        (
            "root=encrypted",
            "wants the root partition to be encrypted, and it is signed, unprotected, verity",
        ),
        ("root=open:=absent", "home partition to be unused"),
        ("root=absent", "root partition to be unused"),
        ("root=absent:home=open", "root partition to be unused"),
        ("root=open:usr=verity", "it wants a usr partition, and there is none"),
        ("root=read-only-off", "flag read-only of the root partition to be off"),
        ("root=growfs-on", "flag growfs of the root partition to be on"),
        ("root=open:home=growfs-off", "flag growfs of the home partition to be off"),
        ("root=open:root-verity=read-only-off", "flag read-only of the root-verity partition to be off"),
        ("root=open:root-verity-sig=growfs-on", "flag growfs of the root-verity-sig partition to be on"),
        ("root=squashfs", "allows squashfs for the root partition, which is erofs"),
        ("root=unprotected:root-verity=absent", "wants no root-verity partition, and there is one"),
        ("root=signed:root-verity=absent", "wants no root-verity partition"),
        ("root=signed:root-verity=unused", "no use of the root-verity partition"),
        ("root=signed:root-verity-sig=absent", "wants no root-verity-sig partition"),
        ("root=open:home=verity", "wants what a home partition cannot be"),
        ("root=open:srv=verity", "wants a srv partition, and there is none"),
        ("root=signed:root-verity=verity", "wants no root-verity partition"),
    ],
)
def test_what_a_policy_refuses(policy: str, text: str) -> None:
    with pytest.raises(DeniedByPolicy, match=text):
        used(ALL, policy)


def test_what_is_for_hash_data_has_to_be_there_even_if_it_is_not_used() -> None:
    """As systemd has it; whoever means something else can say so."""
    with pytest.raises(DeniedByPolicy, match="wants a root-verity partition"):
        used([PLAIN], "root=signed+unprotected")
    either = "root=signed+unprotected:root-verity=open:root-verity-sig=open"
    assert used([PLAIN], either) == "root"
    with pytest.raises(DeniedByPolicy, match="to be signed, and it is unprotected"):
        used([PLAIN], "root=signed")


def test_what_is_not_signed() -> None:
    with pytest.raises(DeniedByPolicy, match="to be signed, and it is unprotected, verity"):
        used(ALL, "root=signed", NOBODY)
    assert used(ALL, "root=verity+signed", NOBODY) == "root*"


def test_where_nothing_else_vouches_for_it() -> None:
    assert used(ALL, only_verity=True) == "root*"
    assert used(ALL, "*", only_verity=True) == "root*"
    assert used(ALL, "root=unprotected", only_verity=True) == "root*"
    with pytest.raises(DeniedByPolicy, match="home partition .* nothing vouches for it"):
        used(ALL, "root=signed:home=unprotected", only_verity=True)
    with pytest.raises(DeniedByPolicy, match="no partition"):
        used([PLAIN, HOME, *HASHES], only_verity=True)


VOLUME = Luks(2, None, None, "aes-xts-plain64", 64, 512, 1 << 18, 1 << 18, 0, 1 << 17, 1 << 14, 0)
LOCKED = partition("home", None, contents="crypto_LUKS", luks=VOLUME)


@pytest.mark.parametrize("home", [LOCKED, partition("home", luks=VOLUME)], ids=["locked", "opened"])
def test_encrypted(home: Partition) -> None:
    """It is used as that, and as nothing else, before it was opened and afterwards."""
    for policy in (None, "*", "root=open:home=encrypted", "root=open:home=encrypted+verity+read-only-off"):
        assert used([ROOT, home], policy) == "root home"
        assert used([ROOT, home], policy, read_only=False) == "root home+"
    assert used([ROOT, home], "root=open") == "root"
    for flags in ("unprotected", "verity+signed", "unused", "absent"):
        for policy in (f"root=open:home={flags}+absent", f"root=open:home={flags}"):
            if flags == "unused":
                assert used([ROOT, home], policy) == "root"
            else:
                with pytest.raises(DeniedByPolicy):
                    used([ROOT, home], policy)
    assert used([ROOT, home], "root=open:home=unprotected+unused") == "root"
    assert used([ROOT, replace(home, read_only=True)], read_only=False) == "root home"
    # Nothing vouches for it where only dm-verity does, and its own root hash is that of the ciphertext.
    with pytest.raises(DeniedByPolicy, match="nothing vouches for it"):
        used([ROOT, home], "root=signed:home=encrypted", only_verity=True)
    both = partition("root", "erofs", verity=VERITY, luks=VOLUME)
    with pytest.raises(DeniedByPolicy, match="no partition"):
        used([both], only_verity=True)
    assert used([both]) == "root"
    with pytest.raises(DeniedByPolicy):
        used([both], "root=signed")


def test_types_of_what_is_encrypted() -> None:
    """The type is that of what is in it, which is judged once it is known."""
    assert used([ROOT, LOCKED], "root=open:home=encrypted+xfs") == "root home"
    with pytest.raises(DeniedByPolicy, match="allows xfs for the home partition, which is ext4"):
        used([ROOT, partition("home", luks=VOLUME)], "root=open:home=encrypted+xfs")


def test_only_encrypted_refuses_what_is_not() -> None:
    for policy in ("root=open:home=encrypted", "root=open:home=encrypted+absent"):
        with pytest.raises(DeniedByPolicy, match="home partition to be encrypted"):
            used([ROOT, HOME], policy)
    assert used([ROOT, HOME], "root=open:home=encrypted+unprotected") == "root home"


def test_a_volume_that_cannot_be_opened() -> None:
    broken = partition("home", None, contents="crypto_LUKS", problem="the LUKS volume is of version 3")
    for policy in (None, "root=open:home=encrypted"):
        with pytest.raises(UnsupportedFileSystem, match="crypto_LUKS .*version 3"):
            used([ROOT, broken], policy)
    assert used([ROOT, broken], "root=open:home=encrypted+unused") == "root"


def test_what_cannot_be_mounted() -> None:
    for contents, shown in (("vfat", "vfat"), (None, "nothing that is known")):
        strange = partition("srv", None, contents=contents)
        with pytest.raises(UnsupportedFileSystem, match=rf"\(srv\) holds {shown}") as caught:
            used([ROOT, strange])
        assert "imagePolicy" in (caught.value.hint or "")
        assert used([ROOT, strange], "root=open") == "root"


@pytest.mark.parametrize("name", ["esp", "xbootldr", "swap"])
def test_what_is_left_to_others(name: str) -> None:
    """A policy says how it may be used, not that it has to be mounted here."""
    left = partition(name, None, contents="vfat", read_only=True)
    assert used([ROOT, left]) == "root"
    assert used([ROOT, left], "*") == "root"
    for flags in (
        "unprotected",
        "unprotected+absent",
        "encrypted+unused",
        "unused",
        "open+read-only-on+ext4",
    ):
        assert used([ROOT, left], f"root=open:{name}={flags}") == "root"
    # Nothing vouches for it, and nobody mounts it.
    assert used([ROOT, left, *HASHES], f"root=verity:{name}=unprotected", only_verity=True) == "root*"
    for flags, text in (
        ("encrypted", f"wants the {name} partition to be encrypted, and it is unprotected"),
        ("absent", f"does not allow the {name} partition to be unused"),
        ("unprotected+read-only-off", f"flag read-only of the {name} partition to be off"),
    ):
        with pytest.raises(DeniedByPolicy, match=text):
            used([ROOT, left], f"root=open:{name}={flags}")
    locked = partition(name, None, contents="crypto_LUKS", problem="it has no key")
    assert used([ROOT, locked], f"root=open:{name}=encrypted") == "root"
    with pytest.raises(DeniedByPolicy, match="to be unprotected, and it is encrypted"):
        used([ROOT, locked], f"root=open:{name}=unprotected")
    for mounted in (partition("esp", "erofs"), partition("esp", None, contents="crypto_LUKS", luks=VOLUME)):
        assert used([ROOT, mounted]) == "root esp"


def test_what_does_not_belong_together() -> None:
    usr = partition("usr", "erofs", architecture="arm64")
    root = partition("root", "erofs", architecture="x86-64")
    for policy in (None, "root=open:usr=open"):
        with pytest.raises(
            InvalidImage, match="root partition is for x86-64, and the /usr partition for arm64"
        ):
            used([root, usr], policy)
    assert used([root, usr], "root=open") == "root"
    assert used([root, usr], "usr=open") == "usr"
    # The generic type is for none.
    assert used([PLAIN, usr]) == "root usr"
    for parts, lacks in (
        ([usr, HASHES[0]], "root-verity. is there, and no root partition"),
        ([usr, HASHES[1]], "root-verity-sig. is there, and no root-verity partition"),
        ([PLAIN, HASHES[1]], "root-verity-sig. is there, and no root-verity partition"),
    ):
        with pytest.raises(InvalidImage, match=lacks):
            used(parts)
    assert used([usr, *HASHES], "usr=open") == "usr"


def test_writable() -> None:
    assert used([ROOT, HOME], read_only=False) == "root home+"
    assert used([ROOT, HOME]) == "root home"
    assert used([partition("root")], read_only=False) == "root+"
    assert used([partition("root", read_only=True)], read_only=False) == "root"


def test_what_has_hash_data_is_never_writable() -> None:
    """The first write would leave the image unfit for whoever wants it verified."""
    protected = partition("root", verity=VERITY)
    assert used([protected, HOME, *HASHES], read_only=False) == "root home+"
    assert used([protected, *HASHES], "root=verity", read_only=False) == "root*"
    # Also where the root hash, which somebody else may know, cannot be told from the image.
    assert used([partition("root"), HASHES[0]], read_only=False) == "root"
    assert used([partition("usr", luks=VOLUME), partition("usr-verity", None)], read_only=False) == "usr"


def disk_of(*parts: Partition, only_verity: bool = False) -> object:
    return replace(image(), file_system=None, disk=Disk(512, "", parts, only_verity))


def error(*parts: Partition, **wishes: object) -> MountdError | None:
    policy = Policy((rule(),))
    wished = replace(WISHES, **wishes)  # type: ignore[arg-type]
    decision = decide(policy, USER, disk_of(*parts), LOCATED, wished)  # type: ignore[arg-type]
    assert (decision.verdict is Verdict.ALLOW) is (decision.error is None)
    return decision.error


def test_every_type_has_to_be_granted() -> None:
    assert error(PLAIN, HOME) is None
    assert "the image is xfs" in str(error(PLAIN, partition("home", "xfs")))
    assert "the image is xfs" not in str(
        error(PLAIN, partition("home", "xfs"), image_policy=image_policy.parse("root=open"))
    )


def test_the_type_that_is_asked_for_is_the_first() -> None:
    assert error(PLAIN, HOME, file_system_type="erofs") is None
    assert "ext4 was asked for, but the image holds erofs" in str(
        error(PLAIN, HOME, file_system_type="ext4")
    )


def test_an_option_of_a_file_system_is_for_one() -> None:
    found = error(PLAIN, HOME, options=("acl",))
    assert "2 file systems" in str(found)
    assert error(PLAIN, HOME, options=("noexec",)) is None


def test_writing_has_to_be_granted() -> None:
    assert "grants read-only access" in str(error(PLAIN, HOME, read_only=False))


def test_what_would_make_a_disk_image_vouch_for_itself() -> None:
    """Hash data are not handed over with it: it has them, or it has none."""
    for one, error_type, hint in (
        (
            rule(image=ImageMatch(signed="team")),
            DeniedByPolicy,
            "root hash by the key “team” in it, or hand",
        ),
        (rule(require=Require(("dm-verity",))), NotImmutable, "as systemd-repart and mkosi do"),
        (rule(require=Require(("root-owned",), "team")), DeniedByPolicy, "by the key “team” in it, or hand"),
    ):
        decision = decide(with_keys(one), USER, disk_of(PLAIN), LOCATED, WISHES)  # type: ignore[arg-type]
        assert type(decision.error) is error_type, decision
        assert hint in str(decision.hint)
