"""How mountctl reads its command line: one line for an error, the nearest match, and examples."""

from __future__ import annotations

import argparse

from mountd.cli.report import UsageError, say

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """One line for an error, and no options that only begin like one."""

    def __init__(self, **settings: Any) -> None:
        """As argparse; `examples` are lines that --help shows behind everything else."""
        examples = settings.pop("examples", None)
        if examples:
            settings["epilog"] = "examples:\n" + "\n".join(f"  {line}" for line in examples)
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        if settings.get("help") and not settings.get("description"):
            settings["description"] = settings.pop("help")
        settings.pop("help", None)
        super().__init__(allow_abbrev=False, **settings)

    def parse_args(  # type: ignore[override]  # nobody needs the overloads
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """As argparse, but name what is unknown, and what may have been meant. Raises UsageError."""
        options, rest = self.parse_known_args(args, namespace)
        if rest:
            if rest[0].startswith("-") and len(rest[0]) > 1:
                name = rest[0].partition("=")[0]
                verb = self._innermost(options)
                raise unknown("option", name, verb._option_string_actions, verb.prog)
            raise UsageError(
                f"“{rest[0]}” is too much", hint=f"see “{self._innermost(options).prog} --help”"
            )
        return options

    def _innermost(self, options: argparse.Namespace) -> Parser:
        """Return the parser of the verb that the options were read for."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                parser = action.choices.get(str(getattr(options, action.dest, None)))
                if isinstance(parser, Parser):
                    return parser._innermost(options)
        return self

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(each) for each in action.choices]
            if isinstance(action, argparse._SubParsersAction):
                raise unknown("verb", str(value), choices, self.prog)
            option = "/".join(action.option_strings) or str(action.metavar)
            hint = f"it is one of {', '.join(choices)}; see “{self.prog} --help”"
            raise UsageError(f"{option}: “{value}” is none of its values", hint=hint)

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print help and version as everything else is printed: at once. Raises OSError."""
        if message:
            say(message.removesuffix("\n"))

    def error(self, message: str) -> NoReturn:
        """Raise UsageError."""
        raise UsageError(message, hint=f"see “{self.prog} --help”")


def unknown(what: str, word: str, known: Iterable[str], program: str) -> UsageError:
    """Return the error for a word that is not known, with the one that is nearest."""
    from difflib import get_close_matches

    nearest = get_close_matches(word, sorted(known), 1)
    meant = f"did you mean “{nearest[0]}”? " if nearest else ""
    return UsageError(f"there is no {what} “{word}”", hint=f"{meant}see “{program} --help”")


def add_verb(verbs: Any, name: str, help: str, examples: Sequence[str] = (), **settings: Any) -> Parser:
    """Add a verb to subparsers: `help` describes it, also in its own help, which shows the examples."""
    description = help[:1].upper() + help[1:] + "."
    parser: Parser = verbs.add_parser(
        name, help=help, description=description, examples=list(examples), **settings
    )
    return parser
