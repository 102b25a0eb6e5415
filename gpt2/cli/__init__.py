"""The command `fastgpt2`: one thin file a subcommand."""

from fastgpt2.gpt2.cli.cli import main as main  # where installed scripts look for it
