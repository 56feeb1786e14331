"""The command `mtu`: its options, its exit codes and how it reports errors.

Each command lives in a module of its own and joins below by one line. A command imports the library when it runs, so
that `mtu --help` never waits for PyTorch.
"""

import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mtu.cli.data import data_app
from mtu.cli.inspect import EXAMPLES as INSPECT_EXAMPLES
from mtu.cli.inspect import run_inspect_command
from mtu.cli.output import print_error
from mtu.cli.train import EXAMPLES as TRAIN_EXAMPLES
from mtu.cli.train import run_train_command

__all__ = ["app", "main"]

_EPILOG = """
[bold]Examples[/bold]

  mtu inspect sd15
  mtu inspect sdxl --sweep --budget 3B
  mtu data check data/edit
  mtu train icons --output runs/icons
  mtu --debug inspect no/such/folder

[bold]Exit codes[/bold]

  0    The command did its work.
  1    The command failed; one line on stderr says why.
  2    The command line is wrong; for training, also its settings, data or disk.
  130  The command was interrupted (Ctrl-C); training saves a checkpoint before.
  143  The command was ended by SIGTERM; training saves a checkpoint before.
"""


class _Commands(TyperGroup):
    """The one place where errors of the library become a line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print_error("Interrupted.")
            raise typer.Exit(130) from None
        except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough: typer ends in silence
            raise
        except (ValueError, OSError) as error:
            if ctx.params["debug"]:
                raise
            print_error(f"mtu {ctx.invoked_subcommand}: error: {error}")
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Commands,
    epilog=_EPILOG,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("inspect", epilog=INSPECT_EXAMPLES)(run_inspect_command)
app.add_typer(data_app, name="data")
app.command("train", epilog=TRAIN_EXAMPLES)(run_train_command)


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    try:
        print(f"mtu {version('mtu')}")
    except PackageNotFoundError:
        print("mtu, which runs from a folder and is not installed")
    raise typer.Exit()


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Turn one pre-trained diffusion model into a model of many tasks."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line, and end the process as `sys.exit` does.

    Args:
        argv: The arguments after the program's name; None takes those of the process.

    Raises:
        SystemExit: Always, with the exit code that `mtu --help` documents.
    """
    # Where torchvision is missing, transformers advises on stderr to install it, which no command needs.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # diffusers imports bitsandbytes where it is installed, which advises on some CPUs to install further kernels.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    app(args=sys.argv[1:] if argv is None else list(argv), prog_name="mtu")
