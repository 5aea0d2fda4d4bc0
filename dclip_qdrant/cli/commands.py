"""What our commands have beyond click's: examples, whole help lines, "did you mean", and errors that name the
flags which were typed."""

from collections.abc import Callable, Sequence
from typing import Any

import click

from dclip_qdrant.errors import calling_parameters
from dclip_qdrant.lookup import did_you_mean

CONTEXT = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100}


def flag_of(parameter: click.Parameter) -> str:
    """What a person typed for a parameter: its longest flag, or the argument's name in capitals."""
    if isinstance(parameter, click.Argument):
        return parameter.human_readable_name
    return max(parameter.opts, key=len)


class RenamedOption(click.Option):
    """An option that is still understood by the names it had before, which its help doesn't show."""

    def __init__(self, *args: Any, former: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.former = list(former)

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        super().add_to_parser(parser, ctx)
        action = "append" if self.multiple else "store"
        parser.add_option(obj=self, opts=self.former, dest=self.name, action=action, nargs=self.nargs)


class Command(click.Command):
    """A command with an example; library errors that pass through it name its flags."""

    def __init__(self, *args: Any, example: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.context_settings = {**CONTEXT, **self.context_settings}
        self.example = example

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.example:
            with formatter.section("Example"):
                for line in self.example.strip().splitlines():
                    formatter.write(f"  {line}\n")

    def invoke(self, ctx: click.Context) -> Any:
        names = {p.name: flag_of(p) for p in self.params if p.name}
        with calling_parameters(names):
            return super().invoke(ctx)


class Group(click.Group):
    """Says "did you mean" for a command that isn't there, and lists commands with their whole help, by
    `sections` where there are some."""

    command_class = Command

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.context_settings = {**CONTEXT, **self.context_settings}
        self.sections: dict[str, list[str]] = {}

    def add_section(self, title: str, commands: Sequence[click.Command]) -> None:
        for command in commands:
            self.add_command(command)
        self.sections[title] = [str(command.name) for command in commands]

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and self.get_command(ctx, args[0]) is None:
            ctx.fail(f"no command {args[0]!r}: {did_you_mean(args[0], self.list_commands(ctx))}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections = self.sections or {"Commands": self.list_commands(ctx)}
        for title, names in sections.items():
            rows = []
            for name in names:
                command = self.get_command(ctx, name)
                if command is not None and not command.hidden:
                    rows.append((name, command.get_short_help_str(limit=400)))
            with formatter.section(title):
                formatter.write_dl(rows)


def command(name: str | None = None, *, example: str) -> Callable[[Callable[..., Any]], Command]:
    """Makes a `Command` of a function; every command shows an example."""
    return click.command(name, cls=Command, example=example)
