"""The lm-evaluation-harness's command line with the model class `dmpt`: the arguments are those of `lm_eval`.

    python -m benchmarks.lm_eval --model dmpt --model_args path=device --tasks wikitext,lambada_openai

Exit codes: as dmpt-export's for a folder or setting that cannot be used, else the harness's own.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

from runtime.ort import no_telemetry

MISSING = "lm_eval is not installed: pip install lm_eval"
BAD_INPUT = 3


def main() -> int:
    """Register the class and run the harness's main program; the exit code."""
    if find_spec("lm_eval") is None:
        return failed(MISSING, BAD_INPUT)
    no_telemetry()
    from lm_eval.__main__ import cli_evaluate

    import benchmarks.lm_eval.model  # noqa: F401 (registers the class)

    try:
        cli_evaluate()
    except Exception as error:
        code = getattr(error, "exit_code", None)
        if type(code) is not int:
            raise
        return failed(str(error), code)
    return 0


def failed(message: str, code: int) -> int:
    sys.stderr.write(f"Error: {message}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
