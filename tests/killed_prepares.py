"""`prepare` that dies: python killed_prepares.py FOLDER

with FOLDER/calls.json = {name: [source, tokenizer, settings], ...}.
Leaves FOLDER/NAME-N for every N, killed by SIGKILL just before its N-th operation that changes a file or a folder of
it. Each is forked from one process, which imports everything once.
"""

import json
import os
import sys
from pathlib import Path

from every_kill import die_before

from fastgpt2.gpt2.data.prepare import prepare
from fastgpt2.gpt2.data.sources import find_source


def main(folder: Path) -> None:
    for name, (source, tokenizer, settings) in json.loads((folder / "calls.json").read_text()).items():
        prepare(find_source(source), folder / f"alive-{name}", tokenizer, **settings)  # imports what is imported late
        for count in range(1, 1000):
            out = folder / f"{name}-{count}"
            if (child := os.fork()) == 0:
                die_before(count, out)
                prepare(find_source(source), out, tokenizer, **settings)
                os._exit(0)
            if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
                break
        else:
            raise SystemExit("it never ends")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
