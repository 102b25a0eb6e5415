"""`python -m fastgpt2.gpt2`: the same as the command `fastgpt2`."""

import sys

from fastgpt2.gpt2.cli.cli import main

sys.exit(main())
