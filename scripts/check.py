"""Everything that must hold before a change lands: lint, format, types, documentation, tests."""

import subprocess
import sys

CHECKS = (
    ("ruff", "check", "."),
    ("ruff", "format", "--check", "."),
    ("mypy",),
    ("mkdocs", "build", "--strict", "--quiet", "--site-dir", "build/site"),
    ("pytest", "--numprocesses=2", "--dist=loadfile"),  # so that what a file's tests share is made once
)


def main() -> int:
    """Run all checks, in order, and stop at the first that fails."""
    for module, *arguments in CHECKS:
        print(f"== {module} {' '.join(arguments)}", flush=True)
        code = subprocess.run([sys.executable, "-m", module, *arguments], check=False).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
