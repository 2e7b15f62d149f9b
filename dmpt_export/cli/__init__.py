"""One module per verb, each with a click command named `command`; checks.py has parameters shared by several verbs.
The program begins in start.py, which imports nothing, and goes on in main.py.

A command builds a request from its parameters (dmpt_export.requests), checks and runs it, and prints the result. At the
top a verb's module only imports click, the standard library and its request; everything else is imported inside its
functions, heavy modules only after the check. So `dmpt-export --help` is fast, mistakes are reported in the first
second, and a verb needs only its own extra.
"""

INTERRUPTED = 130  # exit code after Ctrl-C, anywhere
