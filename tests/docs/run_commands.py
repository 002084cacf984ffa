"""Run commands of ``jepa-scale`` one after the other in this process: JSON list of argument lists on standard input,
exit codes with what was said as JSON lines into the file that is named."""

import contextlib
import io
import json
import sys
import traceback

from jepa_scale.cli import main as cli


def main() -> None:
    with open(sys.argv[1], "w", encoding="utf-8") as out:
        for argv in json.load(sys.stdin):
            said = io.StringIO()
            try:
                with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
                    code = cli.main(argv)
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else 1
            except Exception:
                code = 1
                said.write(traceback.format_exc())
            out.write(json.dumps({"argv": argv, "code": code, "said": said.getvalue()[-3000:]}) + "\n")
            out.flush()


if __name__ == "__main__":
    main()
