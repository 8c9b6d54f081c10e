"""The command line ``lotr``: one file a command, parsing and printing only."""


def main() -> None:
    """Run ``lotr``; a refusal is one sentence on stderr and exit code 1."""
    try:
        from lotrtensor.cli.app import run
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    run()
