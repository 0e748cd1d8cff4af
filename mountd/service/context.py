"""What a method knows beside its parameters: the connection that they came on, and the daemon around it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from mountd.errors import DeniedByPolicy
from mountd.evidence.location import Walker
from mountd.trust.decide import decide

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mountd.caller.model import Caller
    from mountd.caller.peer import Peer
    from mountd.evidence.model import Evidence
    from mountd.execute.naming import Naming
    from mountd.execute.run import Sealer
    from mountd.ledger.book import Book
    from mountd.service.attachments import Attachments
    from mountd.service.phase import Phase
    from mountd.source.model import Source
    from mountd.store.store import Store
    from mountd.trust.decide import Decision
    from mountd.trust.policy import Policy
    from mountd.trust.policy_file import Loaded, PolicyError
    from mountd.trust.wishes import MountWishes

    Facts = tuple[Caller, Source, Evidence, MountWishes]

MAXIMUM_REMEMBERED = 64


class Enter(Protocol):
    """Says that a phase begins, and how many seconds it may take, 0 for as long as usual."""

    def __call__(self, phase: Phase, seconds: int = 0) -> None:
        """Write it where the listener looks."""


@dataclass(frozen=True, slots=True)
class PolicyOrigin:
    """Where the policy in force is from: as it was written, and in which directories.

    `generation` counts the policies of this daemon, `since` is in seconds since the epoch, and `faults` is
    what was wrong with the files when it was last tried to read them.
    """

    loaded: Loaded
    directories: tuple[Path, ...]
    generation: int
    since: int
    faults: tuple[PolicyError, ...] = ()


class Around(Protocol):
    """The daemon around a request, as it describes itself in the fields of io.mountd.Admin."""

    def pool(self) -> dict[str, object]:
        """Return a PoolState."""

    def status(self) -> dict[str, object]:
        """Return pid, started, sockets, the path of the store, and limits."""

    def metrics(self) -> dict[str, object]:
        """Return started, requests, bounds, latencies, and the last reload."""

    def reload(self) -> dict[str, object]:
        """Have the policy read again, and return the reply of Reload. Raises TimedOut, ShuttingDown."""


@dataclass(frozen=True, slots=True)
class PolicyInForce:
    """The policy that requests are judged by; `refusal` is what everybody gets if it could not be read."""

    policy: Policy
    refusal: DeniedByPolicy | None
    origin: PolicyOrigin | None = None
    _allowed: dict[Facts, Decision] = field(default_factory=dict, compare=False, repr=False)

    def decide(self, caller: Caller, source: Source, evidence: Evidence, wishes: MountWishes) -> Decision:
        """Judge one request, as `trust.decide` does.

        The same facts come to the same verdict, so that what was allowed is remembered for as long as this
        policy is in force; a refusal is not, whose error would keep alive what it was raised through.
        """
        facts = (caller, source, evidence, wishes)
        if wishes.image_policy is not None or evidence.signature_error is not None:
            return decide(self.policy, *facts)
        decision = self._allowed.get(facts)
        if decision is None:
            decision = decide(self.policy, *facts)
            if decision.error is None:
                if len(self._allowed) >= MAXIMUM_REMEMBERED:
                    self._allowed.clear()
                self._allowed[facts] = decision
        return decision


@dataclass(slots=True)
class RequestContext:
    """One request. `peer` is who made it, borrowed; `enter` is called at the border of each phase.

    `notes` is what the journal says about the request, `writable` whether a mount was made that can be
    written to. `store` is None where there is no directory for one, and `pull_socket` is where the instance
    that may use the network listens, if there is one. `walker` is for paths, and borrowed; `naming` is how
    sources get names. `attachments` are the records of what was attached, None for an instance that attaches
    nothing. `around` is the daemon, for io.mountd.Admin; `ledger` takes down what is handed out, where there
    is one. `claim` takes for what is made now what nothing else may have as long as that is there, and
    raises InUse; it is there while something is made.
    `questions` is the file that bounds how many people are asked at once, None where nobody can be;
    `called_off` is a descriptor, borrowed, that can be read once the policy has changed or the daemon is to
    end. `put_in` is what this request has put into the store, and `asked_for` how many seconds it has waited
    for people.
    `layers` are the devices of what an overlay that it has made is of. `registers` is whether what is made
    is told to who guards the user namespace it is for (nsresourced), and `must_be_registered` whether that
    has to know the namespace.
    """

    peer: Peer
    policy: PolicyInForce
    seal: Sealer
    enter: Enter
    notes: dict[str, str] = field(default_factory=dict)
    writable: bool = False
    store: Store | None = None
    pull_socket: Path | None = None
    walker: Walker = field(default_factory=Walker)
    naming: Naming | None = None
    attachments: Attachments | None = None
    around: Around | None = None
    ledger: Book | None = None
    questions: Path | None = None
    called_off: int = -1
    claim: Callable[[str], None] | None = None
    put_in: list[str] = field(default_factory=list)
    asked_for: float = 0.0
    layers: list[tuple[int, int]] = field(default_factory=list)
    registers: bool = False
    must_be_registered: bool = False
    _caller: Caller | None = None
    _decision: Decision | None = None
    _file_system: str = ""

    def caller(self) -> Caller:
        """Return who calls, which the journal is to say. Raises PeerGone, and as `Peer.identify`."""
        self._caller = self.peer.identify()
        return self._caller

    def caller_to_judge(self) -> Caller:
        """Return who calls, for the policy to decide; raise its refusal if it could not be read."""
        caller = self.caller()
        if self.policy.refusal is not None:
            raise self.policy.refusal
        return caller

    def note_decision(self, decision: Decision, file_system: str) -> None:
        """Take note of what was decided."""
        self._decision = decision
        self._file_system = file_system

    @property
    def verdict(self) -> str | None:
        """What was decided, None for what the policy has no say in."""
        return None if self._decision is None else self._decision.verdict.value

    def fields(self) -> dict[str, str]:
        """Return what the journal says about the request; for after the reply, as nobody waits for it."""
        found: dict[str, object] = dict(self.notes)
        caller, decision = self._caller, self._decision
        if caller is not None:
            found |= {
                "caller_cgroup": caller.cgroup,
                "caller_unit": caller.unit,
                "caller_uid": caller.uid,
                "caller_gid": caller.gid,
                "caller_pid": caller.pid,
                "owner_uid": caller.owner_uid,
            }
        if decision is not None:
            known = found.get("digest")
            found |= {
                "verdict": decision.verdict.value,
                "file_system": self._file_system,
                "rule": decision.rule,
                "trusted_by": decision.trusted_by,
                "signer": decision.signer,
                "digest": decision.digest if decision.digest is not None else known,
                "reason": decision.reason,
            }
        return {name: str(value) for name, value in found.items() if value is not None}
