"""Asking polkit whether somebody who may decide it consents to what a rule with the verdict “ask” is about.

1. What is asked about is fixed before: its bytes cannot change any more, or are a copy in the store.
2. The caller is the process that the kernel has pinned: polkit gets its number, when it was started and its
   uid, and that it is still that process, with that uid, is looked at before the question and after it.
3. polkit knows the users of the host. Who is in a user namespace, or is root without being the host's root,
   is none of them, and is refused without a question. The host's root needs nobody's consent.
4. A question that nobody needs an answer to any more is taken back: the caller has gone, the policy was read
   anew, the daemon is to end, or too much time has passed. To polkit that is the end of who has asked.
5. Whoever answers takes minutes, and a worker waits for that. So there are few questions at a time.

pkcheck(1) puts the question, as polkit's own client; it comes with polkit. Which actions there are is in
units/polkit-1/actions. Each consent is about one mount: none of them is one that polkit keeps.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import time
import unicodedata
from typing import TYPE_CHECKING

from mountd.errors import (
    DeniedByPolicy,
    InteractiveAuthenticationRequired,
    LimitExceeded,
    MountdError,
    PeerGone,
    TimedOut,
)
from mountd.fds import OwnedFd, close_all
from mountd.kernel import question
from mountd.service.images import owner_of
from mountd.service.phase import Phase
from mountd.source.model import SourceKind

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mountd.caller.model import Caller
    from mountd.service.context import RequestContext
    from mountd.source.model import Source
    from mountd.trust.decide import Decision

MOUNT = "io.mountd.mount-image"
MOUNT_WRITABLE = "io.mountd.mount-image-writable"
MOUNT_TMPFS = "io.mountd.mount-tmpfs"
IMPORT = "io.mountd.import-image"

PROGRAM = "/usr/bin/pkcheck"
BUS = "/run/dbus/system_bus_socket"
# How pkcheck(1) ends.
AUTHORIZED, NOT_AUTHORIZED, CHALLENGE, DISMISSED = 0, 1, 2, 3
# Seconds that a person has for an answer, and polkit for one without a person.
SECONDS_OF_PERSON = 120
SECONDS_OF_POLKIT = 10
# Questions at the same time, of all and of one owner. An import holds one of the few places for transfers,
# and has places of its own.
MAXIMUM, MAXIMUM_PER_OWNER = 8, 2
MAXIMUM_IMPORTS, MAXIMUM_IMPORTS_PER_OWNER = 2, 1
QUESTIONS = "questions that wait for an answer"
QUESTIONS_OF_OWNER = "questions of one owner that wait for an answer"
IMPORT_QUESTIONS = "questions about imports that wait for an answer"
IMPORT_QUESTIONS_OF_OWNER = "questions of one owner about imports that wait for an answer"
# Where in the file of the places they begin, and where those of the owners do, as many for each uid.
PLACES, IMPORT_PLACES, OWNER_PLACES = 0, 1 << 8, 1 << 40

MAXIMUM_DETAIL, MAXIMUM_SOURCE = 200, 100  # characters
# The text of a question may be shown by what understands markup, and has quotation marks of its own.
MARKUP = str.maketrans(
    {"<": "‹", ">": "›", "&": "+"}
    | dict.fromkeys('"″＂❝❞❛❜❟❠〃‶ʺˮ˝˶״🙶🙷🙸', "'")
    | dict.fromkeys("\u115f\u3164", "?")
)
# Quotation marks and brackets, by the categories that they have in Unicode, and which of them may stay.
QUOTES, PLAIN = {"Pi": "'", "Pf": "'", "Ps": "[", "Pe": "]"}, frozenset("[]{}‹›")
UNKNOWN = "unknown"
NO_POLKIT_HINT = "install polkitd, or have an administrator say “allow” in the rule"
AGENT_HINT = "call with --interactive from a terminal or a desktop, where an administrator can be asked"
AGAIN_HINT = "try again"


def action_of(source: Source, decision: Decision) -> str:
    """Return the action that polkit is asked about for a mount."""
    if source.kind is SourceKind.TMPFS:
        return MOUNT_TMPFS
    return MOUNT if decision.read_only else MOUNT_WRITABLE


def details(source: str | None, decision: Decision) -> dict[str, str]:
    """Return what a question for a mount says; `source` is what the caller says it is, and no evidence."""
    return described(source, decision.digest, decision.signer, decision.rule)


def described(
    source: str | None, digest: str | None, signer: str | None, rule: str | None
) -> dict[str, str]:
    """Return these details, each fit to be shown to whoever is asked."""
    found = {
        "source": source or UNKNOWN,
        "digest": digest or UNKNOWN,
        "signer": signer or "nobody",
        "rule": rule,
    }
    most = {"source": MAXIMUM_SOURCE}
    return {
        name: cleaned(text, most.get(name, MAXIMUM_DETAIL))
        for name, text in found.items()
        if text is not None
    }


def cleaned(text: str, most: int = MAXIMUM_DETAIL) -> str:
    """Return a text on one line, without markup, and no longer than a dialogue has room for.

    It can stand between “ and ”, and does not end there before its own end.
    """
    plain = "".join(map(harmless, text.translate(MARKUP)))
    return plain if len(plain) <= most else f"{plain[: most // 2]}…{plain[-(most // 2) :]}"


def harmless(character: str) -> str:
    """Return what a question shows of one character of a text that is somebody else's."""
    if character in PLAIN:
        return character
    shown = character if character.isprintable() else "?"
    return QUOTES.get(unicodedata.category(character), shown)


def ask(
    action: str,
    about: Mapping[str, str],
    caller: Caller,
    context: RequestContext,
    *,
    interactive: bool,
    rule: str | None = None,
    importing: bool = False,
) -> None:
    """Return if `action` is authorized; `interactive` is whether a person may be asked, `rule`
    which rule says so.

    Raises DeniedByPolicy for a no and where polkit cannot be asked, InteractiveAuthenticationRequired where
    only a person could say yes and none can be asked, LimitExceeded, TimedOut, PeerGone. The phase is VERIFY
    afterwards.
    """
    if caller.is_host_root:
        context.notes["consent"] = "root needs none"
        return
    begin = time.monotonic()
    context.notes |= {"polkit_action": action, "consent": "not asked for"}
    check_known(caller, rule)
    check_polkit(rule)
    with contextlib.ExitStack() as stack:
        stack.enter_context(place(caller, context, importing=importing))
        subject = subject_of(caller, context)
        words = ["--action-id", action, "--process", subject]
        for name, text in about.items():
            words += ["--detail", name, text]
        seconds = SECONDS_OF_PERSON if interactive else SECONDS_OF_POLKIT
        words += ["--allow-user-interaction"] if interactive else []
        context.enter(Phase.CONSENT, seconds)
        try:
            answer = question.ask(PROGRAM, words, seconds=seconds, watch=watched(context))
        finally:
            context.asked_for += time.monotonic() - begin
            context.enter(Phase.VERIFY)
    judge(answer, rule, context, seconds=seconds, interactive=interactive)
    # Much may have happened in the meantime.
    if subject_of(caller, context) != subject:
        raise gone(context)
    if called_off(context):
        raise not_in_force(rule, context)
    context.notes["consent"] = "given"


def check_known(caller: Caller, rule: str | None) -> None:
    """Raise DeniedByPolicy for a caller whom polkit does not know."""
    if not caller.on_host:
        raise DeniedByPolicy(
            "an administrator has to consent, and polkit knows nobody who is in a user namespace",
            rule=rule,
            hint="call from outside of the container",
        )
    if caller.uid == 0:
        # polkit would say yes to every uid 0.
        raise DeniedByPolicy(
            "an administrator has to consent, and to polkit root without CAP_SYS_ADMIN would be one",
            rule=rule,
            hint="call as an ordinary user, or as the host's root",
        )
    if caller.pid <= 0:
        raise DeniedByPolicy(
            "an administrator has to consent, and the caller is not in mountd's own pid namespace",
            rule=rule,
            hint="call from outside of the container",
        )


def check_polkit(rule: str | None) -> None:
    """Raise DeniedByPolicy where there is no polkit."""
    missing = next((path for path in (PROGRAM, BUS) if not os.path.exists(path)), None)
    if missing is not None:
        reason = f"an administrator has to consent, and there is no polkit on this system ({missing})"
        raise DeniedByPolicy(reason, rule=rule, hint=NO_POLKIT_HINT)


@contextlib.contextmanager
def place(caller: Caller, context: RequestContext, *, importing: bool) -> Iterator[None]:
    """Have one of the places for questions. Raises LimitExceeded, DeniedByPolicy.

    A place is a lock on a byte of a file, which goes with the process that has it, however that ends.
    """
    if context.questions is None:
        raise DeniedByPolicy("an administrator has to consent, and nobody can be asked here")
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    with OwnedFd(os.open(context.questions, flags, 0o600)) as fd:
        most = MAXIMUM_IMPORTS if importing else MAXIMUM
        of_owner = MAXIMUM_IMPORTS_PER_OWNER if importing else MAXIMUM_PER_OWNER
        first = OWNER_PLACES + 2 * MAXIMUM_PER_OWNER * caller.owner_uid
        first += MAXIMUM_PER_OWNER if importing else 0
        if not any(lock(fd.fileno(), first + number) for number in range(of_owner)):
            raise LimitExceeded(IMPORT_QUESTIONS_OF_OWNER if importing else QUESTIONS_OF_OWNER, of_owner)
        first = IMPORT_PLACES if importing else PLACES
        if not any(lock(fd.fileno(), first + number) for number in range(most)):
            raise LimitExceeded(IMPORT_QUESTIONS if importing else QUESTIONS, most, hint="try again later")
        yield


def lock(fd: int, offset: int) -> bool:
    """Lock one byte of a file; tell whether nobody else has."""
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, offset)
    except BlockingIOError:
        return False
    except PermissionError:
        return False  # as EACCES says the same (fcntl(2))
    return True


def subject_of(caller: Caller, context: RequestContext) -> str:
    """Return the caller as pkcheck(1) takes it: its number, when it was started, and its uid.

    As the process is there afterwards, it was the peer's number all the time. Raises PeerGone for one that
    has ended or has another uid than when it connected.
    """
    try:
        with open(f"/proc/{caller.pid}/stat", "rb", buffering=0) as file:
            started = int(file.read(4096).rpartition(b")")[2].split()[19])
        with open(f"/proc/{caller.pid}/status", "rb", buffering=0) as file:
            lines = file.read(8192).splitlines()
        uids = next(line.split()[1:] for line in lines if line.startswith(b"Uid:"))
    except (OSError, ValueError, IndexError, StopIteration):
        raise gone(context) from None
    context.peer.check()
    # Real and effective: polkit goes by the one, and who connected is the other.
    if uids[:2] != [str(caller.uid).encode()] * 2:
        context.notes["consent"] = "the caller has changed"
        raise PeerGone("it has another uid than when it connected")
    return f"{caller.pid},{started},{caller.uid}"


def gone(context: RequestContext) -> PeerGone:
    """Return the error for a caller that has ended."""
    context.notes["consent"] = "the caller has gone"
    return PeerGone("it has ended")


def watched(context: RequestContext) -> dict[int, int]:
    """Return what ends a question before it is answered, with the events that do."""
    watch = {context.peer.connection.fileno(): 0, context.peer.pidfd(): select.POLLIN}
    if context.called_off >= 0:
        watch[context.called_off] = select.POLLIN
    return watch


def called_off(context: RequestContext) -> bool:
    """Tell whether the policy that a question was asked by is not in force any more."""
    poll = select.poll()
    if context.called_off >= 0:
        poll.register(context.called_off, select.POLLIN)
    return bool(poll.poll(0))


def not_in_force(rule: str | None, context: RequestContext) -> DeniedByPolicy:
    """Return the error for a question that was called off."""
    context.notes["consent"] = "called off"
    reason = "the policy was read anew, or mountd is stopping, before an administrator had consented"
    return DeniedByPolicy(reason, rule=rule, hint=AGAIN_HINT)


def judge(
    answer: question.Ended, rule: str | None, context: RequestContext, *, seconds: int, interactive: bool
) -> None:
    """Raise unless the answer is yes."""
    if answer.timed_out:
        context.notes["consent"] = "timed out"
        raise TimedOut(seconds)
    if answer.by is not None and answer.by == context.called_off:
        raise not_in_force(rule, context)
    if answer.by is not None:
        raise gone(context)
    if answer.status == AUTHORIZED:
        return
    if answer.status == CHALLENGE:
        context.notes["consent"] = "nobody to ask"
        hint = "start an authentication agent, such as pkttyagent(1)" if interactive else AGENT_HINT
        raise InteractiveAuthenticationRequired(hint=hint)
    action = context.notes["polkit_action"]
    if answer.status in (NOT_AUTHORIZED, DISMISSED):
        context.notes["consent"] = "not given" if answer.status == NOT_AUTHORIZED else "dismissed"
        said = "polkit does not authorize it" if answer.status == NOT_AUTHORIZED else "nobody has consented"
        hint = f"an administrator can authorize {action}, when asked or in /etc/polkit-1/rules.d"
        raise DeniedByPolicy(said, rule=rule, hint=hint)
    context.notes["consent"] = "polkit failed"
    text = cleaned(" ".join(answer.output.decode("utf-8", "replace").split())) or f"status {answer.status}"
    raise DeniedByPolicy(f"polkit cannot be asked: {text}", rule=rule, hint=NO_POLKIT_HINT)


def take_out(caller: Caller, fds: list[OwnedFd], context: RequestContext) -> None:
    """Take out of the store what was put there only for a question whose answer was not yes.

    The descriptors of the request are closed for that.
    """
    if context.put_in and context.store is not None:
        close_all(fds)
        while context.put_in:
            with contextlib.suppress(MountdError, OSError):
                context.store.remove(context.put_in.pop(), owner_of(caller).uid)
